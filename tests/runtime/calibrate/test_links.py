"""Copies: latency and bandwidth of a known link are found, and the order of sizes is random."""

import numpy as np
import pytest

from servegym.runtime.calibrate.links import Copies, fit_link, joined, measure_copies

SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
BLOCK, LATENCY, RATE = 1_000_000, 20e-6, 40e9


def known(blocks, group=1, noise=0.0, rng=None):
    calls = -(-blocks // group)
    seconds = LATENCY * calls + BLOCK * blocks / RATE
    return seconds * (np.exp(noise * rng.standard_normal()) if noise else 1.0)


def measured(seconds, *groups, rounds=3):
    return measure_copies(lambda n, group: [seconds(n, group)], SIZES, groups, BLOCK, rounds)


@pytest.mark.parametrize("group", [1, 16])
def test_a_known_link_is_found(group):
    (copies,) = measured(known, group)[group]
    link, error = fit_link(copies)
    if group == 1:  # calls and bytes rise alike: only their sum is known
        each = link.seconds_per_call + BLOCK / link.bytes_per_second
        assert each == pytest.approx(LATENCY + BLOCK / RATE, rel=1e-4)
    else:
        assert link.seconds_per_call == pytest.approx(LATENCY, rel=1e-3)
        assert link.bytes_per_second == pytest.approx(RATE, rel=1e-3)
    assert error.shapes == 4 and error.max_percent < 0.01


def test_a_call_of_many_copies_is_shared_among_them():
    (copies,) = measured(known, 16)[16]
    assert fit_link(copies, calls_each=8)[0].seconds_per_call == pytest.approx(LATENCY / 8, rel=1e-3)


def test_single_blocks_and_groups_are_explained_by_one_link():
    link, error = fit_link(joined([copies for (copies,) in measured(known, 1, 16).values()]))
    assert link.seconds_per_call == pytest.approx(LATENCY, rel=1e-3)
    assert link.bytes_per_second == pytest.approx(RATE, rel=1e-3)
    assert error.shapes == 8 and error.max_percent < 0.01


def test_noise_shows_in_the_error_on_left_out_sizes():
    rng = np.random.default_rng(0)
    (copies,) = measured(lambda n, group: known(n, group, 0.1, rng), 16, rounds=9)[16]
    link, error = fit_link(copies)
    assert 0.1 < error.max_percent < 30
    assert link.bytes_per_second == pytest.approx(RATE, rel=0.2)


def test_a_link_whose_time_does_not_grow_has_a_finite_bandwidth():
    sizes = np.array([1.0, 2.0, 4.0])
    link, _ = fit_link(Copies(np.ones(3), sizes * BLOCK, np.full(3, 1e-3)))
    assert link.seconds_per_call == pytest.approx(1e-3)
    assert np.isfinite(link.bytes_per_second)


def test_sizes_and_groups_come_in_random_order_after_a_round_that_is_forgotten():
    seen = []
    trials = [(n, group) for group in (1, 4) for n in SIZES]

    def copy(blocks, group):
        seen.append((blocks, group))
        return (100.0, 100.0) if len(seen) <= len(trials) else (float(blocks), 2.0 * blocks + group)

    found = measure_copies(copy, SIZES, (1, 4), BLOCK, rounds=2)
    for group, (out, back) in found.items():
        assert out.seconds.tolist() == [float(n) for n in SIZES]
        assert back.seconds.tolist() == [2.0 * n + group for n in SIZES]
    assert found[4][0].calls.tolist() == [1, 1, 1, 2, 4, 8, 16, 32]
    assert found[1][0].calls.tolist() == SIZES
    first, second = seen[:16], seen[16:32]
    assert sorted(first) == sorted(second) == sorted(trials)
    assert first != second and {group for _, group in first[:8]} == {1, 4}
