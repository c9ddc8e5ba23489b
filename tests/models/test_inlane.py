"""The network inside a lane is the dense network."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.envs.cluster import schema
from servegym.envs.cluster.kernel import decorators
from servegym.envs.cluster.observe import Frame
from servegym.models import inlane, simd
from servegym.models.features import ILLEGAL
from servegym.models.packing import load_weights, make_scratch, make_weights

kernel, _ = decorators(simd.__file__, inlane.__file__)


@kernel
def forward(net, scratch, frame, l):
    return inlane.forward(net, scratch, frame, l)


@kernel
def log1p_of(numbers, out):
    for k in range(0, len(numbers), simd.WIDTH):
        simd.store(out, k, inlane.log1p(simd.load(numbers, k)))


def log1p(x):
    padded = np.zeros(-(-len(x) // simd.WIDTH) * simd.WIDTH, np.float32)
    padded[: len(x)] = x
    out = np.empty_like(padded)
    log1p_of(padded, out)
    return out[: len(x)]


def evaluate(network, obs):
    """Logits and values of every lane, with the scratch memory of the lane before."""
    weights = {name: parameter.numpy() for name, parameter in network.state_dict().items()}
    net = make_weights(network.config.hidden, network.config.layers)
    load_weights(net, weights)
    arrays = {name: np.ascontiguousarray(rows) for name, rows in obs.items()}
    frame = Frame(**arrays, oracle=np.zeros((len(obs["kind"]), 0)))
    sizes = (obs[name].shape[1] for name in ("instances", "requests", "mask"))
    scratch = make_scratch(net, *sizes)
    logits, values = np.empty(obs["mask"].shape, np.float32), np.empty(len(obs["kind"]), np.float32)
    for l in range(len(values)):
        count, values[l] = forward(net, scratch, frame, l)
        assert scratch.legal[:count].tolist() == np.flatnonzero(obs["mask"][l]).tolist()
        logits[l] = scratch.logits
    return logits, values


def expected(network, obs):
    with torch.no_grad():
        logits, values = network({name: torch.from_numpy(rows) for name, rows in obs.items()})
    return logits.numpy(), values.numpy()


def assert_close(got, want):
    """Equal to 5e-5 of the largest legal number: float32 sums in another order, and some cancel."""
    largest = np.abs(want[want > ILLEGAL]).max(initial=1.0)
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5 * largest)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    real=st.integers(1, 18),
    padding=st.integers(0, 3),
    requests=st.sampled_from([1, 1, 2, 5, 8]),
    hidden=st.sampled_from([4, 16, 32, 40]),
    layers=st.integers(0, 3),
)
def test_equals_the_dense_form(observation, trained_like, seed, real, padding, requests, hidden, layers):
    obs = observation(seed, 4, real, real + padding, requests)
    network = trained_like(hidden, layers, seed)
    for got, want in zip(evaluate(network, obs), expected(network, obs), strict=True):
        assert_close(got, want)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), requests=st.sampled_from([1, 8]))
def test_real_instances_may_stand_anywhere(observation, trained_like, seed, requests):
    obs = observation(seed, 4, 5, 9, requests)
    order = np.random.default_rng(seed).permutation(9)
    obs |= {name: obs[name][:, order] for name in ("instances", "instance_mask")}
    obs["candidates"] = obs["candidates"].copy()
    obs["candidates"][..., 1] = np.argsort(order)[obs["candidates"][..., 1]]
    network = trained_like(32, 2, seed)
    for got, want in zip(evaluate(network, obs), expected(network, obs), strict=True):
        assert_close(got, want)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000), requests=st.sampled_from([1, 8]), fill=st.sampled_from([0.0, 3e38, np.nan])
)
def test_what_padding_holds_changes_nothing(observation, trained_like, seed, requests, fill):
    """Padded rows of instances, illegal candidates' edges, and request rows that no legal candidate names."""
    obs = observation(seed, 4, 5, 8, requests)
    last = 1 + obs["candidates"][..., 0].max(initial=0, where=obs["mask"] == 1, axis=1)
    dirty = {name: rows.copy() for name, rows in obs.items()}
    dirty["instances"][obs["instance_mask"] == 0] = fill
    dirty["edges"][obs["mask"] == 0] = fill
    for l in range(4):
        dirty["requests"][l, last[l] :] = fill
    network = trained_like(32, 2, seed)
    for got, want in zip(evaluate(network, dirty), evaluate(network, obs), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_number_that_is_none_shows(observation, trained_like):
    network = trained_like(32, 2, 0)
    for name in ("instances", "requests", "edges", "globals", "history"):
        obs = observation(0, 2)
        obs["mask"][:] = 1
        obs[name] = obs[name].copy()
        obs[name][1, ..., 0] = np.nan
        logits, values = evaluate(network, obs)
        assert np.isfinite(logits[0]).all() and np.isfinite(values[0]), name
        assert np.isnan(logits[1]).any(), name


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=40))
def test_log1p_of_any_size(numbers):
    x = np.array(numbers, np.float32)
    out = log1p(x)
    exact = np.log1p(x.astype(np.float64))
    assert (np.abs(out - exact) <= 2e-7 * exact + 1e-45).all()


def test_log1p_along_the_whole_range():
    x = np.concatenate([10.0 ** np.linspace(-30, 38, 200_001), np.linspace(0, 4, 200_001)]).astype(np.float32)
    out = log1p(x)
    exact = np.log1p(x.astype(np.float64))
    assert (np.abs(out - exact) <= 2e-7 * exact).all()
    assert not np.isfinite(log1p(np.array([np.nan, np.inf], np.float32))).any()


def test_weights_are_read_whole(observation, trained_like):
    """Every parameter matters: changing any one tensor changes the answer as it changes the dense form's."""
    obs = observation(1, 2, 5, 5, 2)
    obs["mask"][:] = 1
    obs["kind"][:] = [0, len(schema.KINDS) - 1]
    network = trained_like(8, 2, 1)
    before = np.concatenate([a.ravel() for a in evaluate(network, obs)])
    for name, parameter in network.named_parameters():
        with torch.no_grad():
            parameter += 0.3
            after = np.concatenate([a.ravel() for a in evaluate(network, obs)])
            assert np.abs(after - before).max() > 1e-5, name
            assert_close(after, np.concatenate([a.ravel() for a in expected(network, obs)]))
            parameter -= 0.3
