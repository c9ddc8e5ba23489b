"""Run by the interpreter that has vLLM; prints JSON.

    preempting.py MODEL PROFILE POLICY ...   the policies one after the other in one engine's scheduler
    preempting.py MODEL                      vLLM's own scheduler

The KV cache is far too small for the requests together. Before the policies come the same requests six at a
time, which preempts nothing. vLLM starts one engine a process.
"""

from __future__ import annotations

import json
import sys
from typing import Any, ClassVar

from vllm import LLM, SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from servegym.agents.heuristics.budget_fixed import BudgetFixed
from servegym.agents.heuristics.composite import Composite
from servegym.agents.heuristics.victim_largest import VictimLargest
from servegym.runtime.vllm.order import ShortestFirst
from servegym.runtime.vllm.scheduler import ServeGymScheduler

REQUESTS, SOME, OUTPUT, BLOCKS = 108, 30, 40, 13
BUDGET, LEAST_CAP = 1024, 64
FAULTY = ["arrived", "finished", "preempted", "left_tokens", "scrape", "look"]


class Recorder(ServeGymScheduler):
    """Notes what was asked for and who gave way."""

    log: ClassVar[list[dict[str, Any]]] = []
    steps: ClassVar[list[tuple[int, int]]] = []  # tokens of prompts in an iteration, and the cap

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        decide = self._decider.decide

        def noting(question: Any) -> Any:
            if question.kind != "preempt":
                return decide(question)
            answered = self._decider.counts["answered"]
            action = decide(question)
            fell_back = self._decider.counts["answered"] == answered
            held = {r.request_id: r.num_computed_tokens for r in self.running}
            own = question.actions[0].key
            self.log.append({"asked": action.key, "held": held, "own": own, "fell_back": fell_back})
            return action

        self._decider.decide = noting  # type: ignore[method-assign]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        prompts = sum(tokens for tokens in output.num_scheduled_tokens.values() if tokens > 1)
        self.steps.append((prompts, self._engine.view.instances[0].prefill_cap))
        return output

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self.log.append({"gone": request.request_id, "priority": request.priority})
        super()._preempt_request(request, *args, **kwargs)
        self.log[-1]["priority_after"] = request.priority


class Stock(AsyncScheduler):
    """Counts."""

    preemptions = 0

    def _preempt_request(self, *args: Any, **kwargs: Any) -> None:
        Stock.preemptions += 1
        super()._preempt_request(*args, **kwargs)


# Prompts of nearly a block of 128 tokens: soon after admission all want a second one.
PROMPTS = [
    {"prompt_token_ids": [(7 * k + 3 * j) % 1000 for j in range(108 + k % 18)]} for k in range(REQUESTS)
]
SAMPLING = [
    SamplingParams(temperature=0, max_tokens=OUTPUT + 5 * (k % 7), ignore_eos=True) for k in range(REQUESTS)
]


def play(model: str, profile: str, policies: list[str]) -> dict[str, Any]:
    config = {
        "servegym": {"policy": policies[0], "profile": profile, "budget_us": 1e5, "prefill_period_s": 0.01}
    }
    llm = start(model, Recorder, additional_config=config, max_num_batched_tokens=BUDGET)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    groups = [answers(llm, slice(k, k + 6)) for k in range(0, REQUESTS, 6)]
    found: dict[str, Any] = {"quiet": [t for group in groups for t in group], "runs": {}}
    found["noise"] = len(Recorder.log)
    for policy in policies:
        scheduler._decider.reload(policy)
        Recorder.log.clear()
        tokens = answers(llm, slice(None))
        found["runs"][policy] = {"tokens": tokens, "log": list(Recorder.log), "numbers": scheduler.numbers()}
    scheduler.waiting = ShortestFirst(scheduler._left_tokens)
    found["shortest"] = answers(llm, slice(0, SOME))
    scheduler._decider.reload(Composite("capped", preempt=VictimLargest(), budget=BudgetFixed(LEAST_CAP)))
    Recorder.steps.clear()
    tokens = answers(llm, slice(0, SOME))
    found["capped"] = {"tokens": tokens, "steps": list(Recorder.steps), "asked": scheduler.numbers()["caps"]}
    found["broken"] = [play_broken(llm, names) for names in (["preempted"], FAULTY)]
    return found


def play_broken(llm: LLM, names: list[str]) -> dict[str, Any]:
    """With methods of the engine's view that raise."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler

    def broken(*args: Any) -> Any:
        raise OverflowError("math range error")

    for name in names:
        setattr(scheduler._engine, name, broken)
    Recorder.log.clear()
    scheduler._faults.counts.clear()
    tokens = answers(llm, slice(0, SOME))
    return {"tokens": tokens, "log": list(Recorder.log), "faults": scheduler.numbers()["faults"]}


def play_stock(model: str) -> dict[str, Any]:
    tokens = answers(start(model, Stock), slice(None))
    return {"tokens": tokens, "preemptions": Stock.preemptions}


def start(model: str, scheduler: type, **settings: Any) -> LLM:
    return LLM(
        model, dtype="float32", max_model_len=1024, max_num_seqs=16, enforce_eager=True,
        num_gpu_blocks_override=BLOCKS, enable_prefix_caching=False, disable_log_stats=True,
        scheduler_cls=scheduler, scheduling_policy="priority", **settings,
    )  # fmt: skip


def answers(llm: LLM, some: slice) -> list[list[int]]:
    outputs = llm.generate(PROMPTS[some], SAMPLING[some], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    model, *rest = sys.argv[1:]
    print("\n" + json.dumps(play(model, rest[0], rest[1:]) if rest else play_stock(model)))
