"""Fitting recovers the known costs of a synthetic machine, from nothing but times of whole iterations."""

from dataclasses import replace

import numpy as np
import pytest

from servegym.envs.costs import load_profile
from servegym.runtime.calibrate.fit import errors, fit, predict, with_parts
from servegym.runtime.calibrate.shapes import Limits, Shape, design

LIMITS = Limits(token_budget=512, max_seqs=32, max_context=2048, kv_blocks=4096, block_tokens=16)
CUDA = Limits(token_budget=2048, max_seqs=256, max_context=8192, kv_blocks=40_000, block_tokens=16)
EAGER_US = 7000.0  # launching the kernels of an 8B model one by one


@pytest.fixture(scope="module")
def truth():
    """A measured GPU with decodes that cost more beside prefill, and unequal batches that cost extra."""
    profile = load_profile("rtxpro6000-llama-3.1-8b")
    return replace(profile, mixed_launch_us=0.0)


def fitted(profile, design_, noise, seed=0):
    rng = np.random.default_rng(seed)
    seconds = predict(profile, design_.fitted) * np.exp(noise * rng.standard_normal(len(design_.fitted)))
    blank = replace(profile, overhead_us=0.0)
    return with_parts(blank, fit(design_.axes, design_.fitted, seconds))


@pytest.mark.parametrize(("noise", "median", "p90"), [(0.0, 1.0, 3.0), (0.03, 2.0, 6.0)])
def test_a_known_machine_is_recovered_on_shapes_that_the_fit_never_saw(truth, noise, median, p90):
    shapes, others = design(LIMITS, size=40), design(LIMITS, size=200, seed=1).held_out
    found = errors(fitted(truth, shapes, noise), others, predict(truth, others))
    assert set(found) == {"decode", "prefill", "mixed"}
    for error in found.values():
        assert error.shapes > 90
        assert error.median_percent <= median
        assert error.p90_percent <= p90


def test_noise_averages_out(truth):
    shapes = design(LIMITS, size=40)
    profile = fitted(truth, shapes, 0.05, seed=1)
    ratio = predict(profile, shapes.held_out) / predict(truth, shapes.held_out)
    assert abs(np.mean(ratio) - 1) < 0.015


def test_the_noise_of_a_few_shapes_is_not_taken_for_skew_or_for_what_prefills_do_to_decodes(truth):
    few = Limits(token_budget=64, max_seqs=8, max_context=96, kv_blocks=64, block_tokens=16)
    others = design(few, size=60, seed=100).held_out
    even = replace(truth, decode_skew=None, mixed_skew=None, mixed_attention=None)
    for seed in range(10):
        profile = fitted(even, design(few, size=4, seed=seed), 0.05, seed)
        assert np.abs(np.log(predict(profile, others) / predict(even, others))).max() < 0.3


def test_costs_never_fall(truth):
    shapes = design(LIMITS, size=20)
    profile = fitted(truth, shapes, 0.2)
    assert (np.diff(profile.linear.us) >= 0).all()
    assert (np.diff(profile.head.us) >= 0).all()
    for surface in (profile.prefill_attention, profile.decode_attention, profile.mixed_attention):
        table = np.asarray(surface.us)
        assert (np.diff(table, axis=0) >= 0).all()
        assert (np.diff(table, axis=1) >= 0).all()


def test_a_slower_machine_is_seen_as_slower(truth):
    shapes = design(LIMITS, size=20)
    seconds = predict(truth, shapes.fitted)
    once = with_parts(truth, fit(shapes.axes, shapes.fitted, seconds))
    twice = with_parts(truth, fit(shapes.axes, shapes.fitted, 2 * seconds))
    blank = [replace(profile, overhead_us=0.0) for profile in (once, twice)]
    ratio = predict(blank[1], shapes.held_out) / predict(blank[0], shapes.held_out)
    np.testing.assert_allclose(ratio, 2.0, rtol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_what_iterations_with_chunks_take_beyond_others_is_found(seed):
    """An H200 that replays CUDA graphs for decodes alone, and launches all other iterations eagerly."""
    machine = replace(load_profile("h200-llama-3.1-8b"), chunked_us=EAGER_US)
    shapes = design(CUDA, seed=seed)
    profile = fitted(machine, shapes, 0.03, seed)
    found = errors(profile, shapes.held_out, predict(machine, shapes.held_out))
    for kind in ("prefill", "mixed"):
        assert found[kind].median_percent <= 3
        assert found[kind].p90_percent <= 8
    several = [Shape((1000,) * 32, ((30, 0),) * count) for count in (1, 4, 8)]
    np.testing.assert_allclose(predict(profile, several), predict(machine, several), rtol=0.08)
    assert profile.chunked_us == pytest.approx(EAGER_US, rel=0.15)


def test_launches_that_the_device_catches_up_with_are_no_constant_and_still_mostly_explained():
    """The launches go on while the device computes: only iterations shorter than they are take longer."""
    machine, shapes = load_profile("h200-llama-3.1-8b"), design(CUDA)

    def seconds(some):
        floor = np.array([EAGER_US * 1e-6 if shape.chunks else 0.0 for shape in some])
        return np.maximum(predict(machine, some), floor)

    profile = with_parts(machine, fit(shapes.axes, shapes.fitted, seconds(shapes.fitted)))
    profile = replace(profile, overhead_us=0.0)
    found = errors(profile, shapes.held_out, seconds(shapes.held_out))["prefill"]
    assert found.median_percent <= 1
    assert found.p90_percent <= 4


def test_where_all_iterations_are_launched_alike_no_constant_is_found(truth):
    shapes = design(LIMITS, size=40)
    shortest = predict(truth, shapes.fitted).min()
    assert fitted(truth, shapes, 0.0).chunked_us * 1e-6 < 0.02 * shortest
    for seed in range(3):
        assert fitted(truth, shapes, 0.03, seed).chunked_us * 1e-6 < 0.1 * shortest
