"""Solvers on mixtures whose distribution is known: how far samples are from the truth, by solver, steps and start.

    OMP_NUM_THREADS=1 python benchmarks/known_mixture.py --out runs/known_mixture

Diffusion heads are trained on a 2-D and a 16-D mixture of Gaussians given z, three seeds each, and sampled with each
solver. What is trained or measured already in --out is not done again. Prints how well the heads fit, and a table in
markdown; writes a plot.

The distance is the energy distance in one dimension, sqrt(2 int (F - G)^2), F of the samples and G of the truth, its
square averaged over 32 fixed directions and over z: in the plane that is the energy distance but for a constant. A
mixture far from itself by chance alone has the distance called floor: as many samples of the truth, against the truth.

Z values of z, K components, D features, N samples, P directions.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from seriatim.core.keys import Keys
from seriatim.core.schedules import learning_rate
from seriatim.heads.ddpm import full_chain
from seriatim.heads.diffusion import Diffusion
from seriatim.heads.solvers import SOLVERS
from seriatim.models.base import Loss
from seriatim.models.build import seeded
from seriatim.training.state import Trainables
from seriatim.training.updates import updates

STEPS = (5, 8, 10, 15, 25, 50, 100)
STARTS = {"stable": None, "official": 999}
SEEDS = (0, 1, 2)
WIDTH, DEPTH, BATCH, UPDATES = 64, 3, 512, 2400
SAMPLES, TRUTH, DIRECTIONS = 10240, 200_000, 32


@dataclass(frozen=True)
class Mixture:
    weights: Tensor  # (Z, K)
    means: Tensor  # (K, D)
    covariances: Tensor  # (K, D, D)

    @property
    def z(self) -> Tensor:
        """z is one-hot: (Z, Z)."""
        return torch.eye(len(self.weights))

    def sample(self, which: Tensor, generator: torch.Generator) -> Tensor:
        """which (N,), the value of z -> (N, D)."""
        k = torch.multinomial(self.weights[which], 1, generator=generator)[:, 0]  # (N,)
        noise = torch.randn(len(which), self.means.shape[1], generator=generator)
        return self.means[k] + torch.einsum("nde,ne->nd", torch.linalg.cholesky(self.covariances)[k], noise)

    def eps(self, x: Tensor, abar: Tensor, which: Tensor) -> Tensor:
        """E[eps | x_t], the best that a head can predict: x (N, D), alpha_bar (N,), which (N,) -> (N, D)."""
        values, axes = torch.linalg.eigh(self.covariances)  # (K, D), (K, D, D)
        off = x[:, None] - abar.sqrt()[:, None, None] * self.means  # (N, K, D)
        y = torch.einsum("nkd,kde->nke", off, axes)
        variance = abar[:, None, None] * values + 1 - abar[:, None, None]  # (N, K, D)
        log = self.weights[which].log() - 0.5 * (y.square() / variance + variance.log()).sum(dim=-1)  # (N, K)
        return (1 - abar).sqrt()[:, None] * torch.einsum("nk,nke,kde->nd", log.softmax(dim=1), y / variance, axes)


def ring() -> Mixture:
    """2-D: eight Gaussians on a ring and a correlated one inside; z is for all, half the ring, the rest, the inner."""
    angle = torch.arange(8) * math.pi / 4
    means = torch.cat([1.3 * torch.stack([angle.cos(), angle.sin()], dim=1), torch.zeros(1, 2)])
    covariances = 0.15**2 * torch.eye(2).repeat(9, 1, 1)
    covariances[8] = torch.tensor([[0.3, 0.25], [0.25, 0.3]])
    half = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    rows = [
        torch.ones(9),
        F.pad(half, (0, 1)),
        F.pad(1 - half, (0, 1), value=4.0),
        F.pad(torch.zeros(8), (0, 1), value=1),
    ]
    weights = torch.stack(rows)
    return Mixture(weights / weights.sum(dim=1, keepdim=True), means, covariances)


def sixteen() -> Mixture:
    """16-D: five Gaussians, each with three wide axes of its own and 0.15 along the others; z weighs them."""
    g = torch.Generator().manual_seed(1)
    means, axes = 0.7 * torch.randn(5, 16, generator=g), 0.35 * torch.randn(5, 16, 3, generator=g)
    weights = torch.tensor([[1.0, 1, 1, 1, 1], [6, 3, 1, 0, 0], [0, 0, 1, 1, 8]])
    covariances = axes @ axes.transpose(1, 2) + 0.15**2 * torch.eye(16)
    return Mixture(weights / weights.sum(dim=1, keepdim=True), means, covariances)


MIXTURES = {"2-D": ring, "16-D": sixteen}


class OneZ(Diffusion):
    """Draws many tokens of the same z: modulations are made for one of them, which gives the same tokens sooner."""

    def walk(self, times: Tensor, condition: Tensor) -> Iterator[tuple[int, list[list[Tensor]]]]:
        return super().walk(times, condition[:1])


def trained(mixture: Mixture, seed: int, file: Path, count: int) -> OneZ:
    """A head for the mixture, from `file` if it is there: Adam, half a cosine, an average of some 500 updates."""
    with seeded(seed):
        head = OneZ(mixture.means.shape[1], WIDTH, DEPTH, z_dim=len(mixture.z))
    if file.exists():
        head.load_state_dict(load_file(file))
        return head.eval()
    average = torch.optim.swa_utils.AveragedModel(head, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    parts = Trainables(head, average, torch.optim.Adam(head.parameters(), lr=3e-3))
    g = torch.Generator().manual_seed(1000 + seed)

    def loss_of(which: Tensor, update: int) -> Loss:
        keys = Keys.of("training", seed, update).fold(torch.arange(BATCH))
        loss = head.loss(mixture.z[which], mixture.sample(which, g), keys)
        return Loss(loss.sum.sum(), loss.count.sum(), {})

    def rate(images: int) -> float:
        return 3e-3 * learning_rate(images // BATCH - 1, count, count // 20, "cosine")

    def batch_of(_: int) -> Tensor:
        return torch.randint(len(mixture.z), (BATCH,), generator=g)

    for state in updates(parts, batch_of, loss_of, size=BATCH, rate=rate):
        if state.steps == count:
            break
    head.load_state_dict(average.module.state_dict())
    save_file(head.state_dict(), file)
    return head.eval()


@torch.no_grad()
def excess(head: Diffusion, mixture: Mixture) -> dict[str, float]:
    """The best head's loss E |eps - eps*|^2 / D; ours beyond it, E |eps_hat - eps*|^2 / D, and so in thirds of t."""
    g, chain, n = torch.Generator().manual_seed(5), full_chain(), 20_000
    which = torch.randint(len(mixture.z), (n,), generator=g)
    t = torch.arange(n) * 1000 // n
    x0, eps = mixture.sample(which, g), torch.randn(n, mixture.means.shape[1], generator=g)
    x = chain.at("sqrt_alphas_cumprod", t) * x0 + chain.at("sqrt_one_minus_alphas_cumprod", t) * eps
    best = mixture.eps(x, chain.at("alphas_cumprod", t)[:, 0], which)
    error = (head(x, t, mixture.z[which])[0] - best).square().mean(dim=1)
    low, middle, high = (float(part.mean()) for part in error.chunk(3))
    return {
        "best": float((eps - best).square().mean()),
        "excess": float(error.mean()),
        "low": low,
        "middle": middle,
        "high": high,
    }


