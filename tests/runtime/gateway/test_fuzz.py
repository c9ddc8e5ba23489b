"""`python benchmarks/fuzz_gateway.py` sends 10,000 messages and watches the memory, too."""

import asyncio

import grpc

from tests.runtime.gateway.engines import FakeEngine
from tests.runtime.gateway.fuzzing import Fuzzer, send
from tests.runtime.gateway.running import running
from tests.runtime.gateway.test_gateway import STREAM, TOKENS, books_are_empty


def test_a_picker_outlives_messages_that_no_envoy_sends():
    async def test():
        async with running(FakeEngine(), FakeEngine()) as (gateway, envoy):
            fuzzer, answers, messages = Fuzzer(7), 0, 0
            async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.settings.picker_port}") as channel:
                for _ in range(150):
                    stream = fuzzer.stream()
                    messages += len(stream)
                    answers += (await send(channel, stream))[0]
            assert messages > 500
            assert answers > messages / 4  # much of it can be understood
            assert books_are_empty(gateway)
            assert (await envoy.post(STREAM)).body == TOKENS

    asyncio.run(asyncio.wait_for(test(), 120))


def test_a_message_beyond_the_limit_ends_its_own_stream():
    async def test():
        async with running(FakeEngine(), max_body_mib=1) as (gateway, envoy):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.settings.picker_port}") as channel:
                assert (await send(channel, [b"\0" * (3 << 20)]))[0] == 0
            assert (await envoy.post(STREAM)).body == TOKENS

    asyncio.run(asyncio.wait_for(test(), 60))
