"""A policy that always answers in time: the bundle while it can, its fallback heuristic where it cannot.

A network, or a policy that is not ours, runs in a thread of its own, which the caller awaits no longer than
the budget: nothing else could end a run that takes too long. A run that is late goes on and its answer is
thrown away; until it has ended, questions go to the fallback at once.

The hand-over takes 9 us where a core is free, and milliseconds where none is: the thread waits for its turn.
So the caller runs a rule of `servegym.agents.heuristics` itself, which takes no longer than the fallback,
another such rule; and it runs any policy itself if the budget is endless.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np

from servegym.agents.heuristics import Composite, Rule, make_heuristic
from servegym.agents.policy import Policy
from servegym.envs.cluster.schema import OFFERS
from servegym.errors import InputError
from servegym.runtime.bundle import BundlePolicy, is_bundle, load_bundle
from servegym.runtime.questions import Action, Question

ANSWERED = "answered"
REASONS = ("timeout", "nan", "stale", "mismatch")  # why a fallback answers
DEFAULT_FALLBACK = "least_tokens"
# Of the budget the policy may take this much; the rest is for the fallback, whose numpy takes about 0.1 ms.
_SHARE = 0.8


class Decider:
    """Answers questions within a time budget; any thread may ask.

    A question goes to the fallback, and its reason is counted, when

        timeout   the policy has not answered within the budget; never of a heuristic
        nan       a score is not a finite number
        stale     the caller says that what the question shows is too old
        mismatch  the policy does not answer this kind of question, refuses its arrays, or chooses a candidate
                  that is not legal; `last_error` says what it was

    The fallback of a dispatch is a heuristic, that of any other question candidate 0: what happens unasked.

    Args:
        policy: a policy, the folder of a bundle, or the name of a heuristic.
        fallback: name of a dispatch heuristic; None: the one that the bundle names.
        budget_s: most seconds that `decide` takes, the fallback included; infinite: as many as it takes.

    Attributes:
        policy: what answers now.
        rows: request rows R of the questions to ask, for `servegym.runtime.questions`.
        counts: decisions so far by `answered` and the reasons for a fallback.
        last_error: what the last mismatch was.

    Raises:
        InputError: a bundle that is damaged, an unknown heuristic, or a budget that is no time.
    """

    def __init__(
        self, policy: Policy | str | Path, fallback: str | None = None, budget_s: float = 0.005
    ) -> None:
        if not budget_s > 0:
            raise InputError("decider", "budget_s", budget_s, "give seconds > 0")
        self.budget_s = budget_s
        self._named_fallback = fallback
        self._lock = threading.Lock()
        self.counts = dict.fromkeys((ANSWERED, *REASONS), 0)
        self.last_error = ""
        self._take(_load(policy))

    def _take(self, policy: Policy) -> None:
        """Let this policy answer from now on."""
        name = self._named_fallback
        if name is None:
            known = policy.manifest if isinstance(policy, BundlePolicy) else {}
            name = known.get("fallback", DEFAULT_FALLBACK)
        fallback = make_heuristic(name)
        fallback.reset(1, 0)
        policy.reset(1, 0)
        at_once = isinstance(policy, Rule | Composite) or self.budget_s == math.inf
        worker = _Caller(policy) if at_once else _Worker(policy)
        with self._lock:
            self.policy, self.rows = policy, _rows(policy)
            self._fallback, self._worker, old = fallback, worker, getattr(self, "_worker", None)
        if old is not None:
            old.end()

    def reload(self, policy: Policy | str | Path) -> None:
        """Let another policy answer once it has loaded and given its golden answers.

        Raises:
            InputError: it is refused; the present one goes on.
        """
        self._take(_load(policy))

    def close(self) -> None:
        """End the policy's thread; no more questions."""
        self._worker.end()

    def decide(self, question: Question, stale: bool = False) -> Action:
        """What to do, at the latest after `budget_s`.

        Args:
            question: of `self.rows` request rows.
            stale: what it shows is older than the caller allows.
        """
        deadline = time.monotonic() + _SHARE * self.budget_s
        worker = self._worker
        if stale:
            return self._fall_back(question, "stale")
        if question.kind not in worker.policy.kinds:
            return self._fall_back(question, "mismatch", f"no answers to {question.kind}")
        answer = worker.ask(question, deadline)
        if answer.failure:
            return self._fall_back(question, answer.failure, answer.error)
        with self._lock:
            self.counts[ANSWERED] += 1
        return question.actions[answer.candidate]

    def _fall_back(self, question: Question, reason: str, error: str = "") -> Action:
        candidate = 0
        with self._lock:  # heuristics may remember, as round robin does
            self.counts[reason] += 1
            self.last_error = error or self.last_error
            if question.kind in self._fallback.kinds and question.kind == "dispatch":
                candidate = int(self._fallback.act(question.obs)[0])
        return question.actions.get(candidate, question.actions[0])


@dataclass(frozen=True, slots=True)
class _Answer:
    candidate: int = 0
    failure: str = ""
    error: str = ""


_LATE = _Answer(failure="timeout")


class _Caller:
    """Runs a policy in the thread that asks, one question after the other."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._lock = threading.Lock()

    def ask(self, question: Question, _: float) -> _Answer:
        """The policy's answer."""
        with self._lock:
            return _answer(self.policy, question)

    def end(self) -> None:
        """There is no thread to end."""


class _Worker:
    """The thread in which a policy runs."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._jobs: SimpleQueue[tuple[Question, float, SimpleQueue[_Answer]] | None] = SimpleQueue()
        self._deadline = math.inf  # of the question that it is at
        threading.Thread(target=self._run, name=f"servegym {policy.name}", daemon=True).start()

    def ask(self, question: Question, deadline: float) -> _Answer:
        """The policy's answer, or a time-out at `deadline` on the monotonic clock."""
        if time.monotonic() > self._deadline:
            return _LATE  # an earlier question still runs
        reply: SimpleQueue[_Answer] = SimpleQueue()
        self._jobs.put((question, deadline, reply))
        try:
            return reply.get(timeout=max(deadline - time.monotonic(), 0.0))
        except Empty:
            return _LATE

    def end(self) -> None:
        """Let the thread end behind the questions that it has."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            question, self._deadline, reply = job
            if time.monotonic() < self._deadline:
                reply.put(_answer(self.policy, question))
            self._deadline = math.inf


def _answer(policy: Policy, question: Question) -> _Answer:
    try:
        if isinstance(policy, BundlePolicy):
            scores = policy.logits(question.obs)[0]
            if not np.isfinite(scores).all():
                return _Answer(failure="nan", error="a score is not finite")
            candidate = int(scores.argmax())
        else:
            candidate = int(policy.act(question.obs)[0])
    except Exception as error:  # whatever a policy raises, the request must be answered
        return _Answer(failure="mismatch", error=f"{type(error).__name__}: {error}")
    if candidate not in question.actions:
        return _Answer(failure="mismatch", error=f"candidate {candidate} is not legal")
    return _Answer(candidate)


def _load(policy: Policy | str | Path) -> Policy:
    if not isinstance(policy, str | Path):
        return policy
    if is_bundle(policy):
        return load_bundle(policy)
    if Path(policy).exists():
        raise InputError(
            policy, "manifest.json", "missing", "this is no bundle; make one by `servegym export`"
        )
    return make_heuristic(str(policy))


def _rows(policy: Policy) -> int:
    """Request rows of the observations that a policy was trained on; rules read any."""
    if isinstance(policy, BundlePolicy):
        return policy.rows
    return 1 if set(policy.kinds) <= {"dispatch"} else OFFERS
