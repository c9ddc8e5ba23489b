"""Builders: kernels and runs made up by hand, bad folders, and the shipped files built again."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from servegym.envs.costs import cost_tables, load_profile, profile_names
from servegym.envs.costs.build import build_shipped
from servegym.envs.costs.build_kernels import Gemm, build_from_kernels
from servegym.envs.costs.build_run import build_from_run
from servegym.envs.costs.fitting import between, grid, left_out, power_law, relative_error, widened
from servegym.envs.costs.llumnix import DECODE_MS, LENGTHS, PREFILL_MS, build_llumnix
from servegym.envs.costs.reference import ReferenceCosts
from servegym.errors import InputError

SHARED = Path(__file__).resolve().parents[4] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the measurements are not on this machine")

LAYERS = 32
LINEAR = {"qkv_proj": 3.0, "o_proj": 2.0, "gate_up_proj": 6.0, "down_proj": 4.0, "layernorm": 0.5}


def write_csv(path, columns, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


@pytest.fixture
def run(tmp_path):
    """A run of simple laws: a launch of 5 us, decodes of 2 ns a token, twice that beside prefill."""
    folder = tmp_path / "toy"
    kernels = folder / "kernels"
    kernels.mkdir(parents=True)
    tokens = (1, 2, 4, 8, 16, 64, 256, 1024, 2048)
    dense = [(name, t, 10 + us * t) for name, us in LINEAR.items() for t in tokens]
    write_csv(kernels / "dense.csv", ("layer", "tokens", "time_us"), dense)
    heads = [(name, s, 50 + s) for name in ("lm_head", "sampler") for s in (1, 2, 16, 64, 256)]
    write_csv(kernels / "per_sequence.csv", ("layer", "sequences", "time_us"), heads)
    write_csv(
        kernels / "attention.csv",
        ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),
        [(c, p, n, k, attention_us(c, p, n, k)) for c, p, n, k in attention_shapes()],
    )
    write_csv(
        kernels / "skew.csv",
        ("n", "ratio", "pc", "kv_big", "kv_mean", "t_mean_us", "t_skew_us"),
        [
            (
                n,
                0.125,
                pc,
                4 * k,
                k,
                3 * attention_us(pc, 0, n, k),
                3 * (attention_us(pc, 0, n, k) + 0.03 * k),
            )
            for n in (8, 32)
            for pc in (0, 64)
            for k in (256, 1024)
        ],
    )
    (folder / "engine.json").write_text(
        json.dumps(
            {
                "model": "meta-llama/Llama-3.1-8B",
                "engine_kwargs": {"tensor_parallel_size": 1},
                "kv_cache": {"num_gpu_blocks": 1001},
                "hardware": {"device_name": "toy", "device_total_memory_bytes": 24 * 2**30},
            }
        )
    )
    (folder / "hardware.json").write_text(
        json.dumps(
            {"link_bw": 10, "link_latency": 1000, "nodes": [{"instances": [{"npu_mem": {"mem_size": 24}}]}]}
        )
    )
    return folder


def attention_shapes():
    contexts = (64, 256, 1024, 4096)
    yield from ((0, 0, n, k) for n in (1, 2, 8, 32) for k in contexts)
    for c in (16, 64, 256, 1024):
        for p in (0, 256, 1024):
            yield (c, p, 0, 0)
            yield from ((c, p, n, k) for n in (16, 32) for k in contexts)


def attention_us(c, p, n, k):
    prefill = 1e-4 * c * (c + 2 * p)
    decode = 2e-3 * n * k
    joint = 2 * decode + 1e-3 * n * c if c else decode
    return 5 + prefill + (joint if n else 0)


def test_a_run_of_known_laws_is_recovered(run):
    profile = build_from_run(run)
    assert profile.kv_blocks == 1000  # one block is vLLM's null block
    assert profile.overhead_us == pytest.approx(LAYERS * attention_us(16, 0, 0, 0), abs=0.01)
    per_token = LAYERS * (3 + 2 + 6 + 4 + 2 * 0.5)
    fixed = LAYERS * 10 * 6
    assert float(profile.linear(np.array(100))) == pytest.approx(fixed + 100 * per_token, rel=1e-4)
    assert float(profile.head(np.array(100))) == pytest.approx(300)
    assert profile.mixed_launch_us == pytest.approx(LAYERS * 1e-3, rel=1e-3)
    assert profile.decode_skew is not None
    assert profile.decode_skew.us == pytest.approx([LAYERS * 0.01] * 2, rel=1e-3)
    costs = ReferenceCosts(cost_tables([profile], 2048, 64))
    contexts, chunks = [1024] * 32, [(256, 1024)]
    expected = fixed + 288 * per_token + 100 + 2 * 33 + LAYERS * attention_us(256, 1024, 32, 1024)
    assert costs.iteration_ps(0, contexts, chunks) / 1e6 == pytest.approx(expected, rel=1e-3)
    alone = fixed + 32 * per_token + 100 + 2 * 32 + LAYERS * (attention_us(0, 0, 32, 1024) + 0.01 * 31)
    assert costs.iteration_ps(0, [1024] * 31 + [1056], []) / 1e6 == pytest.approx(alone, rel=1e-2)


def test_tensor_parallel_adds_ring_all_reduces(run):
    engine = json.loads((run / "engine.json").read_text())
    engine["engine_kwargs"]["tensor_parallel_size"] = 2
    (run / "engine.json").write_text(json.dumps(engine))
    profile = build_from_run(run)
    assert profile.tensor_parallel == 2
    # A ring of two: 2 messages of 1 us, and the whole activation over 10 GB/s; 64 of them.
    us = 64 * (2 * 1.0 + 100 * 4096 * 2 / 10e9 * 1e6)
    assert float(profile.collective(np.array(100))) == pytest.approx(us, rel=1e-3)


def test_a_config_json_makes_another_model_known(run):
    config = {
        "hidden_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "vocab_size": 1000,
    }
    (run / "config.json").write_text(json.dumps(config))
    model = build_from_run(run).model
    assert (model.head_dim, model.kv_bytes_per_token) == (64, 2 * 4 * 4 * 64 * 2)
    layer = 2 * 1024 * 20 * 64 + 3 * 1024 * 2048
    assert model.parameters == 4 * layer + 2 * 1000 * 1024
    del config["vocab_size"]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="vocab_size"):
        build_from_run(run)


@pytest.mark.parametrize(
    ("file", "old", "new", "field"),
    [
        ("engine.json", "meta-llama/Llama-3.1-8B", "gpt-5", "model"),
        (
            "engine.json",
            '"tensor_parallel_size": 1',
            '"tensor_parallel_size": 0',
            "engine_kwargs.tensor_parallel_size",
        ),
        ("engine.json", "1001", '"many"', "kv_cache.num_gpu_blocks"),
        ("engine.json", str(24 * 2**30), "-1", "hardware.device_total_memory_bytes"),
        ("engine.json", "{", "", "file"),
        ("kernels/dense.csv", "time_us", "micros", "time_us"),
        ("kernels/dense.csv", "o_proj", "oh_proj", "layer"),
        ("kernels/dense.csv", "qkv_proj,1,13.0", "qkv_proj,1,nan", "time_us, row 1"),
        ("kernels/dense.csv", "qkv_proj,1,13.0", "qkv_proj,1,-13.0", "time_us, row 1"),
        ("kernels/dense.csv", "qkv_proj,1,13.0", "qkv_proj,1,fast", "time_us"),
        ("kernels/per_sequence.csv", "lm_head", "head", "layer"),
        ("kernels/attention.csv", "n_decode", "decodes", "n_decode"),
        ("kernels/skew.csv", "t_skew_us", "t", "t_skew_us"),
    ],
)
def test_a_bad_run_is_named(run, file, old, new, field):
    path = run / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError) as caught:
        build_from_run(run)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("old", "new"),
    [('"mem_size": 24', '"mem_size": "24"'), ('"mem_size"', '"size"'), ("[{", "{"), ("10", "-10")],
)
def test_bad_hardware_is_named(run, old, new):
    engine = json.loads((run / "engine.json").read_text())
    del engine["hardware"]
    engine["engine_kwargs"]["tensor_parallel_size"] = 2
    (run / "engine.json").write_text(json.dumps(engine))
    path = run / "hardware.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=r"hardware\.json"):
        build_from_run(run)


@pytest.mark.parametrize("file", ["engine.json", "kernels/dense.csv", "kernels/attention.csv"])
def test_a_missing_file_is_named(run, file):
    (run / file).unlink()
    with pytest.raises(InputError, match=Path(file).name):
        build_from_run(run)


def test_without_skew_there_is_none(run):
    (run / "kernels" / "skew.csv").unlink()
    profile = build_from_run(run)
    assert profile.decode_skew is None
    assert profile.mixed_skew is None


def test_gemm_between_and_beyond_measured_shapes():
    rows = [(m, n, k, m + n * k / 1e3) for m in (1, 8) for n in (1000, 3000) for k in (1000, 2000)]
    gemm = Gemm(np.asarray(rows, dtype=float))
    assert gemm(2000, 1500).tolist() == pytest.approx([3001, 3008])
    assert gemm(6000, 1000)[0] == pytest.approx(2 * 3001)  # beyond the table proportional


@pytest.fixture
def kernel_folder(tmp_path):
    """Kernel tables of one system with costs of round numbers."""
    sizes = (1, 64, 1024, 8192)
    shapes = [(n, k) for n in (1024, 65536) for k in (1024, 16384)]
    gemm = [{"m": m, "n": n, "k": k, "gemm_dtype": "bfloat16"} for m in sizes for n, k in shapes]
    common = {"num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "kv_cache_dtype": "bfloat16"}
    prefill = [
        {"batch_size": b, "isl": s, "step": 0, **common} for b in (1, 4) for s in (16, 256, 4096, 16384)
    ]
    decode = [{"batch_size": b, "step": s, **common} for b in (1, 16) for s in (63, 255, 1023, 4095)]
    for name, rows in (("gemm", gemm), ("context_attention", prefill), ("generation_attention", decode)):
        for i, row in enumerate(rows):
            row |= {"system": "l40s", "latency_ms": 0.02 + 1e-4 * (i + 1), "window_size": None}
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    return tmp_path


def test_kernel_tables_make_a_profile(kernel_folder):
    profile = build_from_kernels(kernel_folder, system="l40s", model="Llama-3.1-8B")
    assert profile.name == "l40s-llama-3.1-8b"
    assert profile.collective is None
    assert (profile.token_budget, profile.max_seqs) == (2048, 256)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"system": "tpu", "model": "llama-3.1-8b"}, "system"),
        ({"system": "h100_sxm", "model": "llama-3.1-8b"}, "system"),
        ({"system": "l40s", "model": "gpt-5"}, "model"),
        ({"system": "l40s", "model": "llama-3.1-8b", "tp": 3}, "tp"),
        ({"system": "l40s", "model": "llama-3.1-8b", "tp": 2}, "system"),
        ({"system": "l40s", "model": "llama-3.1-70b"}, "system"),
    ],
)
def test_what_the_kernels_cannot_answer_is_named(kernel_folder, asked, field):
    with pytest.raises(InputError) as caught:
        build_from_kernels(kernel_folder, **asked)
    assert caught.value.field == field


def test_a_missing_kernel_table_is_named(kernel_folder):
    (kernel_folder / "gemm.parquet").unlink()
    with pytest.raises(InputError, match=r"gemm\.parquet"):
        build_from_kernels(kernel_folder, system="l40s", model="llama-3.1-8b")


def test_llumnix_steps_and_prefills():
    costs = ReferenceCosts(cost_tables([build_llumnix()], 8192, 64))
    steps = [costs.iteration_ps(0, [n] * (8192 // n), []) / 1e9 for n in LENGTHS.tolist()]
    prefills = [costs.iteration_ps(0, [], [(n, 0)]) / 1e9 for n in LENGTHS.tolist()]
    assert steps == pytest.approx(DECODE_MS.tolist(), rel=0.03)
    assert prefills == pytest.approx(PREFILL_MS.tolist(), rel=0.05)


def test_relative_error_by_hand():
    error = relative_error(np.array([1.1, 0.8, 1.0]), np.ones(3))
    assert (error.shapes, error.median_percent, error.max_percent) == (3, 10.0, 20.0)


def test_left_out_points_are_predicted_from_the_rest():
    predicted, measured = left_out(np.array([0, 1, 2, 3, 4]), np.array([0.0, 5.0, 4.0, 5.0, 8.0]))
    assert predicted.tolist() == [2.0, 6.0]
    assert measured.tolist() == [5.0, 5.0]


def test_fitting_helpers_by_hand():
    assert power_law(np.array([1, 2]), np.array([3.0, 12.0]), np.array([4])).tolist() == pytest.approx([48])
    at, us = widened(np.array([1, 50, 100]), np.array([0.0, 50.0, 100.0]), 200)
    assert (at[-1], us[-1]) == (200, pytest.approx(200))
    assert between(np.array([16, 20, 64]), 100).tolist() == [16, 20, 36, 64, 91, 128]
    rows, columns, table = grid(
        np.array([1, 1, 2, 2, 3]), np.array([0, 4, 0, 8, 0]), np.array([1, 3, 2, 10, 9.0])
    )
    assert (rows.tolist(), columns.tolist()) == ([1, 2], [0, 4, 8])
    assert table.tolist() == [[1, 3, 5], [2, 6, 10]]


@needs_shared
def test_shipped_profiles_and_their_errors_are_reproducible():
    built = {profile.name: profile for profile in build_shipped(SHARED)}
    assert set(built) == set(profile_names())
    for name, profile in built.items():
        assert profile == load_profile(name), name


@needs_shared
def test_composed_iterations_stay_close_to_the_oracle():
    for name in profile_names():
        errors = load_profile(name).provenance.held_out
        for part, error in errors.items():
            if part.startswith("composed"):
                assert error.median_percent < 5, (name, part)


@needs_shared
def test_a_run_under_another_name_builds_the_same_profile(tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(SHARED / "fidelity" / "rtx4090_llama8b", copy, copy_function=shutil.copyfile)
    profile = build_from_run(copy)
    assert profile.name == "elsewhere"
    assert profile.linear == load_profile("rtx4090-llama-3.1-8b").linear
