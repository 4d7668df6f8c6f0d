"""`seriatim doctor` reports what this machine is, and what would go wrong on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from seriatim.cli.output import JsonFlag, print_json, print_table
from seriatim.core.terminal import say

PACKAGES = ("torch", "numpy", "pillow", "safetensors", "huggingface_hub", "diffusers", "scikit-learn", "pydantic")
LITTLE_DISK = 5e9  # free bytes below which a problem is reported


def doctor(
    path: Annotated[Path, typer.Option(help="A folder on the disk to check.")] = Path(),
    json: JsonFlag = False,
) -> None:
    """Report versions, device, threads, bf16 speed, torchvision and disk; include the output in a bug report."""
    report = examine(path)
    if json:
        print_json(report)
        return
    rows = [(key, value) for key, value in report["versions"].items()]
    rows += [("device", report["device"]), ("threads", report["threads"])]
    bf16 = report["bf16"]
    rows += [("bf16", f"{bf16['speedup']:.1f} x the speed of float32 in a matrix product")]
    rows += [("torchvision", report["torchvision"])]
    disk = report["disk"]
    state = "writable" if disk["writable"] else "NOT writable"
    rows += [("disk", f"{disk['free_bytes'] / 1e9:.1f} GB free at {disk['path']}, {state}")]
    print_table(("what", "found"), rows)
    for problem in report["problems"]:
        say(f"problem: {problem}")
    if not report["problems"]:
        say("no problem found")


def examine(path: Path) -> dict[str, Any]:
    """A mapping with everything that `doctor` reports."""
    import platform
    import shutil
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from seriatim import __version__
    from seriatim.core.device import pick_device
    from seriatim.core.errors import SeriatimError
    from seriatim.core.files import writable_folder

    versions = {"seriatim": __version__, "python": platform.python_version()}
    problems: list[str] = []
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
            problems.append(f"{package} is not installed; pip install {package}")
    device = pick_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    torchvision = check_torchvision()
    if torchvision.startswith("broken"):
        problems.append("torchvision is installed but does not work, which breaks diffusers; pip uninstall torchvision")
    path = path.resolve()
    existing = next(folder for folder in (path, *path.parents) if folder.is_dir())
    try:
        writable = bool(writable_folder(existing, "path"))
    except SeriatimError as error:
        writable = False
        problems.append(str(error))
    free = shutil.disk_usage(existing).free
    if free < LITTLE_DISK:
        problems.append(f"only {free / 1e9:.1f} GB are free on the disk of {existing}; training may need more")
    return {
        "versions": versions,
        "platform": platform.platform(),
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
        "bf16": {"speedup": bf16_speedup(device)},
        "torchvision": torchvision,
        "disk": {"path": str(existing), "free_bytes": free, "writable": writable},
        "problems": problems,
    }


def bf16_speedup(device: Any) -> float:
    """How many times faster a matrix product is in bfloat16 than in float32."""
    import time

    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(1024, 768, device=device, dtype=dtype)
        b = torch.ones(768, 768, device=device, dtype=dtype)
        times = []
        for _ in range(8):
            begin = time.perf_counter()
            (a @ b).sum().item()  # reading the sum waits for the device
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def check_torchvision() -> str:
    """The version of torchvision, or why there is none: "absent ..." or "broken: ...".

    It is imported in another process, because a broken one would leave its traces in this one.
    """
    import importlib.util
    import subprocess
    import sys

    if importlib.util.find_spec("torchvision") is None:
        return "absent (not needed)"
    probe = "import torchvision; print(torchvision.__version__)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        return done.stdout.strip()
    lines = done.stderr.strip().splitlines()
    return f"broken: {lines[-1] if lines else 'it does not import'}"
