"""Tokens given as they are: read safely, trained and sampled from the command line, refused in one line."""

from __future__ import annotations

import json
import pickle
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import seriatim
from seriatim.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from seriatim.cli.main import run
from seriatim.core.errors import ConfigError, DataError, UsageError
from seriatim.data.array_file import ArrayData
from seriatim.tokenizers.arrays import Arrays
from seriatim.training.config import read_recipe
from seriatim.training.setup import build_inputs, fit_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ["model.width=32", "model.depth=1", "model.heads=2", "model.head.width=32", "model.head.depth=1"]
SMALL += ["training.images=128", "training.batch_size=32", "training.log_images=64", "training.sample_images=128"]
SMALL += ["training.warmup_images=0", "training.dtype=float32", "training.threads=1"]
SMALL += ["sampling={num_inference_steps: 4, num_diffusion_steps: 4}"]
CODES = ["model.head={kind: categorical}", "sampling={num_inference_steps: 4}"]


def features(count: int = 40) -> Any:
    """(N, 6, 3): features of units of their own."""
    chance = np.random.default_rng(0)
    return (chance.standard_normal((count, 6, 3)) * [1e-4, 1, 500] + [5, -3, 1e4]).astype(np.float32)


def codes(count: int = 40, vocab: int = 12) -> Any:
    return np.random.default_rng(0).integers(0, vocab, (count, 6))


def recipe(data: Path, *more: str, tokenizer: str = "{kind: arrays}", **extra: str) -> Any:
    fields = ", ".join(f"{key}: {value}" for key, value in {"kind": "arrays", "path": str(data), **extra}.items())
    return read_recipe("mar-waves", [f"data={{{fields}}}", f"tokenizer={tokenizer}", *more])


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_features_come_back_as_they_were(tmp_path: Path, suffix: str) -> None:
    given, labels = features(), np.arange(40) % 3
    path = tmp_path / f"x{suffix}"
    extra = {}
    if suffix == ".npy":
        np.save(path, given)
        np.save(tmp_path / "labels.npy", labels.astype(np.uint8))
        extra = {"labels": str(tmp_path / "labels.npy")}
    else:
        save_file({"tokens": torch.from_numpy(given), "labels": torch.from_numpy(labels)}, path)
    data, tokenizer = build_inputs(recipe(path, **extra))
    assert (data.count, data.size, data.channels, data.class_names) == (40, (1, 6), 3, ["0", "1", "2"])
    assert (tokenizer.count, tokenizer.dim, tokenizer.vocab, tokenizer.pictures) == (6, 3, None, False)
    fit_tokenizer(tokenizer, data, quiet=True)
    index = torch.tensor([7, 3, 3, 39])
    tokens = tokenizer.tokens(data.images(index))
    assert tokens.shape == (4, 6, 3)
    assert torch.allclose(tokenizer.decode(tokens), torch.from_numpy(given)[index], rtol=1e-5)
    found = data.labels(index)
    assert found is not None and found.tolist() == [1, 0, 0, 0]
    every = tokenizer.tokens(data.images(torch.arange(40))).flatten(0, 1)
    assert every.mean(dim=0).abs().max() < 0.05 and (every.std(dim=0) - 1).abs().max() < 0.05
    assert torch.equal(tokenizer.moments(torch.from_numpy(given)), data.images(torch.arange(40)))
    again = load_tokenizer(save_tokenizer(tokenizer, tmp_path / "t"))
    again.fit_moments([data.images(index) * 2])
    assert again.fingerprint() == tokenizer.fingerprint(), "measured once"


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_codes_come_back_as_they_were(tmp_path: Path, kind: Any) -> None:
    np.save(tmp_path / "codes.npy", codes().astype(kind))
    data, tokenizer = build_inputs(recipe(tmp_path / "codes.npy", tokenizer="{kind: arrays, vocab: 12}"))
    fit_tokenizer(tokenizer, data, quiet=True)
    moments = data.images(torch.arange(40))
    assert moments.shape == (40, 1, 1, 6) and moments.dtype == torch.int64
    found = tokenizer.tokens(moments)
    assert torch.equal(found, torch.from_numpy(codes())) and torch.equal(tokenizer.decode(found), found)
    assert torch.equal(tokenizer.moments(found), moments) and tokenizer.vocab == 12


def test_statistics_are_exact_whatever_the_batches() -> None:
    x = torch.randn(50, 4, 6, dtype=torch.float64).float() * torch.tensor([1e-3, 1, 1e3, 0])[:, None] + 1e3
    one, many = (Arrays((1, 6), 4) for _ in range(2))
    one.fit_moments([x[:, :, None]])
    many.fit_moments(x[:, :, None].split(7))
    flat = x.double().transpose(0, 1).flatten(1)
    assert torch.allclose(one.mean.double(), flat.mean(dim=1)) and torch.allclose(one.mean, many.mean)
    assert torch.allclose(one.std[1:3].double(), flat.std(dim=1, correction=0)[1:3], rtol=1e-5)
    assert torch.allclose(one.std, many.std, rtol=1e-5) and bool((one.std > 0).all())
    tokens = one.tokens(x[:, :, None])
    assert torch.isfinite(tokens).all() and torch.allclose(one.decode(tokens), x.transpose(1, 2), atol=1e-3)


