"""Requests moved at random moments between servers that die, hang and refuse: one exact answer each."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp.test_utils import TestServer

from servegym.agents.policy import Observation
from servegym.errors import InputError
from servegym.runtime.decider import Decider
from servegym.runtime.fleet import InstanceSettings
from servegym.runtime.gateway.readings import Reading
from servegym.runtime.view import InstanceView
from servegym.runtime.vllm.leg import count_partial
from servegym.runtime.vllm.migrator import Migrator
from servegym.runtime.vllm.proxy import make_app
from servegym.runtime.vllm.serve import Settings, make_migrator, open_session
from tests.runtime.vllm.fake_engine import EOS, FakeEngine, answer, engines, text_of


class Restless:
    """Answers by any legal candidate beyond the default, so that requests move all the time."""

    name, kinds, needs_oracle = "restless", ("dispatch", "migrate", "move"), False

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def reset(self, lanes: int, seed: int) -> None: ...

    def act(self, obs: Observation) -> np.ndarray:
        legal = np.flatnonzero(obs["mask"][0])
        return np.array([self._random.choice(legal[1:] if len(legal) > 1 else legal)])


class Client:
    """Talks to the migrator."""

    def __init__(self, url: str, migrator: Migrator, http: aiohttp.ClientSession) -> None:
        self.url, self.migrator, self.http = url, migrator, http

    async def complete(self, **fields: Any) -> tuple[str, list[int], dict]:
        """A streamed answer: text, token ids, last choice."""
        text, ids, last = "", [], {}
        for chunk in await self.events(**fields):
            for choice in chunk.get("choices", ()):
                text, last = text + choice["text"], choice
                ids += choice.get("token_ids") or []
        return text, ids, last

    async def events(self, **fields: Any) -> list[dict]:
        body = {"model": "fake", "stream": True, "return_token_ids": True, "temperature": 0, **fields}
        async with self.http.post(f"{self.url}/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            lines = (await response.read()).split(b"\n\n")
        assert lines[-2:] == [b"data: [DONE]", b""]
        return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-2]]

    async def post(self, body: Any, path: str = "/v1/completions") -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(self.url + path, data=data) as response:
            return response.status, await response.json()

    async def get(self, path: str) -> tuple[int, str]:
        async with self.http.get(self.url + path) as response:
            return response.status, await response.text()


@asynccontextmanager
async def serving(*some: FakeEngine, policy: Any = None, **flags: Any) -> AsyncIterator[Client]:
    async with engines(*some):
        flags = {
            "period_s": 0.02,
            "scrape_s": 0.02,
            "rest_s": 0.2,
            "max_seqs": 8,
            "token_budget": 256,
            **flags,
        }
        settings = Settings(engines=tuple(engine.url for engine in some), **flags)
        settings.check()
        decider = Decider(policy or Restless(), budget_s=0.5)
        async with open_session(settings.stall_s) as session, aiohttp.ClientSession() as http:
            migrator = await make_migrator(session, settings, decider, wait_s=0.1)
            async with TestServer(make_app(migrator), handler_cancellation=True) as server:
                yield Client(str(server.make_url("")).rstrip("/"), migrator, http)


def run(case: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(case(), 120))


@pytest.mark.parametrize(
    ("tokens", "most", "count"),
    [
        ([337, 12], 1, 0),
        ([337, 405], 1, 1),
        ([337, 405, 430], 2, 2),
        ([337, 405, 430], 1, 1),
        ([405], 1, 1),
        ([405, 337, 405], 1, 1),
        ([405, 12, 430], 2, 1),
        ([337, 405, 101], 2, 0),
        ([337, 405, EOS], 2, 2),  # an answer that goes on behind a special token
        ([337, EOS], 1, 0),
        ([337, 405, EOS, 101], 3, 0),
    ],
)
def test_tokens_whose_character_is_not_ended_are_told_by_the_tokenizer(tokens, most, count):
    async def case() -> None:
        async with engines(FakeEngine()) as (engine,), aiohttp.ClientSession() as http:
            assert await count_partial(http, engine.url, tokens, most, {}) == count

    run(case)


def test_a_hundred_moves_leave_answers_as_they_are():
    async def case() -> None:
        some = [FakeEngine(seed=k) for k in range(6)]
        async with serving(*some, period_s=0.005) as client:
            counts = client.migrator.tally.counts
            for _ in range(10):  # on a busy machine fewer moves fit into a round
                asked = [{"prompt": [k, 2, 5], "max_tokens": 200 + k, "ignore_eos": True} for k in range(30)]
                found = await asyncio.gather(*(client.complete(**fields) for fields in asked))
                for fields, (text, ids, last) in zip(asked, found, strict=True):
                    expected = answer(fields["prompt"], fields["max_tokens"])
                    assert ids == expected
                    assert text_of(expected) == text and last["finish_reason"] == "length"
                if counts["migrated"] > 100:
                    break
            assert counts["migrated"] > 100, counts
            assert sum(len(engine.served) for engine in some) > 130
            assert not client.migrator.relays
            for instance in client.migrator.view.instances:
                assert not instance.inflight and not instance.engaged
                assert instance.prompt_tokens == instance.streamed_tokens == instance.prefill_tokens == 0

    run(case)


def test_engines_die_and_come_back_and_nothing_is_lost_or_doubled():
    async def case() -> None:
        some = [FakeEngine(seed=k, delay_s=0.01) for k in range(3)]
        async with serving(*some) as client:
            tasks = [
                asyncio.create_task(client.complete(prompt=f"hello {k}", max_tokens=120, ignore_eos=True))
                for k in range(20)
            ]
            dice = random.Random(0)
            for _ in range(4):
                await asyncio.sleep(0.1)
                victim = dice.choice(some)
                await victim.die()
                await asyncio.sleep(0.1)
                await victim.start()
            for k, task in enumerate(tasks):
                assert (await task)[1] == answer(f"hello {k}", 120)
            counts = client.migrator.tally.counts
            assert counts["lost"] >= 3 and counts["recovered"] >= 3, counts

    run(case)


def test_every_stream_breaks_off_all_the_time():
    async def case() -> None:
        some = FakeEngine(breaks_after=3), FakeEngine(breaks_after=1)
        async with serving(*some, policy="round_robin", rest_s=0.0) as client:
            _, ids, last = await client.complete(prompt="x", max_tokens=50, ignore_eos=True)
            assert ids == answer("x", 50) and last["finish_reason"] == "length"
            assert client.migrator.tally.counts["recovered"] > 5

    run(case)


STALL = {"policy": "round_robin", "stall_s": 0.4, "rest_s": 30.0}
CHAT = {"messages": [{"role": "user", "content": "hey"}]}
WHOLE = [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "x", "seed": 3, "temperature": 1.0})]
whole_answers = pytest.mark.parametrize(("path", "fields"), WHOLE)


@whole_answers
def test_a_whole_answer_may_take_many_times_the_stall(path, fields):
    async def case() -> None:
        some = FakeEngine(delay_s=0.05), FakeEngine(delay_s=0.05)
        async with serving(*some, **STALL) as client:
            status, _ = await client.post({**fields, "max_tokens": 30}, path)
            assert status == 200 and not client.migrator.tally.counts["lost"]
        assert sum(len(engine.bodies) for engine in some) == 1 and some[0].generated + some[1].generated == 30

    run(case)


def test_a_stream_may_wait_in_a_queue_for_many_times_the_stall():
    async def case() -> None:
        async with serving(engine := FakeEngine(max_seqs=1, delay_s=0.05), **STALL) as client:
            first = asyncio.create_task(client.complete(prompt="a", max_tokens=60, ignore_eos=True))
            while not engine.generated:
                await asyncio.sleep(0.01)
            _, ids, _ = await client.complete(prompt="b", max_tokens=5, ignore_eos=True)
            assert first.done() and (await first)[1] == answer("a", 60) and ids == answer("b", 5)
            assert not client.migrator.tally.counts["lost"] and len(engine.served) == 2

    run(case)


@pytest.mark.parametrize("flaws", [{"hangs": True}, {"counts_tokens": False, "delay_s": 1.0}])
def test_an_engine_without_a_word_or_progress_is_left(flaws):
    async def ask(path: str | None, fields: dict) -> None:
        async with serving(FakeEngine(**flaws), FakeEngine(), **STALL) as client:
            if path is None:
                _, ids, _ = await client.complete(**fields)
                assert ids == answer(fields["prompt"], fields["max_tokens"])
            else:
                assert (await client.post(fields, path))[0] == 200
            counts = client.migrator.tally.counts
            assert counts["lost"] == counts["recovered"] == 1, counts

    async def case() -> None:
        stream = {"prompt": "x", "max_tokens": 9, "ignore_eos": True}
        await asyncio.gather(*(ask(*one) for one in [(None, stream), *WHOLE]))

    run(case)


def test_an_answer_goes_on_elsewhere_where_the_core_hangs_in_its_middle():
    async def case() -> None:
        async with serving(FakeEngine(hangs_after=5), FakeEngine(), **STALL) as client:
            _, ids, _ = await client.complete(prompt="x", max_tokens=50, ignore_eos=True)
            assert ids == answer("x", 50)
            counts = client.migrator.tally.counts
            assert counts["lost"] == counts["recovered"] == 1, counts

    run(case)


def test_what_may_not_move_breaks_off_where_the_core_hangs_in_its_middle():
    async def case() -> None:
        async with serving(FakeEngine(hangs_after=5), FakeEngine(), **STALL) as client:
            with pytest.raises(aiohttp.ClientError):
                await client.complete(prompt="x", max_tokens=50, seed=3, temperature=1.0)
            assert client.migrator.tally.counts["lost"] == 1 and not client.migrator.relays

    run(case)


@pytest.mark.parametrize(("told", "seen"), [([0, 3, 5, 5, 1, 2], [0, 3, 2, 0, 0, 1]), ([7, 7, 9], [0, 0, 2])])
def test_preemptions_are_those_since_the_last_look(told, seen):
    instance = InstanceView(InstanceSettings.of("a100-llama-3.1-8b"))
    migrator = Migrator(["http://a"], [instance], Decider("round_robin"), session=None)
    for count, new in zip(told, seen, strict=True):
        migrator.take(0, Reading(running=0, waiting=0, kv_usage=0, preemptions=count))
        assert instance.seen_preemptions == new


def test_kv_is_handed_off_where_the_servers_can():
    async def case() -> None:
        some = FakeEngine(delay_s=0.005), FakeEngine(delay_s=0.005)
        async with serving(*some, handoff="nixl") as client:
            asked = [{"prompt": [k, 3], "max_tokens": 70, "ignore_eos": True} for k in range(8)]
            found = await asyncio.gather(*(client.complete(**fields) for fields in asked))
            assert [ids for _, ids, _ in found] == [answer([k, 3], 70) for k in range(8)]
            counts = client.migrator.tally.counts
            assert counts["handed_off"] > 5 and not counts["handoff_failed"], counts
        kept = some[0].kept | some[1].kept
        readers = [b for engine in some for b in engine.bodies if "remote_request_id" in str(b)]
        assert len(readers) == len(kept) == counts["handed_off"]
        for body in readers:  # each read exactly the KV of its own prompt
            assert kept[body["kv_transfer_params"]["remote_request_id"]] == body["prompt"]

    run(case)


@pytest.mark.parametrize("at", ["do_remote_decode", "do_remote_prefill"])  # who is left, who goes on
def test_kv_that_does_not_come_is_computed_again(at):
    async def case() -> None:
        some = FakeEngine(delay_s=0.005, hangs_at=at), FakeEngine(delay_s=0.005, hangs_at=at)
        async with serving(*some, handoff="nixl", handoff_s=0.1) as client:
            asked = [{"prompt": [k, 3], "max_tokens": 70, "ignore_eos": True} for k in range(8)]
            found = await asyncio.gather(*(client.complete(**fields) for fields in asked))
            assert [ids for _, ids, _ in found] == [answer([k, 3], 70) for k in range(8)]
            counts = client.migrator.tally.counts
            assert min(counts["handoff_failed"], counts["migrated"]) > 2 and not counts["lost"], counts
        assert not any(engine.open for engine in some)  # none is left hanging

    run(case)


def test_whole_answers_usage_and_stop_strings():
    async def case() -> None:
        async with serving(FakeEngine(), FakeEngine()) as client:
            expected = answer("hi", 40)
            status, body = await client.post({"prompt": "hi", "max_tokens": 40, "ignore_eos": True})
            assert status == 200 and body["choices"][0]["text"] == text_of(expected)
            assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 40, "total_tokens": 42}
            assert "token_ids" not in body["choices"][0] and body["model"] == "fake"
            chunks = await client.events(prompt="hi", max_tokens=5, stream_options={"include_usage": True})
            assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 5
            assert chunks[0]["choices"][0]["prompt_token_ids"] == [104, 105]
            assert len({chunk["id"] for chunk in chunks}) == 1
            stop = text_of(expected).split()[20]
            text, _, last = await client.complete(prompt="hi", max_tokens=40, ignore_eos=True, stop=stop)
            assert text == text_of(expected).split(stop)[0] and last["stop_reason"] == stop

    run(case)


def test_an_answer_that_ends_itself():
    async def case() -> None:
        prompt = next([k] for k in range(9999) if EOS in answer([k], 30)[8:])
        async with serving(FakeEngine(), FakeEngine()) as client:
            _, ids, last = await client.complete(prompt=prompt, max_tokens=200)
            assert ids == answer(prompt, 200, ignore_eos=False) and last["finish_reason"] == "stop"

    run(case)


def test_what_may_not_move_goes_through_untouched():
    async def case() -> None:
        some = FakeEngine(refuses=503), FakeEngine()
        async with serving(*some, policy="round_robin") as client:
            for k in range(4):
                _, ids, _ = await client.complete(prompt=[k], max_tokens=20, seed=3, temperature=1.0)
                assert ids == answer([k], 20, ignore_eos=False)
                chat = {"messages": [{"role": "user", "content": f"hey {k}"}]}
                status, body = await client.post(chat, "/v1/chat/completions")
                assert (status, body["said"]) == (200, f"hey {k}")
            assert some[1].bodies[0]["seed"] == 3 and some[1].bodies[1] == {
                "messages": [{"role": "user", "content": "hey 0"}]
            }
            assert all(not x.inflight for x in client.migrator.view.instances)

    run(case)


def test_refusals_reach_the_client():
    async def case() -> None:
        some = FakeEngine(), FakeEngine()
        async with serving(*some) as client:
            assert (await client.post(b"{"))[0] == 400
            assert (await client.post(b"[1]"))[0] == 400
            assert (await client.post({"prompt": "x", "max_tokens": 0}))[0] == 400
            assert (await client.get("/v1/models"))[0] == (await client.get("/health"))[0] == 200
            for engine in some:
                engine.refuses = 429
            status, body = await client.post({"prompt": "x", "stream": True})
            assert status == 429 and body["error"]["message"] == "no"
            for engine in some:
                await engine.die()
            status, body = await client.post({"prompt": "x"})
            assert status == 503 and body["error"]["type"] == "server_error"
            assert (await client.get("/v1/models"))[0] == (await client.get("/health"))[0] == 503
            status, text = await client.get("/metrics")
            assert status == 200 and f'servegym_engine_available{{engine="{some[0].url}"}} 0.0' in text

    run(case)


ODD = [
    None,
    True,
    -1,
    0,
    3,
    1e9,
    0.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    [1, 2],
    [None],
    ["a"],
    {},
    {"a": 1},
]


def test_odd_requests_are_answered():
    async def case() -> None:
        dice = random.Random(0)
        fields = [
            "prompt", "max_tokens", "min_tokens", "stop", "stream", "stream_options", "n", "seed", "model",
            "vllm_xargs", "priority", "logprobs", "return_token_ids", "kv_transfer_params", "temperature",
        ]  # fmt: skip
        async with serving(FakeEngine(), FakeEngine()) as client:
            for _ in range(300):
                body = {
                    "prompt": "x",
                    "max_tokens": 4,
                    **{dice.choice(fields): dice.choice(ODD) for _ in range(3)},
                }
                data = json.dumps(body).encode()
                async with client.http.post(f"{client.url}/v1/completions", data=data) as response:
                    assert response.status in (200, 400), (response.status, body)
                    await response.read()
            assert not client.migrator.relays and not client.migrator.tally.counts["lost"]

    run(case)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(stream):
    async def case() -> None:
        some = FakeEngine(delay_s=0.02), FakeEngine(delay_s=0.02)
        async with serving(*some) as client:
            task = asyncio.create_task(client.post({"prompt": "x", "max_tokens": 900, "stream": stream}))
            while not client.migrator.relays:
                await asyncio.sleep(0.01)
            task.cancel()
            while client.migrator.relays or any(engine.open for engine in some):
                await asyncio.sleep(0.01)
            assert all(not x.inflight for x in client.migrator.view.instances)

    run(case)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"engines": ()}, "engines"),
        ({"engines": ("http://a", "http://b"), "profile": ("x",) * 3}, "profile"),
        ({"engines": ("http://a",), "port": 70000}, "port"),
        ({"engines": ("http://a",), "scrape_s": 0.0}, "scrape_s"),
        ({"engines": ("http://a",), "period_s": float("nan")}, "period_s"),
    ],
)
def test_flags_that_cannot_work(flags, field):
    with pytest.raises(InputError) as error:
        Settings(**flags).check()
    assert error.value.field == field


def test_an_address_without_a_server():
    async def case() -> None:
        async with open_session(1.0) as session:
            settings = Settings(engines=("http://127.0.0.1:9",))
            with pytest.raises(InputError, match="running vLLM server"):
                await make_migrator(session, settings, Decider("round_robin"), wait_s=0.0)

    run(case)
