"""The public tables that map names to the classes of heads, backbones, conditioners, splits and models.

One line registers a class of your own: `HEADS["mine"] = Mine`.
"""

from __future__ import annotations

from seriatim.backbones.base import Backbone
from seriatim.backbones.bidirectional_transformer import Bidirectional
from seriatim.backbones.causal_transformer import Causal
from seriatim.backbones.masked_transformer import Masked
from seriatim.conditions.base import Conditioner
from seriatim.conditions.captions import CaptionEmbedder
from seriatim.conditions.classes import Classes
from seriatim.heads.base import Head
from seriatim.heads.bins import Bins
from seriatim.heads.categorical import Categorical
from seriatim.heads.diffusion import Diffusion
from seriatim.heads.energy import Energy
from seriatim.heads.flow import Flow
from seriatim.heads.mixture import Mixture
from seriatim.models.base import SequenceModel
from seriatim.models.causal_model import CausalModel
from seriatim.models.masked_model import MaskedModel
from seriatim.models.nested import Nested
from seriatim.models.splits import RGB, Features, Patches, Split

HEADS: dict[str, type[Head]] = {
    "bins": Bins,
    "categorical": Categorical,
    "diffusion": Diffusion,
    "energy": Energy,
    "flow": Flow,
    "mixture": Mixture,
    "nested": Nested,
}
BACKBONES: dict[str, type[Backbone]] = {"bidirectional": Bidirectional, "causal": Causal, "masked": Masked}
CONDITIONERS: dict[str, type[Conditioner]] = {"captions": CaptionEmbedder, "classes": Classes}
MODELS: dict[str, type[SequenceModel]] = {"causal": CausalModel, "masked": MaskedModel}
SPLITS: dict[str, type[Split]] = {"features": Features, "patches": Patches, "rgb": RGB}