class Ruler:
    """Measures samples against the truth."""

    def __init__(self, mixture: Mixture) -> None:
        D, self.Z = mixture.means.shape[1], len(mixture.z)
        self.n = SAMPLES // self.Z  # samples for each z
        angle = torch.arange(DIRECTIONS) * math.pi / DIRECTIONS
        random = torch.randn(D, DIRECTIONS, generator=torch.Generator().manual_seed(2))
        self.directions = torch.stack([angle.cos(), angle.sin()]) if D == 2 else random / random.norm(dim=0)  # (D, P)
        g = torch.Generator().manual_seed(3)
        self.quantiles, self.std = [], []
        for z in range(self.Z):
            x = mixture.sample(torch.full((TRUTH,), z), g)
            along = (x @ self.directions).sort(dim=0).values  # (TRUTH, P)
            self.quantiles.append(along[((torch.arange(self.n) + 0.5) / self.n * TRUTH).long()])  # (n, P)
            self.std.append(x.std(dim=0))

    def __call__(self, samples: list[Tensor]) -> tuple[float, float]:
        """Samples (n, D) of each z -> their distance from the truth, and the mean ratio of standard deviations."""
        squares, ratios = [], []
        for x, truth, std in zip(samples, self.quantiles, self.std, strict=True):
            both, order = torch.cat([x @ self.directions, truth]).double().sort(dim=0)  # (2n, P)
            gap = torch.where(order < self.n, 1 / self.n, -1 / self.n).cumsum(dim=0)  # F - G
            squares.append(float((2 * gap[:-1].square() * both.diff(dim=0)).sum(dim=0).mean()))
            ratios.append(float((x.std(dim=0) / std).mean()))
        return math.sqrt(statistics.mean(squares)), statistics.mean(ratios)


