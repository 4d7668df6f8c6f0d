"""Editing is sampling with known tokens. This module says which tokens a mask repaints, and keeps the other pixels.

White pixels of a mask are repainted, as in diffusers. A token is generated anew if any of its pixels is white; all
other tokens stay bitwise equal. Black pixels also stay equal, because the original pixels are put back at the end.

Shapes: B images, c channels, H x W pixels, h x w = L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from seriatim.core.errors import UsageError
from seriatim.core.flatten import BLACK, WHITE, Colour
from seriatim.core.images import BadImage, as_seen
from seriatim.models.base import SequenceModel
from seriatim.tokenizers.base import Tokenizer, to_uint8

GREY = 128  # pixels of a mask with this value or a brighter one are repainted


def pixel_mask(mask: Any, size: tuple[int, int], images: int) -> Tensor:
    """The mask (B, H, W) bool of the pixels to repaint, from one mask for all images or one for each.

    A mask is a PIL picture (white is repainted, transparent is not), or an array or tensor (H, W) or (B, H, W) of bool,
    uint8, or floats in [0, 1]. Raises UsageError if it has another size, or is all black or all white.
    """
    many = list(mask) if isinstance(mask, (list, tuple)) else [mask]
    planes = [plane for one in many for plane in as_planes(one)]
    for plane in planes:
        if tuple(plane.shape) != size:
            raise UsageError(
                f"mask: {plane.shape[0]}x{plane.shape[1]} pixels is not the image's {size[0]}x{size[1]}; resize it"
            )
    if len(planes) not in (1, images):
        raise UsageError(f"mask: {len(planes)} masks given for {images} images; give one for all, or one for each")
    result = torch.stack(planes * images if len(planes) == 1 else planes)
    for i, plane in enumerate(result):
        which = f" of image {i}" if len(planes) > 1 else ""
        if not bool(plane.any()):
            raise UsageError(f"mask{which}: is all black, so nothing would be repainted; paint white what shall change")
        if bool(plane.all()):
            raise UsageError(f"mask{which}: is all white, so nothing would be kept; generate a new image instead")
    return result


def as_planes(mask: Any) -> list[Tensor]:
    """The bool planes (H, W) of a picture, array or tensor."""
    if isinstance(mask, Image.Image):
        return [torch.from_numpy(np.asarray(seen(mask, 1, BLACK, "mask")) >= GREY)]
    try:
        values = mask.cpu() if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
    except TypeError:
        raise UsageError(f"mask: {type(mask).__name__} is not a picture, array or tensor") from None
    if values.is_complex():
        raise UsageError(f"mask: {values.dtype} is not allowed; give bool, uint8, or floats in [0, 1]")
    if values.ndim not in (2, 3):
        raise UsageError(f"mask: shape {tuple(values.shape)} is not (H, W) or (B, H, W)")
    if values.dtype != torch.bool:
        if not values.is_floating_point() and values.numel() and int(values.max()) == 1:
            raise UsageError("mask: holds only 0 and 1 as integers, though white is 255; convert it to bool")
        values = values >= (0.5 if values.is_floating_point() else GREY)
    return list(values) if values.ndim == 3 else [values]


def token_mask(mask: Tensor, tokenizer: Tokenizer) -> Tensor:
    """The tokens (B, L) bool that hold any of the pixels (B, H, W) to repaint."""
    (h, w), cell = tokenizer.grid, tokenizer.cell
    padded = F.pad(mask.float(), (0, w * cell[1] - mask.shape[2], 0, h * cell[0] - mask.shape[1]))
    return F.max_pool2d(padded[:, None], cell)[:, 0].flatten(1) > 0  # (B, h, w) -> (B, L)


def token_pixels(tokens: Tensor, tokenizer: Tokenizer) -> Tensor:
    """The pixels (B, H, W) bool that the chosen tokens (B, L) cover."""
    (h, w), cell, (H, W) = tokenizer.grid, tokenizer.cell, tokenizer.size
    image = tokens.view(-1, h, w).repeat_interleave(cell[0], dim=1).repeat_interleave(cell[1], dim=2)
    return image[:, :H, :W]


def as_images(images: Any, tokenizer: Tokenizer, background: Colour = WHITE) -> Tensor:
    """Images (B, H, W, c) uint8 from PIL pictures, arrays (B, H, W, c) uint8, or tensors (B, c, H, W) in [-1, 1].

    Transparent parts of PIL pictures show `background`. Raises UsageError if the size is not the model's.
    """
    if not tokenizer.pictures:
        raise UsageError("image: this model generates no pictures, which `edit` needs; use `regenerate`")
    many = list(images) if isinstance(images, (list, tuple)) else [images]
    if not many:
        raise UsageError("image: the list is empty; give at least one image")
    arrays = [array for one in many for array in as_arrays(one, tokenizer.channels, background)]
    H, W = tokenizer.size
    for array in arrays:
        if array.shape[:2] != (H, W):
            raise UsageError(
                f"image: {array.shape[0]}x{array.shape[1]} pixels (height x width), but the model generates {H}x{W}; "
                "crop or scale it first"
            )
    return torch.from_numpy(np.stack(arrays))


def seen(picture: Image.Image, channels: int, background: Colour, argument: str) -> Image.Image:
    """The picture as a viewer shows it (orientation, transparency, colours); image files are read the same way."""
    try:
        return as_seen(picture, channels, background)
    except BadImage as error:
        raise UsageError(f"{argument}: a picture of mode {picture.mode} can't be read ({error})") from error


def as_arrays(image: Any, channels: int, background: Colour) -> list[Any]:
    """A list of arrays (H, W, c) uint8 from one picture or a batch of pictures."""
    if isinstance(image, Image.Image):
        array = np.asarray(seen(image, channels, background, "image"))
        return [array[..., None] if channels == 1 else array]
    if isinstance(image, Tensor):
        tensor = image[None] if image.ndim == 3 else image
        if tensor.ndim == 4 and tensor.shape[1] == channels and tensor.is_floating_point():
            if not bool((tensor.abs() <= 1.001).all()):  # written so that NaN is refused too
                raise UsageError("image: a tensor's values must be in [-1, 1]; scale them")
            return list(to_uint8(tensor).numpy())
        raise UsageError(f"image: a tensor must be (B, {channels}, H, W) in [-1, 1], not {tuple(image.shape)}")
    array = np.asarray(image)
    array = array[..., None] if channels == 1 and array.ndim == 2 else array
    batch = array[None] if array.ndim == 3 else array
    if batch.ndim != 4 or batch.shape[-1] != channels or batch.dtype != np.uint8:
        raise UsageError(f"image: an array must be (B, H, W, {channels}) uint8, not {tuple(array.shape)} {array.dtype}")
    return list(batch)


def chosen_tokens(tokens: Any, images: int, count: int) -> Tensor:
    """The tokens to generate anew, (B, L) bool, from a bool mask (L,) or (B, L), or from indices for all images."""
    try:
        values = torch.as_tensor(tokens).cpu()
    except (TypeError, ValueError, RuntimeError):
        kind = type(tokens).__name__
        raise UsageError(f"tokens: {kind} is not a list of indices, or a bool mask (L,) or (B, L)") from None
    if not values.numel():
        raise UsageError("tokens: none are chosen, so nothing would be redrawn; choose at least one")
    if values.dtype != torch.bool:
        if values.ndim != 1 or values.is_floating_point():
            raise UsageError(f"tokens: shape {tuple(values.shape)} is not a list of indices, or a bool mask (B, L)")
        if len(values) and (int(values.min()) < 0 or int(values.max()) >= count):
            worst = int(values.max()) if int(values.max()) >= count else int(values.min())
            raise UsageError(f"tokens: {worst} is not allowed; indices are 0 to {count - 1}")
        values = torch.zeros(count, dtype=torch.bool).scatter(0, values.long(), True)
    if values.shape not in ((count,), (images, count)):
        raise UsageError(f"tokens: shape {tuple(values.shape)} is not ({count},) or ({images}, {count})")
    result = values.expand(images, count).clone()
    if not bool(result.any()):
        raise UsageError("tokens: none are chosen, so nothing would be redrawn; choose at least one")
    return result


def replacement(returned: Any, model: SequenceModel, images: int) -> Tensor | None:
    """The tokens with which a callback replaces those of a step: "tokens" of the mapping it returned, or None."""
    name = "callback_on_step_end"
    if returned is None:
        return None
    if not isinstance(returned, Mapping) or returned.keys() - {"tokens", "known"}:
        says = sorted(map(str, returned)) if isinstance(returned, Mapping) else repr(returned)
        raise UsageError(f"{name}: returned {says}, which is not allowed; return None, or {{'tokens': ...}}")
    if "tokens" not in returned:
        return None
    tokens = returned["tokens"]
    if not isinstance(tokens, Tensor):
        raise UsageError(f"{name}: returned tokens of type {type(tokens).__name__}; they must be a tensor")
    try:
        model.spec.check(tokens, images)
    except UsageError as error:
        raise UsageError(f"{name}: returned {error}") from None
    if not bool(torch.isfinite(tokens).all()):
        raise UsageError(f"{name}: returned tokens that are not finite")
    return tokens


def composite(drawn: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    """The pixels of `drawn` where mask (B, H, W) is set and exactly those of `kept` elsewhere: uint8 (B, H, W, c)."""
    return torch.where(mask[..., None], drawn, kept)


def broadcast(images: Tensor, labels: Sequence[Any]) -> int:
    """The number of pictures that an edit makes. One image may have many labels, and one label many images."""
    if len(images) != len(labels) and 1 not in (len(images), len(labels)):
        raise UsageError(
            f"class_labels: {len(labels)} labels given for {len(images)} images; give one for all, or one for each"
        )
    return max(len(images), len(labels))
