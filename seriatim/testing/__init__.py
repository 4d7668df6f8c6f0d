"""Generic tests that every part must pass, for parts of one's own: they need torch alone and run in seconds.

    check_head(MyHead, width=64)              a head: `heads/base.py`
    check_backbone(lambda: MyBackbone(9, 4))  a backbone of either contract: `backbones/base.py`
    check_model(lambda: MyModel(...))         a sequence model: `models/base.py`
    check_tokenizer(MyTokenizer(...))         a tokenizer: `tokenizers/base.py`

Each takes `device`, and raises AssertionError with a sentence that says what is wrong.
"""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["check_backbone", "check_head", "check_model", "check_tokenizer", "known_density"]


__getattr__ = exporter(
    __name__,
    {
        "check_backbone": "seriatim.testing.backbone_checks",
        "check_head": "seriatim.testing.head_checks",
        "check_model": "seriatim.testing.model_checks",
        "check_tokenizer": "seriatim.testing.tokenizer_checks",
        "known_density": "seriatim.testing.head_checks",
    },
)
