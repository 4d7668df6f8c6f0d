"""ARINAR against the official code: every file of golden/arinar that is there, with sizes taken from the files.

Made by the official classes on the CPU in float32, their attention causal as it is where flash-attention runs. Files of
the flow inside the head (`nf`) are left out: it was never published with weights, and is not built here.
Tolerances are absolute: the mixtures' parameters 1e-5, negative log-likelihoods 3e-5, samples 1e-5 (of whole models,
whose values reach 30, relative to the largest).
"""

from __future__ import annotations

import json
import math
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import cases, golden
from safetensors.torch import load_file
from torch import Tensor

from seriatim.backbones.masked_transformer import Masked
from seriatim.checkpoints.arinar import arinar_tensors, model_from_arinar
from seriatim.checkpoints.mar import mar_tensors
from seriatim.checkpoints.official import OfficialFile
from seriatim.core.keys import Keys, ReplayKeys
from seriatim.core.schedules import mask_ratio, unknown_after
from seriatim.core.settings import Settings
from seriatim.heads import mixture as leaf
from seriatim.heads.base import Guidance
from seriatim.heads.gaussians import GaussianMixture
from seriatim.heads.mixture import Mixture
from seriatim.models.build import build_model, parameter_count
from seriatim.models.masked_model import MaskedModel
from seriatim.models.nested import Nested, scheduled
from seriatim.nn.patch import patchify, unpatchify
from seriatim.zoo import PRESETS

FOLDER = golden("arinar")
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text()) if (FOLDER / "meta.json").exists() else {}
PARAMETERS, NLL, SAMPLES = 1e-5, 3e-5, 1e-5
CONSTANT = 0.5 * math.log(2 * math.pi)  # of each feature: the official loss leaves it out


# --- reading ------------------------------------------------------------------------------------------------------


def weights_of(file: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("sd."): tensor for name, tensor in file.items() if name.startswith("sd.")}


def inner_heads(case: str) -> int:
    """From meta.json, or the file's name; else as the official code has it today."""
    named = re.search(r"heads(\d+)", case)
    return int(META.get(case, {}).get("num_heads", named[1] if named else 16))


def head_of(case: str) -> Nested:
    """The head of a case, by the converter's own table: its trunk is made up."""
    path = FOLDER / f"{case}.safetensors"
    if not path.exists():
        pytest.skip(f"no weights of {case}")
    own = {f"arhead.{name}": tensor for name, tensor in weights_of(load_file(path)).items()}
    if any(name.startswith("arhead.nf.") for name in own):
        pytest.skip("a flow inside the head is not built here")
    T, group = own["arhead.pos_embedding"].shape[1], own["arhead.input_proj.weight"].shape[1]
    C = own["arhead.cond_proj.weight"].shape[1]
    trunk = {
        "kind": "masked", "tokens": 4, "dim": T * group, "width": C, "depth": 1, "heads": 1, "buffer": 1, "classes": 0,
        "head": {"kind": "diffusion", "width": 8, "depth": 1},
    }  # fmt: skip
    made = {n: t for n, t in mar_tensors(build_model(trunk)).items() if not n.startswith("diffloss.")}
    model = model_from_arinar(OfficialFile(path, made | own), inner_heads=inner_heads(case), trunk_heads=1)
    assert isinstance(model.head, Nested)
    back = arinar_tensors(model)
    assert all(torch.equal(back[name], tensor) for name, tensor in own.items())
    return model.head


def tiny_model(case: str) -> tuple[dict[str, Tensor], MaskedModel]:
    path = FOLDER / f"{case}.safetensors"
    if not path.exists():
        pytest.skip(f"no weights of {case}")
    file, config = load_file(path), META.get(case, {})
    heads = (int(config.get("encoder_num_heads", 4)), int(config.get("decoder_num_heads", 4)))
    model = model_from_arinar(OfficialFile(path, weights_of(file)), inner_heads=inner_heads(case), trunk_heads=heads)
    assert isinstance(model, MaskedModel)
    return file, model


