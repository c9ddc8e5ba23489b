"""From times of whole iterations to a profile's tables: non-negative least squares on relative errors.

The cost model is linear in its knots: an iteration is linear(tokens) + head(sequences) + attention, each an
interpolation between knots, and a constant more where it has prompt chunks. So the knots that explain
measured iterations best solve a linear least-squares problem, whole iterations being what counts. Curves may
only rise, and surfaces rise along both axes, the faster the farther out (attention is a product of its axes):
the unknowns are the increments, all of them not negative. Iterations of several chunks tell the constant from
what each chunk costs; without any it stays 0.

A weak penalty on the change of neighbouring slopes fills in what no measurement reaches. What only some
shapes show, skew and the difference that a prefill makes to decodes, stays near 0 until several of them
agree: it would explain the noise of a few, and the times of others would be wrong by up to half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from servegym.envs.costs import cost_tables
from servegym.envs.costs.fitting import as_curve, as_surface, relative_error, rounded
from servegym.envs.costs.profile import Curve, Error, Profile, Surface
from servegym.envs.costs.reference import ReferenceCosts
from servegym.runtime.calibrate.shapes import KINDS, Axes, Shape

ROUGHNESS = 3e-3  # weight of a change of slope against a relative error: below a measurement's noise
RARE = 5e-2  # weight of skew, and of what tells decodes beside a prefill from others: as their noise
US = 1e-6


@dataclass(frozen=True)
class Parts:
    """The fields of a `Profile` that are fitted."""

    linear: Curve
    head: Curve
    prefill_attention: Surface
    decode_attention: Surface
    decode_skew: Curve
    mixed_attention: Surface
    mixed_skew: Curve
    chunked_us: float


def fit(axes: Axes, shapes: Sequence[Shape], seconds: np.ndarray) -> Parts:
    """The tables that explain the measured iterations best.

    Args:
        axes: knots of the tables.
        shapes: iterations of all kinds, each with a time in `seconds`.
    """
    tables = _Tables(axes, has_several=any(len(shape.chunks) > 1 for shape in shapes))
    measured = np.asarray(seconds) / US
    rows = np.stack([tables.row(shape) for shape in shapes]) @ tables.sums
    penalty = tables.penalty() / float(np.median(measured))
    left = np.vstack([rows / measured[:, None], penalty])
    right = np.append(np.ones(len(shapes)), np.zeros(len(penalty)))
    scale = np.linalg.norm(left, axis=0)
    scale[scale == 0] = 1.0
    increments = nnls(left / scale, right, maxiter=50 * left.shape[1])[0] / scale
    return tables.parts(tables.sums @ increments)


def predict(profile: Profile, shapes: Sequence[Shape]) -> np.ndarray:
    """Seconds of each iteration in the cluster model, through its own integer tables; float64 [N]."""
    budget = max(profile.token_budget, *(shape.tokens for shape in shapes))
    costs = ReferenceCosts(cost_tables([profile], budget, profile.max_seqs))
    times = [costs.iteration_ps(0, list(shape.contexts), list(shape.chunks)) for shape in shapes]
    return np.array(times) / 1e12


def errors(profile: Profile, shapes: Sequence[Shape], seconds: np.ndarray) -> dict[str, Error]:
    """Error of the profile on measured iterations by kind, those that there are."""
    predicted, seconds = predict(profile, shapes), np.asarray(seconds)
    kinds = np.array([shape.kind for shape in shapes])
    return {
        k: relative_error(predicted[kinds == k], seconds[kinds == k]) for k in KINDS if (kinds == k).any()
    }


def with_parts(profile: Profile, parts: Parts) -> Profile:
    """The profile with fitted tables in place of its own."""
    return replace(profile, **vars(parts))


class _Tables:
    """All knots in one vector, and how each iteration and each increment goes with them.

    `has_several`: some iterations have several chunks.
    """

    def __init__(self, axes: Axes, has_several: bool) -> None:
        self.axes, self.has_several = axes, has_several
        context = (axes.sequences, axes.contexts)
        self.shapes = {
            "linear": (axes.tokens,),
            "head": (axes.sequences,),
            "prefill_attention": (axes.chunks[1:], axes.pasts),
            "decode_attention": context,
            "decode_skew": (axes.sequences,),
            "mixed_attention": context,
            "mixed_skew": (axes.sequences,),
            "chunked_us": ((1,),),  # one knot: a number
        }
        sizes = [int(np.prod([len(axis) for axis in knots])) for knots in self.shapes.values()]
        ends = np.cumsum([0, *sizes])
        self.where = {n: slice(a, b) for n, a, b in zip(self.shapes, ends[:-1], ends[1:], strict=True)}
        self.size = int(ends[-1])
        self.sums = np.zeros((self.size, self.size))
        for name, knots in self.shapes.items():
            steps = [np.tril(np.ones((len(axis), len(axis)))) for axis in knots]
            if name.endswith("skew"):  # of batches of any size, not rising
                steps = [np.eye(len(knots[0]))]
            self.sums[self.where[name], self.where[name]] = np.kron(*steps) if len(steps) > 1 else steps[0]

    def row(self, shape: Shape) -> np.ndarray:
        """Weights of the knots in the time of an iteration."""
        axes, row = self.axes, np.zeros(self.size)
        row[self.where["linear"]] = _hat(axes.tokens, shape.tokens)
        row[self.where["head"]] = _hat(axes.sequences, shape.sequences)
        for new, past in shape.chunks:
            weights = np.outer(_hat(axes.chunks, new)[1:], _hat(axes.pasts, past))
            row[self.where["prefill_attention"]] += weights.ravel()
        row[self.where["chunked_us"]] = 1.0 if shape.chunks and self.has_several else 0.0
        if shape.contexts:
            kind = "mixed" if shape.chunks else "decode"
            n, mean = len(shape.contexts), sum(shape.contexts) // len(shape.contexts)
            batch = _hat(axes.sequences, n)
            row[self.where[f"{kind}_attention"]] = np.outer(batch, _hat(axes.contexts, mean)).ravel()
            row[self.where[f"{kind}_skew"]] = batch * (max(shape.contexts) - mean)
        return row

    def penalty(self) -> np.ndarray:
        """Rows that weigh changes of slope, skew, and what tells decodes beside a prefill from others."""
        rows, span = [], self.axes.contexts[-1]
        for name, knots in self.shapes.items():
            costs = self.sums[self.where[name]]
            skewed = name.endswith("skew")
            rows.append(RARE * span * costs if skewed else ROUGHNESS * _slopes(knots) @ costs)
        for part, unit in (("attention", 1), ("skew", span)):
            mixed, alone = self.sums[self.where[f"mixed_{part}"]], self.sums[self.where[f"decode_{part}"]]
            rows.append(RARE * unit * (mixed - alone))
        return np.vstack(rows)

    def parts(self, knots: np.ndarray) -> Parts:
        """The vector as tables."""
        found: dict[str, Curve | Surface | float] = {}
        for name, axes in self.shapes.items():
            table = knots[self.where[name]].reshape([len(axis) for axis in axes])
            at = [np.asarray(axis) for axis in axes]
            found[name] = as_surface(at[0], at[1], table) if len(at) > 1 else as_curve(at[0], table)
        (found["chunked_us"],) = rounded(knots[self.where["chunked_us"]])
        return Parts(**found)  # type: ignore[arg-type]


def _hat(knots: Sequence[int], x: float) -> np.ndarray:
    """Weights of the knots in the interpolation at x; the last segment goes on beyond the last knot."""
    at = np.asarray(knots, dtype=float)
    weights = np.zeros(len(at))
    if len(at) == 1 or x <= at[0]:
        weights[0] = 1.0
        return weights
    j = min(int(np.searchsorted(at, x, side="right")) - 1, len(at) - 2)
    share = (x - at[j]) / (at[j + 1] - at[j])
    weights[j : j + 2] = 1 - share, share
    return weights


def _slopes(knots: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Changes of slope along each axis, as rows over the knots; times the span, so that all are costs."""
    sizes = [len(axis) for axis in knots]
    rows = []
    for k, axis in enumerate(knots):
        at = np.asarray(axis, dtype=float)
        bends = np.zeros((max(len(at) - 2, 0), len(at)))
        for j, bend in enumerate(bends):
            left, right = at[j + 1] - at[j], at[j + 2] - at[j + 1]
            bend[j : j + 3] = np.array([1 / left, -1 / left - 1 / right, 1 / right]) * min(left, right)
        whole = [np.eye(size) for size in sizes]
        whole[k] = bends
        rows.append(np.kron(*whole) if len(whole) > 1 else whole[0])
    return np.vstack(rows)
