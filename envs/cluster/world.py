"""From episodes to the arrays of the cluster model; every impossible combination is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.offers import DESTINATIONS
from servegym.envs.cluster.schema import HISTORY, OFFERS
from servegym.envs.cluster.settings import DECODE_CONTEXT, DECODE_REQUESTS, MOST_S, setting_of_spec
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec
from servegym.envs.cluster.state import (
    EPISODE,
    INSTANCE,
    LANE,
    NEVER,
    NONE,
    PS,
    REQ,
    ROW,
    RUN_ROWS,
    SETTING,
    SLEEPER,
    UNIT,
    World,
)
from servegym.envs.costs import Profile, cost_tables, load_profile
from servegym.envs.costs.model import iteration_ps, prefill_ps, stretch_ps
from servegym.envs.costs.tables import CostTables, glance
from servegym.envs.scenario import Scenario
from servegym.envs.workloads.workload import Workload
from servegym.errors import InputError

DEFAULT_SCENARIO = Scenario()


def build_world(
    episodes: Sequence[Episode],
    lanes: int,
    *,
    scenario: Scenario = DEFAULT_SCENARIO,
    seed: int = 0,
) -> World:
    """Allocate a world whose lanes can play any of the episodes.

    Args:
        scenario: service levels and staleness of the episodes that name no scenario of their own.

    Raises:
        InputError: for settings that contradict each other, and for a request that fits no instance.
    """
    drawn = list({_key(e): (e, e.scenario or scenario) for e in episodes}.values())
    workloads = [episode.workload for episode, _ in drawn]
    clusters = list({id(e.cluster): e.cluster for e in episodes}.values())
    names = sorted({i.profile for c in clusters for i in c.instances})
    profiles = {name: load_profile(name) for name in names}
    settings = _settings(clusters, profiles, names)
    longest = max(len(w) for w in workloads)
    tables = cost_tables(
        [profiles[n] for n in names], int(settings["budget"].max()), int(settings["max_seqs"].max())
    )
    _measure_speeds(settings, tables)
    sizes = np.array([len(c) for c in clusters], np.int64)
    rows, prefixes, starts = _rows(drawn)
    bank = _episodes(episodes, clusters, starts, scenario)
    for episode, entry in zip(episodes, bank, strict=True):
        _check_fit(episode, settings[entry["fleet"]][: len(episode.cluster)])
    running = _odd_lines(min(int(settings["max_seqs"].max()), longest))
    units, slots = _cache_sizes(bank, settings, workloads)
    instances = int(sizes.max())
    shape = (lanes, instances)
    world = World(
        lane=np.zeros(lanes, LANE),
        instance=np.zeros(shape, INSTANCE),
        run=np.zeros((*shape, RUN_ROWS, running), np.int64),
        residue=np.zeros((*shape, int(settings["block_tokens"].max())), np.int32),
        req=np.zeros((lanes, longest), REQ),
        unit=np.zeros((*shape, units), UNIT),
        slot=np.zeros((*shape, slots), np.int32),
        sleeper=np.zeros((lanes, max(_sessions(w) for w in workloads)), SLEEPER),
        history=np.zeros((lanes, HISTORY)),
        offer=np.zeros((lanes, OFFERS), np.int32),
        receiver=np.zeros((lanes, DESTINATIONS), np.int32),
        row=rows,
        prefix=prefixes,
        episode=bank,
        setting=settings,
        fleet_size=sizes,
        glance=glance(tables),
        tables=tables,
    )
    seed_lanes(world, seed)
    return world


def seed_lanes(world: World, seed: int) -> None:
    """Give every lane its own seed; a lane's randomness depends on (seed, lane) alone."""
    streams = np.random.SeedSequence(seed).generate_state(len(world.lane), np.uint64)
    world.lane["seed"] = (streams >> np.uint64(2)).astype(np.int64)
    world.lane["plays"] = 0


def _settings(
    clusters: Sequence[ClusterSpec], profiles: Mapping[str, Profile], names: list[str]
) -> np.ndarray:
    settings = np.zeros((len(clusters), max(len(c) for c in clusters)), SETTING)
    for f, cluster in enumerate(clusters):
        for i, spec in enumerate(cluster.instances):
            settings[f, i] = _setting(cluster, spec, profiles[spec.profile], names.index(spec.profile))
    return settings


