"""A policy that always answers: itself while it can, its fallback heuristic where it cannot.

The policy runs in the thread that asks. In a thread of its own, awaited no longer than the budget, it was far
more often late: where no core is free a hand-over waits for its turn, milliseconds in a tenth of the cases,
and the run itself takes a tenth of one. So a policy must compute and return, as bundles and heuristics do;
nothing ends one that waits for ever. Where it takes more CPU time than the budget (that it waits for a core
is not its fault, and so would the fallback), the fallback answers, and the policy rests `REST` times as long:
one that is late takes no more than a tenth of its caller's CPU time.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from servegym.agents.heuristics import make_heuristic
from servegym.agents.policy import Policy
from servegym.envs.cluster.schema import OFFERS
from servegym.errors import InputError
from servegym.runtime.bundle import BundlePolicy, is_bundle, load_bundle
from servegym.runtime.questions import Action, Question

ANSWERED = "answered"
REASONS = ("timeout", "nan", "stale", "mismatch")  # why a fallback answers
DEFAULT_FALLBACK = "least_tokens"
REST = 9  # so many times as long as it took, a policy that was late is not asked


class Decider:
    """Answers questions within a time budget; any thread may ask.

    A question goes to the fallback, and its reason is counted, when

        timeout   the policy took longer than the budget, or rests, because an earlier question did
        nan       its best score is not a finite number
        stale     the caller says that what the question shows is too old
        mismatch  the policy does not answer this kind of question, refuses its arrays, or chooses a candidate
                  that is not legal; `last_error` says what it was

    The fallback of a dispatch is a heuristic, that of any other question candidate 0: what happens unasked.

    Args:
        policy: a policy, the folder of a bundle, or the name of a heuristic.
        fallback: name of a dispatch heuristic; None: the one that the bundle names.
        budget_s: CPU seconds that a question may take the policy; infinite: as many as it takes.
        needs: a kind of question that the policy must answer; None: any.

    Attributes:
        policy: what answers now.
        rows: request rows R of the questions to ask, for `servegym.runtime.questions`.
        counts: decisions so far by `answered` and the reasons for a fallback.
        last_error: what the last mismatch was.

    Raises:
        InputError: a bundle that is damaged, an unknown heuristic, a policy for other questions or one that
            reads the future, or a budget that is no time.
    """

    def __init__(
        self,
        policy: Policy | str | Path,
        fallback: str | None = None,
        budget_s: float = 0.005,
        needs: str | None = None,
    ) -> None:
        if not budget_s > 0:
            raise InputError("decider", "budget_s", budget_s, "give seconds > 0")
        self.budget_s = budget_s
        self._named_fallback, self._needs = fallback, needs
        self._lock = threading.Lock()
        self.counts = dict.fromkeys((ANSWERED, *REASONS), 0)
        self.last_error = ""
        self._take(_load(policy))

    def _take(self, policy: Policy) -> None:
        """Let this policy answer from now on."""
        if self._needs not in (None, *policy.kinds):
            hint = f"it answers {', '.join(policy.kinds)}; a policy for {self._needs} is needed"
            raise InputError("decider", "policy", policy.name, hint)
        if policy.needs_oracle:
            raise InputError("decider", "policy", policy.name, "it reads the future, which nobody knows here")
        name = self._named_fallback
        if name is None:
            known = policy.manifest if isinstance(policy, BundlePolicy) else {}
            name = known.get("fallback", DEFAULT_FALLBACK)
        fallback = make_heuristic(name)
        fallback.reset(1, 0)
        policy.reset(1, 0)
        with self._lock:
            self.policy, self.rows = policy, _rows(policy)
            self._fallback, self._rests_until = fallback, 0.0

    def reload(self, policy: Policy | str | Path) -> None:
        """Let another policy answer once it has loaded and given its golden answers.

        Raises:
            InputError: it is refused; the present one goes on.
        """
        self._take(_load(policy))

    def decide(self, question: Question, stale: bool = False) -> Action:
        """What to do.

        Args:
            question: of `self.rows` request rows.
            stale: what it shows is older than the caller allows.
        """
        with self._lock:  # heuristics may remember, as round robin does
            try:
                candidate = self._ask(question, stale)
                self.counts[ANSWERED] += 1
            except _NoAnswerError as why:
                candidate = self._fall_back(question, why)
        return question.actions.get(candidate, question.actions[0])

    def _ask(self, question: Question, stale: bool) -> int:
        if stale:
            raise _NoAnswerError("stale")
        if question.kind not in self.policy.kinds:
            raise _NoAnswerError("mismatch", f"no answers to {question.kind}")
        if time.monotonic() < self._rests_until:
            raise _NoAnswerError("timeout")
        begin = time.thread_time()
        try:
            candidate = int(self.policy.act(question.obs)[0])
        except FloatingPointError as error:
            raise _NoAnswerError("nan", str(error)) from error
        except Exception as error:  # whatever a policy raises, the request must be answered
            raise _NoAnswerError("mismatch", f"{type(error).__name__}: {error}") from error
        finally:
            took = time.thread_time() - begin
            if took > self.budget_s:
                self._rests_until = time.monotonic() + REST * took
        if took > self.budget_s:
            raise _NoAnswerError("timeout")
        if candidate not in question.actions:
            raise _NoAnswerError("mismatch", f"candidate {candidate} is not legal")
        return candidate

    def _fall_back(self, question: Question, why: _NoAnswerError) -> int:
        self.counts[why.reason] += 1
        self.last_error = why.error or self.last_error
        if question.kind in self._fallback.kinds and question.kind == "dispatch":
            return int(self._fallback.act(question.obs)[0])
        return 0


class _NoAnswerError(Exception):
    """Why the policy has none: one of `REASONS`, and what was wrong."""

    def __init__(self, reason: str, error: str = "") -> None:
        super().__init__(reason)
        self.reason, self.error = reason, error


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
