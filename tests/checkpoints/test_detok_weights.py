"""l-DeTok's files: sizes read off tensors, a pickle of which nothing is run, one line for what does not fit."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from seriatim import load
from seriatim.checkpoints.detok_weights import detok_tensors, read_statistics, tokenizer_from_detok
from seriatim.checkpoints.mar import mar_tensors
from seriatim.checkpoints.tokenizer import load_tokenizer
from seriatim.cli.main import run
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.models.build import build_model, seeded
from seriatim.tokenizers.detok import Detok

TINY: dict[str, Any] = {"stride": 4, "latent_channels": 3, "width": [16, 24], "depth": [1, 2], "heads": [2, 3]}
NAME = "small-gamm3.0-m0.7"


def small(size: Any = 8, **more: Any) -> Detok:
    with seeded(0):
        made = Detok(size, **{**TINY, **more})
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return made


def statistics(path: Path, *keys: str, length: int = 6) -> Path:
    """A file as the official code writes it: numbers of means, then of log-variances."""
    entries = {}
    for at, key in enumerate(keys):
        numbers = torch.arange(float(length)) + 10 * at
        entries[key] = {"single": (torch.tensor(0.0), torch.tensor(1.0)), "channel": (numbers, numbers + 1)}
    path.write_bytes(pickle.dumps(entries))
    return path


@pytest.mark.parametrize(
    ("size", "more"),
    [(8, {}), ((8, 12), {"channels": 1}), (8, {"stride": 8, "depth": 3, "heads": 1, "width": 32}), (16, {"stride": 2})],
)
@torch.no_grad()
def test_every_size_is_read_off_the_tensors(size: Any, more: dict[str, Any]) -> None:
    tokenizer = small(size, **more)
    heads = tokenizer.config["heads"]
    given = tokenizer.size if isinstance(size, tuple) else None
    again = tokenizer_from_detok(detok_tensors(tokenizer), "x", size=given, heads=heads)
    assert again.config == tokenizer.config
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert all(not p.requires_grad for p in again.parameters())
    images = torch.rand(2, tokenizer.channels, *tokenizer.size)
    assert torch.equal(again.moments(images), tokenizer.moments(images))


def blocks(number: int) -> Callable[[dict[str, Tensor]], object]:
    """Adds so many more blocks to each half, one tensor in each."""
    halves = ("encoder", "decoder")
    return lambda t: t.update({f"{h}.transformer.{i}.x": torch.ones(1) for i in range(number) for h in halves})


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.latent_head.bias"] = torch.full((6,), float("nan"))


SPOILT: dict[str, tuple[Callable[[dict[str, Tensor]], object], str, str]] = {
    "missing": (lambda t: t.pop("decoder.transformer.1.mlp.w3.bias"), "lacks tensor", "decoder.transformer.1.mlp.w3"),
    "missing block": (lambda t: [t.pop(n) for n in list(t) if ".transformer.0." in n], "lacks tensor", "transformer.0"),
    "missing size": (lambda t: t.pop("encoder.patch_embed.0.weight"), "lacks tensor", "patch_embed"),
    "no decoder": (lambda t: t.pop("decoder.decoder_embed.weight"), "lacks tensor", "decoder_embed"),
    "extra": (lambda t: t.update({"decoder.x": torch.ones(1)}), "unknown tensor", "decoder.x"),
    "shape": (lambda t: t.update({"decoder.ln_pre.weight": torch.ones(5)}), "has shape (5,), not (24,)", "ln_pre"),
    "axes": (lambda t: t.update({"encoder.patch_embed.0.weight": torch.ones(16)}), "not 4 axes", "patch_embed"),
    "positions": (
        lambda t: t.update({"decoder.positional_embedding": torch.ones(1, 9, 24)}),
        "has shape (1, 9, 24)",
        "decoder.positional_embedding",
    ),
    "channels": (lambda t: t.update({"encoder.patch_embed.0.weight": torch.ones(16, 2, 4, 4)}), "channels: 2", "know"),
    "width": (lambda t: t.update({"encoder.patch_embed.0.weight": torch.ones(10, 3, 4, 4)}), "with width 10", "know"),
    "many blocks": (blocks(600), "has 600 blocks under the name 'encoder.transformer'; at most 512", "another"),
    "many blocks together": (blocks(300), "tokenizer.depth: 300 is not allowed; at most 512 layers are built", "know"),
    "long number": (
        lambda t: t.update({f"encoder.transformer.{'9' * 5000}.x": torch.ones(1)}),
        "lacks tensor",
        "'encoder.transformer.1.*'",
    ),
    "not finite": (poison, "not finite", "encoder.latent_head.bias"),
}


@pytest.mark.parametrize("case", SPOILT)
@torch.no_grad()
def test_tensors_that_do_not_fit_are_named(case: str) -> None:
    spoil, *words = SPOILT[case]
    tensors = detok_tensors(small())
    spoil(tensors)
    with pytest.raises(CheckpointError) as caught:
        tokenizer_from_detok(tensors, "detok.pth", heads=(2, 3))
    message = str(caught.value)
    assert message.startswith("detok.pth") and all(word in message for word in words), message
    assert "\n" not in message


@torch.no_grad()
def test_nothing_is_built_of_more_blocks_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("built")

    monkeypatch.setattr("seriatim.checkpoints.detok_weights.Detok", built)
    for number in (300, 600):
        tensors = detok_tensors(small())
        blocks(number)(tensors)
        with pytest.raises(CheckpointError, match="at most 512"):
            tokenizer_from_detok(tensors, "x", heads=(2, 3))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "heads: x has the width 16, which is not a published one"),
        ({"heads": (5, 3)}, "heads: 5 is not allowed with width 16"),
        (
            {"heads": (2, 3), "size": 12},
            "size: 12x12 pixels are 9 patches of 4x4, but x has learned the positions of 4",
        ),
        ({"heads": (2, 3), "size": 9}, "size: 9x9 is not allowed"),
        ({"heads": (2, 3), "statistics": ([0.0] * 4, [1.0] * 4)}, "mean: 4 numbers are not allowed; give 3"),
        ({"heads": (2, 3), "statistics": ([0.0] * 3, [1.0, -1.0, 1.0])}, "finite and positive"),
    ],
)
@torch.no_grad()
def test_arguments_that_do_not_fit_are_the_callers(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        tokenizer_from_detok(detok_tensors(small()), "x", **arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# --- statistics ---------------------------------------------------------------------------------------------------


def test_statistics_of_the_means_alone_are_taken_by_name(tmp_path: Path) -> None:
    path = statistics(tmp_path / "stats.pkl", "vitok", NAME)
    second = [10.0, 11, 12], [11.0, 12, 13]
    assert read_statistics(path, 3, key="vitok") == ([0, 1, 2], [1, 2, 3])
    assert read_statistics(path, 3, key=NAME, stem="vitok") == second
    assert read_statistics(path, 3, stem=f"{NAME}-decoder_tuned") == second
    assert read_statistics(statistics(tmp_path / "one.pkl", NAME), 3, stem="other") == ([0, 1, 2], [1, 2, 3])
    assert len(read_statistics(statistics(tmp_path / "short.pkl", NAME, length=3), 3)[0]) == 3
    for more, words in (
        ({}, "stats_key: is needed, because none of them begins the name of the weights"),
        ({"key": "vitok-BB"}, "stats_key: no 'vitok-BB'"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            read_statistics(path, 3, **more)
        assert f"'vitok', '{NAME}'" in str(caught.value)


def test_statistics_in_json(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    path.write_text('{"mean": [0, 1.5, -2], "std": [1, 2, 3]}')
    assert read_statistics(path, 3) == ([0, 1.5, -2], [1, 2, 3])


class Memory:
    """Pickled as a tensor's memory with the bytes of any torch file."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.raw,)


