"""From official files to images of own classes: convert, train and sample with small models in official layouts."""

from __future__ import annotations

from pathlib import Path

import documents_world as world
import pytest
import torch
from helpers import official_tensors

from seriatim.checkpoints.kl16 import kl16_from_tokenizer
from seriatim.checkpoints.llamagen import llamagen_tensors
from seriatim.checkpoints.mar import mar_tensors
from seriatim.cli.main import run
from seriatim.models.build import build_model, model_config, seeded
from seriatim.pipeline.loading import load
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.vq import VQ
from seriatim.training.config import read_recipe
from seriatim.training.initialise import MAY_DIFFER, settings
from seriatim.zoo import PRESETS

SIDE = 8
SMALL = [
    f"data.size={SIDE}", "model.depth=1", "model.heads=2", "training.images=16", "training.batch_size=8",
    "training.accumulate=1", "training.workers=0", "training.threads=1", "training.dtype=float32",
    "training.warmup_images=0", "training.sample_images=0", "training.save_images=16", "training.learning_rate=0.001",
]  # fmt: skip
OF_MAR = ["model.width=32", "model.buffer=4", "model.head.width=32", "model.head.depth=1",
          "sampling.num_inference_steps=3", "sampling.num_diffusion_steps=4"]  # fmt: skip


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the authors publish, at toy size, and a folder of own pictures; the current folder."""
    monkeypatch.chdir(tmp_path)
    with seeded(0):
        kl = KL(SIDE, block_out_channels=(32, 32), layers_per_block=1)
        vq = VQ(SIDE, vocab=40, code_dim=4, latent_channels=32, block_out_channels=(32, 32), layers_per_block=1)
    torch.save({"model": kl16_from_tokenizer(kl)}, "kl16.ckpt")
    torch.save({"model": official_tensors(vq)}, "vq_ds16_c2i.pt")
    mar = mar_tensors(world.network(world.PRESETS["mar-b"]))
    torch.save({"model": mar, "model_ema": mar}, "checkpoint-last.pth")
    torch.save({"model": llamagen_tensors(world.network(world.CODES))}, "c2i_B_256.pt")
    world.pictures(tmp_path / "photos", 12, 8, ["tulip", "rose"])
    return tmp_path


def seriatim(*words: str) -> int:
    return run(list(words))


CASES: dict[str, tuple[list[str], list[str], str]] = {
    "mar": (
        ["convert", "mar", "checkpoint-last.pth", "mar-b.model", "--vae", "kl16.ckpt", "--heads", "2"],
        ["mar-finetune256", *SMALL, *OF_MAR],
        "mar-b.model",
    ),
    "llamagen": (
        ["convert", "llamagen", "c2i_B_256.pt", "llamagen-b.model", "--vq", "vq_ds16_c2i.pt", "--size", str(SIDE),
         "--heads", "2"],
        ["llamagen-finetune256", *SMALL, "model.width=64"],
        "llamagen-b.model",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("official")
@pytest.mark.parametrize("kind", CASES)
def test_convert_train_sample(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    convert, recipe, source = CASES[kind]
    assert seriatim(*convert) == 0
    own = [*recipe, "data.path=photos", "training.freeze=['backbone.*']"]
    assert seriatim("train", *own, "--out", "run") == 0
    before, after = (load(name, device="cpu") for name in (source, "run"))
    assert after.class_names == ["rose", "tulip"] and before.model.classes == 1000
    old, new = before.model.state_dict(), after.model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("backbone."))
    moved = [name for name in old if name.startswith("head.") and not torch.equal(old[name], new[name])]
    assert moved, "the head learns"
    mean = old["conditioner.class_embedding"].mean(dim=0)
    assert torch.allclose(new["conditioner.class_embedding"], mean.expand(2, -1), atol=0.05), "begun at the mean"
    for name, tensor in before.tokenizer.state_dict().items():
        assert torch.equal(tensor, after.tokenizer.state_dict()[name]), name
    capsys.readouterr()
    assert seriatim("sample", "run", "--label", "tulip", "--num-images-per-label", "2", "--out", "flowers") == 0
    assert len(list(Path("flowers").glob("*-tulip.png"))) == 2


@pytest.mark.usefixtures("official")
@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("llamagen", "model.rotate_prefix=true", "model.rotate_prefix (false there, true in the recipe); set model.ro"),
        ("mar", "model.heads=4", "model.heads ([2,2] there, [4,4] in the recipe); set model.heads=[2,2]"),
        ("mar", "tokenizer.scale=1.0", "tokenizer.scale (0.2325 there, 1.0 in the recipe); set tokenizer.scale=0.2325"),
    ],
)
def test_the_trap_is_one_line_and_nothing_is_written(
    kind: str, change: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    convert, recipe, _ = CASES[kind]
    assert seriatim(*convert) == 0
    for more in ([], ["--dry-run"]):
        capsys.readouterr()
        assert seriatim("train", *recipe, "data.path=photos", change, "--out", "run", *more) == 2
        said = capsys.readouterr().err.strip()
        assert words in said and "\n" not in said and not Path("run").exists()


@pytest.mark.parametrize(("recipe", "preset"), [("mar-finetune256", "mar-b"), ("llamagen-finetune256", "llamagen-b")])
def test_the_packaged_recipes_are_those_of_the_official_weights(recipe: str, preset: str) -> None:
    with torch.device("meta"):
        theirs = build_model(PRESETS[preset].original())
        vocab = theirs.backbone.vocab
        sizes = {"tokens": 256, "classes": 7, **({"dim": 16} if vocab is None else {"vocab": vocab})}
        ours = build_model(read_recipe(recipe).model, **sizes)
    one, two = (settings(model_config(model), "model", MAY_DIFFER) for model in (theirs, ours))
    assert one == two and len(one) > 8
