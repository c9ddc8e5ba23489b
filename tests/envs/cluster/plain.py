"""A lane in plain Python: what the questions of the kernels are held to, worked out from its state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servegym.envs.cluster.state import (
    FINISH,
    NEVER,
    NONE,
    OFFSET,
    ORDER,
    PS,
    REQUEST,
    World,
)
from servegym.envs.costs.model import iteration_ps, prefill_ps

PREFIX_TOKENS = 16


@dataclass
class Running:
    """A running request as the engine has it."""

    r: int
    order: int
    kv: int
    streamed: int
    decodes: bool = True


class Plain:
    """Lane 0 in plain Python."""

    def __init__(self, world: World) -> None:
        self.world, self.lane, self.inst, self.req = world, world.lane[0], world.instance[0], world.req[0]
        self.row = world.row[self.lane["first_row"] :]
        self.setting = world.setting[self.lane["fleet"]]
        self.now = int(self.lane["now"])
        self.instances = range(int(self.lane["instances"]))

    def steps_done(self, i: int) -> int:
        inst = self.inst[i]
        if inst["steps"] <= 1:
            return 0
        part = (self.now - int(inst["begin"])) / (int(inst["until"]) - int(inst["begin"]))
        return min(int(inst["steps"] * part), int(inst["steps"]) - 1)

    def decoding(self, i: int) -> list[Running]:
        inst, run = self.inst[i], self.world.run[0, i]
        found = []
        for k in range(inst["running"]):
            r = int(run[REQUEST, k])
            clock, steps = int(inst["clock"]), self.steps_done(i)
            streamed = int(self.row["output"][r]) - (int(run[FINISH, k]) - clock) + steps
            found.append(Running(r, int(run[ORDER, k]), int(run[OFFSET, k]) + clock - 1 + steps, streamed))
        return found

    def running(self, i: int) -> list[Running]:
        part = int(self.inst[i]["part"])
        if part == NONE:
            return self.decoding(i)
        done = int(self.req["done"][part])
        return [*self.decoding(i), Running(part, int(NEVER), int(self.inst[i]["part_done"]), done, False)]

    def waiting(self, i: int) -> list[int]:
        found, r = [], int(self.inst[i]["head"])
        while r != NONE:
            found.append(r)
            r = int(self.req["next"][r])
        return found

    def streamed(self, r: int) -> int:
        known = {x.r: x.streamed for x in self.running(int(self.req["instance"][r]))}
        return known.get(r, int(self.req["done"][r]))

    def left(self, r: int) -> int:
        return max(int(self.row["predicted"][r]) - self.streamed(r), 0)

    def inflight(self, i: int) -> list[int]:
        there = (self.req["instance"] == i) & (self.req["finished"] == NEVER)
        return np.flatnonzero(there).tolist()

    def books(self, i: int) -> tuple[int, int, int]:
        """Requests, context tokens and predicted tokens in flight."""
        there = self.inflight(i)
        streamed = sum(self.streamed(r) for r in there)
        context = sum(int(self.row["prompt"][r]) for r in there) + streamed
        return len(there), context, max(0, sum(int(self.row["predicted"][r]) for r in there) - streamed)

    def queue_s(self, i: int) -> float:
        first = [int(self.req["booked"][r]) for r in self.inflight(i) if self.req["first"][r] == NEVER]
        return sum(first) / self.setting[i]["prefill_tokens_per_s"]

    def capacity(self, i: int) -> int:
        return int(self.setting[i]["blocks"] * self.setting[i]["block_tokens"])

    def blocks(self, i: int, tokens: int) -> int:
        return -(-tokens // int(self.setting[i]["block_tokens"]))

    def step_s(self, i: int, n: int, context: int) -> float:
        if n == 0:
            return 0.0
        p = self.setting[i]["profile"]
        return iteration_ps(self.world.tables, p, n, context, context // n, n, n, 0, 0) / PS

    def prefill_s(self, i: int, tokens: int, past: int) -> float:
        total, p = 0, self.setting[i]["profile"]
        while tokens > 0:
            chunk = min(tokens, int(self.inst[i]["cap"]))
            attention = prefill_ps(self.world.tables, p, chunk, past)
            total += iteration_ps(self.world.tables, p, 0, 0, 0, chunk, 1, attention, chunk)
            tokens, past = tokens - chunk, past + chunk
        return total / PS

    def cached(self, i: int) -> dict[int, int]:
        """Holders of each cached prefix block."""
        units = self.world.slot[0, i][self.world.slot[0, i] > 0] - 1
        return {int(u["key"]): int(u["holders"]) for u in self.world.unit[0, i][units]}

    def prefix(self, r: int) -> list[int]:
        first = int(self.row["prefix"][r])
        return self.world.prefix[first : first + int(self.row["prefixes"][r])].tolist()

    def hit(self, i: int, r: int) -> int:
        goal = int(self.row["prompt"][r]) + self.streamed(r)
        cached, hits = self.cached(i), 0
        for key in self.prefix(r)[: (goal - 1) // PREFIX_TOKENS]:
            if key not in cached:
                break
            hits += 1
        return hits * PREFIX_TOKENS

    def drains(self, i: int) -> bool:
        return self.now >= self.setting[i]["drain"]

    def engaged(self, i: int) -> bool:
        return self.inst[i]["out"] != NONE or self.inst[i]["inbound"] != NONE

    def fits(self, i: int, r: int) -> bool:
        room = (self.setting["blocks"] - self.setting["watermark"]) * self.setting["block_tokens"]
        largest = max(room[k] for k in self.instances if self.setting[k]["drain"] == NEVER)
        tokens = min(self.row["prompt"][r] + self.lane["longest_output"], largest)
        return tokens <= room[i] and not self.drains(i)

    def can_move(self, s: int, d: int, r: int) -> bool:
        if s == d or not self.fits(d, r):
            return False
        if r in self.waiting(s):
            return self.req["hosted"][r] == 0
        known = {x.r: x for x in self.decoding(s)}
        if r not in known or self.engaged(s) or self.engaged(d) or self.inst[d]["joiner"] != NONE:
            return False
        inst, setting = self.inst[d], self.setting[d]
        if inst["running"] + inst["fresh"] + (inst["part"] != NONE) + 1 > setting["max_seqs"]:
            return False
        # Behind a cut all steps but the one in flight have ended.
        ended = max(int(self.inst[s]["steps"]) - 1, 0)
        tokens = known[r].kv - self.steps_done(s) + ended
        size = int(self.setting[s]["block_tokens"])
        return self.blocks(d, tokens // size * size) <= inst["free"] - setting["watermark"]

    def default_mover(self, i: int) -> int:
        decoding = self.decoding(i)
        if decoding:
            return max(decoding, key=lambda x: (self.row["priority"][x.r], x.order)).r
        return int(self.inst[i]["tail"])

    def freeness(self, i: int) -> float:
        demand = sum(int(self.row["prompt"][r] + self.req["done"][r]) for r in self.waiting(i))
        inst = self.inst[i]
        batch = inst["running"] + inst["fresh"] + (inst["part"] != NONE) + (inst["waiting"] > 0)
        return (int(inst["free"]) * int(self.setting[i]["block_tokens"]) - demand) / max(batch, 1)

    def movers(self, s: int, d: int) -> list[int]:
        legal = [x for x in self.decoding(s) if self.can_move(s, d, x.r)]
        default, waiting = self.default_mover(s), self.waiting(s)
        rows = [default] if default != NONE and self.can_move(s, d, default) else []
        if legal:
            rows += [
                min(legal, key=lambda x: (x.kv, -x.order)).r,
                max(legal, key=lambda x: (x.kv, x.order)).r,
                max(legal, key=lambda x: (self.left(x.r), x.order)).r,
                max(legal, key=lambda x: x.order).r,
            ]
        if waiting:
            rows += [r for r in (waiting[-1], waiting[0]) if self.can_move(s, d, r)]
        return list(dict.fromkeys(rows))

    def victims(self, i: int) -> list[int]:
        running = self.running(i)
        keys = (
            lambda x: -x.order,
            lambda x: (-x.kv, -x.order),
            lambda x: (-self.left(x.r), -x.order),
            lambda x: (-self.row["priority"][x.r], -self.req["arrived"][x.r], -x.r),
        )
        return list(dict.fromkeys(x.r for key in keys for x in sorted(running, key=key)[:2]))

    def sources(self) -> list[int]:
        found = [
            i
            for i in self.instances
            if self.inst[i]["paired"] != self.now
            and (self.waiting(i) or (self.inst[i]["running"] > 0 and not self.engaged(i)))
        ]
        return sorted(found, key=lambda i: (not self.drains(i), self.freeness(i), i))[:4]

    def destinations(self) -> list[int]:
        found = [i for i in self.instances if self.inst[i]["paired"] != self.now and not self.drains(i)]

        def key(i: int) -> tuple:
            return self.engaged(i) or self.inst[i]["joiner"] != NONE, -self.freeness(i), i

        return sorted(found, key=key)[:4]
