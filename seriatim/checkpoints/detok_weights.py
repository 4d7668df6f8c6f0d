"""l-DeTok's tokenizers (Yang et al. 2025): official names <-> ours, and the file of statistics beside the weights.

    encoder, decoder      autoencoder.encoder, autoencoder.decoder, and of either
    positional_embedding  trunk.positions
    ln_pre, ln_post       trunk.norm_in, trunk.norm_out
    transformer.I         trunk.blocks.I: attn is attention, mlp.w12 and mlp.w3 are mlp.fc1 and mlp.fc2
    latent_head, ffn.1    to_moments, to_pixels

z channels of a latent, L patches.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seriatim.checkpoints.official import OfficialFile, read_storage
from seriatim.checkpoints.shapes import check_tokenizer, count, mapped, official_name, shape
from seriatim.core.errors import CheckpointError, UsageError, one_line, shown
from seriatim.core.files import expanded
from seriatim.core.reading import read_json, read_or_raise
from seriatim.tokenizers.detok import Detok

ENTRIES = ("model_ema", "model")  # of an official file
HINT = "not the weights of an l-DeTok tokenizer"
HEADS = {512: 8, 768: 12, 1024: 16, 1152: 16, 1280: 16}  # width -> number of heads in the published sizes
MOST_BYTES = 1 << 24  # of a file of statistics, which holds a few numbers for each channel
MOST_NUMBERS = 1 << 15  # of a mean or a standard deviation: those of the most channels, and of their log-variances
BLOCK = {"norm1": "norm1", "norm2": "norm2", "attention.qkv": "attn.qkv", "attention.proj": "attn.proj"}
BLOCK |= {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
TABLE = {
    "encoder.patch_embed.{p}": "encoder.patch_embed.0.{p}",
    "encoder.to_moments.{p}": "encoder.latent_head.{p}",
    "decoder.embed.{p}": "decoder.decoder_embed.{p}",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.to_pixels.{p}": "decoder.ffn.1.{p}",
    "decoder.conv_out.{p}": "decoder.conv_out.{p}",
}
for half in ("encoder", "decoder"):
    TABLE[f"{half}.trunk.positions"] = f"{half}.positional_embedding"
    TABLE |= {
        f"{half}.trunk.norm_in.{{p}}": f"{half}.ln_pre.{{p}}",
        f"{half}.trunk.norm_out.{{p}}": f"{half}.ln_post.{{p}}",
    }
    TABLE |= {
        f"{half}.trunk.blocks.{{i}}.{ours}.{{p}}": f"{half}.transformer.{{i}}.{theirs}.{{p}}"
        for ours, theirs in BLOCK.items()
    }


def detok_tensors(tokenizer: Detok) -> dict[str, Tensor]:
    """The weights under official names, of official shapes."""
    result = {}
    for name, tensor in tokenizer.autoencoder.state_dict().items():
        official = official_name(name, TABLE)
        if official.endswith("positional_embedding"):
            tensor = tensor[None]  # (1, L, C)
        elif official == "decoder.mask_token":
            tensor = tensor[None, None]  # (1, 1, C)
        elif official == "decoder.ffn.1.weight":
            tensor = tensor[..., None, None]  # (p p c, C, 1, 1)
        result[official] = tensor
    return result


def tokenizer_from_file(
    file: OfficialFile,
    *,
    size: int | None = None,
    heads: Sequence[int] | None = None,
    statistics: Path | None = None,
    key: str | None = None,
) -> Detok:
    """The tokenizer of an official file, with statistics from a file (`read_statistics`) or to be measured."""
    where = str(file.path)
    _, z = shape(file.tensors, "decoder.decoder_embed.weight", 2, where, HINT)
    found = None if statistics is None else read_statistics(statistics, z, key=key, stem=file.path.stem)
    return tokenizer_from_detok(file.tensors, where, size=size, heads=heads, statistics=found)


def tokenizer_from_detok(
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    size: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Detok:
    """A tokenizer from an official state dict, whose sizes are read off its tensors, cast to float32.

    No shape shows the number of `heads` of encoder and decoder, which is known for the published widths. Without
    `size`, images are square. `statistics` are mean and std of each channel; without them they are to be measured.
    Raises CheckpointError, one line that begins with `where` and names the tensor that is missing, unknown, of another
    shape or not finite, and UsageError if an argument does not fit.
    """
    with torch.device("meta"):
        tokenizer = sized(tensors, where, size, heads, statistics)
    wanted = {name: tensor.shape for name, tensor in tokenizer.autoencoder.state_dict().items()}
    weights = mapped(tensors, wanted, lambda name: official_name(name, TABLE), where, HINT)
    # The tokenizer shares no memory with the tensors that the caller has.
    tokenizer.autoencoder.load_state_dict({name: t.clone() for name, t in weights.items()}, assign=True)
    tokenizer.requires_grad_(False)
    return tokenizer


def sized(
    tensors: Mapping[str, Tensor],
    where: str,
    size: int | Sequence[int] | None,
    heads: Sequence[int] | None,
    statistics: tuple[Sequence[float], Sequence[float]] | None,
) -> Detok:
    """A tokenizer of the sizes that the tensors show."""
    width, channels, stride, _ = shape(tensors, "encoder.patch_embed.0.weight", 4, where, HINT)
    decoder, z = shape(tensors, "decoder.decoder_embed.weight", 2, where, HINT)
    _, L, _ = shape(tensors, "encoder.positional_embedding", 3, where, HINT)
    widths = [width, decoder]
    if heads is None:
        unknown = [C for C in widths if C not in HEADS]
        if unknown:
            raise UsageError(
                f"heads: {where} has the width {unknown[0]}, which is not a published one, and weights don't tell the "
                "number of attention heads; give it, once, or twice if encoder and decoder differ"
            )
        heads = [HEADS[C] for C in widths]
    if size is None:
        size = math.isqrt(L) * stride
    depth = [count(tensors, f"{half}.transformer", where) for half in ("encoder", "decoder")]
    arguments: Any = {"stride": stride, "latent_channels": z, "width": widths, "depth": depth}
    check_tokenizer(lambda: Detok(stride, 1, channels, heads=1, **arguments), arguments, where)
    mean, std = statistics or (None, None)
    kind: Any = "channel" if statistics is None else "fixed"
    tokenizer = Detok(size, 1, channels, heads=list(heads), statistics=kind, mean=mean, std=std, **arguments)
    if tokenizer.count != L:
        raise UsageError(
            f"size: {tokenizer.size[0]}x{tokenizer.size[1]} pixels are {tokenizer.count} patches of {stride}x{stride}, "
            f"but {where} has learned the positions of {L}; give the size that it was trained for"
        )
    return tokenizer


# --- statistics ---------------------------------------------------------------------------------------------------


def read_statistics(
    path: Path | str, z: int, *, key: str | None = None, stem: str = ""
) -> tuple[list[float], list[float]]:
    """Mean and std of each of z channels, from the authors' stats.pkl or from a JSON file with `mean` and `std`.

    The pickle holds statistics of several tokenizers under their names: `key` chooses one, otherwise the name that the
    weights file called `stem` begins with, otherwise the only one. Nothing in the pickle is run. Raises UsageError or
    CheckpointError.
    """
    path = expanded(path)
    if not path.is_file():
        raise UsageError(f"stats: {path} is no file; name stats.pkl, or a JSON file with `mean` and `std`")
    if path.suffix == ".json":
        given = read_or_raise(lambda: read_json(path, dict), path, CheckpointError, "it must hold `mean` and `std`")
    else:
        given = chosen_statistics(read_pickle(path), path, key, stem)
    mean, std = (channel_numbers(given.get(name), name, path) for name in ("mean", "std"))
    if len(mean) == len(std) == 2 * z and path.suffix != ".json":
        mean, std = mean[:z], std[:z]  # the rest are those of log-variances
    return mean, std


def chosen_statistics(content: Mapping[Any, Any], path: Path, key: str | None, stem: str) -> dict[str, Any]:
    """The mean and std of the channels of one tokenizer in the authors' file."""
    names = [name for name in content if isinstance(name, str)]
    fitting = [name for name in names if stem.startswith(name)]
    chosen = key or max(fitting, key=len, default=names[0] if len(names) == 1 else None)
    if chosen not in names:
        what = "is needed, because none of them begins the name of the weights" if chosen is None else f"no {chosen!r}"
        raise UsageError(f"stats_key: {what}; {path} holds {', '.join(map(repr, names)) or 'nothing'}")
    entry = content[chosen]
    pair = entry.get("channel") if isinstance(entry, Mapping) else None
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise CheckpointError(f"{path}: {chosen!r} has no mean and standard deviation of each channel")
    return {"mean": pair[0], "std": pair[1]}


