"""An episode as a trace in the Trace Event Format, which https://ui.perfetto.dev and chrome://tracing open.

Format: Duca, Sinclair, "Trace Event Format", https://docs.google.com/document/d/
1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU; what Perfetto makes of it:
https://perfetto.dev/docs/getting-started/other-formats#chrome-json-format. Events here are complete slices
(X), instants (i), counters (C), flow arrows (s, f) and names (M); timestamps are microseconds.

Process 1 is the router, process i + 2 instance i. A slice is a phase of a request on an instance: queued,
prefill, decode, or stopped (between the last copy of a migration and the next token). Slices of a track may
not overlap, so each phase has as many tracks as it held requests at most. Arrows lead from where a request
was preempted to where it is computed again, and from one instance to the other when it migrated.

Dispatch, first token and finish are the records', to the nanosecond. What else the scheduler does is seen at
the questions only: a phase starts when the iteration in flight at the first question that sees it began, but
not before the last question that does not; what comes and goes between two questions is not there.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from servegym.envs.cluster.moment import DECODE, OUTSIDE, PHASES, PREFILL, QUEUED, Moment, Move, words
from servegym.envs.cluster.schema import EDGE, KINDS, REQUEST
from servegym.envs.records import Records

Observation = Mapping[str, np.ndarray]
Event = dict[str, Any]

ROUTER, FIRST = 1, 2  # processes: of the router, of instance 0
QUESTIONS, COPIES, TRACKS = 1, 2, 100_000  # tracks; those of phase p start at p * TRACKS


class Watchable(Protocol):
    """An environment of one cluster that shows what is in it."""

    def reset(self, *, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """As Gymnasium."""
        ...

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """As Gymnasium."""
        ...

    def moment(self) -> Moment:
        """What the cluster holds at the question."""
        ...

    def records(self) -> Records:
        """Records of the finished episode."""
        ...


def record_timeline(
    env: Watchable, choose: Callable[[Observation], int], names: Sequence[str], *, seed: int | None = None
) -> dict[str, Any]:
    """Play an episode to its end and return its trace, ready for `json.dump`.

    Args:
        env: the environment; its next episode is played.
        choose: the answer to an observation.
        names: what the instances are called.
        seed: of `env.reset`.

    Raises:
        InputError: for an answer that is not legal.
    """
    timeline = Timeline(names)
    observation, _ = env.reset(seed=seed)
    ended = False
    while not ended:
        answer = choose(observation)
        timeline.add(env.moment(), observation, answer)
        observation, _, ended, _, _ = env.step(answer)
    timeline.add(env.moment())
    return timeline.trace(env.records())


@dataclass(frozen=True)
class _Sight:
    """A change of a request: since when it was so, and when it was last seen otherwise; seconds."""

    at: float
    before: float
    phase: int
    place: int
    preemptions: int
    migrations: int
    streamed: bool


@dataclass(frozen=True)
class _Span:
    """A slice; times in nanoseconds."""

    request: int
    phase: int
    place: int
    start: int
    end: int
    preemptions: int
    migrations: int


class Timeline:
    """Collects what each question sees, and makes a trace of it.

    Args:
        names: what the instances are called.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._events: list[Event] = []
        self._times: list[float] = []
        self._sights: dict[int, list[_Sight]] = {}
        self._last: Moment | None = None
        self._counters: dict[tuple[int, str], dict[str, float]] = {}
        self._copies: dict[tuple[int, int, int], tuple[int, Move]] = {}

    def add(self, moment: Moment, observation: Observation | None = None, answer: int = 0) -> None:
        """See the cluster at a question, with its answer, or at the end of the episode."""
        self._see_requests(moment)
        self._see_copies(moment)
        self._see_counters(moment)
        if observation is not None:
            self._events.append(_question(observation, moment, answer))
        self._times.append(moment.now_s)
        self._last = moment

    def trace(self, records: Records) -> dict[str, Any]:
        """The trace of the episode with these records, all of whose requests have finished."""
        spans = [s for r in range(len(records)) for s in self._spans(records, r)]
        slices, tracks = _place(spans, records)
        events = sorted([*self._events, *slices], key=lambda e: (e["ts"], "dur" not in e))
        return {"traceEvents": [*self._metadata(tracks), *events], "displayTimeUnit": "ms"}

    def _see_requests(self, moment: Moment) -> None:
        keys = [(m.phase, m.place, m.preemptions, m.migrations) for m in (moment, self._last or moment)]
        new, old = (np.stack(key, 1) for key in keys)
        seen = moment.phase != OUTSIDE
        changed = seen if self._last is None else seen & (new != old).any(1)
        before = self._times[-1] if self._times else 0.0
        for r in np.flatnonzero(changed).tolist():
            phase, place, preemptions, migrations = new[r].tolist()
            at = min(max(float(moment.begun_s[place]), before), moment.now_s)
            sight = _Sight(at, before, phase, place, preemptions, migrations, bool(moment.streamed[r]))
            self._sights.setdefault(r, []).append(sight)

    def _see_copies(self, moment: Moment) -> None:
        """A migration is a slice from the first question that sees it to the first that does not."""
        now = {(m.request, m.source, m.target): m for m in moment.moves}
        for key in [key for key in self._copies if key not in now]:
            start, move = self._copies.pop(key)
            self._events.append(_copy_slice(move, start, _ns(moment.now_s)))
        for key, move in now.items():
            start = self._copies[key][0] if key in self._copies else _ns(moment.now_s)
            self._copies[key] = (start, move)

    def _see_counters(self, moment: Moment) -> None:
        for i in range(len(self._names)):
            counters: dict[str, dict[str, float]] = {
                "KV, % of blocks": {"held": _percent(moment.held[i]), "cached": _percent(moment.cached[i])},
                "requests": {
                    "decoding": int(moment.decoding[i]),
                    "prefilling": int(moment.prefilling[i]),
                    "waiting": int(moment.waiting[i]),
                },
                "host memory, %": {"swapped": _percent(moment.host[i])},
            }
            for name, values in counters.items():
                if self._counters.get((i, name)) != values:
                    self._counters[i, name] = values
                    event = _event("C", name, FIRST + i, 0, _ns(moment.now_s))
                    self._events.append(event | {"args": values})

    def _spans(self, records: Records, r: int) -> list[_Span]:
        """The slices of a request, one behind the other from dispatch to finish."""
        sights = self._sights.get(r, [])
        dispatched, first, finished = (
            float(times[r]) for times in (records.dispatched_s, records.first_token_s, records.finished_s)
        )
        place = sights[0].place if sights else int(records.instance[r])
        path = [_Sight(dispatched, dispatched, QUEUED, place, 0, 0, False)]
        path += [sight for sight in sights if not sight.streamed]
        path.append(replace(path[-1], at=first, before=self._before(first), phase=DECODE))
        path += [sight for sight in sights if sight.streamed]
        if path[-1].phase != DECODE:
            seen = self._before(finished)
            path.append(replace(path[-1], at=seen, before=seen, phase=DECODE))
        return _merged(r, path, finished)

    def _before(self, time: float) -> float:
        """The last question before a time."""
        return self._times[max(bisect_left(self._times, time) - 1, 0)]

    def _metadata(self, tracks: Iterable[tuple[int, int]]) -> list[Event]:
        """Names and order of the processes and tracks."""
        names = [_name(ROUTER, "process", "router"), _name(ROUTER, "thread", "questions", QUESTIONS)]
        names += [_name(FIRST + i, "process", f"instance {i}: {name}") for i, name in enumerate(self._names)]
        copying = sorted({e["pid"] for e in self._events if e["tid"] == COPIES})
        names += [_name(pid, "thread", "migrations out", COPIES) for pid in copying]
        for pid, tid in sorted(tracks):
            names.append(_name(pid, "thread", f"{PHASES[tid // TRACKS]} {tid % TRACKS}", tid))
        return names


