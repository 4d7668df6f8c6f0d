"""What version 0.1 computed, computed again from the same draws: loss, gradients, z and tokens of every case.

The draws are played back by path, so their names are tested too. That a path names the token that it says is tested by
changing draws and looking at which token changes.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest
import torch
from numerics_cases import FOLDER, Case, load_case, names, runs
from numerics_replay import Draws, built, now_called, sampled, stepped, trained
from torch import Tensor

from seriatim.checkpoints.renames import renamed
from seriatim.core.keys import ReplayKeys

TRAINING, GRADIENT, SAMPLING = 1e-6, 1e-5, 1e-5  # the last of values up to 1, and relative beyond
# Where a guided density is thin, its inverse CDF magnifies the rounding in which processors differ (docs/heads.md).
EXACT_GUIDANCE = 1e-3

HEADS = ("diffusion", "flow", "mixture", "full", "bins", "categorical", "arinar", "pairs", "bridge")
HEAD = {  # name of a draw -> its shape, after the token's path and the places of parts
    "training": {
        r"t/integers": "M",
        r"t/normal": "M",
        r"eps/normal": "M g",
    },
    "sampling": {
        r"noise/normal": "(T )?g",
        r"component/uniform": "",
        r"value/normal": "g",
        r"product/uniform": "",
        r"candidates/component/uniform": "S",
        r"candidates/value/normal": "S g",
        r"choice/uniform": "",
        r"code/uniform": "",
        r"bin/uniform": "g",
    },
}
IMAGE = {
    "training": {r"step/ratio/uniform": "", r"\d/drop/uniform": "", r"\d/order/permutation": "L"},
    "sampling": {r"\d/order/permutation": "L"},
}


@functools.cache
def case_of(name: str) -> Case:
    return load_case(FOLDER / f"{name}.safetensors")


def close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    if not ours.is_floating_point():
        assert torch.equal(ours, expected), f"{int((ours != expected).sum())} codes differ"
        return
    bound = tolerance * max(1.0, float(expected.abs().max()))
    worst = float((ours - expected).abs().max())
    assert worst <= bound, f"differs by {worst:.3g}, allowed {bound:.3g}"


@pytest.mark.parametrize("name", names())
def test_a_training_step(name: str) -> None:
    case = case_of(name)
    expected, draws = case.training, Draws(case.training.draws)
    model = built(case)
    made = trained(model, expected, draws)
    assert not draws.unused(), f"draws that nobody asked for: {draws.unused()[:3]}"
    close(made.loss, expected.loss, TRAINING)
    assert made.parts.keys() == expected.parts.keys()
    for part, value in expected.parts.items():
        close(made.parts[part], value, TRAINING)
    close(made.z, expected.z, SAMPLING)
    close(made.sums, expected.sums, SAMPLING)
    assert torch.equal(made.counts, expected.counts)
    assert torch.equal(made.rows, expected.rows) and torch.equal(made.places, expected.places)
    gradients = renamed(expected.gradients, 1)
    assert gradients.keys() == dict(model.named_parameters()).keys() == made.gradients.keys()
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        bound = GRADIENT * max(float(gradient.norm()), 1e-4 * largest)  # where all is near 0, rounding is what is left
        assert float((made.gradients[parameter] - gradient).norm()) <= bound, parameter


@pytest.mark.parametrize(("name", "run"), runs())
def test_a_sampling_run(name: str, run: str) -> None:
    case = case_of(name)
    of = case.samplings[run]
    draws, model = Draws(of.draws), built(case)
    drawn = sampled(model, of, draws)
    assert not draws.unused(), f"draws that nobody asked for: {draws.unused()[:3]}"
    guided = of.settings.get("guidance_scale", 1.0) != 1.0
    tolerance = EXACT_GUIDANCE if guided and name.endswith("-arinar") else SAMPLING
    close(drawn, of.result, tolerance)
    *_, last = stepped(model, of, Draws(of.draws))
    assert bool(last.known.all())
    close(last.tokens, of.result, tolerance)
    if of.known is not None:
        assert of.tokens is not None and torch.equal(drawn[of.known], of.tokens[of.known])
        assert len(set(of.known.sum(dim=1).tolist())) == 3, "images begin from different numbers of tokens"


@pytest.mark.parametrize("head", HEADS)
def test_guidance_has_a_say_in_the_fixtures(head: str) -> None:
    case = case_of(f"random-{head}")
    of = case.samplings["guided"]
    other = sampled(built(case), replace(of, settings=of.settings | {"guidance_scale": 1.5}), Draws(of.draws))
    assert not torch.equal(other, of.result)


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_every_draw_has_a_name_of_the_table_and_its_shape(name: str) -> None:
    case = case_of(name)
    L = case.config["tokens"]
    for when, draws in [("training", case.training.draws), *(("sampling", s.draws) for s in case.samplings.values())]:
        assert draws or name.startswith("raster") or name.startswith("adaln")
        parts = {"training": r"(part/token/\d/)*", "sampling": r"(part/\d/)*"}
        if case.config["head"]["kind"] != "nested":
            parts = dict.fromkeys(parts, "")
        for path, value in now_called(draws).items():
            known = {rf"{path}": shape for path, shape in IMAGE[when].items()}
            known |= {rf"\d/token/\d/(step/\d/)?{parts[when]}{path}": shape for path, shape in HEAD[when].items()}
            found = [shape for pattern, shape in known.items() if re.fullmatch(pattern, path)]
            assert len(found) == 1, path
            sizes = {"L": str(L), "S": "20", "M": r"\d", "T": r"\d", "g": r"\d"}
            wanted = "".join(sizes.get(letter, letter) for letter in found[0])
            assert re.fullmatch(wanted, " ".join(map(str, value.shape))), (path, value.shape)


def changed(value: Tensor, by: int) -> Tensor:
    """Another draw of the same kind."""
    return value + by if value.min() < 0 or value.max() > 1 or value.ndim > 1 else (value + 0.249 * by) % 1


def with_other(draws: dict[str, Tensor], begin: str, by: int) -> dict[str, Tensor]:
    return {p: changed(v, by) if p.startswith(begin) and "choice" not in p else v for p, v in draws.items()}


MAPPED = [
    ("masked-flow", "free"),
    ("masked-mixture", "known-interval"),
    ("masked-diffusion", "known-annealed"),
    ("raster-categorical", "guided"),
    ("random-categorical", "known"),
    ("random-mixture", "known"),
    ("random-mixture", "given-order"),
]


@pytest.mark.parametrize(("name", "run"), MAPPED)
def test_other_draws_of_a_token_give_another_token_there(name: str, run: str) -> None:
    """And leave other images as they are. As some token is drawn last, no other token could take the place of all."""
    case = case_of(name)
    of, model, image = case.samplings[run], built(case), 1
    as_recorded = sampled(model, of, Draws(of.draws))  # by this processor, which may round otherwise than another one
    for place in range(case.config["tokens"]):
        begin = f"{image}/token/{place}/"
        if not any(path.startswith(begin) for path in of.draws):
            assert of.known is not None and bool(of.known[image, place])
            continue
        moved = torch.zeros(of.result.shape[:2], dtype=torch.bool)
        for by in (1, 2, 3):
            other = sampled(model, of, Draws(with_other(of.draws, begin, by)))
            differs = other != as_recorded
            moved |= differs if differs.ndim == 2 else differs.any(dim=2)
            if bool(moved[image, place]):
                break
        assert bool(moved[image, place]), f"token {place} stays though its draws are others"
        moved[image] = False
        assert not bool(moved.any()), "another image changes"


@pytest.mark.parametrize("name", ["masked-diffusion", "random-diffusion", "raster-flow", "masked-nestedflow"])
def test_other_draws_of_a_token_give_another_loss_of_that_token(name: str) -> None:
    case = case_of(name)
    of, model, rows = case.training, built(case), range(0, len(case.training.rows), 4)
    before = trained(model, of, Draws(of.draws)).sums
    for row in rows:
        begin = f"{int(of.rows[row])}/token/{int(of.places[row])}/"
        draws = {p: v + 1 if p.startswith(begin) and "eps" in p else v for p, v in of.draws.items()}
        moved = trained(model, of, Draws(draws)).sums != before
        assert moved.nonzero()[:, 0].tolist() == [row]


@pytest.mark.parametrize("name", ["masked-flow", "random-mixture", "raster-categorical", "captions-categorical"])
def test_a_row_of_the_loss_is_the_token_that_it_says(name: str) -> None:
    """Another token in the data changes the loss of its own row, whatever else it changes."""
    case = case_of(name)
    of, model, row = case.training, built(case), 5
    tokens = of.tokens.clone()
    at = int(of.rows[row]), int(of.places[row])
    tokens[at] = (tokens[at] + 3) % 16
    before = trained(model, of, Draws(of.draws)).sums
    moved = trained(model, replace(of, tokens=tokens), Draws(of.draws)).sums != before
    assert bool(moved[row])
    assert not bool(moved[of.rows != at[0]].any())
    if name.startswith("masked"):  # a token asked for is seen by nobody
        assert int(moved.sum()) == 1


def test_parts_are_counted_as_they_are_drawn() -> None:
    """Reversed pairs: other draws for part 1, features 0 and 1, leave part 0 of the token that is drawn last alone."""
    case = case_of("raster-pairs")
    of, model, last = case.samplings["free"], built(case), case.config["tokens"] - 1
    as_recorded = sampled(model, of, Draws(of.draws))
    for part, features in ((0, [2, 3]), (1, [0, 1])):
        draws = with_other(of.draws, f"0/token/{last}/part/{part}/", 1)
        moved = sampled(model, of, Draws(draws))[0, last] != as_recorded[0, last]
        assert bool(moved[features].all()) and (part == 0 or not bool(moved[[2, 3]].any()))


class Lenient(dict[str, Tensor]):
    """Where other draws make a model ask for what was never recorded, it gets one half."""

    def __contains__(self, path: object) -> bool:
        return True

    def __missing__(self, path: str) -> Tensor:
        return torch.tensor(0.5)


def test_steps_of_the_order_confidence_are_counted_from_the_first() -> None:
    """All draws of a token in the first step, and those that change it in the last one, where every token stays."""
    case = case_of("masked-categorical")
    of, model, last = case.samplings["confidence"], built(case), case.samplings["confidence"].settings["steps"] - 1
    for place in range(case.config["tokens"]):
        begin = f"1/token/{place}/step"
        chosen = {
            path: torch.tensor(1 - 2**-24) if path == f"{begin}/0/choice/uniform" else v for path, v in of.draws.items()
        }
        draws = Draws(chosen)
        draws.draws = Lenient(chosen)
        sampled(model, of, draws)
        asked = set(of.draws) - set(draws.unused())
        assert not any(path.startswith(begin) for path in asked if "/step/0/" not in path)
        if f"{begin}/{last}/code/uniform" in of.draws:
            others = [
                sampled(model, of, Draws(with_other(of.draws, f"{begin}/{last}/code", by))) != of.result
                for by in (1, 2, 3)
            ]
            moved = torch.stack(others).any(dim=0)
            assert moved.nonzero().tolist() == [[1, place]]


def test_keys_replay_the_draws_by_their_paths() -> None:
    of = case_of("masked-diffusion").training
    keys = ReplayKeys(of.draws, len(of.tokens))
    ratio = ReplayKeys(of.draws, ["step"]).fold("ratio").uniform()
    masked = keys.fold("order").permutation(9)[:, : len(of.rows) // 3]
    assert sorted(masked[0].tolist()) == of.places[of.rows == 0].tolist() and 0 <= float(ratio) < 1
    tokens = keys.select(of.rows).fold("token").fold(of.places)
    t, eps = tokens.fold("t").integers(1000, 2), tokens.fold("eps").normal(2, 4)
    assert t.shape == (len(of.rows), 2) and eps.shape == (len(of.rows), 2, 4)
    assert keys.fold("drop").uniform().shape == (3,)
    assert len(keys.unused()) == 1, "the ratio, which another object was asked for"


def test_there_is_a_case_of_each_kind() -> None:
    wanted = {f"{trunk}-{head}" for trunk in ("masked", "raster", "random") for head in HEADS}
    assert wanted | {"captions-categorical", "adaln-mixture"} <= set(names())
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2_500_000