def measure(folder: Path, count: int) -> list[dict[str, object]]:
    """All rows, from `results.jsonl` as far as they are there."""
    settings = json.dumps({"head": [WIDTH, DEPTH], "batch": BATCH, "updates": count, "samples": SAMPLES})
    made = folder / "settings.json"
    if made.exists() and made.read_text() != settings:
        sys.exit(f"error: --out: {folder} was made with {made.read_text()}, not {settings}; choose another folder")
    made.write_text(settings)
    file = folder / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["mixture"], r["seed"], r["solver"], r["start"], r["steps"]) for r in rows}
    with file.open("a") as out:
        for name, make in MIXTURES.items():
            mixture = make()
            ruler = Ruler(mixture)
            for seed in SEEDS:
                begin = time.perf_counter()
                head = trained(mixture, seed, folder / f"{name}-{seed}.safetensors", count)
                fit = " ".join(f"{k} {v:.5f}" for k, v in excess(head, mixture).items())
                print(f"{name}, seed {seed}: {fit} ({time.perf_counter() - begin:.0f} s)", flush=True)  # noqa: T201
                wanted = [(s, start, n) for s in SOLVERS for start in STARTS for n in STEPS] + [("truth", "", 0)]
                for solver, start, steps in wanted:
                    if (name, seed, solver, start, steps) in done:
                        continue
                    g, samples = torch.Generator().manual_seed(77 + seed), []
                    for z in range(ruler.Z):
                        if solver == "truth":
                            samples.append(mixture.sample(torch.full((ruler.n,), z), g))
                            continue
                        keys = Keys.of("samples", seed, z).fold(torch.arange(ruler.n))
                        options = head.options(num_diffusion_steps=steps, solver=solver, start_timestep=STARTS[start])
                        samples.append(head.sample(mixture.z[z].expand(ruler.n, -1), keys, head.plan(options)))
                    distance, ratio = ruler(samples)
                    row = {"mixture": name, "seed": seed, "solver": solver, "start": start, "steps": steps}
                    rows.append(row | {"distance": distance, "std": ratio})
                    out.write(json.dumps(rows[-1]) + "\n")
                    out.flush()
    return rows


def column(rows: list[dict[str, object]], key: str, **where: object) -> tuple[float, float]:
    """Mean over seeds and standard deviation."""
    values = [float(r[key]) for r in rows if all(r[k] == v for k, v in where.items())]  # type: ignore[arg-type]
    return statistics.mean(values), statistics.stdev(values)


def show(number: float) -> str:
    return f"{number:.4f}" if number < 1 else f"{number:.3g}"


def table(rows: list[dict[str, object]]) -> Iterator[str]:
    """Distance with its spread over seeds, and the ratio of standard deviations in brackets, in markdown."""
    for name in MIXTURES:
        floor = column(rows, "distance", mixture=name, solver="truth")
        yield f"\n{name}; the truth against itself: {floor[0]:.4f} ± {floor[1]:.4f}\n"
        yield "| solver | start | " + " | ".join(map(str, STEPS)) + " |\n|---|---|" + "---|" * len(STEPS)
        for solver in SOLVERS:
            for start in STARTS:
                cells = []
                for steps in STEPS:
                    where = {"mixture": name, "solver": solver, "start": start, "steps": steps}
                    (mean, spread), (ratio, _) = column(rows, "distance", **where), column(rows, "std", **where)
                    cells.append(f"{show(mean)} ± {show(spread)} ({ratio:.3g})")
                yield f"| {solver} | {start} | " + " | ".join(cells) + " |"


def plot(rows: list[dict[str, object]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, name in zip(panels, MIXTURES, strict=True):
        for colour, solver in zip(("tab:blue", "tab:red", "tab:orange", "tab:green"), SOLVERS, strict=False):
            for start, line in zip(STARTS, ("-", ":"), strict=True):
                cells = [column(rows, "distance", mixture=name, solver=solver, start=start, steps=n) for n in STEPS]
                means, spreads = zip(*cells, strict=True)
                panel.errorbar(
                    STEPS,
                    means,
                    spreads,
                    color=colour,
                    linestyle=line,
                    marker=".",
                    capsize=2,
                    label=f"{solver}, {start}",
                )
        floor = column(rows, "distance", mixture=name, solver="truth")[0]
        panel.axhline(floor, color="grey", linewidth=0.8, label="truth")
        panel.set(xscale="log", yscale="log", title=f"{name} mixture", xlabel="steps", ylim=(0.7 * floor, None))
        panel.set_xticks(STEPS, [str(n) for n in STEPS], minor=False)
        panel.set_xticks([], minor=True)
    panels[0].set_ylabel("energy distance from the truth")
    panels[1].legend(fontsize="small")
    figure.savefig(file, dpi=110)


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/known_mixture"))
    parser.add_argument("--plot", type=Path, help="default: solvers.png in --out")
    parser.add_argument("--updates", type=int, default=UPDATES, help="of training")
    arguments = parser.parse_args(command)
    arguments.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter(), time.process_time()
    rows = measure(arguments.out, arguments.updates)
    plot(rows, arguments.plot or arguments.out / "solvers.png")
    print("\n".join(table(rows)))  # noqa: T201
    seconds, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    print(f"\n{seconds:.0f} s, {cpu:.0f} s of processor time")  # noqa: T201


if __name__ == "__main__":
    main()
