"""10,000 messages that no Envoy sends, through the real gRPC server of a picker that runs as a program.

Value: messages that crashed the picker, hung it, or left something in its books; memory must stay flat.
Each stream is random, mutated, shuffled or doubled (tests/runtime/gateway/fuzzing.py); between them, and at
the end, ordinary requests must be answered.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from report import report

from tests.runtime.gateway.engines import FakeEngine
from tests.runtime.gateway.envoys import FakeEnvoy
from tests.runtime.gateway.fuzzing import PATIENCE_S, Fuzzer, send
from tests.runtime.gateway.running import free_port

MESSAGES, SEED, CHECK_EVERY = 10_000, 1, 200  # streams between two ordinary requests
WARM = 0.3  # share of the messages before memory is first read
FLAT_MIB = 8.0
ASK = {"prompt": "hello " * 20, "stream": True, "max_tokens": 4}


def main() -> None:
    """Print the counts and one line of JSON."""
    bad, detail = asyncio.run(fuzz())
    report("fuzz_gateway", bad, "crashes, hangs, faults, lost requests", 0, detail)


async def fuzz() -> tuple[int, dict[str, Any]]:
    """All messages, and what the picker says at the end."""
    engines = [await FakeEngine().start() for _ in range(2)]
    picker_port, metrics_port = free_port(), free_port()
    command = [sys.executable, "-m", "servegym.cli", "gateway", "least_request", "--no-envoy"]
    command += ["--picker-port", str(picker_port), "--metrics-port", str(metrics_port)]
    command += ["--budget-ms", "1000", "--engines", *(engine.url for engine in engines)]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    while b'"ready"' not in await process.stderr.readline():
        assert process.returncode is None
    log = asyncio.create_task(process.stderr.read())
    envoy, fuzzer = FakeEnvoy(picker_port), Fuzzer(SEED)
    sent = streams = answers = hung = refused = 0
    slowest, warm = 0.0, 0.0
    begin = time.monotonic()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{picker_port}") as channel:
        while sent < MESSAGES and process.returncode is None:
            stream = fuzzer.stream()
            came, seconds = await send(channel, stream)
            sent, streams, answers = sent + len(stream), streams + 1, answers + came
            slowest, hung = max(slowest, seconds), hung + (seconds >= PATIENCE_S)
            if streams % CHECK_EVERY == 0:
                refused += (await envoy.post(ASK)).status != 200
            warm = warm if warm or sent < WARM * MESSAGES else resident_mib(process.pid)
    refused += (await envoy.post(ASK)).status != 200
    wall_s = time.monotonic() - begin
    grown = resident_mib(process.pid) - warm
    left = await inflight(metrics_port)
    crashed = int(process.returncode is not None)
    await envoy.close()
    process.terminate()
    faults = (await log).count(b'"fault"')
    await process.wait()
    bad = crashed + hung + refused + faults + left + (grown > FLAT_MIB)
    return bad, {
        "messages": sent,
        "streams": streams,
        "answers": answers,
        "crashed": crashed,
        "hung": hung,
        "faults": faults,
        "ordinary requests refused": refused,
        "left in the books": left,
        "slowest stream, s": round(slowest, 3),
        "resident memory after warm-up, MiB": round(warm, 1),
        "grown since, MiB": round(grown, 2),
        "wall, s": round(wall_s, 1),
    }


async def inflight(port: int) -> int:
    """Requests that the picker still believes in flight."""
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return int(sum(float(x.split()[-1]) for x in lines if x.startswith("servegym_engine_inflight{")))


def resident_mib(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    main()
