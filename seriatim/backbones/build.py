"""The table of backbones: name -> class. Register one of your own with `BACKBONES["mine"] = Mine`."""

from __future__ import annotations

from seriatim.backbones.base import Backbone
from seriatim.backbones.causal import Causal
from seriatim.backbones.masked import Masked

BACKBONES: dict[str, type[Backbone]] = {"masked": Masked, "causal": Causal}
