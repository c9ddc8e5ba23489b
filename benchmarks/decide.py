"""One exported decision among 16 engines in ONNX Runtime: median microseconds, observation in, answer out.

    python benchmarks/decide.py

The network is the default one with fresh weights, which decides as fast as a trained one, exported as
`servegym export` does. The questions are those of a router about one request, as many candidates as engines
and the default one, which differs from question to question. The detail has other fleets; a question whose
default and legal candidates are new; the same decision in a lane of the model (goal 10 us) and in numpy; a
router's whole decision: the question built from its view, and the answer by way of the thread that keeps the
time budget; and the question of a policy that also migrates.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import cycle
from pathlib import Path

import numpy as np
from report import report

from servegym.agents.task import Task
from servegym.envs.cluster.kernel import kernel
from servegym.envs.cluster.observe import Frame, make_frame
from servegym.envs.cluster.schema import OFFERS
from servegym.models import inlane, numpy_policy
from servegym.models.config import NetworkConfig
from servegym.models.dense import DenseNetwork
from servegym.models.packing import load_weights, make_scratch, make_weights
from servegym.runtime.bundle import BundlePolicy
from servegym.runtime.decider import Decider
from servegym.runtime.export import Origin, export_bundle
from servegym.runtime.questions import Question, ask_dispatch
from servegym.runtime.view import ClusterView, InstanceSettings, InstanceView, RequestView

GOAL_US, INLANE_GOAL_US = 30.0, 10.0
ENGINES = (8, 16, 64, 256)
REPEATS, WARM = 4000, 200
LANE_CALLS = 200  # in one call of the kernel, which itself takes about a microsecond


def busy(engines: int) -> tuple[ClusterView, RequestView]:
    """A fleet of two kinds with about 20 requests an engine in flight, and a request that has arrived."""
    rng = np.random.default_rng(0)
    kinds = [InstanceSettings.of(name) for name in ("a100-llama-3.1-8b", "l40s-llama-3.1-8b")]
    view = ClusterView([InstanceView(kinds[i % 2]) for i in range(engines)], longest_output=1024)
    for instance in view.instances:
        instance.cached = set(range(int(rng.integers(0, 40))))
        instance.seen_running, instance.seen_kv_usage = 20.0, float(rng.random())
    for k in range(20 * engines):
        request = RequestView(k, 0.01 * k, int(rng.integers(50, 4000)), int(rng.integers(1, 500)))
        view.arrived(request)
        view.dispatched(request, int(rng.integers(engines)))
        view.streamed(request, int(rng.integers(0, 20)))
    new = RequestView("new", 0.2 * engines, 2000, 250, prefix=tuple(range(125)))
    view.arrived(new)
    return view, new


def timed(call: Callable[[], object], repeats: int = REPEATS, calls: int = 1) -> dict[str, float]:
    """Microseconds of a call: median, 99th percentile and the least, which other work hardly changes."""
    for _ in range(min(WARM, repeats)):
        call()
    samples = np.empty(repeats)
    gc.disable()
    for k in range(repeats):
        start = time.perf_counter_ns()
        call()
        samples[k] = time.perf_counter_ns() - start
    gc.enable()
    p50, p99 = np.percentile(samples, (50, 99)) / 1e3 / calls
    return {"p50": round(p50, 2), "p99": round(p99, 2), "min": round(samples.min() / 1e3 / calls, 2)}


@kernel
def _decide(net, scratch, frame, calls):
    """Decide `calls` times; the answers of all are in the result, so that none is left out."""
    total = 0
    for _ in range(calls):
        legal, _value = inlane.forward(net, scratch, frame, 0)
        best = scratch.legal[0]
        for k in range(1, legal):
            if scratch.logits[scratch.legal[k]] > scratch.logits[best]:
                best = scratch.legal[k]
        total += best
    return total


def in_lane(weights: dict[str, np.ndarray], question: Question) -> dict[str, float]:
    obs = question.obs
    engines, rows = obs["instances"].shape[1], obs["requests"].shape[1]
    frame: Frame = make_frame(1, engines, rows)
    for name, array in obs.items():
        getattr(frame, name)[...] = array
    config = NetworkConfig()
    packed = make_weights(config.hidden, config.layers)
    load_weights(packed, weights)
    scratch = make_scratch(packed, engines, rows, obs["mask"].shape[1])
    expected = int(numpy_policy.forward(weights, obs)[0].argmax())
    assert _decide(packed, scratch, frame, LANE_CALLS) == expected * LANE_CALLS
    return timed(lambda: _decide(packed, scratch, frame, LANE_CALLS), 200, LANE_CALLS)


def export(weights_of: DenseNetwork, rows: int, folder: Path) -> BundlePolicy:
    """The network as a bundle for dispatch alone (one request row), or for dispatch and migration."""
    decisions = ("dispatch",) if rows == 1 else ("dispatch", "migrate")
    env = "ServeGym/Dispatch-v0" if rows == 1 else "ServeGym/Cluster-v0"
    golden = [ask_dispatch(*busy(engines), rows).obs for engines in (4, 16)]
    return export_bundle(weights_of, golden, folder, Origin("decide", task=Task(env, decisions)))


def in_turn(engines: int, rows: int = 1) -> Iterator[dict[str, np.ndarray]]:
    """Observations over and over: of requests that arrive one after the other, each at another default."""
    view, _ = busy(engines)
    rng, found = np.random.default_rng(0), []
    for k in range(16):
        request = RequestView(f"new {k}", view.now_s + 0.01, int(rng.integers(50, 4000)), 250)
        view.arrived(request)
        found.append(ask_dispatch(view, request, rows))
        view.dispatched(request, found[-1].actions[0].instance)
    return cycle([question.obs for question in found])


def new_joins(policy: BundlePolicy, obs: dict[str, np.ndarray]) -> None:
    """Decide as if nobody had been joined in this way before."""
    obs["candidates"][0, :, 2] -= 1  # which the network does not read
    policy.act(obs)


def measure(engines: int, policy: BundlePolicy, weights: dict[str, np.ndarray]) -> dict[str, object]:
    view, request = busy(engines)
    question, questions = ask_dispatch(view, request), in_turn(engines)
    decider = Decider(policy, budget_s=1.0)
    return {
        "onnxruntime": timed(lambda: policy.act(next(questions))),
        "onnxruntime, new joins": timed(lambda: new_joins(policy, question.obs), 1000),
        "numpy": timed(lambda: numpy_policy.forward(weights, question.obs)[0].argmax(1), 500),
        "question": timed(lambda: ask_dispatch(view, request), 1000),
        "question and decider": timed(lambda: decider.decide(ask_dispatch(view, request)), 1000),
        "in lane": in_lane(weights, question),
    }


def main() -> None:
    network = DenseNetwork(NetworkConfig(), seed=0)
    weights = {name: value.detach().numpy() for name, value in network.named_parameters()}
    table: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        policy = export(network, 1, Path(scratch) / "dispatch")
        for engines in ENGINES:
            table[f"{engines} engines"] = found = measure(engines, policy, weights)
            print(f"{engines} engines: " + ", ".join(f"{name} {t['p50']} us" for name, t in found.items()))
        wide = export(network, OFFERS, Path(scratch) / "cluster")
        offers = in_turn(16, OFFERS)
        several = timed(lambda: wide.act(next(offers)))
    sixteen = table["16 engines"]
    value = sixteen["onnxruntime"]["p50"]
    print(f"16 engines, {OFFERS} request rows: {several['p50']} us in ONNX Runtime")
    detail = {
        "us": table,
        f"us_16_engines_{OFFERS}_request_rows": several,
        "in_lane": {"us": sixteen["in lane"]["p50"], "goal": INLANE_GOAL_US},
        "network": "hidden 32, 2 layers",
        "threads": 1,
        "onnxruntime": version("onnxruntime"),
        "load_average": os.getloadavg()[0],
    }
    report("decide", value, "us", GOAL_US, detail)


if __name__ == "__main__":
    main()
