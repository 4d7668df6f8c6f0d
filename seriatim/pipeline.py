"""From a name to images: `load` gives a `Pipeline`, which is called, streamed or saved."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from seriatim.checkpoints.hub import located
from seriatim.checkpoints.native import Bundle, load_bundle, save_bundle
from seriatim.core.device import pick_device, pick_dtype, plain_torch
from seriatim.core.errors import UsageError
from seriatim.core.orders import CONFIDENCE, ORDERS, RANDOM
from seriatim.core.random import Noise, generator
from seriatim.core.schedules import GUIDANCE_OPTIONS
from seriatim.core.validation import parse, plain
from seriatim.models.masked import is_confidence
from seriatim.sampling.editing import (
    as_images,
    broadcast,
    chosen_tokens,
    pixel_mask,
    replacement,
    token_mask,
    token_pixels,
)
from seriatim.sampling.labels import class_number, label_of, name_of
from seriatim.sampling.loops import one_by_one, steps_of
from seriatim.sampling.masked import FirstStep, Step, prepare_model
from seriatim.sampling.metadata import versions
from seriatim.sampling.request import Label, SampleRequest, fitted, seeds_of
from seriatim.sampling.result import Result, arrays_of, as_pil, check_output, converted, finite
from seriatim.tokenizers.base import to_uint8

BATCH_TOKENS = 1 << 14  # tokens of a batch unless the caller says how many images

HEAD_SETTINGS = "num_diffusion_steps start_timestep solver top_k top_p guidance_mode feature_schedule".split()
SHARED = "num_diffusion_steps"  # set in every request, whatever the head

Start = tuple[Tensor, Tensor]  # tokens (B, L, D), and which are known (B, L)
StepCallback = Callable[["Pipeline", int, int, dict[str, Tensor]], Mapping[str, Tensor] | None]


class Pipeline:
    """A model with its tokenizer, ready to draw.

    pipe = seriatim.load("demo/model")
    result = pipe(class_labels=[3, 8], num_images_per_label=4, seed=7)
    result.images[0].save("three.png")
    """

    def __init__(
        self, bundle: Bundle, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto", source: str = ""
    ) -> None:
        self.bundle, self.source = bundle, source
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.model = bundle.model.eval().to(self.device)
        self.tokenizer = bundle.tokenizer.eval().to(self.device)
        self.first: FirstStep | None = None

    def prepare(self) -> Pipeline:
        """Lay the model's weights out for sampling alone, in place, as `load` does: faster, but not trainable."""
        self.first = FirstStep(prepare_model(self.model, self.dtype))  # kept from call to call: nothing changes now
        return self

    @property
    def class_names(self) -> list[str]:
        return self.bundle.class_names

    @property
    def defaults(self) -> dict[str, Any]:
        """The sampling settings that the model was saved with; an argument of a call goes before them."""
        return dict(self.bundle.sampling)

    # --- asking ---------------------------------------------------------------------------------------------------

    def request(self, **settings: Any) -> SampleRequest:
        """The request that a call with these arguments makes: defaults filled in, everything checked."""
        defaults, settings = self.defaults, {k: plain(v) for k, v in settings.items() if v is not None}
        if settings.get("guidance_schedule", defaults.get("guidance_schedule")) != defaults.get("guidance_schedule"):
            for option in GUIDANCE_OPTIONS.values():  # they are of the schedule that the call replaces
                defaults.pop(option, None)
        merged = {**defaults, **settings}
        labels = merged.get("class_labels")
        if labels is None:
            merged["class_labels"] = tuple(label_of(i, self.class_names) for i in range(self.model.classes)) or (None,)
        elif isinstance(labels, (str, int, float)):
            merged["class_labels"] = (labels,)
        merged.setdefault("seed", secrets.randbits(32))
        return self.checked(parse(SampleRequest, merged, error=UsageError))

    def checked(self, request: SampleRequest) -> SampleRequest:
        """Refuse what this model can't do; more steps than a masked model has tokens are clamped, with a warning."""
        for label in request.class_labels:
            self.label_index(label)
        request.check_order(self.model.tokens)
        if not self.model.one_by_one:  # the others refuse it as any order but their own
            is_confidence(request.order, self.model.head)
        self.model.head.check_options(temperature=request.temperature, **self._head_options(request))
        return fitted(request, self.model.tokens, self.model.order if self.model.one_by_one else None)

    def _order(self, request: SampleRequest, images: slice) -> Tensor | str | None:
        """The order of these images as the samplers take it: on the tokenizer's grid, the first drawn first."""
        if request.order == RANDOM:
            return None
        if request.order == CONFIDENCE:
            return CONFIDENCE
        if isinstance(request.order, str):
            return torch.tensor(ORDERS[request.order](*self.tokenizer.grid))  # (L,)
        given = torch.tensor(request.order)  # (L,) or (all images, L)
        return given if given.ndim == 1 else given[images]

    def _head_options(self, request: SampleRequest) -> dict[str, Any]:
        """What the request says to the head; what the head doesn't have is refused, unless all requests set it."""
        options = self.model.head.sample_options
        for name in HEAD_SETTINGS:
            if getattr(request, name) is not None and name not in options and name != SHARED:
                kind = type(self.model.head).__name__
                raise UsageError(f"{name}: the {kind} head has no such setting; leave it out")
        return {k: value for k in HEAD_SETTINGS if k in options and (value := getattr(request, k)) is not None}

    def label_index(self, label: Label) -> int:
        """The number of a class given by number or name; -1 for None, which "none" stands for on a command line.

        Digits that name one class and number another are refused; "number:3" is a number.
        """
        return class_number(label, self.model.classes, self.class_names)

    def label_name(self, label: Label) -> str | None:
        index = self.label_index(label)
        return None if index < 0 else name_of(index, self.class_names)

    # --- drawing --------------------------------------------------------------------------------------------------

    def stream(
        self,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        request: SampleRequest | None = None,
        **settings: Any,
    ) -> Iterator[Step]:
        """Yield a `Step` after every step over the images; `step.preview()` decodes it. Close it to cancel.

        A batch of `batch_size` images is finished before the next begins. `generator` (one, or one for each image)
        stands in for `seed`; otherwise arguments are those of a `SampleRequest`.
        """
        request, generators = self._resolve(generator, request, settings)
        return self._steps(request, generators, batch_size)

    def _resolve(
        self,
        given: torch.Generator | Sequence[torch.Generator] | None,
        request: SampleRequest | None,
        settings: dict[str, Any],
    ) -> tuple[SampleRequest, list[torch.Generator]]:
        if request is not None and settings:
            raise UsageError(f"request: given together with {sorted(settings)[0]}; put everything into the request")
        request = self.request(**settings) if request is None else self.checked(request)
        if given is None:
            return request, [generator(seed) for seed in request.image_seeds()]
        seeds = seeds_of(given, request.num_images)
        request = request.model_copy(update={"seeds": seeds})
        return request, [generator(seed) for seed in seeds]

    def _steps(
        self,
        request: SampleRequest,
        generators: list[torch.Generator],
        batch_size: int | None,
        start: Start | None = None,
    ) -> Iterator[Step]:
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
            raise UsageError(f"batch_size: {batch_size!r} is not allowed; it must be an integer of at least 1")
        size = batch_size or max(1, BATCH_TOKENS // self.model.tokens)
        return one_by_one(self._batches(request, generators, size, start))

    def _batches(
        self, request: SampleRequest, generators: list[torch.Generator], size: int, start: Start | None
    ) -> Generator[Step]:
        labels = torch.tensor([self.label_index(label) for label in request.image_labels()], device=self.device)
        batches = [range(i, min(i + size, len(labels))) for i in range(0, len(labels), size)]
        steps = request.num_inference_steps
        anneals = "num_diffusion_steps" in self.model.head.sample_options
        for number, images in enumerate(batches):
            some = slice(images.start, images.stop)
            noise = Noise(generators[some], torch.arange(len(images)), self.device)
            for step in steps_of(
                self.model,
                labels[some] if self.model.classes else None,
                noise,
                steps=steps,
                guidance_scale=request.guidance_scale,
                guidance_schedule=request.guidance_schedule,
                guidance_interval=request.guidance_interval,
                guidance_power=request.guidance_power,
                temperature=request.temperature,
                token_schedule=request.token_schedule,
                num_diffusion_steps_last=request.num_diffusion_steps_last if anneals else None,
                min_tokens=request.min_tokens,
                order=self._order(request, some),
                choice_temperature=request.choice_temperature,
                dtype=self.dtype,
                first=self.first,
                tokens=None if start is None else start[0][some],
                known=None if start is None else start[1][some],
                **self._head_options(request),
            ):
                index, total = number * steps + step.index, len(batches) * steps
                yield replace(step, index=index, total=total, images=images, decode=self._pil)

    def __call__(
        self,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        request: SampleRequest | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        **settings: Any,
    ) -> Result:
        """Draw images. Arguments are those of a `SampleRequest`, diffusers' names where it has them.

        `output_type` is "pil", "np" (uint8), "pt" (float in [-1, 1]) or "latent" (tokens). What is no picture comes
        as the tokenizer's decode() gives it: a tensor with "pt", an array otherwise.
        `callback_on_step_end(pipeline, index, total, {"tokens", "known"})` is called after each step; "tokens" in the
        mapping that it may return replace the known ones, and sampling goes on from those.
        """
        check_output(output_type)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise UsageError(f"callback_on_step_end: {callback_on_step_end!r} is not allowed; give a function")
        request, generators = self._resolve(generator, request, settings)
        return self._result(request, self._steps(request, generators, batch_size), output_type, callback_on_step_end)

    def _result(
        self,
        request: SampleRequest,
        steps: Iterator[Step],
        output_type: str,
        callback_on_step_end: StepCallback | None = None,
        keep: tuple[Tensor, Tensor] | None = None,  # pixels (B, H, W, c) uint8, and where (B, H, W) others replace them
        edited: bool = False,  # the request alone does not make these images
    ) -> Result:
        """Run the steps, decode the last of each batch."""
        finished: list[Tensor] = []
        last: Step | None = None
        for step in steps:
            if callback_on_step_end is not None:
                values = {"tokens": step.tokens, "known": step.known}
                returned = callback_on_step_end(self, step.index, step.total, values)
                other = replacement(returned, self.model, len(step.images))
                if other is not None:
                    edited = True
                    step.tokens.copy_(other)
            if last is not None and last.images != step.images:
                finished.append(last.tokens)
            last = step
        assert last is not None, "a request has at least one image and one step"
        finished.append(last.tokens)
        tokens = torch.cat(finished)  # (B, L, D)
        names = [self.label_name(label) for label in request.image_labels()]
        images: Any = tokens
        if output_type != "latent":
            images = torch.cat([self._decode(some) for some in finished])  # (B, c, H, W)
            images = converted(images, output_type, keep) if self.tokenizer.pictures else arrays_of(images, output_type)
        made = versions(self.device, self.dtype)
        sha = self.bundle.sha256
        return Result(images, names, request.image_seeds(), request, tokens, sha, made, edited, keep)

    # --- editing --------------------------------------------------------------------------------------------------

    @plain_torch()
    def edit(
        self,
        image: Any,
        *,
        mask: Any,
        class_labels: Any = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        **settings: Any,
    ) -> Result:
        """Repaint where `mask` is white: inpaint, outpaint inside the frame, or change the class of a region.

        `image`: one picture or several, of the model's size: PIL, arrays (B, H, W, c) uint8, tensors (B, c, H, W) in
        [-1, 1]. `mask`: one for all or one for each: PIL, or (H, W), (B, H, W) arrays. `class_labels`: one for all or
        one for each; None is no class. Several labels for one picture make several pictures. A token with a white pixel
        is redrawn; all other tokens stay bitwise equal, and black pixels stay exactly as they were.
        """
        check_output(output_type)
        originals = as_images(image, self.tokenizer, self.bundle.background)  # (n, H, W, c)
        labels = tuple(class_labels) if isinstance(class_labels, (list, tuple)) else (class_labels,)
        count = broadcast(originals, labels)
        labels = labels * count if len(labels) == 1 else labels
        originals = originals.repeat(count, 1, 1, 1) if len(originals) == 1 else originals
        request, generators = self._resolve(generator, None, {**settings, "class_labels": labels})
        each = request.num_images_per_label
        white = pixel_mask(mask, self.tokenizer.size, count).repeat_interleave(each, dim=0)  # (B, H, W)
        originals = originals.repeat_interleave(each, dim=0)  # (B, H, W, c)
        floats = originals.permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1
        tokens = self.tokenizer.tokens(self.tokenizer.moments(floats))  # (B, L, D), the mode
        start = (tokens, ~token_mask(white, self.tokenizer))
        return self._result(
            request,
            self._steps(request, generators, batch_size, start),
            output_type,
            keep=(originals, white),
            edited=True,
        )

    def regenerate(
        self,
        result: Result,
        tokens: Any,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        **settings: Any,
    ) -> Result:
        """Redraw chosen tokens of a result: indices, or a bool mask (L,) or (B, L). The others stay bitwise equal.

        Settings are those of the result's request but for the seed, unless given.
        """
        check_output(output_type)
        count, L = result.tokens.shape[:2]
        redraw = chosen_tokens(tokens, count, L)
        given = {k: plain(v) for k, v in settings.items() if v is not None}
        before = result.request.model_dump(exclude={"seed", "seeds"})  # all of it: the model's defaults have no say
        request = parse(SampleRequest, {**before, "seed": secrets.randbits(32), **given}, error=UsageError)
        request, generators = self._resolve(generator, request, {})
        if request.num_images != count:
            raise UsageError(f"class_labels: the request is for {request.num_images} images, the result has {count}")
        keep = None
        if result.kept is not None:  # of an edited picture: what was kept still is, but for the tokens redrawn
            originals, white = result.kept
            keep = (originals, white | token_pixels(redraw, self.tokenizer))
        steps = self._steps(request, generators, batch_size, (result.tokens, ~redraw))
        return self._result(request, steps, output_type, keep=keep, edited=True)

    @plain_torch()
    def _decode(self, tokens: Tensor, known: Tensor | None = None) -> Tensor:
        return finite(self.tokenizer.look(tokens.to(self.device), known))

    def _pil(self, tokens: Tensor, known: Tensor | None = None) -> list[Image.Image]:
        if not self.tokenizer.pictures:
            raise UsageError("preview: this model's tokens are no pictures; look at step.tokens")
        return as_pil(to_uint8(self._decode(tokens, known)))

    # --- keeping --------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a model folder that `load` takes back."""
        return save_bundle(self.bundle, Path(folder))


# --- loading ------------------------------------------------------------------------------------------------------


@plain_torch()
def load(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    prepare: bool = True,
) -> Pipeline:
    """A pipeline from a model folder (or a run that holds one), a packaged name, or a hub repository `owner/name`.

    `dtype` is that of the backbone: "auto" is bfloat16 on an accelerator that has it, float32 elsewhere. Every file is
    checked against its sha256. Raises CheckpointError when there is nothing to load or it is damaged. With `prepare`
    weights are laid out for sampling alone (`Pipeline.prepare`); without, the model can be trained on.
    """
    text = os.fspath(name)
    pipe = Pipeline(load_bundle(located(text)), device=device, dtype=dtype, source=text)
    return pipe.prepare() if prepare else pipe
