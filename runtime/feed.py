"""From an observation to what the graph of `servegym.runtime.graph` reads, and the run.

Only what a question has is read: legal candidates, the requests that they join, real instances. Who joins
whom says where each number goes and what the shares are; it comes back from question to question and is
remembered, as is the memory for each shape. What is left of a question is to copy its numbers, to take the
logarithms of what the network sees so, to pick what the graph reads, and the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnxruntime

from servegym.agents.policy import Observation
from servegym.envs.cluster.schema import KINDS, OFFERS
from servegym.errors import InputError
from servegym.models.features import COUNT, IS_LOG, IS_TOTAL, SCALE, TABLES, WIDTH

Key = TypeVar("Key")
Value = TypeVar("Value")
REMEMBERED = 64  # ways to join, and shapes
_INSTANCE, _REQUEST = WIDTH["instances"], WIDTH["requests"]
_ROW, _HISTORY = _INSTANCE + WIDTH["edges"] + 1, _REQUEST + WIDTH["globals"]
_KIND = _HISTORY + WIDTH["history"]
_ASKED = _KIND + len(KINDS)
_MATRICES = ("means", "mine", "pool", "asks")


class Scorer:
    """Scores the candidates of observations of one lane; one thread at a time.

    Args:
        session: of a graph by `servegym.runtime.graph`.

    Attributes:
        rows: most request rows R of an observation.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.rows = OFFERS if "asks" in {node.name for node in session.get_inputs()} else 1
        self._joins: dict[tuple[bytes | int, ...], _Joins] = {}
        self._feeds: dict[tuple[int, ...], _Feed] = {}

    def score(self, obs: Observation) -> tuple[np.ndarray, np.ndarray]:
        """The legal candidates in order, and their scores, overwritten by the next call.

        Raises:
            InputError: for an observation of more request rows.
        """
        key = (
            obs["candidates"].tobytes(), obs["mask"].tobytes(), obs["instance_mask"].tobytes(),
            obs["kind"].tobytes(), obs["requests"].shape[1],
        )  # fmt: skip
        joins = self._joins.get(key)
        if joins is None:
            joins = _remember(self._joins, key, self._join(obs))
        joins.feed.run(obs, joins)
        return joins.legal, joins.scores

    def _join(self, obs: Observation) -> _Joins:
        """Find out who joins whom."""
        if obs["requests"].shape[1] > self.rows:
            raise InputError("policy", "request rows", obs["requests"].shape[1], f"it reads {self.rows}")
        legal, real = (np.flatnonzero(obs[name]) for name in ("mask", "instance_mask"))
        request, instance, _ = obs["candidates"][0][legal].T
        joined = np.bincount(instance, minlength=obs["instances"].shape[1])
        alone = real[joined[real] == 0]
        joined[alone] = 1
        asked = np.bincount(request)
        requests = np.flatnonzero(asked)
        rows = np.concatenate([instance, alone])
        shape = (len(real), len(rows), len(requests), *(obs[name].shape[1] for name in TABLES))
        feed = self._feeds.get(shape)
        if feed is None:
            feed = _remember(self._feeds, shape, _Feed(self._session, obs, *shape[:3]))
        index = feed.index(rows, legal, requests, int(obs["kind"][0]))
        shares = np.zeros(len(feed.shares), np.float32)
        means, mine, pool, asks = feed.matrices(shares)
        share = 1.0 / joined[rows]
        np.multiply(rows[:, None] == rows, share, out=means)
        pool[:] = share / len(real)
        row, own = np.searchsorted(requests, request), np.arange(len(legal))
        mine[row, own], asks[own, row] = 1.0 / asked[request], 1.0
        asks[len(legal) :, 0] = 1.0  # it does not matter what requests send where no candidate is, but g does
        return _Joins(feed, legal, index, shares, feed.logits[: len(legal), 0])


@dataclass(frozen=True, eq=False)
class _Joins:
    """One way in which candidates join requests and instances."""

    feed: _Feed
    legal: np.ndarray
    index: np.ndarray
    shares: np.ndarray
    scores: np.ndarray  # of the feed's latest run


