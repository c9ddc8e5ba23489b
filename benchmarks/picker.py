"""What the endpoint picker costs: CPU time a request, and the time that it puts between client and engine.

    python benchmarks/picker.py [BUNDLE or heuristic]

16 engines that answer at once; a client of this file's own, because it must cost little. The picker decides
with the shipped dispatch policy, exported for this run, unless another is named. Value: CPU microseconds of
the picker's process a request (all of it: gRPC, parsing, books, decision, but for the scrapes, which are
measured idle and taken off), where no stream is watched. Beside it: where all are, chunk by chunk; the time
to first byte at one client, against the engine alone and Envoy alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from report import report
from serving.fronts import Front, cpu_s, picker, stock_envoy

from servegym.cli import main as servegym
from tests.runtime.gateway.running import free_port

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints" / "Dispatch-v0" / "ppo-mixed-s0"
ENGINES, TOKENS, PROMPT_BYTES = 16, 32, 2000
ALONE, TOGETHER, CLIENTS = 300, 2000, 16
IDLE_S, ROUNDS = 3.0, 3
GOAL_US = 1000


@dataclass(frozen=True)
class Address:
    """An engine, as the fronts know it."""

    port: int

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"


def main(policy: str | None) -> None:
    """Measure, print a table and one line of JSON."""
    with tempfile.TemporaryDirectory() as name, engines() as addresses:
        folder = Path(name)
        bundle = policy or export(folder / "bundle")
        fronts: dict[str, AbstractContextManager[Front] | None] = {
            "engine": None,
            "Envoy": stock_envoy("least request", addresses, folder),
            "picker": picker(bundle, addresses, folder, "--watch-per-s", "0"),
            "picker, all streams watched": picker(bundle, addresses, folder, "--watch-per-s", "1e9"),
        }
        found = {}
        for front, context in fronts.items():
            found[front] = measure(context, addresses[0].url)
            print(f"{front:30}" + "  ".join(f"{key} {value}" for key, value in found[front].items()))
    first = {front: figures["first byte p50, ms"] for front, figures in found.items()}
    detail = {
        "policy": policy or "Dispatch-v0/ppo-mixed-s0",
        "engines": ENGINES,
        "tokens an answer": TOKENS,
        "fronts": found,
        "Envoy's hop, ms": round(first["Envoy"] - first["engine"], 3),
        "picker's hop, ms": round(first["picker"] - first["Envoy"], 3),
    }
    report("picker", found["picker"]["picker CPU a request, us"], "us", GOAL_US, detail)


def export(folder: Path) -> str:
    """The shipped policy as a bundle."""
    with contextlib.redirect_stdout(io.StringIO()):
        servegym(["export", "-i", str(CHECKPOINT), "-o", str(folder)])
    return str(folder)


@contextlib.contextmanager
def engines():
    """Engines in a process of their own."""
    ports = [free_port() for _ in range(ENGINES)]
    command = [sys.executable, "-m", "tests.runtime.gateway.engines", "0", "0", *map(str, ports)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield [Address(port) for port in ports]
    finally:
        process.kill()
        process.wait()


def measure(context: AbstractContextManager[Front] | None, engine: str) -> dict[str, float]:
    """Latency at one client, then CPU and throughput at several."""
    if context is None:
        return asyncio.run(latency(engine))
    with context as front:
        figures = asyncio.run(latency(front.url))
        is_picker = bool(front.metrics)
        idle = idle_share(front) if is_picker else 0.0
        rounds = [asyncio.run(load(front, idle)) for _ in range(ROUNDS)]
        figures["requests/s"] = round(float(np.median([rate for rate, _ in rounds])))
        if is_picker:
            figures["picker CPU a request, us"] = round(float(np.median([us for _, us in rounds])))
            counters = front.counters()
            decisions = counters["servegym_decision_seconds_count"]
            figures["pick, us"] = round(counters["servegym_decision_seconds_sum"] / decisions * 1e6)
            answered = counters['servegym_decisions_total{reason="answered"}']
            figures["answered by the policy"] = round(answered / decisions, 4)
    return figures


def idle_share(front: Front) -> float:
    """CPU seconds a second that the picker takes without requests: scrapes."""
    before = front.cpu_s()
    time.sleep(IDLE_S)
    return (front.cpu_s() - before) / IDLE_S


async def latency(url: str) -> dict[str, float]:
    """Time to first byte and to the end of a request alone."""
    client = Client(url)
    await client.run(ALONE // 10, 1)
    client.times.clear()
    await client.run(ALONE, 1)
    first, last = np.array(client.times).T * 1e3
    return {
        "first byte p50, ms": round(float(np.median(first)), 3),
        "first byte p99, ms": round(float(np.quantile(first, 0.99)), 3),
        "end p50, ms": round(float(np.median(last)), 3),
    }


async def load(front: Front, idle: float) -> tuple[float, float]:
    """Requests a second, and CPU microseconds of the front's process a request."""
    client, begin, before = Client(front.url), time.monotonic(), cpu_s(front.process.pid)
    await client.run(TOGETHER, CLIENTS)
    wall_s = time.monotonic() - begin
    return TOGETHER / wall_s, (cpu_s(front.process.pid) - before - idle * wall_s) / TOGETHER * 1e6


class Client:
    """HTTP/1.1 over plain streams; it checks that every answer is whole.

    Attributes:
        times: seconds to first byte and to the end of each answer.
    """

    def __init__(self, url: str) -> None:
        self._port = int(url.rsplit(":", 1)[1])
        ask = {"model": "m", "prompt": "x" * PROMPT_BYTES, "max_tokens": TOKENS, "stream": True}
        body = json.dumps(ask).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: gateway\r\ncontent-length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body
        self.times: list[tuple[float, float]] = []

    async def run(self, requests: int, clients: int) -> None:
        """So many requests over so many connections."""
        await asyncio.gather(*(self._run(requests // clients) for _ in range(clients)))

    async def _run(self, requests: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        for _ in range(requests):
            begin = time.perf_counter()
            writer.write(self._request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in head.split(b"\r\n", 1)[0], head
            first, events = time.perf_counter(), 0
            while size := int(await reader.readline(), 16):
                events += (await reader.readexactly(size + 2)).count(b"data: {")
            await reader.readexactly(2)
            assert events == TOKENS, events
            self.times.append((first - begin, time.perf_counter() - begin))
        writer.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
