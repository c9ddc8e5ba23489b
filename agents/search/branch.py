"""A lane's future behind an answer, in the kernels: copy, answer, play on by a rule, score, keep the best.

Branches run in a scratch world that shares the requests and costs of the real one, so the real lane never
changes. All kernels are in this file: numba's disk cache does not notice changes of a callee elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.observe import IS_DEFAULT, copy_frame
from servegym.envs.cluster.rules import choose
from servegym.envs.cluster.state import DISPATCH, NEVER, NONE, PS
from servegym.envs.cluster.steps import Rules, apply, run_to_question

OBJECTIVES = ("goodput", "latency", "ttft", "tpot")
GOODPUT, LATENCY, TTFT = range(3)
SCREENING = 8  # arrivals of the short branches that choose which answers get long ones
TAIL_POWER = 8.0
TIE_BREAK = 1e-2  # requests that a service level's worth of latency counts, where goodput is the objective


class Search(NamedTuple):
    """What the kernels need to know of a search.

    Attributes:
        objective: index into OBJECTIVES.
        horizon: arrivals behind the question's own that a branch plays.
        width: most answers that get a branch of that length.
        rules: int64 [Q, KINDS], sets of rules to play behind an answer.
        plays: the same but for dispatches, which branches answer themselves.
        params: float64 [Q, KINDS, PARAMS], of the rules.
    """

    objective: int
    horizon: int
    width: int
    rules: np.ndarray
    plays: np.ndarray
    params: np.ndarray


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
def _branch(world, frame, scratch, scratch_frame, l, answer, q, horizon, search):
    """Score of an answer with rules q behind it."""
    copy_live(world, scratch, l)
    copy_frame(frame, scratch_frame, l)
    lane = scratch.lane[l]
    rules = Rules(0, 0, False, False, 1, search.plays[q], search.params[q])
    # Questions that the stock system's own way answers need not be asked.
    for kind in range(len(rules.plays)):
        if rules.plays[kind] == 1:
            lane.raises &= ~(1 << kind)
    apply(scratch, scratch_frame, l, answer)
    arrivals = 0
    # Dispatches come back, so that arrivals can be counted; rules answer all other questions on the way.
    while run_to_question(scratch, scratch_frame, l, rules) == DISPATCH:
        arrivals += 1
        if arrivals > horizon:
            # No more of the future: what is in the system still runs to its end.
            lane.next_row, lane.sleeping = lane.rows, 0
            lane.pending = lane.question = NONE
        else:
            own = choose(scratch_frame, l, search.rules[q, DISPATCH], search.params[q, DISPATCH])
            apply(scratch, scratch_frame, l, own)
    return _score(scratch, l, search.objective)


@inlined
def _value(world, l, r, objective):
    """What a finished request is worth."""
    lane = world.lane[l]
    row, req = world.row[lane.first_row + r], world.req[l, r]
    ttft = (req.first - req.arrived) / PS
    tpot = (req.finished - req.first) / PS / max(row.output - 1, 1)
    late, slow = ttft / row.slo_ttft, tpot / row.slo_tpot
    if objective == GOODPUT:
        met = ttft <= row.slo_ttft and tpot <= row.slo_tpot
        return row.weight * (met - TIE_BREAK * (late + slow))
    if objective == LATENCY:
        return -row.weight * ((req.finished - req.arrived) / PS)
    return -row.weight * (late if objective == TTFT else slow) ** TAIL_POWER


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


@inlined
def _rank(world, frame, scratch, scratch_frame, search, scores, rank, double, l):
    """Order in which to try the answers, largest first: -inf never, +inf in any case, else a short branch's.

    What the rules themselves answer is always tried, so that the search is no worse than they are.

    Returns:
        how many legal answers there are.
    """
    legal, kind = 0, frame.kind[l]
    for k in range(frame.mask.shape[1]):
        rank[l, k] = scores[l, k] = -np.inf
        if frame.mask[l, k] and not (k == 0 and double):
            rank[l, k] = np.inf
            legal += 1
    if legal <= search.width:
        return legal
    horizon = min(SCREENING, search.horizon)
    for k in range(frame.mask.shape[1]):
        if rank[l, k] == np.inf:
            rank[l, k] = _branch(world, frame, scratch, scratch_frame, l, k, 0, horizon, search)
    for q in range(len(search.plays)):
        own = choose(frame, l, search.rules[q, kind], search.params[q, kind])
        rank[l, own if own else double] = np.inf
    return legal


@kernel
def search_lane(world, frame, scratch, scratch_frame, search, scores, rank, l):
    """The best answer to the lane's open question; its candidates' scores, -inf where not tried."""
    double = _default_double(frame, l)
    if _rank(world, frame, scratch, scratch_frame, search, scores, rank, double, l) == 1:
        return _largest(rank[l])
    best, tried = NONE, 0
    while True:
        k = _largest(rank[l])
        if rank[l, k] == -np.inf or (tried >= search.width and rank[l, k] < np.inf):
            break
        rank[l, k] = -np.inf
        tried += 1
        for q in range(len(search.plays)):
            score = _branch(world, frame, scratch, scratch_frame, l, k, q, search.horizon, search)
            scores[l, k] = max(scores[l, k], score)
        if best == NONE or scores[l, k] > scores[l, best]:
            best = k
    scores[l, 0] = max(scores[l, 0], scores[l, double])
    return best


@kernel
def search_lanes(world, frame, scratch, scratch_frame, search, scores, rank, answers, first, last):
    """The best answers of lanes first..last-1, int64 [L]."""
    for l in range(first, last):
        answers[l] = search_lane(world, frame, scratch, scratch_frame, search, scores, rank, l)
