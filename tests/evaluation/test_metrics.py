"""Distances against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from seriatim.core.errors import DataError
from seriatim.evaluation.grid import grid
from seriatim.evaluation.metrics import (
    accuracy,
    covariance,
    discrepancy,
    frechet_distance,
    frechet_with_error,
    gaussian_frechet,
    inception_score,
    matrix_root,
    random_groups,
    subset_discrepancies,
    with_error,
    within_class_variance,
)
from seriatim.evaluation.neighbours import copying, covered, neighbours, radii

random = np.random.default_rng(0)


def test_identical_sets_have_distance_zero() -> None:
    x = random.normal(size=(200, 8))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-9)


def test_shifted_and_scaled_gaussians() -> None:
    """Diagonal covariances: |m|^2 + sum (s_a - s_b)^2."""
    mean, a, b = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 3.0]), np.array([0.5, 2.0, 1.0])
    expected = (mean**2).sum() + ((a - b) ** 2).sum()
    assert gaussian_frechet(np.zeros(3), np.diag(a**2), mean, np.diag(b**2)) == pytest.approx(expected, rel=1e-12)
    x = random.normal(size=(300, 3))
    assert frechet_distance(x, x + mean) == pytest.approx((mean**2).sum(), rel=1e-9)


def test_agrees_with_the_matrix_root_of_scipy() -> None:
    x, y = random.normal(size=(300, 12)) @ random.normal(size=(12, 12)), random.normal(size=(250, 12)) * 2 + 1
    root = scipy.linalg.sqrtm(covariance(x) @ covariance(y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariance(x) + covariance(y) - 2 * np.real(root))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_fewer_vectors_than_features_is_still_a_number() -> None:
    x, y = random.normal(size=(5, 20)), random.normal(size=(6, 20))
    assert np.isfinite(frechet_distance(x, y)) and frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_within_class_variance() -> None:
    labels = np.array([0, 0, 1, 1])
    assert within_class_variance(np.array([[0.0], [2.0], [10.0], [12.0]]), labels) == pytest.approx(2.0)
    assert within_class_variance(np.array([[1.0], [1.0], [5.0], [5.0]]), labels) == 0, "a collapse shows"
    with pytest.raises(DataError, match="no class has two"):
        within_class_variance(np.zeros((2, 3)), np.array([0, 1]))


@pytest.mark.parametrize("bad", [np.zeros(4), np.zeros((1, 4)), np.full((3, 4), np.nan)])
def test_bad_features_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(DataError):
        frechet_distance(bad, np.zeros((3, 4)))
    with pytest.raises(DataError):
        frechet_distance(np.zeros((3, 5)), np.zeros((3, 4)))


def test_grid() -> None:
    images = [Image.new("L", (8, 8), 10 * i) for i in range(5)]
    sheet = grid(images, columns=3, side=16, gap=2)
    assert sheet.size == (3 * 18 + 2, 2 * 18 + 2)
    assert sheet.getpixel((2 + 18 + 5, 2 + 5)) == 10 and sheet.getpixel((2 + 18 + 5, 2 + 18 + 5)) == 40
    assert grid([Image.new("RGB", (100, 50))], 1).size == (104, 54)


# --- kernel distance ----------------------------------------------------------------------------------------------


def test_kernel_distance_is_the_sum_over_pairs() -> None:
    x, y = random.normal(size=(6, 4)), random.normal(size=(5, 4)) + 1

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    xx = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    yy = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    xy = [k(a, b) for a in x for b in y]
    expected = sum(xx) / 30 + sum(yy) / 20 - 2 * sum(xy) / 30
    assert discrepancy(x, y) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_of_shifted_gaussians() -> None:
    """One feature: E (1 + x y)^3 = 1 + 3 m1 n1 + 3 m2 n2 + m3 n3 by the moments of both."""
    mu = 0.8
    a, b = (0.0, 1.0, 0.0), (mu, 1 + mu**2, mu**3 + 3 * mu)

    def mean(p: tuple[float, ...], q: tuple[float, ...]) -> float:
        return 1 + sum(w * m * n for w, m, n in zip((3, 3, 1), p, q, strict=True))

    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)

    def mean_of(shift: float) -> tuple[float, float]:
        draws = [discrepancy(random.normal(size=(20, 1)), random.normal(size=(20, 1)) + shift) for _ in range(2000)]
        return float(np.mean(draws)), float(4 * np.std(draws) / 2000**0.5)

    found, error = mean_of(mu)
    assert found == pytest.approx(expected, abs=error)
    found, error = mean_of(0)
    assert found == pytest.approx(0, abs=error), "unbiased, whatever the number"


def test_kernel_distance_of_large_sets_is_that_of_their_subsets() -> None:
    x, y = random.normal(size=(1500, 8)), random.normal(size=(1400, 8)) + 0.5
    assert subset_discrepancies(x, y, 30, 500).mean() == pytest.approx(discrepancy(x, y), rel=0.05)
    assert (subset_discrepancies(x, y, 3) == subset_discrepancies(x, y, 3)).all(), "the seed decides"


def test_kernel_distance_agrees_with_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = random.normal(size=(40, 7)), random.normal(size=(40, 7)) * 1.3
    expected = float(kid.poly_mmd(torch.from_numpy(x), torch.from_numpy(y)))
    assert discrepancy(x, y) == pytest.approx(expected, rel=1e-9)


# --- precision and recall -----------------------------------------------------------------------------------------


def interval(low: float, high: float, n: int = 2000) -> np.ndarray:
    return random.uniform(low, high, size=(n, 1))


@pytest.mark.parametrize(
    ("real", "samples", "precision", "recall"),
    [
        ((0, 1), (0, 1), 1, 1),
        ((0, 1), (2, 3), 0, 0),
        ((0, 1), (0.5, 1.5), 0.5, 0.5),
        ((0, 1), (0.2, 0.5), 1, 0.3),  # half of the modes: precise, little recall
        ((0.2, 0.5), (0, 1), 0.3, 1),
    ],
)
def test_precision_and_recall_of_known_supports(
    real: tuple[float, float], samples: tuple[float, float], precision: float, recall: float
) -> None:
    # Balls around random points leave about (1/2)^(2k) of a line uncovered: 2 % for k = 3.
    x, y = interval(*real), interval(*samples)
    assert covered(y, x, radii(x, 3)) == pytest.approx(precision, abs=0.04)
    assert covered(x, y, radii(y, 3)) == pytest.approx(recall, abs=0.04)


def test_precision_and_recall_of_identical_sets() -> None:
    x = random.normal(size=(100, 5)) + 1e4  # far from zero
    assert covered(x, x, radii(x, 3)) == 1
    with pytest.raises(DataError, match="k: 3 neighbours among 3"):
        radii(x[:3], 3)


def test_neighbours_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    import seriatim.evaluation.neighbours as module

    monkeypatch.setattr(module, "CHUNK", 100)
    x, y = random.normal(size=(23, 3)), random.normal(size=(17, 3))
    brute = np.linalg.norm(x[:, None] - y[None], axis=2)
    distances, which = neighbours(x, y, 4)
    assert np.allclose(distances, np.sort(brute, axis=1)[:, :4], atol=1e-12)
    assert (which == np.argsort(brute, axis=1)[:, :4]).all()
    assert (neighbours(x, x, 1, itself=False)[1][:, 0] != np.arange(23)).all()
    with pytest.raises(DataError, match="18 neighbours among 17"):
        neighbours(x, y, 18)


def test_copies_show() -> None:
    train, held_out, samples = (random.normal(size=(400, 4)) for _ in range(3))
    assert copying(samples, train, held_out) == pytest.approx(1, abs=0.15)
    assert copying(train[:50] + 1e-3, train, held_out) < 0.01
    with pytest.raises(DataError, match="hold out others"):
        copying(samples, train, train)


# --- of classes ---------------------------------------------------------------------------------------------------


def test_inception_score() -> None:
    assert inception_score(np.zeros((10, 5))) == pytest.approx(1), "no image is like any class"
    certain = 1000.0 * np.eye(5)[np.arange(50) % 5]
    assert inception_score(certain) == pytest.approx(5), "certain and balanced: the number of classes"
    assert inception_score(certain[np.arange(50) % 5 < 2]) == pytest.approx(2), "two modes of five"
    p = np.array([[0.5, 0.5], [0.9, 0.1]])
    m = p.mean(axis=0)
    assert inception_score(np.log(p)) == pytest.approx(np.exp((p * np.log(p / m)).sum(axis=1).mean()), rel=1e-12)


def test_accuracy() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    assert accuracy(logits, np.array([0, 1, 1])) == pytest.approx(2 / 3)
    for labels in (np.array([0, 1]), np.array([0, 1, 2])):
        with pytest.raises(DataError, match="labels"):
            accuracy(logits, labels)


# --- spread -------------------------------------------------------------------------------------------------------


def test_error_is_that_of_another_draw() -> None:
    """Of a mean: the standard error; of a Frechet distance: the spread over sets drawn anew."""
    x = random.normal(size=1000)
    found = with_error(lambda i: float(x[i].mean()), 1000, groups=100)
    assert found.value == pytest.approx(x.mean()) and found.error == pytest.approx(x.std() / 1000**0.5, rel=0.25)
    reference = random.normal(size=(500, 4))

    def distance(y: np.ndarray) -> float:
        return frechet_distance(y + 0.5, reference)

    anew = np.std([distance(random.normal(size=(300, 4))) for _ in range(100)])
    errors = []
    for _ in range(20):
        y = random.normal(size=(300, 4))
        error = with_error(lambda i: distance(y[i]), 300).error  # noqa: B023
        errors.append(error)
    assert np.mean(errors) == pytest.approx(anew, rel=0.3)


def test_error_of_a_frechet_distance_from_sums_over_groups() -> None:
    x, y = random.normal(size=(57, 4)) * 0.1 + 50, random.normal(size=(80, 4)) * 0.1 + 50
    slow = with_error(lambda i: frechet_distance(x[i], y), len(x))
    fast = frechet_with_error(x, y.mean(axis=0), covariance(y), matrix_root(covariance(y)))
    assert fast.value == pytest.approx(slow.value, rel=1e-9) and fast.error == pytest.approx(slow.error, rel=1e-6)
    assert sorted(np.concatenate(random_groups(23)).tolist()) == list(range(23)) and len(random_groups(3)) == 3


def test_everything_is_float64() -> None:
    """float32 sums of large numbers would lose the difference."""
    x = (random.normal(size=(500, 3)) * 1e-3 + 1e4).astype(np.float64)
    shifted = x + np.array([1e-3, 0, 0])
    assert frechet_distance(x, shifted) == pytest.approx(1e-6, rel=1e-5)
