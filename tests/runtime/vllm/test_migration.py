"""Requests moved between two real vLLM servers, by re-prefill and by NIXL: the tokens of one server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from servegym.runtime.decider import Decider
from servegym.runtime.vllm.launch import NAME, Engine, EngineSettings, free_ports, launch
from servegym.runtime.vllm.migrator import Migrator
from servegym.runtime.vllm.relay import Relay
from servegym.runtime.vllm.serve import Settings, make_migrator, open_session
from tests.runtime.vllm.test_migrator import Restless

pytestmark = pytest.mark.vllm
# num_threads 0 leaves NIXL its progress thread: without it a read waits until the other engine has work.
CONNECTOR = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    "kv_buffer_device": "cpu",
    "kv_connector_extra_config": {"num_threads": 0},
}
REQUESTS, OUTPUT = 12, 160


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Engine]]:
    each = [
        EngineSettings(
            arguments=("--kv-transfer-config", json.dumps(CONNECTOR)),
            environment={
                "UCX_TLS": "tcp,sm,self",  # reads by shared memory: by TCP the other engine must take part
                "UCX_NET_DEVICES": "lo",
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port),
            },
        )
        for port in free_ports(2)
    ]
    with launch(each) as engines:
        yield engines


@pytest.fixture(scope="module")
def expected(servers) -> list[tuple[str, list[int]]]:
    """The answers of the first server alone."""

    async def ask() -> list[tuple[str, list[int]]]:
        async with aiohttp.ClientSession() as http:
            return [await alone(http, servers[0].url, k) for k in range(REQUESTS)]

    return asyncio.run(ask())


def asked(k: int) -> dict[str, Any]:
    prompt = [(11 * k + 5 * j) % 1000 + 1 for j in range(20 + 17 * k)]
    return {
        "model": NAME, "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip


async def alone(http: aiohttp.ClientSession, url: str, k: int) -> tuple[str, list[int]]:
    async with http.post(f"{url}/v1/completions", json=asked(k)) as response:
        (choice,) = (await response.json())["choices"]
        return choice["text"], choice["token_ids"]


@asynccontextmanager
async def migrating(servers: list[Engine], **flags: Any):
    settings = Settings(
        engines=tuple(server.url for server in servers),
        max_seqs=16,
        token_budget=2048,
        stale_s=30.0,  # two servers on two cores may take seconds to answer a scrape
        **flags,
    )
    decider = Decider(Restless(), budget_s=1.0)
    async with open_session(60.0) as session:
        migrator = await make_migrator(session, settings, decider)
        watching = asyncio.create_task(migrator.watch())
        yield migrator
        watching.cancel()


async def answer(migrator: Migrator, k: int) -> tuple[str, list[int]]:
    relay = migrator.admit(read(k))
    assert migrator.place(relay, set())
    return await collect(migrator, relay)


def read(k: int):
    from servegym.runtime.vllm.completion import read_completion

    return read_completion(json.dumps({**asked(k), "stream": True}).encode())


async def collect(migrator: Migrator, relay: Relay) -> tuple[str, list[int]]:
    text, ids = "", []
    try:
        async for piece in relay.pieces():
            text, ids = text + piece.text, ids + piece.token_ids
    finally:
        migrator.finish(relay)
    return text, ids


@pytest.mark.parametrize(("handoff", "least"), [("none", 100), ("nixl", 30)])
def test_moved_at_random_the_tokens_stay(servers, expected, handoff, least):
    async def case() -> None:
        async with migrating(servers, handoff=handoff, period_s=0.02) as migrator:
            for _ in range(12):
                found = await asyncio.gather(*(answer(migrator, k) for k in range(REQUESTS)))
                assert [ids for _, ids in found] == [ids for _, ids in expected]
                assert [text for text, _ in found] == [text for text, _ in expected]
                if migrator.tally.counts["migrated"] > least:
                    break
            counts, pauses = migrator.tally.counts, sorted(migrator.tally.pauses)
            assert counts["migrated"] > least, counts
            assert not counts["lost"] and not counts["handoff_failed"], counts
            assert (counts["handed_off"] > 0) == (handoff == "nixl")
            shown = ", ".join(f"P{q} {1e3 * pauses[len(pauses) * q // 100]:.0f} ms" for q in (50, 90))
            print(f"\n{handoff}: {counts['migrated']} moves, pause {shown}")

    asyncio.run(asyncio.wait_for(case(), 600))


def test_kv_really_comes_from_the_other_server(servers):
    """A prompt of several blocks, which the target has never seen, is not prefilled there."""
    unseen = 30

    async def case() -> None:
        async with migrating(servers, handoff="nixl", period_s=0) as migrator:
            before = await external_tokens(migrator, 1)
            expected = await alone(migrator.session, servers[0].url, unseen)
            relay = migrator.admit(read(unseen))
            migrator.view.dispatched(relay.request, 0)
            taken: list[int] = []
            async for piece in relay.pieces():
                taken += piece.token_ids
                if len(taken) >= 40:
                    relay.move(1)
            migrator.finish(relay)
            assert taken == expected[1]
            assert await external_tokens(migrator, 1) - before >= 512

    asyncio.run(asyncio.wait_for(case(), 120))


async def external_tokens(migrator: Migrator, i: int) -> float:
    async with migrator.session.get(f"{migrator.urls[i]}/metrics") as response:
        lines = (await response.text()).splitlines()
    name = "vllm:external_prefix_cache_hits_total"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_a_server_that_is_killed_takes_no_answer_with_it(servers, expected):
    async def case() -> None:
        async with migrating(servers, period_s=0) as migrator:
            tasks = [asyncio.create_task(answer(migrator, k)) for k in range(REQUESTS)]
            while sum(relay.request.streamed_tokens for relay in migrator.relays.values()) < 200:
                await asyncio.sleep(0.01)
            servers[1].kill()
            assert await asyncio.gather(*tasks) == expected
            assert migrator.tally.counts["recovered"] > 0

    asyncio.run(asyncio.wait_for(case(), 120))
