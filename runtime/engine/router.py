"""The router of a real cluster: keeps the view, asks the policy, reads the instances' metrics.

Whoever calls holds the lock of the cluster, so that what a question shows is what holds when it is answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import inf

import numpy as np

from servegym.agents.heuristics import heuristic_of
from servegym.agents.play import roles
from servegym.agents.policy import Policy
from servegym.envs.cluster.decisions import kinds_of
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.state import PS
from servegym.envs.metrics import class_slos
from servegym.envs.scenario import Scenario
from servegym.runtime import questions
from servegym.runtime.decider import Decider
from servegym.runtime.engine.request import Request
from servegym.runtime.engine.scheduler import Scheduler
from servegym.runtime.prompts import previous_turns
from servegym.runtime.view import ClusterView, InstanceSettings, InstanceView, RequestView

_UNASKED = ("engine", "stay", "default", "keep")  # rules of the model that are what happens without an answer


class Router:
    """One play of an episode under a policy.

    Args:
        schedulers: one an instance, of the episode's cluster.
        settings: the same instances as views see them.
        policy: answers what it is for; the rest is left to the rules that it was trained beside, else to the
            stock system's, as in `servegym.agents.play`.
        seed: of the policy and of the phases at which metrics are read.

    Raises:
        InputError: a policy that has nothing to decide here.
    """

    def __init__(
        self,
        schedulers: Sequence[Scheduler],
        settings: Sequence[InstanceSettings],
        policy: Policy,
        scenario: Scenario,
        episode: Episode,
        seed: int,
    ) -> None:
        workload = episode.workload
        self.schedulers, self.episode = schedulers, episode
        self.slos = class_slos(workload.class_names, scenario.slo, scenario.class_slo)
        unit = workload.prefix_block_tokens
        self.view = ClusterView(
            [
                InstanceView(s, prefix_tokens=unit, cached=scheduler.memory.units)
                for s, scheduler in zip(settings, schedulers, strict=True)
            ],
            longest_output=workload.max_output_tokens,
            least_urgent=int(workload.priority.max()),
        )
        self.previous = previous_turns(workload)
        self.live: dict[int, tuple[Request, RequestView]] = {}
        self.placed = np.full(len(workload), -1)  # where each request was last
        self.preemptions = [0] * len(schedulers)
        self.period_s = scenario.scrape_s
        phases = np.random.default_rng(seed).random(len(schedulers) if self.period_s else 0)
        self.first_scrapes = (phases * self.period_s).tolist()
        self.deciders = self._deciders(policy, scenario, seed)

    def _deciders(self, policy: Policy, scenario: Scenario, seed: int) -> dict[str, Decider]:
        """Who answers each kind of question; the kinds that are left out get candidate 0."""
        decisions, rules = roles(policy, scenario, [self.episode])
        mine = Decider(policy, budget_s=inf)
        beside = {
            kind: Decider(heuristic_of(kind, rule), budget_s=inf)
            for kind, rule in rules.items()
            if rule not in _UNASKED
        }
        for decider in (mine, *beside.values()):  # a first answer may take seconds of imports and compilation
            request = RequestView("warm-up", 0.0, prompt_tokens=1, predicted_tokens=1)
            decider.policy.act(questions.ask_dispatch(self.view, request, decider.rows).obs)
            decider.policy.reset(1, seed)
        return {**beside, **dict.fromkeys(set(kinds_of(decisions)) & set(policy.kinds), mine)}

    def counts(self) -> dict[str, int]:
        """Decisions by `answered` and the reasons for a fallback."""
        total: Counter[str] = Counter()
        for decider in set(self.deciders.values()):
            total.update(decider.counts)
        return total

    # --- questions --------------------------------------------------------------------------------------

    def dispatch(self, r: Request, now_s: float) -> int:
        """The instance for a request that has arrived; it goes into the book."""
        self._look(now_s)
        w, row = self.episode.workload, r.number
        slo = self.slos[w.class_id[row]]
        previous = self.previous[row]
        request = RequestView(
            row, r.arrived_s, r.prompt, int(self.episode.predicted_output[row]), r.priority,
            slo.ttft_s, slo.tpot_s, slo.weight, turn=max(int(w.turn[row]), 0),
            last_instance=int(self.placed[previous]) if previous >= 0 else -1, prefix=r.prefix_ids,
        )  # fmt: skip
        self.view.arrived(request)
        action = self._answer(questions.ask_dispatch(self.view, request, self._rows("dispatch")))
        assert isinstance(action, questions.Dispatch)  # every request fits an instance that never drains
        self.view.dispatched(request, action.instance)
        self.live[row], self.placed[row] = (r, request), action.instance
        return action.instance

    def victim(self, i: int, now_s: float) -> tuple[Request, bool] | None:
        """Who gives way on instance i, and whether by swap; None leaves it to the engine."""
        if "preempt" not in self.deciders:
            return None
        self._look(now_s, inside=True)
        action = self._answer(questions.ask_preempt(self.view, i))
        return (self.live[action.key][0], action.swap) if isinstance(action, questions.Preempt) else None  # type: ignore

    def moves(self, now_s: float) -> Iterator[tuple[Request, int, int]]:
        """Request, source and target of the moves of this occasion; each is made before the next is asked."""
        paired: set[int] = set()
        while "migrate" in self.deciders:
            self._look(now_s, inside=True)
            pair = self._answer(questions.ask_migrate(self.view, paired))
            if not isinstance(pair, questions.Pair):
                return
            paired |= {pair.source, pair.target}
            move = self._answer(questions.ask_move(self.view, pair.source, pair.target))
            if isinstance(move, questions.Move):
                yield self.live[move.key][0], pair.source, pair.target  # type: ignore[index]

    def cap(self, i: int, now_s: float) -> int | None:
        """Another limit on the prompt tokens of an iteration of instance i; None leaves it."""
        if "budget" not in self.deciders:
            return None
        self._look(now_s, inside=True)
        action = self._answer(questions.ask_budget(self.view, i))
        return action.tokens if isinstance(action, questions.Cap) else None

    def _rows(self, kind: str) -> int:
        return self.deciders[kind].rows if kind in self.deciders else 1

    def _answer(self, question: questions.Question) -> questions.Action:
        decider = self.deciders.get(question.kind)
        if decider is None or not question.is_open:
            return question.actions[0]
        return decider.decide(question)

    # --- what it sees -----------------------------------------------------------------------------------

    def finished(self, r: Request) -> None:
        """A request has streamed its last token."""
        self._follow(r, self.live[r.number][1])
        self.view.finished(self.live.pop(r.number)[1])

    def _look(self, now_s: float, *, inside: bool = False) -> None:
        """Bring the view up to now; `inside` shows also what only engines know."""
        self.view.now_s = now_s
        for r, request in self.live.values():
            self._follow(r, request)
        for instance, scheduler in zip(self.view.instances, self.schedulers, strict=True):
            instance.available = now_s < scheduler.setting.drain / PS
            instance.prefill_cap = scheduler.cap
            instance.engaged = bool(scheduler.out or scheduler.inbound)
            instance.joining = scheduler.joiner is not None
            instance.host_free_blocks = len(scheduler.host_empty)
            if self.period_s == 0:
                self.scrape(scheduler.number, now_s)
            if inside:
                self._inside(instance, scheduler)

    def _follow(self, r: Request, request: RequestView) -> None:
        """Where a request is and what has come back of it."""
        if r.instance != request.instance:
            self.view.moved(request, r.instance)
            self.placed[r.number] = r.instance
        if r.streamed != request.streamed_tokens:
            self.view.streamed(request, r.streamed - request.streamed_tokens)

    def scrape(self, i: int, now_s: float) -> None:
        """Read the metrics of instance i."""
        instance, scheduler = self.view.instances[i], self.schedulers[i]
        instance.scraped_at_s = now_s
        instance.seen_running, instance.seen_waiting = len(scheduler.running), len(scheduler.waiting)
        instance.seen_kv_usage = 1.0 - scheduler.memory.free / scheduler.memory.blocks
        instance.seen_preemptions = scheduler.preemptions - self.preemptions[i]
        self.preemptions[i] = scheduler.preemptions

    def _inside(self, instance: InstanceView, scheduler: Scheduler) -> None:
        """Scheduler and memory of an instance, with the iteration in flight."""
        computing = {r.number: new for r, new in scheduler.batch}
        memory = scheduler.memory
        instance.free_blocks = memory.free
        instance.running = [self._engine_side(r, computing.get(r.number, 0)) for r in scheduler.running]
        for r, request in zip(scheduler.running, instance.running, strict=True):
            request.running = True
            request.shared_blocks = sum(memory.units[k].holders > 1 for k in r.shared) * memory.unit_blocks
        instance.waiting = [self._engine_side(r, 0) for r in scheduler.waiting]

    def _engine_side(self, r: Request, computing: int) -> RequestView:
        request = self.live[r.number][1]
        request.running, request.decoding = False, r.decoding
        request.kv_tokens = r.computed + computing + r.hosted
        request.admitted, request.preemptions = r.admitted, r.preemptions
        return request
