"""Copies: latency and bandwidth of a known link are found, and the order of sizes is random."""

import numpy as np
import pytest

from servegym.runtime.calibrate.links import Copies, fit_link, measure_copies

SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
BLOCK, LATENCY, RATE = 1_000_000, 20e-6, 40e9


def known(blocks, group=1, noise=0.0, rng=None):
    calls = -(-blocks // group)
    seconds = LATENCY * calls + BLOCK * blocks / RATE
    return seconds * (np.exp(noise * rng.standard_normal()) if noise else 1.0)


@pytest.mark.parametrize("group", [1, 16])
def test_a_known_link_is_found(group):
    (copies,) = measure_copies(lambda n: [known(n, group)], SIZES, BLOCK, group, rounds=3)
    link, error = fit_link(copies)
    if group == 1:  # calls and bytes rise alike: only their sum is known
        each = link.seconds_per_call + BLOCK / link.bytes_per_second
        assert each == pytest.approx(LATENCY + BLOCK / RATE, rel=1e-4)
    else:
        assert link.seconds_per_call == pytest.approx(LATENCY, rel=1e-3)
        assert link.bytes_per_second == pytest.approx(RATE, rel=1e-3)
    assert error.shapes == 4 and error.max_percent < 0.01


def test_a_call_of_many_copies_is_shared_among_them():
    (copies,) = measure_copies(lambda n: [known(n, 16)], SIZES, BLOCK, 16, rounds=3)
    assert fit_link(copies, calls_each=8)[0].seconds_per_call == pytest.approx(LATENCY / 8, rel=1e-3)


def test_noise_shows_in_the_error_on_left_out_sizes():
    rng = np.random.default_rng(0)
    (copies,) = measure_copies(lambda n: [known(n, 16, 0.1, rng)], SIZES, BLOCK, 16, rounds=9)
    link, error = fit_link(copies)
    assert 0.1 < error.max_percent < 30
    assert link.bytes_per_second == pytest.approx(RATE, rel=0.2)


def test_a_link_whose_time_does_not_grow_has_a_finite_bandwidth():
    sizes = np.array([1.0, 2.0, 4.0])
    link, _ = fit_link(Copies(np.ones(3), sizes * BLOCK, np.full(3, 1e-3)))
    assert link.seconds_per_call == pytest.approx(1e-3)
    assert np.isfinite(link.bytes_per_second)


def test_sizes_come_in_random_order_after_a_round_that_is_forgotten():
    seen = []

    def copy(blocks):
        seen.append(blocks)
        return (100.0, 100.0) if len(seen) <= len(SIZES) else (float(blocks), 2.0 * blocks)

    copies, back = measure_copies(copy, SIZES, BLOCK, 4, rounds=2)
    assert copies.seconds.tolist() == [float(n) for n in SIZES]
    assert back.seconds.tolist() == [2.0 * n for n in SIZES]
    assert copies.calls.tolist() == [1, 1, 1, 2, 4, 8, 16, 32]
    assert sorted(seen[:8]) == SIZES and seen[:8] != SIZES and seen[8:16] != seen[:8]
