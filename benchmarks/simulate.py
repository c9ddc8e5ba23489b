"""Requests and iterations simulated per CPU-second, one thread, beside AISimulate on the same requests.

    python benchmarks/simulate.py
    SERVEGYM_AISIMULATE_PYTHON=PATH python benchmarks/simulate.py    # interpreter that has aisimulate

A call goes from requests in memory to records (AISimulate: to its summary); compilation is not counted. The
value is the ratio of whole calls to AISimulate's; without aisimulate, to the figure measured here before. The
detail also has the ratio of calls without their start-up, which is the CPU time of the same call with the
first request alone. The last line is JSON.
"""

from __future__ import annotations

import os

os.environ["NUMBA_NUM_THREADS"] = "1"  # before numba is imported

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from report import report, spread

from servegym.envs.cluster.capacity import saturation_rps
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.lane import run_lanes
from servegym.envs.cluster.simulate import RULES, records_of
from servegym.envs.cluster.spec import ClusterSpec, parse_cluster
from servegym.envs.cluster.world import build_world
from servegym.envs.records import Records
from servegym.envs.workloads import Workload, generate, head

GOAL = 100.0
RUNS = 7
PEER_RUNS = 7
PEER_REQUESTS_PER_CPU_S = 6_900  # aisimulate 0.13.0.dev202610270000000085, whole calls, 2-core AMD EPYC
PEER_PYTHON = "SERVEGYM_AISIMULATE_PYTHON"
PROFILE = "a100-llama-3.1-8b"
REPLICAS, TOKEN_BUDGET, MAX_SEQS = 4, 512, 128


@dataclass(frozen=True)
class Call:
    """One simulation: CPU seconds of the whole call and of the engine in it, and what came out."""

    cpu_s: float
    engine_s: float
    iterations: int
    records: Records


def call(cluster: ClusterSpec, workload: Workload, rule: str) -> Call:
    """What `servegym.envs.cluster.simulate.simulate` does, with a watch beside it."""
    start = time.process_time()
    world = build_world([Episode(workload, cluster, workload.output_tokens)], 1)
    built = time.process_time()
    run_lanes(world, RULES[rule])
    played = time.process_time()
    records = records_of(world, 0)
    end = time.process_time()
    return Call(end - start, played - built, int(world.instance["clock"].sum()), records)


def measure(title: str, cluster: ClusterSpec, workload: Workload, rule: str, runs: int) -> dict:
    call(cluster, workload, rule)  # compiles, and warms the caches
    calls = [call(cluster, workload, rule) for _ in range(runs)]
    startup_s = median(call(cluster, head(workload, 1), rule).cpu_s for _ in range(runs))
    n, last = len(workload), calls[-1]
    result = {
        "requests": n,
        "iterations": last.iterations,
        "startup_cpu_s": startup_s,
        "requests_per_cpu_s": spread([n / c.cpu_s for c in calls]),
        "requests_per_cpu_s_without_startup": spread([n / (c.cpu_s - startup_s) for c in calls]),
        "engine_requests_per_cpu_s": spread([n / c.engine_s for c in calls]),
        "engine_iterations_per_cpu_s": spread([c.iterations / c.engine_s for c in calls]),
        "means_s": latencies(last.records),
        "cache_hits": float(last.records.cached_tokens.sum() / last.records.prompt_tokens.sum()),
    }
    rates = [result[f"{k}requests_per_cpu_s"]["median"] for k in ("", "engine_")]
    print(f"{title}: {rates[0]:,.0f} requests per CPU-second, the engine alone {rates[1]:,.0f}")
    return result


def latencies(records: Records) -> dict[str, float]:
    """Means; an answer of one token has no TPOT."""
    return {name: float(np.nanmean(getattr(records, f"{name}_s"))) for name in ("ttft", "tpot", "e2e")}


def peer_python() -> str | None:
    """The interpreter that has aisimulate, or None."""
    if PEER_PYTHON in os.environ:
        return os.environ[PEER_PYTHON]
    return sys.executable if importlib.util.find_spec("aisimulate") else None


