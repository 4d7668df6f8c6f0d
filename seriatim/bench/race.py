"""`bench`: one model's latency, throughput, memory and stages; beside an official code, on the same draws first."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from seriatim import __version__
from seriatim.backbones.causal_transformer import Causal
from seriatim.bench.checkout import Official, dtypes
from seriatim.bench.official_arinar import OfficialARINAR
from seriatim.bench.official_llamagen import OfficialLlamaGen
from seriatim.bench.official_mar import OfficialMAR
from seriatim.bench.opponent import Draws, Opponent, Workload, replaced
from seriatim.bench.ours import Ours, prepared
from seriatim.bench.timing import Stages, counting, matrix_peak, median, peak_resident_bytes, processor
from seriatim.checkpoints.native import MODEL, find_bundle, load_bundle, opened, section
from seriatim.checkpoints.run_names import is_local
from seriatim.core.construct import MOST_AT_ONCE, MOST_THREADS
from seriatim.core.device import DTYPES, pick_device, pick_dtype
from seriatim.core.errors import ResourceError, UsageError, check_known, nearest
from seriatim.core.plugins import load_installed_plugins, load_plugin, plugin_files
from seriatim.core.progress import Progress
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model, seeded
from seriatim.models.nested import Nested
from seriatim.pipeline.request import SampleRequest, resolved
from seriatim.sampling.draw import STEPS
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.vq import VQ
from seriatim.training.precision import threads as with_threads
from seriatim.zoo import PRESETS

WEAK = 1e-4  # of random weights: rows below begin as zeros, or so near that skipping them would not show
LOOKS = 8  # steps of a run that is taken apart: stages, FLOPs
# What a preset's tokens are -> what decodes them, with random weights: MAR's, LlamaGen's
DECODERS: dict[str, type[Tokenizer]] = {"latents of a KL autoencoder": KL, "codes of a VQ autoencoder": VQ}
SCHEDULES = ("linear", "constant")  # of guidance: those that the original has

FOLDER = "the folder's"
ASKED = ("num_inference_steps", "num_diffusion_steps", "guidance_scale", "guidance_schedule", "guidance_mode")
MORE = ("num_diffusion_steps_last", "token_schedule", "min_tokens")  # settings that no original has
OF_HEADS = ("solver", "start_timestep")  # likewise, of heads
INSIDE = ("guidance_mode", "feature_schedule")  # of a nested head; its original has them, or another way to the same

Ask = dict[str, Any]  # what `bench` was asked, as plain data: a process of its own measures memory from it


@dataclass
class Subject:
    """What is timed."""

    model: SequenceModel
    tokenizer: Tokenizer | None
    defaults: dict[str, Any]
    weights: str  # where they are from


def subject(name: str, decodes: bool = True) -> Subject:
    """A model folder, or a preset with random weights."""
    if is_local(name):
        bundle = load_bundle(name)
        return Subject(bundle.model, bundle.tokenizer, dict(bundle.sampling), FOLDER)
    if name not in PRESETS:
        raise UsageError(f"model: {name!r} is no folder or preset{nearest(name, PRESETS)}")
    preset = PRESETS[name]
    with seeded(0):
        model = build_model(preset.original()).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:  # else a fresh head does nothing, whatever z is; or a block in it next to nothing
                    weak = weight.abs().amax(dim=tuple(range(1, weight.ndim))) < WEAK
                    weight[weak] = 0.02 * torch.randn(int(weak.sum()), *weight.shape[1:])
        kinds = [kind for tokens, kind in DECODERS.items() if decodes and preset.image.endswith(tokens)]
        tokenizer = kinds[0]() if kinds else None
    return Subject(model, tokenizer, dict(preset.sampling), "random")


def sizes(name: str) -> Subject:
    """The same without weights."""
    with torch.device("meta"):
        if name in PRESETS and not is_local(name):
            return Subject(build_model(PRESETS[name].original()), None, dict(PRESETS[name].sampling), "none")
        with opened(find_bundle(name), MODEL) as (config, _):
            return Subject(build_model(section(config, "model")), None, section(config, "sampling"), FOLDER)


def workload(of: Subject, ask: Ask) -> Workload:
    """The settings asked for, else the model's own; of a preset 64 steps where its authors publish figures with 256."""
    wanted = {k: ask[k] for k in ASKED if ask[k] is not None}
    names = (*ASKED, *MORE, *OF_HEADS, *INSIDE, "temperature", "head_options")
    own = {name: of.defaults[name] for name in names if name in of.defaults}
    if "num_diffusion_steps" in wanted:  # the folder's last belongs to its own first
        own.pop("num_diffusion_steps_last", None)
    if of.model.one_by_one and ask["every"] > 1:
        raise UsageError("every: a step of a causal model needs all steps before it; leave it at 1")
    most = of.defaults.get("num_inference_steps", 64)
    own["num_inference_steps"] = min(of.model.tokens, most if of.weights == FOLDER else min(64, most))
    if of.model.one_by_one:
        own["num_inference_steps"] = of.model.tokens
    schedule = (own | wanted).get("guidance_schedule", "linear")
    if schedule not in SCHEDULES:
        raise UsageError(f"guidance_schedule: {schedule!r} is not benched; use {' or '.join(SCHEDULES)}")
    request = resolved(wanted, own, of.model)
    steps, classes = request.num_inference_steps or of.model.tokens, of.model.classes
    labels = tuple(i * classes // ask["batch"] for i in range(ask["batch"])) if classes else (-1,) * ask["batch"]
    return Workload(
        labels,
        steps,
        request.guidance_scale,
        request.guidance_schedule,
        request.temperature,
        more(request, of.model, ask["official"]),
        request.head_options,
        every=1 if of.model.one_by_one else min(ask["every"], steps),
    )


def more(request: SampleRequest, model: SequenceModel, official: str | None) -> dict[str, Any]:
    """Settings of a folder that the original hasn't, where they differ from its own; refused beside an original."""
    usual = {name: SampleRequest.model_fields[name].default for name in MORE}
    options = {name: getattr(request, name) for name in MORE if getattr(request, name) != usual[name]}
    plain = model.head.options()
    of_head = {k: v for k, v in request.head_options.items() if k in OF_HEADS and v != getattr(plain, k)}
    for name, value in (of_head | options).items() if official is not None else ():
        raise UsageError(
            f"official: the original has no {name}={value!r}, which this folder samples with; leave it out"
        )
    return options


def inside(model: SequenceModel, work: Workload) -> int | None:
    """The steps inside the head; None for a head that has none."""
    return getattr(model.head.options(**work.head_options), STEPS, None)


def bench(
    model: str,
    *,
    official: str | None = None,
    batch: int = 1,
    num_inference_steps: int | None = None,
    num_diffusion_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_schedule: str | None = None,
    guidance_mode: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    official_dtype: str | None = None,
    threads: int | None = None,
    repetitions: int = 3,
    every: int = 1,
    decode: bool = True,
    memory: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Time `model` (a folder, or a preset with random weights); with `official`, a checkout of the original, both.

    `dtype` is that of our backbone: as in `load`, or "best", the fastest. The original has its own best, measured, or
    `official_dtype`.
    Seconds are of one batch, without decoding, which is timed apart. Raises UsageError for what can't be benched.
    """
    for name, value in (("batch", batch), ("repetitions", repetitions), ("every", every), ("threads", threads)):
        most = MOST_THREADS if name == "threads" else MOST_AT_ONCE
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"{name}: {value!r} is not allowed; it must be from 1 to {most:,}")
    ask: Ask = {"model": model, "official": official, "batch": batch, "every": every}
    ask |= {"num_inference_steps": num_inference_steps, "num_diffusion_steps": num_diffusion_steps}
    ask |= {"guidance_scale": guidance_scale, "guidance_schedule": guidance_schedule, "guidance_mode": guidance_mode}
    ask |= {"device": str(pick_device(device)), "threads": threads or torch.get_num_threads()}
    ask |= {"plugins": plugin_files()}
    where = torch.device(ask["device"])
    if official_dtype is not None:
        if official is None:
            raise UsageError("official_dtype: needs official, a checkout of the original")
        check_known(dtypes(where), official_dtype=official_dtype)
    with with_threads(ask["threads"]), seeded(0):  # so that torch's own generator is left as it was
        of = subject(model, decode)
        work = workload(of, ask)
        theirs = None if official is None else original(Path(official), of.model, where, work)
        half = best_dtype(where) if dtype == "best" else pick_dtype(dtype, where)
        ask["dtype"] = str(half).removeprefix("torch.")
        ours = Ours(prepared(of.model.to(where), half), half, where)
        result: dict[str, Any] = {"model": model, "weights": of.weights, "device": processor(where)}
        result |= {"threads": ask["threads"], "batch": batch, "repetitions": repetitions, "every": work.every}
        result |= {"num_inference_steps": work.steps, "num_diffusion_steps": inside(of.model, work)}
        result |= {"guidance_scale": work.guidance, "guidance_schedule": work.schedule}
        result |= {"guidance_mode": work.head_options.get("guidance_mode"), "temperature": work.temperature}
        result |= {"dtype": ours.dtype, "head_dtype": "float32", "start_timestep": start_of(of.model, work)}
        result["versions"] = {"seriatim": __version__, "torch": torch.__version__}
        runs = (1 + repetitions) * (1 if theirs is None else 2)
        with Progress(runs, "bench", "runs", quiet=quiet) as bar:
            result |= compared(ours, theirs, work, bar)
            if theirs is not None:
                result["official_dtype"] = ask["official_dtype"] = theirs.choose(official_dtype, work)
                result["official_tried"] = theirs.tried
            result |= timed_runs(ours, theirs, work, repetitions, bar)
        result |= apart(ours, theirs, work, where, half)
        if decode and of.tokenizer is not None:
            result["stages"]["decoding"] = decoding(of.tokenizer.eval().to(where), batch, where)
        result["share_of_peak"] = result["ideal_seconds"] / result["seconds"]
        result |= measured_memory(ask, theirs is not None) if memory else {}
        if theirs is None and batch > 1:
            alone = replace(work, labels=work.labels[:1])
            warm = alone if of.model.one_by_one else replace(alone, every=work.steps)
            ours.sample(warm, Draws())
            result["latency_seconds"] = statistics.median(ours.sample(alone, Draws())[1] for _ in range(repetitions))
        elif batch == 1:
            result["latency_seconds"] = result["seconds"]
    return result


def original(path: Path, model: SequenceModel, device: torch.device, work: Workload) -> Official:
    """The official code of such a model."""
    if isinstance(model.backbone, Causal):
        return OfficialLlamaGen(path, model, device)
    if isinstance(model.head, Nested):
        return OfficialARINAR(path, model, device)
    return OfficialMAR(path, model, device, work.head_options)


def best_dtype(device: torch.device) -> torch.dtype:
    return max(DTYPES.values(), key=lambda dtype: matrix_peak(dtype, device))


def start_of(model: SequenceModel, work: Workload) -> int | None:
    chain: Callable[[Any], Any] | None = getattr(model.head, "chain", None)
    return None if chain is None else int(chain(model.head.options(**work.head_options)).timesteps[-1])


def compared(ours: Ours, theirs: Official | None, work: Workload, bar: Progress) -> dict[str, Any]:
    """Both on the same draws, the original in float32: how far apart the tokens are, or what they are drawn from.

    Of codes the likeliest ones, from step to step: how many are equal.
    """
    work = replace(work, temperature=0.0) if ours.model.head.discrete else work
    if theirs is None:
        ours.sample(work, Draws())
        bar.advance(1, "first run")
        return {}
    pairs, seconds, official = theirs.replay(ours, work)
    bar.advance(2, "both on the same draws")
    both = {"replay_seconds": seconds, "official_float32_seconds": official}  # of that one run
    if ours.model.head.discrete:
        return {**both, "equal_codes": float((pairs[0][0] == pairs[0][1]).float().mean())}
    found = [(float((a - b).abs().max()), max(1e-30, float(b.abs().max()))) for a, b in pairs]
    difference, largest = max(found, key=lambda each: each[0] / each[1])
    return {
        "max_abs_difference": difference,
        "max_rel_difference": difference / largest,
        "largest_value": largest,
        **both,
    }


def timed_runs(ours: Ours, theirs: Official | None, work: Workload, repetitions: int, bar: Progress) -> dict[str, Any]:
    """Both in turn, several times; the median of each."""
    result: dict[str, Any] = {}
    seconds: list[float] = []
    official: list[float] = []
    for _ in range(repetitions):
        seconds.append(ours.sample(work, Draws())[1])
        bar.advance(1, f"{seconds[-1]:.2f} s")
        if theirs is not None:
            official.append(theirs.sample(work, Draws())[1])
            bar.advance(1, f"{seconds[-1]:.2f} s, the original {official[-1]:.2f} s")
    B = len(work.labels)
    result |= {"seconds": statistics.median(seconds), "seconds_of_each": seconds}
    result["images_per_second"] = B / result["seconds"]
    if theirs is not None:
        result |= {"official_seconds": statistics.median(official), "official_seconds_of_each": official}
        result["official_images_per_second"] = B / result["official_seconds"]
        result["ratio"] = result["official_seconds"] / result["seconds"]
    return result


def apart(
    ours: Ours, theirs: Official | None, work: Workload, device: torch.device, half: torch.dtype
) -> dict[str, Any]:
    """Stages and FLOPs, from a few steps scaled to all."""
    few = work if ours.model.one_by_one else replace(work, every=max(work.every, work.steps // LOOKS))
    result: dict[str, Any] = {"stages": split(ours, few, device)}
    if theirs is not None:
        result["official_stages"] = split(theirs, few, device)
    peaks = {dtype: matrix_peak(dtype, device) for dtype in {half, torch.float32}}
    total, head = flops(ours, few)
    ideal = (total - head) / peaks[half] + head / peaks[torch.float32]
    return {
        **result,
        "flops": total,
        "peak_flops": {str(dtype).removeprefix("torch."): peak for dtype, peak in peaks.items()},
        "ideal_seconds": ideal,
    }


def flops(ours: Ours, few: Workload) -> tuple[float, float]:
    """FLOPs of a run's matrix products: all of them, and the head's."""
    head, of_head = ours.model.head, 0.0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal of_head
            with counting() as counter:
                result = function(*arguments, **options)
            of_head += counter.get_total_flops()
            return result

        return call

    parts = [(head, name, counted(getattr(head, name))) for name in ("sample", "plan")]
    with replaced(*parts), counting() as counter:
        ours.sample(few, Draws())
    return counter.get_total_flops() * few.factor, of_head * few.factor


def split(opponent: Opponent, few: Workload, device: torch.device) -> dict[str, float]:
    stages = Stages(device)
    _, total = opponent.sample(few, Draws(), stages)
    seconds = {name: value * few.factor for name, value in stages.seconds.items()}
    return {**seconds, "other": max(0.0, total - sum(seconds.values()))}


@torch.no_grad()
def decoding(tokenizer: Tokenizer, batch: int, device: torch.device) -> float:
    if tokenizer.vocab is None:
        tokens = torch.randn(batch, tokenizer.count, tokenizer.dim, device=device)
    else:
        tokens = torch.arange(batch * tokenizer.count, device=device).view(batch, -1) % tokenizer.vocab
    return median(lambda: tokenizer.decode(tokens), device)


# --- memory: a process for each, so that neither holds what the other needs -------------------------------------------


def measured_memory(ask: Ask, both: bool) -> dict[str, int | None]:
    result = {"peak_bytes": memory_of({**ask, "who": "ours"})}
    if both:
        result["official_peak_bytes"] = memory_of({**ask, "who": "official"})
    return result


def memory_of(ask: Ask) -> int | None:
    """The peak of a process that draws some steps, the last ones among them: those that hold most."""
    done = subprocess.run(
        [sys.executable, "-m", "seriatim.bench.race", json.dumps(ask)], capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}; out of memory?"])[-1]
        raise ResourceError(f"bench: the process that measures memory failed ({last[-300:]})")
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else int(found)


def child(ask: Ask) -> int | None:
    device = torch.device(ask["device"])
    torch.set_num_threads(ask["threads"])
    load_installed_plugins()
    for file in ask["plugins"]:
        load_plugin(file)
    opponent: Opponent
    if ask["who"] == "official":
        of = sizes(ask["model"])
        opponent = original(Path(ask["official"]), of.model, device, workload(of, ask))
        opponent.dtype = ask["official_dtype"]
    else:
        of, half = subject(ask["model"], decodes=False), DTYPES[ask["dtype"]]
        opponent = Ours(prepared(of.model.to(device), half), half, device)
    work = workload(of, ask)
    if not of.model.one_by_one:
        work = replace(work, every=max(1, work.steps // 4), last=True)
    opponent.sample(work, Draws())
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))  # noqa: T201
