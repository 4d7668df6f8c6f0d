"""Train a tokenizer: the task that the engine runs, and the public function `train_tokenizer`.

Shapes: B images, c channels, H x W pixels in [-1, 1], V codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from seriatim.checkpoints.tokenizer import read_provenance, save_tokenizer
from seriatim.core.device import plain_torch, tf32
from seriatim.core.errors import ConfigError
from seriatim.core.files import expanded
from seriatim.core.keys import Keys
from seriatim.core.schedules import crossed
from seriatim.core.stopping import StopRequest
from seriatim.core.terminal import warn
from seriatim.data.base import ImageData
from seriatim.data.loader import Batch, to_float
from seriatim.evaluation.impartial import listed, seen_features
from seriatim.evaluation.sheet import Row, save_sheet, sheet
from seriatim.models.base import Loss
from seriatim.models.build import parameter_count
from seriatim.pipeline.result import as_pil
from seriatim.tokenizers.base import Tokenizer, to_uint8
from seriatim.tokenizers.code_watch import COLLAPSED
from seriatim.tokenizers.finite_scalar import FiniteScalar
from seriatim.tokenizers.kinds import tokenizer_config
from seriatim.tokenizers.latent import Latent
from seriatim.training.autoencoding import Autoencoding
from seriatim.training.batched_task import BatchedTask
from seriatim.training.budget import Budget
from seriatim.training.config import TokenizerRecipe
from seriatim.training.engine import TrainingResult, fit
from seriatim.training.judge import FORWARD, finite
from seriatim.training.log import MetricsLog, loss_curve, psnr_curve, tokenizer_card
from seriatim.training.look import COLUMNS, SHEET, is_due, timeline
from seriatim.training.optim import averaged
from seriatim.training.run_folder import Resume
from seriatim.training.setup import FIT_BATCH, FIT_IMAGES, unless_stopped
from seriatim.training.state import RunState, Trainables
from seriatim.training.task import Costs
from seriatim.training.tokenizer_losses import psnr_of, reconstruction_error
from seriatim.training.tokenizer_setup import adversarial_groups, build_autoencoding, perceptual_of

AT_SAVES = 1024  # images that the statistics of a checkpoint are measured on; those of the result on FIT_IMAGES
MOST_HELD_OUT = 2048  # images of a validation
BATCH = 64  # images at once where nothing is trained
ENCODED = 0.15  # the share of a training step that encoding an image takes, about
SHOWN = 16  # images of a preview
ENOUGH = 4  # tokens that are counted for each code before few codes in use mean anything
EARLY = 0.05  # share of a run in which few codes in use are no reason for a warning


@dataclass(frozen=True)
class TokenizerResult(TrainingResult):
    psnr: float | None  # in the last line of the log: of held-out images, or else of those trained on


class TokenizerTask(BatchedTask):
    """Trains a tokenizer to give images back."""

    model: Autoencoding
    what = "a tokenizer"

    def __init__(self, recipe: TokenizerRecipe, out: Path, where: torch.device, *, quiet: bool) -> None:
        settings = recipe.training
        data, model = build_autoencoding(recipe)
        self.set_up(recipe, data, model.to(where).train(), where)
        self.out, self.quiet, self.probed = out, quiet, recipe.objective.gan_start
        self.perceptual = perceptual_of(recipe.objective, data, where)
        source = recipe.tokenizer.get("from")
        begun = [] if source is None else [read_provenance(expanded(source))]
        self.seen = seen_features(begun, None if self.perceptual is None else self.perceptual.extractor)
        average = averaged(self.model, settings.ema)
        self.result: Tokenizer = cast(Autoencoding, average.module).tokenizer
        self.encoder: str | None = None  # with which the run began, if it has statistics
        if source is not None and isinstance(self.result, Latent):
            self.encoder = self.result.encoder_fingerprint()
        rate, betas, decay = settings.learning_rate, settings.betas, settings.weight_decay
        fused = True if where.type in ("cpu", "cuda") else None
        groups = adversarial_groups(self.model)
        optimiser = torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=decay, fused=fused)
        self.parts = Trainables(self.model, average, optimiser, self.result)
        self.psnr: float | None = None  # set when training ends
        self.warned = False

    def begin(self, stop: StopRequest) -> None:
        """Do nothing, because statistics are measured when a tokenizer is saved."""

    def check_resumed(self, path: Path) -> None:
        """Raise ConfigError if the perceptual term would come from other features than before."""
        if self.perceptual is None:
            return
        extractor = self.perceptual.extractor
        before = listed(read_provenance(path))
        if before and extractor.fingerprint() not in {each.get("sha256") for each in before}:
            raise ConfigError(
                f"objective.perceptual_features: {extractor.name} has other weights than the features that the run was "
                "trained with; put them back, or begin another run"
            )

    def settings_in_force(self) -> AbstractContextManager[None]:
        return tf32(self.where, enabled=self.recipe.training.tf32)

    def nominal(self, batch: Batch) -> float:
        return float(len(batch.whole))

    def losses(self, batch: Batch, dtype: torch.dtype) -> Iterator[Loss]:
        watch, parts = self.model.watch, [] if batch.spare else self.slices(len(batch))
        if watch is not None:
            watch.begin(batch.whole.start, len(batch.whole))
        for number, loss in enumerate(super().losses(batch, dtype)):
            coded = self.model.coded
            if watch is not None and number < len(parts):
                assert coded is not None and coded.codes is not None and coded.vectors is not None, "it gives codes"
                watch.add(coded.codes, coded.vectors, self.keys_of(batch, parts[number]))
            yield loss

    def images_of(self, batch: Batch, part: slice) -> Tensor:
        """The images `part` of a batch in [-1, 1]: (B, c, H, W)."""
        return to_float(batch.images[part].to(self.where, non_blocking=True))

    def keys_of(self, batch: Batch, part: slice) -> Keys:
        """The keys of the images `part` of a batch: image g of the run has the key (seed, "train", g)."""
        return self.keys.fold(torch.arange(batch.first + part.start, batch.first + part.stop))

    def loss(self, batch: Batch, part: slice, dtype: torch.dtype) -> Loss:
        objective = self.recipe.objective
        with torch.autocast(self.where.type, dtype=dtype, enabled=dtype != torch.float32):
            loss: Loss = self.net(
                self.images_of(batch, part),
                self.keys_of(batch, part),
                self.step_keys.fold(batch.whole.start),
                perceptual=self.perceptual,
                adversarial=bool(objective.gan) and batch.whole.start >= objective.gan_start,
                total=lambda values: self.world.total(values * (not batch.spare)),
            )
        return loss

    def standard(self, means: Mapping[str, float], before: float | None) -> float | None:
        """The reconstruction error with its perceptual term, since the adversarial terms begin later and rise."""
        if not self.recipe.objective.gan or "loss_reconstruction" not in means:
            return super().standard(means, before)
        return means["loss_reconstruction"] + self.recipe.objective.perceptual * means.get("loss_perceptual", 0.0)

    # --- codes ----------------------------------------------------------------------------------------------------

    def updated(self) -> None:
        """Count the codes of all processes, and revive dead ones in the weights and in their average."""
        watch = self.model.watch
        moved = None if watch is None else watch.end(self.world.total, self.world.rows)
        if moved is not None:
            moved.write(cast(Any, self.result).quantiser.codebook)
            moved.forget(self.parts.optimiser, cast(Any, self.model.tokenizer).quantiser.codebook)

    def tested(self, run: RunState, *, last: bool) -> dict[str, float]:  # noqa: ARG002
        """The usage and the perplexity of the codes lately. Few codes in use are warned of once."""
        watch = self.model.watch
        figures = {} if watch is None else watch.figures()
        if not figures or watch is None:
            return {}
        enough = int((watch.counts + watch.before).sum()) >= ENOUGH * watch.vocab and run.seen >= EARLY * self.total
        if figures["used"] < COLLAPSED and enough and not self.warned and self.world.main:
            self.warned = True
            objective = self.recipe.objective
            remedy = (
                f"raise objective.entropy (now {objective.entropy:g}), set objective.revive_images (now "
                f"{objective.revive_images}), or use a smaller tokenizer.vocab"
            )
            if isinstance(cast(Any, self.result).quantiser, FiniteScalar):
                remedy = "use fewer tokenizer.code_levels, or train longer or with a lower training.learning_rate"
            warn(
                f"the codebook has collapsed: {figures['used']:.1%} of {watch.vocab} codes are in use after {run.seen} "
                f"images; {remedy}"
            )
        return {"usage": figures["used"], "perplexity": figures["perplexity"]}

    # --- results of a run -----------------------------------------------------------------------------------------

    def measure(self, most: int, stop: StopRequest | None = None) -> None:
        """Measure the statistics of the averaged tokenizer's latents, if it has any, on about `most` images."""
        tokenizer = self.result
        if not isinstance(tokenizer, Latent) or tokenizer.encoder_fingerprint() == self.encoder:
            return  # a frozen encoder's latents keep their statistics, so that tokens mean what they meant
        if tokenizer.config["statistics"] == "fixed":  # those were another encoder's
            tokenizer.config["statistics"] = "channel"
        batches = unless_stopped(self.data.some(most, FIT_BATCH), stop)
        tokenizer.measure((to_float(images) for images in batches), tokenizer.config["statistics"])

    def provenance(self, run: RunState) -> dict[str, Any]:
        """How the tokenizer was made, and the features that it was trained with, which therefore can't judge it."""
        found: dict[str, Any] = {
            "recipe": self.recipe.model_dump(mode="json"),
            "images": run.seen,
            "data": {"count": self.data.count, "fingerprint": self.data.images_fingerprint()},
        }
        return found | self.seen

    def config(self, run: RunState) -> Mapping[str, Any]:
        """The config for a checkpoint, for which the statistics are measured now; called just before it is written."""
        self.measure(AT_SAVES)
        return {"tokenizer": tokenizer_config(self.result), "provenance": self.provenance(run)}

    def judged(self, before: int, run: RunState, stop: StopRequest, *, last: bool) -> dict[str, float] | None:
        settings, held_out = self.recipe.training, self.data.held_out
        every = (settings.save_images, settings.validate_images)
        if held_out is None or not (last or any(crossed(before, run.seen, each) for each in every)):
            return {}
        found = self.world.first(lambda: self.validated(held_out, run.seen, stop))
        if found is not None:
            run.validation_loss, run.validated = found.get("validation_loss"), run.seen
        return found

    @torch.no_grad()
    def validated(self, held_out: ImageData, seen: int, stop: StopRequest) -> dict[str, float] | None:
        """The reconstruction error, with the perceptual term, and the PSNR of held-out images; None if stopped."""
        objective, sums, total = self.recipe.objective, torch.zeros(2, dtype=torch.float64), 0
        for images in held_out.some(MOST_HELD_OUT, BATCH):
            if stop.requested:
                return None
            originals = to_float(images.to(self.where))
            decoded = self.decoded(originals)
            error = reconstruction_error(decoded, originals, objective.reconstruction)
            if self.perceptual is not None:
                error = error + objective.perceptual * self.perceptual(decoded, originals)
            sums += torch.stack([error.sum(), psnr_of(decoded, originals).sum()]).double().cpu()
            total += len(images)
        loss, psnr = (sums / total).tolist()
        return finite({"validation_loss": loss, "validation_psnr": psnr}, seen)

    def decoded(self, images: Tensor) -> Tensor:
        """The reconstructions of the averaged tokenizer from the modes of its posteriors."""
        return self.result.decode(self.result.tokens(self.result.moments(images)))

    def costs(self, run: RunState, image: float, most: float) -> Costs:  # noqa: ARG002
        held_out = 0 if self.data.held_out is None else min(MOST_HELD_OUT, self.data.held_out.count)
        count = self.data.count or FIT_IMAGES
        measured = isinstance(self.result, Latent)  # statistics of the latents, for which images are encoded
        return Costs(
            look=SHEET + FORWARD * SHOWN * image,
            judged=FORWARD * image * held_out + measured * ENCODED * image * min(AT_SAVES, count),
            end=measured * ENCODED * image * min(FIT_IMAGES, count),
        )

    def look(self, before: int, run: RunState, stop: StopRequest, *, last: bool) -> None:  # noqa: ARG002
        if is_due(self.recipe.training, before, run.seen, last=last):
            self.world.first(lambda: self.draw(run.seen))

    def draw(self, seen: int) -> None:
        """Write rows of originals, each above the row of their reconstructions, and the timeline."""
        source = self.data.held_out or self.data
        originals = to_float(next(iter(source.some(SHOWN, SHOWN)))[:SHOWN].to(self.where))
        sides = [as_pil(to_uint8(images)) for images in (originals, self.decoded(originals))]
        rows = [
            Row(words, images[i : i + COLUMNS])
            for i in range(0, len(originals), COLUMNS)
            for words, images in zip(("original", "decoded"), sides, strict=True)
        ]
        save_sheet(*sheet(rows), self.samples / f"{seen:012d}.png")
        timeline(self.samples, pairs=True)

    @property
    def samples(self) -> Path:
        return self.out / "samples"

    def curves(self, log: MetricsLog) -> None:
        loss_curve(log.rows, self.out / "training.png", self.recipe.name)
        psnr_curve(log.rows, self.out / "psnr.png", self.recipe.name)

    def finish(self, run: RunState, log: MetricsLog) -> None:
        found = [row[key] for row in log.rows for key in ("psnr", "validation_psnr") if key in row]
        self.psnr = found[-1] if found else None

        def write() -> None:
            self.measure(FIT_IMAGES)
            card = tokenizer_card(self.recipe, run.seen, parameter_count(self.result), self.data, log.rows)
            save_tokenizer(self.result, self.out / "model", self.provenance(run), card=card)

        self.world.first(write)