def channel_numbers(values: Any, name: str, path: Path) -> list[float]:
    """The numbers of a tensor or a list."""
    if isinstance(values, Tensor):
        if values.numel() > MOST_NUMBERS:
            raise CheckpointError(
                f"{path}: {name} has {values.numel():,} numbers, at most {MOST_NUMBERS:,} are allowed; give the file "
                "of statistics of channels"
            )
        values = values.double().flatten().tolist()
    if not isinstance(values, list) or not all(isinstance(x, (int, float)) for x in values):
        raise CheckpointError(f"{path}: {name} is {shown(values)}, not a list of numbers, one for each channel")
    return [float(x) for x in values]


def read_pickle(path: Path) -> Mapping[Any, Any]:
    """What a plain pickle of tensors and containers holds; anything else in it is refused by name and not run."""
    if path.stat().st_size > MOST_BYTES:
        raise CheckpointError(f"{path}: has {path.stat().st_size:,} bytes, which is too much for statistics")
    try:
        content = PlainPickle(path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its last whole byte led to
        raise CheckpointError(
            f"{path}: is not the authors' file of statistics ({one_line(error)[:160]}); download it again, or give a "
            "JSON file with `mean` and `std`"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a mapping of statistics")
    return content


class PlainPickle(pickle.Unpickler):
    """Reads tensors and plain containers. Each tensor's memory is a torch file of its own inside the pickle.

    All that is read takes no more memory than the file has bytes.
    """

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        super().__init__(io.BytesIO(raw))
        self.path, self.left = path, len(raw)

    def storage(self, raw: bytes) -> Any:
        """The memory of a tensor. A pickle may name the same bytes again and again, each time for a new memory."""
        self.left -= len(raw)
        if self.left < 0:
            raise ValueError("its tensors are larger than the file")
        return read_storage(raw)

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): rebuilt,
            ("torch.storage", "_load_from_bytes"): self.storage,
        }
        if (module, name) not in known:
            raise CheckpointError(
                f"{self.path}: holds more than tensors (it asks for {f'{module}.{name}'!r}), which could run any "
                "program; nothing of it was run; give a JSON file with `mean` and `std`"
            )
        return known[module, name]


def rebuilt(memory: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """The tensor that is a part of this memory, not larger than it. It is no copy: a pickle may ask for many."""
    whole: Tensor = torch.empty(0, dtype=memory.dtype).set_(memory._untyped_storage)
    if math.prod(size) > len(whole):
        raise ValueError("a tensor is larger than its memory")
    return whole.as_strided(size, stride, offset)