def write_mooncake(workload: Workload, path: Path) -> str:
    """The requests in Mooncake's format, no two sharing a block of 512 tokens."""
    lines, block = [], 0
    for at, prompt, output in zip(
        workload.arrived_at_s, workload.prompt_tokens, workload.output_tokens, strict=True
    ):
        blocks = -(-int(prompt) // 512)
        ids = list(range(block, block + blocks))
        block += blocks
        row = {"timestamp": at * 1e3, "input_length": int(prompt), "output_length": int(output)}
        lines.append(json.dumps({**row, "hash_ids": ids}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def measure_peer(python: str, workload: Workload) -> dict:
    """AISimulate on the same requests, and on the first one alone for its start-up."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        traces = [
            write_mooncake(workload, folder / "all.jsonl"),
            write_mooncake(head(workload, 1), folder / "first.jsonl"),
        ]
        settings = {"replicas": REPLICAS, "token_budget": TOKEN_BUDGET, "max_seqs": MAX_SEQS}
        spec = folder / "spec.json"
        spec.write_text(json.dumps({"traces": traces, "runs": PEER_RUNS, **settings}), encoding="utf-8")
        script = Path(__file__).parent / "peers" / "run_aisimulate.py"
        try:
            done = subprocess.run([python, script, spec], stdout=subprocess.PIPE, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"aisimulate does not run in {python} ({error}); unset {PEER_PYTHON} to go without")
    answer = json.loads(done.stdout.splitlines()[-1])
    whole, first = answer["traces"]
    startup_s, n = median(first["cpu_s"]), whole["requests"]
    result = {
        "peer": f"aisimulate {answer['version']}, measured in this run",
        "requests": n,
        "startup_cpu_s": startup_s,
        "requests_per_cpu_s": spread([n / s for s in whole["cpu_s"]]),
        "requests_per_cpu_s_without_startup": spread([n / (s - startup_s) for s in whole["cpu_s"]]),
        "means_s": whole["means_s"],
    }
    print(f"aisimulate: {result['requests_per_cpu_s']['median']:,.0f} requests per CPU-second")
    return result


def against_peer(ours: dict, workload: Workload) -> tuple[dict, dict[str, float]]:
    """The peer's figures, and ours as multiples of them."""
    python = peer_python()
    if python is None:
        constant = f"constant {PEER_REQUESTS_PER_CPU_S}, not measured in this run"
        ratio = ours["requests_per_cpu_s"]["median"] / PEER_REQUESTS_PER_CPU_S
        return {"peer": constant}, {"whole calls": ratio}
    peer = measure_peer(python, workload)
    kinds = {"whole calls": "requests_per_cpu_s", "without start-up": "requests_per_cpu_s_without_startup"}
    return peer, {kind: ours[key]["median"] / peer[key]["median"] for kind, key in kinds.items()}


def at_load(name: str, cluster: ClusterSpec, requests: int, load: float) -> Workload:
    """A generated workload at a share of the rate that saturates the cluster."""
    rate = load * saturation_rps(cluster, generate(name, 2048))
    return generate(name, requests, rate_rps=rate)


def main() -> None:
    four = parse_cluster(f"{REPLICAS}x{PROFILE}", token_budget=TOKEN_BUDGET, max_seqs=MAX_SEQS)
    fixed = generate("fixed:1024-256", 4_000, rate_rps=16.0)
    ours = measure("fixed:1024-256, 4 instances, round robin", four, fixed, "round_robin", 5 * RUNS)
    peer, ratios = against_peer(ours, fixed)
    sixteen = parse_cluster(f"16x{PROFILE}")
    azure = at_load("azure2023_conv", sixteen, 200_000, 0.7)
    defaults = parse_cluster(f"4x{PROFILE}")
    sessions = at_load("sharegpt_turns", defaults, 20_000, 0.7)
    detail = {
        "ratios": ratios,
        "aisimulate": peer,
        "fixed:1024-256, 4 instances, 16 requests/s, round_robin": ours,
    }
    for rule in RULES:
        title = f"azure2023_conv, 16 instances, 0.7 of saturation, {rule}"
        detail[title] = measure(title, sixteen, azure, rule, RUNS)
    title = "sharegpt_turns (prefix cache), 4 instances, 0.7 of saturation, least_request"
    detail[title] = measure(title, defaults, sessions, "least_request", RUNS)
    report("simulate", ratios["whole calls"], "x", GOAL, detail)


if __name__ == "__main__":
    main()
