"""The command `servegym migrator`, as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys

import aiohttp
import pytest

from servegym.cli import BAD_INPUT, main
from servegym.runtime.vllm.launch import free_ports
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
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(line, named, capsys):
    assert main(["migrator", *line]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error
