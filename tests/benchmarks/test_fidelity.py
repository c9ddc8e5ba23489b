"""The fidelity benchmark: its last line, its errors by hand, and clear refusals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "fidelity"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real runs are not on this machine")


@pytest.fixture
def fidelity(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fidelity

    return fidelity


def run(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "fidelity.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_missing_folder_ends_with_one_line_and_code_2(tmp_path):
    result = run(tmp_path / "nowhere")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "nowhere" in result.stderr


def test_a_folder_without_requests_is_named(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 2
    assert "requests.parquet" in result.stderr


def test_metrics_and_errors_by_hand(fidelity):
    arrived, first, last = np.array([0.0, 1.0]), np.array([2.0, 2.0]), np.array([6.0, 2.0])
    measured = fidelity.metrics(arrived, first, last, np.array([5, 1]))
    assert measured["TTFT"].tolist() == [2.0, 1.0]
    assert measured["TPOT"].tolist() == [1.0]  # a single token has no TPOT
    assert measured["E2E"].tolist() == [6.0, 1.0]
    modelled = {name: 1.1 * values for name, values in measured.items()}
    assert fidelity.errors(modelled, measured)["E2E"] == {"mean": 10.0, "p99": 10.0}


def test_generated_blocks_get_ids_of_their_own(fidelity, tmp_path):
    columns = {
        "queued_s": [3.0, 4.0],
        "prompt_tokens": [40, 20],
        "output_tokens": [30, 20],
        "prefix_hash_ids": [[7, 8], [7]],
    }
    work = fidelity.workload_of(tmp_path, columns)
    assert work.prefix_offsets.tolist() == [0, 4, 6]
    assert work.prefix_ids.tolist() == [7, 8, 9, 10, 7, 11]
    assert work.arrived_at_s.tolist() == [0.0, 1.0]


@needs_shared
def test_real_runs_are_met_within_both_goals():
    result = run()
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout.splitlines()[-1])
    assert (line["name"], line["unit"], line["goal"]) == ("fidelity", "%", 3.0)
    assert set(line["detail"]["runs"]) == {"rtx4090_llama8b", "rtxpro6000_llama8b"}
    assert line["value"] <= 3
    assert line["detail"]["largest_percent"]["TTFT"] <= 5
    assert line["detail"]["runs"]["rtx4090_llama8b"]["preemptions"] > 0
