"""`servegym predictor`."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from typing import Annotated

import tyro
from aiohttp import web

from servegym.envs.costs import Profile, load_profile
from servegym.errors import InputError
from servegym.files import console
from servegym.runtime.latency import MEAN_OUTPUT_TOKENS, LatencyModel
from servegym.runtime.llmd import make_app


@dataclass
class Command:
    """Serve llm-d's latency predictor from a profile: TTFT and TPOT of a request on each engine.

    Speaks the protocol of llm-d's prediction server, whose place it takes beside an unmodified llm-d. Flags
    that are left out keep what the profile says of the engine.
    """

    profile: Annotated[str, tyro.conf.Positional]
    """Name of a profile (see `servegym profile list`), or a JSON file."""
    host: str = "127.0.0.1"
    """Address to listen on; other than loopback only where the network is trusted."""
    port: int = 8001
    """Port to listen on; 0 takes a free one."""
    mean_output_tokens: float = MEAN_OUTPUT_TOKENS
    """Output tokens of a request in your traffic, mean."""
    kv_blocks: int | None = None
    """KV blocks of an engine (vllm:cache_config_info, num_gpu_blocks)."""
    block_tokens: int | None = None
    """Tokens of a KV block (vllm:cache_config_info, block_size)."""
    token_budget: int | None = None
    """Most tokens of an iteration (vLLM: --max-num-batched-tokens)."""
    max_seqs: int | None = None
    """Most requests of an iteration (vLLM: --max-num-seqs)."""

    def run(self) -> int:
        """Serve until interrupted."""
        model = LatencyModel(self.engine(), self._mean_output())
        listener = self._listen()
        host, port = listener.getsockname()[:2]
        console().print(f"latency predictor of {model.profile.name} on http://{host}:{port}")
        web.run_app(make_app(model), sock=listener, print=None, access_log=None)
        return 0

    def engine(self) -> Profile:
        """The profile with the engine settings that were given.

        Raises:
            InputError: for settings that no engine has.
        """
        given = {
            name: getattr(self, name) for name in ("kv_blocks", "block_tokens", "token_budget", "max_seqs")
        }
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if value < 1:
                raise InputError("predictor", name.replace("_", "-"), value, "must be at least 1")
        profile = replace(load_profile(self.profile), **given)
        profile.check("predictor", "")
        return profile

    def _mean_output(self) -> float:
        if not 1 <= self.mean_output_tokens <= 1e6:
            raise InputError("predictor", "mean-output-tokens", self.mean_output_tokens, "must be 1 to 1e6")
        return self.mean_output_tokens

    def _listen(self) -> socket.socket:
        if not 0 <= self.port <= 65535:
            raise InputError("predictor", "port", self.port, "must lie in 0..65535")
        try:
            return socket.create_server((self.host, self.port))
        except OSError as error:
            raise InputError(
                f"{self.host}:{self.port}", "address", error.strerror, "cannot listen"
            ) from error
