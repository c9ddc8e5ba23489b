"""Links and start times that the kernel tables do not hold, from published measurements."""

from __future__ import annotations

from typing import Any

from servegym.envs.costs.profile import Geometry, Link, Start

# Host link, bytes/s one way. H100, H200: 50 GB/s measured at 2 MB blocks (vLLM blog, 2026-01); the others 0.8
# of PCIe 4 or 5 x16 (32, 64 GB/s). About 10 us a copy (FastSwitch, arXiv 2411.18424).
_HOST = (("H100", 50e9), ("H200", 50e9), ("B200", 50e9), ("RTX PRO 6000", 51e9), ("", 25.6e9))
# Replica to replica, bytes/s of one GPU, nominal InfiniBand; RTX and L40S hosts: 100 Gb/s Ethernet.
_NETWORK = (("H100", 50e9), ("H200", 50e9), ("B200", 50e9), ("A100", 25e9), ("", 12.5e9))
_COPY_S, _MESSAGE_S = 10e-6, 0.5e-3  # 0.5 ms a transfer: Mooncake, prefill to decode
# Llama-2-7b (13.5 GB) on A100, 43 to 51 s in all (arXiv 2606.07362); weights go with their size.
_WEIGHTS_S_PER_BYTE = 7.5 / 13.5e9


def typical_links(device: str, model: Geometry, tp: int) -> dict[str, Any]:
    """Profile fields swap, network and start for a device by its name."""
    host = next(rate for part, rate in _HOST if part in device)
    network = next(rate for part, rate in _NETWORK if part in device)
    return {
        "swap": Link(seconds_per_call=_COPY_S, bytes_per_second=tp * host),
        "network": Link(seconds_per_call=_MESSAGE_S, bytes_per_second=tp * network),
        "start": Start(
            bootstrap_s=10.0,
            weights_s=round(model.weight_bytes / tp * _WEIGHTS_S_PER_BYTE, 1),
            compile_s=8.3,
            memory_profile_s=2.2,
            graph_capture_s=4.0,
            other_s=15.0,
        ),
    }
