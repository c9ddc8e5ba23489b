"""One of two real vLLM servers is killed with -9 under load: what becomes of the requests.

    python benchmarks/engine_loss.py

Needs what benchmarks/gateway.py needs. Locust keeps users busy through `servegym gateway` (Envoy and the
picker), half of the requests streamed; in the midst of it an engine and all its processes are killed. Every
request belongs to one of these:

    answered   200 and all tokens that it asked for, whether its first engine lived or not
    refused    429, 503 or 504
    cut        a stream that ended after its first tokens: they cannot be taken back, and no other engine
               knows them; `servegym migrator` in place of the gateway takes such streams further
    lost       none of these; the value, which has to be 0

Duplicates are answers that the surviving engine gave beyond those that a client got. The same is then played
through `servegym migrator`, where cut streams go on, too. The last line is JSON.
"""

from __future__ import annotations

import sys
import tempfile
import time
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path

from report import report
from serving.clients import Load, finish, is_whole
from serving.fronts import Front, counters, migrator, picker

from servegym.errors import InputError
from servegym.runtime.gateway.envoy import find_envoy
from servegym.runtime.vllm.launch import NAME, Engine, EngineSettings, launch

LOAD = Load(users=16, seconds=20, streamed=0.5)
KILL_AT_S = 8.0  # after the first users came
MAX_SEQS = 16
REFUSED = (429, 503, 504)
GATEWAY_POLICY, MIGRATOR_POLICY = "least_tokens", "lmetric+llumnix"


def named(number: int) -> EngineSettings:
    """An engine that says in every answer which one it is."""
    return EngineSettings(max_seqs=MAX_SEQS, arguments=("--served-model-name", f"engine-{number}", NAME))


def fate(answer: dict) -> str:
    """Which kind of end a request had."""
    if is_whole(answer):
        return "answered"
    if answer["status"] in REFUSED:
        return "refused"
    return "cut" if answer["streamed"] and answer["tokens"] else "lost"


def play(front: Front, engines: list[Engine], folder: Path) -> dict:
    """Load, a kill in the midst of it, and what came of both."""
    output = folder / "answers.json"
    output.unlink(missing_ok=True)
    before = successes(engines[1])
    process = LOAD.start(front.url, output)
    time.sleep(KILL_AT_S)
    killed = time.time()
    engines[0].kill()
    answers = finish(process, output)
    served = successes(engines[1]) - before
    return {
        **outcome(answers, killed),
        "duplicates": served - sum(answer["engine"] == "engine-1" for answer in answers if is_whole(answer)),
        "redispatched": redispatched(front),
    }


def outcome(answers: list[dict], killed: float) -> dict:
    """Figures of one run.

    Args:
        answers: as locust wrote them.
        killed: time of the kill.
    """
    fates = [fate(answer) for answer in answers]
    touched = [a for a in answers if a["begin"] < killed < a["end"]]
    later = [a for a in answers if a["begin"] >= killed]
    if not touched or not later:
        sys.exit("no request was in flight at the kill, or none came after it")
    failures = [a["end"] for a, f in zip(answers, fates, strict=True) if f != "answered"]
    return {
        "sent": len(answers),
        **{name: fates.count(name) for name in ("answered", "refused", "cut", "lost")},
        "in_flight_at_kill": len(touched),
        "sent_after_kill": len(later),
        "sent_after_kill_and_not_answered": sum(not is_whole(a) for a in later),
        # Until all who were hit had an end, and until the last one that did not get its answer.
        "recovered_s": max(a["end"] for a in touched) - killed,
        "last_failure_s": max(0.0, max(failures, default=killed) - killed),
    }


def successes(engine: Engine) -> int:
    """Answers that an engine has given to their end."""
    with urllib.request.urlopen(f"{engine.url}/metrics", timeout=10) as page:
        return round(counters(page.read().decode())["vllm:request_success_total"])


def redispatched(front: Front) -> int:
    """Requests that another engine than the first answered."""
    return round(front.counters().get(front.redispatched, 0))


def measure(open_front: AbstractContextManager[Front], engines: list[Engine], folder: Path) -> dict:
    with open_front as front:
        row = play(front, engines, folder)
    print(f"{front.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    return row


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    try:
        find_envoy(None)
        with tempfile.TemporaryDirectory() as name:
            rows = run(Path(name))
    except InputError as error:
        sys.exit(str(error))
    lost = sum(row["lost"] + row["duplicates"] for row in rows.values())
    report("engine_loss", lost, "requests lost or doubled", 0, rows)


def run(folder: Path) -> dict[str, dict]:
    rows = {}
    flags = ("--max-seqs", str(MAX_SEQS))
    with launch([named(0), named(0), named(1)], folder=folder) as (first, second, survivor):
        both = [first, survivor]
        rows["gateway"] = measure(picker(GATEWAY_POLICY, both, folder, *flags), both, folder)
        both = [second, survivor]
        rows["migrator"] = measure(migrator(MIGRATOR_POLICY, both, folder, *flags), both, folder)
    return rows


if __name__ == "__main__":
    main()
