"""Headroom: what a clairvoyant look-ahead reaches beyond the best heuristic, scenario by scenario.

    python benchmarks/headroom.py
    python benchmarks/headroom.py scarce mixed

Each scenario is played on its first fleet at its highest load, in episodes shorter than its own, the same for
all policies: every heuristic that its levers allow with its published parameters, and look-ahead (every answer
that looks good in a short branch is tried on the true future, with the best heuristics behind it). Headroom is
the largest of

    goodput     look-ahead / best heuristic - 1
    P99 TTFT    1 - look-ahead / best heuristic, both by that metric
    P99 TPOT    likewise

Look-ahead plays once for each of the three; a P99 counts only where its goodput is no less than that of the
heuristic. It tries one answer at a time, so this is what can be won at least.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from report import report

from servegym.agents.heuristics import heuristic_names, make_heuristic
from servegym.agents.search.lookahead import Lookahead
from servegym.envs.cluster.episode import Episode
from servegym.envs.scenario import Scenario, load_scenario, scenario_names
from servegym.evaluation import Row, Setting, decisions_of, episodes_of, measure

GOAL = 5
ENOUGH = 0.1
REQUESTS = 256
SEEDS = 4
WIDTH = 4  # answers that get a full branch
BEHIND = 2  # sets of rules behind an answer
TAIL_HORIZON = 64  # arrivals; for the tail, what comes much later is noise
P99 = {"ttft": "ttft_p99_s", "tpot": "tpot_p99_s"}


def mean(row: Row, metric: str) -> float:
    return row.interval(metric).mean


def built_in(name: str) -> Mapping[str, str] | None:
    """The rules of the model, kind by kind, that a heuristic consists of; None where it has another."""
    heuristic = make_heuristic(name)
    parts = getattr(heuristic, "rules", (heuristic,))
    rules = {kind: getattr(part, "rule", None) for part in parts for kind in part.kinds}
    return None if None in rules.values() or "round_robin" in rules.values() else rules


def behind(rows: Sequence[Row]) -> list[Mapping[str, str]]:
    """What the first of these heuristics would do behind an answer."""
    sets = [rules for row in rows if (rules := built_in(row.policy)) is not None]
    return sets[:BEHIND]


def look(objective: str, rows: Sequence[Row], scenario: Scenario, episodes: Sequence[Episode]) -> Row:
    horizon = TAIL_HORIZON if objective in P99 else None
    policy = Lookahead(objective, behind=behind(rows), horizon=horizon, width=WIDTH)
    return measure(policy, scenario, episodes)


def headroom(name: str) -> dict[str, object]:
    """One row of the table."""
    scenario = replace(load_scenario(name), requests=REQUESTS)
    setting = Setting(scenario.clusters[0], scenario.loads[1])
    episodes = episodes_of(scenario, setting, SEEDS, seed=0)
    rows = [measure(make_heuristic(n), scenario, episodes) for n in heuristic_names(decisions_of(scenario))]
    by_name = {row.policy: row for row in rows}
    rows = [row for row in rows if not row.oracle]
    by_goodput = sorted(rows, key=lambda row: -mean(row, "goodput"))
    best, own = by_goodput[0], look("goodput", by_goodput, scenario, episodes)
    goodput, reached = mean(best, "goodput"), mean(own, "goodput")
    found: dict[str, object] = {
        "cluster": setting.cluster, "load": setting.load, "decisions": decisions_of(scenario),
        "random": mean(by_name["random"], "goodput"), "round_robin": mean(by_name["round_robin"], "goodput"),
        "best_heuristic": best.policy, "goodput": goodput, "look_goodput": reached,
    }  # fmt: skip
    gains = {"goodput": reached / goodput - 1}
    for objective, metric in P99.items():
        by_tail = sorted(rows, key=lambda row: mean(row, metric))
        best, own = by_tail[0], look(objective, by_tail, scenario, episodes)
        fair = mean(own, "goodput") >= mean(best, "goodput")
        gains[objective] = 1 - mean(own, metric) / mean(best, metric) if fair else 0.0
        found |= {
            f"best_{objective}": best.policy, metric: mean(best, metric),
            f"look_{metric}": mean(own, metric),
        }  # fmt: skip
    return found | {"gains": gains, "headroom": max(gains.values())}


def show(name: str, row: Mapping[str, object]) -> None:
    gains = row["gains"]
    assert isinstance(gains, dict)
    print(
        f"{name:13s} {row['random']:6.3f} {row['round_robin']:6.3f} {row['goodput']:6.3f} "
        f"{row['look_goodput']:6.3f} {gains['goodput']:+6.1%} | "
        f"{row['ttft_p99_s']:7.3f} {row['look_ttft_p99_s']:7.3f} {gains['ttft']:+6.1%} | "
        f"{row['tpot_p99_s']:6.4f} {row['look_tpot_p99_s']:6.4f} {gains['tpot']:+6.1%} | "
        f"{row['headroom']:+6.1%}  {row['best_heuristic']}",
        flush=True,
    )


def main() -> None:
    start = time.perf_counter()
    print(
        "              goodput                           | P99 TTFT, s            | P99 TPOT, s          |\n"
        "scenario      random  robin   best   look   gain |    best    look   gain |   best   look   gain | "
        "headroom, best heuristic"
    )
    table = {}
    for name in sys.argv[1:] or scenario_names():
        table[name] = headroom(name)
        show(name, table[name])
    found = sum(float(str(row["headroom"])) > ENOUGH for row in table.values())
    detail = {
        "scenarios": table,
        "requests": REQUESTS,
        "seeds": SEEDS,
        "lookahead": {"width": WIDTH, "rules_behind": BEHIND, "tail_horizon": TAIL_HORIZON},
        "seconds": time.perf_counter() - start,
    }
    report("headroom", found, "scenarios above 10%", GOAL, detail)


if __name__ == "__main__":
    main()
