"""Real vLLM runs replayed through the cluster model: mean and P99 errors of TTFT, TPOT and E2E.

    python benchmarks/fidelity.py [FOLDER ...]

Each FOLDER holds engine.json, hardware.json, kernels/*.csv and requests.parquet; the default is both runs of
../shared/fidelity. The profile comes from kernels/*.csv alone, nothing from the run's results. Arrivals are
`queued_s`, since the engine's clock differs from the client's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from report import report

from servegym.envs.cluster.simulate import simulate
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec
from servegym.envs.costs import Profile, save_profile
from servegym.envs.costs.build_run import build_from_run, read_json, recorded
from servegym.envs.workloads.workload import Workload, make_workload
from servegym.errors import InputError

GOAL, TTFT_GOAL = 3.0, 5.0
SHARED = Path(__file__).resolve().parents[2] / "shared" / "fidelity"
TIMES = ("queued_s", "first_token_s", "last_token_s")
COUNTS = ("prompt_tokens", "output_tokens")
BLOCK_TOKENS = 16
STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(np.mean(values)),
    "p99": lambda values: float(np.percentile(values, 99)),
}

Metrics = dict[str, np.ndarray]
Errors = dict[str, dict[str, float]]


def read_run(folder: Path) -> dict[str, list]:
    """Columns of requests.parquet, sorted by the time at which the engine queued the request."""
    path = folder / "requests.parquet"
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise InputError(path, "file", path.name, f"cannot be read as Parquet: {error}") from error
    for name in (*TIMES, *COUNTS):
        if name not in table.column_names:
            raise InputError(path, name, None, "missing column")
        column = np.asarray(table[name].to_pylist(), dtype=object)
        bad = [i for i, value in enumerate(column) if not isinstance(value, (int, float)) or not value >= 0]
        if bad:
            raise InputError(path, f"{name}, row {bad[0]}", column[bad[0]], "must be a number, 0 or more")
    return table.sort_by("queued_s").to_pydict()


def workload_of(folder: Path, run: dict[str, list]) -> Workload:
    """The run's requests; generated blocks get ids of their own, which a preempted request may hit."""
    known = run.get("prefix_hash_ids") or [[]] * len(run["queued_s"])
    fresh = 1 + max((max(ids) for ids in known if ids), default=-1)
    ids: list[int] = []
    offsets = [0]
    for mine, prompt, output in zip(known, run["prompt_tokens"], run["output_tokens"], strict=True):
        ids += (mine or [])[: prompt // BLOCK_TOKENS]
        more = (prompt + output) // BLOCK_TOKENS - (len(ids) - offsets[-1])
        ids += range(fresh, fresh + more)
        fresh += more
        offsets.append(len(ids))
    return make_workload(
        str(folder),
        np.asarray(run["queued_s"]) - run["queued_s"][0],
        run["prompt_tokens"],
        run["output_tokens"],
        prefix_offsets=np.asarray(offsets),
        prefix_ids=np.asarray(ids),
        prefix_block_tokens=BLOCK_TOKENS,
    )


def metrics(arrived: np.ndarray, first: np.ndarray, last: np.ndarray, output: np.ndarray) -> Metrics:
    """Seconds, one entry a request; TPOT of requests with more than one output token."""
    many = output > 1
    return {
        "TTFT": first - arrived,
        "TPOT": ((last - first)[many]) / (output[many] - 1),
        "E2E": last - arrived,
    }


def replay(folder: Path, run: dict[str, list], profile: Profile) -> tuple[Metrics, dict[str, int]]:
    """The model's metrics for the run's requests, and how often it preempted and hit the cache."""
    engine = read_json(folder / "engine.json")
    scheduler = engine.get("scheduler_config") or {}
    cache = engine.get("kv_cache") or {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "profile.json"
        save_profile(profile, path)
        instance = InstanceSpec(
            str(path),
            block_tokens=BLOCK_TOKENS,
            token_budget=recorded(folder, engine, "engine_kwargs", "max_num_batched_tokens"),
            max_seqs=recorded(folder, engine, "engine_kwargs", "max_num_seqs"),
            reserve_prompt=scheduler.get("scheduler_reserve_full_isl", True),
            async_scheduling=scheduler.get("async_scheduling", True),
        )
        caching = cache.get("enable_prefix_caching", True)
        cluster = ClusterSpec(folder.name, (instance,), prefix_caching=caching)
        records = simulate(cluster, workload_of(folder, run))
    output = np.asarray(run["output_tokens"])
    counts = {
        "preemptions": int(records.preemptions.sum()),
        "cached_tokens": int(records.cached_tokens.sum()),
    }
    modelled = metrics(records.arrived_s, records.first_token_s, records.finished_s, output)
    return modelled, counts


def errors(modelled: Metrics, measured: Metrics) -> Errors:
    """Signed relative errors in percent, by metric and statistic."""
    return {
        name: {
            key: round(100 * float(of(modelled[name]) / of(measured[name]) - 1), 2)
            for key, of in STATISTICS.items()
        }
        for name in measured
    }


def peer_errors(folder: Path) -> Errors | None:
    """LLMServingSim's errors on the same run, from its own report; None where there is none."""
    path = folder / "llmservingsim_errors.txt"
    if not path.is_file():
        return None
    found: Errors = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if len(words) == 5 and words[1] in ("Mean", "P99"):
            name = {"Latency": "E2E"}.get(words[0], words[0])
            percent = 100 * (float(words[3]) / float(words[2]) - 1)
            found.setdefault(name, {})[words[1].lower()] = round(percent, 2)
    return found


def compare(folder: Path) -> dict[str, object]:
    """Replay one run and print its table."""
    if not folder.is_dir():
        raise InputError(
            folder, "folder", str(folder), "no such folder; give one with requests.parquet and kernels/"
        )
    run = read_run(folder)
    columns = (np.asarray(run[name]) for name in (*TIMES, "output_tokens"))
    measured = metrics(*columns)
    profile = build_from_run(folder)
    modelled, counts = replay(folder, run, profile)
    mine, peer = errors(modelled, measured), peer_errors(folder)
    print(f"{folder.name}: {len(run['queued_s'])} requests, {counts['preemptions']} preemptions")
    print(f"  {'':10}{'measured':>12}{'model':>12}{'error %':>10}{'LLMServingSim %':>18}")
    for name in measured:
        for key, of in STATISTICS.items():
            other = f"{peer[name][key]:+.2f}" if peer else "-"
            seconds = f"{of(measured[name]):11.4f}s{of(modelled[name]):11.4f}s"
            print(f"  {name + ' ' + key:10}{seconds}{mine[name][key]:+10.2f}{other:>18}")
    return {"errors_percent": mine, "llmservingsim_percent": peer, "kv_blocks": profile.kv_blocks, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    folders = parser.parse_args().folders or sorted(p.parent for p in SHARED.glob("*/requests.parquet"))
    if not folders:
        raise InputError(SHARED, "folder", str(SHARED), "is absent; give FOLDER arguments")
    runs = {str(folder.name): compare(folder) for folder in folders}
    worst = {
        metric: max(abs(e) for run in runs.values() for e in run["errors_percent"][metric].values())  # type: ignore[index]
        for metric in ("TTFT", "TPOT", "E2E")
    }
    detail = {"runs": runs, "largest_percent": worst, "ttft_goal": TTFT_GOAL}
    report("fidelity", max(worst["TPOT"], worst["E2E"]), "%", GOAL, detail)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
