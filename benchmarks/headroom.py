"""Headroom: what a clairvoyant look-ahead reaches beyond the best heuristic, scenario by scenario.

    python benchmarks/headroom.py
    python benchmarks/headroom.py scarce mixed

Each scenario is played on its first fleet at its highest load, in two episodes shorter than its own, the same
for all policies: every heuristic that its levers allow, with published parameters; the best dispatch rule of
them joined with each rule for other questions; and look-ahead, which tries answers on the true future with
the best heuristic behind them. Headroom is the largest of

    goodput               look-ahead / best heuristic - 1
    P99 TTFT, P99 TPOT    1 - look-ahead / the best of the heuristics whose goodput is within 1% of the best

Look-ahead plays for two objectives, goodput and the tail of TPOT; the better counts, a P99 only where goodput
is no less than the best heuristic's. It improves one answer at a time: this much can be won, maybe more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from report import report

from servegym.agents.heuristics import heuristic_names, make_heuristic
from servegym.agents.search.lookahead import Lookahead
from servegym.envs.cluster.episode import Episode
from servegym.envs.scenario import Scenario, load_scenario, scenario_names
from servegym.evaluation import Row, Setting, decisions_of, episodes_of, measure

GOAL = 5
ENOUGH = 0.1
REQUESTS = 768
SEEDS = 2
HORIZON = 64  # mean gaps between arrivals that a branch plays
WIDTH = 3  # answers that get such a branch
OBJECTIVES = ("goodput", "tpot")
TAILS = ("ttft_p99_s", "tpot_p99_s")
NEAR = 0.99  # of the best goodput: heuristics whose P99 counts


def mean(row: Row, metric: str) -> float:
    return row.interval(metric).mean


def built_in(name: str) -> Mapping[str, str] | None:
    """The rules of the model, kind by kind, that a heuristic consists of; None where it has another."""
    heuristic = make_heuristic(name)
    parts = getattr(heuristic, "rules", (heuristic,))
    rules = {kind: getattr(part, "rule", None) for part in parts for kind in part.kinds}
    return None if None in rules.values() or "round_robin" in rules.values() else rules


def play_heuristics(scenario: Scenario, episodes: Sequence[Episode]) -> list[Row]:
    """All heuristics, best goodput first."""

    def played(names: Iterable[str]) -> list[Row]:
        return [measure(make_heuristic(name), scenario, episodes) for name in names]

    names = heuristic_names(decisions_of(scenario))
    rows = sorted(played(names), key=lambda row: -mean(row, "goodput"))
    others = [name for name in names if "dispatch" not in make_heuristic(name).kinds and name != "default"]
    dispatch = next(
        row.policy for row in rows if make_heuristic(row.policy).kinds == ("dispatch",) and not row.oracle
    )
    rows += played(f"{dispatch}+{other}" for other in others)
    return sorted((row for row in rows if not row.oracle), key=lambda row: -mean(row, "goodput"))


def headroom(name: str) -> dict[str, Any]:
    """One row of the table."""
    start = time.perf_counter()
    scenario = replace(load_scenario(name), requests=REQUESTS)
    setting = Setting(scenario.clusters[0], scenario.loads[1])
    episodes = episodes_of(scenario, setting, SEEDS, seed=0)
    rows = play_heuristics(scenario, episodes)
    rules = next(rules for row in rows if (rules := built_in(row.policy)))
    horizon_s = HORIZON / min(e.workload.rate_rps for e in episodes)
    looks = [
        measure(Lookahead(objective, behind=[rules], horizon_s=horizon_s, width=WIDTH), scenario, episodes)
        for objective in OBJECTIVES
    ]
    best = mean(rows[0], "goodput")
    reached = max(mean(row, "goodput") for row in looks)
    near = [row for row in rows if mean(row, "goodput") >= NEAR * best]
    fair = [row for row in looks if mean(row, "goodput") >= best]
    by_name = {row.policy: row for row in rows}
    found: dict[str, Any] = {
        "cluster": setting.cluster, "load": setting.load, "decisions": decisions_of(scenario),
        "best_heuristic": rows[0].policy, "rules_behind": rules,
        "random": mean(by_name["random"], "goodput"), "round_robin": mean(by_name["round_robin"], "goodput"),
        "goodput": best, "look_goodput": reached,
    }  # fmt: skip
    gains = {"goodput": reached / best - 1}
    for metric in TAILS:
        found[metric] = min(mean(row, metric) for row in near)
        found[f"look_{metric}"] = min(mean(row, metric) for row in fair or looks)
        gains[metric] = 1 - found[f"look_{metric}"] / found[metric] if fair else 0.0
    return found | {"gains": gains, "headroom": max(gains.values()), "seconds": time.perf_counter() - start}


def show(name: str, row: Mapping[str, Any]) -> None:
    gains = row["gains"]
    print(
        f"{name:13s} {row['random']:6.3f} {row['round_robin']:6.3f} {row['goodput']:6.3f} "
        f"{row['look_goodput']:6.3f} {gains['goodput']:+6.1%} | "
        f"{row['ttft_p99_s']:7.2f} {row['look_ttft_p99_s']:7.2f} {gains['ttft_p99_s']:+6.1%} | "
        f"{row['tpot_p99_s']:6.4f} {row['look_tpot_p99_s']:6.4f} {gains['tpot_p99_s']:+6.1%} | "
        f"{row['headroom']:+6.1%} {row['best_heuristic']}, {row['seconds']:.0f} s",
        flush=True,
    )


def main() -> None:
    start = time.perf_counter()
    print(
        "              goodput                           | P99 TTFT, s            | P99 TPOT, s           |\n"
        "scenario      random  robin   best   look   gain |    best    look   gain |   best   look   gain |"
    )
    table = {}
    for name in sys.argv[1:] or scenario_names():
        table[name] = headroom(name)
        show(name, table[name])
    found = sum(row["headroom"] > ENOUGH for row in table.values())
    detail = {
        "scenarios": table,
        "requests": REQUESTS,
        "seeds": SEEDS,
        "lookahead": {"objectives": OBJECTIVES, "horizon_in_gaps": HORIZON, "width": WIDTH},
        "seconds": time.perf_counter() - start,
    }
    report("headroom", found, "scenarios above 10%", GOAL, detail)


if __name__ == "__main__":
    main()
