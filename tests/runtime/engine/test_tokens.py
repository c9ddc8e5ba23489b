"""Greedy decoding gives the same tokens whatever happens to a request on its way."""

import threading
import time

import numpy as np
import pytest
import torch

from servegym.runtime.engine.copier import BlockCopier
from servegym.runtime.engine.instance import Instance
from servegym.runtime.engine.memory import chained_ids
from servegym.runtime.engine.migration import Migration
from servegym.runtime.engine.request import make_request

REQUESTS, OUTPUT = 12, 40


def requests(first=0, unit=0):
    """Prompts of which every third shares its first 16 tokens."""
    out = []
    for k in range(REQUESTS):
        rng = np.random.default_rng((first, k))
        prompt = rng.integers(331, size=rng.integers(2, 50))
        if k % 3 == 0:
            prompt = np.concatenate([np.arange(16), prompt])
        ids = chained_ids(prompt, unit) if unit else ()
        out.append(make_request(k, prompt, OUTPUT, prefix_ids=ids, arrived_s=float(k)))
    return out


def warm(*instances):
    """With CUDA graphs, where there is a GPU; what is expected was computed without."""
    for instance in instances:
        instance.warm_up()
    return list(instances)


def finish(instances, rs, each_step=lambda: None):
    instances[0].submit(rs[0])
    for k, r in enumerate(rs[1:], 1):
        instances[k % len(instances)].submit(r)
    end = time.monotonic() + 60
    while any(r.streamed < OUTPUT for r in rs):  # nothing may run for a while: a last copy is on its way
        for instance in instances:
            instance.step()
        each_step()
        assert time.monotonic() < end
    for instance in instances:
        assert instance.scheduler.memory.free == instance.setting.blocks


@pytest.fixture(scope="module")
def expected(tiny, setting):
    """What each request says when it is alone and nothing is short."""
    out = []
    instance = Instance(tiny, setting())
    for r in requests():
        instance.submit(r)
        while instance.step():
            pass
        assert r.preemptions == 0
        out.append(r.ids)
    assert len({tuple(ids[-OUTPUT:]) for ids in out}) == REQUESTS
    return out


def assert_same(rs, expected):
    for r, ids in zip(rs, expected, strict=True):
        np.testing.assert_array_equal(r.ids, ids)


@pytest.mark.parametrize(("by_swap", "group"), [(False, 1), (True, 1), (True, 3)])
def test_over_100_preemptions(tiny, setting, expected, by_swap, group):
    short = setting(blocks=60, host_blocks=400 * by_swap, by_swap=by_swap, swap_group=group)
    (instance,) = warm(Instance(tiny, short))
    rng = np.random.default_rng(0)
    preempted = 0

    def disturb():
        running = [r for r in instance.scheduler.running if r.decoding]
        if len(running) > 1 and rng.random() < 0.3:
            with instance.lock, torch.cuda.stream(instance.stream):  # as within an iteration
                instance.scheduler.preempt(running[rng.integers(len(running))], by_swap)

    rounds = 0
    while preempted < 100:
        rs = requests()
        finish([instance], rs, disturb)
        assert_same(rs, expected)
        preempted += sum(r.preemptions for r in rs)
        assert sum(r.lost for r in rs) == 0 or not by_swap
        assert len(instance.scheduler.host_empty) == instance.setting.host_blocks
        rounds += 1
    assert rounds < 20


def test_over_100_migrations(tiny, setting, expected):
    lock = threading.RLock()
    instances = warm(*(Instance(tiny, setting(blocks=80), number, lock=lock) for number in range(2)))
    copier = BlockCopier(instances, lock, failed=pytest.fail)
    rng = np.random.default_rng(0)

    def disturb():
        source, target = (instances[k].scheduler for k in rng.permutation(2))
        with lock:
            able = [r for r in source.running if r.decoding]
            busy = source.out or source.inbound or target.out or target.inbound or target.joiner
            if able and not busy and len(target.running) < 8 and target.memory.free > 30:
                stages, last = int(rng.integers(1, 4)), int(rng.integers(0, 3))
                Migration(able[rng.integers(len(able))], source, target, copier, last, stages).begin()

    migrated = rounds = 0
    while migrated < 100:
        rs = requests()
        finish(instances, rs, disturb)
        assert_same(rs, expected)
        migrated += sum(r.migrations for r in rs)
        rounds += 1
        assert rounds < 100
    copier.close()
    assert len(copier.downtimes) == migrated


def test_migrations_between_threads(tiny, setting, expected):
    """The same with every instance on a thread of its own, and the copier beside them."""
    lock = threading.RLock()
    instances = warm(*(Instance(tiny, setting(blocks=80), number, lock=lock) for number in range(2)))
    copier = BlockCopier(instances, lock, failed=pytest.fail)
    rs = requests()
    left = threading.Semaphore(0)
    for instance in instances:
        instance.on_done = lambda done: left.release(len(done))
    threads = [threading.Thread(target=instance.serve) for instance in instances]
    for thread in threads:
        thread.start()
    for r in rs:
        instances[0].submit(r)
    rng = np.random.default_rng(0)
    finished = 0
    while finished < len(rs):
        finished += left.acquire(timeout=0.002)
        with lock:
            source, target = (instances[k].scheduler for k in rng.permutation(2))
            able = [r for r in source.running if r.decoding]
            busy = source.out or source.inbound or target.out or target.inbound or target.joiner
            if able and not busy and len(target.running) < 8 and target.memory.free > 30:
                Migration(able[rng.integers(len(able))], source, target, copier, 2, 3).begin()
    for instance, thread in zip(instances, threads, strict=True):
        instance.stop()
        thread.join(10)
        assert not thread.is_alive()
    copier.close()
    assert_same(rs, expected)
    assert sum(r.migrations for r in rs) > 0


@pytest.mark.parametrize("unit", [4, 8])
def test_prefix_cache(tiny, setting, expected, unit):
    """Cached prefixes are used, evicted and used again, and nobody can tell."""
    instance = Instance(tiny, setting(blocks=60), unit_tokens=unit)
    hits = []
    for _ in range(3):
        rs = requests(unit=unit)
        finish([instance], rs)
        assert_same(rs, expected)
        hits.append(sum(r.cached for r in rs))
    assert hits[0] >= 16 and hits[1] > hits[0]


def test_chunks_of_any_size(tiny, setting, expected):
    for budget in (8, 11, 200):
        instance = Instance(tiny, setting(blocks=300, budget=budget))
        rs = requests()
        finish([instance], rs)
        assert_same(rs, expected)
