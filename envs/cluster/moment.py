"""What a cluster truly holds at one moment, for pictures and timelines; agents see the observation only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from servegym.envs.cluster.schema import EDGE, KINDS, column
from servegym.envs.cluster.scrape import kv_usage
from servegym.envs.cluster.state import NEVER, NONE, PS, REQUEST, World

PHASES = ("outside", "queued", "prefill", "decode", "stopped")
OUTSIDE, QUEUED, PREFILL, DECODE, STOPPED = range(len(PHASES))
COPIES = ("live copy", "about to stop", "last copy")  # by INSTANCE.out_phase
_SWAP, _CAP = column(EDGE, "swap"), column(EDGE, "prefill_cap")


@dataclass(frozen=True)
class Move:
    """A live migration in flight: the request, its instances, which of COPIES, and the stage, from 1."""

    request: int
    source: int
    target: int
    copy: str
    stage: int


@dataclass(frozen=True)
class Moment:
    """One lane now: arrays over the I instances of its fleet, and over the N requests of its episode.

    Attributes:
        now_s: simulated time, seconds.
        waiting, prefilling, decoding: int64 [I], requests.
        held, cached: float64 [I], fractions of the KV blocks that requests hold and that idle prefixes fill.
        host: float64 [I], fraction of the host memory for swapped KV in use; 0 without any.
        begun_s: float64 [I], when what the instance computes now began, seconds; `now_s` where it is idle.
        draining: bool [I], gets no new requests.
        moves: live migrations in flight.
        asked: requests of the open question, by row of the observation; empty at the end of an episode.
        phase: int8 [N], index into PHASES: outside before dispatch and after the end, stopped between the
            last copy of a migration and the next token.
        place: int32 [N], instance; -1 before dispatch.
        streamed: bool [N], has streamed its first token.
        preemptions, migrations: int32 [N], so far.
    """

    now_s: float
    waiting: np.ndarray
    prefilling: np.ndarray
    decoding: np.ndarray
    held: np.ndarray
    cached: np.ndarray
    host: np.ndarray
    begun_s: np.ndarray
    draining: np.ndarray
    moves: tuple[Move, ...]
    asked: tuple[int, ...]
    phase: np.ndarray
    place: np.ndarray
    streamed: np.ndarray
    preemptions: np.ndarray
    migrations: np.ndarray

    @property
    def engaged(self) -> np.ndarray:
        """Source or destination of a live migration, bool [I]."""
        engaged = np.zeros(len(self.waiting), bool)
        for move in self.moves:
            engaged[[move.source, move.target]] = True
        return engaged


def moment_of(world: World, l: int) -> Moment:
    """Look at lane l, which stands at a question or at the end of its episode."""
    lane = world.lane[l]
    now, count = int(lane["now"]), int(lane["instances"])
    instances, settings = world.instance[l, :count], world.setting[lane["fleet"], :count]
    req = world.req[l, : lane["rows"]]
    moves = _moves(instances) if world.episode[lane["episode"]]["migrate_period"] else ()
    # Growth within a decode stretch is an estimate, which must not pass what there is.
    held = np.array([min(kv_usage(world, l, i, now), 1.0) for i in range(count)])
    return Moment(
        now_s=now / PS,
        waiting=instances["waiting"].copy(),
        prefilling=instances["fresh"] + (instances["part"] != NONE),
        decoding=instances["running"].copy(),
        held=held,
        cached=np.minimum(instances["idle_units"] * instances["unit_blocks"] / settings["blocks"], 1 - held),
        host=(settings["host_blocks"] - instances["host_free"]) / np.maximum(settings["host_blocks"], 1),
        begun_s=np.where(instances["until"] != NEVER, instances["begin"], now) / PS,
        draining=settings["drain"] <= now,
        moves=moves,
        asked=_asked(world, l),
        phase=_phases(world, l),
        place=req["instance"].astype(np.int32),
        streamed=req["first"] != NEVER,
        preemptions=req["preemptions"].copy(),
        migrations=req["migrations"].copy(),
    )


def words(observation: Mapping[str, np.ndarray], answer: int, asked: tuple[int, ...]) -> str:
    """What an answer to the observed question means, with the requests' numbers from `Moment.asked`."""
    kind = KINDS[int(observation["kind"])]
    row, target, source = observation["candidates"][answer].tolist()
    edge = observation["edges"][answer]
    request = f"request {asked[row]}" if 0 <= row < len(asked) else "request"
    if kind == "migrate":
        return f"instance {source} to {target}" if answer else "nothing moves"
    if kind == "budget":
        return f"{edge[_CAP]:.0f} prompt tokens an iteration on instance {target}"
    if kind == "preempt":
        return f"{'swap' if edge[_SWAP] else 'recompute'} {request} on instance {target}"
    return f"{request} to instance {target}"


def _asked(world: World, l: int) -> tuple[int, ...]:
    lane = world.lane[l]
    if lane["question"] == KINDS.index("dispatch"):
        return () if lane["pending"] == NONE else (int(lane["pending"]),)
    return tuple(world.offer[l].tolist()) if lane["question"] > 0 else ()


def _moves(instances: np.ndarray) -> tuple[Move, ...]:
    return tuple(
        Move(int(i["out"]), k, int(i["out_to"]), COPIES[i["out_phase"]], int(i["out_stage"]))
        for k, i in enumerate(instances)
        if i["out"] != NONE
    )


def _phases(world: World, l: int) -> np.ndarray:
    """Phase of each request; what is dispatched, unfinished and on no list is between two instances."""
    lane = world.lane[l]
    req = world.req[l, : lane["rows"]]
    inside = (req["dispatched"] != NEVER) & (req["finished"] == NEVER)
    phase = np.where(inside, STOPPED, OUTSIDE).astype(np.int8)
    for i, inst in enumerate(world.instance[l, : lane["instances"]]):
        decoding, prefilled = inst["running"], inst["running"] + inst["fresh"]
        phase[world.run[l, i, REQUEST, :decoding]] = DECODE
        phase[world.run[l, i, REQUEST, decoding:prefilled]] = PREFILL
        if inst["part"] != NONE:
            phase[inst["part"]] = PREFILL
        r = inst["head"]
        while r != NONE:
            phase[r] = QUEUED
            r = req[r]["next"]
    return phase
