"""The prefill cap in a scheduler that cuts prompts as vLLM's does, without vLLM."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from servegym.agents.policy import Policy
from servegym.runtime.decider import Decider
from servegym.runtime.fleet import InstanceSettings
from servegym.runtime.observation import EDGE, REQUEST
from servegym.runtime.view import ClusterView
from servegym.runtime.vllm.engine_view import EngineView
from servegym.runtime.vllm.prefill_cap import PrefillCap

MOST = 1024


class Scheduler:
    """Decodes first, then prompts in order of arrival, within the tokens of an iteration."""

    def __init__(self, policy: Policy | str, period_s: float = 1e-9) -> None:
        settings = InstanceSettings.of(
            "a100-llama-3.1-8b", kv_blocks=4096, block_tokens=16, max_seqs=16, token_budget=MOST,
            queue="priority",
        )  # fmt: skip
        self.engine = EngineView(settings, 1024)
        self.decider = Decider(policy, budget_s=30.0)
        self.cap = PrefillCap(self.engine, self.decider, MOST, period_s)
        self.running: list[Any] = []
        self.waiting: list[Any] = []

    def arrive(self, name: str, prompt: int) -> Any:
        request = SimpleNamespace(
            request_id=name, arrival_time=time.time(), num_prompt_tokens=prompt, max_tokens=50, priority=0,
            sampling_params=SimpleNamespace(extra_args=None), num_output_tokens=0, num_computed_tokens=0,
            is_prefill_chunk=False,
        )  # fmt: skip
        self.engine.arrived(request)
        self.waiting.append(request)
        return request

    def look(self) -> ClusterView:
        view = self.engine.look(self.running, 4096, {})
        self.engine.look_at_waiting(self.waiting[0] if self.waiting else None)
        return view

    def step(self) -> dict[str, int]:
        """One iteration; returns the tokens of each request."""
        self.cap.renew(self.look)
        left, given = self.cap.tokens(self.running), {}
        while left and self.waiting and len(self.running) < 16:
            self.running.append(self.waiting.pop(0))
        for request in self.running:
            goal = request.num_prompt_tokens + request.num_output_tokens
            given[request.request_id] = tokens = min(goal - request.num_computed_tokens, left)
            left -= tokens
            request.num_computed_tokens += tokens
            request.is_prefill_chunk = request.num_computed_tokens < goal
            request.num_output_tokens += not request.is_prefill_chunk
        return given


def start(policy: Policy | str, **settings: Any) -> Scheduler:
    """With a request that decodes and a long prompt that waits."""
    scheduler = Scheduler(policy, **settings)
    scheduler.arrive("short", 10)
    assert scheduler.step() == {"short": 10}
    scheduler.arrive("long", 3000)
    return scheduler


def test_prompts_get_the_cap_beside_the_decodes():
    scheduler = start("victim_largest+budget_fixed")
    assert scheduler.step() == {"short": 1, "long": 512}
    assert scheduler.look().instances[0].prefill_cap == 512
    given = [scheduler.step() for _ in range(5)]
    assert given == [{"short": 1, "long": 512}] * 4 + [{"short": 1, "long": 440}]
    asked = scheduler.cap.asked
    assert asked == 6
    assert scheduler.step() == {"short": 1, "long": 1}
    assert scheduler.cap.asked == asked  # nothing shares the iteration with a prompt
    assert scheduler.decider.counts["answered"] == asked


def test_what_waits_counts_as_what_is_computed_in_part():
    seen = []
    scheduler = start("budget_fixed")
    scheduler.cap._decider = SimpleNamespace(
        policy=scheduler.decider.policy, decide=lambda question: seen.append(question) or question.actions[0]
    )
    for _ in range(2):
        scheduler.step()
    queue_s = [float(question.obs["edges"][0, 0, EDGE["queue_s"]]) for question in seen]
    assert queue_s[1] / queue_s[0] == pytest.approx(2 / 3, rel=0.1)  # 3 iterations, then 2
    prompts = [question.obs["requests"][0, 0] for question in seen]
    assert [row[REQUEST["prompt_tokens"]] for row in prompts] == [3000, 3000]
    assert [row[REQUEST["kv_tokens"]] for row in prompts] == [0, MOST - 1]


@pytest.mark.parametrize(
    "settings", [{"policy": "victim_largest"}, {"policy": "budget_fixed", "period_s": 0.0}]
)
def test_who_is_not_asked_leaves_vllms_budget(settings):
    scheduler = start(**settings)
    assert scheduler.step() == {"short": 1, "long": MOST - 1}
    assert scheduler.cap.asked == 0


def test_an_answer_holds_for_a_period():
    scheduler = Scheduler("budget_fixed", period_s=3600.0)
    scheduler.arrive("short", 10)
    scheduler.step()
    scheduler.arrive("long", 3000)
    assert scheduler.step() == {"short": 1, "long": MOST - 1}  # the first period has not passed
    scheduler.cap._next_s = 0.0
    assert scheduler.step() == {"short": 1, "long": 512}
    assert scheduler.step() == {"short": 1, "long": 512}
    assert scheduler.cap.asked == 1


class Late:
    """A policy that needs longer than it has."""

    name, kinds, needs_oracle = "late", ("budget",), False

    def reset(self, lanes: int, seed: int) -> None:
        pass

    def act(self, obs: Any) -> np.ndarray:
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass
        return np.array([2])


def test_a_late_answer_changes_nothing():
    scheduler = start(Late())
    scheduler.decider.budget_s = 1e-3
    assert scheduler.step() == {"short": 1, "long": MOST - 1}
    assert scheduler.cap.asked == 1
    assert scheduler.decider.counts["timeout"] == 1
