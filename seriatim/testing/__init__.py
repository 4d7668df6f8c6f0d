"""Generic tests that every part must pass, for parts of one's own: they need torch alone and run in seconds.

    check_head(MyHead, width=64)              a head: `heads/base.py`
    check_backbone(lambda: MyBackbone(9, 4))  a backbone of either contract: `backbones/base.py`
    check_model(lambda: MyModel(...))         a sequence model: `models/base.py`
    check_tokenizer(MyTokenizer(...))         a tokenizer: `tokenizers/base.py`

Each takes `device`, and raises AssertionError with a sentence that says what is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seriatim.core.lazy import exports

if TYPE_CHECKING:
    from seriatim.testing.backbone_checks import check_backbone as check_backbone
    from seriatim.testing.head_checks import check_head as check_head
    from seriatim.testing.head_checks import known_density as known_density
    from seriatim.testing.model_checks import check_model as check_model
    from seriatim.testing.tokenizer_checks import check_tokenizer as check_tokenizer
else:
    __all__, __getattr__, __dir__ = exports(
        __name__,
        {
            "backbone_checks": "check_backbone",
            "head_checks": "check_head known_density",
            "model_checks": "check_model",
            "tokenizer_checks": "check_tokenizer",
        },
    )
