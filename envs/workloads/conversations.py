"""Open-loop conversations as Mooncake recorded them: a share of the requests continues an earlier one."""

from __future__ import annotations

from typing import Any

import numpy as np

from servegym.envs.workloads.arrivals import modulated_arrivals
from servegym.envs.workloads.fits import fit
from servegym.envs.workloads.lengths import Quantile, correlated_uniforms, quantile_function, tokens
from servegym.envs.workloads.prefixes import chained_ids, full_blocks
from servegym.envs.workloads.workload import NO_ID, Workload, make_workload

ROUNDS = 16  # of looking for an earlier request that nobody else continues


def conversations(name: str, requests: int, rate_rps: float, rng: np.random.Generator) -> Workload:
    """Requests at fitted times; a continuing one has the earlier prompt and answer as its prefix.

    All prompts share their first block (the system prompt).
    """
    f = fit(name)
    p, block_tokens = f["prefix"], f["prefix"]["block_tokens"]
    arrivals, links, lengths = rng.spawn(3)
    arrived = modulated_arrivals(arrivals, requests, f["arrival"])
    parent = _parents(links, arrived, p["continue_share"], quantile_function(p["turn_gap_s"]))
    levels = _levels(parent)
    prompt, output = _lengths(lengths, f, parent, levels)

    chain, turn = np.arange(requests), np.zeros(requests, np.int64)
    next_prompt = np.zeros(requests, np.int64)
    for depth, rows in enumerate(levels):
        turn[rows] = depth
        if depth:
            chain[rows] = chain[parent[rows]]
            next_prompt[parent[rows]] = prompt[rows]
    _, session = np.unique(chain, return_inverse=True)
    chains = int(session.max()) + 1
    common = np.minimum(np.arange(chains), 1)  # every chain but the first begins with the first one's block
    offsets, ids = chained_ids(
        session, full_blocks(prompt, output, next_prompt, block_tokens), np.zeros(chains, np.int64), common
    )
    return make_workload(
        name,
        arrived * (f["arrival"]["rate_rps"] / rate_rps),
        prompt,
        output,
        session=session,
        turn=turn,
        prefix_offsets=offsets,
        prefix_ids=ids,
        prefix_block_tokens=block_tokens,
        class_names=(f["class"],),
    )


def _parents(rng: np.random.Generator, arrived: np.ndarray, share: float, gap: Quantile) -> np.ndarray:
    """Row that each row continues, or -1; no row is continued twice.

    The gap is drawn below the row's own arrival, so that the share holds from the start of the window.
    """
    n = len(arrived)
    parent = np.full(n, NO_ID)
    free = np.ones(n, bool)
    p = np.linspace(0, 1, 2049)
    reach = np.interp(arrived, gap(p), p)
    open_rows = np.flatnonzero((rng.random(n) < share) & (np.arange(n) > 0))
    for _ in range(ROUNDS):
        since = gap(rng.random(len(open_rows)) * reach[open_rows])
        wish = np.searchsorted(arrived, arrived[open_rows] - since)
        wish = np.minimum(wish, open_rows - 1)
        wins = np.zeros(len(open_rows), bool)
        wins[np.unique(wish, return_index=True)[1]] = True
        wins &= free[wish]
        parent[open_rows[wins]] = wish[wins]
        free[wish[wins]] = False
        open_rows = open_rows[~wins]
    return parent


def _levels(parent: np.ndarray) -> list[np.ndarray]:
    """Rows by turn: those that continue nothing, those that continue them, and so on."""
    child = np.full(len(parent), NO_ID)
    continuing = np.flatnonzero(parent >= 0)
    child[parent[continuing]] = continuing
    levels = [np.flatnonzero(parent < 0)]
    while len(rows := child[levels[-1]][child[levels[-1]] >= 0]):
        levels.append(rows)
    return levels


def _lengths(
    rng: np.random.Generator, f: dict[str, Any], parent: np.ndarray, levels: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    rho, p = f["lengths"]["rho"], f["prefix"]
    u = correlated_uniforms(rng, np.array([[1.0, rho], [rho, 1.0]]), len(parent))
    output = tokens(quantile_function(f["lengths"]["output"]), u[1])
    prompt = tokens(quantile_function(p["first_prompt"]), u[0])
    new = np.rint(np.interp(u[0], p["new_tokens"]["p"], p["new_tokens"]["x"])).astype(np.int64)
    for rows in levels[1:]:
        grown = prompt[parent[rows]] + output[parent[rows]] + new[rows]
        prompt[rows] = np.clip(grown, 1, p["max_prompt_tokens"])
    return prompt, output
