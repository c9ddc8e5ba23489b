"""What a real vLLM says of itself, as the picker reads it: `make test-vllm`."""

import asyncio
import json

import aiohttp
import pytest

from servegym.envs.cluster.spec import InstanceSpec
from servegym.runtime.gateway.books import Books
from servegym.runtime.gateway.kv_events import KVEvents
from servegym.runtime.gateway.lengths import Lengths
from servegym.runtime.gateway.prefixes import token_ids
from servegym.runtime.gateway.readings import ORCA_REQUEST, ORCA_RESPONSE, parse_load, parse_metrics
from servegym.runtime.gateway.settings import parse_endpoint
from servegym.runtime.gateway.telemetry import Telemetry
from servegym.runtime.vllm.launch import NAME, EngineSettings, launch
from tests.runtime.gateway.running import free_port

pytestmark = pytest.mark.vllm

BLOCKS, BLOCK_TOKENS = 24, 128


def test_metrics_load_reports_and_kv_events():
    events_at = f"tcp://127.0.0.1:{free_port()}"
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": events_at,
        "topic": "kv@ME@tiny",
    }
    arguments = ("--kv-events-config", json.dumps(config), "--enable-prefix-caching")
    with launch(EngineSettings(kv_blocks=BLOCKS, arguments=arguments)) as (engine,):
        asyncio.run(asyncio.wait_for(read(engine.url, events_at), 120))


async def read(url: str, events_at: str) -> None:
    books = Books([parse_endpoint(url)], [InstanceSpec("a100-llama-3.1-8b")], Lengths())
    (engine,) = books.engines
    books.by_address["ME"] = engine  # its port was not known when its topic was
    events = KVEvents(books, Telemetry(), events_at)
    task = asyncio.create_task(events.run())
    async with aiohttp.ClientSession() as session:
        for first in range(10):  # what vLLM published before it had connected is lost
            prompt = [100 + first + k % 200 for k in range(3 * BLOCK_TOKENS + 5)]
            body = {"model": NAME, "prompt": prompt, "max_tokens": 4, "temperature": 0}
            headers = {ORCA_REQUEST: "JSON"}
            async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
                assert (await answer.json())["usage"]["prompt_tokens"] == len(prompt)
                load = parse_load(answer.headers[ORCA_RESPONSE])
            await asyncio.sleep(0.5)
            if len(engine.index):
                break
        assert engine.index.leading(token_ids(prompt, BLOCK_TOKENS)) == 3
        async with session.get(f"{url}/metrics") as answer:
            reading = parse_metrics(await answer.text())
    assert load.waiting == 0.0
    assert load.kv_usage is not None
    assert (reading.running, reading.waiting, reading.preemptions) == (0.0, 0.0, 0.0)
    assert (reading.blocks, reading.block_tokens) == (BLOCKS, BLOCK_TOKENS)
    assert 0.0 <= reading.kv_usage <= 1.0
    task.cancel()
