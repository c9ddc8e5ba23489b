"""A decider answers whatever its policy does, and says why a fallback answered."""

import math
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from servegym.errors import InputError
from servegym.runtime.bundle import BundlePolicy, load_bundle
from servegym.runtime.decider import Decider
from servegym.runtime.export import Origin, export_bundle
from servegym.runtime.questions import Dispatch, Question, Stay, ask_dispatch, ask_migrate
from servegym.runtime.view import ClusterView, InstanceSettings, InstanceView, RequestView
from tests.runtime.test_bundle import network, observation

BUDGET_S = 0.25  # for tests on a busy machine


def busy_fleet() -> ClusterView:
    """Requests in flight 1, 2, 0, tokens 900, 200, 0."""
    settings = InstanceSettings.of("a100-llama-3.1-8b")
    view = ClusterView([InstanceView(settings) for _ in range(3)], longest_output=100)
    for k, (instance, tokens) in enumerate([(0, 900), (1, 100), (1, 100)]):
        request = RequestView(k, 0.1 * k, tokens, 10)
        view.arrived(request)
        view.dispatched(request, instance)
    view.instances[2].available = False
    return view


def dispatch_question() -> Question:
    view = busy_fleet()
    request = RequestView("new", 1.0, 50, 10)
    view.arrived(request)
    return ask_dispatch(view, request)


class Scripted:
    """A policy that does as it is told."""

    name, kinds, needs_oracle = "scripted", ("dispatch",), False

    def __init__(self, answer=1, busy_s: float = 0.0) -> None:
        self.answer, self.busy_s = answer, busy_s

    def reset(self, lanes: int, seed: int) -> None:
        pass

    def act(self, obs) -> np.ndarray:
        until = time.thread_time() + self.busy_s
        while time.thread_time() < until:
            pass
        if isinstance(self.answer, Exception):
            raise self.answer
        return np.array([self.answer])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(network(), [observation(2, 4)], folder, Origin("tiny", fallback="least_tokens"))
    return folder


def counted(decider: Decider) -> dict[str, int]:
    return {reason: n for reason, n in decider.counts.items() if n}


def test_a_bundle_answers(exported):
    question = dispatch_question()
    decider = Decider(exported, budget_s=BUDGET_S)
    expected = question.actions[int(load_bundle(exported).act(question.obs)[0])]
    assert decider.decide(question) == expected
    assert counted(decider) == {"answered": 1}
    assert decider.rows == 1


def test_each_reason_for_a_fallback_is_counted(exported):
    question = dispatch_question()
    tokens, requests = Dispatch(1), Dispatch(0)  # by least_tokens and by least_request
    decider = Decider(exported, budget_s=BUDGET_S)
    assert decider.decide(question, stale=True) == tokens
    assert decider.decide(ask_migrate(busy_fleet())) == Stay()
    broken = {**question.obs, "edges": np.full_like(question.obs["edges"], np.nan)}
    assert decider.decide(question._replace(obs=broken)) == tokens
    wide = {**question.obs, "requests": np.zeros((1, 8, 16), np.float32)}
    assert decider.decide(question._replace(obs=wide)) == tokens
    assert "request rows" in decider.last_error
    assert counted(decider) == {"stale": 1, "nan": 1, "mismatch": 2}
    other = Decider(exported, fallback="least_request", budget_s=BUDGET_S)
    assert other.decide(question, stale=True) == requests


@pytest.mark.parametrize(
    ("answer", "told"),
    [(3, "candidate 3"), (99, "candidate 99"), (-1, "candidate -1"), (KeyError("x"), "KeyError")],
)
def test_answers_that_are_none_go_to_the_fallback(answer, told):
    decider = Decider(Scripted(answer), budget_s=BUDGET_S)
    assert decider.decide(dispatch_question()) == Dispatch(1)
    assert counted(decider) == {"mismatch": 1}
    assert told in decider.last_error


def test_a_policy_that_was_late_rests_for_nine_times_as_long():
    policy = Scripted(1, busy_s=0.1)
    decider = Decider(policy, budget_s=0.05)
    question = dispatch_question()
    assert decider.decide(question) == Dispatch(1)  # the fallback's; the policy says candidate 1, instance 0
    assert counted(decider) == {"timeout": 1}
    policy.busy_s = 0.0
    late = time.monotonic()
    while decider.decide(question) == Dispatch(1) and time.monotonic() - late < 30.0:
        time.sleep(0.01)
    assert 0.8 < time.monotonic() - late < 30.0
    assert decider.counts["timeout"] > 2 and decider.counts["answered"] == 1
    assert decider.decide(question) == Dispatch(0)  # in time again, so that it goes on


def test_a_policy_that_fails_late_rests_too_and_one_without_a_budget_never_does():
    decider = Decider(Scripted(KeyError("x"), busy_s=0.02), budget_s=0.001)
    for _ in range(2):
        assert decider.decide(dispatch_question()) == Dispatch(1)
    assert counted(decider) == {"mismatch": 1, "timeout": 1}
    patient = Decider(Scripted(1, busy_s=0.02), budget_s=math.inf)
    for _ in range(2):
        assert patient.decide(dispatch_question()) == Dispatch(0)


def test_a_policy_that_waits_for_a_core_is_not_late():
    policy = Scripted(1)
    policy.act = lambda obs: time.sleep(0.02) or np.array([1])
    decider = Decider(policy, budget_s=0.01)
    for _ in range(2):
        assert decider.decide(dispatch_question()) == Dispatch(0)
    assert counted(decider) == {"answered": 2}


def test_a_policy_answers_in_the_thread_that_asks():
    threads, policy = [], Scripted(1)
    policy.act = lambda obs: threads.append(threading.get_ident()) or np.array([1])
    assert Decider(policy, budget_s=BUDGET_S).decide(dispatch_question()) == Dispatch(0)
    assert threads == [threading.get_ident()]


def test_many_threads_ask_at_once(exported):
    decider, question, out = Decider(exported, budget_s=5.0), dispatch_question(), []

    def ask() -> None:
        out.extend(decider.decide(question) for _ in range(50))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(out) == 400 and len(set(out)) == 1
    assert counted(decider) == {"answered": 400}


def test_reload_takes_what_is_whole_and_refuses_what_is_not(exported, tmp_path):
    decider, question = Decider(exported, budget_s=BUDGET_S), dispatch_question()
    before = decider.policy
    damaged = Path(shutil.copytree(exported, tmp_path / "damaged"))
    data = bytearray((damaged / "policy.onnx").read_bytes())
    data[100] ^= 1
    (damaged / "policy.onnx").write_bytes(data)
    with pytest.raises(InputError, match="sha256"):
        decider.reload(damaged)
    assert decider.policy is before
    decider.decide(question)
    other = tmp_path / "other"
    export_bundle(network(), [observation(2, 4)], other, Origin("other", fallback="least_request"))
    decider.reload(other)
    assert isinstance(decider.policy, BundlePolicy) and decider.policy.name == "other"
    assert decider.decide(question, stale=True) == Dispatch(0)  # its own fallback
    assert counted(decider) == {"answered": 1, "stale": 1}  # goes on over a reload


def test_a_heuristic_by_name():
    decider = Decider("least_request", budget_s=BUDGET_S)
    assert decider.decide(dispatch_question()) == Dispatch(0)
    assert Decider("lmetric+llumnix", budget_s=BUDGET_S).rows == 8
    with pytest.raises(InputError, match="no_such_rule"):
        Decider("no_such_rule")
    with pytest.raises(InputError, match="budget_s"):
        Decider("lmetric", budget_s=0.0)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"manifest.json"):
        Decider(tmp_path)
