"""Tokenizers are trained by the same engine: resuming, processes, values that are not finite, previews, results."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers import TINY_RUN, signal_in_step, untimed_metrics
from PIL import Image
from processes import together
from safetensors.torch import load_file
from torch import Tensor

from seriatim import load
from seriatim.checkpoints.tokenizer import load_tokenizer, read_provenance, save_tokenizer
from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.cli.main import run as command
from seriatim.core.errors import ConfigError, NumericsError, Stopped, UsageError
from seriatim.core.keys import Keys
from seriatim.data.base import Digits
from seriatim.data.loader import to_float
from seriatim.data.sources import build_data
from seriatim.evaluation.features import open_features
from seriatim.evaluation.reference import as_many, whole
from seriatim.evaluation.residual_net import ResNet, TrainedClassifier, save_classifier
from seriatim.evaluation.run import evaluate
from seriatim.evaluation.sheet import places_of
from seriatim.evaluation.tokenizers import evaluate_tokenizer
from seriatim.models.build import seeded
from seriatim.tokenizers.kinds import build_tokenizer
from seriatim.training import tokenizer_task
from seriatim.training.autoencoding import Autoencoding
from seriatim.training.config import TokenizerRecipe, read_any, read_recipe
from seriatim.training.distributed import joined
from seriatim.training.log import psnr_curve
from seriatim.training.loop import train
from seriatim.training.measure import measure_latents
from seriatim.training.plan import measured_plan
from seriatim.training.state import RunState
from seriatim.training.tokenizer_setup import build_autoencoding
from seriatim.training.tokenizer_task import TokenizerTask, train_tokenizer
from seriatim.training.updates import gradients

COMMON = ["training.batch_size=8", "training.threads=1", "training.dtype=float32", "training.log_images=24",
          "training.images=80", "training.save_images=40", "training.sample_images=40", "training.warmup_images=8",
          "data={kind: digits}"]  # fmt: skip
TWO_STEPS = ["training.images=16", "training.save_images=0", "training.sample_images=0"]
KL = ["kl-32-tiny", *COMMON, "tokenizer={kind: kl, stride: 2, latent_channels: 2, width: 8, layers_per_block: 1}"]
VQ = ["vq-32-tiny", *COMMON, "tokenizer={kind: vq, stride: 2, vocab: 16, code_dim: 4, latent_channels: 8, width: 8, "
      "layers_per_block: 1}"]  # fmt: skip
FSQ = ["vq-32-tiny", *COMMON, "objective.revive_images=0",
       "tokenizer={kind: fsq, stride: 2, latent_channels: 4, width: 8, layers_per_block: 1}"]  # fmt: skip
DETOK = ["kl-32-tiny", *COMMON, "tokenizer={kind: detok, stride: 2, latent_channels: 2, width: 16, depth: 1, heads: 2}",
         "objective.interpolated_noise=1.0", "objective.mask=0.5"]  # fmt: skip
GAN = ["objective.gan=0.5", "objective.gan_start=32", "objective.gan_width=8", "objective.gan_layers=1"]
ROBUST = ["objective.latent_noise=0.4", "objective.equivariance=0.5"]
CASES = {
    "kl": [*KL, *ROBUST],
    "gan": [*KL, *GAN],
    "vq": [*VQ, "objective.revive_images=16", "objective.entropy=0.1"],
    "detok": DETOK,
    "accumulate": [*KL, *GAN, "training.accumulate=2"],
}


@pytest.fixture(autouse=True)
def few_images_at_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_task, "AT_SAVES", 64)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a case that nothing stopped; it is made once and must not be changed."""
    made: dict[str, Path] = {}

    def run(case: str, *more: str) -> Path:
        name = " ".join([case, *more])
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tokenizer_task, "AT_SAVES", 64)
                train_tokenizer(of(case, *more), made[name], quiet=True)
        return made[name]

    return run


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier."""
    return saved_judge(tmp_path_factory.mktemp("judge") / "judge", seed=0)


def saved_judge(folder: Path, seed: int) -> Path:
    with seeded(seed):
        net = ResNet(2, channels=1, widths=[4, 8], depth=[0, 0]).eval()
    return save_classifier(TrainedClassifier(net, "judge", (8, 8), ["a", "b"], {}, {}), folder)


def perceptual(judge: Path) -> list[str]:
    return ["objective.perceptual=0.5", f"objective.perceptual_features={judge}"]


def recipe_of(name: str, *more: str) -> TokenizerRecipe:
    recipe = read_any(name, more)
    assert isinstance(recipe, TokenizerRecipe)
    return recipe


def of(case: str, *more: str) -> TokenizerRecipe:
    return recipe_of(*CASES[case], *more)


def content(run: Path) -> dict[str, bytes]:
    newest = all_checkpoints(run / "checkpoints")[-1]
    files = [newest / name for name in ("model.safetensors", "average.safetensors", "optimiser.safetensors")]
    return {str(file.name): file.read_bytes() for file in [*files, run / "model" / "tokenizer.safetensors"]}


# --- one engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_parts_is_the_run_in_one_piece(
    case: str, whole_run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise: weights, averages, moments of both sides, statistics, and the lines of the log."""
    for steps, resume in ((3, False), (4, True)):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            signal_in_step(patch, steps)
            train_tokenizer(of(case), tmp_path / "parts", resume=resume, quiet=True)
    train_tokenizer(of(case), tmp_path / "parts", resume=True, quiet=True)
    assert content(whole_run(case)) == content(tmp_path / "parts")
    assert untimed_metrics(whole_run(case)) == untimed_metrics(tmp_path / "parts")


