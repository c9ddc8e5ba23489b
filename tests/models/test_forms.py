"""The three forms of the network are one function, and it has the symmetries of its input."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.envs.cluster import schema
from servegym.models import numpy_policy
from servegym.models.dense import DenseNetwork
from servegym.models.features import ILLEGAL
from servegym.models.graph import CANDIDATE, GraphNetwork, to_batch


def assert_close(got, expected):
    """Equal to 5e-5 of the largest legal number: float32 sums in another order, and some cancel."""
    largest = np.abs(expected[expected > ILLEGAL]).max(initial=1.0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5 * largest)


def run(network, obs):
    with torch.no_grad():
        logits, values = network({name: torch.from_numpy(rows) for name, rows in obs.items()})
    return logits.numpy(), values.numpy()


sizes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "lanes": st.integers(1, 4),
        "real": st.integers(1, 9),
        "padding": st.integers(0, 3),
        "requests": st.integers(1, 4),
        "hidden": st.sampled_from([4, 32]),
        "layers": st.integers(0, 3),
    }
)


def draw(observation, trained_like, size):
    obs = observation(
        size["seed"], size["lanes"], size["real"], size["real"] + size["padding"], size["requests"]
    )
    return obs, trained_like(size["hidden"], size["layers"], size["seed"])


@settings(max_examples=60, deadline=None)
@given(size=sizes)
def test_graph_form_equals_dense_form(observation, trained_like, size):
    obs, dense = draw(observation, trained_like, size)
    graph = GraphNetwork(dense.config)
    graph.load_state_dict(dense.state_dict())
    batch = to_batch(obs)
    with torch.no_grad():
        logits, values = graph(batch)
    expected, expected_values = run(dense, obs)
    lane = batch["request"].batch[batch[CANDIDATE].edge_index[0]]
    assert_close(logits.numpy(), expected[lane.numpy(), batch[CANDIDATE].answer.numpy()])
    assert_close(values.numpy(), expected_values)


@settings(max_examples=60, deadline=None)
@given(size=sizes)
def test_numpy_form_equals_dense_form(observation, trained_like, size):
    obs, dense = draw(observation, trained_like, size)
    weights = {name: parameter.numpy() for name, parameter in dense.state_dict().items()}
    for got, expected in zip(numpy_policy.forward(weights, obs), run(dense, obs), strict=True):
        assert got.dtype == np.float32
        assert_close(got, expected)


@settings(max_examples=30, deadline=None)
@given(size=sizes, fill=st.floats(0, 1e6))
def test_padding_changes_nothing(observation, trained_like, size, fill):
    obs, network = draw(observation, trained_like, {**size, "padding": 0, "requests": 1})
    extra, lanes = size["padding"] + 1, size["lanes"]

    def pad(name, value):
        return np.concatenate(
            [obs[name], np.full((lanes, extra, *obs[name].shape[2:]), value, obs[name].dtype)], 1
        )

    padded = obs | {name: pad(name, fill) for name in ("instances", "edges")}
    padded |= {name: pad(name, 0) for name in ("candidates", "mask", "instance_mask")}
    logits, values = run(network, obs)
    padded_logits, padded_values = run(network, padded)
    assert_close(padded_logits[:, :-extra], logits)
    assert_close(padded_values, values)
    assert (padded_logits[:, -extra:] == ILLEGAL).all()


@settings(max_examples=30, deadline=None)
@given(size=sizes)
def test_renumbering_instances_renumbers_the_answer(observation, trained_like, size):
    obs, network = draw(observation, trained_like, {**size, "requests": 1})
    count = obs["instances"].shape[1]
    order = np.random.default_rng(size["seed"]).permutation(count)
    answers = np.concatenate([[0], 1 + order])
    renumbered = obs | {name: obs[name][:, order] for name in ("instances", "instance_mask")}
    renumbered |= {name: obs[name][:, answers] for name in ("candidates", "edges", "mask")}
    renumbered["candidates"] = renumbered["candidates"].copy()
    renumbered["candidates"][..., 1] = np.argsort(order)[renumbered["candidates"][..., 1]]
    logits, values = run(network, obs)
    new_logits, new_values = run(network, renumbered)
    assert_close(new_logits, logits[:, answers])
    assert_close(new_values, values)


def test_candidate_zero_is_its_instance_but_for_the_edge(observation, trained_like):
    obs, network = observation(3, requests=1), trained_like(32, 2, 3)
    default = obs["candidates"][:, 0, 1]
    lanes = np.arange(len(default))
    obs["mask"][:] = 1
    obs["edges"][lanes, 1 + default] = obs["edges"][:, 0]
    logits, _ = run(network, obs)
    assert_close(logits[lanes, 1 + default], logits[:, 0])
    obs["edges"][lanes, 1 + default, schema.column(schema.EDGE, "is_default")] = 0
    logits, _ = run(network, obs)
    assert (np.abs(logits[lanes, 1 + default] - logits[:, 0]) > 1e-3).all()


def test_request_edges_and_history_reach_the_answer(observation, trained_like):
    obs, network = observation(4, lanes=1), trained_like(32, 2, 4)
    logits, values = run(network, obs)
    for name in ("instances", "requests", "edges", "globals", "history"):
        changed, changed_values = run(network, obs | {name: obs[name] * 1.5 + 1})
        assert np.abs(changed - logits)[obs["mask"] == 1].max() > 1e-4, name
        assert abs(changed_values - values) > 1e-4, name


def test_log_probabilities_are_finite_and_illegal_ones_impossible(observation, trained_like):
    obs, network = observation(5, real=3, instances=9), trained_like(32, 2, 5)
    log_probs = torch.log_softmax(torch.from_numpy(run(network, obs)[0]), -1)
    assert torch.isfinite(log_probs).all()
    assert (log_probs.exp()[obs["mask"] == 0] == 0).all()
    np.testing.assert_allclose(log_probs.exp().sum(1), 1, rtol=1e-5)


def test_same_cluster_at_another_size_looks_alike(observation):
    """Totals are seen per instance: twice the fleet under twice the load has nearly the same context."""
    small = observation(6, lanes=1, real=16, instances=16)
    large = {**small, "globals": small["globals"] * 2, "history": small["history"] * 2}
    large["globals"][:, schema.column(schema.GLOBAL, "since_last_arrival_s")] /= 2
    context = DenseNetwork().scaling.context
    a, b = (context(torch.from_numpy(o["globals"]), torch.from_numpy(o["history"])) for o in (small, large))
    count = schema.column(schema.GLOBAL, "instances")
    different = torch.nonzero((a - b).abs()[0] > 1e-6)[:, 0]
    assert different.tolist() == [count]
    assert a[0, count] == pytest.approx(np.log1p(8 / 16))


def test_numpy_form_needs_no_torch():
    code = "import sys, servegym.models.numpy_policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_same_seed_same_network():
    a, b, c = (DenseNetwork(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["instance_in.weight"], c["instance_in.weight"])
