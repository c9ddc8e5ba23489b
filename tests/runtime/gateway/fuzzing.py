"""Messages that no Envoy sends: random, mutated and out of order, for a picker that must outlive them."""

from __future__ import annotations

import asyncio
import json
import random
import time

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from tests.runtime.gateway.engines import EVENT
from tests.runtime.gateway.envoys import MODES, header_message, request_messages

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
PATIENCE_S = 30.0
_BODIES = (
    json.dumps({"prompt": "hello " * 20, "stream": True, "max_tokens": 8}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "hi"}], "priority": 3}).encode(),
    b'{"prompt": [1, 2, 3], "usage": {"completion_tokens": 4}}',
    b"[" * 3000,
    b"\xff" * 100,
    b"",
)


class Fuzzer:
    """A seeded source of streams of messages, each a list of bytes."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def stream(self) -> list[bytes]:
        """The messages of one stream."""
        messages = [message.SerializeToString() for message in self._likely()]
        draw = self._random.random()
        if draw < 0.2:
            self._random.shuffle(messages)
        elif draw < 0.4:
            messages += messages
        return [self._mutated(m) if self._random.random() < 0.15 else m for m in messages]

    def _likely(self) -> list[pb.ProcessingRequest]:
        pick = self._random
        body = pick.choice(_BODIES)
        subset = pick.choice((None, None, [], ["127.0.0.1:1"], ["\x00", "x" * 1000]))
        messages = request_messages(
            body, pick.choice(MODES), subset, x_session_id=str(pick.random()), x_slo_ttft_ms="nan"
        )
        status = pick.choice(("200", "500", "", "9" * 400, "²"))
        load = pick.choice(("JSON {}", "TEXT a=b", "JSON " + "[" * 2000))
        ends = pick.random() < 0.2
        head = header_message("response_headers", ends, _status=status, endpoint_load_metrics=load)
        pieces = [pb.ProcessingRequest(response_body={"body": EVENT * 3}) for _ in range(pick.randrange(4))]
        trailers = [pb.ProcessingRequest(response_trailers={}), pb.ProcessingRequest(request_trailers={})]
        return [*messages, head, *pieces, *trailers][: pick.randrange(1, 12)]

    def _mutated(self, data: bytes) -> bytes:
        pick = self._random
        kind = pick.randrange(5)
        if kind == 0 or not data:
            return pick.randbytes(pick.randrange(200))
        at = pick.randrange(len(data))
        if kind == 1:
            return data[:at]
        if kind == 2:
            return data[:at] + pick.randbytes(pick.randrange(1, 9)) + data[at:]
        if kind == 3:
            return data[:at] + data[at + pick.randrange(1, 9) :]
        return data[:at] + bytes([data[at] ^ (1 << pick.randrange(8))]) + data[at + 1 :]


async def send(channel: grpc.aio.Channel, messages: list[bytes]) -> tuple[int, float]:
    """Play a stream of raw messages; how many answers came, and the longest wait for the stream's end."""
    method = channel.stream_stream(METHOD, lambda data: data, pb.ProcessingResponse.FromString)
    call, begin, answers = method(iter_async(messages)), time.monotonic(), 0
    try:
        async with asyncio.timeout(PATIENCE_S):
            async for _ in call:
                answers += 1
    except grpc.aio.AioRpcError:  # bytes that are no message end their own stream
        pass
    return answers, time.monotonic() - begin


async def iter_async(messages: list[bytes]):
    """The messages, one by one."""
    for message in messages:
        yield message
