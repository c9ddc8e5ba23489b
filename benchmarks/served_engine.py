"""A real vLLM server against the cluster model, with a profile that was measured over HTTP alone.

    python benchmarks/served_engine.py

Needs vLLM (`make test-vllm` builds .venv-vllm). A server of a small random model is calibrated from outside,
as `servegym calibrate engine` does with a user's. Then it plays the first requests of a workload in real
time, again and again, and its iterations are measured again before every play, because a shared machine
changes its speed by tens of percent within minutes (see sim_to_real.py). The model plays them with a profile
fitted to the means of all measurements. One engine, so that there is nothing to decide, and the second core
is left for the front end and the client.

The value is the largest error of P50 and P99 of TTFT, TPOT and E2E, each a mean over all plays, in percent of
what was measured; the detail has the standard error of each, and the spread of the plays. The last line is
JSON.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from report import report

from servegym.agents.heuristics import make_heuristic
from servegym.envs.cluster.spec import parse_cluster
from servegym.envs.costs import save_profile
from servegym.envs.scenario import Scenario
from servegym.files import write_json
from servegym.runtime.calibrate.calibration import Calibration, Options, measured_again
from servegym.runtime.calibrate.measure import measure
from servegym.runtime.calibrate.served import calibrate_served, look
from servegym.runtime.calibrate.shapes import Limits
from servegym.runtime.calibrate.streams import StreamBench
from servegym.runtime.engine.config import load_config
from servegym.runtime.engine.model import geometry
from servegym.runtime.players import open_player
from servegym.runtime.validate import FIGURES, make_episode, predict
from servegym.runtime.validate import measure as play
from servegym.runtime.vllm.launch import NAME, EngineSettings, launch

GOAL = 10.0
CONFIG = load_config("cpu-llama")
BLOCK, BLOCKS = 128, 65  # of vLLM's KV cache on a CPU; one is never used
BUDGET, MAX_SEQS, MAX_CONTEXT, SIZE = 256, 16, 512, 10
TRACE, LENGTHS, REQUESTS, LOAD = "azure2023_conv", 0.1, 100, 0.7
PLAYS = 8
SCENARIO, POLICY = Scenario(), "round_robin"


def calibrated(folder: Path) -> Calibration:
    """A first profile, by which a fleet is opened; it goes to the folder."""
    write_json(folder / "config.json", CONFIG.raw)
    arguments = ["--load-format", "dummy", "--skip-tokenizer-init", "--block-size", str(BLOCK)]
    arguments += ["--max-num-batched-tokens", str(BUDGET)]
    settings = EngineSettings(kv_blocks=BLOCKS, max_seqs=MAX_SEQS, model=folder, arguments=arguments)
    with launch(settings) as (engine,):
        served = asyncio.run(look(engine.url))
        limits = Limits(BUDGET, MAX_SEQS, MAX_CONTEXT, served.kv_blocks, served.block_tokens)
        found = calibrate_served(
            served, geometry(CONFIG, 4), CONFIG.vocabulary, Options(limits, rounds=1, size=SIZE),
            device="one CPU core", name="served", command="benchmarks/served_engine.py",
        )  # fmt: skip
    save_profile(found.profile, folder / "profile.json")
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        calibration = calibrated(Path(scratch))
        profile, shapes = calibration.profile, calibration.design.fitted
        limits = Limits(BUDGET, MAX_SEQS, MAX_CONTEXT, profile.kv_blocks, profile.block_tokens)
        fleet = parse_cluster(f"{scratch}/profile.json")
        episode = make_episode(
            fleet, TRACE, SCENARIO, requests=REQUESTS, load_fraction=LOAD, length_scale=LENGTHS
        )
        player = open_player("vllm", fleet, "cpu")
        plays, seconds = [], []
        try:
            with StreamBench(player.engines[0].url, NAME, limits, CONFIG.vocabulary, seed=1) as bench:
                for k in range(PLAYS):
                    seconds.append(measure(bench, shapes, rounds=1, seed=k, warm_up=int(k == 0)))
                    plays.append(play(player, make_heuristic(POLICY), SCENARIO, episode))
                    print(f"play {k + 1} of {PLAYS}: TPOT P50 {1e3 * plays[-1]['tpot_p50_s']:.1f} ms")
        finally:
            player.close()
        save_profile(measured_again(calibration, np.hstack(seconds).mean(axis=1)), f"{scratch}/final.json")
        said = predict(
            make_heuristic(POLICY), SCENARIO, replace(episode, cluster=parse_cluster(f"{scratch}/final.json"))
        )
    figures = {figure: compared(np.array([p[figure] for p in plays]), said[figure]) for figure in FIGURES}
    for figure, found in figures.items():
        print(f"{figure:12}" + ", ".join(f"{name} {value}" for name, value in found.items()))
    detail = {
        "figures": figures,
        "machine_spread_percent": max(found["spread_percent"] for found in figures.values()),
        "engine": profile.provenance.software,
        "plays": PLAYS,
    }
    report("served_engine", max(abs(f["error_percent"]) for f in figures.values()), "%", GOAL, detail)


def compared(measured: np.ndarray, predicted: float) -> dict[str, float]:
    """A figure of all plays beside the model's."""
    mean = float(measured.mean())
    return {
        "measured_s": round(mean, 5),
        "predicted_s": round(predicted, 5),
        "error_percent": round(100 * (predicted / mean - 1), 2),
        "standard_error_percent": round(100 * float(measured.std(ddof=1)) / len(measured) ** 0.5 / mean, 2),
        "spread_percent": round(100 * float(np.ptp(measured)) / mean, 2),
    }


if __name__ == "__main__":
    main()
