"""Requests: synthetic generators, recorded traces and sessions, all as one array contract."""

from servegym.envs.workloads.catalogue import DEFAULT_WORKLOAD, catalogue, resolve
from servegym.envs.workloads.generators import GENERATORS, generate
from servegym.envs.workloads.predict import predicted_output_tokens
from servegym.envs.workloads.traces import load
from servegym.envs.workloads.transforms import (
    assign,
    head,
    open_loop,
    prioritise,
    scale_lengths,
    scale_rate,
    slice_rows,
    window,
)
from servegym.envs.workloads.workload import Workload, make_workload

__all__ = [
    "DEFAULT_WORKLOAD",
    "GENERATORS",
    "Workload",
    "assign",
    "catalogue",
    "generate",
    "head",
    "load",
    "make_workload",
    "open_loop",
    "predicted_output_tokens",
    "prioritise",
    "resolve",
    "scale_lengths",
    "scale_rate",
    "slice_rows",
    "window",
]
