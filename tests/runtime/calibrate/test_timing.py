"""The timers move what they say they move; what the numbers are is for the machine to say."""

import threading

import pytest
import torch

from servegym.errors import InputError
from servegym.runtime.calibrate.timing import decode_bandwidth, migration_downtime, time_swap, time_transfer
from servegym.runtime.engine import swap
from servegym.runtime.engine.instance import Instance
from servegym.runtime.engine.migration import Migration


@pytest.mark.parametrize("group", [1, 7])
def test_swap_brings_back_what_went_out(tiny, setting, group):
    instance = Instance(tiny, setting(host_blocks=40))
    instance.cache.normal_()
    before = instance.cache.clone()
    out, back = time_swap(instance, 30, group)
    assert out > 0 and back > 0
    assert torch.equal(instance.cache, before)
    went, here = (
        {tuple(block.flatten()[:3].tolist()) for block in halves.transpose(0, 1)}
        for halves in (instance.swap.host[:, :30], instance.swap.halves)
    )
    assert len(went & here) == 30
    assert not instance.swap.host[:, 30:].any()
    with pytest.raises(InputError):
        time_swap(instance, 41, group)


@pytest.mark.parametrize("group", [1, 7, 16])
def test_every_group_goes_in_two_copies_a_layer_as_in_the_model(tiny, setting, monkeypatch, group):
    """Else the latency of one group would be wrong for another."""
    copied = []
    monkeypatch.setattr(swap, "_copy_halves", lambda source, target: copied.append(target.shape[:2]))
    time_swap(Instance(tiny, setting(host_blocks=40)), 30, group)
    groups = [min(group, 30 - at) for at in range(0, 30, group)]
    assert copied == 2 * [(2 * tiny.config.layers, blocks) for blocks in groups]


def test_transfer_copies_blocks(tiny, setting):
    lock = threading.RLock()
    source, target = (Instance(tiny, setting(), number, lock=lock) for number in range(2))
    source.cache.fill_(1.0)
    assert time_transfer(source, target, 25) > 0
    assert target.cache.sum() == 25 * target.cache[:, :, 0].numel()


def test_bandwidth_counts_keys_and_values(tiny, setting):
    found = decode_bandwidth(Instance(tiny, setting(blocks=100)), batch=4, context=90, repeats=3)
    value = tiny.dtype.itemsize
    assert found.seconds * found.bytes_per_second == pytest.approx(2 * 4 * 90 * 2 * 16 * value)
    with pytest.raises(InputError):
        decode_bandwidth(Instance(tiny, setting()), batch=4, context=90)


def test_downtime_lies_within_the_gap(tiny, setting):
    for found in migration_downtime(tiny, setting(blocks=120), [16, 300]):
        assert 0 < found.stopped_s < found.gap_s
        assert found.stages >= 1


def test_a_migration_that_is_given_up_leaves_no_thread_behind(tiny, setting, monkeypatch):
    monkeypatch.setattr(Migration, "end_copy", Migration.abort)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="given up"):
        migration_downtime(tiny, setting(blocks=120), [300])
    assert threading.active_count() == before