def first_gradients(recipe: TokenizerRecipe, out: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients of the first step, not clipped, with the codebook and the counts after it; and the loss's terms."""
    torch.set_num_threads(1)
    with joined("cpu") as world:
        task = TokenizerTask(recipe, out, world.device, quiet=True)
        task.spread(world)
        batch = next(task.batches(RunState()))
        losses, nominal = task.losses(batch, torch.float32), task.nominal(batch)
        found = gradients(task.parts.trained, losses, nominal, 1e9, world, apart=task.parts.opponent)
        task.updated()
        codes = {name: t for name, t in task.model.state_dict().items() if "codebook" in name or "watch" in name}
        grads = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    return {**grads, **{f"after.{name}": tensor.float() for name, tensor in codes.items()}}, found.means


@pytest.mark.fresh_process
@pytest.mark.parametrize("case", ["kl", "gan", "vq", "detok"])
def test_one_process_is_two_is_three(case: str, tmp_path: Path) -> None:
    """The adversarial factor, masks and revived codes included; the second of two batches leaves a process idle."""
    split = [] if case == "gan" else ["training.accumulate=2"]  # the adversarial factor is that of each pass
    start = ["objective.gan_start=0"] if case == "gan" else []
    cases: list[tuple[int, list[tuple[int, list[str]]]]] = [(12, [(2, []), (3, split)]), (1, [(2, [])])]
    for size, others in cases:
        common = [f"training.batch_size={size}", "objective.entropy=0", *start]
        (alone,) = together(1, partial(first_gradients, of(case, *common), tmp_path), tmp_path / f"1 {size}")
        for count, more in others:
            work = partial(first_gradients, of(case, *common, *more), tmp_path)
            for one, means in together(count, work, tmp_path / f"{count} {size}"):
                assert means == pytest.approx(alone[1], rel=1e-4)
                assert one.keys() == alone[0].keys() and len(one) > 20
                largest = max(float(tensor.norm()) for tensor in alone[0].values())
                for name, tensor in one.items():  # some gradients, as of a bias before a norm, are rounding alone
                    bound = 2e-4 * float(alone[0][name].norm()) + 1e-6 * largest
                    assert float((tensor - alone[0][name]).norm()) <= bound, (name, count, size)


def psnr_of_run(recipe: TokenizerRecipe, out: Path) -> float | None:
    torch.set_num_threads(1)
    return train_tokenizer(recipe, out, device="cpu", quiet=True).psnr


@pytest.mark.fresh_process
def test_two_processes_write_one_run_whose_discriminator_joins_later(tmp_path: Path) -> None:
    (alone,) = together(1, partial(psnr_of_run, of("gan"), tmp_path / "a"), tmp_path / "1")
    both = together(2, partial(psnr_of_run, of("gan"), tmp_path / "b"), tmp_path / "2")
    assert both[0] == pytest.approx(alone, abs=0.5) and both[1] is None
    ours, theirs = untimed_metrics(tmp_path / "b"), untimed_metrics(tmp_path / "a")
    assert [row["images"] for row in ours] == [row["images"] for row in theirs]
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-2) and "loss_gan" in ours[-1]
    assert bool(load_tokenizer(tmp_path / "b").measured)


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = Autoencoding.forward

    def broken(self: Any, images: Tensor, *arguments: Any, **options: Any) -> Any:
        return true(self, images * float("nan"), *arguments, **options)

    monkeypatch.setattr(Autoencoding, "forward", broken)
    with pytest.raises(NumericsError, match=r"the loss is not finite .* after 0 images"):
        train_tokenizer(of("kl"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "model").exists()


def test_both_sides_are_clipped_on_their_own(tmp_path: Path) -> None:
    task = TokenizerTask(of("gan", "objective.gan_start=0"), tmp_path, torch.device("cpu"), quiet=True)
    batch = next(task.batches(RunState()))
    with torch.no_grad():
        for parameter in task.parts.opponent:
            parameter.mul_(30)
    gradients(task.parts.trained, task.losses(batch, torch.float32), 8.0, 1e-3, apart=task.parts.opponent)
    other = {id(parameter) for parameter in task.parts.opponent}
    ours = [p.grad.norm() for p in task.parts.trained if id(p) not in other and p.grad is not None]
    theirs = [p.grad.norm() for p in task.parts.opponent if p.grad is not None]
    assert torch.stack(ours).norm() == pytest.approx(1e-3, rel=1e-3)
    assert torch.stack(theirs).norm() == pytest.approx(1e-3, rel=1e-3)


def test_the_discriminator_learns_from_its_start_only(tmp_path: Path) -> None:
    train_tokenizer(of("gan", "training.images=32", "objective.gan_start=16", "training.save_images=16"),
                    tmp_path, quiet=True)  # fmt: skip
    states = [load_file(path / "model.safetensors") for path in all_checkpoints(tmp_path / "checkpoints")]
    names = [name for name in states[0] if name.startswith("discriminator.") and name.endswith("weight")]
    assert len(states) == 2 and names
    assert all(not torch.equal(states[0][name], states[1][name]) for name in names), "after 16 images it learns"
    before = load_file(all_checkpoints(tmp_path / "checkpoints")[0] / "optimiser.safetensors")
    assert not any(key.startswith("discriminator.") for key in before)
    last = untimed_metrics(tmp_path)[-1]
    assert {"loss_gan", "loss_discriminator"} <= last.keys()


# --- results ----------------------------------------------------------------------------------------------------------


def test_a_run_is_a_tokenizer_for_generators_and_lowers_its_error(tmp_path: Path) -> None:
    recipe = of("kl", "training.images=400", "data={kind: digits, validation: 0.1}", "objective.latent_noise=0",
                "objective.equivariance=0", "training.learning_rate=4e-3", "training.save_images=200",
                "training.sample_images=200")  # fmt: skip
    result = train_tokenizer(recipe, tmp_path / "kl", quiet=True)
    logged = untimed_metrics(tmp_path / "kl")
    first, last = [row["validation_loss"] for row in logged if "validation_loss" in row]
    assert last < 0.95 * first
    assert result.psnr == logged[-1]["validation_psnr"] > 8
    assert psnr_curve(logged, tmp_path / "psnr.png", "a title").stat().st_size > 1000
    with Image.open(tmp_path / "kl" / "samples" / f"{400:012d}.png") as sheet:
        places = places_of(sheet)
    assert places is not None and places.words == ("original", "decoded") * 2 and len(places.lefts) == 8
    with Image.open(tmp_path / "kl" / "samples" / "timeline.png") as timeline:
        assert timeline.height > 3 * 64, "the originals, and how they were given back at two times"

    tokenizer: Any = load_tokenizer(tmp_path / "kl")
    images = to_float(build_data({"kind": "digits"}).images(torch.arange(600)))
    tokens = tokenizer.tokens(tokenizer.moments(images))
    assert bool(tokenizer.measured) and tokens.mean().abs() < 0.3 and 0.6 < tokens.std() < 1.4
    assert read_provenance(tmp_path / "kl")["images"] == 400
    checkpoint: Any = load_tokenizer(f"{tmp_path / 'kl'}@200")
    assert bool(checkpoint.measured) and not torch.equal(checkpoint.mean, tokenizer.mean)

    more = [f"tokenizer={{from: {tmp_path / 'kl'}}}", "training.images=32", "training.batch_size=16",
            "model.width=16", "model.depth=1", "model.heads=2", "training.threads=1"]  # fmt: skip
    generator: Any = read_any("mar-digits", more)
    train(generator, tmp_path / "mar", quiet=True)
    pipe = load(tmp_path / "mar")
    assert pipe.tokenizer.fingerprint() == tokenizer.fingerprint(), "its statistics travel with it"
    assert pipe([1], seed=0, num_inference_steps=2).images[0].size == (8, 8)


def test_a_tokenizer_begins_with_the_weights_of_another_and_parts_stay_frozen(
    whole_run: Callable[[str], Path], tmp_path: Path
) -> None:
    more = [
        "kl-32-tiny",
        *COMMON,
        *TWO_STEPS,
        f"tokenizer={{from: {whole_run('kl')}}}",
        "training.freeze=[autoencoder.encoder.*, autoencoder.quant_conv.*]",
        "data.validation=0.5",  # other images would give other statistics
    ]
    train_tokenizer(recipe_of(*more), tmp_path / "second", quiet=True)
    runs = whole_run("kl"), tmp_path / "second"
    first, second = (load_file(run / "model" / "tokenizer.safetensors") for run in runs)
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert {name for name in first if name.startswith(("autoencoder.encoder.", "autoencoder.quant_conv."))} <= same
    assert {"mean", "std", "measured"} <= same, "tokens mean what they meant"
    assert not any(name.startswith("autoencoder.decoder.conv") for name in same)


def test_given_statistics_are_measured_when_the_encoder_is_trained(tmp_path: Path) -> None:
    """Those of a converted tokenizer are its encoder's; they stay where it is frozen."""
    given = KL[-1].replace("}", ", statistics: fixed, scale: 3.0}")
    made: Any = build_tokenizer({**read_any("kl-32-tiny", [given]).tokenizer, "size": [8, 8], "channels": 1})  # type: ignore[union-attr]
    save_tokenizer(made, tmp_path / "converted")
    words = ["kl-32-tiny", *COMMON, *TWO_STEPS, f"tokenizer={{from: {tmp_path / 'converted'}}}"]
    train_tokenizer(recipe_of(*words), tmp_path / "trained", quiet=True)
    frozen = "training.freeze=[autoencoder.encoder.*, autoencoder.quant_conv.*]"
    train_tokenizer(recipe_of(*words, frozen), tmp_path / "frozen", quiet=True)
    trained: Any = load_tokenizer(tmp_path / "trained")
    kept: Any = load_tokenizer(tmp_path / "frozen")
    assert trained.config["statistics"] == "channel" and bool(trained.measured) and len(trained.std.unique()) == 2
    assert kept.config["statistics"] == "fixed" and torch.equal(kept.std, made.std)


def test_raw_channels_are_reported(whole_run: Callable[[str], Path], tmp_path: Path) -> None:
    """Tokens are normalised, so their own means and spreads say nothing of the latents."""
    for patch in (1, 2):
        tokenizer: Any = load_tokenizer(whole_run("kl"), patch=patch)
        digits = build_data({"kind": "digits"})
        done = evaluate_tokenizer(tokenizer, digits, tmp_path / str(patch), num=40, real=digits, quiet=True)
        images = to_float(digits.images(as_many(whole(digits, 0, ()), 40, 0).index))
        latents = tokenizer.moments(images)[:, :2]  # (40, 2, 4, 4), the means of the posteriors
        for name, expected in (
            ("mean", latents.mean(dim=(0, 2, 3))),
            ("std", latents.std(dim=(0, 2, 3), correction=0)),
        ):
            assert done.report["channels"][name] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("case", "setting", "said"),
    [
        (FSQ, "objective.entropy=0.1", "objective.entropy: has no effect, as the tokens of FSQ are levels"),
        (FSQ, "objective.revive_images=16", "objective.revive_images: has no effect"),
        (FSQ, "objective.commitment=1.0", "objective.commitment: has no effect"),
        (VQ, "training.freeze=[quantiser.*]", "objective.revive_images: would change codewords, but training.freeze"),
    ],
)
def test_a_term_that_has_no_effect_or_would_change_what_is_frozen_is_refused(
    case: list[str], setting: str, said: str, tmp_path: Path
) -> None:
    more = ["objective.revive_images=16"] if case is VQ else []
    with pytest.raises(ConfigError, match=said):
        train_tokenizer(recipe_of(*case, *more, setting), tmp_path / "run", quiet=True)


