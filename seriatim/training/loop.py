"""Train a generator: the task that the engine runs, and the public function `train`.

Shapes: B images of a batch, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from seriatim.checkpoints.native import Bundle, bundle_config, save_bundle
from seriatim.checkpoints.shared_tokenizer import tokenizer_file
from seriatim.checkpoints.tokenizer import read_provenance
from seriatim.core.device import DTYPES, plain_torch, tf32
from seriatim.core.errors import ConfigError, NumericsError
from seriatim.core.files import expanded
from seriatim.core.keys import Keys
from seriatim.core.random import derive_seed
from seriatim.core.stopping import StopRequest
from seriatim.core.terminal import say
from seriatim.data.loader import Batch, to_float
from seriatim.evaluation.impartial import seen_features
from seriatim.models.base import Loss, SequenceModel
from seriatim.models.build import build_model, model_config, parameter_count
from seriatim.tokenizers.latent import check_encoder_dtype, encoding_in
from seriatim.training.batched_task import BatchedTask
from seriatim.training.budget import Budget
from seriatim.training.config import AnyRecipe, Recipe
from seriatim.training.distributed import World, shard, whole
from seriatim.training.engine import TrainingResult, fit
from seriatim.training.initialise import initialise_from, matching, other_weight
from seriatim.training.judge import Judge
from seriatim.training.log import MetricsLog, loss_curve, model_card
from seriatim.training.look import SHEET, Preview, draw_samples, is_due, seconds_of_samples
from seriatim.training.optim import averaged, make_optimiser
from seriatim.training.run_folder import Resume
from seriatim.training.setup import build, fit_tokenizer
from seriatim.training.state import RunState, Trainables, fitting
from seriatim.training.task import Costs
from seriatim.training.wrapping import bucketed, wrapped_blocks


class GeneratorTask(BatchedTask):
    """Trains a sequence model on the tokens of a tokenizer."""

    model: SequenceModel

    def __init__(self, recipe: Recipe, out: Path, where: torch.device, *, quiet: bool) -> None:
        settings = recipe.training
        data, self.tokenizer, model = build(recipe)
        self.set_up(recipe, data, model.to(where).train(), where)
        self.out, self.quiet = out, quiet
        source = recipe.tokenizer.get("from")
        self.seen = seen_features([] if source is None else [read_provenance(expanded(source))])
        self.judge = Judge(settings, self.data, self.seen)
        check_encoder_dtype(self.tokenizer, DTYPES[settings.encoder_dtype])
        self.tokenizer.to(where)
        self.parts = self.trainables(averaged(self.model, settings.ema))

    def trainables(self, average: AveragedModel) -> Trainables:
        settings = self.recipe.training
        optimiser = make_optimiser(
            settings.optimiser, self.model, settings.learning_rate, settings.betas, settings.weight_decay
        )
        return Trainables(self.model, average, optimiser, self.tokenizer)

    def spread(self, world: World) -> None:
        if world.size == 1 or not self.recipe.training.shard:
            super().spread(world)
        else:
            self.world, average = world, self.parts.average
            for model in (self.model, cast(SequenceModel, average.module)):
                shard(model, model.backbone, world)
            self.parts = self.trainables(average)  # sharding has replaced the parameters

    def check(self) -> None:
        if self.recipe.training.init_from:
            matching(self.recipe.training.init_from, self.model, self.tokenizer)

    def check_resumed(self, path: Path) -> None:
        """Raise ConfigError if `tokenizer.from` names another tokenizer than the one of the run's tokens."""
        name = other_weight(self.tokenizer, fitting(self.tokenizer, tokenizer_file(path)))
        if name is not None:
            raise ConfigError(
                f"tokenizer.from: {self.recipe.tokenizer.get('from')} has other weights ({name}) than the tokenizer on "
                "whose tokens the run was trained; name that one, or begin another run"
            )

    @contextmanager
    def settings_in_force(self) -> Iterator[None]:
        settings, model = self.recipe.training, self.model
        blocks = wrapped_blocks(model, recompute=settings.checkpoint_activations, compiled=settings.compile)
        with tf32(self.where, enabled=settings.tf32), bucketed(model, settings.buckets), blocks:
            with encoding_in(self.tokenizer, DTYPES[settings.encoder_dtype]):
                yield

    def begin(self, stop: StopRequest) -> None:
        folder = self.recipe.training.init_from
        if folder:
            initialise_from(folder, self.model, self.tokenizer, self.data.class_names)
            self.data.check_tokenizer(self.tokenizer)  # again, since it now has that model's weights
        else:
            fit_tokenizer(self.tokenizer, self.data, quiet=self.quiet, stop=stop)

    def nominal(self, batch: Batch) -> float:
        return float(len(batch.whole) * self.model.tokens)

    def loss(self, batch: Batch, part: slice, dtype: torch.dtype) -> Loss:
        # Every random number, also of dropout, depends on (seed, first) alone, so that resuming is bitwise.
        first, size = batch.first + part.start, part.stop - part.start
        keys = self.keys.fold(torch.arange(first, first + size))  # image g of the run has the key (seed, "train", g)
        images = batch.images[part].to(self.where, non_blocking=True)  # from pinned memory on CUDA
        labels = None if batch.labels is None else batch.labels[part]
        with torch.random.fork_rng(devices=[self.where] if self.where.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.recipe.seed, "dropout", first))
            with torch.no_grad():
                tokens = self.tokens(images, keys.fold("posterior"))  # (B, L, D)
            with torch.autocast(self.where.type, dtype=dtype, enabled=dtype != torch.float32):
                loss: Loss = self.net(tokens, labels, keys, self.step_keys.fold(batch.whole.start))
        return Loss(loss.sum, loss.count, {f"loss_{name}": value for name, value in loss.parts.items()})

    def tokens(self, images: Tensor, keys: Keys) -> Tensor:
        """The tokens (B, L, D), or codes (B, L), of images or of their cached moments."""
        return self.tokenizer.tokens(images if self.data.cached else self.tokenizer.moments(to_float(images)), keys)

    # --- results of a run -----------------------------------------------------------------------------------------

    @cached_property
    def trained_on(self) -> dict[str, Any]:
        return {"count": self.data.count, "fingerprint": self.data.images_fingerprint()}

    def averaged_model(self, *, everywhere: bool = False) -> SequenceModel:
        """The model with averaged weights; where it is sharded, a copy that is not, for the first process or for all.

        All processes must call this together.
        """
        trained = cast(SequenceModel, self.parts.average.module)
        if self.net is not self.model or self.world.size == 1:
            return trained
        weights = {name: whole(tensor) for name, tensor in trained.state_dict().items()}
        if not self.world.main and not everywhere:
            return trained
        made = build_model(model_config(trained)).to(self.where)
        made.load_state_dict(weights)
        return made

    def bundle(self, run: RunState, trained: SequenceModel) -> Bundle:
        """A bundle of a model of this run with its provenance."""
        provenance = {"recipe": self.recipe.model_dump(mode="json"), "images": run.seen, "data": self.trained_on}
        provenance |= self.seen
        data = self.data
        return Bundle(
            trained, self.tokenizer, data.class_names, self.recipe.sampling, provenance, background=data.background
        )

    def config(self, run: RunState) -> Mapping[str, Any]:
        return bundle_config(self.bundle(run, cast(SequenceModel, self.parts.average.module)))

    def judged(self, before: int, run: RunState, stop: StopRequest, *, last: bool) -> dict[str, float] | None:
        validated, evaluated = self.judge.due(before, run.seen, last=last)
        if not validated and not evaluated:
            return {}
        bundle, dtype = self.bundle(run, self.averaged_model(everywhere=True)), DTYPES[run.dtype]
        found = self.judge.figures(bundle, run.seen, dtype, stop, self.world, validated=validated, evaluated=evaluated)
        if found is not None and validated:
            run.validation_loss, run.validated = found.get("validation_loss"), run.seen
        return found

    def look(self, before: int, run: RunState, stop: StopRequest, *, last: bool) -> None:
        settings = self.recipe.training
        if not is_due(settings, before, run.seen, last=last):
            return
        trained = self.averaged_model()
        shown = Preview(settings.sample_rows, settings.sample_each)

        def draw() -> None:
            bundle, folder = self.bundle(run, trained), self.out / "samples"
            try:
                draw_samples(bundle, folder, run.seen, self.recipe.seed, stop, shown=shown, last=last)
            except NumericsError as error:  # training continues, since later weights may do better
                say(f"no samples after {run.seen} images: {error}")

        self.world.first(draw)

    def settle(self, recipe: Recipe) -> None:
        super().settle(recipe)
        self.judge.settings = recipe.training

    def costs(self, run: RunState, image: float, most: float) -> Costs:
        bundle = self.bundle(run, self.averaged_model())
        always, sample = self.world.first(lambda: seconds_of_samples(bundle, most))
        return Costs(sample=sample, look=SHEET + always, judged=self.judge.seconds(image, sample))

    def curves(self, log: MetricsLog) -> None:
        loss_curve(log.rows, self.out / "training.png", self.recipe.name)

    def finish(self, run: RunState, log: MetricsLog) -> None:
        trained = self.averaged_model()

        def write() -> None:
            card = model_card(self.recipe, run.seen, parameter_count(self.model), log.rows, self.data)
            save_bundle(self.bundle(run, trained), self.out / "model", card=card)

        self.world.first(write)


