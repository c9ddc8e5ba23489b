"""`servegym calibrate engine`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from servegym.commands.calibrate import finish
from servegym.errors import InputError
from servegym.files import check_folder, command_line
from servegym.flags import check_seed
from servegym.runtime.calibrate.calibration import Options
from servegym.runtime.calibrate.report import write
from servegym.runtime.calibrate.served import MOST_CONTEXT, Served, calibrate_served, look
from servegym.runtime.calibrate.shapes import Limits
from servegym.runtime.calibrate.streams import SLACK
from servegym.runtime.engine.config import load_config
from servegym.runtime.engine.model import DTYPES, geometry


@dataclass(kw_only=True)
class Command:
    """Measure a vLLM server that is up and idle, over HTTP, and write a cost profile; takes minutes.

    Brings requests to decode at many contexts, with and without a prompt beside them, and reads the times of
    whole iterations off the gaps between their tokens, in random order. Fits the profile's tables to most of
    the shapes and holds the rest back for its error. Writes profile.json, config.json, measurements.json,
    report.md and plots. Swaps, transfers and the engine's start cannot be seen and are not in the profile.
    """

    url: tyro.conf.Positional[str]
    """Of the server, such as http://127.0.0.1:8000; prefix caching on, nobody else asking."""
    model: Annotated[str, tyro.conf.arg(aliases=("-m",))]
    """The model that it serves: llama-3.1-8b, qwen3-8b, or the path of its Hugging Face config.json."""
    token_budget: int
    """The server's --max-num-batched-tokens."""
    max_seqs: int
    """The server's --max-num-seqs."""
    device: str
    """Name of the accelerator that it runs on, for the profile."""
    tensor_parallel: int = 1
    """The server's --tensor-parallel-size."""
    dtype: str = "bfloat16"
    """bfloat16 or float32, of weights and KV; for a server with 16-bit floats, bfloat16."""
    max_context: int | None = None
    """Longest request that is measured, tokens; by default as long as the server takes, at most 8192."""
    size: int = 20
    """Random shapes of each kind to fit; half as many are held out."""
    rounds: int = 3
    """Times that each shape is measured."""
    seed: int = 0
    """Of shapes, order and token ids."""
    output: Annotated[str, tyro.conf.arg(aliases=("-o",))] = "runs/calibrate/engine"
    """Folder to write."""

    def run(self) -> int:
        """Measure, write, show."""
        check_seed("calibrate", self.seed)
        for name in ("tensor_parallel", "size", "rounds"):
            if getattr(self, name) < 1:
                raise InputError("calibrate", name, getattr(self, name), "must be at least 1")
        if self.dtype not in DTYPES:
            raise InputError("calibrate", "dtype", self.dtype, f"choose one of {', '.join(DTYPES)}")
        config, folder = load_config(self.model), Path(self.output)
        check_folder(str(folder))
        served = asyncio.run(look(self.url.rstrip("/")))
        options = Options(self._limits(served), rounds=self.rounds, size=self.size, seed=self.seed)
        with Console(stderr=True).status("calibrate") as status:
            found = calibrate_served(
                served,
                geometry(config, DTYPES[self.dtype].itemsize),
                config.vocabulary,
                options,
                device=self.device,
                name=folder.name,
                command=command_line(),
                tensor_parallel=self.tensor_parallel,
                progress=lambda text: status.update(f"calibrate: {text}"),
            )
        return finish(write(found, config.raw, folder))

    def _limits(self, served: Served) -> Limits:
        most = served.max_tokens - SLACK
        context = min(MOST_CONTEXT, most) if self.max_context is None else self.max_context
        if context > most:
            hint = f"the server takes {served.max_tokens} tokens, {SLACK} of which are left for the answer"
            raise InputError(served.url, "max_context", context, hint)
        return Limits(
            token_budget=self.token_budget,
            max_seqs=self.max_seqs,
            max_context=context,
            kv_blocks=served.kv_blocks,
            block_tokens=served.block_tokens,
        )
