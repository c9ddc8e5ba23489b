"""Real vLLM servers of a small model on this machine: started, waited for, killed.

For tests, benchmarks and examples. vLLM lives in an interpreter of its own, which `vllm_python` finds;
nothing of it is imported here. A server listens on loopback, computes on one thread, writes one log file, and
dies with its process group: at the end of `launch`, and at the end of this process at the latest.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from servegym.errors import InputError

PYTHON = "SERVEGYM_VLLM_PYTHON"
VENV = Path(".venv-vllm")  # what `make test-vllm` builds
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "servegym"
BUILDER = Path(__file__).with_name("tiny_model.py")
NAME = "tiny"  # the served model
READY_S, STOP_S, POLL_S = 300.0, 10.0, 0.25
PORTS = range(10_000, 30_000)  # below those that Linux gives unasked, unless it was told otherwise
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the servers, Envoy and the clients share the cores
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class EngineSettings:
    """What a server is started with.

    Attributes:
        kv_blocks: KV cache in blocks, of 128 tokens on a CPU; 12 force preemptions.
        max_seqs, max_model_len: requests in a batch, tokens of a request.
        dtype: float32 keeps greedy answers the same in every batch; bfloat16 has ties.
        model: a model folder; None takes the small one that `tiny_model` writes.
        scheduler: `package.module.Class` for --scheduler-cls.
        config: JSON for --additional-config.
        arguments: further arguments of vLLM's server, as on its command line.
        environment: variables beside `ENVIRONMENT`, or in place of them.
    """

    kv_blocks: int = 64
    max_seqs: int = 16
    max_model_len: int = 1024
    dtype: str = "float32"
    model: Path | None = None
    scheduler: str | None = None
    config: Mapping[str, Any] | None = None
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, python: Path, model: Path, port: int) -> list[str]:
        """The command line of a server on `port`."""
        line = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        line += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
        line += ["--dtype", self.dtype, "--max-model-len", str(self.max_model_len)]
        line += ["--max-num-seqs", str(self.max_seqs), "--num-gpu-blocks-override", str(self.kv_blocks)]
        if self.scheduler is not None:
            line += ["--scheduler-cls", self.scheduler]
        if self.config is not None:
            line += ["--additional-config", json.dumps(dict(self.config))]
        return [*line, *self.arguments]


class Engine:
    """A running server.

    Attributes:
        port, url: where it listens.
        log: its output.
        process: the API server, leader of the process group that holds the engine, too.
    """

    def __init__(self, settings: EngineSettings, port: int, log: Path) -> None:
        python = vllm_python()
        command = settings.command(python, settings.model or tiny_model(python), port)
        self.port, self.url, self.log = port, f"http://127.0.0.1:{port}", log
        variables = {**ENVIRONMENT, "VLLM_CACHE_ROOT": str(CACHE / "vllm"), **settings.environment}
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                # Not a session: Linux schedules each as one, and where servers that spin shared two cores it
                # let whole sessions wait for up to a minute (6.18, autogroups).
                process_group=0,
            )
        atexit.register(self.kill)

    def healthy(self) -> bool:
        """Whether it answers its health check."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def wait(self, seconds: float = READY_S) -> None:
        """Return when it serves.

        Raises:
            InputError: when it ends or is not ready in time; the log's last lines are in the message.
        """
        until = time.monotonic() + seconds
        while not self.healthy():
            if self.process.poll() is not None:
                self._fail("exit code", self.process.returncode)
            if time.monotonic() > until:
                self.kill()
                self._fail("ready", f"not after {seconds:.0f} s")
            time.sleep(POLL_S)

    def _fail(self, what: str, value: object) -> None:
        tail = " | ".join(self.log.read_text(errors="replace").splitlines()[-3:])
        raise InputError(f"vLLM on port {self.port}", what, value, f"its log {self.log} ends: {tail}")

    def stop(self) -> None:
        """End it in peace; after `STOP_S` seconds by force."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        self.kill()

    def kill(self) -> None:
        """Kill -9 for all its processes at once, as when the machine goes."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        atexit.unregister(self.kill)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@contextmanager
def launch(
    settings: EngineSettings | Sequence[EngineSettings], count: int = 1, folder: Path | None = None
) -> Iterator[list[Engine]]:
    """Start servers side by side, wait until all serve, stop them at the end.

    Args:
        settings: of all of the `count` servers, or of each of them.
        folder: for the log files `vllm-PORT.log`; a temporary one by default, removed at the end.

    Raises:
        InputError: without vLLM, or when a server does not start.
    """
    each = [settings] * count if isinstance(settings, EngineSettings) else list(settings)
    with ExitStack() as stack:
        stack.enter_context(_termination_unwinds())
        where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = []
        for one, port in zip(each, free_ports(len(each)), strict=True):
            engine = Engine(one, port, where / f"vllm-{port}.log")
            stack.callback(engine.stop)
            engines.append(engine)
        for engine in engines:
            engine.wait()
        yield engines


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """SIGTERM leaves by way of `finally`, unless somebody else sees to it: servers would outlive us."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody has, nor gets unasked before their servers bind them."""
    found: set[int] = set()
    while len(found) < count:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def vllm_python() -> Path:
    """The interpreter that has vLLM: `$SERVEGYM_VLLM_PYTHON`, else .venv-vllm here, else this one.

    Raises:
        InputError: where there is none, with what to install.
    """
    named = os.environ.get(PYTHON)
    if named:
        if not os.access(named, os.X_OK):
            raise InputError("environment", PYTHON, named, "is no program; name a Python that has vLLM")
        return Path(named).absolute()
    venv = VENV / "bin" / "python"
    if venv.is_file():
        return venv.absolute()
    if find_spec("vllm") is None:
        hint = "`make test-vllm` builds .venv-vllm; or name a Python that has vLLM in the variable"
        raise InputError("environment", PYTHON, named, hint)
    return Path(sys.executable)


def tiny_model(python: Path | None = None) -> Path:
    """The folder of the small model; written on first use and kept in the cache.

    Args:
        python: an interpreter with `tokenizers` and `safetensors`; that of vLLM by default.

    Raises:
        InputError: when it cannot be built.
    """
    digest = hashlib.sha256(BUILDER.read_bytes()).hexdigest()[:12]
    folder = CACHE / f"tiny-{digest}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as partial:
            line = [str(python or vllm_python()), str(BUILDER), f"{partial}/model"]
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                error = done.stderr.strip().splitlines()[-1:] or ["no output"]
                raise InputError(BUILDER, "exit code", done.returncode, error[0])
            with suppress(OSError):  # another process was faster
                Path(partial, "model").rename(folder)
    return folder
