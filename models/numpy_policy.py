"""The network in plain numpy, without torch: the readable reference that ships with exported bundles."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from servegym.models.features import ILLEGAL, scale, scale_context

Arrays = Mapping[str, np.ndarray]


def forward(weights: Arrays, obs: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Score the candidates and value the clusters, as `servegym.models.dense.DenseNetwork` does.

    Args:
        weights: the tensors of `policy.safetensors`, named as in `servegym.models.layers`.
        obs: the arrays of `servegym.envs.cluster.schema` with a leading lane dimension B, in natural units.

    Returns:
        logits float32 [B, C], `ILLEGAL` where `mask` is 0, and values float32 [B].
    """

    def linear(name: str, rows: np.ndarray) -> np.ndarray:
        product = rows @ weights[f"{name}.weight"].T
        return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product

    lane = np.arange(len(obs["kind"]))[:, None]
    request, instance = obs["candidates"][..., 0], obs["candidates"][..., 1]
    real = obs["instance_mask"].astype(np.float32)[..., None]
    legal = obs["mask"].astype(np.float32)[..., None]
    edges = scale("edges", obs["edges"])
    x = _relu(linear("instance_in", scale("instances", obs["instances"]))) * real
    q = _relu(linear("request_in", scale("requests", obs["requests"])))
    g = _relu(
        linear("context_in", scale_context(obs["globals"], obs["history"]))
        + weights["kind.weight"][obs["kind"]]
    )

    for block in (f"blocks.{i}." for i in range(depth(weights))):
        message = linear(block + "message_instance", x)[lane, instance]
        message = (
            message
            + linear(block + "message_request", q)[lane, request]
            + linear(block + "message_edge", edges)
        )
        message = _relu(message) * legal
        g = _relu(g + linear(block + "pool", _pool(x, real)))
        update = linear(block + "instance_message", _mean(message, legal, lane, instance, x.shape[1]))
        x = _relu(x + update + linear(block + "instance_context", g)[:, None]) * real
        update = linear(block + "request_message", _mean(message, legal, lane, request, q.shape[1]))
        q = _relu(q + update + linear(block + "request_context", g)[:, None])

    score = linear("head_instance", x)[lane, instance] + linear("head_request", q)[lane, request]
    score = _relu(score + linear("head_edge", edges) + linear("head_context", g)[:, None])
    logits = np.where(obs["mask"] == 0, np.float32(ILLEGAL), linear("head_score", score)[..., 0])
    pooled = np.concatenate([g, _pool(x, real)], axis=1)
    return logits, linear("value_out", _relu(linear("value_hidden", pooled)))[:, 0]


def depth(weights: Arrays) -> int:
    """Rounds of message passing of the network that these weights belong to."""
    return len({name.split(".")[1] for name in weights if name.startswith("blocks.")})


def _relu(rows: np.ndarray) -> np.ndarray:
    return np.maximum(rows, 0.0)


def _pool(x: np.ndarray, real: np.ndarray) -> np.ndarray:
    return np.concatenate([x.sum(1) / np.maximum(real.sum(1), 1.0), x.max(1)], axis=1)


def _mean(
    messages: np.ndarray, legal: np.ndarray, lane: np.ndarray, row: np.ndarray, size: int
) -> np.ndarray:
    """[B, C, H] -> [B, size, H]: mean over the legal candidates that join each row, 0 without any."""
    total = np.zeros((len(messages), size, messages.shape[-1]), np.float32)
    count = np.zeros((len(messages), size, 1), np.float32)
    np.add.at(total, (lane, row), messages)
    np.add.at(count, (lane, row), legal)
    return total / np.maximum(count, 1.0)
