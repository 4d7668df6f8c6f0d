"""A `Pipeline` joins a model and its tokenizer; it can be called for images, streamed step by step, and saved."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seriatim.core.device import plain_torch
from seriatim.core.errors import NumericsError, UsageError, check_known
from seriatim.core.keys import Keys
from seriatim.core.orders import CONFIDENCE, ORDERS, RANDOM
from seriatim.core.progress import Progress
from seriatim.core.schedules import GUIDANCE_OPTIONS
from seriatim.core.validation import plain
from seriatim.pipeline.arguments import ClassLabels, SettingsArgs, spelled_out
from seriatim.pipeline.editing import (
    as_images,
    broadcast,
    chosen_tokens,
    pixel_mask,
    replacement,
    token_mask,
    token_pixels,
)
from seriatim.pipeline.labels import class_number
from seriatim.pipeline.publishing import Stored
from seriatim.pipeline.request import SampleRequest, fitted, resolved, seeds_of
from seriatim.pipeline.result import OUTPUT_TYPES, Result, as_pil, converted
from seriatim.sampling.step import Start, Step
from seriatim.tokenizers.base import to_uint8

BATCH_TOKENS = 1 << 14  # tokens of a batch when the caller gives no batch_size

StepCallback = Callable[["Pipeline", int, int, dict[str, Tensor]], Mapping[str, Tensor] | None]


class Pipeline(Stored):
    """A model with its tokenizer, ready to generate images.

    pipe = seriatim.load("demo/model")
    result = pipe(class_labels=[3, 8], num_images_per_label=4, seed=7)
    result.images[0].save("three.png")

    A pipeline made from a bundle leaves the bundle's device and training modes unchanged after every call. `load` makes
    a pipeline that owns its model and lays the weights out for sampling.
    """

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

    # --- asking ---------------------------------------------------------------------------------------------------

    @spelled_out
    def request(
        self,
        request: SampleRequest | None = None,
        *,
        class_labels: ClassLabels = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        **settings: Unpack[SettingsArgs],
    ) -> SampleRequest:
        """The request that a call with these arguments makes, with defaults filled in and everything checked.

        A request that was made elsewhere is completed for this model. Raises UsageError if the model can't follow it.
        """
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
            raise UsageError(f"batch_size: {batch_size!r} is not allowed; it must be an integer of at least 1")
        every = {"class_labels": class_labels, **settings}
        given: dict[str, Any] = {name: plain(value) for name, value in every.items() if value is not None}
        if request is not None:
            if given:
                raise UsageError(f"request: given together with {sorted(given)[0]}; put everything into the request")
            request = fitted(request, self.model)
        else:
            defaults = dict(self.bundle.sampling)
            schedule = defaults.get("guidance_schedule")
            if given.get("guidance_schedule", schedule) != schedule:
                for option in GUIDANCE_OPTIONS.values():  # they belong to the schedule that this call replaces
                    defaults.pop(option, None)
            labels = given.get("class_labels", defaults.get("class_labels"))  # None means one image of no class
            if labels is None or isinstance(labels, (str, int, float)):
                given["class_labels"] = (labels,)
            given.setdefault("seed", secrets.randbits(32))
            request = resolved(given, defaults, self.model)
        self.classes_of(request)
        seeds = None if generator is None else seeds_of(generator, request.num_images)
        return request if seeds is None else request.model_copy(update={"seeds": seeds})

    def classes_of(self, request: SampleRequest) -> list[int]:
        """The number of the class of each image; -1 for no class, whose label is None or "none".

        Digits that are the name of one class and the number of another are refused; "number:3" is always a number.
        """
        numbers = [class_number(label, self.model.classes, self.bundle.class_names) for label in request.class_labels]
        return [number for number in numbers for _ in range(request.num_images_per_label)]

    # --- sampling -------------------------------------------------------------------------------------------------

    @spelled_out
    def stream(
        self,
        class_labels: ClassLabels = None,
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
        given: dict[str, Any] = {"class_labels": class_labels, **settings}
        return self._steps(self.request(request, generator=generator, batch_size=batch_size, **given), batch_size)

    def _steps(self, request: SampleRequest, batch_size: int | None, start: Start | None = None) -> Iterator[Step]:
        """The steps of a resolved request, in batches. `start` holds tokens of all B images.

        The model runs only inside `sampling()`, so that between steps it is as its owner left it.
        """
        model, size = self.model, batch_size or max(1, BATCH_TOKENS // self.model.tokens)
        labels, seeds = torch.tensor(self.classes_of(request), device="cpu"), request.image_seeds()
        order = request.order
        if isinstance(order, str):  # a named order is that of the tokenizer's grid, unless the sampler makes it
            order = None if order in (RANDOM, CONFIDENCE) else tuple(ORDERS[order](*self.tokenizer.grid))
        positions = None if order is None else torch.tensor(order, device="cpu")  # (L,) or (B, L)
        batches = [slice(i, i + size) for i in range(0, len(labels), size)]
        for number, some in enumerate(batches):
            images = range(len(labels))[some]
            with self.sampling():
                condition = model.condition(labels[some] if model.classes else None, len(images))
                steps = model.steps(
                    condition,
                    model.null(len(images), condition),
                    Keys.of_seeds(seeds[some]),
                    request,
                    None if start is None else Start(start.tokens[some], start.known[some]),
                    positions[some] if positions is not None and positions.ndim == 2 else positions,
                    dtype=self.dtype,
                )
            while True:
                with self.sampling():
                    step = next(steps, None)
                if step is None:
                    break
                step.index, step.total = number * step.total + step.index, len(batches) * step.total
                step.images, step.decode = images, self._pil
                yield step

    @spelled_out
    def __call__(
        self,
        class_labels: ClassLabels = None,
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
        given: dict[str, Any] = {"class_labels": class_labels, **settings}
        request = self.request(request, generator=generator, batch_size=batch_size, **given)
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
        check_known(OUTPUT_TYPES, output_type=output_type)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise UsageError(f"callback_on_step_end: {callback_on_step_end!r} is not allowed; give a function")
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
                        decoded = self._decode(step.tokens)
                        pictures.append(converted(decoded, output_type, self.tokenizer.pictures, back))
                bar.advance(len(step.images) if step.last else 0, f"step {step.index + 1} of {step.total}")
        tokens = torch.cat(finished)  # (B, L, D)
        images: Any = tokens
        if output_type == "pil" and self.tokenizer.pictures:
            images = [image for batch in pictures for image in batch]
        elif output_type != "tokens":
            images = torch.cat(pictures) if output_type == "pt" else np.concatenate(pictures)
        about = (self.bundle.sha256, self.versions, edited, keep)
        return Result(images, self.classes_of(request), self.bundle.class_names, request, tokens, *about)

    # --- editing --------------------------------------------------------------------------------------------------

    @spelled_out
    def edit(
        self,
        image: Any,
        *,
        mask: Any,
        class_labels: ClassLabels = None,
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
        request, start, keep = self._edit(image, mask, class_labels, generator, batch_size, dict(settings))
        steps = self._steps(request, batch_size, start)
        return self._result(request, steps, output_type, callback_on_step_end, keep, edited=True, progress=progress)

    @spelled_out
    def stream_edit(
        self,
        image: Any,
        *,
        mask: Any,
        class_labels: ClassLabels = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        **settings: Unpack[SettingsArgs],
    ) -> Iterator[Step]:
        """Yield a `Step` after every step of an edit. Previews show the model's pixels everywhere, even under black."""
        request, start, _ = self._edit(image, mask, class_labels, generator, batch_size, dict(settings))
        return self._steps(request, batch_size, start)

    @plain_torch()
    def _edit(
        self, image: Any, mask: Any, class_labels: Any, generator: Any, batch_size: int | None, settings: dict[str, Any]
    ) -> tuple[SampleRequest, Start, tuple[Tensor, Tensor]]:
        """The request of an edit, the tokens it begins from, and the pixels and the mask for the end of `_result`."""
        originals = as_images(image, self.tokenizer, self.bundle.background)  # (n, H, W, c)
        labels = tuple(class_labels) if isinstance(class_labels, (list, tuple)) else (class_labels,)
        count = broadcast(originals, labels)
        labels = labels * count if len(labels) == 1 else labels
        originals = originals.repeat(count, 1, 1, 1) if len(originals) == 1 else originals
        request = self.request(generator=generator, batch_size=batch_size, **{**settings, "class_labels": labels})
        each = request.num_images_per_label
        white = pixel_mask(mask, self.tokenizer.size, count).repeat_interleave(each, dim=0)  # (B, H, W)
        originals = originals.repeat_interleave(each, dim=0)  # (B, H, W, c)
        floats = originals.permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1
        with self.sampling():
            tokens = self.tokenizer.tokens(self.tokenizer.moments(floats))  # (B, L, D)
        return request, Start(tokens, ~token_mask(white, self.tokenizer)), (originals, white)

    @spelled_out
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
        count, L = result.tokens.shape[:2]
        redraw = chosen_tokens(tokens, count, L)
        given = {k: plain(v) for k, v in settings.items() if v is not None}
        before = result.request.model_dump(exclude={"seed", "seeds"})  # complete, so the model's defaults don't apply
        request = resolved({**given, "seed": given.get("seed", secrets.randbits(32))}, before, self.model)
        request = self.request(request, generator=generator, batch_size=batch_size)
        if request.num_images != count:
            raise UsageError(f"class_labels: the request is for {request.num_images} images, the result has {count}")
        keep = None
        if result.kept is not None:  # pixels that the edit kept are kept again, except in tokens generated anew
            originals, white = result.kept
            keep = (originals, white | token_pixels(redraw, self.tokenizer))
        steps = self._steps(request, batch_size, Start(result.tokens, ~redraw))
        return self._result(request, steps, output_type, callback_on_step_end, keep, edited=True, progress=progress)

    def _decode(self, tokens: Tensor, known: Tensor | None = None) -> Tensor:
        """The decoded tokens. Raises NumericsError if they are not finite, which 8-bit pixels would show as black."""
        with self.sampling():
            decoded = self.tokenizer.look(tokens.to(self.device), known)
            if decoded.is_floating_point() and not bool(torch.isfinite(decoded).all()):
                raise NumericsError(
                    "the decoded images are not finite, though their tokens are: the tokenizer's decoder overflows, or "
                    "its weights are damaged; take another tokenizer"
                )
        return decoded

    def _pil(self, tokens: Tensor, known: Tensor | None = None) -> list[Image.Image]:
        if not self.tokenizer.pictures:
            raise UsageError("preview: this model generates no pictures; use step.tokens")
        return as_pil(to_uint8(self._decode(tokens, known)))
