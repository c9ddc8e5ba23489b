"""Closed-loop sessions: each turn waits for the answer to the last one, then for a user or a tool.

Synthetic sessions are drawn whole and laid on a ring as long as the window (requests / rate): what runs over
its end comes in at its start as another session, already in progress. So the rate is stationary from the
first second on, although agent sessions last for hours.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from servegym.envs.workloads.fits import fit
from servegym.envs.workloads.lengths import Quantile, correlated_uniforms, quantile_function, tokens
from servegym.envs.workloads.prefixes import chained_ids, full_blocks
from servegym.envs.workloads.workload import NO_ID, Workload, make_workload
from servegym.errors import InputError

NOMINAL_TPOT_S = 0.02  # service time an output token, only for the nominal arrivals that order the rows


def agent_sessions(name: str, requests: int, rate_rps: float, rng: np.random.Generator) -> Workload:
    """`weka_agentic[:MAX]`: coding agents; prompts grow until the context is compacted, most gaps are tools.

    With MAX no prompt is longer: agents of a smaller context window compact earlier.
    """
    source, _, most = name.partition(":")
    f = fit(source)["session"]
    if most:
        f = f | {"max_prompt_tokens": _most_tokens(name, most, f["max_prompt_tokens"])}
    draws, gaps, starts = rng.spawn(3)
    turns, prompt, compacted = _agent_prompts(draws, f, requests)
    output = _draw(draws, f["output"], requests)
    gap_s = _tool_or_user_gaps(gaps, f, requests)
    return _workload(starts, name, rate_rps, turns, prompt, output, gap_s, compacted)


def _most_tokens(name: str, most: str, known: int) -> int:
    if not (most.isascii() and most.isdigit() and 1 <= int(most) <= known):
        hint = f"write weka_agentic:MAX, the longest prompt in tokens, 1..{known}"
        raise InputError("workload", "name", name, hint)
    return int(most)


def chat_sessions(name: str, requests: int, rate_rps: float, rng: np.random.Generator) -> Workload:
    """Conversations: every prompt is all that was said before and a new message.

    The source has no clock, so the time between messages is that of mooncake_conversation.
    """
    f = fit(name)["session"]
    draws, gaps, starts = rng.spawn(3)
    turns, prompt, output = _chat_prompts(draws, f, requests)
    return _workload(
        starts, name, rate_rps, turns, prompt, output, user_gaps(gaps, output), np.zeros(requests, bool)
    )


def user_gaps(rng: np.random.Generator, output: np.ndarray) -> np.ndarray:
    """Seconds from the end of the last answer to the next message of a person, [N].

    mooncake_conversation has the times between the arrivals of turns; the answer in between, that of the row
    above, takes its nominal time of that.
    """
    between_s = quantile_function(fit("mooncake_conversation")["prefix"]["turn_gap_s"])
    return np.maximum(between_s(rng.random(len(output))) - np.roll(output, 1) * NOMINAL_TPOT_S, 0)


def session_units(session: np.ndarray) -> np.ndarray:
    """Sessions renumbered 0..S-1, every row of an unknown session as one of its own, [N]."""
    alone = np.arange(len(session)) + session.max() + 1
    _, unit = np.unique(np.where(session == NO_ID, alone, session), return_inverse=True)
    return unit


def arrange(session: np.ndarray, nominal_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort turns by nominal arrival.

    Args:
        session: session of each turn; the turns of one session are neighbours, in order, [N].
        nominal_s: nominal arrivals, rising within a session, [N].

    Returns:
        (order [N], the turns by arrival; after [N], sorted row of the session's last turn or -1).
    """
    order = np.argsort(nominal_s, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    previous = np.where(_starts(session), NO_ID, np.concatenate([[NO_ID], rank[:-1]]))
    return order, previous[order]


def on_ring(
    rng: np.random.Generator, session: np.ndarray, gap_s: np.ndarray, output: np.ndarray, rate_rps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start sessions at random on a ring of N / rate seconds (Poisson of given count); cut them at its end.

    Args:
        rng: of the starts.
        session: 0..S-1, the turns of one session are neighbours, in order, [N].
        gap_s: seconds between the last answer and the turn; of no meaning for first turns, [N].
        output: output tokens, [N].
        rate_rps: requests/s.

    Returns:
        (nominal arrivals, rising within a session; session after the cuts, 0..; whether the turn was cut off
        the start of its session), [N] each.
    """
    window_s = len(session) / rate_rps
    nominal_s = rng.uniform(0, window_s, session[-1] + 1)[session] + _elapsed(session, gap_s, output)
    lap = np.floor(nominal_s / window_s)
    cut = _starts(session) | np.append(False, lap[1:] > lap[:-1])
    return np.maximum(nominal_s - lap * window_s, 0), np.cumsum(cut) - 1, lap > 0


def _elapsed(session: np.ndarray, gap_s: np.ndarray, output: np.ndarray) -> np.ndarray:
    """Nominal seconds from the start of the session to each turn, [N]."""
    first = _starts(session)
    step = np.where(first, 0.0, gap_s)
    step[1:] += np.where(first[1:], 0.0, output[:-1] * NOMINAL_TPOT_S)
    total = np.cumsum(step)
    return total - np.repeat(total[first], np.diff(np.append(np.flatnonzero(first), len(first))))


def next_prompts(chain: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Prompt tokens of the next row where it belongs to the same chain, else 0, [N]."""
    return np.append(np.where(chain[1:] == chain[:-1], prompt[1:], 0), 0)


def _workload(
    rng: np.random.Generator,
    name: str,
    rate_rps: float,
    turns: np.ndarray,
    prompt: np.ndarray,
    output: np.ndarray,
    gap_s: np.ndarray,
    compacted: np.ndarray,
) -> Workload:
    """Lay whole sessions on the ring, sort their turns and name their blocks.

    Shapes: turns [S] with sum N; all else [N]. `compacted`: the turn's context restarts after the blocks that
    compaction keeps.
    """
    f = fit(name.partition(":")[0])
    block_tokens = f["session"]["block_tokens"]
    whole = np.repeat(np.arange(len(turns)), turns)
    turn = np.arange(len(prompt)) - np.repeat(np.cumsum(turns) - turns, turns)
    nominal_s, session, _ = on_ring(rng, whole, gap_s, output, rate_rps)
    order, after = arrange(session, nominal_s)

    cut = _starts(session)
    chain = np.cumsum(cut | compacted) - 1
    first_row = np.flatnonzero(cut | compacted)
    root = chain[np.flatnonzero(cut)][session[first_row]]
    kept = np.where(root == np.arange(len(root)), 0, f["session"].get("compaction_keeps_blocks", 0))
    blocks = full_blocks(prompt, output, next_prompts(chain, prompt), block_tokens)
    offsets, ids = chained_ids(chain[order], blocks[order], root, kept)
    return make_workload(
        name,
        nominal_s[order],
        prompt[order],
        output[order],
        session=session[order],
        turn=turn[order],
        after=after,
        gap_s=np.where(after >= 0, gap_s[order], 0),
        prefix_offsets=offsets,
        prefix_ids=ids,
        prefix_block_tokens=block_tokens,
        class_names=(f["class"],),
    )


def _agent_prompts(
    rng: np.random.Generator, f: dict[str, Any], requests: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(turns [S], prompt tokens [requests], whether the context was compacted [requests]).

    Turns, first prompt, mean growth and largest / first prompt of a session are correlated; each next prompt
    adds mean growth * a weight; one that would pass the largest is compacted to a share of it.
    """
    u = correlated_uniforms(rng, f["copula_correlation"], requests)
    turns = _cut_to(tokens(quantile_function(f["turns"]), u[0]), requests)
    u = u[:, : len(turns)]
    now = np.minimum(quantile_function(f["first_prompt"])(u[1]), f["max_prompt_tokens"])
    growth = quantile_function(f["mean_growth"])(u[2])
    limit = np.minimum(now * quantile_function(f["largest_over_first"])(u[3]), f["max_prompt_tokens"])
    weight, keeps = quantile_function(f["growth_weight"]), quantile_function(f["shrink_keeps_fraction"])
    first = np.cumsum(turns) - turns
    prompt, compacted = np.empty(requests), np.zeros(requests, bool)
    prompt[first] = now
    for t in range(1, turns.max(initial=1)):
        live = np.flatnonzero(turns > t)
        grown = prompt[first[live] + t - 1] + growth[live] * weight(rng.random(len(live)))
        over = grown > limit[live]
        grown[over] = limit[live[over]] * keeps(rng.random(over.sum()))
        compacted[first[live] + t] = grown < prompt[first[live] + t - 1]
        prompt[first[live] + t] = grown
    return turns, np.maximum(np.rint(prompt), 1).astype(np.int64), compacted


def _tool_or_user_gaps(rng: np.random.Generator, f: dict[str, Any], requests: int) -> np.ndarray:
    tool = quantile_function(f["gap_after_tool_call_s"])(rng.random(requests))
    user = quantile_function(f["gap_after_end_of_turn_s"])(rng.random(requests))
    return np.maximum(np.where(rng.random(requests) < f["tool_call_share"], tool, user), 0)


def _chat_prompts(
    rng: np.random.Generator, f: dict[str, Any], requests: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(turns [S], prompt [requests], output [requests]); a conversation ends where its context is full."""
    turns = _draw(rng, f["turns"], requests)  # enough sessions, whatever a full context cuts off
    session = np.repeat(np.arange(requests), turns)
    first = _starts(session)
    user = np.where(
        first, _draw(rng, f["first_user"], len(first)), _draw(rng, f["followup_user"], len(first))
    )
    output = _draw(rng, f["output"], len(first))
    said = np.cumsum(user + output)
    before = np.repeat((said - user - output)[first], turns)
    prompt = said - output - before
    fits = np.flatnonzero(prompt <= f["max_prompt_tokens"])[:requests]
    kept = np.bincount(session[fits])
    return kept[kept > 0], prompt[fits], output[fits]


def _cut_to(turns: np.ndarray, requests: int) -> np.ndarray:
    """The first sessions that hold `requests` turns, the last of them cut short."""
    total = np.cumsum(turns)
    last = int(np.searchsorted(total, requests))
    turns = turns[: last + 1].copy()
    turns[-1] -= total[last] - requests
    return turns


def _draw(rng: np.random.Generator, marginal: dict[str, Any], count: int) -> np.ndarray:
    quantile: Quantile = quantile_function(marginal)
    return tokens(quantile, rng.random(count))


def _starts(session: np.ndarray) -> np.ndarray:
    """Whether each row is the first of its session, [N]."""
    return np.append(True, session[1:] != session[:-1])
