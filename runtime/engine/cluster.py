"""A cluster in real time: several instances of one process play a workload under a policy.

Every instance has a thread; the caller's thread is the router. Requests arrive by the wall clock, stream
exactly the output that the workload says, and move and give way as the policy says.
"""

from __future__ import annotations

import gc
import heapq
import time
from collections.abc import Mapping
from enum import IntEnum
from functools import partial
from threading import Condition, RLock, Thread

import numpy as np
import torch

from servegym.agents.policy import Policy
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec
from servegym.envs.cluster.state import NEVER
from servegym.envs.costs.profile import profile_path
from servegym.envs.records import Records
from servegym.envs.scenario import Scenario
from servegym.errors import InputError
from servegym.runtime.engine.copier import BlockCopier
from servegym.runtime.engine.instance import Instance
from servegym.runtime.engine.migration import Migration
from servegym.runtime.engine.model import Transformer
from servegym.runtime.engine.request import Request, make_request
from servegym.runtime.engine.router import Router
from servegym.runtime.prompts import token_ids
from servegym.runtime.steady import take_core, undisturbed
from servegym.runtime.view import InstanceSettings


class Event(IntEnum):
    """What the router's thread waits for; at equal times in this order."""

    SCRAPE, ARRIVAL, MIGRATE, BUDGET = range(4)


class EnginePlayer:
    """Plays policies on engines of this process; the counterpart of `servegym.agents.play.play`.

    Args:
        models: path of a profile -> the model of the instances that name it.

    Attributes:
        counts: decisions of the last play by `answered` and the reasons for a fallback.
        downtimes: of the last play's migrations, (blocks, seconds from the stop at the source until the KV is
            at the target).
    """

    def __init__(self, models: Mapping[str, Transformer]) -> None:
        self.models = {profile_path(name): model for name, model in models.items()}
        self.counts: dict[str, int] = {}
        self.downtimes: list[tuple[int, float]] = []
        self._fleet: tuple[ClusterSpec, int, list[InstanceSettings], list[Instance]] | None = None

    def play(self, policy: Policy, scenario: Scenario, episode: Episode, seed: int = 0) -> Records:
        """What becomes of the episode's requests; times in seconds from the start of the workload.

        Raises:
            InputError: a fleet, a workload or a policy that cannot be played.
        """
        settings, instances = self.instances(episode.cluster, episode.workload.prefix_block_tokens)
        for instance in instances:
            instance.clear()
        _check_fit(episode, instances)
        schedulers = [instance.scheduler for instance in instances]
        router = Router(schedulers, settings, policy, scenario, episode, seed)
        played = _Play(episode, instances, router)
        with undisturbed():
            played.run()
        self.counts, self.downtimes = router.counts(), played.copier.downtimes
        return records_of(played.requests, episode, played.start_s)

    def close(self) -> None:
        """Free the instances' memory."""
        self._fleet = None
        gc.collect()  # they refer to themselves

    def instances(self, cluster: ClusterSpec, unit: int) -> tuple[list[InstanceSettings], list[Instance]]:
        """How views see the instances of a fleet, and these; those of the last play, if it is the same."""
        if self._fleet and self._fleet[:2] == (cluster, unit):
            return self._fleet[2:]
        self.close()
        lock, migrates = RLock(), cluster.migration is not None
        settings = [
            InstanceSettings.of(spec, prefix_caching=cluster.prefix_caching, migrates=migrates)
            for spec in cluster.instances
        ]
        models = [self._model(spec) for spec in cluster.instances]
        kinds = [(m.config, m.dtype, s.setting.block_tokens) for m, s in zip(models, settings, strict=True)]
        if migrates and any(kind != kinds[0] for kind in kinds):
            hint = "KV moves between replicas of one model with blocks of one size only"
            raise InputError(cluster.name, "migration", "mixed replicas", hint)
        instances = [
            Instance(model, s.setting, number, unit, lock)
            for number, (model, s) in enumerate(zip(models, settings, strict=True))
        ]
        for instance in instances:
            instance.warm_up()
        self._fleet = cluster, unit, settings, instances
        return settings, instances

    def _model(self, spec: InstanceSpec) -> Transformer:
        model = self.models.get(profile_path(spec.profile))
        if model is None:
            raise InputError("engine", "profile", spec.profile, "the player has no model for it")
        return model


