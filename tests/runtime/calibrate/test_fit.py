"""Fitting recovers the known costs of a synthetic machine, from nothing but times of whole iterations."""

from dataclasses import replace

import numpy as np
import pytest

from servegym.envs.costs import load_profile
from servegym.runtime.calibrate.fit import errors, fit, predict, with_parts
from servegym.runtime.calibrate.shapes import Limits, design

LIMITS = Limits(token_budget=512, max_seqs=32, max_context=2048, kv_blocks=4096, block_tokens=16)


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
    shapes = design(LIMITS, size=40)
    found = errors(fitted(truth, shapes, noise), shapes.held_out, predict(truth, shapes.held_out))
    assert set(found) == {"decode", "prefill", "mixed"}
    for error in found.values():
        assert error.shapes > 10
        assert error.median_percent <= median
        assert error.p90_percent <= p90


def test_noise_averages_out(truth):
    shapes = design(LIMITS, size=40)
    profile = fitted(truth, shapes, 0.05, seed=1)
    ratio = predict(profile, shapes.held_out) / predict(truth, shapes.held_out)
    assert abs(np.mean(ratio) - 1) < 0.015


def test_the_noise_of_a_few_shapes_is_not_taken_for_skew_or_for_what_prefills_do_to_decodes(truth):
    few = Limits(token_budget=64, max_seqs=8, max_context=96, kv_blocks=64, block_tokens=16)
    shapes, others = design(few, size=4), design(few, size=60, seed=1).held_out
    even = replace(truth, decode_skew=None, mixed_skew=None, mixed_attention=None)
    ratios = [predict(fitted(even, shapes, 0.05, seed), others) / predict(even, others) for seed in range(10)]
    assert np.abs(np.log(ratios)).max() < 0.25


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
