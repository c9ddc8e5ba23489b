"""Which iterations are measured: a grid over the profile's tables, random ones between, others kept back.

A shape is what the cost model is asked for: the KV length that each decode reads, and (new, past) tokens of
each prefill chunk. Shapes are drawn log-uniformly, so that small batches get as many points as large ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from servegym.errors import InputError

LEAST_CONTEXT = 32  # shorter contexts cost the launch
KINDS = ("decode", "prefill", "mixed")
MOST_CHUNKS = 8  # of a random shape, where budget and sequences allow
TRIES = 1000  # draws until a random shape fits; one in a few does


@dataclass(frozen=True)
class Shape:
    """One iteration.

    Attributes:
        contexts: KV tokens that each decode reads, its own included.
        chunks: new tokens, and earlier tokens that they attend to, of each prefill chunk.
    """

    contexts: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if not self.chunks:
            return "decode"
        return "mixed" if self.contexts else "prefill"

    @property
    def tokens(self) -> int:
        """Tokens that the linear layers see."""
        return len(self.contexts) + sum(new for new, _ in self.chunks)

    @property
    def sequences(self) -> int:
        """Requests of the iteration."""
        return len(self.contexts) + len(self.chunks)

    @property
    def longest(self) -> int:
        """Tokens of the longest chunk; 0 without one."""
        return max((new for new, _ in self.chunks), default=0)


@dataclass(frozen=True)
class Limits:
    """What the engine can hold.

    Attributes:
        token_budget, max_seqs: most tokens and requests of an iteration.
        max_context: longest request, tokens.
        kv_blocks, block_tokens: the KV pool.
    """

    token_budget: int
    max_seqs: int
    max_context: int
    kv_blocks: int
    block_tokens: int

    def __post_init__(self) -> None:
        """Raise `InputError` for limits without room for a grid."""
        most = min(self.max_context, self.kv_blocks * self.block_tokens)
        for name, least in (("token_budget", 2), ("max_seqs", 1), ("max_context", 2 * LEAST_CONTEXT)):
            if getattr(self, name) < least:
                raise InputError("calibrate", name, getattr(self, name), f"must be at least {least}")
        if self.token_budget <= self.max_seqs:
            hint = f"must exceed max_seqs ({self.max_seqs}), so that prompts get in beside decodes"
            raise InputError("calibrate", "token_budget", self.token_budget, hint)
        if most < self.max_context:
            hint = f"the KV pool of {most} tokens must hold a request of max_context ({self.max_context})"
            raise InputError("calibrate", "kv_blocks", self.kv_blocks, hint)

    def fits(self, shape: Shape) -> bool:
        """Whether an engine with these limits can run the shape."""
        lengths = [*shape.contexts, *(new + past for new, past in shape.chunks)]
        return (
            0 < shape.sequences <= self.max_seqs
            and shape.tokens <= self.token_budget
            and max(lengths) <= self.max_context
            and sum(-(-length // self.block_tokens) for length in lengths) <= self.kv_blocks
        )


@dataclass(frozen=True)
class Axes:
    """Knots of the profile's tables."""

    tokens: tuple[int, ...]
    sequences: tuple[int, ...]
    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    pasts: tuple[int, ...]


@dataclass(frozen=True)
class Design:
    """Shapes to fit on, and shapes that the fit never sees."""

    axes: Axes
    fitted: tuple[Shape, ...]
    held_out: tuple[Shape, ...] = field(default=())


def design(limits: Limits, *, size: int = 40, seed: int = 0) -> Design:
    """Shapes for an engine.

    Args:
        limits: what the engine can hold.
        size: random shapes of each kind to fit on; half as many of each kind are held out.
        seed: of the draws.
    """
    axes = Axes(
        tokens=_doubling(1, limits.token_budget, between=True),
        sequences=_doubling(1, limits.max_seqs),
        contexts=(0, *_doubling(LEAST_CONTEXT, limits.max_context)),
        chunks=(0, *_doubling(min(8, limits.token_budget), min(limits.token_budget, limits.max_context))),
        pasts=(0, *_doubling(LEAST_CONTEXT, limits.max_context)),
    )
    rng = np.random.default_rng(seed)
    fitted = dict.fromkeys(shape for shape in _grid(axes) if limits.fits(shape))
    for kind in KINDS:
        fitted |= dict.fromkeys(_random(kind, limits, rng) for _ in range(size))
    fresh = (_random(kind, limits, rng) for kind in KINDS for _ in range(-(-size // 2)))
    held_out = dict.fromkeys(shape for shape in fresh if shape not in fitted)
    return Design(axes, tuple(fitted), tuple(held_out))


def _doubling(low: int, high: int, *, between: bool = False) -> tuple[int, ...]:
    """low, 2 low, 4 low ... and high; with `between` also the points half-way."""
    points, x = {low, high}, low
    while x < high:
        points |= {x, x + x // 2} if between else {x}
        x *= 2
    return tuple(sorted(point for point in points if point <= high))


def _grid(axes: Axes) -> Iterable[Shape]:
    """Equal decodes by batch and context, and single chunks by new and past tokens."""
    for n in axes.sequences:
        yield from (Shape((context,) * n) for context in axes.contexts[1:])
    for new in axes.chunks[1:]:
        yield from (Shape(chunks=((new, past),)) for past in axes.pasts)


def _random(kind: str, limits: Limits, rng: np.random.Generator) -> Shape:
    """A shape of that kind that fits.

    Raises:
        InputError: when the limits leave no room for one.
    """
    for _ in range(TRIES):
        decodes = 0 if kind == "prefill" else _draw(1, limits.max_seqs, rng)
        contexts = _contexts(decodes, limits, rng)
        chunks = () if kind == "decode" else _chunks(decodes, limits, rng)
        shape = Shape(contexts, chunks)
        if shape.kind == kind and limits.fits(shape):
            return shape
    raise InputError("calibrate", "kv_blocks", limits.kv_blocks, f"leaves no room for a {kind} iteration")


def _contexts(n: int, limits: Limits, rng: np.random.Generator) -> tuple[int, ...]:
    """Unequal contexts as traffic has them: spread evenly around a mean, between nothing and twice it.

    A decode has a prompt and a token at least: it reads two or more.
    """
    mean = _draw(LEAST_CONTEXT, limits.max_context, rng)
    spread = rng.uniform(0, min(mean - 2, limits.max_context - mean))
    return tuple(int(x) for x in np.rint(rng.uniform(mean - spread, mean + spread, n)))


def _chunks(decodes: int, limits: Limits, rng: np.random.Generator) -> tuple[tuple[int, int], ...]:
    """Up to `MOST_CHUNKS` beside so many decodes; every other time they use up the budget, as under load."""
    budget = min(limits.token_budget - decodes, limits.max_context)
    most = min(limits.max_seqs - decodes, MOST_CHUNKS)
    if most < 1:
        return ()
    total = budget if rng.random() < 0.5 else _draw(1, budget, rng)
    cuts = rng.integers(0, total, _draw(1, most, rng) - 1)
    sizes = np.diff([0, *np.sort(cuts), total])
    pasts = ((rng.random() < 0.5 and _draw(1, limits.max_context, rng)) or 0 for _ in sizes)
    chunks = (
        (int(new), min(past, limits.max_context - int(new))) for new, past in zip(sizes, pasts, strict=True)
    )
    return tuple((new, past) for new, past in chunks if new)


def _draw(low: int, high: int, rng: np.random.Generator) -> int:
    """Log-uniform on low..high."""
    return int(np.rint(np.exp(rng.uniform(np.log(low), np.log(high)))))