def _merged(r: int, path: Sequence[_Sight], end: float) -> list[_Span]:
    """Spans between sights; what must have come unseen, a prefill, is drawn from the question before on."""
    marks: list[tuple[int, _Sight]] = []
    for sight in path:
        if marks and sight.phase == DECODE and marks[-1][1].phase == QUEUED:
            computed = replace(sight, phase=PREFILL)
            marks.append((max(marks[-1][0], _ns(sight.before)), computed))
        start = max(_ns(sight.at), marks[-1][0] if marks else 0)
        marks.append((start, sight))
    spans: list[_Span] = []
    ends = [*(start for start, _ in marks[1:]), _ns(end)]
    for (start, s), stop in zip(marks, ends, strict=True):
        span = _Span(r, s.phase, s.place, start, stop, s.preemptions, s.migrations)
        if spans and replace(span, start=spans[-1].start, end=spans[-1].end) == spans[-1]:
            spans[-1] = replace(span, start=spans[-1].start)
        elif start < stop:
            spans.append(span)
    return spans


def _place(spans: Sequence[_Span], records: Records) -> tuple[list[Event], set[tuple[int, int]]]:
    """Slices and arrows, each slice on the lowest track of its instance and phase that is free."""
    free: dict[tuple[int, int], list[int]] = {}
    busy: dict[tuple[int, int], list[tuple[int, int]]] = {}
    tracks: dict[_Span, tuple[int, int]] = {}
    for span in sorted(spans, key=lambda s: (s.start, s.request)):
        key = span.place, span.phase
        idle, held = free.setdefault(key, []), busy.setdefault(key, [])
        while held and held[0][0] <= span.start:
            heapq.heappush(idle, heapq.heappop(held)[1])
        slot = heapq.heappop(idle) if idle else len(held)
        heapq.heappush(held, (span.end, slot))
        tracks[span] = FIRST + span.place, span.phase * TRACKS + slot
    slices = [_slice(span, *tracks[span], records) for span in spans]
    return slices + _arrows(spans, tracks), set(tracks.values())