def close(ours: Tensor, theirs: Tensor, tolerance: float, relative: bool = False) -> None:
    assert ours.shape == theirs.shape
    tolerance *= max(1.0, theirs.abs().max().item()) if relative else 1.0
    worst = (ours - theirs).abs().max().item() if theirs.numel() else 0.0
    assert worst <= tolerance, f"differs by {worst:.3g}, allowed {tolerance:.3g}"


def named(path: Path, key: str, pattern: str, default: str) -> str:
    """A setting of a sampling run: of meta.json, or of the file's name."""
    found = re.search(pattern, path.stem.partition("_sample_")[2])
    return str(META.get(path.stem, {}).get(key, found[1] if found else default))


def warmth_of(path: Path, file: dict[str, Tensor], schedule: str, parts: int) -> float:
    """The temperature of a sampling run; where nothing names it, that of which the file's first is a scheduled one."""
    rate = scheduled(schedule, 1, parts)  # a schedule multiplies the distance from 1
    first = file.get("feat00_temperature", torch.tensor(1.0))
    return float(named(path, "temperature", r"_t([\d.]+)", str(1 + (float(first) - 1) / rate)))


HEADS = [(p.stem, p) for p in sorted(FOLDER.glob("head_*.safetensors")) if "_sample_" not in p.name]
HEAD_SAMPLES = cases(FOLDER, "head_*_sample_*.safetensors", "_sample_")
MODELS = [(p.stem, p) for p in sorted(FOLDER.glob("*model*.safetensors")) if "_sample_" not in p.name]
MODEL_SAMPLES = cases(FOLDER, "*model*_sample_*.safetensors", "_sample_")


def each(found: list[tuple[str, Path]]) -> Any:
    return pytest.mark.parametrize(("case", "path"), found, ids=[path.stem for _, path in found])


def test_there_are_golden_files() -> None:
    assert any(FOLDER.glob("*.safetensors")), f"no golden tensors of ARINAR in {FOLDER}"


# --- the head -----------------------------------------------------------------------------------------------------


@each(HEADS)
@torch.no_grad()
def test_parameters_and_likelihood(case: str, path: Path) -> None:
    """Every Gaussian of every feature, each token's loss, their means over all tokens and over the masked ones."""
    head, file = head_of(case), load_file(path)
    z, target, mask = file["z"], file["target"], file["mask"].float()
    N, D = target.shape
    inner = head.model.backbone.sequence(head.condition(z, None), head.split.cut(target)).flatten(0, 1)
    assert isinstance(head.model.head, Mixture)
    flat = head.model.head(inner)
    close(flat.view(N, head.parts, -1), file["causal_pred"], PARAMETERS)
    made = head.model.head.mixture(inner)
    close(made.log_weights().exp().view_as(file["causal_weight"]), file["causal_weight"], PARAMETERS)
    close(made.means.view_as(file["causal_mu"]), file["causal_mu"], PARAMETERS)
    close((2 * made.log_std).view_as(file["causal_logvar"]), file["causal_logvar"], PARAMETERS)

    loss = head.loss(z, target, Keys.of_seeds(range(N)))
    nll = loss.sum - D * CONSTANT
    close(nll, file["causal_nll_per_token"], NLL)
    close(-head.log_prob(z, target), loss.sum, NLL)
    close(nll.mean(), file["causal_nll_mean"], NLL)
    close((nll * mask).sum() / mask.sum(), file["causal_nll_masked"], NLL)
    assert torch.equal(loss.count, torch.ones(N))


# --- sampling -----------------------------------------------------------------------------------------------------


