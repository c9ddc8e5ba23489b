import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from servegym.agents.heuristics import heuristic_names
from servegym.cli import COMMANDS, main
from servegym.envs.costs import profile_names
from servegym.envs.scenario import load_scenario, scenario_names
from servegym.envs.workloads import catalogue

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"servegym {command}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "evaluate", "export"])
def test_shims_are_the_console_script(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0
    assert f"servegym {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fly"], "command = 'fly': choose one of train"),
        (["profile", "show", "tpu-v9"], "name = 'tpu-v9'"),
        (["profile", "show", "no/such.json"], "no/such.json"),
        (["data", "no_such_workload"], "no_such_workload"),
        (["data", "no/such.parquet"], "no/such.parquet"),
        (["profile", "build", "no/such", "--output", "x.json"], "'no/such': there is no such folder"),
    ],
)
def test_unknown_names_are_refused_in_one_line(arguments, told, refused):
    assert told in refused(*arguments)


def test_unknown_flags_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", "--no-such-flag"])
    assert stop.value.code == 2


def test_listings(capsys):
    assert main(["data"]) == 0
    assert "BurstGPT" in capsys.readouterr().out
    assert main(["heuristics"]) == 0
    assert "round_robin" in capsys.readouterr().out
    assert main(["profile", "list"]) == 0
    assert "h100-llama-3.1-8b" in capsys.readouterr().out
    assert main(["profile", "show", "h100-llama-3.1-8b"]) == 0
    assert "held-out shapes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "module", "joint", "names"),
    [
        ("heuristics", "heuristics", "+", "+".join(heuristic_names()).split("+")),
        ("profile list", "profile", "", profile_names()),
        ("data", "data", "", [entry.name for entry in catalogue() if entry.kind == "generator"]),
    ],
)
def test_narrow_listings_never_cut_names(command, module, joint, names, monkeypatch, capsys):
    monkeypatch.setattr(f"servegym.commands.{module}.console", lambda: Console(width=80))
    assert main(command.split()) == 0
    words = re.split(rf"[\s│{joint}]+", capsys.readouterr().out)
    assert set(names) <= set(words)


def test_scenarios_are_listed_with_what_they_are(capsys):
    assert main(["scenarios"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in scenario_names():
        scenario = load_scenario(name)
        for fact in (name, scenario.description, scenario.workload, scenario.clusters[0]):
            assert fact in shown, (name, fact)
    assert "swap to 32 GiB" in shown and "migrate every 0.5 s" in shown and "budget every 0.2 s" in shown
    assert "urgent: TTFT 1 s, TPOT 55 ms, weight 5" in shown and "10% urgent" in shown


def test_data_describes_a_workload(capsys):
    assert main(["data", "azure2023_conv", "--requests", "300"]) == 0
    out = capsys.readouterr().out
    assert "300 requests" in out
    assert "prompt tokens" in out


BAD_TRACES = {
    "header.csv": ("a,b,c\n1,2,3\n", "columns"),
    "tokens.csv": ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,-5,10\n", "row 0"),
    "nan.csv": ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,x,10\n", "'x'"),
    "broken.jsonl": ('{"timestamp": 0, "input_length": \n', "broken.jsonl"),
    "broken.parquet": ("not parquet", "broken.parquet"),
    "trace.xlsx": ("", ".xlsx"),
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_malformed_traces_are_refused_with_file_and_place(name, tmp_path, refused):
    content, told = BAD_TRACES[name]
    path = tmp_path / name
    path.write_text(content)
    line = refused("data", str(path))
    assert name in line
    assert told in line


def test_malformed_profiles_are_refused(tmp_path, refused):
    path = tmp_path / "mine.json"
    path.write_text("{")
    assert "mine.json" in refused("profile", "show", str(path))
    path.write_text(json.dumps({"schema": 999}))
    assert "schema = 999" in refused("profile", "show", str(path))


def test_a_refused_profile_build_writes_nothing(tmp_path, refused):
    target = tmp_path / "out.json"
    refused("profile", "build", str(tmp_path), "--system", "h100_sxm", "--output", str(target))
    refused("profile", "build", str(tmp_path), "--system", "abacus", "--output", str(target))
    assert list(tmp_path.iterdir()) == []


def test_failed_requests_of_a_trace_are_refused_or_dropped(tmp_path, refused, capsys):
    trace = tmp_path / "azure.csv"
    lines = [f"2023-11-16 18:00:{k:02}.0,{100 + k},{0 if k == 7 else 5}" for k in range(60)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    assert "output_tokens, row 7" in refused("data", str(trace))
    assert "zero_output = 'keep'" in refused("data", str(trace), "--zero-output", "keep")
    assert main(["data", str(trace), "--zero-output", "drop"]) == 0
    assert "59 requests" in capsys.readouterr().out
    play = ["evaluate", "--workload", str(trace), "--seeds", "1", "--loads", "0.5", "--policies", "random"]
    play += ["--cluster", "1xa100-llama-3.1-8b", "-f", str(tmp_path / "out")]
    assert "output_tokens, row 7" in refused(*play)
    assert "zero_output = 'keep'" in refused(*play, "--zero-output", "keep")
    assert main([*play, "--zero-output", "drop"]) == 0


@pytest.mark.parametrize(("package", "wanted"), [("aiohttp", "'servegym[gateway]'"), ("tyro", "servegym")])
def test_a_missing_package_is_named_in_one_line(package, wanted, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "servegym.commands.predictor", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["predictor", "h100-llama-3.1-8b"]) == 2
    assert capsys.readouterr().err == f"servegym: {package} is missing: pip install {wanted}\n"


def test_the_command_line_itself_needs_nothing_but_python():
    """Where packages are missing it says so, so it cannot need them."""
    script = "import sys; sys.path.insert(0, {!r}); from servegym.cli import main; sys.exit(main(['train']))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script.format(str(ROOT))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.endswith(" is missing: pip install servegym\n")
    assert done.stderr.count("\n") == 1


def test_help_shows_plain_values(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    assert "--workload STR" in shown
    assert "{None}" not in shown