def deflated(size: int) -> bytes:
    """A torch file of that many zeros, packed."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(size), plain)
    with zipfile.ZipFile(plain) as given, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in given.infolist():
            archive.writestr(entry.filename, given.read(entry))
    return packed.getvalue()


def old(size: int) -> bytes:
    """A torch file of the old form with so many bytes of memory."""
    file, memory = io.BytesIO(), torch.zeros(size, dtype=torch.uint8).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=memory, dtype=torch.uint8, _internal=True)
    torch.save(typed, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def claiming(size: int) -> bytes:
    """A torch file of the old form that says a size, and names no memory to read."""
    said = pickle.dumps(size, protocol=2)[2:-1]
    raw = old(77).replace(b"K\x4dNt", said + b"Nt")
    end = raw.index(b".", raw.index(b"Q")) + 1
    return raw[:end] + pickle.dumps([], protocol=2)


class Evil:
    ran = False

    def __reduce__(self) -> Any:
        return exec, ("from pathlib import Path; Path('ran').touch()",)


def spoilt_pickles(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    good = statistics(tmp_path / "good.pkl", NAME).read_bytes()
    huge = {"a": {"channel": (torch.zeros(1).expand(10**9), torch.zeros(1))}}
    raw = old(1 << 16)
    cases: dict[str, tuple[bytes, str]] = {
        "packed": (pickle.dumps({"a": Memory(deflated(1 << 20))}), "a tensor inside it is packed"),
        "claimed": (pickle.dumps({"a": Memory(claiming(1 << 20))}), "larger than what the file holds of it"),
        "again": (pickle.dumps({"a": [Memory(raw) for _ in range(9)]}), "its tensors are larger than the file"),
        "long": (pickle.dumps({"a": {"channel": (torch.zeros(1 << 16),) * 2}}), "mean has 65,536 numbers, at most"),
        "code": (pickle.dumps({"a": Evil()}), "it asks for 'builtins.exec'), which could run any program"),
        "cut": (good[:-20], "is not the authors' file of statistics"),
        "empty": (b"", "is not the authors' file of statistics"),
        "text": (b"mean = 0", "is not the authors' file of statistics"),
        "list": (pickle.dumps([1, 2]), "holds list, not a mapping"),
        "no channels": (pickle.dumps({"a": {"single": (0, 1)}}), "has no mean and standard deviation of each channel"),
        "text inside": (pickle.dumps({"a": {"channel": ("x", "y")}}), "mean is 'x', not a list of numbers"),
        "huge": (pickle.dumps(huge), "is not the authors' file of statistics (a tensor is larger than its memory)"),
        "zeros": (b"\0" * (1 << 24) + b"\0", "bytes, which is too much for statistics"),
    }
    found = {}
    for name, (content, words) in cases.items():
        (tmp_path / f"{name}.pkl").write_bytes(content)
        found[name] = (tmp_path / f"{name}.pkl", words)
    return found


def test_a_pickle_that_is_something_else_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (path, words) in spoilt_pickles(tmp_path).items():
        with pytest.raises(CheckpointError) as caught:
            read_statistics(path, 3)
        message = str(caught.value)
        assert message.startswith(str(path)) and words in message and "\n" not in message, name
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "mean is None, not a list of numbers"),
        ('{"mean": [0, "a", 1], "std": [1, 1, 1]}', "not a list of numbers"),
        ("[1, 2]", "it must hold `mean` and `std`"),
        ("{", "it must hold `mean` and `std`"),
    ],
)
def test_json_that_is_something_else_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "stats.json"
    path.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_statistics(path, 3)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# --- the command line ---------------------------------------------------------------------------------------------


def official(tmp_path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """A training file: the averaged weights and the last ones."""
    averaged = {name: t.contiguous() for name, t in detok_tensors(small()).items()}
    last = {name: tensor + 1 for name, tensor in averaged.items()}
    path = tmp_path / f"{NAME}-decoder_tuned.pth"
    args = argparse.Namespace(gamma=3.0)
    torch.save(
        {"model": last, "model_ema": averaged, "epoch": 3, "args": args, "loss_module": {"a": torch.ones(1)}}, path
    )
    return path, averaged, last


HEADS = ("--heads", "2", "--heads", "3")


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, averaged, last = official(tmp_path)
    stats, out = statistics(tmp_path / "stats.pkl", "vitok", NAME), tmp_path / "detok"
    words = ["convert", "detok", str(path), str(out), *HEADS]
    assert run([*words, "--stats", str(stats), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["weights"], found["tokens"], found["features"], found["image"]) == ("model_ema", 4, 3, [8, 8])
    tokenizer = load_tokenizer(out)
    assert isinstance(tokenizer, Detok) and tokenizer.config["statistics"] == "fixed"
    assert tokenizer.mean.tolist() == [10, 11, 12] and tokenizer.std.tolist() == [11, 12, 13]
    assert torch.equal(detok_tensors(tokenizer)["encoder.latent_head.bias"], averaged["encoder.latent_head.bias"])
    assert run([*words, "--stats", "measure"]) == 2, "what is there stays"
    assert run([*words, "--stats", "measure", "--raw", "--overwrite"]) == 0
    again = load_tokenizer(out)
    assert isinstance(again, Detok) and again.config["statistics"] == "channel" and not again.measured
    assert torch.equal(detok_tensors(again)["encoder.latent_head.bias"], last["encoder.latent_head.bias"])


def test_convert_reads_safetensors_and_json(tmp_path: Path) -> None:
    _, averaged, _ = official(tmp_path)
    save_file(averaged, tmp_path / "detok.safetensors")
    (tmp_path / "stats.json").write_text('{"mean": [0, 0, 0], "std": [2, 2, 2]}')
    out = tmp_path / "detok"
    words = ["convert", "detok", str(tmp_path / "detok.safetensors"), str(out), *HEADS]
    assert run([*words, "--stats", str(tmp_path / "stats.json")]) == 0
    assert load_tokenizer(out).state_dict()["std"].tolist() == [2, 2, 2]


def test_a_generator_of_its_authors_is_mars(tmp_path: Path) -> None:
    """Their MAR has MAR's names and shapes; its tokenizer is a folder that `convert detok` made."""
    path, _, _ = official(tmp_path)
    assert run(["convert", "detok", str(path), str(tmp_path / "detok"), *HEADS, "--stats", "measure"]) == 0
    head = {"kind": "diffusion", "width": 32, "depth": 1}
    trunk = {"kind": "masked", "tokens": 4, "dim": 3, "width": 32, "depth": 1, "heads": 2, "buffer": 4, "classes": 5}
    with seeded(0):
        model = build_model({**trunk, "head": head})
    torch.save({"model_ema": mar_tensors(model)}, tmp_path / "mar_base.pth")
    words = ["convert", "mar", str(tmp_path / "mar_base.pth"), str(tmp_path / "mar"), "--heads", "2"]
    assert run([*words, "--vae", str(tmp_path / "detok")]) == 0
    assert isinstance(load_tokenizer(tmp_path / "mar"), Detok)
    images = load(tmp_path / "mar")(class_labels=[1], num_inference_steps=2, num_diffusion_steps=3).images
    assert len(images) == 1 and images[0].size == (8, 8)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--stats", "measure"], 2, "give it, once, or twice if encoder and decoder differ"),
        (["--stats", "none.pkl", *HEADS], 2, "stats: none.pkl is no file"),
        (["--stats", "stats.pkl", "--stats-key", "x", *HEADS], 2, "stats_key: no 'x'"),
        (["--stats", "measure", "--stats-key", "x", *HEADS], 2, "stats_key: 'x' has no effect"),
        (["--stats", "four.pkl", *HEADS], 2, "mean: 4 numbers are not allowed; give 3"),
        (["--stats", "code.pkl", *HEADS], 4, "could run any program"),
        (["--stats", "measure", "--size", "12", *HEADS], 2, "has learned the positions of 4"),
        (["--stats", "measure", "--heads", "1", *HEADS], 2, "give one number, or one for the encoder"),
        (HEADS, 2, "--stats"),
    ],
)
def test_convert_refuses_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: Any,
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path, _, _ = official(tmp_path)
    statistics(tmp_path / "stats.pkl", NAME)
    statistics(tmp_path / "four.pkl", NAME, length=4)
    (tmp_path / "code.pkl").write_bytes(pickle.dumps({NAME: Evil()}))
    assert run(["convert", "detok", str(path), "out", *more]) == code
    lines = capsys.readouterr().err.splitlines()
    assert words in lines[-1] and len(lines) == 1, lines
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()
