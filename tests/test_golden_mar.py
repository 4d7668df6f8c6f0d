"""MAR against the official code: every file of golden/mar that is there, with sizes taken from the files.

Made by the unmodified official modules on the CPU in float32. Tolerances are absolute unless said: network 2e-5, loss
1e-5 relative, gradients 1e-4 relative, sampling 1e-4.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import cases, golden
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from seriatim.backbones.masked_transformer import Masked
from seriatim.checkpoints.mar import infer, mar_tensors, model_from_mar, official_name
from seriatim.checkpoints.official import OfficialFile
from seriatim.checkpoints.shapes import squeezed
from seriatim.conditions.base import Condition
from seriatim.core.keys import ReplayKeys
from seriatim.core.schedules import mask_ratio, unknown_after
from seriatim.core.settings import Settings
from seriatim.heads.base import Guidance
from seriatim.heads.ddpm import full_chain, respaced
from seriatim.heads.diffusion import Diffusion, log_variance, predict_x0, variational_bound
from seriatim.models.build import build_model, parameter_count
from seriatim.models.masked_model import MaskedModel
from seriatim.nn.patch import patchify, unpatchify
from seriatim.nn.position import sinusoid
from seriatim.training.optim import parameter_groups
from seriatim.zoo import PRESETS

FOLDER = golden("mar")
NETWORK, LOSS, GRADIENT, SAMPLING = 2e-5, 1e-5, 1e-4, 1e-4


# --- reading ------------------------------------------------------------------------------------------------------


def config_of(case: str) -> dict[str, Any]:
    """The official configuration of a case (`mar_tiny_At` is A with other weights); {} where no file tells it."""
    name = case.rpartition("_")[2]
    for path in sorted(FOLDER.glob("mar*configs.json")):
        known = json.loads(path.read_text())
        for key in (case, name, name.removesuffix("t")):
            if key in known:
                return dict(known[key])
    return {}


def model_of(case: str) -> MaskedModel:
    found = sorted(FOLDER.glob(f"{case}_weights*.safetensors"))
    if not found:
        pytest.skip(f"no weights of {case}")
    config, weights = config_of(case), load_file(found[0])
    sizes = infer(weights, str(found[0]))
    sides = zip(("encoder", "decoder"), sizes["width"], strict=True)
    heads = tuple(config.get(f"{side}_num_heads", width // 16) for side, width in sides)
    arguments: dict[str, Any] = {k: config[k] for k in ("diffusion_batch_mul", "proj_dropout") if k in config}
    file = OfficialFile(found[0], weights, {"proj_dropout": 0.0, **arguments})
    model = model_from_mar(file, heads=(heads[0], heads[1]))
    assert isinstance(model, MaskedModel)
    return model


def backbone_of(model: MaskedModel) -> Masked:
    assert isinstance(model.backbone, Masked)
    return model.backbone


def patch_of(case: str, images: Tensor, tokens: int) -> int:
    return int(config_of(case).get("patch_size", round(math.sqrt(images.shape[2] * images.shape[3] / tokens))))


def case_of(letter: str) -> str:
    """The case that a file means which names its last part alone: `diffusion_steps_A`."""
    found = sorted(FOLDER.glob(f"mar_*_{letter}_weights*.safetensors"))
    return found[0].name.split("_weights")[0] if found else f"mar_tiny_{letter}"


def close(ours: Tensor, theirs: Tensor, tolerance: float, relative: bool = False) -> None:
    assert ours.shape == theirs.shape
    bound = tolerance * (theirs.abs().max().item() if relative else 1.0)
    worst = (ours - theirs).abs().max().item() if theirs.numel() else 0.0
    assert worst <= bound, f"differs by {worst:.3g}, allowed {bound:.3g}"


FORWARD = cases(FOLDER, "*_forward.safetensors", "_forward")
SAMPLES = cases(FOLDER, "*_sample_*.safetensors", "_sample_")
STEPS = [(case_of(path.stem.rpartition("_")[2]), path) for path in sorted(FOLDER.glob("diffusion_steps_*.safetensors"))]
each_forward = pytest.mark.parametrize(("case", "path"), FORWARD, ids=[p.stem for _, p in FORWARD])
each_sample = pytest.mark.parametrize(("case", "path"), SAMPLES, ids=[p.stem for _, p in SAMPLES])
each_steps = pytest.mark.parametrize(("case", "path"), STEPS, ids=[p.stem for _, p in STEPS])


def test_there_are_golden_files() -> None:
    assert FOLDER.is_dir() and any(FOLDER.iterdir()), f"no golden tensors of MAR in {FOLDER}"


# --- the network --------------------------------------------------------------------------------------------------


@each_forward
def test_patches(case: str, path: Path) -> None:
    file = load_file(path)
    images, tokens = file["imgs"], file["patchified"]
    p = patch_of(case, images, tokens.shape[1])
    assert torch.equal(patchify(images, p), tokens)
    assert torch.equal(unpatchify(tokens, p, images.shape[2] // p, images.shape[3] // p), file["unpatchified"])


@each_forward
@torch.no_grad()
def test_backbone(case: str, path: Path) -> None:
    file, model = load_file(path), model_of(case)
    tokens, known, labels = file["patchified"], ~file["mask"].bool(), file["labels"].long()
    B, L = known.shape
    condition, encode = model.condition(labels, B), backbone_of(model).encode
    close(condition.vectors[:, 0], file["class_embedding"], 0.0)
    index = known.nonzero()[:, 1].view(B, -1)
    close(encode(condition, tokens, index, None)[0], file["encoder_out"], NETWORK)
    everywhere = torch.ones_like(known)
    z = model.backbone.z(condition, tokens, known, everywhere)
    close(z.view(B, L, -1), file["z"], NETWORK)
    if "z_allmasked_uncond" in file:
        nothing = model.condition(None, B)
        empty = index[:, :0]
        encoded, _ = encode(nothing, torch.zeros_like(tokens), empty, None)
        close(encoded, file["encoder_out_allmasked_uncond"], NETWORK)
        z = model.backbone.z(nothing, torch.zeros_like(tokens), ~everywhere, everywhere)
        close(z.view(B, L, -1), file["z_allmasked_uncond"], NETWORK)


@each_forward
@torch.no_grad()
def test_head(case: str, path: Path) -> None:
    file, head = load_file(path), model_of(case).head
    assert isinstance(head, Diffusion)
    x, t, c = file["head_x"], file["head_t"].long(), file["head_c"]
    close(torch.cat(head(x, t, c), dim=-1), file["head_out"], NETWORK)
    if "head_t_freq" in file:  # the last digit of a float32 frequency, which machines' exp differ in, times 999
        close(sinusoid(t), file["head_t_freq"], 1e-4)
    close(head.embed_times(t), file["head_t_emb"], NETWORK)
    for name in (key for key in file if key.startswith("head_out_cfg")):
        scale, half, D = float(name.removeprefix("head_out_cfg")), len(x) // 2, x.shape[1]
        eps, v = head(x[:half].repeat(2, 1), t[:half].repeat(2), c)
        guided = eps[half:] + scale * (eps[:half] - eps[half:])
        close(torch.cat([guided.repeat(2, 1), v], dim=-1), file[name], NETWORK)
        assert guided.shape[1] == D


# --- training -----------------------------------------------------------------------------------------------------


def training_step(case: str, path: Path) -> tuple[dict[str, Tensor], MaskedModel, Tensor]:
    """The official training step replayed through `MaskedModel.forward`: the file, the model, its loss."""
    file, model = load_file(path), model_of(case).train()
    mask, tokens = file["mask"].bool(), file["patchified"]
    B, L, D = tokens.shape
    M = len(file["train_t"]) // (B * L)
    assert isinstance(model.head, Diffusion)
    model.head.draws = M
    masked = int(file["num_masked"])
    model.min_mask_ratio = min(model.min_mask_ratio, (masked - 0.5) / L)
    between = (n / 4096 for n in range(4096))
    once = next(
        u for u in between if math.ceil(L * mask_ratio(u, std=model.mask_ratio_std, low=model.min_mask_ratio)) == masked
    )
    rows = mask.flatten().nonzero()[:, 0]  # ours draws for masked tokens alone, the official code for all
    t, eps = file["train_t"].view(M, B, L), file["train_noise"].view(M, B, L, D)
    draws = {"step/ratio/uniform": torch.tensor(once)}
    for b, p in mask.nonzero().tolist():
        draws[f"{b}/token/{p}/t/integers"], draws[f"{b}/token/{p}/eps/normal"] = t[:, b, p], eps[:, b, p]
    for b in range(B):
        draws[f"{b}/drop/uniform"] = file["train_label_drop_uniform"][b]
        draws[f"{b}/order/permutation"] = file["orders"][b].long()
    keys, step = ReplayKeys(draws, B), ReplayKeys(draws, ["step"])
    terms: dict[str, Tensor] = {}
    inner = model.head.loss

    def recorded(*arguments: Any) -> Any:
        result = inner(*arguments)
        terms.update({"mse": result.parts["mse"], "vb": result.parts["vb"], "sum": result.sum})
        return result

    model.head.loss = recorded  # type: ignore[method-assign, assignment]
    loss = model(tokens, file["labels"].long(), keys, step).mean
    assert set(keys.unused()) & set(step.unused()) == set()
    for ours, theirs in (("mse", "train_mse"), ("vb", "train_vb"), ("sum", "train_loss_terms")):
        expected = file[theirs].view(M, B * L)[:, rows].sum(dim=0)
        close(terms[ours].detach(), expected, LOSS, relative=True)
    return file, model, loss


@each_forward
def test_loss_and_its_terms(case: str, path: Path) -> None:
    file, _, loss = training_step(case, path)
    close(loss.detach(), file["train_loss"], LOSS, relative=True)


@each_forward
def test_gradients(case: str, path: Path) -> None:
    gradients = FOLDER / f"{case}_train_grads.safetensors"
    if not gradients.exists():
        pytest.skip(f"no gradients of {case}")
    _, model, loss = training_step(case, path)
    loss.backward()
    theirs = load_file(gradients)
    ours = {official_name(name): parameter for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, expected in theirs.items():
        gradient = ours[name].grad
        assert gradient is not None, name
        bound = GRADIENT * max(expected.abs().max().item(), 1e-4 * largest)  # rounding noise where all is near zero
        worst = (gradient.reshape(expected.shape) - expected).abs().max().item()
        assert worst <= bound, f"{name}: differs by {worst:.3g}, allowed {bound:.3g}"


# --- sampling -----------------------------------------------------------------------------------------------------


class Run:
    """A recorded run of the official sampler, and what it was asked for in our words."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as handle:
            settings = handle.metadata()
        self.file = load_file(path)
        self.steps, self.images = int(settings["num_iter"]), int(settings["bsz"])
        conditional = settings.get("conditional", "True") == "True"
        self.labels = self.file["labels"].long() if conditional else None
        self.scale = float(settings["cfg"])
        timesteps = sorted(self.file["timesteps"].tolist())
        count = settings["num_sampling_steps"]
        # The published start multiplies rounding errors by thousands: values reach 2e4 and are compared relatively.
        self.official = count.isdigit() and timesteps == respaced(int(count), 999).timesteps.tolist()
        published = {"num_diffusion_steps": len(timesteps), "start_timestep": 999}
        self.settings = Settings(
            num_inference_steps=self.steps,
            guidance_scale=self.scale if conditional else 1.0,  # without labels there is nothing to guide
            guidance_schedule=settings["cfg_schedule"],
            temperature=float(settings["temperature"]),
            head_options=published if self.official else {"timesteps": timesteps},
        )

    def part(self, step: int) -> dict[str, Tensor]:
        begin = f"iter{step:02d}."
        return {name.removeprefix(begin): tensor for name, tensor in self.file.items() if name.startswith(begin)}

    def drawn(self, step: int) -> Tensor:
        """Which tokens a step draws: (B, L)."""
        masked = self.part(step)["mask_in"].bool()
        return masked if step + 1 == self.steps else masked & ~self.part(step + 1)["mask_in"].bool()

    def keys(self, *steps: int) -> ReplayKeys:
        """The numbers drawn in these steps: each token's start, and then one draw for each reverse step.

        With guidance the official code draws for a second half of rows too, which it does not use.
        """
        draws = {f"{b}/order/permutation": order.long() for b, order in enumerate(self.file["orders"])}
        for step in steps:
            part = self.part(step)
            N = len(part["init_noise"])
            normal = torch.cat([part["init_noise"][None], part["noise"][:, :N]]).transpose(0, 1)  # (N, T+1, D)
            for (b, p), noise in zip(self.drawn(step).nonzero().tolist(), normal, strict=True):
                draws[f"{b}/token/{p}/noise/normal"] = noise
        return ReplayKeys(draws, self.images)


