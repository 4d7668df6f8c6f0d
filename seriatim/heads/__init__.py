"""Heads model the distribution p(x | z) of one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seriatim.core.lazy import exports

if TYPE_CHECKING:
    from seriatim.heads.base import Guidance as Guidance
    from seriatim.heads.base import Head as Head
    from seriatim.heads.base import HeadLoss as HeadLoss
    from seriatim.heads.bins import Bins as Bins
    from seriatim.heads.categorical import Categorical as Categorical
    from seriatim.heads.diffusion import Diffusion as Diffusion
    from seriatim.heads.energy import Energy as Energy
    from seriatim.heads.flow import Flow as Flow
    from seriatim.heads.gaussians import GaussianMixture as GaussianMixture
    from seriatim.heads.mixture import Mixture as Mixture
else:
    __all__, __getattr__, __dir__ = exports(
        __name__,
        {
            "base": "Guidance Head HeadLoss",
            "bins": "Bins",
            "categorical": "Categorical",
            "diffusion": "Diffusion",
            "energy": "Energy",
            "flow": "Flow",
            "gaussians": "GaussianMixture",
            "mixture": "Mixture",
        },
    )
