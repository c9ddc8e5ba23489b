"""A policy inside vLLM: who gives way when KV memory is short, and how many prompt tokens an iteration has.

    vllm serve MODEL --scheduling-policy priority
        --scheduler-cls servegym.runtime.vllm.scheduler.ServeGymScheduler
        --additional-config '{"servegym": {"policy": "BUNDLE", "profile": "h100-llama-3.1-8b"}}'

Under the priority policy vLLM evicts the running request of the largest (priority, arrival) whenever the
next token of a running request finds no block. At that moment, and only then, the policy is asked; the
request that it names gets the largest priority until it is evicted, and its own back before it is queued
again. A policy that answers `budget`, too, sets the most prompt tokens of an iteration (`prefill_cap`).
Everything else is vLLM's. Where the policy does not answer, or rests because it was late, vLLM's own victim
goes, and the cap stays. What goes wrong in this code never reaches vLLM, which then decides as if alone.

`servegym.runtime.vllm.seams` lists what this relies on inside vLLM.
"""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

from servegym.errors import InputError
from servegym.runtime.decider import Decider
from servegym.runtime.fleet import InstanceSettings
from servegym.runtime.questions import Preempt, ask_preempt
from servegym.runtime.view import ClusterView
from servegym.runtime.vllm.config import SchedulerConfig, read_config
from servegym.runtime.vllm.engine_view import EngineView
from servegym.runtime.vllm.faults import Faults
from servegym.runtime.vllm.order import ShortestFirst
from servegym.runtime.vllm.prefill_cap import PrefillCap
from servegym.runtime.vllm.seams import moved

logger = init_logger("vllm.servegym")
LAST = 1 << 64  # beyond every priority that a client can give
REPORT_S = 60.0
WHOLE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
REMEMBERED = 4096  # decision times and victims


