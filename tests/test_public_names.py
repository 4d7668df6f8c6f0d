"""What `import seriatim` promises is there; unlike the test of the architecture, it needs torch."""

from __future__ import annotations

import pytest

import seriatim


def test_public_names_exist() -> None:
    for name in seriatim.__all__:
        assert getattr(seriatim, name) is not None
    assert seriatim.__all__ == sorted(seriatim.__all__), "the public list is sorted"
    with pytest.raises(AttributeError):
        _ = seriatim.no_such_name
