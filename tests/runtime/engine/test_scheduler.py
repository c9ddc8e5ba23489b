"""The runtime's scheduler beside the reference simulator's: equal decisions, each token's KV in its place."""

import os
from dataclasses import dataclass, field
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servegym.envs.cluster import reference
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.reference_instance import Instance as ReferenceInstance
from servegym.envs.cluster.reference_migration import Migration as ReferenceMigration
from servegym.envs.cluster.settings import GIB, Setting, setting_of_spec
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec, Migration
from servegym.envs.cluster.state import World
from servegym.envs.cluster.world import build_world
from servegym.envs.costs import load_profile
from servegym.envs.workloads.workload import make_workload
from servegym.errors import InputError
from servegym.runtime.engine import migration
from servegym.runtime.engine.migration import Phase
from servegym.runtime.engine.request import make_request
from servegym.runtime.engine.scheduler import Scheduler

EXAMPLES = int(os.environ.get("SERVEGYM_EXAMPLES", "60"))
PROFILE = "a100-llama-3.1-8b"
BLOCK = 4  # tokens
MS = 1_000_000_000


class Contents:
    """What stands in the KV blocks of an instance and its host memory: the name of a token in each slot."""

    def __init__(self, blocks, host_blocks):
        self.device = np.full((blocks, BLOCK), None)
        self.host = np.full((host_blocks, BLOCK), None)

    def out(self, blocks, host):
        self.host[list(host)] = self.device[list(blocks)]

    def back(self, host, blocks):
        self.device[list(blocks)] = self.host[list(host)]