class _Feed:
    """Memory for questions of one shape, which the session reads and writes.

    Args:
        instances, rows, requests: real instances, rows of the graph, and requests that candidates join.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        obs: Observation,
        instances: int,
        rows: int,
        requests: int,
    ) -> None:
        self._rows, self._requests = rows, requests
        # All numbers of an observation, then their logarithms, 0 and 1.
        size = sum(obs[name].size for name in TABLES)
        self._numbers = np.zeros(2 * size + 2, np.float32)
        self._numbers[-1] = 1.0
        self._raw, self._logs = self._numbers[:size], self._numbers[size:-2]
        self._factor = np.empty(size, np.float32)
        self._tables: list[tuple[str, np.ndarray]] = []  # of an observation, by name
        self._places: dict[str, np.ndarray] = {}  # of what a network sees of each table
        start = 0
        for name in TABLES:
            part, shape = slice(start, start := start + obs[name].size), obs[name].shape
            self._tables.append((name, self._raw[part].reshape(shape)))
            self._factor[part].reshape(shape)[...] = _factor(name, instances)
            self._places[name] = (np.arange(size)[part].reshape(shape) + size * IS_LOG[name])[0]
        self._taken = np.empty(rows * _ROW + requests * _ASKED, np.float32)
        self.shares = np.zeros((rows + 3 * requests) * rows, np.float32)
        self.logits = np.zeros((rows, 1), np.float32)
        self._joins: _Joins | None = None
        self._session, self._binding = session, session.io_binding()
        self._bind()

    def _bind(self) -> None:
        arrays = dict(zip(("rows", "asked"), self._inputs(self._taken), strict=True))
        arrays |= zip(_MATRICES, self.matrices(self.shares), strict=True)
        self._values = {  # neither they nor the binding own memory, nor does the binding own them
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()
        }
        for node in self._session.get_inputs():
            self._binding.bind_ortvalue_input(node.name, self._values[node.name])
        self._values["logits"] = onnxruntime.OrtValue.ortvalue_from_numpy(self.logits)
        self._binding.bind_ortvalue_output("logits", self._values["logits"])

    def _inputs(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The graph's `rows` and `asked` in one piece of memory."""
        cut = self._rows * _ROW
        return flat[:cut].reshape(self._rows, _ROW), flat[cut:].reshape(self._requests, _ASKED)

    def matrices(self, flat: np.ndarray) -> tuple[np.ndarray, ...]:
        """The graph's `means`, `mine`, `pool` and `asks` in one piece of memory."""
        n, m = self._rows, self._requests
        a, b, c = n * n, (n + m) * n, (n + 2 * m) * n
        means, mine, pool, asks = flat[:a], flat[a:b], flat[b:c], flat[c:]
        return means.reshape(n, n), mine.reshape(m, n), pool.reshape(m, n), asks.reshape(n, m)

    def index(self, instance: np.ndarray, legal: np.ndarray, requests: np.ndarray, kind: int) -> np.ndarray:
        """Where in all numbers those are that the graph reads of a question.

        Args:
            instance: of each row. legal: candidates; other rows have no edge. requests: those asked about.
        """
        places, zero, one, n = self._places, len(self._numbers) - 2, len(self._numbers) - 1, len(legal)
        index = np.full(len(self._taken), zero)
        rows, asked = self._inputs(index)
        rows[:, :_INSTANCE] = places["instances"][instance]
        rows[:n, _INSTANCE:-1], rows[n:, -1] = places["edges"][legal], one
        asked[:, :_REQUEST] = places["requests"][requests]
        asked[:, _REQUEST:_HISTORY], asked[:, _HISTORY:_KIND] = places["globals"], places["history"]
        asked[:, _KIND + kind] = one
        return index

    def run(self, obs: Observation, joins: _Joins) -> None:
        """Score the candidates of a question."""
        if joins is not self._joins:
            self.shares[:], self._joins = joins.shares, joins
        for name, table in self._tables:
            table[...] = obs[name]
        np.multiply(self._raw, self._factor, self._logs)
        np.log1p(self._logs, self._logs)
        self._numbers.take(joins.index, out=self._taken, mode="clip")  # "raise", the default, is slower
        self._session.run_with_iobinding(self._binding)


def _factor(name: str, instances: int) -> np.ndarray:
    """What a table's logarithms are of, by its numbers, as `features.scale_context` has it.

    Numbers without a logarithm have 0: their scale is 1, so that the graph reads them as they are.
    """
    factor = IS_LOG[name] / SCALE[name].astype(np.float64)
    if name == "globals":
        factor[IS_TOTAL] /= instances
        factor[COUNT] = SCALE[name][COUNT] / instances**2  # the number itself becomes scale / number
    return factor / instances if name == "history" else factor


def _remember(memory: dict[Key, Value], key: Key, value: Value) -> Value:
    """Store a value under a new key; a full memory starts anew."""
    if len(memory) == REMEMBERED:
        memory.clear()
    memory[key] = value
    return value