@plain_torch(grad=True)
def train(
    recipe: Recipe,
    out: Path | str,
    *,
    device: str = "auto",
    resume: Resume = False,
    overwrite: bool = False,
    quiet: bool = False,
    minutes: float | Budget | None = None,
    on_begin: Callable[[AnyRecipe, Path], None] | None = None,
) -> TrainingResult:
    """Train a recipe into the folder `out`, or with `resume` continue bitwise from the newest whole checkpoint in it.

    Without `resume`, `out` must be new or empty; with "auto" a run is resumed if there is one, and begun otherwise.
    With `overwrite` a run in `out` is replaced, and kept until the new one is finished. With `minutes` the amounts of
    the recipe are replaced by those that fit into so many minutes on the clock from now; a run that is resumed goes on
    to the images that were decided when it began. `on_begin` is called with the recipe and the folder of a new run.

        out/recipe.yaml       the recipe with every default filled in
        out/data.json         the number of images, their fingerprint, and the files that were left out with reasons
        out/environment.json  versions and machine
        out/metrics.jsonl     loss, learning rate, images/s
        out/training.png      the loss curve
        out/samples/          previews at fixed seeds, timeline.png and guidance.png (training.sample_images)
        out/checkpoints/      all that resuming needs (training.save_images)
        out/model/            the averaged weights, ready for `seriatim.load`

    The errors are those of `engine.fit`.
    """
    out = Path(out)

    def task(recipe: Recipe, where: torch.device) -> GeneratorTask:
        return GeneratorTask(recipe, out, where, quiet=quiet)

    how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "minutes": minutes, "on_begin": on_begin}
    return fit(task, recipe, out, device=device, quiet=quiet, **how)[1]
