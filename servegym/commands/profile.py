"""`servegym profile`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.table import Table

from servegym.envs.costs import Profile, load_profile, profile_names, save_profile
from servegym.envs.costs.build import build_from_kernels, build_from_run
from servegym.errors import InputError
from servegym.files import console


@dataclass
class List:
    """List the shipped profiles; `profile show` says where one comes from."""

    def run(self) -> int:
        """Print one row a profile."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for header in ("profile", "model"):
            table.add_column(header, no_wrap=True)
        table.add_column("device", overflow="fold")
        for header in ("TP", "KV\ntokens", "token\nbudget", "held-out\nerror %"):
            table.add_column(header, justify="right", no_wrap=True)
        for name in profile_names():
            p = load_profile(name)
            table.add_row(
                name,
                p.model.name,
                p.device.name,
                str(p.tensor_parallel),
                f"{p.kv_tokens:,}",
                str(p.token_budget),
                _worst(p),
            )
        console().print(table)
        return 0


@dataclass
class Show:
    """Show a profile's provenance and its error on held-out shapes."""

    profile: Annotated[str, tyro.conf.Positional]
    """Name of a shipped profile, or a JSON file."""

    def run(self) -> int:
        """Print it."""
        p = load_profile(self.profile)
        origin = p.provenance
        out = console()
        out.print(f"{p.name}: {p.model.name} on {p.tensor_parallel} x {p.device.name}")
        out.print(
            f"KV cache {p.kv_tokens:,} tokens in blocks of {p.block_tokens}, token budget {p.token_budget}, "
            f"at most {p.max_seqs} sequences, {p.overhead_us:g} us an iteration"
        )
        out.print(f"source: {origin.source}; {origin.software}; {origin.date}")
        table = Table("part", "held-out shapes", "median error %", "P90 %", "max %")
        for part, error in origin.held_out.items():
            numbers = (error.median_percent, error.p90_percent, error.max_percent)
            table.add_row(part, str(error.shapes), *(f"{x:.2f}" for x in numbers))
        out.print(table)
        for note in origin.notes:
            out.print(f"- {note}")
        return 0


@dataclass
class Build:
    """Build a profile from measurements.

    FOLDER holds either kernel tables of many devices (gemm, context_attention, generation_attention, ...;
    then --system, --model and --tp pick one), or one run (kernels/*.csv, engine.json, hardware.json).
    """

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of measurements."""
    output: str
    """JSON file to write."""
    system: str | None = None
    """Device in the kernel tables, such as h100_sxm."""
    model: str = "llama-3.1-8b"
    """Model whose layers the kernels make up."""
    tp: int = 1
    """Tensor parallelism."""

    def run(self) -> int:
        """Build it, write it, show it."""
        if not Path(self.folder).is_dir():
            raise InputError("profile", "folder", self.folder, "there is no such folder")
        name = Path(self.output).stem
        if self.system is None:
            profile = build_from_run(self.folder, name=name)
        else:
            profile = build_from_kernels(
                self.folder, system=self.system, model=self.model, tp=self.tp, name=name
            )
        save_profile(profile, self.output)
        return Show(self.output).run()


Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Build, tyro.conf.subcommand("build")]
)


def _worst(profile: Profile) -> str:
    """The median error of the part that the profile predicts worst."""
    errors = profile.provenance.held_out.values()
    return f"{max(e.median_percent for e in errors):.1f}" if errors else "-"
