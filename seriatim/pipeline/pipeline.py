"""A `Pipeline` joins a model and its tokenizer; it can be called for images, streamed step by step, and saved."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.core.device import pick_device, pick_dtype, plain_torch
from seriatim.core.errors import UsageError
from seriatim.core.progress import Progress
from seriatim.core.schedules import GUIDANCE_OPTIONS
from seriatim.core.validation import plain
from seriatim.nn.prepare import prepare
from seriatim.pipeline.arguments import SettingsArgs
from seriatim.pipeline.editing import (
    as_images,
    broadcast,
    chosen_tokens,
    pixel_mask,
    replacement,
    token_mask,
    token_pixels,
)
from seriatim.pipeline.labels import class_number, name_of
from seriatim.pipeline.metadata import versions
from seriatim.pipeline.request import Label, SampleRequest, fitted, resolved, seeds_of
from seriatim.pipeline.result import Result, arrays_of, as_pil, check_output, converted, finite, gathered
from seriatim.pipeline.sampler import sampled
from seriatim.sampling.step import Start, Step
from seriatim.tokenizers.base import to_uint8

BATCH_TOKENS = 1 << 14  # tokens of a batch when the caller gives no batch_size

StepCallback = Callable[["Pipeline", int, int, dict[str, Tensor]], Mapping[str, Tensor] | None]


class Pipeline:
    """A model with its tokenizer, ready to generate images.

    pipe = seriatim.load("demo/model")
    result = pipe(class_labels=[3, 8], num_images_per_label=4, seed=7)
    result.images[0].save("three.png")

    A pipeline made from a bundle leaves the bundle's device and training modes unchanged after every call. `load` makes
    a pipeline that owns its model and lays the weights out for sampling.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        source: str = "",
    ) -> None:
        """Use `bundle` on `device`. None keeps the model's device; any other value moves the model in place."""
        self.bundle, self.source = bundle, source
        self.owned = False  # an owned model is never trained and stays in evaluation mode
        self.model, self.tokenizer = bundle.model, bundle.tokenizer
        self.device = self.model.device if device is None else pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        if device is not None:
            self.model.to(self.device)
            self.tokenizer.to(self.device)

    def prepare(self) -> Pipeline:
        """Lay the model's weights out for sampling, in place, as `load` does. It is then faster but not trainable."""
        self.owned = True
        self.model.eval()
        self.tokenizer.eval()
        prepare(self.model.backbone, self.dtype, keep=("token_embed",))  # it takes tokens, which are float32
        prepare(self.model.head)
        return self

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """A context in which model and tokenizer are in evaluation mode and torch has the settings this package needs.

        Afterwards every module is back in its former mode, and torch has the caller's settings.
        """
        if self.owned:
            with plain_torch():
                yield
            return
        modes = [(part, part.training) for whole in (self.model, self.tokenizer) for part in whole.modules()]
        self.model.eval()
        self.tokenizer.eval()
        try:
            with plain_torch():
                yield
        finally:
            for part, training in modes:
                part.training = training

    @property
    def class_names(self) -> list[str]:
        return self.bundle.class_names

    @property
    def defaults(self) -> dict[str, Any]:
        """The sampling settings that the model was saved with; arguments of a call override them."""
        return dict(self.bundle.sampling)

    # --- asking ---------------------------------------------------------------------------------------------------

    def request(self, **settings: Any) -> SampleRequest:
        """The request that a call with these arguments makes, with defaults filled in and everything checked."""
        defaults, settings = self.defaults, {k: plain(v) for k, v in settings.items() if v is not None}
        if settings.get("guidance_schedule", defaults.get("guidance_schedule")) != defaults.get("guidance_schedule"):
            for option in GUIDANCE_OPTIONS.values():  # they belong to the schedule that this call replaces
                defaults.pop(option, None)
        labels = settings.get("class_labels", defaults.get("class_labels"))  # None means one image of no class
        if labels is None:
            settings["class_labels"] = (None,)
        elif isinstance(labels, (str, int, float)):
            settings["class_labels"] = (labels,)
        settings.setdefault("seed", secrets.randbits(32))
        request = resolved(settings, defaults, self.model)
        self.check_labels(request)
        return request

    def checked(self, request: SampleRequest) -> SampleRequest:
        """A request made elsewhere, completed for this model. Raises UsageError if the model can't follow it."""
        self.check_labels(request)
        options = {f.name for f in dataclasses.fields(self.model.head.Options)}
        for name in request.head_options:
            if name not in options:
                raise UsageError(f"{name}: the {type(self.model.head).__name__} head has no such option; leave it out")
        return fitted(request, self.model, set())

    def check_labels(self, request: SampleRequest) -> None:
        for label in request.class_labels:
            self.label_index(label)

    def label_index(self, label: Label) -> int:
        """The number of the class with this number or name; -1 for no class, which is None or "none".

        Digits that are the name of one class and the number of another are refused; "number:3" is always a number.
        """
        return class_number(label, self.model.classes, self.class_names)

    def label_name(self, label: Label) -> str | None:
        index = self.label_index(label)
        return None if index < 0 else name_of(index, self.class_names)

    # --- sampling -------------------------------------------------------------------------------------------------

    def stream(
        self,
        class_labels: Any = None,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        request: SampleRequest | None = None,
        **settings: Unpack[SettingsArgs],
    ) -> Iterator[Step]:
        """Yield a `Step` after every sampling step; `step.preview()` decodes it. Close the iterator to cancel.

        A batch of `batch_size` images is finished before the next begins. `generator`, one for all images or one for
        each, replaces `seed`: the seed of each image is drawn from it. The other arguments are those of a
        `SampleRequest`.
        """
        given: dict[str, Any] = dict(settings)
        if class_labels is not None:
            given["class_labels"] = class_labels
        return self._steps(self._resolve(generator, request, given), batch_size)

    def _resolve(
        self,
        given: torch.Generator | Sequence[torch.Generator] | None,
        request: SampleRequest | None,
        settings: dict[str, Any],
    ) -> SampleRequest:
        if request is not None and settings:
            raise UsageError(f"request: given together with {sorted(settings)[0]}; put everything into the request")
        request = self.request(**settings) if request is None else self.checked(request)
        if given is None:
            return request
        return request.model_copy(update={"seeds": seeds_of(given, request.num_images)})

    def _steps(self, request: SampleRequest, batch_size: int | None, start: Start | None = None) -> Iterator[Step]:
        """The steps of a request. A wrong `batch_size` raises at once, not when the first step is asked for."""
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
            raise UsageError(f"batch_size: {batch_size!r} is not allowed; it must be an integer of at least 1")
        labels = torch.tensor([self.label_index(label) for label in request.image_labels()], device="cpu")
        size, grid = batch_size or max(1, BATCH_TOKENS // self.model.tokens), self.tokenizer.grid
        return sampled(self.model, request, labels, grid, size, start, self.dtype, self.sampling, self._pil)

    def __call__(
        self,
        class_labels: Any = None,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        request: SampleRequest | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = True,
        **settings: Unpack[SettingsArgs],
    ) -> Result:
        """Generate images: `pipe([3, 8])` generates one of each class, and `pipe()` one image of no class.

        The settings are those of a `SampleRequest`, with diffusers' names where it has them; options of the head
        (`num_diffusion_steps`, `top_k`, ...) may be given beside them. `output_type` is "pil"; "np", (B, H, W, c)
        float32 in [0, 1]; "pt", (B, c, H, W) float32 in [0, 1]; or "tokens", the model's tokens (B, L, D). If the model
        does not generate pictures, the result is what the tokenizer's decode() returns: a tensor with "pt", otherwise
        an array.

        `callback_on_step_end(pipeline, index, total, {"tokens", "known"})` is called after each step; "tokens" in the
        mapping that it may return replace those of the step, and sampling continues from them. A call of more than two
        seconds shows a progress bar on standard error, unless `progress` is False.

        Raises UsageError if a setting is not allowed or would have no effect, and NumericsError if the sampled tokens
        are not finite.
        """
        check_output(output_type)
        check_callback(callback_on_step_end)
        given: dict[str, Any] = dict(settings)
        if class_labels is not None:
            given["class_labels"] = class_labels
        request = self._resolve(generator, request, given)
        steps = self._steps(request, batch_size)
        return self._result(request, steps, output_type, callback_on_step_end, progress=progress)

    def _result(
        self,
        request: SampleRequest,
        steps: Iterator[Step],
        output_type: str,
        callback_on_step_end: StepCallback | None = None,
        keep: tuple[Tensor, Tensor] | None = None,  # original pixels (B, H, W, c) uint8; mask (B, H, W) to repaint
        edited: bool = False,  # whether these images can't be generated from the request alone
        progress: bool = True,
    ) -> Result:
        """Run the steps, and decode each finished batch at once so that the device holds pictures of one batch only."""
        pictures: list[Any] = []
        finished: list[Tensor] = []
        with Progress(request.num_images, "sampling", "images", quiet=not progress) as bar:
            for step in steps:
                if callback_on_step_end is not None:
                    values = {"tokens": step.tokens, "known": step.known}
                    returned = callback_on_step_end(self, step.index, step.total, values)
                    other = replacement(returned, self.model, len(step.images))
                    if other is not None:
                        edited = True
                        step.replace(other)
                if step.last:
                    some = slice(step.images.start, step.images.stop)
                    finished.append(step.tokens.cpu())
                    if output_type != "tokens":
                        back = None if keep is None else (keep[0][some], keep[1][some])
                        pictures.append(self._output(step.tokens, output_type, back))
                bar.advance(len(step.images) if step.last else 0, f"step {step.index + 1} of {step.total}")
        tokens = torch.cat(finished)  # (B, L, D)
        names = [self.label_name(label) for label in request.image_labels()]
        images = tokens if output_type == "tokens" else gathered(pictures)
        made = versions(self.device, self.dtype)
        return Result(images, names, request.image_seeds(), request, tokens, self.bundle.sha256, made, edited, keep)

    def _output(self, tokens: Tensor, output_type: str, keep: tuple[Tensor, Tensor] | None) -> Any:
        """The tokens of one batch, decoded and converted to `output_type`."""
        decoded = self._decode(tokens)
        return converted(decoded, output_type, keep) if self.tokenizer.pictures else arrays_of(decoded, output_type)

    # --- editing --------------------------------------------------------------------------------------------------

    def edit(
        self,
        image: Any,
        *,
        mask: Any,
        class_labels: Any = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = True,
        **settings: Unpack[SettingsArgs],
    ) -> Result:
        """Repaint an image where `mask` is white: inpaint, outpaint inside the frame, or change the class of a region.

        `image` is one picture or several of the model's size: PIL, arrays (B, H, W, c) uint8, or tensors (B, c, H, W)
        in [-1, 1]. `mask` is one for all or one for each: PIL, or arrays (H, W) or (B, H, W). `class_labels` is one for
        all or one for each; None means no class. Several labels for one picture make several pictures. A token with a
        white pixel is generated anew, all other tokens stay bitwise equal, and black pixels keep their exact values.
        The other arguments and the errors are those of a call.
        """
        check_output(output_type)
        check_callback(callback_on_step_end)
        request, start, keep = self._edit(image, mask, class_labels, generator, dict(settings))
        steps = self._steps(request, batch_size, start)
        return self._result(request, steps, output_type, callback_on_step_end, keep, edited=True, progress=progress)

    def stream_edit(
        self,
        image: Any,
        *,
        mask: Any,
        class_labels: Any = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        **settings: Unpack[SettingsArgs],
    ) -> Iterator[Step]:
        """Yield a `Step` after every step of an edit. Previews show the model's pixels everywhere, even under black."""
        request, start, _ = self._edit(image, mask, class_labels, generator, dict(settings))
        return self._steps(request, batch_size, start)

    @plain_torch()
    def _edit(
        self, image: Any, mask: Any, class_labels: Any, generator: Any, settings: dict[str, Any]
    ) -> tuple[SampleRequest, Start, tuple[Tensor, Tensor]]:
        """The request of an edit, the tokens it begins from, and the pixels and the mask for the end of `_result`."""
        originals = as_images(image, self.tokenizer, self.bundle.background)  # (n, H, W, c)
        labels = tuple(class_labels) if isinstance(class_labels, (list, tuple)) else (class_labels,)
        count = broadcast(originals, labels)
        labels = labels * count if len(labels) == 1 else labels
        originals = originals.repeat(count, 1, 1, 1) if len(originals) == 1 else originals
        request = self._resolve(generator, None, {**settings, "class_labels": labels})
        each = request.num_images_per_label
        white = pixel_mask(mask, self.tokenizer.size, count).repeat_interleave(each, dim=0)  # (B, H, W)
        originals = originals.repeat_interleave(each, dim=0)  # (B, H, W, c)
        floats = originals.permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1
        with self.sampling():
            tokens = self.tokenizer.tokens(self.tokenizer.moments(floats))  # (B, L, D)
        return request, Start(tokens, ~token_mask(white, self.tokenizer)), (originals, white)

    def regenerate(
        self,
        result: Result,
        tokens: Any,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = True,
        **settings: Unpack[SettingsArgs],
    ) -> Result:
        """Generate chosen tokens of a result anew; all other tokens stay bitwise equal.

        `tokens` are indices, or a bool mask (L,) or (B, L). Settings that are not given are those of the result's
        request, except for the seed, which is random. The other arguments and the errors are those of a call.
        """
        check_output(output_type)
        check_callback(callback_on_step_end)
        count, L = result.tokens.shape[:2]
        redraw = chosen_tokens(tokens, count, L)
        given = {k: plain(v) for k, v in settings.items() if v is not None}
        before = result.request.model_dump(exclude={"seed", "seeds"})  # complete, so the model's defaults don't apply
        request = resolved({**given, "seed": given.get("seed", secrets.randbits(32))}, before, self.model)
        request = self._resolve(generator, request, {})
        if request.num_images != count:
            raise UsageError(f"class_labels: the request is for {request.num_images} images, the result has {count}")
        keep = None
        if result.kept is not None:  # pixels that the edit kept are kept again, except in tokens generated anew
            originals, white = result.kept
            keep = (originals, white | token_pixels(redraw, self.tokenizer))
        steps = self._steps(request, batch_size, Start(result.tokens, ~redraw))
        return self._result(request, steps, output_type, callback_on_step_end, keep, edited=True, progress=progress)

    def _decode(self, tokens: Tensor, known: Tensor | None = None) -> Tensor:
        with self.sampling():
            return finite(self.tokenizer.look(tokens.to(self.device), known))

    def _pil(self, tokens: Tensor, known: Tensor | None = None) -> list[Image.Image]:
        if not self.tokenizer.pictures:
            raise UsageError("preview: this model generates no pictures; use step.tokens")
        return as_pil(to_uint8(self._decode(tokens, known)))

    # --- saving ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a model folder that `load` can read, and return its path."""
        return save_bundle(self.bundle, Path(folder))


def check_callback(callback: Any) -> None:
    if callback is not None and not callable(callback):
        raise UsageError(f"callback_on_step_end: {callback!r} is not allowed; give a function")
