"""EAR against the official code: every file of golden/ear that is there, with sizes taken from the files.

Made by the official modules on the CPU in float32. Tolerances are relative to the largest number of a tensor: network
and sampling 5e-6, loss 1e-5, gradients 1e-5. One wrong epsilon of a norm shows at 1e-5.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cases, golden
from safetensors.torch import load_file
from torch import Tensor

from seriatim.checkpoints import ear
from seriatim.checkpoints.official import OfficialFile
from seriatim.checkpoints.shapes import squeezed
from seriatim.core.keys import ReplayKeys
from seriatim.core.schedules import mask_ratio, unknown_after
from seriatim.core.settings import Settings
from seriatim.heads.base import Guidance
from seriatim.heads.energy import Energy
from seriatim.models.build import build_model, parameter_count
from seriatim.models.masked_model import MaskedModel
from seriatim.nn.patch import patchify, unpatchify
from seriatim.zoo import PRESETS

FOLDER = golden("ear")
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text()) if (FOLDER / "meta.json").exists() else {}
NETWORK, LOSS, GRADIENT = 5e-6, 1e-5, 1e-5


def close(ours: Tensor, theirs: Tensor, tolerance: float = NETWORK) -> None:
    assert ours.shape == theirs.shape
    worst, bound = (ours - theirs).abs().max().item(), tolerance * max(1e-3, theirs.abs().max().item())
    assert worst <= bound, f"differs by {worst:.3g}, allowed {bound:.3g}"


# --- reading ------------------------------------------------------------------------------------------------------


def head_of(case: str, **config: Any) -> Energy:
    """The head of a case, with sizes from its weights."""
    path = FOLDER / f"{case}_weights.safetensors"
    if not path.exists():
        pytest.skip(f"no weights of {case}")
    weights = {f"scoreloss.{name}": tensor for name, tensor in load_file(path).items()}
    width, z_dim = weights["scoreloss.net.input_proj.weight"].shape
    noise = weights["scoreloss.net.noise_embed.weight"].shape[1]
    dim = len(weights["scoreloss.net.final_layer.linear.bias"])
    depth = sum(name.endswith("in_ln.bias") for name in weights)
    head = Energy(dim, width, depth, noise=noise, z_dim=z_dim, **config)
    head.load_state_dict({name: weights[ear.official_name(f"head.{name}")] for name in head.state_dict()})
    return head


def model_of(case: str) -> MaskedModel:
    path = FOLDER / f"{case}_weights.safetensors"
    if not path.exists():
        pytest.skip(f"no weights of {case}")
    weights, config = load_file(path), META.get(path.stem, {}).get("config", {})
    told = {"score_batch_mul", "alpha", "train_temperature", "buffer_size"} & config.keys()
    positions = weights["decoder_pos_embed_learned"].shape[1]
    square = math.isqrt(positions - 1) ** 2  # the usual numbers of tokens, where no configuration tells it
    arguments = {"buffer_size": positions - square, "proj_dropout": 0.0} | {name: config[name] for name in told}
    heads = config.get("decoder_num_heads", 4)
    model = ear.model_from_ear(OfficialFile(path, weights, arguments), heads=heads)
    assert isinstance(model, MaskedModel) and isinstance(model.head, Energy)
    return model


def each(pattern: str, split: str) -> pytest.MarkDecorator:
    found = cases(FOLDER, pattern, split)
    return pytest.mark.parametrize(("case", "path"), found, ids=[path.stem for _, path in found])


def test_there_are_golden_files() -> None:
    assert FOLDER.is_dir() and any(FOLDER.iterdir()), f"no golden tensors of EAR in {FOLDER}"


# --- the head -----------------------------------------------------------------------------------------------------


@each("*_forward.safetensors", "_forward")
@torch.no_grad()
def test_the_network(case: str, path: Path) -> None:
    file, head = load_file(path), head_of(case)
    z, noise = file["z"], file["noise"]
    compared = [name for name in file if name.startswith("eval_T")]
    assert compared
    for name in compared:
        close(head(z, noise, float(name.removeprefix("eval_T"))), file[name])
    if "noise_embed" in file:
        close(head.noise_embed(noise), file["noise_embed"])
        close(head.z_embed(z), file["input_proj"])


@each("head*_loss_*.safetensors", "_loss_")
def test_the_loss_of_a_head(case: str, path: Path) -> None:
    alpha, tau = (float(part[1:]) for part in path.stem.partition("_loss_")[2].split("_"))
    file, head = load_file(path), head_of(case, draws=1, alpha=alpha, tau=tau)
    z, mask = file["z"].requires_grad_(), file["mask"]
    N, K = len(z), head.noise
    noise = file["uniform"].view(2, 1, N, K).permute(2, 1, 0, 3)  # (N, M, 2, K)
    keys = ReplayKeys({f"{row}/noise/uniform": noise[row] for row in range(N)}, N)
    loss = head.loss(z, file["target"], keys)
    assert not keys.unused() and loss.count.tolist() == [1] * N
    close(loss.sum.detach(), file["loss_each"], LOSS)
    masked = (loss.sum * mask).sum() / mask.sum()
    close(masked.detach()[None], file["loss"], LOSS)
    close(loss.sum.mean().detach()[None], file["loss_no_mask"], LOSS)
    masked.backward()
    assert z.grad is not None
    close(z.grad, file["grad_z"], GRADIENT)
    for name, parameter in head.named_parameters():
        theirs = file.get("grad." + ear.official_name(f"head.{name}").removeprefix("scoreloss."))
        if theirs is not None:
            assert parameter.grad is not None, name
            close(parameter.grad, theirs, GRADIENT)


@each("head*_sample_*.safetensors", "_sample_")
@torch.no_grad()
def test_samples_of_a_head(case: str, path: Path) -> None:
    scale, temperature = path.stem.partition("_sample_cfg")[2].split("_T")
    file, head = load_file(path), head_of(case)
    keys = ReplayKeys({f"{row}/noise/uniform": u for row, u in enumerate(file["uniform"])}, len(file["z"]))
    guidance = Guidance.of(float(scale), len(file["z"]), "cpu")
    assert (guidance is None) == ("z_null" not in file)
    drawn = head.sample(file["z"], keys, None, file.get("z_null"), guidance, float(temperature))
    close(drawn, file["sample"])


# --- the model ----------------------------------------------------------------------------------------------------


def as_tokens(images: Tensor, model: MaskedModel) -> Tensor:
    """Latents (B, c, h, w) as tokens (B, L, D)."""
    return patchify(images, math.isqrt(images[0].numel() // images.shape[1] // model.tokens))


@each("*_train.safetensors", "_train")
def test_training(case: str, path: Path) -> None:
    step_of(case, path)


@each("*_eval.safetensors", "_eval")
def test_the_loss_without_dropped_labels(case: str, path: Path) -> None:
    step_of(case, path)


def step_of(case: str, path: Path) -> None:
    """The official training step replayed through `MaskedModel.forward`: z, the loss, and gradients where there are."""
    file, model = load_file(path), model_of(case).train()
    if "label_uniform" not in file:
        model.eval()
    tokens, mask, head = as_tokens(file["images"], model), file["mask"].bool(), model.head
    assert isinstance(head, Energy)
    assert torch.equal(tokens, file["tokens"])
    B, L = mask.shape
    head.draws = len(file["noise_uniform"]) // (2 * B * L)
    masked, K = int(mask[0].sum()), head.noise
    between = (n / 4096 for n in range(4096))
    once = next(u for u in between if math.ceil(L * mask_ratio(u)) == masked)
    noise = file["noise_uniform"].view(2, head.draws, B, L, K)
    draws = {f"{b}/order/permutation": order.long() for b, order in enumerate(file["orders"])}
    draws |= {f"{b}/token/{p}/noise/uniform": noise[:, :, b, p].transpose(0, 1) for b, p in mask.nonzero().tolist()}
    draws |= {"step/ratio/uniform": torch.tensor(once)}
    if "label_uniform" in file:
        draws |= {f"{b}/drop/uniform": u for b, u in enumerate(file["label_uniform"])}
        dropped = file["label_uniform"] < model.label_dropout
    else:
        dropped = torch.zeros(B, dtype=torch.bool)
    labels = file["labels"].long()
    with torch.no_grad():
        conditional, null = model.condition(labels, B), model.null(B)
        vectors = torch.where(dropped[:, None, None], null.vectors, conditional.vectors)
        condition = type(conditional)(vectors)
        everywhere = torch.ones_like(mask)
        close(model.backbone.z(condition, tokens, ~mask, everywhere).view(B, L, -1), file["z"])
    keys, step = ReplayKeys(draws, B), ReplayKeys(draws, ["step"])
    loss = model(tokens, labels, keys, step).mean
    assert set(keys.unused()) & set(step.unused()) == set()
    close(loss.detach()[None], file["loss"], LOSS)
    gradients = {name.removeprefix("grad."): tensor for name, tensor in file.items() if name.startswith("grad.")}
    if gradients:
        loss.backward()
        ours = {ear.official_name(name): parameter.grad for name, parameter in model.named_parameters()}
        assert ours.keys() == gradients.keys()
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        for name, theirs in gradients.items():
            gradient = ours[name]
            assert gradient is not None, name
            bound = GRADIENT * max(theirs.abs().max().item(), 1e-3 * largest)  # rounding noise where all is near zero
            assert (gradient.reshape(theirs.shape) - theirs).abs().max().item() <= bound, name


@each("tiny*_sample_*.safetensors", "_sample_")
@torch.no_grad()
def test_whole_sampling_runs(case: str, path: Path) -> None:
    """The naive sampler and the fast loop, on the recorded orders and noise: every step's draws and the last tokens."""
    told = META.get(path.stem)
    if told is None:
        pytest.skip(f"meta.json does not tell the settings of {path.stem}")
    file, model = load_file(path), model_of(case)
    B, N = len(file["orders"]), int(told["num_iter"])
    labels = file["labels"].long() if "labels" in file else None
    scale = float(told["cfg"])
    settings = Settings(
        num_inference_steps=N,
        guidance_scale=scale,
        guidance_schedule=told.get("cfg_schedule", "constant"),
        temperature=float(told.get("infer_temperature", 1.0)),
    )
    draws = {f"{b}/order/permutation": order.long() for b, order in enumerate(file["orders"])}
    left = model.tokens
    asked = []
    for step in range(N):
        after = unknown_after(step, N, model.tokens, left)
        ask = torch.zeros(B, model.tokens, dtype=torch.bool).scatter(1, file["orders"][:, after:left].long(), True)
        if scale != 1:
            assert settings.guidance_at(scale, after, model.tokens) == pytest.approx(told["step_cfg"][step], abs=1e-6)
        for (b, p), noise in zip(ask.nonzero().tolist(), file[f"step{step:02d}.uniform"], strict=True):
            draws[f"{b}/token/{p}/noise/uniform"] = noise
        asked.append(ask)
        left = after
    both = model.condition(labels, B), model.null(B)
    wanted = as_tokens(file["tokens"], model)
    p = math.isqrt(file["tokens"][0, 0].numel() // model.tokens)
    side = file["tokens"].shape[-1] // p
    naive = model.sample(*both, ReplayKeys(draws, B), settings)
    close(unpatchify(naive, p, side, side), file["tokens"])
    replay = ReplayKeys(draws, B)
    for made in model.steps(*both, replay, settings):
        drawn = made.tokens[asked[made.index]]
        close(drawn, file[f"step{made.index:02d}.sampled"][: len(drawn)])
    assert not replay.unused()
    close(made.tokens, wanted)


# --- full size ----------------------------------------------------------------------------------------------------

SIZES = {"ear_base": "ear-b", "ear_large": "ear-l", "ear_huge": "ear-h"}
KEYS = {path.stem.removeprefix("keys_"): path for path in sorted(FOLDER.glob("keys_*.json"))}


@pytest.mark.parametrize("size", sorted(KEYS.keys() & SIZES.keys()))
def test_presets_have_the_official_tensors(size: str) -> None:
    """Names, shapes and counts, without allocating one of them."""
    expected = json.loads(KEYS[size].read_text())
    with torch.device("meta"):
        model = build_model(PRESETS[SIZES[size]].model)
    assert parameter_count(model) == expected["parameters"] == PRESETS[SIZES[size]].parameters
    ours = {ear.official_name(name): squeezed(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == {name: squeezed(torch.Size(shape)) for name, shape in expected["shapes"].items()}
