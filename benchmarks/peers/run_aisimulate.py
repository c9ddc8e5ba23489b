"""AISimulate (Apache-2.0, NVIDIA) on the requests of benchmarks/simulate.py, in an interpreter that has it.

    python run_aisimulate.py SPEC.json

The spec gives `traces` (files in Mooncake's format, played one by one), `replicas`, `token_budget`,
`max_seqs` and `runs`. Prints one line of JSON: per trace the CPU seconds of each run, children included, and
the means of the latencies. A run is a whole `run_prediction`, as AISimulate's own command line calls it.
"""

from __future__ import annotations

import json
import resource
import sys
from importlib.metadata import version
from pathlib import Path

from aisimulate.config import CorePredictionConfig
from aisimulate.predict import PredictionResult, run_prediction
from aisimulate.runner import EngineReplayRunnerFactory


def config(spec: dict, trace: str) -> CorePredictionConfig:
    """A100s under vLLM, dispatched round robin: the engine stack knows no other rule."""
    worker = {
        "parallelism": {"replicas": spec["replicas"]},
        "scheduler": {"max_batched_tokens": spec["token_budget"], "max_sequences": spec["max_seqs"]},
        "kv_cache": {"prefix_caching": False, "block_size": 16},
    }
    return CorePredictionConfig.model_validate(
        {
            "engine": {
                "model": "meta-llama/Meta-Llama-3.1-8B",
                "hardware": "a100_sxm",
                "backend": "vllm",
                "workers": {"aggregated": worker},
            },
            "traffic": {
                "source": {"type": "trace", "paths": [trace], "format": "mooncake", "block_size": 512},
                "load": {"type": "trace_timestamps"},
            },
        }
    )


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def play(spec: dict, trace: str) -> tuple[float, PredictionResult]:
    """CPU seconds and result of one prediction."""
    start = cpu_seconds()
    result = run_prediction(config(spec, trace), stack="engine", runner_factory=EngineReplayRunnerFactory())
    return cpu_seconds() - start, result


def measure(spec: dict, trace: str) -> dict[str, object]:
    _, result = play(spec, trace)
    means = {name: result.summary[f"mean_{name}_ms"] / 1e3 for name in ("ttft", "tpot", "e2e_latency")}
    return {
        "cpu_s": [play(spec, trace)[0] for _ in range(spec["runs"])],
        "requests": result.summary["completed_requests"],
        "means_s": means,
    }


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    traces = [measure(spec, trace) for trace in spec["traces"]]
    print(json.dumps({"version": version("aisimulate"), "traces": traces}))


if __name__ == "__main__":
    main()
