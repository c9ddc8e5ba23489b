"""Token-length models: lognormal mixtures or quantile tables, tied by a Gaussian copula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import ndtr

from servegym.envs.workloads.fits import quantile_p

Quantile = Callable[[np.ndarray], np.ndarray]
"""Inverse distribution function: uniforms in (0, 1) of any shape -> float64 values of that shape."""

GRID_POINTS = 65_536  # resolution of an inverted mixture; wider supports than this are inverted on a log grid


def quantile_function(marginal: dict[str, Any]) -> Quantile:
    """Inverse distribution function of one marginal of fits.json (real valued, inside the clip)."""
    return _table(marginal["quantiles"]) if "quantiles" in marginal else _mixture(marginal)


def tokens(quantile: Quantile, u: np.ndarray) -> np.ndarray:
    """Whole token counts, int64 and at least 1, for the uniforms `u`."""
    return np.maximum(np.rint(quantile(u)), 1).astype(np.int64)


def correlated_uniforms(rng: np.random.Generator, correlation: np.ndarray, count: int) -> np.ndarray:
    """Uniforms of a Gaussian copula: shape [K, count] for a K x K correlation matrix of the normals."""
    normals = np.linalg.cholesky(np.asarray(correlation)) @ rng.standard_normal((len(correlation), count))
    return ndtr(normals, out=normals)


def sample_lengths(
    rng: np.random.Generator, lengths: dict[str, Any], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output tokens of `count` requests: int64 arrays of that length."""
    rho = lengths["rho"]
    u = correlated_uniforms(rng, np.array([[1.0, rho], [rho, 1.0]]), count)
    return (
        tokens(quantile_function(lengths["prompt"]), u[0]),
        tokens(quantile_function(lengths["output"]), u[1]),
    )


def _table(x: list[float]) -> Quantile:
    p, log_x = np.array(quantile_p()), np.log1p(x)
    return lambda u: np.expm1(np.interp(u, p, log_x))


def _mixture(marginal: dict[str, Any]) -> Quantile:
    """Invert the distribution on a grid of support points: the whole numbers of the clip, or a log grid.

    P(X <= k) = sum of the atoms up to k + (1 - all atoms) * mixture(k), clamped to the clip.
    """
    low, high = marginal["clip"]
    shift = marginal.get("shift", 0)
    if high - low < GRID_POINTS:
        support = np.arange(low, high + 1, dtype=np.float64)
        edges = support + 0.5  # values are rounded
    else:
        support = np.geomspace(max(low, 0.01), high, GRID_POINTS)
        edges = support
    weight, mu, sigma = np.array(marginal["mixture"]).T
    log_edge = np.log(np.maximum(edges + shift, 1e-9))
    cdf = ndtr((log_edge[:, None] - mu) / sigma) @ (weight / weight.sum())
    atoms = np.array(marginal.get("atoms", np.empty((0, 2)))).reshape(-1, 2)
    cdf *= 1 - atoms[:, 1].sum()
    for value, probability in atoms:
        cdf[np.searchsorted(support, value) :] += probability
    cdf[-1] = 1.0
    return lambda u: support[np.searchsorted(cdf, u)]
