"""Rewards of a transition, from one decision (time t) to the next or to the end of the episode (time t').

latency: minus the weighted request-seconds spent in the system. Over an episode this sums to minus the sum of
weight x end-to-end time of all requests (Little's law), but it comes without waiting for requests to end:

    r = -integral from t to t' of (sum of class weights of the requests that have arrived, not finished) ds

goodput: the weighted number of requests that finished within the service level of their class (goodput as in
DistServe, both limits together):

    r = sum over requests finished in (t, t'] of weight x [TTFT <= slo.ttft_s and TPOT <= slo.tpot_s]

Transitions differ in length, so returns discount by exp(-beta * (t' - t)), the scenario's `beta` in 1/s; the
environment reports t' - t in `info["elapsed_s"]`. Rewards within a transition are not discounted.
"""

from __future__ import annotations

from servegym.envs.cluster.kernel import kernel
from servegym.envs.scenario import REWARDS

LATENCY, GOODPUT = range(len(REWARDS))


@kernel
def collect(lane, kind):
    """Reward that a lane has accrued since the last call; `kind` is the index of its name in REWARDS."""
    reward = -lane.cost if kind == LATENCY else lane.gain
    lane.cost = 0.0
    lane.gain = 0.0
    return reward
