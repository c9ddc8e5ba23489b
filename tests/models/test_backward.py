"""The gradient inside a lane is torch's."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.envs.cluster.kernel import decorators
from servegym.envs.cluster.observe import Frame
from servegym.models import backward, inlane, simd
from servegym.models.packing import (
    load_weights,
    make_scratch,
    make_slopes,
    make_weights,
    turn,
    unload_gradient,
)

kernel, _ = decorators(simd.__file__, inlane.__file__, backward.__file__)


@kernel
def learn(net, turned, s, d, grad, frame, by_logit, by_value):
    for l in range(len(by_value)):
        inlane.forward(net, s, frame, l)
        for c in range(by_logit.shape[1]):
            d.logits[c] = by_logit[l, c]
        backward.backward(net, turned, s, d, grad, frame, l, by_value[l])


def gradient(network, obs, by_logit, by_value):
    """Summed over the lanes, with the scratch memory of the lane before."""
    config = network.config
    net, grad = (make_weights(config.hidden, config.layers) for _ in range(2))
    load_weights(net, {name: parameter.numpy() for name, parameter in network.state_dict().items()})
    frame = Frame(**{name: np.ascontiguousarray(rows) for name, rows in obs.items()}, oracle=np.zeros((0, 0)))
    scratch = make_scratch(net, *(obs[name].shape[1] for name in ("instances", "requests", "mask")))
    learn(net, turn(net), scratch, make_slopes(scratch), grad, frame, by_logit, by_value)
    return unload_gradient(grad, config.hidden)


def expected(network, obs, by_logit, by_value):
    logits, values = network({name: torch.from_numpy(rows) for name, rows in obs.items()})
    loss = (logits * torch.from_numpy(by_logit)).sum() + (values * torch.from_numpy(by_value)).sum()
    network.zero_grad()
    loss.backward()
    return {name: parameter.grad.numpy() for name, parameter in network.named_parameters()}


def slopes(rng, obs):
    by_logit = rng.normal(size=obs["mask"].shape).astype(np.float32) * (obs["mask"] == 1)
    return by_logit, rng.normal(size=len(obs["mask"])).astype(np.float32)


def assert_close(got, want):
    """Equal to 5e-5 of the largest slope: float32 sums in another order, and some cancel."""
    assert got.keys() == want.keys()
    largest = max(np.abs(slope).max() for slope in want.values())
    for name, slope in want.items():
        np.testing.assert_allclose(got[name], slope, rtol=0, atol=5e-5 * largest, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    real=st.integers(1, 18),
    padding=st.integers(0, 3),
    requests=st.sampled_from([1, 1, 2, 5, 8]),
    hidden=st.sampled_from([4, 16, 32, 40]),
    layers=st.integers(0, 3),
)
def test_equals_autograd(observation, trained_like, seed, real, padding, requests, hidden, layers):
    obs = observation(seed, 4, real, real + padding, requests)
    network, given_slopes = trained_like(hidden, layers, seed), slopes(np.random.default_rng(seed), obs)
    assert_close(gradient(network, obs, *given_slopes), expected(network, obs, *given_slopes))


def test_equal_instances_share_the_slope_of_their_maximum(observation, trained_like):
    obs = observation(3, 4, 6, 6, 1)
    obs["instances"] = np.repeat(obs["instances"][:, :1], 6, axis=1)
    obs["edges"] = np.repeat(obs["edges"][:, :1], obs["edges"].shape[1], axis=1)
    obs["mask"][:] = 1
    network, given_slopes = trained_like(32, 2, 3), slopes(np.random.default_rng(3), obs)
    assert_close(gradient(network, obs, *given_slopes), expected(network, obs, *given_slopes))


def test_what_padding_holds_changes_nothing(observation, trained_like):
    obs = observation(5, 4, 5, 8, 8)
    last = 1 + obs["candidates"][..., 0].max(initial=0, where=obs["mask"] == 1, axis=1)
    dirty = {name: rows.copy() for name, rows in obs.items()}
    dirty["instances"][obs["instance_mask"] == 0] = np.nan
    dirty["edges"][obs["mask"] == 0] = np.nan
    for l in range(4):
        dirty["requests"][l, last[l] :] = np.nan
    network, given_slopes = trained_like(32, 2, 5), slopes(np.random.default_rng(5), obs)
    clean = gradient(network, obs, *given_slopes)
    for name, slope in gradient(network, dirty, *given_slopes).items():
        np.testing.assert_array_equal(slope, clean[name], err_msg=name)