class Official(Mapping[str, Tensor]):
    """The official code's draws under our names.

    It draws, for each feature, S candidates of the conditional mixture: a uniform number each for the component, a
    normal one for *every* component; and, guided, one uniform number that chooses among them. Ours draws a normal
    number for the chosen component alone, so this must know which one that is: from the mixtures as they are made.
    """

    def __init__(self, file: dict[str, Tensor], head: Nested, steps: list[list[str]]) -> None:
        """steps[k] are the paths of the tokens that are drawn together at step k, as the official rows come."""
        self.rows = {path: (k, n) for k, paths in enumerate(steps) for n, path in enumerate(paths)}
        self.draws, self.parts = draws_of(file), head.parts
        assert len(self.draws) == len(steps) * head.parts
        self.left = {(path, i) for path in self.rows for i in range(head.parts)}
        self.made: list[GaussianMixture] = []
        assert isinstance(head.model.head, Mixture)
        build = head.model.head.mixture

        def recorded(z: Tensor) -> GaussianMixture:
            self.made.append(build(z))
            return self.made[-1]

        head.model.head.mixture = recorded  # type: ignore[method-assign]

    def __len__(self) -> int:
        return len(self.rows) * self.parts

    def __iter__(self) -> Iterator[str]:
        return (f"{path}/part/{i}" for path in self.rows for i in range(self.parts))

    def __getitem__(self, name: str) -> Tensor:
        path, _, asked = name.partition("/part/")
        part, _, what = asked.partition("/")
        step, n = self.rows[path]
        self.left.discard((path, int(part)))
        draw = self.draws[step * self.parts + int(part)]
        u, normal = draw.uniform[n], draw.normal[n]  # (S,), (S, K, D)
        S = torch.arange(len(u))
        guided = self.made[-2:-1]  # the conditional mixture, where the unconditional one was made after it
        if what == "choice/uniform" and draw.choice is not None:
            return draw.choice[n]
        if what == "candidates/component/uniform":
            return u
        if what == "candidates/value/normal":
            return normal[S, guided[0].component(draw.uniform)[n]]
        # A scale that a schedule brought to 1: any of its candidates is as good as another.
        chosen = 0 if draw.choice is None else int(draw.choice[n] * len(u))
        if what == "component/uniform":
            return u[chosen]
        if what == "value/normal":
            return normal[chosen, self.made[-1].component(draw.uniform)[n, chosen]]
        raise KeyError(name)


class Draw(NamedTuple):
    """What the official code draws for a feature of N tokens."""

    uniform: Tensor  # (N, S)
    normal: Tensor  # (N, S, K, D)
    choice: Tensor | None  # (N,)


def draws_of(file: dict[str, Tensor]) -> list[Draw]:
    """The draws of a file, feature by feature."""
    found, result = [file[name] for name in sorted(file) if re.match(r"draw\d+_", name)], []
    while found:
        uniform, normal = found.pop(0)[..., 0].T, found.pop(0)[:, :, 0].transpose(0, 1)
        result.append(Draw(uniform, normal, found.pop(0)[:, 0] if uniform.shape[1] > 1 else None))
    return result


def candidates(file: dict[str, Tensor]) -> int:
    return max(tensor.shape[0] for name, tensor in file.items() if re.match(r"draw\d+_uniform", name))


