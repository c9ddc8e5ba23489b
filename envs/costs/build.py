"""Builds the shipped profiles again: python -m servegym.envs.costs.build MEASUREMENTS OUTPUT."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from servegym.envs.costs.build_kernels import build_from_kernels
from servegym.envs.costs.build_run import build_from_run
from servegym.envs.costs.composed import composed_error
from servegym.envs.costs.llumnix import build_llumnix
from servegym.envs.costs.profile import Profile, save_profile
from servegym.errors import InputError

# System, model, tensor parallelism, and the oracle's file.
KERNELS = (
    ("a100_sxm", "llama-3.1-8b", 1, "aic_a100_llama8b.csv"),
    ("h100_sxm", "llama-3.1-8b", 1, "aic_h100_llama8b.csv"),
    ("h200_sxm", "llama-3.1-8b", 1, "aic_h200_llama8b.csv"),
    ("l40s", "llama-3.1-8b", 1, None),
    ("h100_sxm", "llama-3.1-70b", 4, "aic_h100_llama70b.csv"),
    ("h200_sxm", "llama-3.1-70b", 4, "aic_h200_llama70b.csv"),
)
RUNS = (("rtx4090_llama8b", "rtx4090-llama-3.1-8b"), ("rtxpro6000_llama8b", "rtxpro6000-llama-3.1-8b"))


def build_shipped(measurements: str | Path) -> list[Profile]:
    """All shipped profiles from a folder with traces/kernel_timings and fidelity/.

    Raises:
        InputError: a file that is missing or malformed.
    """
    root = Path(measurements)
    profiles = [build_llumnix()]
    for system, model, tp, oracle in KERNELS:
        profile = build_from_kernels(root / "traces" / "kernel_timings", system=system, model=model, tp=tp)
        if oracle:
            errors = composed_error(profile, root / "fidelity" / "aiconfigurator" / oracle)
            held_out = {**profile.provenance.held_out, **errors}
            profile = replace(profile, provenance=replace(profile.provenance, held_out=held_out))
        profiles.append(profile)
    return profiles + [build_from_run(root / "fidelity" / folder, name=name) for folder, name in RUNS]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurements", type=Path, help="folder with traces/kernel_timings and fidelity")
    parser.add_argument("output", type=Path, help="folder for the JSON files")
    args = parser.parse_args()
    try:
        for profile in build_shipped(args.measurements):
            save_profile(profile, args.output / f"{profile.name}.json")
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
