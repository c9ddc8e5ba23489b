"""A served engine is measured from outside: what was asked for ran there, and its times are found."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from servegym.cli import main
from servegym.envs.costs import load_profile
from servegym.errors import InputError
from servegym.runtime.calibrate import streams
from servegym.runtime.calibrate.fit import predict
from servegym.runtime.calibrate.served import check, look, served_design
from servegym.runtime.calibrate.shapes import Limits, Shape
from servegym.runtime.calibrate.streams import (
    SLACK,
    WINDOW,
    StreamBench,
    _count,
    open_session,
    prompt_lengths,
)
from servegym.runtime.engine import config as config_room
from servegym.runtime.vllm.launch import EngineSettings, launch
from servegym.runtime.vllm.leg import EngineLostError
from tests.runtime.calibrate.batching_engine import BatchingEngine

LIMITS = Limits(token_budget=64, max_seqs=4, max_context=192, kv_blocks=128, block_tokens=16)


def seconds(shape):
    """4 ms an iteration, 0.5 ms a token, and what attention reads."""
    read = sum(shape.contexts) + sum(new * (past + new / 2) / 8 for new, past in shape.chunks)
    return 4e-3 + 5e-4 * shape.tokens + 1e-5 * read


@contextmanager
def serving(engine):
    """The engine in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    call(engine.start())
    try:
        yield engine
    finally:
        call(engine.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextmanager
def bench(engine, limits=LIMITS):
    with serving(engine), StreamBench(engine.url, "steady", limits, 1000) as found:
        yield found


@pytest.mark.parametrize("witnesses", [streams.WITNESSES, 2])
@pytest.mark.parametrize("contexts", [(64,), (150, 20, 90), (32, 32, 32, 32), (190, 190, 190, 190)])
def test_decodes_have_the_contexts_that_are_said(monkeypatch, contexts, witnesses):
    monkeypatch.setattr(streams, "WITNESSES", witnesses)
    engine, shape = BatchingEngine(seconds), Shape(contexts)
    with bench(engine) as engines:
        took, said = engines.run(shape), engines.as_run(shape)
    window = [s.contexts for s in engine.ran if len(s.contexts) == len(contexts) and not s.chunks][-WINDOW:]
    assert np.allclose(np.mean(window, axis=0), said.contexts, atol=4)
    assert np.allclose(said.contexts, contexts, atol=6)
    assert seconds(shape) < took < 1.5 * seconds(shape)


def test_requests_that_are_not_streamed_decode_before_the_window_begins(monkeypatch):
    monkeypatch.setattr(streams, "WITNESSES", 2)
    engine, shape = BatchingEngine(seconds, late_s=0.1), Shape((32, 32, 32, 32))
    with bench(engine) as engines:
        took = engines.run(shape)
    assert sum(len(s.contexts) == 4 for s in engine.ran) >= WINDOW
    assert took > seconds(shape)


def test_requests_that_do_not_begin_are_said(monkeypatch):
    monkeypatch.setattr(streams, "WITNESSES", 2)
    monkeypatch.setattr(streams, "SETTLE_S", 0.2)
    late = BatchingEngine(seconds, late_s=60.0)
    with bench(late) as engines, pytest.raises(InputError, match="2 requests do not begin"):
        engines.run(Shape((32, 32, 32, 32)))


@pytest.mark.parametrize("chunk", [(40, 0), (8, 0), (60, 128), (17, 16)])
@pytest.mark.parametrize("contexts", [(32,), (60, 100, 40)])
def test_a_chunk_is_computed_whole_beside_the_decodes(contexts, chunk):
    engine, shape = BatchingEngine(seconds), Shape(contexts, (chunk,))
    with bench(engine) as engines:
        took, said = engines.run(shape), engines.as_run(shape)
    (beside,) = [s for s in engine.ran if s.chunks == (chunk,) and len(s.contexts) == len(contexts)]
    assert np.allclose(beside.contexts, said.contexts, atol=4)
    assert np.allclose(beside.contexts, contexts, atol=12)
    assert abs(took - seconds(shape)) < abs(took - seconds(Shape(contexts)))


def test_tokens_that_come_several_at_once_are_counted():
    engine, shape = BatchingEngine(seconds, interval=3), Shape((60, 100))
    with bench(engine) as engines:
        assert seconds(shape) < engines.run(shape) < 1.5 * seconds(shape)
        with pytest.raises(InputError, match="--stream-interval 1"):
            engines.run(Shape((60,), ((30, 0),)))


def test_a_client_that_cannot_keep_up_says_so(monkeypatch):
    def slowly(event):
        until = time.thread_time() + 5e-3
        while time.thread_time() < until:
            pass
        return _count(event)

    with bench(BatchingEngine(seconds)) as engines:
        engines.run(Shape((32, 32)))
        assert 0 < engines.busiest < 0.95
        monkeypatch.setattr(streams, "_count", slowly)
        with pytest.raises(InputError, match=r"of the time.*more CPU"):
            engines.run(Shape((32, 32, 32, 32)))


def test_a_request_that_fails_once_is_tried_again():
    engine = BatchingEngine(seconds, fails_after=5, failures=1)
    with bench(engine) as engines:
        assert engines.run(Shape((32, 32))) > 0
    assert engine.failures == 0


def test_the_same_tokens_are_new_in_another_run():
    engine = BatchingEngine(seconds)
    with serving(engine):
        for _ in range(2):
            with StreamBench(engine.url, "steady", LIMITS, 1000, seed=3) as found:
                found.run(Shape((64,)))
    assert engine.hits == 0


def test_prompts_leave_room_for_what_is_decoded_before_all_are_through():
    assert prompt_lengths((100, 100), 100) == [93, 95]  # beside the first the second has room for 99
    assert prompt_lengths((100, 200), 100) == [92, 195]  # and then for 99 and for two
    assert prompt_lengths((3,), 100) == [1]


def test_shapes_are_those_that_a_client_can_bring_about():
    found = served_design(LIMITS, size=10, seed=0)
    every = (*found.fitted, *found.held_out)
    assert all(len(s.chunks) <= 1 and s.contexts for s in every)
    assert all(past % 16 == 0 for s in every for _, past in s.chunks)
    assert all(LIMITS.fits(s) for s in every)
    tight = served_design(replace(LIMITS, kv_blocks=24), size=10, seed=0)
    grown = [[c + SLACK for c in s.contexts] + [n + p for n, p in s.chunks] for s in tight.fitted]
    assert max(sum(-(-t // 16) for t in one) for one in grown) <= 24
    assert len(tight.fitted) < len(found.fitted)
    assert not set(found.fitted) & set(found.held_out)
    assert {s.kind for s in found.held_out} == {"decode", "mixed"}


def test_others_who_use_the_engine_are_noticed(monkeypatch):
    monkeypatch.setattr("servegym.runtime.calibrate.streams.SETTLE_S", 0.1)
    engine = BatchingEngine(seconds)
    with bench(engine) as engines, StreamBench(engine.url, "steady", LIMITS, 1000) as others:
        hold = threading.Event()
        task = threading.Thread(target=lambda: others._runner.run(decode_until(others, hold)))
        task.start()
        while not engine.running:
            time.sleep(0.01)
        try:
            with pytest.raises(InputError, match="others use the engine"):
                engines.run(Shape((32,)))
        finally:
            hold.set()
            task.join()


async def decode_until(user, hold):
    from servegym.runtime.calibrate.streams import _Stream

    stream = asyncio.create_task(user._follow(_Stream([1] * 4), 240))
    while not hold.is_set():
        await asyncio.sleep(0.01)
    stream.cancel()


def test_an_engine_that_dies_is_named():
    engine = BatchingEngine(seconds, fails_after=5)
    with bench(engine) as engines, pytest.raises(InputError, match="must go on serving"):
        engines.run(Shape((32, 32)))


def test_what_an_engine_says_of_itself():
    with serving(BatchingEngine(seconds)) as engine:
        served = asyncio.run(look(engine.url))
    assert (served.model, served.max_tokens, served.kv_blocks, served.block_tokens) == (
        "steady", 256, 128, 16,
    )  # fmt: skip
    assert served.software == "vLLM 0.0"


@pytest.mark.parametrize(
    ("engine", "named"),
    [
        (BatchingEngine(seconds, caching=False), "--enable-prefix-caching"),
        (BatchingEngine(seconds, blocks=0), "cache_config_info"),
        (BatchingEngine(seconds, labels=('engine="0"', 'engine="1"')), "--data-parallel-size"),
        (BatchingEngine(seconds, page="vllm:spec_decode_num_drafts_total{} 0.0\n"), "speculative"),
        (BatchingEngine(seconds, refuses=401), "OPENAI_API_KEY"),
    ],
)
def test_engines_that_cannot_be_measured_are_refused(engine, named):
    with serving(engine), pytest.raises(InputError, match=named):
        asyncio.run(look(engine.url))


@pytest.fixture
def config(write_config):
    return write_config() / "config.json"


def command(url, config, folder, *more):
    limits = ("--token-budget", "64", "--max-seqs", "4", "--max-context", "96")
    quick = ("--size", "2", "--rounds", "1", "--device", "a clock", "-o", str(folder))
    return main(["calibrate", "engine", url, "-m", str(config), *limits, *quick, *more])


def test_the_profile_knows_the_engine(config, tmp_path):
    folder = tmp_path / "engine"
    with serving(BatchingEngine(seconds)) as engine:
        assert command(engine.url, config, folder) == 0
    profile = load_profile(folder / "profile.json")
    assert (profile.device.name, profile.kv_blocks, profile.max_seqs) == ("a clock", 128, 4)
    shapes = [Shape((90,) * n) for n in (1, 2, 4)] + [
        Shape((64,), ((n, past),)) for n in (20, 60) for past in (0, 64)
    ]
    error = predict(profile, shapes) / [seconds(shape) for shape in shapes] - 1
    assert abs(np.median(error)) < 0.25  # each message takes its time, too
    assert set(profile.provenance.held_out) == {"decode", "mixed"}
    report = (folder / "report.md").read_text()
    assert "front end" in report and "## Copies" not in report
    assert json.loads((folder / "config.json").read_text()) == json.loads(config.read_text())


@pytest.mark.parametrize(
    ("budget", "engine", "not_checked"),
    [
        (64, {}, []),
        (100, {"max_model_len": 128}, ["token_budget by 198 tokens"]),
        (64, {"blocks": 9}, ["max_seqs; 8 KV blocks"]),
        (200, {"max_model_len": 128, "blocks": 9}, ["max_seqs", "by 199 tokens", "by 398 tokens"]),
    ],
)
def test_limits_that_an_engine_cannot_be_asked_for_are_said(budget, engine, not_checked):
    with serving(BatchingEngine(seconds, token_budget=budget, **engine)) as one:
        served = asyncio.run(look(one.url))
        limits = replace(LIMITS, token_budget=budget, max_context=64, kv_blocks=served.kv_blocks)
        with StreamBench(one.url, "steady", limits, 1000) as found:
            notes = check(found, served, limits)
    assert len(notes) == len(not_checked)
    assert all(part in note for part, note in zip(not_checked, notes, strict=True))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--max-context", "250"), "max_context"),
        (("--dtype", "int3"), "dtype"),
        (("--rounds", "0"), "rounds"),
        (("--max-seqs", "64"), "token_budget"),
        (("--max-seqs", "3"), "max_seqs = 3: the engine runs 4"),
        (("--max-seqs", "5"), "max_seqs = 5: the engine runs 4"),
        (("--token-budget", "40"), "token_budget = 40: it computes 78 tokens in 1"),
        (("--token-budget", "80"), "token_budget = 80: it computes 158 tokens in 3"),
        (("--tensor-parallel", "0"), "tensor_parallel"),
    ],
)
def test_bad_flags_are_refused_in_one_line(capsys, config, tmp_path, arguments, named):
    with serving(BatchingEngine(seconds)) as engine:
        assert command(engine.url, config, tmp_path / "out", *arguments) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1 and named in captured
    assert not (tmp_path / "out").exists()


def test_an_engine_that_dies_before_or_behind_the_shapes_is_said_in_one_line():
    engine = BatchingEngine(seconds, fails_after=0)
    with bench(engine) as engines:
        for ask in (engines.most_at_once, engines.first_token, lambda: engines.iterations(60)):
            with pytest.raises(InputError, match="must go on serving"):
                ask()


def test_events_without_usage_are_refused():
    with pytest.raises(EngineLostError, match="no usage"):
        _count(b'{"choices": [], "usage": null}')
    assert _count(b'{"usage": {"completion_tokens": 7}}') == 7


def test_a_key_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "abc")

    async def header():
        async with open_session() as session:
            return session.headers["Authorization"]

    assert asyncio.run(header()) == "Bearer abc"


def test_a_request_that_is_refused_is_said():
    engine = BatchingEngine(seconds)
    with bench(engine) as engines:
        engine.refuses = 400
        with pytest.raises(InputError, match="HTTP 400"):
            engines.run(Shape((32,)))


def test_nobody_there_is_said_in_one_line(capsys, config, tmp_path):
    assert command("http://127.0.0.1:9", config, tmp_path / "out") == 2
    assert "vLLM server that is up" in capsys.readouterr().err


@pytest.mark.vllm
def test_a_real_server(tmp_path):
    model = Path(config_room.__file__).parent / "configs" / "cpu-llama.json"
    (tmp_path / "config.json").write_text(model.read_text())
    arguments = ("--load-format", "dummy", "--skip-tokenizer-init", "--max-num-batched-tokens", "64")
    settings = EngineSettings(max_seqs=4, max_model_len=256, model=tmp_path, arguments=arguments)
    folder = tmp_path / "engine"
    with launch(settings) as (server,):
        assert command(server.url, tmp_path / "config.json", folder, "--dtype", "float32") == 0
    profile = load_profile(folder / "profile.json")
    assert (profile.kv_blocks, profile.block_tokens) == (63, 128)
    few, many = predict(profile, [Shape((32,), ((4, 0),)), Shape((32,), ((60, 0),))])
    assert 0 < few < many
    assert {"decode", "mixed"} == set(profile.provenance.held_out)
