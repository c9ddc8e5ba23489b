import json

import pytest

from servegym.cli import main

FLEET = "2xa10-llama-7b"


def test_writes_a_trace(tmp_path, capsys):
    path = tmp_path / "deep" / "trace.json"
    arguments = ["timeline", "--scenario", "scarce", "--cluster", FLEET, "--requests", "20", "-o", str(path)]
    assert main([*arguments, "--policy", "round_robin"]) == 0
    assert f"round_robin on {FLEET}, 20 requests: {path}" in capsys.readouterr().out
    events = json.loads(path.read_text())["traceEvents"]
    assert {e["args"]["request"] for e in events if e["ph"] == "X"} == set(range(20))
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["router", "instance 0: a10-llama-7b", "instance 1: a10-llama-7b"]
    again = path.with_name("again.json")
    assert main([*arguments[:-1], str(again), "--policy", "round_robin"]) == 0
    assert again.read_text() == path.read_text(), "the same seed writes the same file"


def test_a_trained_agent_decides_and_no_heuristic_beside_it(tmp_path, bundle, refused):
    path = tmp_path / "trace.json"
    assert "not both" in refused("timeline", "-i", str(bundle), "--policy", "llumnix", "-o", str(path))
    assert not path.exists()
    assert main(["timeline", "-i", str(bundle), "--requests", "10", "-o", str(path)]) == 0
    assert sum(e["ph"] == "i" for e in json.loads(path.read_text())["traceEvents"]) == 10


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--policy", "best"], "name = 'best'"),
        (["--scenario", "nowhere"], "nowhere"),
        (["--requests", "0"], "requests = 0"),
        (["--requests", "1000000"], "requests = 1000000"),
        (["--seed", "-1"], "seed = -1"),
        (["-o", "."], "output = '.'"),
        (["-i", "no/such"], "no/such"),
    ],
)
def test_bad_input_is_refused(arguments, told, refused):
    assert told in refused("timeline", *arguments)
