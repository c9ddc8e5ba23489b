import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from servegym.agents.heuristics import heuristic_names, make_heuristic
from servegym.agents.task import Task
from servegym.cli import main
from servegym.commands.evaluate import Command
from servegym.envs.metrics import METRICS
from servegym.envs.scenario import Scenario
from servegym.evaluation import Row, Setting, Table, compare, episodes_of, load_of
from servegym.files import WIDTH
from servegym.report import render
from servegym.runtime.bundle import load_bundle
from servegym.training import card

FLEET = "1xa100-llama-3.1-8b+1xl40s-llama-3.1-8b"
SCENARIO = Scenario(clusters=(FLEET,), requests=60)


@pytest.fixture(scope="module")
def table() -> Table:
    names = ("round_robin", "default", "least_request", "least_work_oracle")
    policies = [make_heuristic(name) for name in names]
    return compare(policies[1:], policies[:1], SCENARIO, [Setting(FLEET, 0.9)], seeds=3)[0]


def row(table: Table, name: str) -> Row:
    return next(r for r in table.rows if r.policy == name)


def test_policies_meet_the_same_requests(table):
    # the environment's default is least request: equal, sample by sample, only on equal requests
    default, least = row(table, "default"), row(table, "least_request")
    for metric in METRICS:
        np.testing.assert_array_equal(default.samples[metric.name], least.samples[metric.name])
    assert default.against(least, "goodput").half_width == 0
    assert len(np.unique(default.samples["ttft_mean_s"])) == 3  # but every seed has its own


def test_rows_are_ranked_and_marked(table):
    goodput = [r.interval("goodput").mean for r in table.rows]
    assert goodput == sorted(goodput, reverse=True)
    assert row(table, "round_robin").learned
    assert row(table, "least_work_oracle").oracle
    assert table.best_heuristic.policy in ("default", "least_request")


def test_seeds_and_threads_change_nothing_else():
    setting = Setting(FLEET, 0.9)
    two, three = (episodes_of(SCENARIO, setting, n, 0) for n in (2, 3))
    for a, b in zip(two, three, strict=False):
        np.testing.assert_array_equal(a.workload.arrived_at_s, b.workload.arrived_at_s)
        np.testing.assert_array_equal(a.predicted_output, b.predicted_output)
    policy = make_heuristic("power_of_two")
    one, many = (compare([policy], [], SCENARIO, [setting], seeds=2, num_threads=n)[0] for n in (1, 2))
    np.testing.assert_array_equal(one.rows[0].samples["e2e_mean_s"], many.rows[0].samples["e2e_mean_s"])


def test_absolute_rates_are_offered():
    scenario = replace(SCENARIO, requests=400, workload="fixed:1024-256")  # Poisson: no bursts in the mean
    load = load_of(scenario, FLEET, 5.0)
    assert load_of(scenario, FLEET, 10.0) == pytest.approx(2 * load)
    rates = [e.workload.rate_rps for e in episodes_of(scenario, Setting(FLEET, load), 4, 0)]
    assert np.mean(rates) == pytest.approx(5.0, rel=0.15)


