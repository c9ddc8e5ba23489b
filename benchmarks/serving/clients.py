"""Clients that drive a front: locust with our users, and vLLM's serving benchmark; both from other houses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from servegym.runtime.vllm.launch import NAME, tiny_model, vllm_python

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
STOP_S = 60  # for requests in flight when locust's time is over


@dataclass(frozen=True)
class Load:
    """A closed loop: so many users, each with a request in flight all the time."""

    users: int = 24
    seconds: int = 8
    seed: int = 0
    streamed: float = 1.0
    longest: int = 480  # prompt tokens

    def command(self, url: str) -> list[str]:
        """Locust's command line."""
        line = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", url]
        line += [
            "--users",
            str(self.users),
            "--spawn-rate",
            str(self.users),
            "--run-time",
            f"{self.seconds}s",
        ]
        return [*line, "--stop-timeout", str(STOP_S), "--only-summary", "--loglevel", "ERROR"]

    def start(self, url: str, output: Path) -> subprocess.Popen:
        """Locust, which writes its answers to `output` in the end."""
        fields = {"seed": self.seed, "streamed": self.streamed, "longest": self.longest}
        fields |= {"model": NAME, "output": str(output)}
        variables = {**os.environ, "SERVEGYM_LOAD": json.dumps(fields)}
        return subprocess.Popen(
            self.command(url), env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )


def finish(process: subprocess.Popen, output: Path) -> list[dict]:
    """The answers, when locust is done; its exit code is 1 where a request failed, which the answers tell."""
    _, errors = process.communicate()
    if not output.is_file():
        sys.exit(f"locust failed: {errors.strip() or process.returncode}")
    return json.loads(output.read_text(encoding="utf-8"))


def is_whole(answer: dict) -> bool:
    """Whether a request got all that it asked for."""
    return answer["status"] == 200 and answer["ended"] and answer["tokens"] == answer["asked"]


def why_failed(answers: list[dict]) -> dict[str, int]:
    """How often each status, exception or lack of tokens kept an answer from being whole."""
    return dict(
        Counter(
            f"status {a['status']}, {a['error'] or 'no exception'}, {a['tokens']} of {a['asked']} tokens"
            for a in answers
            if not is_whole(a)
        )
    )


def summary(answers: list[dict], seconds: float) -> dict[str, float]:
    """Throughput of the time in which all users were there, and latencies in ms."""
    begin = min(a["begin"] for a in answers)
    whole = [a for a in answers if is_whole(a)]
    timely = [a for a in whole if a["end"] <= begin + seconds]
    ttft = [1e3 * (a["first"] - a["begin"]) for a in whole if a["streamed"]]
    e2e = [1e3 * (a["end"] - a["begin"]) for a in whole]
    row = {
        "requests": len(answers),
        "failed": len(answers) - len(whole),
        "requests_per_s": len(timely) / seconds,
        "tokens_per_s": sum(a["tokens"] for a in timely) / seconds,
    }
    for name, values in (("ttft", ttft), ("e2e", e2e)):
        p50, p99 = np.percentile(values, [50, 99]) if values else (float("nan"), float("nan"))
        row |= {f"{name}_p50_ms": float(p50), f"{name}_p99_ms": float(p99)}
    return row


def vllm_bench(url: str, folder: Path, prompts: int, concurrency: int) -> dict[str, float]:
    """`vllm bench serve` against a front: random prompts of 32 to 96 tokens, 16 to 48 tokens of output."""
    python = vllm_python()
    line = [str(python), "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"]
    line += ["--base-url", url, "--model", NAME, "--tokenizer", str(tiny_model(python)), "--ignore-eos"]
    line += ["--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "32"]
    line += ["--random-range-ratio", "0.5", "--num-prompts", str(prompts), "--seed", "0", "--disable-tqdm"]
    line += ["--max-concurrency", str(concurrency), "--percentile-metrics", "ttft,e2el"]
    line += ["--metric-percentiles", "50,99", "--temperature", "0", "--save-result"]
    line += ["--result-dir", str(folder), "--result-filename", "bench.json"]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"vllm bench serve failed: {done.stderr.strip().splitlines()[-1:]}")
    result = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    return {
        "requests": prompts,
        "failed": prompts - result["completed"],
        "requests_per_s": result["request_throughput"],
        "tokens_per_s": result["output_throughput"],
        **{f"{ours}_p{p}_ms": result[f"p{p}_{name}_ms"] for ours, name in NAMES.items() for p in (50, 99)},
    }


NAMES = {"ttft": "ttft", "e2e": "e2el"}