@each_sample
@torch.no_grad()
def test_whole_sampling_runs(case: str, path: Path) -> None:
    """The naive sampler and the fast loop, on the recorded orders and noise: every step and the last."""
    run, model = Run(path), model_of(case)
    latent = run.file["out_latent"]
    p = patch_of(case, latent, model.tokens)
    both = model.condition(run.labels, run.images), model.null(run.images)

    def as_latent(tokens: Tensor) -> Tensor:
        return unpatchify(tokens, p, latent.shape[2] // p, latent.shape[3] // p)

    naive = model.sample(*both, run.keys(*range(run.steps)), run.settings)
    close(as_latent(naive), latent, SAMPLING, run.official)
    replay = run.keys(*range(run.steps))
    for step in model.steps(*both, replay, run.settings):
        if step.index + 1 < run.steps:
            following = run.part(step.index + 1)
            assert torch.equal(~step.known, following["mask_in"].bool())
            close(step.tokens, following["tokens_in"], SAMPLING, run.official)
    assert not replay.unused()
    close(as_latent(step.tokens), latent, SAMPLING, run.official)


@each_sample
@torch.no_grad()
def test_each_step_of_a_run(case: str, path: Path) -> None:
    """From the tokens that the official step began with: how many it draws, its guidance, z, what the head draws."""
    run, model = Run(path), model_of(case)
    conditions: list[Condition] = [model.condition(run.labels, run.images), model.null(run.images)]
    plan = model.head.plan(model.head.options(**run.settings.head_options))
    masked = torch.ones(run.images, model.tokens, dtype=torch.bool)
    for step in range(run.steps):
        part = run.part(step)
        assert torch.equal(part["mask_in"].bool(), masked)
        left = unknown_after(step, run.steps, model.tokens, int(masked[0].sum()))
        after = torch.zeros_like(masked).scatter(1, run.file["orders"][:, :left].long(), True)
        ask, known, masked = masked & ~after, ~masked, after
        assert torch.equal(ask, run.drawn(step))
        scale = run.settings.guidance_at(run.scale, left, model.tokens)
        assert scale == pytest.approx(part["cfg_iter"].item(), abs=1e-6)
        N = len(part["init_noise"])
        halves = conditions[: len(part["z"]) // N]
        z = torch.cat([model.backbone.z(half, part["tokens_in"], known, ask) for half in halves])
        close(z, part["z"], NETWORK, run.official)
        guidance = Guidance.of(scale, N, "cpu") if len(halves) > 1 else None
        z_null = part["z"][N:] if guidance is not None else None
        rows, places = ask.nonzero().unbind(1)
        keys = run.keys(step).fold("token").select(rows).fold(places)
        drawn = model.head.sample(part["z"][:N], keys, plan, z_null, guidance, run.settings.temperature)
        close(drawn, part["sampled"][:N], SAMPLING, run.official)


# --- diffusion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(FOLDER.glob("diffusion_tables*.npz")), ids=lambda path: path.stem)
def test_tables(path: Path) -> None:
    with np.load(path) as file:
        names = [name for name in file.files if not name.endswith("model_call_dtype")]
        assert len(names) >= 10
        for name in names:
            count, _, key = name.removeprefix("s").partition(".")
            chain = full_chain() if count == "1000" else respaced(int(count), 999)
            abar = chain.alphas_cumprod
            derived = {
                "timestep_map": chain.timesteps,
                "alphas_cumprod_prev": np.append(1.0, abar[:-1]),
                "alphas_cumprod_next": np.append(abar[1:], 0.0),
                "log_one_minus_alphas_cumprod": np.log(1.0 - abar),
            }
            ours = derived[key] if key in derived else getattr(chain, key)
            np.testing.assert_allclose(ours, file[name], rtol=1e-10, atol=1e-15, err_msg=name)


@each_steps
@torch.no_grad()
def test_reverse_steps(case: str, path: Path) -> None:
    """Prediction, posterior mean and variance, and the draw at a temperature."""
    file, head = load_file(path), model_of(case).head
    assert isinstance(head, Diffusion)
    counts = sorted({int(m[1]) for name in file if (m := re.match(r"s(\d+)\.", name))})
    assert counts
    for count in counts:
        chain = respaced(count, 999)
        part = {name.partition(".")[2]: tensor for name, tensor in file.items() if name.startswith(f"s{count}.")}
        x, t = part["x"], part["t"].long()
        assert chain.timesteps[t.numpy()].tolist() == part["t_orig"].tolist()
        eps, v = head(x, part["t_orig"].long(), part["c"])
        close(torch.cat([eps, v], dim=-1), part["raw"], NETWORK)
        x0, log_var = predict_x0(chain, x, t, eps), log_variance(chain, t, v)
        mean = chain.at("posterior_mean_coef1", t) * x0 + chain.at("posterior_mean_coef2", t) * x
        for row in range(len(x)):  # each row at its own scale: x0 reaches 2e4 at t = 999
            close(x0[row], part["pred_xstart"][row], NETWORK, relative=True)
            close(mean[row], part["mean"][row], NETWORK, relative=True)
        close(log_var, part["log_variance"], NETWORK, relative=True)
        close(log_var.exp(), part["variance"], NETWORK)
        for name in (key for key in part if key.startswith("sample_temp")):
            temperature = float(name.removeprefix("sample_temp").replace("_", "."))
            drawn = mean + temperature * (t > 0)[:, None] * (0.5 * log_var).exp() * part["noise"]
            for row in range(len(x)):
                close(drawn[row], part[name][row], NETWORK, relative=True)


@each_steps
@torch.no_grad()
def test_training_terms(case: str, path: Path) -> None:
    file, head, chain = load_file(path), model_of(case).head, full_chain()
    assert isinstance(head, Diffusion)
    if "train.t" not in file:
        pytest.skip("no training terms")
    x0, t, noise = file["train.x0"], file["train.t"].long(), file["train.noise"]
    x_t = chain.at("sqrt_alphas_cumprod", t) * x0 + chain.at("sqrt_one_minus_alphas_cumprod", t) * noise
    close(x_t, file["train.x_t"], NETWORK)
    eps, v = head(x_t, t, file["train.c"])
    mse = (noise - eps).square().mean(dim=-1)
    vb = variational_bound(chain, x0, x_t, t, eps, v)
    for ours, theirs in ((mse, "train.mse"), (vb, "train.vb"), (mse + vb, "train.loss")):
        close(ours, file[theirs], LOSS, relative=True)


# --- full size ----------------------------------------------------------------------------------------------------

SIZES = {"mar_base": "mar-b", "mar_large": "mar-l", "mar_huge": "mar-h"}
KEYS = json.loads((FOLDER / "mar_full_keys.json").read_text()) if (FOLDER / "mar_full_keys.json").exists() else {}


@pytest.mark.parametrize("size", sorted(KEYS.keys() & SIZES.keys()))
def test_presets_have_the_official_tensors(size: str) -> None:
    """Names, shapes, counts, and which weights decay, without allocating one of them."""
    expected = KEYS[size]
    with torch.device("meta"):
        model = build_model(PRESETS[SIZES[size]].model)
    assert parameter_count(model) == expected["total_params"] == PRESETS[SIZES[size]].parameters
    ours = {name: list(tensor.shape) for name, tensor in mar_tensors(model).items()}
    assert ours == {name: shape for name, shape, _ in expected["state_dict"]}
    decayed = {id(parameter) for parameter in parameter_groups(model, 0.02)[0]["params"]}
    named = {official_name(name) for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert named == set(expected["weight_decay_params"])
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = official_name(name).split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    assert parts == expected["params_by_part"]


def test_shapes_are_compared_without_leading_ones() -> None:
    assert squeezed(torch.Size([1, 1, 5, 1])) == (5, 1) and squeezed(torch.Size([1])) == (1,)
    assert squeezed(torch.Size([6, 5, 1, 1])) == (6, 5) and squeezed(torch.Size([6, 5, 1, 3])) == (6, 5, 1, 3)
