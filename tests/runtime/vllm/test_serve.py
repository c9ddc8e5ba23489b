"""The command `servegym migrator`, as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys

import aiohttp
import pytest

from servegym.cli import BAD_INPUT, main
from servegym.runtime.vllm import serve
from servegym.runtime.vllm.launch import free_ports
from servegym.runtime.vllm.leg import EngineLostError, open_leg
from servegym.runtime.vllm.pulse import Pulse
from servegym.runtime.vllm.serve import open_session
from tests.runtime.vllm.fake_engine import FakeEngine, answer, engines


def test_it_serves_until_a_signal():
    async def case() -> None:
        async with engines(FakeEngine(), FakeEngine()) as some, aiohttp.ClientSession() as http:
            (port,) = free_ports(1)
            line = ["migrator", "llumnix", "--engines", *(engine.url for engine in some), "--port", str(port)]
            process = await asyncio.create_subprocess_exec(sys.executable, "-m", "servegym.cli", *line)
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                try:
                    assert (await http.get(f"{url}/health")).status == 200
                    break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.1)
            body = {"prompt": [5, 6], "max_tokens": 30, "ignore_eos": True, "return_token_ids": True}
            async with http.post(f"{url}/v1/completions", json=body) as response:
                assert (await response.json())["choices"][0]["token_ids"] == answer([5, 6], 30)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0

    asyncio.run(asyncio.wait_for(case(), 120))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (["round_robin", "--engines"], "engines = []"),
        (["round_robin", "--engines", "ftp://127.0.0.1:1"], "http://127.0.0.1:8101"),
        (["round_robin", "--engines", "http://127.0.0.1:1", "http://127.0.0.1:1"], "twice"),
        (["round_robin", "--engines", "http://127.0.0.1:1", "--stall-s", "0"], "stall_s = 0.0"),
        (["no_such_rule", "--engines", "http://127.0.0.1:1"], "no_such_rule"),
        (["victim_last", "--engines", "http://127.0.0.1:1"], "dispatch or migrate is needed"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(line, named, capsys):
    assert main(["migrator", *line]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error


def test_a_request_does_not_take_a_connection_that_the_server_is_about_to_drop(monkeypatch):
    """vLLM closes idle connections after 5 s; a completion that crosses that is not sent again."""
    monkeypatch.setattr(serve, "KEEP_ALIVE_S", 0.05)

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: "))
        await reader.readexactly(size)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await reader.read(1)  # the next request on this connection, or its end
        writer.close()

    async def case() -> None:
        server = await asyncio.start_server(once, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, open_session(5.0) as session:
            for _ in range(2):
                leg = await open_leg(session, f"http://127.0.0.1:{port}", {"prompt": "x"}, {}, Pulse(5.0))
                with pytest.raises(EngineLostError, match="ended early"):
                    await leg.read()  # to the end, so that the connection is kept
                await asyncio.sleep(0.2)

    asyncio.run(asyncio.wait_for(case(), 20))