def _arrows(spans: Sequence[_Span], tracks: Mapping[_Span, tuple[int, int]]) -> list[Event]:
    """From each slice that a preemption or migration ended to where the request went on."""
    arrows: list[Event] = []
    for k, (a, b) in enumerate(pairwise(spans)):
        if a.request != b.request:
            continue
        if b.migrations > a.migrations:
            arrows += _arrow("migration", len(arrows), a, b, tracks)
        if b.preemptions > a.preemptions:
            resumed = next((s for s in spans[k + 1 :] if s.phase != QUEUED), b)
            arrows += _arrow("preemption", len(arrows), a, resumed, tracks)
    return arrows


def _arrow(
    name: str, number: int, a: _Span, b: _Span, tracks: Mapping[_Span, tuple[int, int]]
) -> tuple[Event, Event]:
    # An arrow belongs to the slice around its timestamp, which does not include the slice's end.
    start = _event("s", name, *tracks[a], a.end - 1) | {"cat": name, "id": number}
    return start, _event("f", name, *tracks[b], b.start) | {"cat": name, "id": number, "bp": "e"}


def _slice(span: _Span, pid: int, tid: int, records: Records) -> Event:
    record = {f.name: getattr(records, f.name)[span.request].item() for f in fields(records)}
    event = _event("X", f"request {span.request}", pid, tid, span.start)
    return event | {
        "dur": (span.end - span.start) / 1000,
        "cat": PHASES[span.phase],
        "args": {"request": span.request, **record},
    }


def _copy_slice(move: Move, start: int, end: int) -> Event:
    event = _event(
        "X", f"request {move.request} to instance {move.target}", FIRST + move.source, COPIES, start
    )
    return event | {"dur": (end - start) / 1000, "cat": "copy", "args": asdict(move)}


def _question(observation: Observation, moment: Moment, answer: int) -> Event:
    """An instant: the answer, the requests asked about, and the features in which the answers differ."""
    kind = KINDS[int(observation["kind"])]
    legal = np.flatnonzero(observation["mask"])
    edges = observation["edges"][legal]
    differ = np.flatnonzero((edges != edges[0]).any(0)).tolist()
    rows = sorted({row for row in observation["candidates"][legal, 0].tolist() if row >= 0})
    args = {
        "answer": words(observation, answer, moment.asked),
        "candidate": answer,
        "requests": {
            f"request {moment.asked[row]}": {
                f.name: _short(value)
                for f, value in zip(REQUEST, observation["requests"][row], strict=True)
                if value
            }
            for row in rows
        },
        "candidates": [
            {"candidate": k, "answer": words(observation, k, moment.asked)}
            | {EDGE[j].name: _short(edge[j]) for j in differ}
            for k, edge in zip(legal.tolist(), edges, strict=True)
        ],
    }
    event = _event("i", f"{kind}: {args['answer']}", ROUTER, QUESTIONS, _ns(moment.now_s))
    return event | {"s": "t", "cat": kind, "args": args}


def _name(pid: int, what: str, name: str, tid: int = 0) -> Event:
    return {"ph": "M", "name": f"{what}_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _event(ph: str, name: str, pid: int, tid: int, ns: int) -> Event:
    return {"ph": ph, "name": name, "pid": pid, "tid": tid, "ts": ns / 1000}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _percent(fraction: float) -> float:
    return round(100 * float(fraction), 3)


def _short(value: float) -> float:
    """A float32 with the digits that it has."""
    return float(f"{value:.7g}")
