"""What stands between clients and engines: Envoy as it comes, or with the endpoint picker."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from servegym.runtime.gateway.envoy import find_envoy
from servegym.runtime.vllm.launch import Engine, free_ports

READY_S, STOP_S = 60.0, 40.0
POLICIES = {"round robin": "ROUND_ROBIN", "least request": "LEAST_REQUEST"}  # of Envoy itself


@dataclass
class Front:
    """A running front.

    Attributes:
        name, url: what tables call it, and where clients connect.
        process: Envoy, or the picker, whose child Envoy then is.
        metrics: its Prometheus page; empty for Envoy alone.
        redispatched: which of the counters there is of requests that went on at another engine.
        log: its output.
    """

    name: str
    url: str
    process: subprocess.Popen
    metrics: str = ""
    redispatched: str = ""
    log: Path = field(default=Path(os.devnull))

    def cpu_s(self) -> float:
        """CPU seconds that the process has used, without its children."""
        return cpu_s(self.process.pid)

    def counters(self) -> dict[str, float]:
        """Its metrics."""
        with urllib.request.urlopen(self.metrics, timeout=5) as page:
            return counters(page.read().decode())


def cpu_s(pid: int) -> float:
    """CPU seconds of a process' threads that live; /proc/PID/stat counts in steps of 10 ms."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text(encoding="ascii").split()[0]) for task in tasks) * 1e-9


def children(pid: int) -> list[int]:
    """Processes that it started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(child) for child in text.split()]


def counters(page: str) -> dict[str, float]:
    """A Prometheus page: each sample by name and labels, and by its name alone the sum over labels."""
    values: dict[str, float] = {}
    for name, labels, value in re.findall(r"^([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)", page, re.MULTILINE):
        values[name] = values.get(name, 0.0) + float(value)
        values[name + labels] = float(value) if labels else values[name]
    return values


@contextmanager
def stock_envoy(name: str, engines: Sequence[Engine], folder: Path) -> Iterator[Front]:
    """Envoy with one of its own policies, and nothing else."""
    port = free_ports(1)[0]
    config = folder / f"envoy-{port}.json"
    config.write_text(json.dumps(_config(port, POLICIES[name], [e.port for e in engines])), encoding="utf-8")
    line = [
        str(find_envoy(None)),
        "-c",
        str(config),
        "--use-dynamic-base-id",
        "-l",
        "error",
        "--concurrency",
        "1",
    ]
    yield from _run(Front(name, f"http://127.0.0.1:{port}", _start(line, folder / f"envoy-{port}.log")))


@contextmanager
def picker(policy: str, engines: Sequence[Engine], folder: Path, *flags: str) -> Iterator[Front]:
    """`servegym gateway`: the picker and its Envoy."""
    ports = free_ports(3)
    port, _, metrics_port = ports
    line = [sys.executable, "-m", "servegym.cli", "gateway", policy, "--engines", *(e.url for e in engines)]
    for flag, number in zip(("--port", "--picker-port", "--metrics-port"), ports, strict=True):
        line += [flag, str(number)]
    log = folder / f"gateway-{port}.log"
    url, metrics = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics"
    yield from _run(
        Front("picker", url, _start([*line, *flags], log), metrics, "servegym_retried_total", log)
    )


@contextmanager
def migrator(policy: str, engines: Sequence[Engine], folder: Path, *flags: str) -> Iterator[Front]:
    """`servegym migrator`, without Envoy."""
    port = free_ports(1)[0]
    line = [sys.executable, "-m", "servegym.cli", "migrator", policy, "--engines", *(e.url for e in engines)]
    log = folder / f"migrator-{port}.log"
    url, recovered = f"http://127.0.0.1:{port}", 'servegym_events_total{event="recovered"}'
    process = _start([*line, "--port", str(port), *flags], log)
    yield from _run(Front("migrator", url, process, f"{url}/metrics", recovered, log))


def _start(line: list[str], log: Path) -> subprocess.Popen:
    with log.open("w", encoding="utf-8") as out:
        return subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT, process_group=0)


def _run(front: Front) -> Iterator[Front]:
    try:
        _wait(front)
        yield front
    finally:
        front.process.terminate()
        try:
            front.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            front.process.kill()
            front.process.wait()


def _wait(front: Front) -> None:
    until = time.monotonic() + READY_S
    while front.process.poll() is None and time.monotonic() < until:
        with suppress(OSError), urllib.request.urlopen(f"{front.url}/v1/models", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    tail = front.log.read_text(errors="replace").splitlines()[-5:] if front.log.is_file() else []
    sys.exit(f"{front.name} does not come up: " + " | ".join(tail))


def _config(port: int, policy: str, engines: list[int]) -> dict:
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3."
        "HttpConnectionManager",
        "stat_prefix": "front",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "engines", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
                },
            }
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": _address(engine)}} for engine in engines]}]
    return {
        "static_resources": {
            "listeners": [{"address": _address(port), "filter_chains": [{"filters": filters}]}],
            "clusters": [
                {
                    "name": "engines",
                    "type": "STATIC",
                    "lb_policy": policy,
                    "load_assignment": {"cluster_name": "engines", "endpoints": endpoints},
                }
            ],
        }
    }


def _address(port: int) -> dict:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
