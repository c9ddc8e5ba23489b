"""What an engine does before it serves: weights, first iteration, CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from safetensors.torch import save_file

from servegym.envs.costs.profile import Start
from servegym.runtime.engine.instance import Instance
from servegym.runtime.engine.model import Transformer, parameters


def start_costs(model: Transformer, instances: Sequence[Instance]) -> Start:
    """Warm up all instances; seconds of the first's, and of reading the weights from the page cache."""
    seconds = []
    for instance in instances:
        start = perf_counter()
        instance.warm_up()
        seconds.append(perf_counter() - start)
    return Start(weights_s=round(weights_s(model), 3), graph_capture_s=round(seconds[0], 3))


def weights_s(model: Transformer) -> float:
    """Seconds to build the model from a folder of safetensors that was just written."""
    with TemporaryDirectory() as folder:
        save_file(stored(model), Path(folder) / "model.safetensors")
        start = perf_counter()
        Transformer(model.config, str(model.device), str(model.dtype).removeprefix("torch."), folder)
        return perf_counter() - start


def stored(model: Transformer) -> dict[str, torch.Tensor]:
    """The weights as a Hugging Face checkpoint has them."""
    tensors: dict[str, torch.Tensor] = {}
    for p in parameters(model.config):
        layer, _, name = p.name.rpartition(".")
        whole = model.layers[int(layer)][name] if layer else getattr(model, name)
        parts = whole.split([rows for _, rows in p.parts])
        tensors |= {part: rows.contiguous() for (part, _), rows in zip(p.parts, parts, strict=True)}
    return tensors
