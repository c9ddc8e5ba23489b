"""From a searched rule to a network that learned it, by the command line."""

import json

import pytest
from safetensors.numpy import load_file

from servegym.agents.evolved import read_rule
from servegym.cli import main
from servegym.files import command_line

FLEET = "1xa100-llama-3.1-8b+1xl40s-llama-3.1-8b"


def evolve(folder, *arguments):
    return [
        *("evolve", "--scenario", "mixed", "--cluster", FLEET, "--requests", "40", "--generations", "2"),
        *("--population", "4", "--episodes", "1", "-f", str(folder / "rules"), *arguments),
    ]


def test_evolved_rules_teach_networks_that_others_start_from(train_command, tmp_path, capsys, refused):
    assert main(evolve(tmp_path, "--system", "lmetric+budget_tpot", "--params", "factor", "1.5")) == 0
    assert "mixed, generation 1: goodput" in capsys.readouterr().out
    rule = read_rule(tmp_path / "rules" / "mixed.json")
    assert (rule.system, rule.params) == ("lmetric+budget_tpot", {"factor": 1.5})
    assert rule.weights.any() and rule.facts["command"] == command_line()

    teach = ("--imitate", str(tmp_path / "rules"), "--imitate-updates", "2", "-n", "0")
    assert main(train_command(tmp_path / "a", *teach)) == 0
    assert "the same answer to" in capsys.readouterr().out
    first = tmp_path / "a" / "runs" / "Dispatch-v0" / "ppo-mixed-s0"

    small = ("--cluster", "3xa100-llama-3.1-8b", "--start", str(first), "--ppo.learning-rate", "0")
    assert main(train_command(tmp_path / "b", *teach, *small, "--most-instances", "2", "--seed", "1")) == 0
    second = tmp_path / "b" / "runs" / "Dispatch-v0" / "ppo-mixed-s1"
    before, after = (load_file(folder / "policy.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    for name in before.keys() - {"value_out.weight", "value_out.bias"}:  # the value head follows its scale
        assert (before[name] == after[name]).all(), name
    assert json.loads((second / "metrics.json").read_text())["settings"]["start"] == str(first)

    line = refused(*train_command(tmp_path / "c", "--start", str(first), "--network.hidden", "16"))
    assert "network" in line
    assert "every fleet" in refused(*train_command(tmp_path / "c", "--most-instances", "1"))
    assert "chat.json" in refused(*train_command(tmp_path / "c", *teach, "--scenario", "chat"))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--generations", "-1"], "generations = -1"),
        (["--population", "6"], "multiple of 4"),
        (["--episodes", "0"], "episodes = 0"),
        (["--system", "nobody"], "see `servegym heuristics`"),
        (["--params", "factor", "2"], "its parameters are"),
        (["-f", __file__], "is a file"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(arguments, told, tmp_path, refused):
    assert told in refused(*evolve(tmp_path, *arguments))
    assert not (tmp_path / "rules").exists()
