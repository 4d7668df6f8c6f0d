"""Distances against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from seriatim.core.errors import DataError
from seriatim.evaluation.grid import grid
from seriatim.evaluation.metrics import covariance, frechet_distance, gaussian_frechet, within_class_variance

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