class _Play:
    """One play: the router's events, and a thread for every instance."""

    def __init__(self, episode: Episode, instances: list[Instance], router: Router) -> None:
        self.episode, self.instances, self.router = episode, instances, router
        self.lock = instances[0].lock
        self.wake = Condition(self.lock)
        self.copier = BlockCopier(instances, self.lock, self._failed)
        self.followers = {int(a): row for row, a in enumerate(episode.workload.after) if a >= 0}
        vocabulary = min(instance.model.config.vocabulary for instance in instances)
        self.requests = [self._request(row, vocabulary) for row in range(len(episode.workload))]
        self.left, self.warm = len(self.requests), 0
        self.failure: BaseException | None = None
        self.start_s = 0.0
        self.events: list[tuple[float, Event, int, float]] = []
        self.lever = episode.cluster.migration

    def run(self) -> None:
        """Play to the end."""
        w = self.episode.workload
        for row in np.flatnonzero(w.after < 0).tolist():
            self._push(float(w.arrived_at_s[row]), Event.ARRIVAL, row)
        moves_s, caps_s = self.lever.period_s if self.lever else 0.0, self.episode.cluster.budget_period_s
        for event, period_s in ((Event.MIGRATE, moves_s), (Event.BUDGET, caps_s)):
            if period_s:
                self._push(period_s, event, 0, period_s)
        for i, at in enumerate(self.router.first_scrapes):
            self._push(at, Event.SCRAPE, i, self.router.period_s)
        threads = [
            Thread(target=self._serve, args=(instance,), name=f"engine {instance.number}", daemon=True)
            for instance in self.instances
        ]
        for thread in threads:
            thread.start()
        try:
            with self.wake:
                self.wake.wait_for(lambda: self.failure or self.warm == len(threads))
            self.start_s = time.perf_counter()
            self._route()
        finally:
            for instance in self.instances:
                instance.stop()
            for thread in threads:
                thread.join()
            self.copier.close()
        if self.failure:
            raise self.failure

    def now(self) -> float:
        """Seconds on the workload's clock."""
        return time.perf_counter() - self.start_s

    def _request(self, row: int, vocabulary: int) -> Request:
        w = self.episode.workload
        tokens = token_ids(w, row, vocabulary)
        prompt = int(w.prompt_tokens[row])
        ids = w.prefix_ids[w.prefix_offsets[row] : w.prefix_offsets[row + 1]].tolist()
        priority = int(w.priority[row])
        return make_request(row, tokens[:prompt], tokens[prompt:], priority=priority, prefix_ids=ids)

    # --- the router's thread ----------------------------------------------------------------------------

    def _route(self) -> None:
        with self.wake:
            while self.left and not self.failure:
                wait = self.events[0][0] - self.now() if self.events else None
                if wait is None or wait > 0:
                    self.wake.wait(wait)
                    continue
                at, event, which, period_s = heapq.heappop(self.events)
                if period_s:
                    self._push(at + period_s, event, which, period_s)
                self._happen(event, at, which)

    def _happen(self, event: Event, at: float, which: int) -> None:
        if event is Event.ARRIVAL:
            r = self.requests[which]
            r.arrived_s = at
            i = self.router.dispatch(r, self.now())
            r.dispatched_s = self.now()
            self.instances[i].scheduler.enqueue(r)
        elif event is Event.SCRAPE:
            self.router.scrape(which, self.now())
        elif event is Event.MIGRATE:
            for r, source, target in self.router.moves(self.now()):
                self._move(r, source, target)
        else:
            for instance in self.instances:
                if instance.scheduler.prefills_beside_decodes():
                    cap = self.router.cap(instance.number, self.now())
                    instance.scheduler.cap = cap or instance.scheduler.cap

    def _push(self, at: float, event: Event, which: int, period_s: float = 0.0) -> None:
        heapq.heappush(self.events, (at, event, which, period_s))

    def _move(self, r: Request, source: int, target: int) -> None:
        """At once while it waits, by live migration while it decodes."""
        here, there = self.instances[source].scheduler, self.instances[target].scheduler
        if r in here.waiting:
            here.waiting.remove(r)
            r.migrations += 1
            there.enqueue(r)
            here.kick()
        elif r in here.running and self.lever:
            Migration(r, here, there, self.copier, self.lever.last_blocks, self.lever.stages).begin()

    # --- the engines' threads ---------------------------------------------------------------------------

    def _serve(self, instance: Instance) -> None:
        torch.set_num_threads(1)
        try:
            if not instance.stream:
                take_core(instance.number, len(self.instances))
            instance.warm_thread()
            instance.on_done = self._done
            instance.scheduler.choose_victim = partial(self._victim, instance.number)
            with self.wake:
                self.warm += 1
                self.wake.notify()
            instance.serve()
        except BaseException as error:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        """What stopped a thread goes to the router's, which would wait for ever."""
        with self.wake:
            self.failure = error
            self.wake.notify()

    def _victim(self, i: int, _: list[Request]) -> tuple[Request, bool] | None:
        return self.router.victim(i, self.now())

    def _done(self, done: list[Request]) -> None:
        """Requests have streamed their last token; sessions go on after their gap."""
        for r in done:
            self.router.finished(r)
            self.left -= 1
            follower = self.followers.get(r.number)
            if follower is not None:
                gap = float(self.episode.workload.gap_s[follower])
                self._push(r.finished_s - self.start_s + gap, Event.ARRIVAL, follower)
        self.wake.notify()


def records_of(requests: list[Request], episode: Episode, start_s: float = 0.0) -> Records:
    """Records of all requests, with engines' times counted from `start_s`."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(r, name) for r in requests], dtype)

    return Records(
        arrived_s=column("arrived_s", float),
        dispatched_s=column("dispatched_s", float),
        first_token_s=column("first_s", float) - start_s,
        finished_s=column("finished_s", float) - start_s,
        max_gap_s=column("max_gap_s", float),
        prompt_tokens=column("prompt", np.int32),
        output_tokens=column("output", np.int32),
        cached_tokens=column("cached", np.int32),
        lost_tokens=column("lost", np.int64),
        preemptions=column("preemptions", np.int32),
        migrations=column("migrations", np.int32),
        instance=column("instance", np.int32),
        class_id=episode.workload.class_id,
        priority=column("priority", np.int16),
    )


def _check_fit(episode: Episode, instances: list[Instance]) -> None:
    """Raise `InputError` for a request that no instance holds, or whose model has no positions for it."""
    tokens = episode.workload.prompt_tokens.astype(np.int64) + episode.workload.output_tokens
    row = int(tokens.argmax())
    most = max((i.most_tokens for i in instances if i.setting.drain == NEVER), default=0)
    if tokens[row] > most:
        hint = f"the engines of {episode.cluster.name} hold at most {most}"
        where = f"prompt_tokens + output_tokens, row {row}"
        raise InputError(episode.workload.name, where, int(tokens[row]), hint)