def test_terms_of_whole_images_see_them_whole_where_latents_are_scaled() -> None:
    """An extractor such as LPIPS takes images of at least some size."""
    recipe = of("kl", "objective.equivariance=1.0", "objective.perceptual=1.0", "objective.perceptual_features=none")
    _, model = build_autoencoding(recipe)
    sides = set()

    def perceptual(decoded: Tensor, images: Tensor) -> Tensor:
        sides.add((tuple(decoded.shape), tuple(images.shape)))
        return (decoded - images).square().flatten(1).mean(dim=1)

    images = torch.rand(2, 1, 8, 8) * 2 - 1
    for number in range(8):
        keys = Keys.of(number).fold(torch.arange(2))
        model(images, keys, Keys.of("step", number), perceptual=cast(Any, perceptual)).mean.backward()
    assert sides == {((2, 1, 8, 8), (2, 1, 8, 8))}


def test_a_perceptual_term_comes_from_a_classifier_which_then_cannot_judge(
    whole_run: Callable[..., Path], judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = perceptual(judge)
    run = whole_run("kl", *more)
    assert "loss_perceptual" in untimed_metrics(run)[-1]
    assert [each["name"] for each in read_provenance(run)["perceptual"]] == ["judge"]
    assert not any("stages" in name for name in load_file(run / "model" / "tokenizer.safetensors"))
    words = [
        "evaluate",
        str(run),
        "--data",
        "digits",
        "--num",
        "40",
        "--out",
        str(tmp_path / "evaluation"),
    ]
    capsys.readouterr()
    assert command([*words, "--features", str(judge)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "features: the tokenizer was trained with those of judge" in line
    assert command([*words, "--features", "none"]) == 0 and "PSNR" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"perceptual_layers: 'net.stage.0' is no module of judge.* 'net.stages.0'"):
        train_tokenizer(of("kl", *more, "objective.perceptual_layers=[net.stage.0]"), tmp_path / "no", quiet=True)


def test_what_is_built_on_a_tokenizer_is_not_judged_by_its_features_either(
    whole_run: Callable[..., Path], judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a tokenizer that begins with it, nor a generator of its tokens, nor one that begins with that."""
    first = whole_run("kl", *perceptual(judge))
    begun = recipe_of("kl-32-tiny", *COMMON, *TWO_STEPS, f"tokenizer={{from: {first}}}")
    train_tokenizer(begun, tmp_path / "second", quiet=True)
    on = f"tokenizer={{from: {tmp_path / 'second'}}}"
    generator = ["mar-digits", *TINY_RUN, on, "training.images=8"]
    train(read_recipe("mar-digits", generator[1:]), tmp_path / "generator", quiet=True)
    more = [*generator[1:], f"tokenizer.from={tmp_path / 'generator'}", f"training.init_from={tmp_path / 'generator'}"]
    train(read_recipe("mar-digits", more), tmp_path / "tuned", quiet=True)
    measure_latents(read_recipe("mar-digits", generator[1:]), tmp_path / "measured", images=16, device="cpu")
    features = open_features(str(judge), size=(8, 8), channels=1)
    digits = Digits()
    refused = "features: the tokenizer was trained with those of judge"
    for name in ("second", "generator", "measured"):
        tokenizer, provenance = load_tokenizer(tmp_path / name), read_provenance(tmp_path / name)
        with pytest.raises(UsageError, match=refused):
            evaluate_tokenizer(
                tokenizer, digits, tmp_path / "e", num=20, features=features, provenance=provenance, quiet=True
            )
    for name in ("generator", "tuned"):
        with pytest.raises(UsageError, match=refused):
            evaluate(load(tmp_path / name), digits, tmp_path / "e", num=20, features=features, quiet=True)
    judged = ["training.evaluate_images=64", f"training.evaluate_features={judge}"]
    capsys.readouterr()
    assert command(["train", *generator, *judged, "--out", str(tmp_path / "judged")]) == 2
    assert f"training.evaluate_{refused}" in capsys.readouterr().err
    assert not (tmp_path / "e").exists() and not (tmp_path / "judged").exists()


def test_initial_weights_of_a_model_of_another_tokenizer_are_refused(
    whole_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Two runs of one recipe have the same settings, and weights that give tokens another meaning."""
    one, two = whole_run("kl"), whole_run("kl", "seed=1")
    words = [*TINY_RUN, "training.images=8", f"tokenizer={{from: {one}}}"]
    train(read_recipe("mar-digits", words), tmp_path / "generator", quiet=True)
    more = [*TINY_RUN, "training.images=8", f"training.init_from={tmp_path / 'generator'}"]
    with pytest.raises(ConfigError, match=r"the tokenizer of .*generator has other weights .* set tokenizer.from="):
        train(read_recipe("mar-digits", [*more, f"tokenizer={{from: {two}}}"]), tmp_path / "no", quiet=True)
    assert not (tmp_path / "no").exists()
    train(read_recipe("mar-digits", [*more, f"tokenizer={{from: {one}}}"]), tmp_path / "yes", quiet=True)


def test_a_run_goes_on_with_the_tokenizer_and_the_features_it_began_with(
    whole_run: Callable[..., Path], judge: Path, tmp_path: Path
) -> None:
    """They may have moved; others under their names or in their places are refused."""
    shutil.copytree(whole_run("kl"), tmp_path / "one")
    shutil.copytree(whole_run("kl", "seed=1"), tmp_path / "two")
    words = [*TINY_RUN, "training.save_images=8", "training.batch_size=8"]

    def recipe(name: str, images: int) -> Any:
        return read_recipe(
            "mar-digits", [*words, f"training.images={images}", f"tokenizer={{from: {tmp_path / name}}}"]
        )

    train(recipe("one", 8), tmp_path / "generator", quiet=True)
    with pytest.raises(ConfigError, match=r"tokenizer.from: .*two has other weights .*"):
        train(recipe("two", 16), tmp_path / "generator", resume=True, quiet=True)
    (tmp_path / "one").rename(tmp_path / "moved")
    assert train(recipe("moved", 16), tmp_path / "generator", resume=True, quiet=True).images == 16

    shutil.copytree(whole_run("kl", *perceptual(judge)), tmp_path / "run")
    other = saved_judge(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"objective.perceptual_features: judge has other weights"):
        longer = of("kl", *perceptual(other), "training.images=120")
        train_tokenizer(longer, tmp_path / "run", resume=True, quiet=True)
    longer = of("kl", *perceptual(Path(shutil.copytree(judge, tmp_path / "elsewhere"))), "training.images=120")
    assert train_tokenizer(longer, tmp_path / "run", resume=True, quiet=True).images == 120


def test_usage_and_perplexity_are_logged_and_a_collapsed_codebook_is_warned_of(
    whole_run: Callable[[str], Path], tmp_path: Path
) -> None:
    for row in untimed_metrics(whole_run("vq")):
        assert 0 < row["usage"] <= 1 and 1 <= row["perplexity"] <= 16
    large = "tokenizer={kind: vq, stride: 4, vocab: 60, code_dim: 1, latent_channels: 8, width: 8, layers_per_block: 1}"
    collapsed = recipe_of(*VQ, large, "training.images=120", "training.learning_rate=1e-6", "objective.revive_images=0")
    with pytest.warns(UserWarning, match=r"the codebook has collapsed: .*% of 60 codes .*objective.revive_images"):
        train_tokenizer(collapsed, tmp_path / "few", quiet=True)


def test_a_dry_run_measures_and_writes_nothing(tmp_path: Path) -> None:
    for case in ("gan", "vq"):
        task = TokenizerTask(of(case), tmp_path / "run", torch.device("cpu"), quiet=True)
        plan = measured_plan(task, torch.device("cpu"), quiet=True)
        assert plan["flops_per_image"] > 1e5 and plan["images_per_second"] > 0
    assert not (tmp_path / "run").exists()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "more", "says"),
    [
        (KL, ["tokenizer.stride=3"], "tokenizer.stride: 3 is not allowed; it must be 1, 2, 4, 8 or 16"),
        (KL, ["tokenizer.stride=16"], "both sides must be multiples of 16"),
        (KL, ["tokenizer.latent_channels=0"], "tokenizer.latent_channels: 0 is not allowed"),
        (KL, ["tokenizer={kind: pixels}"], "tokenizer.kind: Pixels has nothing to train; name one of detok"),
        (KL, ["tokenizer={kind: klx}"], "tokenizer.kind: 'klx' is not known"),
        (KL, ["tokenizer={from: nowhere}"], "tokenizer.from: there is no folder 'nowhere'"),
        (KL, ["objective.gan=0.5", "objective.gan_start=80"], "objective.gan_start: 80 is not allowed, as the run"),
        (KL, ["objective.gan=0.5", "objective.gan_start=-1"], "objective.gan_start"),
        (KL, ["objective.gan_start=5"], "gan_start: has no effect without a weight"),
        (KL, ["objective.gan=0.5"], "objective.gan_layers: 3 is not allowed, as it halves sides of 8 pixels too often"),
        (KL, [*GAN, "training.freeze=[autoencoder.decoder.*]"], "objective.gan needs its gradient"),
        (KL, ["objective.perceptual=1"], "perceptual_features: is required"),
        (KL, ["objective.perceptual=1", "objective.perceptual_features=nowhere"], "objective.perceptual_features:"),
        (KL, ["objective.reconstruction=l3"], "objective.reconstruction"),
        (KL, ["objective.kl=-1"], "objective.kl"),
        (KL, ["objective.entropy=0.1"], "objective.entropy: has no effect, as the tokens of KL are continuous latents"),
        (VQ, ["objective.kl=0.1"], "objective.kl: has no effect, as the tokens of VQ are codes"),
        (VQ, ["objective.latent_noise=0.1"], "objective.latent_noise: has no effect"),
        (KL, ["objective.mask=0.5"], "objective.mask: KL can't leave patches out"),
        (DETOK, ["objective.equivariance=0.5"], "objective.equivariance: can't go with objective.mask"),
        (KL, ["objective.latent_noise=1", "objective.interpolated_noise=1"], "can't go with latent_noise"),
        (KL, ["training.freeze=[nothing]"], "training.freeze: no parameter matches 'nothing'"),
        (KL, ["model.width=8"], "unknown key 'model.width'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_written(
    base: list[str], more: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        train_tokenizer(recipe_of(*base, *more), tmp_path / "run", quiet=True)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