def _setting(cluster: ClusterSpec, spec: InstanceSpec, profile: Profile, index: int) -> tuple:
    where, migrates = f"cluster {cluster.name}", cluster.migration is not None
    setting = setting_of_spec(where, spec, profile, prefix_caching=cluster.prefix_caching, migrates=migrates)
    known = {"profile": index, "prefill_tokens_per_s": 0.0, "decode_tokens_per_s": 0.0, **setting._asdict()}
    return tuple(known[name] for name in SETTING.names or ())


def _odd_lines(entries: int) -> int:
    """Room for so many int64 in an odd number of cache lines: rows a power of two apart evict each other."""
    return 8 * (-(-entries // 8) | 1)


def _measure_speeds(settings: np.ndarray, tables: CostTables) -> None:
    """Fill in each instance's tokens/s: prefill of a full chunk, decode at the reference length."""
    for setting in settings.reshape(-1):
        if setting["budget"] == 0:
            continue  # padding of a smaller fleet
        p, budget = int(setting["profile"]), int(setting["budget"])
        ps = iteration_ps(tables, p, 0, 0, 0, budget, 1, prefill_ps(tables, p, budget, 0), budget)
        setting["prefill_tokens_per_s"] = budget / (ps / PS)
        n = min(DECODE_REQUESTS, int(setting["max_seqs"]))
        length = max(1, min(DECODE_CONTEXT, int(setting["blocks"] * setting["block_tokens"]) // n))
        setting["decode_tokens_per_s"] = n / (stretch_ps(tables, p, n, n * length, length, 1) / PS)


def _key(episode: Episode) -> tuple[int, int, int]:
    """Episodes share rows when they share the requests, what a predictor says of them, and service levels."""
    return id(episode.workload), id(episode.predicted_output), id(episode.scenario)


def _rows(drawn: Sequence[tuple[Episode, Scenario]]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """All workloads with their predictions in one ROW array, prefix ids, and the first row of each."""
    rows = np.zeros(sum(len(e.workload) for e, _ in drawn), ROW)
    starts, start, prefix_start = [], 0, 0
    for episode, scenario in drawn:
        w = episode.workload
        part = rows[start : start + len(w)]
        closed = w.after >= 0
        part["arrived"] = np.where(closed, NEVER, np.rint(w.arrived_at_s * PS).astype(np.int64))
        part["gap"] = np.rint(w.gap_s * PS).astype(np.int64)
        part["next_turn"] = NONE
        part["next_turn"][w.after[closed]] = np.flatnonzero(closed)
        part["previous_turn"] = _previous_turns(w)
        part["prompt"], part["output"] = w.prompt_tokens, w.output_tokens
        part["predicted"] = episode.predicted_output
        part["prefix"] = w.prefix_offsets[:-1] + prefix_start
        part["prefixes"] = np.diff(w.prefix_offsets)
        part["priority"], part["turn"], part["klass"] = w.priority, np.maximum(w.turn, 0), w.class_id
        levels = [scenario.class_slo.get(name, scenario.slo) for name in w.class_names]
        for field, attribute in (("slo_ttft", "ttft_s"), ("slo_tpot", "tpot_s"), ("weight", "weight")):
            part[field] = np.array([getattr(level, attribute) for level in levels])[w.class_id]
        starts.append(start)
        start += len(w)
        prefix_start += len(w.prefix_ids)
    return rows, np.concatenate([e.workload.prefix_ids for e, _ in drawn]).astype(np.int32), starts


def _previous_turns(w: Workload) -> np.ndarray:
    """Row of the request before each one in its session, or NONE."""
    previous = w.after.astype(np.int64)
    order = np.argsort(w.session, kind="stable")
    same = (w.session[order[1:]] == w.session[order[:-1]]) & (w.session[order[1:]] >= 0)
    later, earlier = order[1:][same], order[:-1][same]
    open_loop = previous[later] == NONE
    previous[later[open_loop]] = earlier[open_loop]
    return previous


def _sessions(w: Workload) -> int:
    """Closed-loop sessions, the most turns that can wait for their time at once; at least 1."""
    followed = np.zeros(len(w), bool)
    followed[w.after[w.after >= 0]] = True
    return max(1, int((followed & (w.after < 0)).sum()))


def _episodes(
    episodes: Sequence[Episode],
    clusters: Sequence[ClusterSpec],
    starts: Sequence[int],
    scenario: Scenario,
) -> np.ndarray:
    first_row = dict(zip(dict.fromkeys(_key(e) for e in episodes), starts, strict=True))
    cluster_index = {id(c): k for k, c in enumerate(clusters)}
    bank = np.zeros(len(episodes), EPISODE)
    for entry, episode in zip(bank, episodes, strict=True):
        w = episode.workload
        entry["first_row"], entry["rows"] = first_row[_key(episode)], len(w)
        entry["fleet"] = cluster_index[id(episode.cluster)]
        entry["prefix_tokens"] = w.prefix_block_tokens
        entry["longest_output"] = w.max_output_tokens
        entry["least_urgent"] = int(w.priority.max())
        seen = episode.scenario or scenario
        entry["scrape_period"], entry["scrape_noise"] = round(seen.scrape_s * PS), seen.noise
        _write_levers(entry, episode.cluster)
    return bank


def _write_levers(entry: np.void, cluster: ClusterSpec) -> None:
    """When the cluster may migrate and set budgets; a period of 0 is never."""
    where = f"cluster {cluster.name}"
    if not 0 <= cluster.budget_period_s <= MOST_S:
        raise InputError(where, "budget_period_s", cluster.budget_period_s, f"must lie in 0..{MOST_S:g}")
    entry["budget_period"] = round(cluster.budget_period_s * PS)
    migration = cluster.migration
    if migration is None:
        return
    for name, low, high in (("period_s", 1e-3, MOST_S), ("last_blocks", 0, 2**31), ("stages", 1, 1000)):
        if not low <= getattr(migration, name) <= high:
            hint = f"must lie in {low:g}..{high:g}"
            raise InputError(where, f"migration.{name}", getattr(migration, name), hint)
    if not 0 <= migration.slowdown <= 10:
        raise InputError(where, "migration.slowdown", migration.slowdown, "must lie in 0..10")
    entry["migrate_period"] = round(migration.period_s * PS)
    entry["last_blocks"], entry["stages"] = migration.last_blocks, migration.stages
    entry["slowdown"] = round(migration.slowdown * 1_000_000)


def _check_fit(episode: Episode, settings: np.ndarray) -> None:
    w, cluster = episode.workload, episode.cluster
    tokens = w.prompt_tokens.astype(np.int64) + w.output_tokens
    stays = settings[settings["drain"] == NEVER]
    if len(stays) == 0:
        raise InputError(
            f"cluster {cluster.name}", "drain_at_s", "all", "leave an instance that never drains"
        )
    room = ((stays["blocks"] - stays["watermark"]) * stays["block_tokens"]).max()
    row = int(tokens.argmax())
    if tokens[row] > room:
        raise InputError(
            w.name, f"prompt_tokens + output_tokens, row {row}", int(tokens[row]),
            f"no instance of {cluster.name} holds more than {room} tokens; drop the row or give kv_blocks",
        )  # fmt: skip
    if not cluster.prefix_caching or w.prefix_block_tokens == 0:
        return
    for size in np.unique(settings["block_tokens"]):
        if w.prefix_block_tokens % size:
            raise InputError(
                w.name, "prefix_block_tokens", w.prefix_block_tokens,
                f"must be a multiple of the KV block of {size} tokens; in a scenario set "
                f"engine = {{ block_tokens = {w.prefix_block_tokens} }} or prefix_caching = false",
            )  # fmt: skip


def _cache_sizes(bank: np.ndarray, settings: np.ndarray, workloads: Sequence[Workload]) -> tuple[int, int]:
    """Most prefix blocks that an instance can cache, and a hash table of at least twice that."""
    # Ids count from 0: their largest bounds how many there are, without sorting millions of them.
    distinct = max(int(w.prefix_ids.max(initial=-1)) + 1 for w in workloads)
    units = 0
    for entry in bank:
        for setting in settings[entry["fleet"]]:
            if setting["caching"] and entry["prefix_tokens"]:
                blocks = int(entry["prefix_tokens"]) // int(setting["block_tokens"])
                units = max(units, min(distinct, int(setting["blocks"]) // max(blocks, 1)))
    units = max(units, 1)
    return units, 1 << (2 * units - 1).bit_length()