@plain_torch(grad=True)
def train_tokenizer(
    recipe: TokenizerRecipe,
    out: Path | str,
    *,
    device: str = "auto",
    resume: Resume = False,
    overwrite: bool = False,
    quiet: bool = False,
    minutes: float | Budget | None = None,
) -> TokenizerResult:
    """Train a tokenizer into the folder `out`. It can be stopped and resumed bitwise, like `loop.train`.

        out/psnr.png          the PSNR of training images and of held-out images over images seen
        out/samples/          originals above their reconstructions, and timeline.png (training.sample_images)
        out/model/            the averaged tokenizer with its statistics, ready for `tokenizer: {from: OUT}`

    The other files (recipe.yaml, data.json, environment.json, metrics.jsonl, training.png, checkpoints/) and the errors
    are those of `loop.train`.
    """
    out = Path(out)

    def task(recipe: TokenizerRecipe, where: torch.device) -> TokenizerTask:
        return TokenizerTask(recipe, out, where, quiet=quiet)

    trained, result = fit(
        task, recipe, out, device=device, resume=resume, overwrite=overwrite, quiet=quiet, minutes=minutes
    )
    values = vars(result) | {"parameters": parameter_count(trained.result)}  # without those of the discriminator
    return TokenizerResult(**values, psnr=trained.psnr)
