"""An OpenAI-compatible engine that behaves, or misbehaves, as a test wants; also a program, to be killed.

Streams `max_tokens` events, or answers at once with a usage; serves vLLM's metrics and its health check.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass, field

EVENT = b'data: {"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" tok"}]}\n\n'
METRICS = """# HELP vllm:num_requests_running Requests
vllm:num_requests_running{{engine="0",model_name="tiny"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="tiny"}} {waiting}
vllm:kv_cache_usage_perc{{engine="0",model_name="tiny"}} {usage}
vllm:num_preemptions_total{{engine="0",model_name="tiny"}} {preemptions}
vllm:cache_config_info{{_block_size_resolved="True",block_size="16",mamba_block_size="8",\
num_gpu_blocks="{blocks}",num_gpu_blocks_override="9"}} 1.0
"""


@dataclass
class FakeEngine:
    """Settings may change while it runs.

    Attributes:
        first_s, gap_s: time to the first token and between tokens.
        die_after: tokens after which it drops the connection; -1: never.
        hang: accepts and says nothing. status: of generations. metrics: text in place of the usual.
        orca: value of the load header. bodies, headers: of generations asked for. served: those it began.
        answered: complete answers.
    """

    first_s: float = 0.01
    gap_s: float = 0.002
    die_after: int = -1
    hang: bool = False
    status: int = 200
    health: int = 200
    metrics: str | None = None
    orca: str | None = None
    waiting: float = 0
    usage: float = 0.0
    preemptions: float = 0
    blocks: int = 4000
    port: int = 0
    served: list[dict] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    answered: int = 0
    running: int = 0

    async def start(self) -> FakeEngine:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 24)
        self.port = self._server.sockets[0].getsockname()[1]
        self._writers: set[asyncio.StreamWriter] = set()
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """As a process that is killed: the port is closed, and connections are reset."""
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = [
                    part.split(":")[1] for part in head.lower().split("\r\n") if "content-length:" in part
                ]
                body = await reader.readexactly(int(length[0])) if length else b""
                await self._answer(writer, head, body)
        self._writers.discard(writer)
        writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, head: str, body: bytes) -> None:
        if self.hang:
            await asyncio.sleep(3600)
        path = head.split(" ", 2)[1]
        if path == "/metrics":
            text = self.metrics if self.metrics is not None else METRICS.format(**vars(self))
            self._plain(writer, 200, text.encode())
        elif path == "/health":
            self._plain(writer, self.health, b"")
        elif path == "/v1/models":
            self._plain(writer, 200, b'{"data": []}')
        else:
            self.headers.append(head)
            self.bodies.append(body)
            await self._generate(writer, body)
        await writer.drain()

    def _plain(self, writer: asyncio.StreamWriter, status: int, body: bytes, extra: str = "") -> None:
        kind = "content-type: application/json"
        head = f"HTTP/1.1 {status} X\r\n{kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
        writer.write(head.encode() + body)

    async def _generate(self, writer: asyncio.StreamWriter, body: bytes) -> None:
        extra = f"endpoint-load-metrics: {self.orca}\r\n" if self.orca else ""
        if self.status != 200:
            self._plain(writer, self.status, b'{"error": "no"}')
            return
        ask = json.loads(body)
        self.served.append(ask)
        tokens = ask.get("max_tokens", 16)
        self.running += 1
        try:
            if ask.get("stream"):
                await self._stream(writer, tokens, extra)
            else:
                await asyncio.sleep(self.first_s + self.gap_s * (tokens - 1))
                if self.die_after >= 0:
                    writer.transport.abort()
                    return
                usage = {"prompt_tokens": len(str(ask.get("prompt", ""))) // 2, "completion_tokens": tokens}
                self._plain(writer, 200, json.dumps({"port": self.port, "usage": usage}).encode(), extra)
            self.answered += 1
        finally:
            self.running -= 1

    async def _stream(self, writer: asyncio.StreamWriter, tokens: int, extra: str) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            + extra.encode() + b"\r\n"
        )  # fmt: skip
        await writer.drain()
        await asyncio.sleep(self.first_s)
        for k in range(tokens):
            if k == self.die_after:
                writer.transport.abort()
                raise OSError
            writer.write(b"%x\r\n%s\r\n" % (len(EVENT), EVENT))
            await writer.drain()
            await asyncio.sleep(self.gap_s)
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def _main(first_s: float, gap_s: float, ports: list[int]) -> None:
    for port in ports:
        await FakeEngine(port=port, first_s=first_s, gap_s=gap_s).start()
    print("ready", flush=True)
    await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(_main(float(sys.argv[1]), float(sys.argv[2]), [int(port) for port in sys.argv[3:]]))
