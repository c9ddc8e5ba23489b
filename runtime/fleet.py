"""What the engines of a cluster cost and hold: their settings, and the estimates of the observation in numpy.

The numbers equal those of the kernels in `servegym.envs.cluster`: the same integer tables, the same order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servegym.envs.cluster import schema
from servegym.envs.cluster.settings import DECODE_CONTEXT, DECODE_REQUESTS, Setting, setting_of_spec
from servegym.envs.cluster.spec import InstanceSpec
from servegym.envs.cluster.state import PS
from servegym.envs.costs.profile import Profile, load_profile
from servegym.envs.costs.reference import ReferenceCosts
from servegym.envs.costs.tables import CostTables, cost_tables, glance
from servegym.errors import InputError

SECOND = 1.0 / PS
_APART = 1 << 40  # more tokens of context than there are


@dataclass(frozen=True, eq=False)
class InstanceSettings:
    """One engine replica as it was started: its cost profile and its settings in the model's units.

    `InstanceSettings.of("a100-llama-3.1-8b", kv_blocks=4096)` makes one.

    Attributes:
        profile: what its iterations cost.
        setting: blocks, budgets, swap and network costs; see `Setting`.
        prefill_tokens_per_s: of one full chunk without past.
        decode_tokens_per_s: of 64 requests (at most max_seqs) of 1,024 tokens.
        stays: whether it is meant to stay; others drain at a time that is known beforehand.
    """

    profile: Profile
    setting: Setting
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    stays: bool = True

    @classmethod
    def of(
        cls,
        spec: InstanceSpec | str | Path,
        *,
        prefix_caching: bool = True,
        migrates: bool = False,
        **settings: Any,
    ) -> InstanceSettings:
        """Settings from a spec, or from a profile's name or path and fields of `InstanceSpec`.

        Raises:
            InputError: unknown profile, or settings that contradict each other.
        """
        if not isinstance(spec, InstanceSpec):
            known = [name for name in InstanceSpec.__dataclass_fields__ if name != "profile"]
            for name in settings:
                if name not in known:
                    raise InputError(spec, "settings", name, f"choose from {', '.join(known)}")
            spec = InstanceSpec(str(spec), **settings)
        elif settings:
            raise InputError(spec.profile, "settings", sorted(settings), "put them into the spec")
        profile = load_profile(spec.profile)
        setting = setting_of_spec("instance", spec, profile, prefix_caching=prefix_caching, migrates=migrates)
        return cls(profile, setting, *_speeds(profile, setting), stays=spec.drain_at_s is None)

    @property
    def kv_tokens(self) -> int:
        """KV capacity in tokens."""
        return self.setting.blocks * self.setting.block_tokens

    @property
    def room_tokens(self) -> int:
        """Tokens that it can hold when nothing else is there."""
        return (self.setting.blocks - self.setting.watermark) * self.setting.block_tokens

    def blocks_of(self, tokens: int) -> int:
        """KV blocks that hold so many tokens."""
        return -(-tokens // self.setting.block_tokens)


def _speeds(profile: Profile, setting: Setting) -> tuple[float, float]:
    """Tokens per second of prefill and decode, as the model quotes them."""
    costs = ReferenceCosts(cost_tables([profile], setting.budget, setting.max_seqs))
    prefill = setting.budget / (costs.iteration_ps(0, [], [(setting.budget, 0)]) / PS)
    n = min(DECODE_REQUESTS, setting.max_seqs)
    length = max(1, min(DECODE_CONTEXT, setting.blocks * setting.block_tokens // n))
    return prefill, n / (costs.iteration_ps(0, [length] * n, []) / PS)


class Fleet:
    """Constants of a list of instances, and what their iterations cost.

    Attributes:
        nodes: float32 [I, INSTANCE], the features that never change, others 0. mask: int8 [1, I], ones.
        capacity: int64 [I], KV tokens; max_seqs: int64 [I]; prefill_speed: float64 [I], tokens/s.
        room: int64 [I], tokens that each can hold when empty; least_room: of these the least.
        profile: row of the cost tables of each instance.
    """

    def __init__(self, settings: Sequence[InstanceSettings]) -> None:
        profiles = list({id(s.profile): s.profile for s in settings}.values())
        tables = cost_tables(
            profiles, max(s.setting.budget for s in settings), max(s.setting.max_seqs for s in settings)
        )
        index = {id(profile): row for row, profile in enumerate(profiles)}
        self.profile = [index[id(s.profile)] for s in settings]
        self._costs = [_Costs(tables, p) for p in range(len(profiles))]
        self.capacity = np.array([s.kv_tokens for s in settings])
        self.max_seqs = np.array([s.setting.max_seqs for s in settings])
        self.prefill_speed = np.array([s.prefill_tokens_per_s for s in settings])
        self.room = np.array([s.room_tokens for s in settings])
        self.least_room = int(self.room.min())
        self.nodes = self._nodes(settings)
        self.mask = np.ones((1, len(settings)), np.int8)
        # Flat tables of all profiles. The knots of each lie `_APART` behind those of the one before, so that
        # one search finds the segments of all instances.
        look = glance(tables)
        look[:, 0] = 0.0  # nobody decodes
        profile = np.array(self.profile)
        self._fixed, self._more = look[..., 0].ravel(), look[..., 1].ravel()
        self._knot = tables.decode_knot.ravel()
        self._knots = look.shape[2]
        self._searched = self._knot + np.repeat(np.arange(len(profiles)) * _APART, self._knots)
        self._offset = profile * _APART
        self._base = profile * (look.shape[1] * self._knots - self._knots)

    def _nodes(self, settings: Sequence[InstanceSettings]) -> np.ndarray:
        known: dict[str, Any] = {
            "kv_capacity_tokens": self.capacity,
            "token_budget": [s.setting.budget for s in settings],
            "max_seqs": self.max_seqs,
            "prefill_tokens_per_s": self.prefill_speed,
            "decode_tokens_per_s": [s.decode_tokens_per_s for s in settings],
        }
        nodes = np.zeros((len(settings), len(schema.INSTANCE)), np.float32)
        for name, values in known.items():
            nodes[:, schema.column(schema.INSTANCE, name)] = values
        return nodes

    def step_s(self, n: np.ndarray, context: np.ndarray) -> np.ndarray:
        """Decode-only iterations of n equally long requests on every instance, seconds; 0 for n = 0.

        Args:
            n, context: int64 [..., I], requests (at most max_seqs) and their tokens of KV in all.
        """
        # Knots rise from 0, so the last one reached is the segment of the mean context.
        j = self._searched.searchsorted(context // np.maximum(n, 1) + self._offset, "right") - 1
        at = self._base + n * self._knots + j
        return self._fixed.take(at) + self._more.take(at) * (context - n * self._knot.take(j))

    def step_of(self, i: int, n: int, context: int) -> float:
        """As `step_s`, on instance i alone."""
        if n == 0:
            return 0.0
        j = bisect_right(self._searched, context // n + self._offset[i]) - 1
        at = self._base[i] + n * self._knots + j
        return float(self._fixed[at]) + float(self._more[at]) * int(context - n * self._knot[j])

    def prefills_s(self, tokens: int, cached: list[int], budget: list[int]) -> list[float]:
        """As `prefill_s`, of one prompt on all instances.

        Args:
            tokens: of the prompt; cached: how many of them each instance has; budget: each instance's.
        """
        keys = list(zip(self.profile, cached, budget, strict=True))  # replicas of one kind often share them
        known = {
            (p, past, cap): self._costs[p].prompt_ps(tokens - past, past, cap) * SECOND
            for p, past, cap in set(keys)
        }
        return [known[key] for key in keys]

    def prefill_s(self, i: int, uncached: int, past: int, budget: int) -> float:
        """Seconds of instance i's iterations of up to `budget` tokens that compute a prompt alone.

        Args:
            uncached: tokens to compute, at least 1; past: cached tokens before them.
        """
        return self._costs[self.profile[i]].prompt_ps(uncached, past, budget) * SECOND

    def mixed_s(self, i: int, n: int, context: int, chunk: int, past: int, sequences: int) -> float:
        """Seconds of an iteration of instance i: n equally long decodes and a chunk of a prompt."""
        return self._costs[self.profile[i]].mixed_ps(n, context, chunk, past, sequences) * SECOND


class _Costs:
    """One profile's iterations in picoseconds, from lists: scalars out of numpy arrays are slow."""

    def __init__(self, tables: CostTables, p: int) -> None:
        self._tables, self._p = tables, p
        self._knots: list[int] = tables.decode_knot[p].tolist()
        self._linear: list[int] = tables.linear[p].tolist()
        self._head: list[int] = tables.head[p].tolist()
        self._chunked = int(tables.chunked[p])
        self._chunks: list[int] = tables.chunk_knot[p].tolist()
        self._pasts: list[int] = tables.past_knot[p].tolist()
        table, chunk, past = tables.prefill[p], tables.chunk_knot[p], tables.past_knot[p]
        corner, rise = table[:, :-1], np.diff(table, axis=1)
        fields = (
            corner[:-1], rise[:-1], corner[1:], rise[1:],
            past[:-1], np.diff(past), chunk[:-1, None], np.diff(chunk)[:, None],
        )  # fmt: skip
        self._cells: list[list[list[int]]] = np.stack(np.broadcast_arrays(*fields), -1).tolist()

    def prefill_ps(self, chunk: int, past: int) -> int:
        """Attention of one chunk over itself and `past` tokens, as `ReferenceCosts.prefill_ps`."""
        a = bisect_right(self._chunks, chunk, 0, len(self._cells)) - 1
        b = bisect_right(self._pasts, past, 0, len(self._cells[a])) - 1
        low, low_rise, high, high_rise, past_0, width, chunk_0, tokens = self._cells[a][b]
        step = past - past_0
        low += low_rise * step // width
        return low + (high + high_rise * step // width - low) * (chunk - chunk_0) // tokens

    def prompt_ps(self, uncached: int, past: int, budget: int) -> int:
        """All iterations of a prompt; full chunks cost as many at their mean past."""
        full = (uncached - 1) // budget
        rest = uncached - full * budget
        each = self._head[1] + self._chunked
        ps = each + self._linear[rest] + self.prefill_ps(rest, past + full * budget)
        if full:
            attention = self.prefill_ps(budget, past + (full - 1) * budget // 2)
            ps += full * (each + self._linear[budget] + attention)
        return ps

    def mixed_ps(self, n: int, context: int, chunk: int, past: int, sequences: int) -> int:
        """An iteration of n equally long decodes with `context` tokens of KV in all, and one chunk."""
        t, p = self._tables, self._p
        ps = self._linear[n + chunk] + self._head[sequences]
        base, slope = t.decode_base, t.decode_slope
        if chunk:
            ps += self._chunked + self.prefill_ps(chunk, past) + int(t.mixed_launch[p]) * n * chunk
            base, slope = t.mixed_base, t.mixed_slope
        if n:
            j = bisect_right(self._knots, context // n) - 1
            ps += int(base[p, n, j]) + int(slope[p, n, j]) * (context - n * self._knots[j])
        return ps
