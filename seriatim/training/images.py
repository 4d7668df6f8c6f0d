"""The decoder under the name of its former place; it is `seriatim.core.images`."""

from __future__ import annotations

from seriatim.core.images import BadImage, centre_crop, load_pixels, read_image

__all__ = ["BadImage", "centre_crop", "load_pixels", "read_image"]