class Twin:
    """The runtime's scheduler of one instance: told what the reference is told, it must end up the same."""

    def __init__(self, play, number, setting, unit_tokens):
        self.play, self.number, self.unit_tokens = play, number, unit_tokens if setting.caching else 0
        self.contents = Contents(setting.blocks, setting.host_blocks)
        self.scheduler = Scheduler(setting, self.contents, number, unit_tokens, self.victim)

    def victim(self, running):
        answer = self.play.victim(self.number, [r.number for r in running])
        return answer and (self.play.requests[answer[0]], answer[1])

    def name(self, r, position):
        """Equal prefixes are equal tokens; the rest belongs to the request."""
        if self.unit_tokens and position // self.unit_tokens < len(r.prefix_ids):
            return r.prefix_ids[position // self.unit_tokens], position % self.unit_tokens
        return "own", r.number, position

    def slot(self, r, position):
        return r.table[position // BLOCK], position % BLOCK

    def compute(self, plan):
        """An iteration reads the KV of all earlier tokens, and writes its own; all write before any reads."""
        for r, new in plan:
            for position in range(r.computed, r.computed + new):
                self.contents.device[self.slot(r, position)] = self.name(r, position)
        for r, new in plan:
            for position in range(r.computed + new):
                assert self.contents.device[self.slot(r, position)] == self.name(r, position)

    def check(self, inst):
        """The same state as the reference instance."""
        mine, memory = self.scheduler, self.scheduler.memory
        assert [(r.number, new) for r, new in mine.batch] == [(r.number, new) for r, new in inst.batch]
        for name in ("running", "waiting"):
            assert [r.number for r in getattr(mine, name)] == [r.number for r in getattr(inst, name)]
        assert memory.free == inst.free
        assert len(mine.host_empty) == inst.host_free
        assert len(mine.reserved) == inst.reserved
        assert (mine.joiner and mine.joiner.number) == (inst.joiner and inst.joiner.number)
        if inst.cache:
            assert list(memory.idle) == list(inst.cache.idle)
            assert {key: unit.holders for key, unit in memory.units.items()} == inst.cache.holders
        self.count(inst)

    def count(self, inst):
        """Each block is in one place."""
        mine, memory = self.scheduler, self.scheduler.memory
        places = memory.empty + mine.reserved + [b for u in memory.units.values() for b in u.blocks]
        stopped = [self.play.requests[r.number] for r in inst.stopped]
        for r in mine.running + stopped:
            places += r.table[len(r.shared) * memory.unit_blocks : r.blocks].tolist()
        assert sorted(places) == list(range(memory.blocks))
        host = mine.host_empty + [b for r in mine.waiting for b in r.host_table]
        assert sorted(host) == list(range(mine.setting.host_blocks))


class Copies:
    """The copier of the twins: data arrives when the reference says that the copy has ended."""

    def __init__(self, play):
        self.play, self.pending = play, {}

    def start(self, moving, blocks, to):
        assert len(blocks) == len(to)
        self.pending[moving] = list(blocks), list(to)

    def cancel(self, moving):
        self.pending.pop(moving, None)

    def arrive(self, moving):
        blocks, to = self.pending.pop(moving)
        source, target = (self.play.twins[s.number].contents for s in (moving.source, moving.target))
        target.device[to] = source.device[blocks]


@dataclass
class Case:
    world: World = field(repr=False)
    settings: list[Setting]
    seed: int


class Play:
    """One episode in the reference simulator, with the runtime's schedulers beside it."""

    def __init__(self, case):
        world = case.world
        self.seed, self.twins = case.seed, {}
        entry = world.episode[0]
        rows = world.row[: entry["rows"]]
        self.requests = [
            make_request(
                k, np.zeros(row["prompt"], int), int(row["output"]), priority=int(row["priority"]),
                prefix_ids=world.prefix[row["prefix"] : row["prefix"] + row["prefixes"]].tolist(),
            )
            for k, row in enumerate(rows)
        ]  # fmt: skip
        copies = Copies(self)
        play = self

        class Shadowed(ReferenceInstance):
            def __init__(self, number, setting, entry, costs, choose_victim):
                super().__init__(number, setting, entry, costs, choose_victim)
                unit = int(entry["prefix_tokens"])
                play.twins[number] = self.twin = Twin(play, number, case.settings[number], unit)

            def enqueue(self, r, *, front=False):
                super().enqueue(r, front=front)
                if front:
                    return  # after a preemption; the twin has its own
                mine = play.requests[r.number]
                if mine.instance >= 0:
                    play.twins[mine.instance].scheduler.waiting.remove(mine)
                    mine.migrations += 1
                mine.arrived_s = r.arrived
                self.twin.scheduler.enqueue(mine)

            def complete(self):
                play.now = self.until
                self.twin.scheduler.complete([0] * len(self.batch), self.until)
                return super().complete()

            def start(self, now, plan):
                super().start(now, plan)
                play.now = now
                self.twin.scheduler.cap = self.cap
                self.twin.compute(self.twin.scheduler.schedule())
                self.twin.check(self)

        class ShadowedMigration(ReferenceMigration):
            def __init__(self, request, source, target, last_blocks, stages):
                super().__init__(request, source, target, last_blocks, stages)
                self.twin = migration.Migration(
                    play.requests[request.number], source.twin.scheduler, target.twin.scheduler, copies,
                    last_blocks, stages,
                )  # fmt: skip

            def begin(self, now):
                super().begin(now)
                self.twin.begin()
                self.source.twin.check(self.source)

            def end_copy(self, now):
                super().end_copy(now)
                copies.arrive(self.twin)
                self.twin.end_copy()
                over = self.twin.phase in (Phase.COMMITTED, Phase.ABORTED)
                assert over == (self.source.out is not self)
                assert over or self.twin.phase.name == self.phase.name
                self.target.twin.check(self.target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "Instance", Shadowed)
            patch.setattr(reference, "Migration", ShadowedMigration)
            self.cluster = reference.ReferenceCluster(
                world, 0, self.choose, self.reference_victim, self.tick, self.budget
            )
            self.records = self.cluster.run()

    def draw(self, *question):
        return Random(repr((self.seed, *question)))

    def choose(self, cluster, r):
        fitting = [i for i in range(len(cluster.instances)) if cluster.fits(i, r)]
        return self.draw("dispatch", r.number).choice(fitting)

    def victim(self, i, numbers):
        rng = self.draw("preempt", self.now, i, sorted(numbers))
        return None if rng.random() < 0.3 else (rng.choice(sorted(numbers)), rng.random() < 0.6)

    def reference_victim(self, cluster, i, running):
        self.now = cluster.now
        answer = self.victim(i, [r.number for r in running])
        return answer and (cluster.requests[answer[0]], answer[1])

    def tick(self, cluster):
        rng = self.draw("migrate", cluster.now)
        live = [r for r in cluster.requests if r.instance >= 0 and r.finished is None]
        for r in rng.sample(live, min(len(live), 6)):
            yield r.instance, rng.randrange(len(cluster.instances)), r

    def budget(self, cluster, i):
        return self.draw("budget", cluster.now, i).choice([None, 1, 3, 16, 100, 2048])


@st.composite
def workloads(draw):
    n = draw(st.integers(2, 25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrived = np.cumsum(rng.exponential(draw(st.sampled_from([0.001, 0.02, 0.2])), n) * (rng.random(n) < 0.7))
    prompt = rng.integers(1, draw(st.sampled_from([3, 40, 150])), n, endpoint=True)
    output = rng.integers(1, draw(st.sampled_from([10, 50])), n, endpoint=True)
    unit = draw(st.sampled_from([0, BLOCK, 3 * BLOCK]))
    blocks = (prompt + output) // unit if unit else np.zeros(n, int)
    shared = rng.integers(blocks // 2, blocks, endpoint=True)  # the other ids belong to the request alone
    ids = [k if k < shared[i] else 1000 + 100 * i + k for i in range(n) for k in range(int(blocks[i]))]
    after = np.where(rng.random(n) < draw(st.sampled_from([0.0, 0.3])), np.arange(n) - 1, -1)
    return make_workload(
        "random", arrived, prompt, output, priority=rng.integers(0, 3, n), after=after,
        gap_s=np.where(after >= 0, rng.choice([0.0, 0.05], n), 0.0), prefix_ids=np.array(ids, np.int32),
        prefix_offsets=np.concatenate([[0], np.cumsum(blocks)]), prefix_block_tokens=unit if ids else 0,
    )  # fmt: skip


@st.composite
def plays(draw):
    workload = draw(workloads())
    needed = -(-int((workload.prompt_tokens + workload.output_tokens).max()) // BLOCK)
    specs = [draw(instances(needed)) for _ in range(draw(st.sampled_from([1, 2, 3])))]
    moving = Migration(
        draw(st.sampled_from([0.01, 0.05, 0.3])), draw(st.integers(0, 3)), draw(st.integers(1, 3)), 0.1
    )
    cluster = ClusterSpec("random", tuple(specs), draw(st.booleans()), moving, 0.05)
    world = build_world([Episode(workload, cluster, workload.output_tokens)], 1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    for setting in world.setting[0]:
        setting["net_call"] = round(rng.choice([0.0, 20.0, 200.0]) * MS)
        setting["net_block"] = round(rng.choice([0.0, 2.0]) * MS)
    profile, caching = load_profile(PROFILE), cluster.prefix_caching
    made = [setting_of_spec("test", s, profile, prefix_caching=caching, migrates=True) for s in specs]
    return Case(world, made, draw(st.integers(0, 2**32)))


@st.composite
def instances(draw, needed):
    blocks = needed + draw(st.sampled_from([0, needed // 4, needed, 4 * needed]))
    watermark = draw(st.sampled_from([0.0, 0.1]))
    if blocks - int(watermark * blocks) < needed:
        watermark = 0.0
    host = draw(st.sampled_from([0, needed // 2, 3 * needed]))
    budget = draw(st.sampled_from([16, 64, 333]))
    return InstanceSpec(
        PROFILE, blocks, BLOCK, budget, min(budget, draw(st.sampled_from([1, 3, 8, 40]))), watermark,
        queue=draw(st.sampled_from(["fcfs", "priority"])), reserve_prompt=draw(st.booleans()),
        preemption=draw(st.sampled_from(["recompute", "swap"])) if host else "recompute",
        swap_gib=(host + 0.5) * BLOCK * load_profile(PROFILE).model.kv_bytes_per_token / GIB if host else 0.0,
        swap_group=draw(st.sampled_from([1, 60])),
    )  # fmt: skip


SEEN = {"preemptions": 0, "swaps": 0, "migrations": 0, "hits": 0}


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(plays())
def test_decides_as_the_reference(case):
    play = Play(case)
    for k, r in enumerate(play.requests):
        assert r.finished_s == play.cluster.requests[k].finished
        for name in ("streamed", "preemptions", "migrations", "cached", "lost", "instance"):
            assert getattr(r, name) == getattr(play.cluster.requests[k], name), name
    for twin in play.twins.values():
        assert twin.scheduler.memory.free == twin.scheduler.memory.blocks
    SEEN["preemptions"] += int(play.records.preemptions.sum())
    SEEN["swaps"] += sum(r.preemptions > 0 and r.lost == 0 for r in play.requests)
    SEEN["migrations"] += int(play.records.migrations.sum())
    SEEN["hits"] += int((play.records.cached_tokens > 0).sum())


def test_random_plays_have_everything_in_them():
    """What the comparison is about must have happened in it."""
    assert min(SEEN.values()) > EXAMPLES // 20, SEEN


@pytest.mark.parametrize(
    ("changes", "unit_tokens", "field"),
    [({"asynchronous": True}, 0, "async_scheduling"), ({}, 6, "prefix_block_tokens")],
)
def test_refuses_what_it_cannot_schedule(changes, unit_tokens, field, setting):
    with pytest.raises(InputError) as caught:
        Scheduler(setting(**changes), Contents(10, 0), unit_tokens=unit_tokens)
    assert caught.value.field == field
