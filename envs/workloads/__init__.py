"""Requests: synthetic generators, recorded traces and sessions, all as one array contract."""

from servegym.envs.workloads.generators import GENERATORS, generate
from servegym.envs.workloads.workload import Workload, make_workload

__all__ = ["GENERATORS", "Workload", "generate", "make_workload"]
