"""The latency predictor's protocol: answers as llm-d's own server gives, refusals that name the field."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import urllib.request
from datetime import datetime

import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.cli import main
from servegym.commands.predictor import Command
from servegym.envs.costs import load_profile
from servegym.runtime import llmd
from servegym.runtime.latency import LatencyModel, Situation

MODEL = LatencyModel(load_profile("a100-llama-3.1-8b"))
# As in the tests of llm-d's server, with the fields of newer versions in the second.
ROWS = [
    {
        "kv_cache_percentage": 0.5,
        "input_token_length": 200,
        "num_request_waiting": 4,
        "num_request_running": 1,
        "num_tokens_generated": 4,
        "prefix_cache_score": 0.7,
    },
    {
        "kv_cache_percentage": 0.3,
        "input_token_length": 150,
        "num_request_waiting": 2,
        "num_request_running": 1,
        "num_tokens_generated": 5,
        "prefix_cache_score": 0.5,
        "pod_type": "decode",
        "prefill_tokens_in_flight": 4000,
        "decode_tokens_in_flight": 70,
    },
]


def ask(path, body=None, *, raw=None):
    """Status and JSON of one request to a server of its own."""

    async def session():
        async with TestClient(TestServer(llmd.make_app(MODEL))) as client:
            if body is None and raw is None:
                response = await client.get(path)
            else:
                response = await client.post(path, data=json.dumps(body) if raw is None else raw)
            return response.status, await response.json()

    return asyncio.run(session())


def test_bulk_strict_answers_each_request_in_order():
    status, answer = ask("/predict/bulk/strict", {"requests": ROWS})
    assert status == 200
    assert (answer["total_requests"], answer["successful_predictions"], answer["failed_predictions"]) == (
        2,
        2,
        0,
    )
    assert answer["processing_time_ms"] >= 0
    expected = [
        MODEL.predict(Situation(0.5, 1, 4, 0, 200, 0.7)),
        MODEL.predict(Situation(0.3, 1, 2, 4000, 150, 0.5)),
    ]
    for got, latency in zip(answer["predictions"], expected, strict=True):
        assert got["ttft_ms"] == pytest.approx(1e3 * latency.ttft_s)
        assert got["tpot_ms"] == pytest.approx(1e3 * latency.tpot_s)
        assert datetime.fromisoformat(got["predicted_at"]).tzinfo is not None
        assert datetime.fromisoformat(got["last_model_load"]) <= datetime.fromisoformat(got["predicted_at"])
        assert (got["model_type"], got["objective_type"], got["quantile"]) == (
            "servegym_profile",
            "mean",
            0.5,
        )


def test_single_and_bulk_say_the_same():
    _, bulk = ask("/predict/bulk", {"requests": ROWS})
    assert bulk["errors"] == []
    for row, expected in zip(ROWS, bulk["predictions"], strict=True):
        status, single = ask("/predict", row)
        assert status == 200
        assert (single["ttft_ms"], single["tpot_ms"]) == (expected["ttft_ms"], expected["tpot_ms"])


def test_health_and_status():
    assert ask("/healthz")[0] == 200
    assert ask("/readyz")[1]["status"] == "ready"
    status = ask("/status")[1]
    assert status["is_ready"] is True
    assert all(status["models_exist"].values())
    assert status["profile"] == "a100-llama-3.1-8b"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_cache_percentage", 1.01),
        ("kv_cache_percentage", -0.1),
        ("kv_cache_percentage", "0.5"),
        ("kv_cache_percentage", None),
        ("prefix_cache_score", float("nan")),
        ("input_token_length", 1.5),
        ("input_token_length", -1),
        ("input_token_length", True),
        ("num_request_running", 2**31),
        ("num_request_waiting", float("inf")),
        ("prefill_tokens_in_flight", -1),
        ("pod_type", "router"),
        ("pod_type", 3),
    ],
)
def test_bad_fields_are_named(field, value):
    status, answer = ask("/predict/bulk/strict", {"requests": [ROWS[0], {**ROWS[1], field: value}]})
    assert status == 422
    assert answer["detail"][0]["loc"] == ["body", "requests", 1, field]


@pytest.mark.parametrize("field", llmd.SHARES + llmd.COUNTS)
def test_missing_fields_are_named(field):
    row = {name: value for name, value in ROWS[0].items() if name != field}
    status, answer = ask("/predict", row)
    assert status == 422
    assert answer["detail"] == [{"loc": ["body", field], "msg": "is missing"}]


@pytest.mark.parametrize("body", [[], 3, None, {}, {"requests": []}, {"requests": {}}, {"requests": [7]}])
def test_bodies_of_another_shape(body):
    assert ask("/predict/bulk/strict", raw=json.dumps(body))[0] == 422


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_bodies_that_are_not_json(raw):
    assert ask("/predict/bulk/strict", raw=raw)[0] == 400


def test_limits_of_size():
    rows = {"requests": ROWS[:1] * (llmd.MOST_REQUESTS + 1)}
    assert ask("/predict/bulk/strict", rows)[0] == 422
    assert ask("/predict/bulk/strict", raw=b" " * (llmd.MOST_BYTES + 1))[0] == 413


def test_other_paths_and_methods_answer_in_json():
    assert ask("/metrics")[0] == 404
    assert ask("/predict/bulk/strict")[0] == 405


def test_a_body_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(llmd, "BODY_S", 0.1)

    async def session():
        async with TestServer(llmd.make_app(MODEL)) as server:
            reader, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            line = await asyncio.wait_for(reader.readline(), 5)
            writer.close()
            return line

    assert b"408" in asyncio.run(session())


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ROWS[1], "x"]), inner),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_json_is_read_or_refused(body):
    for read, value in ((llmd.read_situation, body), (llmd.read_bulk, {"requests": [body]})):
        try:
            read(value)
        except llmd.BodyError as error:
            assert error.status == 422


def test_flags_that_differ_from_the_profile():
    profile = Command(
        "a100-llama-3.1-8b", kv_blocks=100, block_tokens=32, max_seqs=8, token_budget=64
    ).engine()
    assert (profile.kv_tokens, profile.max_seqs, profile.token_budget) == (3200, 8, 64)


@pytest.mark.parametrize(
    "flags",
    [
        ["nothing"],
        ["a100-llama-3.1-8b", "--port", "70000"],
        ["a100-llama-3.1-8b", "--kv-blocks", "0"],
        ["a100-llama-3.1-8b", "--token-budget", "4"],
        ["a100-llama-3.1-8b", "--mean-output-tokens", "nan"],
        ["a100-llama-3.1-8b", "--host", "203.0.113.1"],
    ],
)
def test_command_refuses_bad_flags_in_one_line(flags, capsys):
    assert main(["predictor", *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_command_serves_on_loopback_until_interrupted():
    line = [sys.executable, "-m", "servegym.cli", "predictor", "h100-llama-3.1-8b", "--port", "0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert url is not None
        body = json.dumps({"requests": ROWS}).encode()
        with urllib.request.urlopen(f"{url[0]}/predict/bulk/strict", body, timeout=10) as answer:
            assert json.load(answer)["total_requests"] == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_server_needs_neither_torch_nor_numba_nor_gymnasium():
    code = "import sys; sys.modules.update(dict.fromkeys(('torch', 'numba', 'gymnasium')))"
    code += "; import servegym.runtime.llmd"
    subprocess.run([sys.executable, "-c", code], check=True)
