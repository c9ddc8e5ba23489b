"""`servegym calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from servegym.commands.profile import Show
from servegym.errors import InputError
from servegym.files import check_folder, command_line, say
from servegym.flags import check_seed
from servegym.runtime.calibrate.calibration import Options, calibrate
from servegym.runtime.calibrate.machine import DTYPES, check_device, this_machine
from servegym.runtime.calibrate.report import write
from servegym.runtime.calibrate.shapes import Limits
from servegym.runtime.engine.config import ModelConfig, load_config
from servegym.runtime.engine.model import Transformer, geometry

# token budget, sequences, context, KV blocks; None: what fits into the device's memory.
DEFAULTS = {"cpu": (256, 16, 1024, 1024), "cuda": (2048, 256, 8192, None)}
MEMORY_SHARE = 0.8  # of what the weights leave, for the KV pools; the rest is for activations and copies


@dataclass(kw_only=True)
class Command:
    """Measure the runtime on this machine and write a cost profile.

    Times whole iterations of many shapes in random order, fits the profile's tables to most of them and holds
    the rest back for its error; measures copies to host memory and between instances, too. Writes
    profile.json, config.json, measurements.json, report.md and plots. `servegym calibrate engine` measures a
    vLLM server instead.
    """

    device: str = "cpu"
    """cpu or cuda."""
    model: Annotated[str, tyro.conf.arg(aliases=("-m",))] = "cpu-llama"
    """llama-3.1-8b, qwen3-8b, cpu-llama, cpu-qwen3, or the path of a Hugging Face config.json; random
    weights."""
    dtype: str | None = None
    """float32 or bfloat16; by default float32 on the CPU, bfloat16 on CUDA."""
    neighbours: int = 1
    """Instances that iterate at the same time, the measured one included: as many as will share the
    machine."""
    token_budget: int | None = None
    """Most tokens of an iteration; 256 on the CPU, 2048 on CUDA."""
    max_seqs: int | None = None
    """Most requests of an iteration; 16 on the CPU, 256 on CUDA."""
    max_context: int | None = None
    """Longest request in tokens; 1024 on the CPU, 8192 on CUDA, or what the model has positions for."""
    kv_blocks: int | None = None
    """Blocks of the KV pool; 1024 on the CPU, what fits on CUDA."""
    block_tokens: int = 16
    """Tokens of a block."""
    swap_group: int = 16
    """Blocks that a copy to host memory carries, beside copies of single blocks."""
    size: int = 40
    """Random shapes of each kind to fit; half as many are held out."""
    rounds: int = 7
    """Times that each shape is measured."""
    seed: int = 0
    """Of shapes, order, weights and token ids."""
    output: Annotated[str | None, tyro.conf.arg(aliases=("-o",))] = None
    """Folder to write; runs/calibrate/DEVICE-MODEL by default."""

    def run(self) -> int:
        """Measure, write, show."""
        check_device(self.device)
        check_seed("calibrate", self.seed)
        for name in ("neighbours", "block_tokens", "swap_group", "size", "rounds"):
            if getattr(self, name) < 1:
                raise InputError("calibrate", name, getattr(self, name), "must be at least 1")
        config = load_config(self.model)
        folder = Path(self.output or f"runs/calibrate/{self.device}-{config.name}")
        check_folder(str(folder))
        limits = self._limits(config, 1)  # refuses what cannot be before gigabytes of weights are made
        torch.set_num_threads(1)  # as an engine has when it plays
        model = Transformer(config, self.device, self.dtype or DTYPES[self.device], self.seed)
        options = Options(
            limits=self._limits(config, self._fitting(model, limits)),
            rounds=self.rounds,
            size=self.size,
            swap_group=self.swap_group,
            seed=self.seed,
        )
        with Console(stderr=True).status("calibrate") as status:
            found = calibrate(
                model,
                this_machine(self.device),
                options,
                name=folder.name,
                command=command_line(),
                neighbours=(model,) * (self.neighbours - 1),
                progress=lambda text: status.update(f"calibrate: {text}"),
            )
        return finish(write(found, config.raw, folder))

    def _limits(self, config: ModelConfig, fitting: int) -> Limits:
        budget, seqs, context, blocks = DEFAULTS[self.device]
        context = min(context, config.positions) if self.max_context is None else self.max_context
        if context > config.positions:
            raise InputError(
                "calibrate", "max_context", context, f"the model has {config.positions} positions"
            )
        least = -(-context // self.block_tokens)
        return Limits(
            token_budget=budget if self.token_budget is None else self.token_budget,
            max_seqs=seqs if self.max_seqs is None else self.max_seqs,
            max_context=context,
            kv_blocks=self.kv_blocks if self.kv_blocks is not None else blocks or max(fitting, least),
            block_tokens=self.block_tokens,
        )

    def _fitting(self, model: Transformer, limits: Limits) -> int:
        """Blocks of each instance's pool that fit beside the weights; 1 on the CPU, which takes a default."""
        if self.device != "cuda":
            return 1
        free, _ = torch.cuda.mem_get_info()
        return blocks_that_fit(free // self.neighbours, model.config, model.dtype.itemsize, limits)


def blocks_that_fit(free: int, config: ModelConfig, itemsize: int, limits: Limits) -> int:
    """KV blocks of an instance that has so many bytes for itself, beside what its CUDA graphs keep.

    These are the block tables of the largest batch and its logits twice: of the capture, and of the pass
    before it.
    """
    tables = -(-config.positions // limits.block_tokens) * 8
    graphs = limits.max_seqs * (tables + 2 * config.vocabulary * itemsize)
    block = geometry(config, itemsize).kv_bytes_per_token * limits.block_tokens
    return int(MEMORY_SHARE * free - graphs) // block


def finish(files: Sequence[Path]) -> int:
    """Show the profile, the first of the files that a calibration wrote, and name them all."""
    Show(str(files[0])).run()
    if not any(path.suffix == ".png" for path in files):
        say("no plots: pip install 'servegym[plots]'")
    say(f"written: {' '.join(map(str, files))}")
    return 0
