"""Image metrics against independent computations."""

import numpy as np
import pytest
import scipy.linalg

from eval import metrics


def test_ssim_equals_windows_spelled_out():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 14, 12, 3)).astype(np.uint8)
    y = np.clip(x + rng.normal(0, 20, x.shape), 0, 255)
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    g = np.outer(g, g) / g.sum() ** 2
    values = []
    for row in range(4):
        for column in range(2):
            a, b = (np.float64(t[0, row : row + 11, column : column + 11, 1]) for t in (x, y))
            ma, mb = (g * a).sum(), (g * b).sum()
            va, vb = (g * (a - ma) ** 2).sum(), (g * (b - mb) ** 2).sum()
            cov = (g * (a - ma) * (b - mb)).sum()
            c1, c2 = 2.55**2, 7.65**2
            luminance = (2 * ma * mb + c1) / (ma**2 + mb**2 + c1)
            values.append(luminance * (2 * cov + c2) / (va + vb + c2))
    assert metrics.ssim(x[:1, ..., 1:2], y[:1, ..., 1:2]) == pytest.approx(np.mean(values))
    np.testing.assert_allclose(metrics.ssim(x, x), 1.0)
    np.testing.assert_allclose(metrics.ssim(x[:, :5, :5], x[:, :5, :5]), 1.0)  # a smaller window


def test_frechet_distance_equals_matrix_square_root():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    y = rng.normal(size=(150, 12)) @ rng.normal(size=(12, 12)) + 0.5
    (m1, c1), (m2, c2) = metrics.gaussian_statistics(x), metrics.gaussian_statistics(y)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
    assert metrics.frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_one_set_is_zero_even_when_singular():
    x = np.random.default_rng(1).normal(size=(8, 20))  # rank 7 of 20
    m, c = metrics.gaussian_statistics(x)
    # Rounding leaves eigenvalues of 1e-16 instead of 0; their roots are 1e-8.
    assert metrics.frechet_distance(m, c, m, c) == pytest.approx(0.0, abs=1e-5)


def test_kernel_distance_equals_plain_loops():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(6, 5)) + 1.0

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(6) for j in range(6) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert metrics.kernel_distance(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_kernel_distance_is_unbiased_and_grows():
    rng = np.random.default_rng(3)
    same = [
        metrics.kernel_distance(rng.normal(size=(40, 8)), rng.normal(size=(40, 8)))
        for _ in range(200)
    ]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    x = rng.normal(size=(100, 8))
    distances = [metrics.kernel_distance(x, rng.normal(size=(100, 8)) + s) for s in (0.3, 1.0, 3.0)]
    assert distances == sorted(distances)


def test_kernel_distance_names_too_few_samples():
    with pytest.raises(ValueError, match="at least 2 samples"):
        metrics.kernel_distance(np.zeros((1, 3)), np.zeros((5, 3)))


def test_psnr():
    reference = np.zeros((2, 4, 4, 3), np.uint8)
    images = reference.copy()
    images[0] += 10
    expected = 20 * np.log10(255 / 10)
    got = metrics.psnr(images, reference)
    assert got[0] == pytest.approx(expected) and np.isinf(got[1])
