"""What an engine does before it serves: weights, first iteration, CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from safetensors.torch import save_file

from servegym.envs.costs.profile import Start
from servegym.runtime.calibrate.machine import wait_for
from servegym.runtime.engine.config import ModelConfig
from servegym.runtime.engine.instance import Instance
from servegym.runtime.engine.model import Transformer, geometry, parameters

LAYERS = 4  # whose weights are written and read: gigabytes more would say the same


def warm_up_s(instances: Sequence[Instance]) -> float:
    """Warm up all instances; seconds of the first."""
    seconds = []
    for instance in instances:
        start = perf_counter()
        instance.warm_up()
        seconds.append(perf_counter() - start)
    return seconds[0]


def start_of(weights: float, warm_up: float) -> Start:
    """The stages that happen inside this process; the others are not measured and stand as 0."""
    return Start(
        bootstrap_s=0.0,
        weights_s=round(weights, 3),
        compile_s=0.0,
        memory_profile_s=0.0,
        graph_capture_s=round(warm_up, 3),
        other_s=0.0,
    )


def weights_s(model: Transformer) -> float:
    """Seconds to build the model from safetensors: those of some layers, just written, scaled by bytes."""
    some = replace(model.config, layers=min(LAYERS, model.config.layers))
    part, whole = (geometry(c, model.dtype.itemsize).weight_bytes for c in (some, model.config))
    with TemporaryDirectory() as folder:
        save_file(stored(model, some), Path(folder) / "model.safetensors")
        start = perf_counter()
        Transformer(some, str(model.device), str(model.dtype).removeprefix("torch."), folder)
        wait_for(model.device)
        return (perf_counter() - start) * whole / part


def stored(model: Transformer, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights as a Hugging Face checkpoint has them; of the layers that `config` has."""
    tensors: dict[str, torch.Tensor] = {}
    for p in parameters(config):
        layer, _, name = p.name.rpartition(".")
        whole = model.layers[int(layer)][name] if layer else getattr(model, name)
        parts = whole.split([rows for _, rows in p.parts])
        tensors |= {part: rows.contiguous() for (part, _), rows in zip(p.parts, parts, strict=True)}
    return tensors