@pytest.mark.parametrize("factor", [0.3, 1, 30, 1000])
def test_tables_fit_and_show_everything(table, factor):
    def larger(found: Row) -> Row:
        samples = {k: v * (factor if k.endswith("_s") else 1) for k, v in found.samples.items()}
        return replace(found, policy=f"{found.policy}-with-a-name"[:20], samples=samples)

    wide = replace(table, rows=tuple(map(larger, table.rows)))
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    console.print(render(wide, WIDTH))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text
    assert " ".join(text.split()).count("in results.json") == 1
    assert text.count("±") >= 8 * len(table.rows)
    for header in ("goodput", "TTFT", "TPOT", "E2E", "P50", "P99", "hits", "open"):
        assert header in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_narrow_terminals_show_whole_names_and_fewer_columns(table, width):
    name = "least_work_predicted+llumnix+victim_cost_aware+budget_tpot"
    narrow = replace(table, rows=(replace(table.rows[0], policy=name), *table.rows[1:]))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(narrow, width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    starts = [line.split()[0] for line in text.splitlines() if line.strip()]
    place = starts.index("least_work_predicted+")
    parts = "".join(starts[place : place + 4]).rstrip("*†")
    assert parts == name
    for header in ("goodput", "Δ best", "TTFT", "TPOT", "P99"):
        assert header in text
    assert "hits" not in text.split("Δ:")[0]


def test_one_seed_has_no_interval(table, tmp_path):
    alone = replace(
        table,
        rows=tuple(replace(r, samples={k: v[:1] for k, v in r.samples.items()}) for r in table.rows),
    )
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    console.print(render(alone, WIDTH))
    lines = [line for line in console.export_text().splitlines() if line.startswith("round_robin")]
    assert len(lines) == 1
    assert "±" not in lines[0]
    assert "nan" not in lines[0]
    facts = dict.fromkeys(("command", "revision", "seed", "decision_us", "instances"), "")
    text = card("x", {**facts, "decisions": 1, "parameters": 1}, Task(), [SCENARIO], [alone])
    assert "nan" not in text


def test_evaluate_command(trained, bundle, tmp_path, capsys):
    arguments = ["-i", str(trained), "-i", str(bundle), "--policies", "least_request", "mooncake"]
    size = ["--cluster", FLEET, "--loads", "0.5", "1.0", "--seeds", "2", "--requests", "40"]
    assert main(["evaluate", *arguments, *size, "--workload", "azure2023_conv", "-f", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "embedded generator" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [t["load"] for t in results["tables"]] == [0.5, 1.0]
    for found in results["tables"]:
        rows = {r["policy"]: r["metrics"] for r in found["policies"]}
        assert set(rows) == {"ppo-mixed-s0", "least_request", "mooncake"}
        learned = [r["metrics"] for r in found["policies"] if r["learned"]]
        assert learned[0] == learned[1]  # torch and ONNX Runtime play alike
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_a_recorded_trace_is_played_and_hashed(tmp_path, capsys):
    lines = [f"2023-11-16 18:00:{k // 2:02}.{k % 2 * 5},{100 + k},{10 + k % 7}" for k in range(100)]
    trace = tmp_path / "azure.csv"
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    size = ["--cluster", FLEET, "--rates", "8", "--seeds", "2", "--requests", "40", "--policies", "random"]
    assert main(["evaluate", *size, "--workload", str(trace), "-f", str(tmp_path / "out")]) == 0
    assert "recorded trace" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["scenarios"][0]["traces"][str(trace)]) == 64


def test_priorities_and_weights_of_classes_act(tmp_path, capsys):
    """Half the requests are urgent and weigh ten times as much; a file says which."""
    n = 400
    urgent = np.arange(n) % 2 == 0
    columns = {
        "arrived_at_s": np.arange(n) / 10,
        "prompt_tokens": np.full(n, 1500),
        "output_tokens": np.full(n, 100),
        "class": np.where(urgent, "urgent", "patient"),
        "priority": np.where(urgent, -1, 0),
    }
    pq.write_table(pa.table(columns), tmp_path / "trace.parquet")
    goodput = {}
    for queue in ("fcfs", "priority"):
        for weight in (1, 10):
            scenario = tmp_path / f"{queue}-{weight}.toml"
            scenario.write_text(
                f"workload = '{tmp_path / 'trace.parquet'}'\nclusters = ['{FLEET}']\n"
                f"engine = {{ queue = '{queue}', max_seqs = 8 }}\nslo = {{ ttft_s = 3.0 }}\n"
                f"class_slo = {{ urgent = {{ ttft_s = 3.0, weight = {weight} }} }}\n"
            )
            out = tmp_path / f"out-{queue}-{weight}"
            size = ["--loads", "1.5", "--seeds", "2", "--policies", "least_request"]
            assert main(["evaluate", "--scenario", str(scenario), *size, "-f", str(out)]) == 0
            (found,) = json.loads((out / "results.json").read_text())["tables"]
            assert found["requests"] == 200
            goodput[queue, weight] = found["policies"][0]["metrics"]["goodput"]["mean"]
    assert "seeds of 200 requests" in capsys.readouterr().out
    assert goodput["priority", 1] > goodput["fcfs", 1]
    assert goodput["priority", 10] > goodput["priority", 1] + 0.1


def test_only_the_default_workload_gives_way_to_its_recording(tmp_path, monkeypatch):
    for name in ("azure2023_conv", "azure2023_code"):
        (tmp_path / f"{name}.parquet").touch()
    monkeypatch.setattr("servegym.commands.evaluate.RECORDED", tmp_path / "azure2023_conv.parquet")
    scenario = tmp_path / "code.toml"
    scenario.write_text("workload = 'azure2023_code'")
    played = {
        "default": Command()._scenarios()[0].workload,
        "flag": Command(workload="azure2023_conv")._scenarios()[0].workload,
        "other": Command(scenario=(str(scenario),))._scenarios()[0].workload,
    }
    assert played == {
        "default": str(tmp_path / "azure2023_conv.parquet"),
        "flag": "azure2023_conv",
        "other": "azure2023_code",
    }


def test_tuning_plays_other_episodes_and_the_comparison_what_was_tuned(tmp_path, capsys, monkeypatch):
    lines = [f"2023-11-16 18:00:{k // 2:02}.{k % 2 * 5},{100 + k},{10 + k % 7}" for k in range(100)]
    trace = tmp_path / "azure.csv"
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    drawn, tried = [], []

    def spy(scenario, setting, seeds, seed):
        drawn.append((scenario.workload, setting.load, seeds, seed))
        return episodes_of(scenario, setting, seeds, seed)

    def watched(name, score, seed):
        score(make_heuristic(name))
        tried.append(name)
        return {"waiting_weight": 16.0}

    monkeypatch.setattr("servegym.commands.evaluate.episodes_of", spy)
    monkeypatch.setattr("servegym.commands.evaluate.tune", watched)
    size = ["--cluster", FLEET, "--loads", "0.9", "1.2", "0.3", "--seeds", "2", "--requests", "40"]
    names = ["--policies", "vllm_dp", "least_request"]
    command = ["evaluate", "--tune", *size, *names, "--workload", str(trace), "-f", str(tmp_path / "out")]
    assert main(command) == 0
    assert [(workload, load, seeds) for workload, load, seeds, _ in drawn] == [("azure2023_conv", 1.2, 2)]
    assert drawn[0][3] != 0
    assert tried == ["vllm_dp"]
    assert "vllm_dp (waiting_weight=16.0)" in " ".join(capsys.readouterr().out.split())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    chosen = {FLEET: {"vllm_dp": {"waiting_weight": 16.0}}}
    assert results["scenarios"][0]["tuning"] == {"workload": "azure2023_conv", "parameters": chosen}


def test_tuned_parameters_are_the_ones_that_are_played(tmp_path, monkeypatch):
    monkeypatch.setattr("servegym.commands.evaluate.tune", lambda *_: {"waiting_weight": 0.0})
    size = ["--cluster", FLEET, "--loads", "1.2", "--seeds", "2", "--requests", "60"]
    names = ["--policies", "vllm_dp", "--workload", "azure2023_conv"]

    def played(*flags):
        assert main(["evaluate", *flags, *size, *names, "-f", str(tmp_path)]) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        return results["tables"][0]["policies"][0]["metrics"]["e2e_mean_s"]["samples"]

    scenario = replace(SCENARIO, workload="azure2023_conv", name="mixed", scrape_s=0.2)
    rule = make_heuristic("vllm_dp", waiting_weight=0.0)
    row = compare([rule], [], scenario, [Setting(FLEET, 1.2)], seeds=2)[0].rows[0]
    assert played("--tune") == pytest.approx(row.samples["e2e_mean_s"].tolist(), rel=1e-5)
    assert played() != played("--tune")


def test_heuristics_say_that_they_are_untuned(tmp_path, capsys, refused):
    size = ["--cluster", FLEET, "--loads", "0.9", "--seeds", "1", "--requests", "20", "--policies", "dynamo"]
    assert main(["evaluate", *size, "--workload", "azure2023_conv", "-f", str(tmp_path)]) == 0
    assert "published parameters, untuned" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["scenarios"][0]["tuning"] is None
    trace = tmp_path / "azure.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0,100,10\n")
    (tmp_path / "mine.toml").write_text(f"workload = '{trace}'")
    assert "no generator to tune on" in refused(
        "evaluate", "--tune", *size, "--scenario", str(tmp_path / "mine.toml"), "-f", str(tmp_path)
    )


BAD = {
    "heuristic": (["--policies", "telepathy"], "telepathy"),
    "agent": (["-i", "no/such/folder"], "no/such/folder"),
    "load": (["--loads", "-1"], "loads = -1.0"),
    "rate": (["--rates", "nan"], "rates = nan"),
    "log folder": (["-f", f"{__file__}/below"], "is a file"),
    "seed": (["--seed", "-1"], "seed = -1"),
    "large seed": (["--seed", "2147483648"], "seed = 2147483648"),
    "seeds": (["--seeds", "0"], "seeds = 0"),
    "profile": (["--cluster", "4xtpu"], "tpu"),
    "environment": (["--env", "CartPole-v1"], "CartPole-v1"),
    "two models": (["--cluster", "1xa100-llama-3.1-8b+1xa10-llama-7b"], "Llama-3.1-8B and LLaMA-7B"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_written(case, tmp_path, refused):
    arguments, told = BAD[case]
    assert told in refused(
        "evaluate", "--workload", "azure2023_conv", "-f", str(tmp_path / "out"), *arguments
    )
    assert not (tmp_path / "out").exists()


def test_a_changed_bundle_is_refused(bundle, tmp_path, refused):
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    load_bundle(folder)
    data = bytearray((folder / "policy.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "policy.onnx").write_bytes(bytes(data))
    assert "sha256" in refused("evaluate", "-i", str(folder), "-f", str(tmp_path / "out"))


def test_export_refuses_an_unknown_fallback(trained, tmp_path, refused):
    output = tmp_path / "bundle"
    assert "prayer" in refused("export", "-i", str(trained), "-o", str(output), "--fallback", "prayer")
    assert "seed = -1" in refused("export", "-i", str(trained), "-o", str(output), "--seed", "-1")
    assert not output.exists()


def test_every_heuristic_is_played_by_default(tmp_path, capsys):
    size = ["--cluster", FLEET, "--loads", "1.0", "--seeds", "1", "--requests", "20"]
    assert main(["evaluate", *size, "--workload", "azure2023_conv", "-f", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    played = {r["policy"] for r in results["tables"][0]["policies"]}
    assert played == set(heuristic_names())
