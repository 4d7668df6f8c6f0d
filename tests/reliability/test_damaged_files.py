"""The table of docs/log.md, "what becomes of a damaged file", cell by cell.

A number is the exit code of a refusal, one line that names the file. "rebuilt": what can be read is kept, and the file
is made anew. "or same": bits that mean nothing, or that no sum covers, may be other ones without a word.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_bundle
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seriatim.checkpoints.native import CLASSIFIER, CONFIG, MODEL, TOKENIZER, load_bundle, save_bundle
from seriatim.checkpoints.official import read_official
from seriatim.checkpoints.shapes import mapped
from seriatim.checkpoints.shared_tokenizer import REFERENCE
from seriatim.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from seriatim.cli.convert import read_names
from seriatim.cli.repeating import read_repeatable
from seriatim.core.errors import SeriatimError
from seriatim.core.files import MANIFEST, write_json, write_manifest
from seriatim.data.array_file import ArrayData
from seriatim.data.base import ImageData
from seriatim.data.caching import write_cache
from seriatim.data.latents import CACHE, SOURCES, Latents, digest, read_info, shards_of
from seriatim.evaluation.identity import said, same_settings
from seriatim.evaluation.reference import read_statistics
from seriatim.evaluation.residual_net import TrainedClassifier, build_classifier, load_classifier, save_classifier
from seriatim.pipeline.pipeline import Pipeline
from seriatim.pipeline.request import SampleRequest
from seriatim.tokenizers.pixels import Pixels
from seriatim.tokenizers.pretrained import read as read_autoencoder
from seriatim.training import state
from seriatim.training.config import find_recipe, read_any
from seriatim.training.log import MetricsLog
from seriatim.training.optim import adamw, averaged
from seriatim.training.setup import check_same_run

LOG = Path(__file__).resolve().parent.parent.parent / "docs" / "log.md"
DAMAGES = ("truncated", "flipped", "empty", "another type", "not UTF-8", "nested deeply", "huge numbers", "NaN")


# --- what is read -------------------------------------------------------------------------------------------------


class Pictures(ImageData):
    """Six pictures of 4x4."""

    count, size, channels, class_names = 6, (4, 4), 1, ["cat", "dog"]

    def images(self, index: Tensor) -> Tensor:
        return (index.view(-1, 1, 1, 1) * 10 + torch.arange(16).view(1, 1, 4, 4)).to(torch.uint8)

    def labels(self, index: Tensor) -> Tensor:
        return index % 2

    def images_fingerprint(self) -> str:
        return "six"


def checkpoint_parts() -> state.Trainables:
    model = nn.Linear(3, 2)
    return state.Trainables(model, averaged(model, 0.9), adamw(model, 1e-3, (0.9, 0.95), 0.0))


def make_checkpoint(folder: Path) -> None:
    parts = checkpoint_parts()
    parts.model(torch.ones(4, 3)).sum().backward()
    parts.optimiser.step()
    state.save(folder, parts, state.RunState(seen=64, steps=1, sums={"loss": 1.5}))


def read_checkpoint(folder: Path) -> Any:
    parts = checkpoint_parts()
    found = state.load(folder / "000000000064", parts)
    return found, parts.model.state_dict(), parts.optimiser.state_dict()


def make_model(folder: Path) -> None:
    save_bundle(make_bundle(), folder)


def read_model(folder: Path) -> Any:
    bundle = load_bundle(folder)
    return bundle.class_names, bundle.sampling, bundle.model.state_dict()


def make_classifier(folder: Path) -> None:
    net = build_classifier({"kind": "resnet", "widths": [8, 8], "depth": [0, 0]}, classes=2, channels=1)
    save_classifier(TrainedClassifier(net, "judge", (8, 8), ["cat", "dog"], {"test": 0.5}), folder)


def make_run(folder: Path) -> None:
    shutil.copy(find_recipe("mar-digits"), folder / "recipe.yaml")
    write_json(folder / "data.json", {"images": 6, "fingerprint": Pictures().fingerprint(), "left_out": {}})
    rows = [{"images": 64 * i, "loss": 1.0 / i, "loss_mse": 0.5} for i in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_run(folder: Path) -> Any:
    check_same_run(folder, read_any("mar-digits"), Pictures())


def read_metrics(folder: Path) -> Any:
    file = folder / "metrics.jsonl"
    log = MetricsLog(file, seen=10**9)
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == log.rows
    assert all(type(row["images"]) is int for row in log.rows)


def make_cache(folder: Path) -> None:
    write_cache(Pictures(), Pixels(4, patch=2, channels=1), folder, shard_images=3, quiet=True)


def read_cache(folder: Path) -> Any:
    data = Latents(str(folder), flip=False)
    return data.images(torch.arange(6)), data.labels(torch.arange(6)), [data.name(i) for i in range(6)]


def whole_shard(folder: Path) -> Any:
    """None where the shard would be made anew."""
    return shards_of(folder, read_info(folder / CACHE)).whole(0)


def settings(source: str = "runs/a") -> dict[str, Any]:
    return {"num": 8, "model": {"sha256": "0" * 64, "source": source}, "request": said(SampleRequest())}


def make_pictures(folder: Path) -> None:
    Pipeline(make_bundle(), device="cpu")(class_labels=["cat"], seed=1).save(folder)


def make_reference(folder: Path) -> None:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(folder / "reference.npz", mu=np.zeros(5), sigma=np.eye(5), arr_0=images)


def read_reference(folder: Path) -> Any:
    found = read_statistics(folder / "reference.npz")
    assert found.pool is not None and found.images is not None
    return found.pool, found.images.images(torch.arange(2))


def make_arrays(folder: Path) -> None:
    numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.save(folder / "tokens.npy", numbers)
    np.save(folder / "labels.npy", np.array([0, 1]))
    save_file({"tokens": torch.from_numpy(numbers), "labels": torch.tensor([0, 1])}, folder / "tokens.safetensors")


def read_arrays(name: str, labels: str | None = None) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        data = ArrayData(str(folder / name), None if labels is None else str(folder / labels))
        return data.images(torch.arange(2)), data.labels(torch.arange(2))

    return read


def make_official(folder: Path) -> None:
    tensors = {"w": torch.arange(4.0), "b": torch.ones(2)}
    save_file(tensors, folder / "weights.safetensors")
    torch.save(tensors, folder / "weights.pth")


def read_weights(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        wanted = {"w": torch.Size([4]), "b": torch.Size([2])}
        return mapped(read_official(folder / name).tensors, wanted, lambda ours: ours, str(folder / name))

    return read


def make_autoencoder(folder: Path) -> None:
    write_json(folder / CONFIG, {"_class_name": "AutoencoderKL", "block_out_channels": [32]})


def make_names(folder: Path) -> None:
    (folder / "names.txt").write_text("cat\ndog\n")


@dataclass(frozen=True)
class Kind:
    """A kind of file: how one is made in an empty folder, which it is, and how it is read."""

    make: Callable[[Path], object]
    file: str
    read: Callable[[Path], Any]
    seal: Callable[[Path], object] = lambda _: None  # makes sums right again after contents were replaced


def sealed(*names: str, inside: str = ".") -> Callable[[Path], object]:
    return lambda folder: write_manifest(folder / inside, names)


def resealed_cache(folder: Path) -> None:
    """As somebody would who writes a cache by hand."""
    for name in (CACHE, SOURCES):
        try:
            values = json.loads((folder / name).read_text())
            if type(values.pop("sha256")) is str:
                write_json(folder / name, {**values, "sha256": digest(values)})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    write_manifest(folder, [path.name for path in folder.iterdir() if path.name != MANIFEST and path.name[0] != "."])


MODEL_SEAL = sealed(CONFIG, MODEL, TOKENIZER)
CHECKPOINT = "000000000064"
CHECKPOINT_SEAL = sealed(*state.FILES, inside=CHECKPOINT)
KINDS = {
    "model: config.json": Kind(make_model, CONFIG, read_model, MODEL_SEAL),
    "model: manifest.json": Kind(make_model, MANIFEST, read_model),
    "model: model.safetensors": Kind(make_model, MODEL, read_model, MODEL_SEAL),
    "model: tokenizer.safetensors": Kind(make_model, TOKENIZER, read_model, MODEL_SEAL),
    "tokenizer: config.json": Kind(
        lambda folder: save_tokenizer(Pixels(4), folder), CONFIG, lambda folder: load_tokenizer(folder).config,
        sealed(CONFIG, TOKENIZER),
    ),
    "classifier: config.json": Kind(
        make_classifier, CONFIG, lambda folder: load_classifier(folder).class_names, sealed(CONFIG, CLASSIFIER)
    ),
    "classifier: classifier.safetensors": Kind(
        make_classifier, CLASSIFIER, lambda folder: load_classifier(folder).net.state_dict(), sealed(CONFIG, CLASSIFIER)
    ),
    "checkpoint: manifest.json": Kind(make_checkpoint, f"{CHECKPOINT}/{MANIFEST}", read_checkpoint),
    "checkpoint: state.json": Kind(make_checkpoint, f"{CHECKPOINT}/state.json", read_checkpoint, CHECKPOINT_SEAL),
    "checkpoint: model.safetensors": Kind(make_checkpoint, f"{CHECKPOINT}/{MODEL}", read_checkpoint, CHECKPOINT_SEAL),
    "checkpoint: optimiser.safetensors": Kind(
        make_checkpoint, f"{CHECKPOINT}/optimiser.safetensors", read_checkpoint, CHECKPOINT_SEAL
    ),
    "checkpoint: tokenizer.json": Kind(make_checkpoint, f"{CHECKPOINT}/{REFERENCE}", read_checkpoint, CHECKPOINT_SEAL),
    "run: recipe.yaml": Kind(make_run, "recipe.yaml", read_run),
    "run: data.json": Kind(make_run, "data.json", read_run),
    "run: metrics.jsonl": Kind(make_run, "metrics.jsonl", read_metrics),
    "cache: cache.json": Kind(make_cache, CACHE, read_cache, resealed_cache),
    "cache: sources.json": Kind(make_cache, SOURCES, read_cache, resealed_cache),
    "cache: manifest.json": Kind(make_cache, MANIFEST, read_cache),
    "cache: shard.safetensors": Kind(make_cache, "shard-000000.safetensors", read_cache, resealed_cache),
    "cache, going on: shard.json": Kind(make_cache, "shard-000000.json", whole_shard),
    "cache, going on: shard.safetensors": Kind(make_cache, "shard-000000.safetensors", whole_shard),
    "evaluation: settings.json": Kind(
        lambda folder: write_json(folder / "settings.json", settings()), "settings.json",
        lambda folder: same_settings(folder / "settings.json", settings()),
    ),
    "picture with its request": Kind(
        make_pictures, "0000-cat.png", lambda folder: read_repeatable(folder / "0000-cat.png")[1]
    ),
    "reference .npz": Kind(make_reference, "reference.npz", read_reference),
    "arrays .npy": Kind(make_arrays, "tokens.npy", read_arrays("tokens.npy")),
    "arrays .safetensors": Kind(make_arrays, "tokens.safetensors", read_arrays("tokens.safetensors")),
    "labels .npy": Kind(make_arrays, "labels.npy", read_arrays("tokens.npy", "labels.npy")),
    "official weights .safetensors": Kind(make_official, "weights.safetensors", read_weights("weights.safetensors")),
    "official weights .pth": Kind(make_official, "weights.pth", read_weights("weights.pth")),
    "autoencoder: config.json": Kind(make_autoencoder, CONFIG, lambda folder: read_autoencoder(str(folder), None)),
    "class names .txt": Kind(make_names, "names.txt", lambda folder: read_names(folder / "names.txt")),
}  # fmt: skip


# --- damage -------------------------------------------------------------------------------------------------------


def bits_flipped(whole: bytes, seed: int) -> bytes:
    broken, chance = bytearray(whole), random.Random(seed)
    broken[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
    return bytes(broken)


def broken_bytes(whole: bytes, damage: str) -> list[bytes]:
    """The damages that need no knowledge of what a file holds."""
    if damage == "truncated":
        return [whole[:keep] for keep in sorted({1, 7, len(whole) // 3, len(whole) - 2})]
    return [b""] if damage == "empty" else [bits_flipped(whole, seed) for seed in range(12)]


DEEP = b"[" * 100_000 + b"]" * 100_000


def bad_json(whole: bytes, damage: str) -> list[bytes]:
    """JSON that is not what was written: other types in place of the whole and of each of its parts."""
    if damage == "nested deeply":
        return [DEEP, b'{"format": ' + DEEP + b"}", b'{"a":' * 100_000]
    if damage == "not UTF-8":
        return [b"\xff\xfe", whole.replace(b'"', b'"\xff', 1), whole.decode().encode("utf-16")]
    values = json.loads(whole)
    if damage == "another type":
        kept = [key for key in values if key not in FOR_PEOPLE and values[key] is not None]
        parts = [{**values, key: "x y" if type(values[key]) in (int, float) else 17} for key in kept]
        parts += [{**values, key: [["x"]]} for key in kept]
        others: list[Any] = [[], [[]], 5, "x", None, [values], {}, *parts]
        return [json.dumps(other).encode() for other in others]
    number = {"huge numbers": (b"9" * 5000, b"1e999", b"-1" + b"0" * 400), "NaN": (b"NaN", b"Infinity", b"-Infinity")}
    return [b'{"format": ' + digits + whole.lstrip()[1:].replace(b"{", b",", 1) for digits in number[damage]] + [
        json.dumps({**values, key: "PLACE"}).encode().replace(b'"PLACE"', digits)
        for key in values
        for digits in number[damage]
    ]


FOR_PEOPLE = {"images", "left_out", "passed_over", "seriatim", "made_with"}  # parts that are shown and never used


def bad_yaml(whole: bytes, damage: str) -> list[bytes]:
    laughs = ["x0: &x0 [lol]"] + [f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 10)]
    return {
        "another type": [b"[]", b"5", b"text", b"null", b"training: 5", whole + b"\nmodel: [1]\n"],
        "not UTF-8": [b"\xff\xfe", whole + b"# \xff"],
        "nested deeply": [b"a: " + DEEP, "\n".join(laughs).encode(), b"a: &a [*a]"],
        "huge numbers": [whole + b"\nseed: " + digits for digits in (b"9" * 5000, b"9" * 4000, b"1.0e+999")],
        "NaN": [whole + b"\nseed: " + digits for digits in (b".nan", b".inf")],
    }[damage]


def bad_lines(whole: bytes, damage: str) -> list[bytes]:
    lines = {
        "another type": [b"[1]", b"5", b"{}", b'{"images": "x"}', b'{"images": 5, "loss": null}'],
        "not UTF-8": [b"\xff\xfe", b'{"images\xff": 5}'],
        "nested deeply": [DEEP],
        "huge numbers": [b'{"images": ' + b"9" * 5000 + b"}", b'{"images": 5, "loss": 1e999}'],
        "NaN": [b'{"images": 5, "loss": NaN}'],
    }[damage]
    return [line + b"\n" + whole for line in lines] + [whole + line + b"\n" for line in lines]


def tensor_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def bad_tensors(whole: bytes, damage: str, folder: Path) -> list[bytes]:
    if damage in ("not UTF-8", "nested deeply"):
        return [tensor_file({"not UTF-8": b'{"\xff": {}}', "nested deeply": DEEP}[damage])]
    one = b'{"dtype": "F32", "shape": [%s], "data_offsets": [0, %s]}'
    if damage == "huge numbers":
        sizes = (b"9" * 400, b"4611686018427387904, 4", b"-1", b"1e999")
        return [tensor_file(b'{"w": ' + one % (size, b"16") + b"}", b"\0" * 16) for size in sizes] + [
            struct.pack("<Q", 2**63) + whole[8:]
        ]
    file = folder / "other.safetensors"
    file.write_bytes(whole)
    tensors = load_file(file)
    changes: list[Callable[[Tensor], Tensor]]
    if damage == "another type":
        changes = [lambda t, d=dtype: t.to(d) for dtype in OTHER_DTYPES]  # type: ignore[misc]
    else:
        changes = [lambda t, v=value: t.fill_(v) if t.is_floating_point() else t for value in (np.nan, np.inf)]  # type: ignore[misc]
    found = []
    for change in changes:
        save_file({name: change(tensor.clone()) for name, tensor in tensors.items()}, file)
        found.append(file.read_bytes())
    file.unlink()
    return found


OTHER_DTYPES = (torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64)


def numpy_file(header: bytes, data: bytes) -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + data


def bad_arrays(damage: str, shape: str = "(2, 3, 4)", number: str = "<f4") -> list[bytes]:
    """Files of numpy with another header, or with numbers that are none."""
    said = "{'descr': %s, 'fortran_order': False, 'shape': %s, }\n"  # filled in with %, since it has braces
    zeros = b"\0" * 96
    if damage == "not UTF-8":
        return [numpy_file(b"\xff\xfe" + (said % (repr(number), shape)).encode(), zeros)]
    if damage == "nested deeply":
        return [numpy_file((said % (repr(number), "(" * 3000 + ")" * 3000)).encode(), zeros)]
    if damage == "huge numbers":
        shapes = (f"(2, 3, {'9' * 300})", f"({2**40}, 3, 4)", "(-1, 3, 4)", f"(1, {2**62})")
        return [numpy_file((said % (repr(number), other)).encode(), zeros) for other in shapes]
    if damage == "another type":
        kinds = ("'|O'", "'<c8'", "'|S4'", "'<M8[s]'", "[('a', '<f4')]", "'nosuch'", "'|b1'")
        return [numpy_file((said % (kind, shape)).encode(), zeros) for kind in kinds] + [b"text", b"[1, 2]"]
    values = np.full((2, 3, 4), np.nan, np.float32), np.full((2, 3, 4), np.inf, np.float32)
    return [numpy_file((said % (repr("<f4"), "(2, 3, 4)")).encode(), value.tobytes()) for value in values]


def bad_reference(damage: str, folder: Path) -> list[bytes]:
    if damage == "another type":
        others = [
            {"mu": np.zeros(5, int), "sigma": np.eye(5)},
            {"arr_0": np.zeros((2, 4, 4, 3))},
            {"arr_0": np.zeros(3)},
        ]
        others += [{"mu": np.zeros(5)}, {"other": np.zeros(5)}, {"mu": np.zeros((5, 5)), "sigma": np.zeros(5)}]
    elif damage == "NaN":
        others = [{"mu": np.full(5, np.nan), "sigma": np.eye(5)}, {"mu": np.zeros(5), "sigma": np.full((5, 5), np.inf)}]
    else:
        found = []
        for member in bad_arrays(damage):
            with zipfile.ZipFile(folder / "other.npz", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("arr_0.npy", member)
            found.append((folder / "other.npz").read_bytes())
        return found
    found = [b"PK\5\6" + b"\0" * 18] if damage == "another type" else []
    for arrays in others:
        np.savez(folder / "other.npz", **arrays)  # type: ignore[arg-type]
        found.append((folder / "other.npz").read_bytes())
    return found


def with_request(whole: bytes, text: bytes) -> bytes:
    """The picture with another text in the place of its request."""
    begin = whole.index(b"iTXtseriatim") - 4
    length = struct.unpack(">I", whole[begin : begin + 4])[0]
    chunk = b"iTXtseriatim\0\0\0\0\0" + text
    return (
        whole[:begin]
        + struct.pack(">I", len(chunk) - 4)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + whole[begin + 12 + length :]
    )


def request_of(whole: bytes) -> bytes:
    begin = whole.index(b"iTXtseriatim") - 4
    return whole[begin + 21 : begin + 8 + struct.unpack(">I", whole[begin : begin + 4])[0]]


def bad_weights(damage: str, folder: Path) -> list[bytes]:
    others: list[Any] = {  # type: ignore[assignment]
        "another type": [[1, 2], {"w": 5, "b": torch.ones(2)}, {"w": torch.arange(4), "b": torch.ones(2).bool()}, 5],
        "huge numbers": [{"w": torch.ones(1).expand(10**6, 10**6), "b": torch.ones(2)}],
        "NaN": [{"w": torch.full((4,), value), "b": torch.ones(2)} for value in (torch.nan, torch.inf)],
    }[damage]
    found = []
    for other in others:
        torch.save(other, folder / "other.pth")
        found.append((folder / "other.pth").read_bytes())
    return found


def damaged(kind: str, whole: bytes, damage: str, folder: Path) -> list[bytes]:
    if damage in DAMAGES[:3]:
        return broken_bytes(whole, damage)
    if kind.startswith("picture"):
        return [with_request(whole, text) for text in bad_json(request_of(whole), damage) if len(text) < 10**6]
    suffix = Path(KINDS[kind].file).suffix
    if kind == "labels .npy":
        return bad_arrays(damage, "(2,)", "<i8")
    return {
        ".json": lambda: bad_json(whole, damage),
        ".yaml": lambda: bad_yaml(whole, damage),
        ".jsonl": lambda: bad_lines(whole, damage),
        ".safetensors": lambda: bad_tensors(whole, damage, folder),
        ".npy": lambda: bad_arrays(damage),
        ".npz": lambda: bad_reference(damage, folder),
        ".pth": lambda: bad_weights(damage, folder),
        ".txt": lambda: [b"\xff\xfe", b"a\nb\xff"],
    }[suffix]()


# --- the table ----------------------------------------------------------------------------------------------------


@cache
def table() -> dict[tuple[str, str], str]:
    """(kind, damage) -> what becomes of it, from docs/log.md."""
    lines = LOG.read_text(encoding="utf-8").splitlines()
    first = lines.index("| file | " + " | ".join(DAMAGES) + " |")
    cells: dict[tuple[str, str], str] = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        kind, *row = (cell.strip() for cell in line.strip("|").split("|"))
        assert len(row) == len(DAMAGES), line
        cells.update({(kind, damage): cell for damage, cell in zip(DAMAGES, row, strict=True)})
    return cells


CELLS = [(kind, damage) for (kind, damage), outcome in table().items() if outcome != "-"]


def test_the_table_has_every_kind() -> None:
    assert list(dict.fromkeys(kind for kind, _ in table())) == list(KINDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """A whole folder of each kind, made once."""
    folders: dict[Callable[[Path], object], Path] = {}

    def make(kind: Kind) -> Path:
        if kind.make not in folders:
            folders[kind.make] = tmp_path_factory.mktemp("whole")
            kind.make(folders[kind.make])
        return folders[kind.make]

    return make


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(np.array_equal(a, b)) if isinstance(a, (Tensor, np.ndarray)) else bool(a == b)


@pytest.mark.parametrize(("kind", "damage"), CELLS, ids=lambda value: value.replace(" ", "_"))
@pytest.mark.filterwarnings("ignore:.*damaged lines are left out")
@pytest.mark.filterwarnings("ignore:.*additional header parsing")
def test_a_damaged_file(kind: str, damage: str, made: Callable[[Kind], Path], tmp_path: Path) -> None:
    what, outcome = KINDS[kind], table()[kind, damage]
    folder = tmp_path / "it"
    shutil.copytree(made(what), folder)
    path = folder / what.file
    whole, expected = path.read_bytes(), what.read(folder) if what.make is not make_autoencoder else None
    for content in damaged(kind, whole, damage, tmp_path):
        shutil.rmtree(folder)
        shutil.copytree(made(what), folder)
        path.write_bytes(content)
        if damage not in DAMAGES[:3]:
            what.seal(folder)
        try:
            found = what.read(folder)
        except SeriatimError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 2500 and text.isprintable(), text
            assert str(error.exit_code) == outcome.split()[0], (content[:200], text)
            assert path.name in text or folder.name in text, text
            continue
        if outcome == "rebuilt":
            assert found is None, content[-300:]
        else:
            assert outcome.endswith("or same") and same(found, expected), (content[-700:], found)
