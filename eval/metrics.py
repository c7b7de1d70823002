"""Image metrics on arrays: PSNR, Frechet distance, kernel distance. float64, no model inside."""

import numpy as np


def psnr(images: np.ndarray, references: np.ndarray, peak: float = 255.0) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each picture [n, ...]; infinite where they are equal."""
    difference = np.asarray(images, np.float64) - np.asarray(references, np.float64)
    mse = np.mean(difference.reshape(len(difference), -1) ** 2, axis=1)
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(peak**2 / mse)


def ssim(images: np.ndarray, references: np.ndarray, peak: float = 255.0) -> np.ndarray:
    """Structural similarity of pictures [n, h, w, c], 1 where equal (Wang et al. 2004).

    Gaussian window of 11 x 11 (or the picture, where it is smaller), sigma 1.5, K = 0.01, 0.03, at
    every place it fits in; means over places and channels.
    """
    x, y = np.asarray(images, np.float64), np.asarray(references, np.float64)
    rows, columns = (_gaussian_windows(side) for side in x.shape[1:3])

    def local(t):
        return np.einsum("ph,nhwc,qw->npqc", rows, t, columns, optimize=True)

    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    values = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    values /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return values.mean((1, 2, 3))


def _gaussian_windows(side: int, width: int = 11, sigma: float = 1.5) -> np.ndarray:
    """[places, side]: the weights of a Gaussian window at every place it fits in."""
    width = min(width, side)
    weights = np.exp(-((np.arange(width) - (width - 1) / 2) ** 2) / (2 * sigma**2))
    places = np.zeros((side - width + 1, side))
    for i, row in enumerate(places):
        row[i : i + width] = weights / weights.sum()
    return places


def gaussian_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and unbiased covariance [d, d] of features [n, d]."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(mean1, cov1, mean2, cov2) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), the root through the eigenvalues of C1 C2.

    Only with the 2015 TensorFlow Inception features may the number be called FID.
    """
    mean1, mean2 = np.asarray(mean1, np.float64), np.asarray(mean2, np.float64)
    eigenvalues = np.linalg.eigvals(np.asarray(cov1, np.float64) @ np.asarray(cov2, np.float64))
    # C1 C2 is similar to a positive semi-definite matrix: what is negative is rounding.
    root_trace = np.sqrt(np.clip(eigenvalues.real, 0.0, None)).sum()
    shift = mean1 - mean2
    return float(shift @ shift + np.trace(cov1) + np.trace(cov2) - 2.0 * root_trace)


def kernel_distance(features1: np.ndarray, features2: np.ndarray) -> float:
    """KID: unbiased squared MMD with the kernel (x.y / d + 1)^3 between [n, d] and [m, d]."""
    x, y = np.asarray(features1, np.float64), np.asarray(features2, np.float64)
    n, m, d = len(x), len(y), x.shape[1]
    if min(n, m) < 2:
        raise ValueError(f"the kernel distance needs at least 2 samples a side, got {n} and {m}")

    def kernel(a, b):
        return (a @ b.T / d + 1.0) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    within_x = (xx.sum() - np.trace(xx)) / (n * (n - 1))
    within_y = (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within_x + within_y - 2.0 * kernel(x, y).mean())