@each(HEAD_SAMPLES)
@pytest.mark.parametrize("naive", [False, True], ids=["fast", "naive"])
@torch.no_grad()
def test_samples_of_the_head(case: str, path: Path, naive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head, file = head_of(case), load_file(path)
    z, cfg = file["z"], float(named(path, "cfg", r"cfg([\d.]+)", "1"))
    schedule = named(path, "bilevel_schedule", r"(linear|cosine)", "constant")
    temperature = warmth_of(path, file, schedule, head.parts)
    monkeypatch.setattr(leaf, "CANDIDATES", candidates(file))
    N = len(z) if cfg == 1 else len(z) // 2
    draws, parameters = Official(file, head, [[str(n) for n in range(N)]]), []
    head.model.head.final.register_forward_hook(lambda _, __, made: parameters.append(made))  # type: ignore[union-attr]
    options = {} if cfg == 1 else {"guidance_mode": "resample"}
    plan = head.plan(head.options(feature_schedule=schedule, **options))
    null = None if cfg == 1 else z[N:]
    sample = head.sample_naive if naive else head.sample
    drawn = sample(z[:N], ReplayKeys(draws, N), plan, null, Guidance.of(cfg, N, "cpu"), temperature)
    assert not draws.left
    close(drawn, file["sample"][:N], SAMPLES)
    for i in range(head.parts):  # the conditional half, which is all that a scale of 1 looks at
        close(parameters.pop(0), file["pred"][:N, i], PARAMETERS)
        if parameters and cfg != 1 and not (schedule == "cosine" and i == head.parts - 1):
            close(parameters.pop(0), file["pred"][N:, i], PARAMETERS)


@each(HEAD_SAMPLES)
@torch.no_grad()
def test_temperatures_and_candidates(case: str, path: Path) -> None:
    """The schedule, the candidates and both their log-densities, by feature, from the file's own parameters."""
    head, file = head_of(case), load_file(path)
    assert isinstance(head.model.head, Mixture)
    cfg, schedule = (
        float(named(path, "cfg", r"cfg([\d.]+)", "1")),
        named(path, "bilevel_schedule", r"(linear|cosine)", "constant"),
    )
    temperature = warmth_of(path, file, schedule, head.parts)
    N = len(file["z"]) if cfg == 1 else len(file["z"]) // 2
    for i, draw in enumerate(draws_of(file)):
        prefix, g = f"feat{i:02d}", head.split.spec.dim
        assert g is not None
        warmth = max(0.0, 1 + scheduled(schedule, i + 1, head.parts) * (temperature - 1))
        close(torch.tensor(warmth), file[f"{prefix}_temperature"].float(), 1e-6)
        flat = file["pred"][:, i]
        made = leaf.unpacked(flat, head.model.head.components, g)
        cond, null = made.select(slice(0, N)), made.select(slice(N, None))
        u, k = draw.uniform, cond.component(draw.uniform)
        eps = draw.normal.gather(2, k[..., None, None].expand(-1, -1, 1, g))[:, :, 0]
        x = cond.sample(u, eps, warmth)  # (N, S, g)
        close(x, file[f"{prefix}_candidates"][:, :, 0].transpose(0, 1), SAMPLES)
        if cfg != 1:
            close(cond.log_prob(x), file[f"{prefix}_ll_cond"][..., 0].T, NLL)
            close(null.log_prob(x), file[f"{prefix}_ll_uncond"][..., 0].T, NLL)


# --- the whole model ----------------------------------------------------------------------------------------------


def orders_of(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """The order of each image, as our draw."""
    return {f"{b}/order/permutation": order.long() for b, order in enumerate(file["orders"])}


def drawn_together(orders: Tensor, steps: int) -> list[list[str]]:
    """The paths of the tokens that each step draws, row by row; orders (B, L), of which the last are drawn first."""
    B, L = orders.shape
    left, result = L, []
    for step in range(steps):
        before, left = left, unknown_after(step, steps, L, left)
        places = orders[:, left:before].sort(dim=1).values
        result.append([f"{b}/token/{p}" for b in range(B) for p in places[b].tolist()])
    return result


@pytest.mark.parametrize("case", [case for case, _ in MODELS])
@torch.no_grad()
def test_model(case: str) -> None:
    """Patches, encoder, z, and the training loss with its mask."""
    file, model = tiny_model(case)
    images, tokens, mask = file["imgs"], file["patchified"], file["mask"].bool()
    p = round(math.sqrt(images.shape[2] * images.shape[3] / tokens.shape[1]))
    assert torch.equal(patchify(images, p), tokens)
    B, L, D = tokens.shape
    labels = file["labels"].long()
    condition = model.condition(labels, B)
    index = (~mask).nonzero()[:, 1].view(B, -1)
    assert isinstance(model.backbone, Masked)
    close(model.backbone.encode(condition, tokens, index, None)[0], file["enc"], PARAMETERS)
    z = model.backbone.z(condition, tokens, ~mask, torch.ones_like(mask))
    close(z.view(B, L, -1), file["z"], PARAMETERS)

    masked = int(mask[0].sum())
    once = next(u for n in range(4096) if math.ceil(L * mask_ratio(u := n / 4096, low=0.7)) == masked)
    draws = orders_of(file) | {"step/ratio/uniform": torch.tensor(once)}
    loss = model(tokens, labels, ReplayKeys(draws, B), ReplayKeys(draws, ["step"])).mean - D * CONSTANT
    close(loss, file["loss"], NLL)


@each(MODEL_SAMPLES)
@torch.no_grad()
def test_samples_of_the_model(case: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole sampling runs, by the naive sampler and by the fast loop: scales, z and tokens of every step."""
    file = load_file(path)
    monkeypatch.setattr(leaf, "CANDIDATES", candidates(file))
    cfg, schedule = (
        float(named(path, "cfg", r"cfg([\d.]+)", "1")),
        named(path, "cfg_schedule", r"(linear|constant)", "linear"),
    )
    steps = len([name for name in file if re.fullmatch(r"step\d+_out", name)])
    latent, orders = file["tokens"], file["orders"].long()
    settings = Settings(
        num_inference_steps=steps,
        guidance_scale=cfg,
        guidance_schedule=schedule,
        head_options={} if cfg == 1 else {"guidance_mode": "resample"},
    )
    labels = file["labels"].long()
    for fast in (False, True):
        model = tiny_model(case)[1]
        assert isinstance(model.head, Nested)
        B, p = len(labels), round(math.sqrt(latent.shape[2] * latent.shape[3] / model.tokens))
        draws = Official(file, model.head, drawn_together(orders, steps))
        keys = ReplayKeys(ChainMap(draws, orders_of(file)), B)  # type: ignore[arg-type]
        seen: list[tuple[Tensor, Tensor]] = []
        inner = model.head.sample

        def watched(
            z: Tensor, keys: Keys, plan: Any, null: Tensor | None, guidance: Guidance | None, *rest: Any
        ) -> Any:
            out = inner(z, keys, plan, null, guidance, *rest)  # noqa: B023
            both = z if cfg == 1 or null is None else torch.cat([z, null])
            step = len(seen)  # noqa: B023
            scale = torch.ones(len(z)) if guidance is None else guidance.scale
            close(scale, file[f"step{step}_cfg"].float().expand_as(scale), 1e-6)
            close(both, file[f"step{step}_z"], PARAMETERS)
            close(out, file[f"step{step}_out"][: len(out)], SAMPLES, relative=True)
            seen.append((z, out))  # noqa: B023
            return out

        monkeypatch.setattr(model.head, "sample", watched)
        both = model.condition(labels, B), model.null(B)
        if fast:
            *_, last = model.steps(*both, keys, settings)
            tokens = last.tokens
        else:
            tokens = model.sample(*both, keys, settings)
        assert len(seen) == steps and not draws.left
        close(unpatchify(tokens, p, latent.shape[2] // p, latent.shape[3] // p), latent, SAMPLES, relative=True)


# --- full size ----------------------------------------------------------------------------------------------------

KEYS = sorted(FOLDER.glob("keys_arinar_*.json"))


@pytest.mark.parametrize("path", KEYS, ids=[path.stem for path in KEYS])
def test_the_preset_has_the_official_tensors(path: Path) -> None:
    """Names, shapes and counts, without allocating one of them; of other inner widths than the preset's too."""
    expected = json.loads(path.read_text())
    config = json.loads(json.dumps(PRESETS["arinar-b"].model))
    inner = expected["config"]
    config["head"]["model"].update(width=inner["inner_ar_width"], depth=inner["inner_ar_depth"])
    config["head"]["model"]["head"]["components"] = inner["num_gaussians"]
    with torch.device("meta"):
        model = build_model(config)
        ours = {name: list(tensor.shape) for name, tensor in arinar_tensors(model).items()}
    assert ours == expected["shapes"]
    assert parameter_count(model) == expected["num_params"]
    if config == PRESETS["arinar-b"].model:
        assert parameter_count(model) == PRESETS["arinar-b"].parameters == 212_949_516


def test_the_large_preset() -> None:
    with torch.device("meta"):
        assert parameter_count(build_model(PRESETS["arinar-l"].model)) == PRESETS["arinar-l"].parameters
