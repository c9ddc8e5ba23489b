"""A lane's future behind an answer, in the kernels: copy, answer, play on by a rule, score, keep the best.

Branches run in a scratch world that shares the requests and costs of the real one, so the real lane never
changes. All kernels are in this file: numba's disk cache does not notice changes of a callee elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.observe import IS_DEFAULT, copy_frame
from servegym.envs.cluster.rules import answer, choose
from servegym.envs.cluster.state import DISPATCH, END, NEVER, NONE, PS
from servegym.envs.cluster.steps import Rules, apply, run_to_question

OBJECTIVES = ("goodput", "latency", "ttft", "tpot")
GOODPUT, LATENCY, TTFT = range(3)
TAIL_POWER = 8.0
TIE_BREAK = 1e-2  # requests that a service level's worth of latency counts, where goodput is the objective


class Search(NamedTuple):
    """What the kernels need to know of a search.

    Attributes:
        objective: index into OBJECTIVES.
        horizon, screening: picoseconds that a branch plays, and one that only ranks answers.
        width: most answers that get a branch of full length.
        rules: int64 [Q, KINDS], sets of rules to play behind an answer.
        params: float64 [Q, KINDS, PARAMS], of the rules.
        ask: with every kind of question left to the agent, which in a branch is one of these sets.
    """

    objective: int
    horizon: int
    screening: int
    width: int
    rules: np.ndarray
    params: np.ndarray
    ask: Rules


# --- branches ---------------------------------------------------------------------------------------------


@inlined
def _copy(source, target, entries):
    for k in range(entries):
        target[k] = source[k]


@kernel
def copy_live(world, scratch, l):
    """Make lane l of the scratch world go on exactly as in the real one; copies only what is read again."""
    lane = world.lane[l]
    scratch.lane[l] = lane
    for i in range(lane.instances):
        inst = world.instance[l, i]
        scratch.instance[l, i] = inst
        for k in range(world.run.shape[2]):
            _copy(world.run[l, i, k], scratch.run[l, i, k], inst.running + inst.fresh)
        _copy(world.residue[l, i], scratch.residue[l, i], world.residue.shape[2])
        if inst.unit_blocks:
            _copy(world.unit[l, i], scratch.unit[l, i], world.unit.shape[2])
            _copy(world.slot[l, i], scratch.slot[l, i], world.slot.shape[2])
    _copy(world.req[l], scratch.req[l], lane.rows)
    _copy(world.sleeper[l], scratch.sleeper[l], lane.sleeping)
    _copy(world.history[l], scratch.history[l], world.history.shape[1])
    _copy(world.offer[l], scratch.offer[l], world.offer.shape[1])


@kernel
def _branch(world, frame, scratch, scratch_frame, l, tried, q, horizon, search):
    """Score of an answer with rules q behind it."""
    copy_live(world, scratch, l)
    copy_frame(frame, l, scratch_frame, l)
    lane = scratch.lane[l]
    end = lane.now + horizon
    # Questions that the stock system's own way answers need not be asked.
    for kind in range(search.rules.shape[1]):
        if search.rules[q, kind] == 1:
            lane.raises &= ~(1 << kind)
    apply(scratch, scratch_frame, l, tried)
    while True:
        kind = run_to_question(scratch, scratch_frame, l, search.ask)
        if kind == END:
            return _score(scratch, l, search.objective)
        choice = 0
        if lane.now <= end:
            rule = search.rules[q, kind]
            choice = answer(scratch, scratch_frame, l, rule, search.params[q, kind])
        else:
            # No more of the future: what is in the system still runs to its end, as in the stock system.
            lane.next_row, lane.sleeping, lane.raises = lane.rows, 0, 0
        if lane.now > end and kind == DISPATCH:
            lane.pending = lane.question = NONE
        else:
            apply(scratch, scratch_frame, l, choice)


@inlined
def _value(world, l, r, objective):
    """What a finished request is worth."""
    lane = world.lane[l]
    row, req = world.row[lane.first_row + r], world.req[l, r]
    ttft = (req.first - req.arrived) / PS
    tpot = (req.finished - req.first) / PS / max(row.output - 1, 1)
    late, slow = ttft / row.slo_ttft, tpot / row.slo_tpot
    if objective == LATENCY:
        return -row.weight * ((req.finished - req.arrived) / PS)
    met = ttft <= row.slo_ttft and tpot <= row.slo_tpot
    if objective == GOODPUT:
        return row.weight * (met - TIE_BREAK * (late + slow))
    return row.weight * (met - (late if objective == TTFT else slow) ** TAIL_POWER)


@kernel
def _score(world, l, objective):
    total = 0.0
    for r in range(world.lane[l].rows):
        if world.req[l, r].finished != NEVER:
            total += _value(world, l, r, objective)
    return total


# --- the search -------------------------------------------------------------------------------------------


@inlined
def _copies_default(frame, l, k):
    """Whether answer k is what candidate 0 does, as far as the observation says."""
    for c in range(frame.candidates.shape[2]):
        if frame.candidates[l, k, c] != frame.candidates[l, 0, c]:
            return False
    for f in range(frame.edges.shape[2]):
        if f != IS_DEFAULT and frame.edges[l, k, f] != frame.edges[l, 0, f]:
            return False
    return True


@inlined
def _default_double(frame, l):
    """The answer that does the same as candidate 0 and stands for both, else 0."""
    for k in range(1, frame.mask.shape[1]):
        if frame.mask[l, k] and _copies_default(frame, l, k):
            return k
    return 0


@inlined
def _largest(values):
    best = 0
    for k in range(1, len(values)):
        if values[k] > values[best]:
            best = k
    return best


@kernel
def _list_answers(frame, rank, scores, l):
    """Give each answer that is to be tried the rank infinity, all others minus infinity.

    Returns:
        how many there are, and the one that stands for candidate 0.
    """
    default, legal = _default_double(frame, l), 0
    for k in range(frame.mask.shape[1]):
        rank[l, k] = scores[l, k] = -np.inf
        if frame.mask[l, k] and (k or default == 0):
            rank[l, k] = np.inf
            legal += 1
    return legal, default


@kernel
def _keep_best(frame, search, rank, default, l):
    """Leave the answers of highest rank, and what the rules answer: the search is no worse than they are."""
    kind = frame.kind[l]
    for _ in range(search.width):
        best = NONE
        for k in range(rank.shape[1]):
            if -np.inf < rank[l, k] < np.inf and (best == NONE or rank[l, k] > rank[l, best]):
                best = k
        rank[l, best] = np.inf
    for q in range(len(search.rules)):
        own = choose(frame, l, search.rules[q, kind], search.params[q, kind])
        rank[l, own if own else default] = np.inf


@kernel
def search_lanes(world, frame, scratch, scratch_frame, search, scores, rank, answers, first, last):
    """The best answers of lanes first..last-1, int64 [L], and the scores of candidates, -inf where not tried.

    Scratch: `rank` [L, C]. `_branch` is called at one place and nothing else stands above it, since numba
    compiles all of the cluster model anew into each caller.
    """
    for l in range(first, last):
        legal, default = _list_answers(frame, rank, scores, l)
        answers[l] = _largest(rank[l])
        for is_long in range(legal <= search.width, 1 + (legal > 1)):
            horizon = search.horizon if is_long else search.screening
            for k in range(frame.mask.shape[1]):
                if rank[l, k] < np.inf:
                    continue
                score = -np.inf
                for q in range(len(search.rules) if is_long else 1):
                    future = _branch(world, frame, scratch, scratch_frame, l, k, q, horizon, search)
                    score = max(score, future)
                if is_long:
                    scores[l, k] = score
                else:
                    rank[l, k] = score
            if is_long:
                answers[l] = _largest(scores[l])
                scores[l, 0] = scores[l, default]
            else:
                _keep_best(frame, search, rank, default, l)
