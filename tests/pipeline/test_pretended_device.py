"""The pipeline on a device: it gives what it gives on the CPU, and the host waits once a batch for the tokens.

There is no device here but the CPU: `pretend_cuda` stands for one. See tests/models/test_devices.py for every model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import make_bundle, randomise
from pretend_cuda import Pretend, PretendCUDA, pretend, pretend_cuda, real
from torch import Tensor

from seriatim.backbones.causal_transformer import Causal
from seriatim.backbones.masked_transformer import Masked
from seriatim.checkpoints.native import Bundle
from seriatim.core.keys import Keys
from seriatim.core.settings import Settings
from seriatim.heads.categorical import Categorical
from seriatim.models.build import seeded
from seriatim.models.causal_model import CausalModel
from seriatim.models.masked_model import MaskedModel
from seriatim.nn.prepare import CastLinear
from seriatim.pipeline.pipeline import Pipeline
from seriatim.pipeline.result import Result
from seriatim.sampling.step import Start
from seriatim.tokenizers.kmeans import KMeans
from seriatim.training.optim import adamw, averaged
from seriatim.training.state import Trainables
from seriatim.training.updates import gradients

L, STEPS = 9, 3


def features() -> Bundle:
    bundle = make_bundle(tokens=L, width=16)
    bundle.sampling.update(num_inference_steps=STEPS, num_diffusion_steps=2)
    return bundle


def codes(kind: str = "masked") -> Bundle:
    tokenizer = KMeans(size=6, patch=2, channels=1, vocab=8)
    with seeded(0):
        tokenizer.fit([torch.randn(64, 1, 6, 6).clamp(-1, 1)])
        model: Any = (
            MaskedModel(
                Masked(L, vocab=8, width=16, depth=1, heads=2, buffer=2, dropout=0.0), Categorical(8), classes=2
            )
            if kind == "masked"
            else CausalModel(Causal(L, vocab=8, width=16, depth=1, heads=2, order="any"), Categorical(8), classes=2)
        )
    randomise(model, scale=0.3)
    return Bundle(model.eval(), tokenizer, ["cat", "dog"], {"guidance_scale": 2.0})


def call(pipe: Pipeline, **settings: Any) -> Result:
    return pipe([0, 1], seed=3, output_type="pt", progress=False, **settings)


def doubled(_: Any, index: int, __: int, values: dict[str, Tensor]) -> dict[str, Tensor] | None:
    return {"tokens": values["tokens"] * 0.5} if index == 0 else None


def edited(pipe: Pipeline, **settings: Any) -> Result:
    images = torch.linspace(-1, 1, 36).view(1, 1, 6, 6)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[2:5, 1:4] = True
    return pipe.edit(images, mask=mask, class_labels=[0, 1], seed=4, output_type="pt", progress=False, **settings)


def regenerated(pipe: Pipeline) -> Result:
    return pipe.regenerate(call(pipe), [1, 4, 5], seed=9, output_type="pt", progress=False)


CALLS: dict[str, tuple[Callable[[], Bundle], Callable[[Pipeline], Result]]] = {
    "call": (features, call),
    "call, in two batches": (features, lambda pipe: call(pipe, batch_size=1)),
    "callback that replaces tokens": (features, lambda pipe: call(pipe, callback_on_step_end=doubled)),
    "edit": (features, edited),
    "regenerate": (features, regenerated),
    "codes": (codes, lambda pipe: call(pipe, num_inference_steps=STEPS)),
    "codes in the order of confidence": (codes, lambda pipe: call(pipe, num_inference_steps=STEPS, order="confidence")),
    "edit in the order of confidence": (
        codes,
        lambda pipe: edited(pipe, num_inference_steps=STEPS, order="confidence"),
    ),
    "edit, one by one": (lambda: codes("causal"), edited),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_draws_what_the_cpu_draws(name: str) -> None:
    make, ask = CALLS[name]
    expected = ask(Pipeline(make(), dtype="float32"))
    bundle = make()
    with pretend_cuda() as device:
        pretend(bundle.model)
        pretend(bundle.tokenizer)
        pipe = Pipeline(bundle, dtype="float32")
        assert pipe.device.type == "cuda"
        device.reset()
        found = ask(pipe)
        for part, whole in ((found.tokens, expected.tokens), (found.images, expected.images)):
            assert isinstance(part, Tensor) and not isinstance(part, Pretend), "a result is on the host"
            torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)
        confident = STEPS if "confidence" in name else 0
        check_reads(device, confident, begins="edit" in name or "regenerate" in name)


def check_reads(device: PretendCUDA, confident: int, *, begins: bool) -> None:
    """Sampling waits for the device once a batch, before it begins from known tokens, and with "confidence" each step.

    What the pipeline and the tokenizer read besides is handed over once a batch too: tokens, pictures, whether they are
    finite.
    """
    reads = {line.removeprefix("seriatim/").partition(" ")[0]: n for line, n in device.reads.items()}
    outside = sum(n for line, n in reads.items() if line.startswith("pipeline/pipeline.py"))  # one a batch
    sampling = {line: n for line, n in reads.items() if not line.startswith(("pipeline/", "tokenizers/"))}
    assert {line.partition(":")[0] for line in sampling} <= {"sampling/step.py", "sampling/parallel.py"}, reads
    step = [n for line, n in sampling.items() if line.startswith("sampling/step.py")]
    assert outside and sum(step) <= outside * (2 if begins else 1), reads
    assert sum(n for line, n in sampling.items() if line.startswith("sampling/parallel.py")) == confident, reads
    for line, n in reads.items():
        assert n <= max(outside, confident), line


def test_steps_and_previews() -> None:
    expected = [step.preview() for step in Pipeline(features(), dtype="float32").stream([0, 1], seed=3)]
    with pretend_cuda() as device:
        bundle = features()
        pretend(bundle.model)
        pretend(bundle.tokenizer)
        steps = Pipeline(bundle, dtype="float32").stream([0, 1], seed=3)
        device.reset()
        for step, pictures in zip(steps, expected, strict=True):
            assert isinstance(step.tokens, Pretend) and not isinstance(step.known, Pretend)
            assert sum(device.reads.values()) == (1 if step.last else 0), device.reads
            found = step.preview()
            assert all(
                abs(a - b) <= 1
                for one, other in zip(found, pictures, strict=True)
                for a, b in zip(one.tobytes(), other.tobytes(), strict=True)
            )
            device.reset()


@pytest.mark.parametrize("where", ["host", "device"])
def test_what_is_kept_stays_bitwise_equal(where: str) -> None:
    """Known tokens may be given on either side; they come back as they were."""
    model = features().model
    tokens, known = Keys.of(1).fold(torch.arange(2)).normal(L, 4), torch.arange(2 * L).view(2, L) % 3 == 0
    with pretend_cuda() as device:
        there = pretend(copy.deepcopy(model))
        start = Start(pretend(tokens), known) if where == "device" else Start(tokens, known)
        condition = there.condition(torch.tensor([0, 1]), 2)
        settings = Settings(num_inference_steps=STEPS, head_options={"num_diffusion_steps": 2})
        device.reset()
        *_, last = there.steps(condition, there.null(2), Keys.of_seeds([1, 2]), settings, start)
        assert torch.equal(real(last.tokens)[known], tokens[known])
        # Are the known tokens finite, and are those of the result?
        assert sum(device.reads.values()) == (2 if where == "device" else 1), device.reads


# --- a training step --------------------------------------------------------------------------------------------------


def task_of(kind: str, parts: int) -> tuple[Trainables, Callable[[Trainables, int, Callable[[Tensor], Tensor]], Any]]:
    """A model with its optimiser, and a whole step: the means of its loss, and the norm of the gradient."""
    model = (features() if kind == "features" else codes(kind)).model.train()
    tokens = torch.arange(8 * L).view(8, L) % 8 if kind != "features" else Keys.of(1).fold(torch.arange(8)).normal(L, 4)
    labels, keys = torch.arange(8) % 3 - 1, Keys.of(2).fold(torch.arange(8))

    def step(trained: Trainables, number: int, send: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], float]:
        there, step_key = send(tokens), Keys.of(3, number)
        of = [slice(first, first + 8 // parts) for first in range(0, 8, 8 // parts)]
        losses = (trained.model(there[some], labels[some], keys.select(some), step_key) for some in of)
        result = gradients(trained.trained, losses, 8.0 * L, clip=1.0)
        trained.update()
        return result.means, result.norm

    return trainables(model), step


def trainables(model: torch.nn.Module) -> Trainables:
    return Trainables(model, averaged(model, 0.9), adamw(model, 1e-3, (0.9, 0.95), 0.02))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", ["features", "masked", "causal"])
def test_a_training_step_waits_for_the_device_once(kind: str, parts: int) -> None:
    """Forward, backward, clipping, optimiser and average: two steps, each with one read of everything."""
    here, step = task_of(kind, parts)
    model = copy.deepcopy(here.model)
    expected = [step(here, number, lambda x: x) for number in range(2)]
    with pretend_cuda() as device:
        there = trainables(pretend(model))
        for number in range(2):
            device.reset()
            means, norm = step(there, number, pretend)
            assert sum(device.reads.values()) == 1, device.reads
            assert means == pytest.approx(expected[number][0], abs=1e-4) and norm == pytest.approx(
                expected[number][1], 1e-3
            )
        for name in ("model", "average"):
            pairs = list(zip(getattr(there, name).parameters(), getattr(here, name).parameters(), strict=True))
            assert all(isinstance(a, Pretend) for a, _ in pairs), f"{name} stays on its device"
            off = torch.cat([(real(a.detach()) - b.detach()).abs().flatten() for a, b in pairs])
            # AdamW moves a weight by 1e-3 a step, also where its gradient is but rounding: a few may differ.
            assert float(off.mean()) < 1e-5 and float(off.quantile(0.99)) < 1e-4, name


def test_a_loaded_backbone_is_cast_once_and_not_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seriatim.nn.prepare.SMALLEST", 1)
    bundle = features()
    with pretend_cuda():
        pretend(bundle.model)
        pretend(bundle.tokenizer)
        pipe = Pipeline(bundle, dtype="bfloat16").prepare()
        backbone: Any = pipe.model.backbone
        layers = {name: layer for name, layer in backbone.named_modules() if hasattr(layer, "in_features")}
        cast = {name for name, layer in layers.items() if isinstance(layer, CastLinear)}
        assert cast == layers.keys() - {"token_embed"} and cast, "what meets tokens stays in float32"
        assert all(layers[name].weight.dtype == torch.bfloat16 for name in cast)
        assert not any(isinstance(layer, CastLinear) for layer in pipe.model.head.modules()), "heads are float32"