class ServeGymScheduler(AsyncScheduler):
    """vLLM's scheduler with victims, and the tokens of prompts, chosen by a policy.

    No kind of question that policies are trained on orders a waiting queue: a rule of the configuration does.

    Attributes:
        victims: (request id, vLLM's own choice) of the latest decisions that led to an eviction.
        decision_s: seconds of the latest decisions, observation included.
        max_num_scheduled_tokens: vLLM's, of the next iteration.
    """

    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        changes = moved()
        if changes:
            hint = "this scheduler was written for another vLLM; see servegym.runtime.vllm.seams"
            raise InputError("vLLM", "scheduler", "; ".join(changes), hint)
        super().__init__(*args, **kwargs)
        self._config = read_config(self.vllm_config.additional_config)
        if self.policy != SchedulingPolicy.PRIORITY:
            raise InputError("vLLM", "--scheduling-policy", self.policy.value, "give priority")
        self._engine = EngineView(self._settings(self._config), self.max_model_len)
        self._decider = Decider(self._config.policy, budget_s=self._config.budget_us * 1e-6)
        kinds = self._decider.policy.kinds
        if "preempt" not in kinds:
            raise InputError(self._config.policy, "kinds", kinds, "choose a policy that answers preempt")
        self._most_tokens = self.max_num_scheduled_tokens
        self._cap = PrefillCap(self._engine, self._decider, self._most_tokens, self._cap_period_s())
        self.victims: deque[tuple[str, str]] = deque(maxlen=REMEMBERED)
        self.decision_s: deque[float] = deque(maxlen=REMEMBERED)
        self._faults = Faults()
        self._counts = {"decisions": 0, "followed": 0, "preemptions": 0}
        self._marked: tuple[Request, int] | None = None
        self._reported_at = time.monotonic()
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_or_choose  # type: ignore[method-assign]
        if self._config.order == "shortest":
            self.waiting = ShortestFirst(self._left_tokens)
        logger.info(
            "ServeGym: %s chooses what gives way when KV memory is short (%d blocks of %d tokens), "
            "within %g us of CPU time; waiting requests by %s; costs of %s",
            self._config.policy, self._blocks(), self.block_size, self._config.budget_us, self._config.order,
            self._config.profile,
        )  # fmt: skip

    def _settings(self, config: SchedulerConfig) -> InstanceSettings:
        return InstanceSettings.of(
            config.profile,
            prefix_caching=bool(self.cache_config.enable_prefix_caching),
            kv_blocks=self._blocks(),
            block_tokens=self.block_size,
            token_budget=max(self.max_num_scheduled_tokens, self.max_num_running_reqs),
            max_seqs=self.max_num_running_reqs,
            queue="priority",
            async_scheduling=True,
        )

    def _cap_period_s(self) -> float:
        """Seconds between questions for the cap; 0, never, where vLLM may not cut what it schedules."""
        config = self.scheduler_config
        is_cut = config.enable_chunked_prefill and not config.disable_chunked_mm_input
        return self._config.prefill_period_s if is_cut and not self.num_spec_tokens else 0.0

    def _blocks(self) -> int:
        return self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is never given out

    # --- vLLM's seams -------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As vLLM, with the victims and within the tokens that the policy chooses."""
        self.max_num_scheduled_tokens = self._most_tokens
        with self._faults.contained("schedule"):
            self._prepare()
        try:
            return super().schedule(throttle_prefills)
        finally:
            self._unmark()
            if time.monotonic() - self._reported_at > REPORT_S:
                self._report()

    def _prepare(self) -> None:
        """What precedes an iteration: the numbers that a router would know, and the cap."""
        running, waiting = self.get_request_counts()
        self._engine.scrape(running, waiting, self.kv_cache_manager.usage)
        self._cap.renew(self._look_at_all)
        self.max_num_scheduled_tokens = self._cap.tokens(self.running)

    def _allocate_or_choose(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """Blocks for a request; where a running one gets none, mark what gives way for it."""
        blocks = self._allocate_slots(request, num_new_tokens, *args, **kwargs)
        if blocks is None and request.status == RequestStatus.RUNNING:
            self._unmark()
            if len(self.running) > 1:
                with self._faults.contained("choose"):
                    self._choose()
        return blocks

    def _choose(self) -> None:
        """Ask the policy for a victim and mark it."""
        start = time.perf_counter()
        action = self._decider.decide(ask_preempt(self._look(), 0))
        self.decision_s.append(time.perf_counter() - start)
        self._counts["decisions"] += 1
        victim = self.requests.get(action.key) if isinstance(action, Preempt) else None
        if victim is not None and victim.status == RequestStatus.RUNNING:
            self._marked = victim, victim.priority
            victim.priority = LAST

    def _look(self) -> ClusterView:
        manager = self.kv_cache_manager
        free, held = manager.block_pool.get_num_free_blocks(), manager.coordinator.single_type_managers[0]
        return self._engine.look(self.running, free, held.req_to_blocks)

    def _look_at_all(self) -> ClusterView:
        view = self._look()
        self._engine.look_at_waiting(self.waiting.peek_request() if self.waiting else None)
        return view

    def _unmark(self) -> None:
        if self._marked is not None:
            request, priority = self._marked
            request.priority, self._marked = priority, None

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        is_chosen = self._marked is not None and self._marked[0] is request
        if is_chosen:
            self._unmark()
        with self._faults.contained("preempt"):
            self._gives_way(request, is_chosen)
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _gives_way(self, request: Request, is_chosen: bool) -> None:
        """Write down who is about to be evicted."""
        self._counts["preemptions"] += 1
        if is_chosen:
            own = max([*self.running, request], key=lambda r: (r.priority, r.arrival_time))
            self.victims.append((request.request_id, own.request_id))
            self._counts["followed"] += 1
        self._engine.preempted(request)

    def add_request(self, request: Request) -> None:
        """As vLLM."""
        if request.request_id not in self.requests:
            with self._faults.contained("arrive"):
                self._engine.arrived(request)
        super().add_request(request)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        with self._faults.contained("finish"):
            self._engine.finished(request, request.status in WHOLE)
        return super()._free_request(request, delay_free_blocks)

    def _left_tokens(self, request: Request) -> int:
        """Predicted output tokens still to come, by which `ShortestFirst` orders."""
        with self._faults.contained("order"):
            return self._engine.left_tokens(request)
        return request.max_tokens

    def shutdown(self) -> None:
        """As vLLM, with a last report."""
        self._report()
        super().shutdown()

    # --- numbers ------------------------------------------------------------------------------------------

    def numbers(self) -> dict[str, Any]:
        """Counts since the start, answers by reason, faults, and microseconds of the latest decisions."""
        p50, p99 = np.percentile(self.decision_s, [50, 99]) * 1e6 if self.decision_s else (None, None)
        return {
            **self._counts,
            "caps": self._cap.asked,
            "answers": dict(self._decider.counts),
            "faults": dict(self._faults.counts),
            "decision_us": {"p50": p50, "p99": p99},
        }

    def _report(self) -> None:
        """Log the numbers and write them, where the configuration says to what file."""
        self._reported_at = time.monotonic()
        if self._config.report:
            with self._faults.contained("report"):
                numbers = {"policy": self._config.policy, **self.numbers()}
                logger.info("ServeGym: %s", json.dumps(numbers))
                text = json.dumps(numbers, indent=1) + "\n"
                Path(self._config.report).write_text(text, encoding="utf-8")
