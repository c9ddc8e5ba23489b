"""servegym calibrate and validate from end to end on a tiny model, and every bad input in one line."""

import json
from dataclasses import replace

import pytest
import torch

from servegym.cli import main
from servegym.commands.calibrate import Command, blocks_that_fit
from servegym.envs.costs import load_profile
from servegym.files import command_line
from servegym.runtime.calibrate.shapes import Limits
from servegym.runtime.engine.config import load_config

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 8192,
}
LIMITS = ("--token-budget", "64", "--max-seqs", "4", "--max-context", "128", "--kv-blocks", "64")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def calibrated(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "tiny-cpu"
    quick = ("--size", "4", "--rounds", "2", "--neighbours", "2")
    assert main(["calibrate", "-m", str(config), *LIMITS, *quick, "-o", str(folder)]) == 0
    return folder


def refused(capsys, *arguments):
    """The one line of a command that must fail."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1, captured
    return captured


def test_the_folder_holds_a_profile_with_provenance_and_all_parts(calibrated):
    profile = load_profile(calibrated / "profile.json")
    assert (profile.name, profile.kv_blocks, profile.token_budget, profile.max_seqs) == (
        "tiny-cpu",
        64,
        64,
        4,
    )
    assert (profile.model.layers, profile.model.bytes_per_value) == (2, 4)
    origin = profile.provenance
    assert {"decode", "prefill", "mixed", "swap", "network"} <= set(origin.held_out)
    assert all(error.shapes > 0 for error in origin.held_out.values())
    assert origin.held_out["swap"].shapes == 7  # every other of 1 ... 64 blocks, in groups of 1 and of 16
    assert "torch" in origin.software
    assert command_line() in origin.notes
    assert any("same time: 2" in note for note in origin.notes)
    assert profile.swap and profile.network and profile.start
    assert profile.overhead_us >= 0  # a difference of measured times
    assert json.loads((calibrated / "config.json").read_text()) == TINY


def test_the_longest_request_has_no_more_tokens_than_the_model_has_positions(capsys, tmp_path):
    path, config = tmp_path / "config.json", load_config("cpu-llama")
    path.write_text(json.dumps({**TINY, "max_position_embeddings": 512}))
    short = replace(config, positions=512)
    assert Command(model=str(path))._limits(short, 1).max_context == 512
    assert Command(model=str(path))._limits(config, 1).max_context == 1024
    message = refused(capsys, "calibrate", "-m", str(path), "--max-context", "513")
    assert "max_context = 513" in message and "512 positions" in message


def test_a_pool_leaves_room_for_what_cuda_graphs_keep():
    config, limits = load_config("llama-3.1-8b"), Limits(2048, 256, 8192, 512, 16)
    fits = {n: blocks_that_fit(80 << 30, config, 2, replace(limits, max_seqs=n)) for n in (256, 1024)}
    block = 2 * 32 * 8 * 128 * 2 * 16
    kept = {n: n * (131_072 // 16 * 8 + 2 * 128_256 * 2) for n in fits}
    for n, blocks in fits.items():
        assert 0 <= 0.8 * (80 << 30) - kept[n] - blocks * block < block


def test_a_figure_that_cannot_be_measured_costs_no_profile(config, tmp_path, monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("servegym.runtime.calibrate.figures.memory_bandwidth", short)
    quick = ("--size", "1", "--rounds", "1", "-o", str(tmp_path / "out"))
    assert main(["calibrate", "-m", str(config), *LIMITS, *quick]) == 0
    notes = load_profile(tmp_path / "out" / "profile.json").provenance.notes
    (note,) = (note for note in notes if note.startswith("not measured"))
    assert "out of memory" in note and note in (tmp_path / "out" / "report.md").read_text()


def test_measurements_hold_every_sample_and_the_report_every_figure(calibrated):
    found = json.loads((calibrated / "measurements.json").read_text())
    assert {row["held_out"] for row in found["iterations"]} == {True, False}
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in found["iterations"])
    assert {"swap out, 1 a call", "swap in, 16 a call", "to another instance"} <= set(found["copies"])
    report = (calibrated / "report.md").read_text()
    for part in ("share of the memory bandwidth", "did not see", "swap out, 1 a call", *found["figures"]):
        assert part in report
    for plot in calibrated.glob("*.png"):
        assert f"({plot.name})" in report


def test_validate_plays_the_trace_in_both_worlds(calibrated, tmp_path, capsys):
    fleet = f"2x{calibrated}/profile.json"
    arguments = ("--requests", "20", "--length-scale", "0.05", "--policies", "round_robin", "random")
    code = main(["validate", "--cluster", fleet, "--trace", "fixed:400-200", *arguments, "-f", str(tmp_path)])
    assert code == 0
    out = capsys.readouterr().out
    assert "measured | predicted" in out and "Kendall" in out
    found = json.loads((tmp_path / "validation.json").read_text())
    assert [p["policy"] for p in found["policies"]] == ["round_robin", "random"]
    for policy in found["policies"]:
        assert len(policy["metrics"]["ttft_p50_s"]["measured"]) == 2
        assert policy["metrics"]["ttft_p50_s"]["predicted"] > 0
        assert policy["metrics"]["unfinished"]["measured"] == [0.0, 0.0]
    assert found["requests"] == 20


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--device", "tpu"), "device"),
        (("--device", "cuda"), "CUDA"),
        (("-m", "gpt-7"), "gpt-7"),
        (("--rounds", "0"), "rounds"),
        (("--neighbours", "0"), "neighbours"),
        (("--seed", "-1"), "seed"),
        (("--max-context", "8"), "max_context"),
        (("--kv-blocks", "2"), "kv_blocks"),
        (("--token-budget", "4", "--max-seqs", "4"), "token_budget"),
        (("--dtype", "int3"), "dtype"),
    ],
)
def test_calibrate_refuses_in_one_line(capsys, tmp_path, arguments, named):
    if arguments == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert named in refused(capsys, "calibrate", "-o", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


def test_a_broken_config_is_named(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY, "hidden_size": -1}))
    assert "hidden_size" in refused(capsys, "calibrate", "-m", str(path), "-o", str(tmp_path / "out"))


def test_an_output_that_cannot_be_written_is_refused_before_the_work(capsys, config, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(capsys, "calibrate", "-m", str(config), "-o", str(tmp_path / "file" / "out"))
    assert "file" in message


def test_a_profile_of_another_model_is_refused(capsys, calibrated, tmp_path):
    for name in ("profile.json", "config.json"):
        (tmp_path / name).write_text((calibrated / name).read_text())
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 3}))
    message = refused(capsys, "validate", "--cluster", str(tmp_path / "profile.json"))
    assert "layers" in message and "another model" in message


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--runtime", "abacus"), "runtime"),
        (("--device", "tpu"), "device"),
        (("--cluster", "1xa100-llama-3.1-8b+1xa10-llama-7b"), "one model"),
        (("--policies", "oracle_of_delphi"), "oracle_of_delphi"),
        (("--trace", "nowhere.csv"), "nowhere.csv"),
        (("--requests", "0"), "requests"),
        (("--load", "-1"), "load"),
        (("--length-scale", "0"), "factor"),
        (("--repeats", "0"), "repeats"),
        (("nowhere",), "nowhere"),
    ],
)
def test_validate_refuses_in_one_line(capsys, calibrated, arguments, named):
    profile = f"{calibrated}/profile.json"
    assert named in refused(capsys, "validate", "--cluster", profile, *arguments)


def test_a_profile_without_a_config_is_refused(capsys):
    message = refused(capsys, "validate", "--cluster", "h100-llama-3.1-8b")
    assert "config.json" in message and "servegym calibrate" in message
