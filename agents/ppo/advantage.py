"""What a roll-out says about each decision: its advantage, and what of it arrivals explain."""

from __future__ import annotations

import numpy as np

from servegym.agents.ppo.rollout import Steps, Tally
from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.state import NONE

LEAST_SPREAD = 0.05


def real_values(steps: Steps, tally: Tally, mean: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """Values of each decision and of what follows it, in the units of the reward.

    Args:
        steps: a roll-out, [T, B].
        tally: of its end.
        mean, std: of the trainer's normaliser.

    Returns:
        V(s_t) and V(s_t+1), float64 [T, B]; the latter of the final observation where an episode was
        truncated and 0 where it terminated.
    """
    values = mean + std * steps.values.astype(np.float64)
    following = mean + std * steps.next_values.astype(np.float64)
    following[steps.terminated] = 0.0
    ends = steps.terminated | steps.truncated
    _follow(values, ends, steps.lane, mean + std * tally.last_values.astype(np.float64), following)
    return values, following


@kernel
def _follow(values, ends, lane, last, following):
    """Fill in the value of the lane's next decision where no episode ends; `last` is used up."""
    for t in range(values.shape[0] - 1, -1, -1):
        for b in range(values.shape[1] - 1, -1, -1):
            l = lane[t, b]
            if not ends[t, b]:
                following[t, b] = last[l]
            last[l] = values[t, b]


def gae(
    steps: Steps, values: np.ndarray, next_values: np.ndarray, beta: float, horizon_s: float
) -> np.ndarray:
    """Generalised advantage estimation (arXiv 1506.02438) for a semi-Markov process.

    With decision t at s_t, tau_t seconds before the lane's next one, and V the value function:

        d_t     = exp(-beta tau_t),  l_t = exp(-tau_t / horizon)
        delta_t = r_t (1 - d_t) / (beta tau_t) + d_t V(s_t+1) - V(s_t)
        A_t     = delta_t + d_t l_t A_t+1           (without the second term where an episode ends)

    The reward accrues over the transition, here taken to be even: the factor is the mean of exp(-beta s) over
    it, which matters for the long drain after the last decision of an episode. Lambda is a function of time
    like the discount: a lambda per decision would look further ahead on a small fleet than on a large one,
    where decisions follow each other faster.

    Args:
        steps: a roll-out, [T, B]; its rewards, elapsed times, ends and lanes count.
        values: V(s_t), float64 [T, B].
        next_values: V(s_t+1), as from `real_values`.
        beta: discount rate, 1/s.
        horizon_s: seconds over which returns are trusted before the value function; inf is lambda 1.

    Returns:
        Advantages float64 [T, B]; the return that a value function learns is `values` + them.
    """
    rate = beta * steps.elapsed_s
    mean_discount = np.divide(-np.expm1(-rate), rate, out=np.ones_like(rate), where=rate > 0)
    deltas = steps.rewards * mean_discount + np.exp(-rate) * next_values - values
    carry = np.exp(-(beta + 1.0 / horizon_s) * steps.elapsed_s) * ~(steps.terminated | steps.truncated)
    _accumulate(deltas, carry, steps.lane, np.zeros(deltas.shape[1]))
    return deltas


@kernel
def _accumulate(deltas, carry, lane, ahead):
    """Turn deltas into advantages; `ahead` holds the next one of each lane."""
    for t in range(deltas.shape[0] - 1, -1, -1):
        for b in range(deltas.shape[1] - 1, -1, -1):
            l = lane[t, b]
            deltas[t, b] += carry[t, b] * ahead[l]
            ahead[l] = deltas[t, b]


def group_relative(steps: Steps, advantages: np.ndarray, group_size: int) -> np.ndarray:
    """Take from each advantage what the lanes that meet the same arrivals have in common at that time.

    The lanes of a group play the same episodes side by side. What the coming arrivals do to the return is
    common to them and cancels; what is left is the lane's own doing: an input-driven baseline (arXiv
    1807.02264) that needs no training. With A_l(s) the advantage of lane l at simulated time s of a play,
    linear between its decisions and constant before the first and behind the last that the roll-out holds,

        A_t - mean over the lanes l of the group with a decision in that play of A_l(s_t)

    Where all lanes are asked at the same times this is the deviation from the mean of the k-th decisions; of
    several decisions at one time the k-th counts for the k-th, or the last. Where a lane is alone in a
    play there is nothing to compare, and the advantage stays. Turns of closed-loop sessions arrive when the
    lane's own answers are done; there the baseline is only a rough one.

    Args:
        steps: a roll-out, [T, B]; its times, plays and lanes count.
        advantages: float64 [T, B].
        group_size: G, 1 leaves the advantages as they are.

    Returns:
        Advantages float64 [T, B].
    """
    if group_size == 1:
        return advantages
    shape = (len(advantages), -1, group_size)

    def of_groups(array: np.ndarray) -> np.ndarray:
        """[T, B] -> [groups, T G], in order of simulated time."""
        return array.reshape(shape).swapaxes(0, 1).reshape(-1, len(array) * group_size)

    rows = of_groups(advantages)
    relative, decisions = np.empty_like(rows), rows.shape[1]
    own = np.zeros((group_size, decisions), np.int64)
    counts, at, rank = (np.zeros(size, np.int64) for size in (group_size, group_size, decisions))
    lane = of_groups(steps.lane % group_size)
    _compare(of_groups(steps.now_s), of_groups(steps.plays), lane, rows, own, counts, rank, at, relative)
    return relative.reshape(-1, len(advantages), group_size).swapaxes(0, 1).reshape(advantages.shape)


def comparable(advantages: np.ndarray, group_size: int) -> np.ndarray:
    """Advantages of mean 0 and a standard deviation of about 1 in each group of lanes.

    Where groups play different scenarios, their rewards differ by orders of magnitude: without this the most
    overloaded one would be all that is learned from. A group in which answers hardly matter is not blown up
    beyond `LEAST_SPREAD` of the whole. Within one scenario all lanes are one group, so that episodes count
    by how much there was to win.

    Args:
        advantages: float64 [T, B].
        group_size: lanes of a group, a divisor of B.
    """
    advantages = advantages - advantages.mean()
    groups = advantages.reshape(len(advantages), -1, group_size)
    spread = groups.std((0, 2), keepdims=True)
    scaled = groups / np.maximum(spread, LEAST_SPREAD * advantages.std() + 1e-8)
    return scaled.reshape(advantages.shape)


@kernel
def _compare(now, plays, lane, rows, own, counts, rank, at, relative):
    """`group_relative` of rows [groups, N].

    Scratch: `own` [G, N], the decisions of each lane; `counts` [G], how many; `rank` [N], which of those of
    its lane at one time each is; `at` [G], where each lane stands.
    """
    for g in range(rows.shape[0]):
        _list_decisions(now[g], plays[g], lane[g], own, counts, rank)
        for a in range(len(counts)):
            at[:] = -1
            for m in range(counts[a]):
                k = own[a, m]
                total, known = 0.0, 0
                for l in range(len(counts)):
                    while at[l] + 1 < counts[l] and not _later(now[g], plays[g], rank, own[l, at[l] + 1], k):
                        at[l] += 1
                    before = own[l, at[l]] if at[l] >= 0 else NONE
                    behind = own[l, at[l] + 1] if at[l] + 1 < counts[l] else NONE
                    value, is_known = _read(now[g], plays[g], rows[g], before, behind, k)
                    total += value
                    known += is_known
                relative[g, k] = rows[g, k] - total / known if known > 1 else rows[g, k]


@inlined
def _list_decisions(now, plays, lane, own, counts, rank):
    counts[:] = 0
    for k in range(len(now)):
        l = lane[k]
        rank[k] = 0
        if counts[l]:
            before = own[l, counts[l] - 1]
            if plays[before] == plays[k] and now[before] == now[k]:
                rank[k] = rank[before] + 1
        own[l, counts[l]] = k
        counts[l] += 1


@inlined
def _later(now, plays, rank, p, k):
    """Whether decision p comes behind decision k: by play, time and rank."""
    if plays[p] != plays[k]:
        return plays[p] > plays[k]
    if now[p] != now[k]:
        return now[p] > now[k]
    return rank[p] > rank[k]


@inlined
def _read(now, plays, row, before, behind, k):
    """A lane's advantage at the time of decision k, from its decisions around it, and whether it has one."""
    has_before = before != NONE and plays[before] == plays[k]
    has_behind = behind != NONE and plays[behind] == plays[k]
    if not has_before:
        return (row[behind], 1) if has_behind else (0.0, 0)
    if not has_behind or now[before] == now[k]:
        return row[before], 1
    share = (now[k] - now[before]) / (now[behind] - now[before])
    return row[before] + share * (row[behind] - row[before]), 1
