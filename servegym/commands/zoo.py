"""`servegym evaluate zoo`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servegym.agents.ppo import load_policy
from servegym.agents.ppo.checkpoint import CONFIG
from servegym.errors import InputError
from servegym.files import console, say
from servegym.report import render
from servegym.training import final_tables, record

METRICS = "metrics.json"
DIFFERENT = 1


@dataclass(kw_only=True)
class Command:
    """Play every shipped policy again, print its card's tables, and say whether the figures are the card's.

    Each plays beside the heuristics of its card: the same scenarios, fleets, loads, seeds and requests. The
    exit code is 1 where a figure differs in its first six digits.
    """

    checkpoints: str = "checkpoints"
    """Folder of the checkpoints, one folder for each environment in it."""
    quick: bool = False
    """Play only the policy and the heuristics that are the best of some table."""
    num_threads: int = 2
    """Episodes that run at the same time."""

    def run(self) -> int:
        """Play, print, compare."""
        folders = sorted(path.parent for path in Path(self.checkpoints).glob(f"*/*/{CONFIG}"))
        if not folders:
            raise InputError(
                "zoo", "checkpoints", self.checkpoints, "there is no ENV/POLICY/config.json in it"
            )
        different = 0
        for folder in folders:
            differences = list(self._differences(folder))
            for difference in differences:
                say(f"{folder}: {difference}")
            say(f"{folder}: {'DIFFERS from' if differences else 'equals'} its card")
            different += bool(differences)
        say(f"{len(folders)} policies, {different} of them not as their cards say")
        return DIFFERENT if different else 0

    def _differences(self, folder: Path) -> Iterator[str]:
        policy = load_policy(folder)
        scenarios = policy.task.read_scenarios(folder / CONFIG)
        seeds, recorded = _recorded(folder)
        names = {row["policy"] for table in recorded for row in table["policies"] if not row["learned"]}
        if self.quick:
            names = {table["best_heuristic"] for table in recorded}
        tables = final_tables(policy, scenarios, seeds, self.num_threads, names)
        for table in tables:
            out = console()
            out.print(render(table, out.width))
        if len(tables) != len(recorded):
            yield f"{len(recorded)} tables on the card, {len(tables)} now"
            return
        for before, now in zip(recorded, record(tables), strict=True):
            yield from _compare(before, now)
            if not self.quick:
                yield from _missing(before, now)


def _recorded(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Seeds and tables of a card, as metrics.json has them.

    Raises:
        InputError: where it has none.
    """
    path = folder / METRICS
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        return int(metrics["comparison"]["seeds"]), list(metrics["tables"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(path, "tables", repr(error), "train to the end; that writes them") from error


def _missing(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Policies of a card's table that do not exist any more."""
    played = {row["policy"] for row in now["policies"]}
    for row in before["policies"]:
        if row["policy"] not in played:
            yield f"{before['scenario']}: {row['policy']} is on the card and not known now"


def _compare(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What of a table has changed; policies that were not played now are left out."""
    where = f"{before['scenario']}, {before['cluster']} at load {before['load']:g}"
    for name in ("scenario", "cluster", "load", "rate_rps", "requests"):
        if before[name] != now[name]:
            yield f"{where}: {name} {before[name]} on the card, {now[name]} now"
    known = {row["policy"]: row["metrics"] for row in before["policies"]}
    for row in now["policies"]:
        for metric, value in row["metrics"].items():
            found = known[row["policy"]][metric]
            for part, before_, now_ in zip(("mean", "half_width"), found, value, strict=True):
                if before_ != now_:
                    yield f"{where}: {row['policy']} {metric} {part} {before_} on the card, {now_} now"