class Payload:
    """Pickled, it would write a file when it is read."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


BAD: dict[str, tuple[Any, str]] = {
    "objects": (np.array([[{"a": 1}]], dtype=object), "Python objects"),
    "not finite": (np.where(np.arange(720).reshape(40, 6, 3) == 50, np.nan, 1.0), "row 2 has values that are not"),
    "too large": (np.full((2, 6, 3), 1e300), "row 0 has values that are not finite as float32"),
    "rank of features": (np.zeros((40, 6)), "(40, 6) of float64; reshape it to (sequences, tokens, features)"),
    "rank of codes": (np.zeros((4, 6, 3), dtype=int), "(4, 6, 3) of int64; reshape it to (sequences, tokens)"),
    "empty": (np.zeros((0, 6, 3)), "no tokens at all"),
    "kind": (np.zeros((2, 6, 3), dtype=complex), "holds complex128"),
    "bool": (np.zeros((2, 6), dtype=bool), "holds bool"),
    "text": (np.array([["a", "b"]]), "holds <U1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_one_line(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    array, words = BAD[case]
    np.save("x.npy", array, allow_pickle=True)
    with pytest.raises(DataError) as caught:
        ArrayData("x.npy")
    message = str(caught.value)
    assert words in message and message.startswith("data.path: x.npy") and "\n" not in message, message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.npy", "is not a readable"),
        ("x.safetensors", "is not a readable"),
        ("x.pkl", "is neither .npy nor .safetensors"),
        ("none.npy", "there is no file"),
    ],
)
def test_files_that_are_none_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if not name.startswith("none"):
        Path(name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DataError) as caught:
        ArrayData(name)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("ran").exists(), "nothing was run"
    if not name.startswith("none"):
        np.save("x.npy", features())
        Path("x.npy").write_bytes(Path("x.npy").read_bytes()[:300])
        with pytest.raises(DataError, match="is not a readable"):
            ArrayData("x.npy")


def test_a_safetensors_file_needs_the_name(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 3, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="has no tensor 'tokens'; it has 'x'"):
        ArrayData(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(39, dtype=int), "39 labels for 40 sequences"),
        (np.zeros((40, 1), dtype=int), "int64 of shape (40, 1)"),
        (np.zeros(40), "float64 of shape (40,)"),
        (np.full(40, -1), "the label -1"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(tmp_path: Path, labels: Any, words: str) -> None:
    np.save(tmp_path / "x.npy", features())
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(DataError) as caught:
        ArrayData(str(tmp_path / "x.npy"), str(tmp_path / "labels.npy"))
    message = str(caught.value)
    assert words in message and message.startswith("data.labels: ") and "\n" not in message, message


@pytest.mark.parametrize(
    ("array", "tokenizer", "error", "words"),
    [
        (codes(), "{kind: arrays}", ConfigError, "tokenizer.vocab: is required"),
        (codes(), "{kind: arrays, vocab: 11}", DataError, "codes from 0 to 11, outside the vocabulary of 11"),
        (codes() - 1, "{kind: arrays, vocab: 20}", DataError, "codes from -1 to 10, outside"),
        (features(), "{kind: arrays, vocab: 20}", ConfigError, "channels: 3"),
        (features()[..., :1], "{kind: arrays, vocab: 20}", ConfigError, "holds features, not codes"),
        (features(), "{kind: arrays, vocab: 1}", ConfigError, "tokenizer."),
        (features(), "{kind: pixels}", ConfigError, "tokenizer.kind: 'pixels' is not allowed; the data holds arrays"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_one_line(
    tmp_path: Path, array: Any, tokenizer: str, error: type[Exception], words: str
) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(error) as caught:
        build_inputs(recipe(tmp_path / "x.npy", tokenizer=tokenizer))
    assert words in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_pictures_want_a_tokenizer_of_pictures() -> None:
    with pytest.raises(ConfigError, match="the data holds pictures, which need"):
        build_inputs(read_recipe("mar-digits", ["tokenizer={kind: arrays}"]))


def test_tokens_of_another_shape_or_kind_are_refused() -> None:
    tokenizer, discrete = Arrays((1, 6), 3), Arrays((1, 6), vocab=12)
    for call, value, words in (
        (tokenizer.moments, torch.zeros(2, 5, 3), "5 tokens of 3 features, but the tokenizer takes 6 of 3"),
        (tokenizer.moments, torch.zeros(2, 6, 3, dtype=torch.int64), "whole numbers"),
        (discrete.moments, torch.zeros(2, 6), "codes are whole numbers"),
        (discrete.moments, torch.full((2, 6), 12), "not all in the vocabulary"),
        (discrete.embeddings, torch.zeros(2, 6, dtype=torch.int64), "without codewords"),
        (discrete.decode_embeddings, torch.zeros(2, 6, 3), "without codewords"),
    ):
        with pytest.raises((DataError, UsageError)) as caught:
            call(value)
        assert words in str(caught.value)
    with pytest.raises(DataError, match="no arrays to measure"):
        tokenizer.fit_moments([])


# --- training and sampling ----------------------------------------------------------------------------------------


def test_waves_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waves = runpy.run_path(str(ROOT / "examples" / "make_waves.py"))
    tokens, labels = waves["make"](60, 0)
    assert waves["check"](tokens, labels) == {"signals": 60, "steady": 1.0, "as_often": 1.0, "as_asked": 1.0}
    np.save(tmp_path / "waves.npy", tokens)
    out, drawn = tmp_path / "run", tmp_path / "drawn"
    words = ["train", "mar-waves", f"data.path={tmp_path / 'waves.npy'}", *SMALL, "training.save_images=64"]
    assert run([*words, "--out", str(out)]) == 0
    assert np.load(out / "samples" / f"{128:012d}.npy").shape == (32, 32, 8)
    card = (out / "model" / "README.md").read_text()
    assert "sequences: 60, 32 tokens, numbers of a token: 8" in card and "pixels" not in card
    capsys.readouterr()
    words = ["sample", str(out), "--num-images-per-label", "3", "--seed", "1", "--out", str(drawn)]
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shape"] == [3, 32, 8]
    array, says = np.load(drawn / "samples.npy"), json.loads((drawn / "samples.json").read_text())
    assert array.shape == (3, 32, 8) and array.dtype == np.float32 and np.isfinite(array).all()
    assert says["request"]["seed"] == 1 and len(says["seeds"]) == 3 and says["labels"] == [None] * 3
    assert run(words) == 2 and "exists already" in capsys.readouterr().err
    assert run([*words, "--overwrite"]) == 0 and (np.load(drawn / "samples.npy") == array).all()
    assert run([*words, "--overwrite", "--animate"]) == 2 and "no pictures" in capsys.readouterr().err
    for more in (["--features", "pixels"], ["--features", "pixels", "--tokenizer"]):
        assert run(["evaluate", str(out), "--data", "digits", "--num", "8", *more]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "no pictures" in lines[0], lines

    pipe = seriatim.load(out, device="cpu")
    result = pipe(seed=1, num_images_per_label=3, batch_size=2)
    assert np.abs(result.images - array).max() < 1e-4 * np.abs(array).max()
    assert torch.equal(pipe(seed=1, output_type="pt").images, pipe.tokenizer.decode(pipe(seed=1).tokens))
    redrawn = pipe.regenerate(result, [0, 1], seed=2)
    assert np.array_equal(redrawn.images[:, 2:], result.images[:, 2:])
    assert not np.array_equal(redrawn.images[:, :2], result.images[:, :2])
    with pytest.raises(UsageError, match="no pictures"):
        pipe.edit(result.images, mask=np.ones((1, 32), dtype=bool))
    with pytest.raises(UsageError, match="no pictures"):
        next(pipe.stream(seed=0)).preview()
    assert [file.name for file in result.save(tmp_path / "saved")] == ["samples.npy", "samples.json"]


def test_codes_from_the_command_line(tmp_path: Path) -> None:
    save_file({"tokens": torch.from_numpy(codes()), "labels": torch.arange(40) % 2}, tmp_path / "codes.safetensors")
    words = ["train", "mar-waves", f"data.path={tmp_path / 'codes.safetensors'}", "tokenizer.vocab=12"]
    assert run([*words, *SMALL[:3], *SMALL[5:], *CODES, "--out", str(tmp_path / "run")]) == 0
    assert run(["sample", str(tmp_path / "run"), "--label", "1", "--out", str(tmp_path / "drawn")]) == 0
    array = np.load(tmp_path / "drawn" / "samples.npy")
    assert array.shape == (1, 6) and array.dtype == np.int64 and 0 <= array.min() and array.max() < 12


def test_a_run_resumes_on_the_same_arrays_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", features())
    words = ["train", "mar-waves", f"data.path={tmp_path / 'x.npy'}", *SMALL, "training.save_images=64"]
    assert run([*words, "--out", str(tmp_path / "run")]) == 0
    assert run([*words, "training.images=160", "--out", str(tmp_path / "run"), "--resume"]) == 0
    np.save(tmp_path / "x.npy", features() + 1)
    assert run([*words, "training.images=192", "--out", str(tmp_path / "run"), "--resume"]) == 3
    assert "are not those" in capsys.readouterr().err
