"""The paged, chunked, batched forward pass beside a plain one; weights and configs from files."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from servegym.errors import InputError
from servegym.runtime.engine.batch import build_batch
from servegym.runtime.engine.config import config_names, load_config
from servegym.runtime.engine.memory import Memory, allocate_cache
from servegym.runtime.engine.model import Transformer, check_kernel, geometry, parameters, rope_tables
from servegym.runtime.engine.request import make_request

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "qwen3": {},
    "llama": {"model_type": "llama", "rope_scaling": LLAMA3},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4, "head_dim": None, "tie_word_embeddings": True},
}


def plain_logits(model, ids):
    """The whole sequence at once, a head at a time, with rotations as complex numbers."""
    c = model.config

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    half = c.head_dim // 2
    wave = torch.tensor([c.rope_theta ** (-k / half) for k in range(half)], dtype=torch.float64)
    if c.rope_scaling:
        s = c.rope_scaling
        for k, w in enumerate(wave.tolist()):
            length = 2 * math.pi / w
            if length > s.original_positions / s.low_freq_factor:
                wave[k] = w / s.factor
            elif length > s.original_positions / s.high_freq_factor:
                smooth = (s.original_positions / length - s.low_freq_factor) / (
                    s.high_freq_factor - s.low_freq_factor
                )
                wave[k] = (1 - smooth) * w / s.factor + smooth * w
    turn = torch.polar(
        torch.ones(len(ids), half, dtype=torch.float64), torch.arange(len(ids))[:, None] * wave
    )

    def rotated(x):
        z = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
        return torch.cat((z.real, z.imag), -1)

    x = model.embed[torch.tensor(ids)]
    for layer in model.layers:
        h = norm(x, layer["input_norm"])
        qkv = h @ layer["qkv"].T + layer.get("qkv_bias", 0.0)
        q, k, v = qkv.split([c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim], -1)
        q, k, v = (t.view(len(ids), -1, c.head_dim) for t in (q, k, v))
        if c.qk_norm:
            q, k = norm(q, layer["q_norm"]), norm(k, layer["k_norm"])
        q, k = rotated(q), rotated(k)
        heads = []
        for head in range(c.heads):
            shared = head * c.kv_heads // c.heads
            score = q[:, head] @ k[:, shared].T / c.head_dim**0.5
            later = torch.ones(len(ids), len(ids)).triu(1).bool()
            heads.append(score.masked_fill(later, -math.inf).softmax(-1) @ v[:, shared])
        x = x + torch.cat(heads, -1) @ layer["out"].T
        h = norm(x, layer["post_attention_norm"])
        gate, up = (h @ layer["gate_up"].T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ layer["down"].T
    return norm(x, model.norm) @ model.head.T


@pytest.mark.parametrize("family", FAMILIES)
def test_paged_and_chunked_equals_plain(write_config, family):
    """Three requests, one of them in chunks beside the decodes of the others, in scattered blocks."""
    model = Transformer(load_config(write_config(**FAMILIES[family])), dtype="float64")
    rng = np.random.default_rng(0)
    memory = Memory(60, 4, 0)
    memory.empty = rng.permutation(60).tolist()
    cache = allocate_cache(model.config, 60, 4, model.device, model.dtype)
    lengths = (13, 70, 45)
    requests = [make_request(k, rng.integers(331, size=n), 8) for k, n in enumerate(lengths)]
    for r in requests:
        r.ids[r.prompt :] = rng.integers(331, size=8)
    expected = [plain_logits(model, r.ids) for r in requests]

    def run(decodes, chunks):
        for r, new in [(r, 1) for r in decodes] + chunks:
            memory.grow(r, r.computed + new)
        logits = model.forward(build_batch(decodes, chunks, 4, model.device), cache)
        for got, (r, new) in zip(logits, [(r, 1) for r in decodes] + chunks, strict=True):
            r.computed += new
            torch.testing.assert_close(got, expected[r.number][r.computed - 1], rtol=1e-9, atol=1e-9)

    a, b, c = requests
    run([], [(a, 13), (b, 11)])
    run([a], [(b, 30)])
    run([a], [(b, 29), (c, 1)])
    run([a, b], [(c, 44)])
    for _ in range(5):
        run([c, a, b], [])


def test_llama3_scaling_keeps_fast_waves_and_stretches_slow_ones(write_config):
    config = {"model_type": "llama", "head_dim": 64, "rope_theta": 500000.0}
    plain = load_config(write_config(**config))
    scaled = load_config(write_config(**config, rope_parameters={**LLAMA3, "rope_theta": 500000.0}))
    cpu = torch.device("cpu")
    before, after = (rope_tables(c, cpu, torch.float64)[1][1, 0].asin() for c in (plain, scaled))
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[-1], before[-1] / 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_depend_on_the_whole_context(write_config, family):
    """Else token equality would say nothing of the KV cache."""
    model = Transformer(load_config(write_config(**FAMILIES[family])), dtype="float64")
    ids = np.random.default_rng(1).integers(331, size=(20, 120))
    changed = ids.copy()
    changed[:, :3] = (changed[:, :3] + 7) % 331
    tops = [[plain_logits(model, row)[-1].argmax().item() for row in x] for x in (ids, changed)]
    assert sum(a != b for a, b in zip(*tops, strict=True)) >= 3


def checkpoint(model):
    """The model's tensors under the names of a Hugging Face checkpoint."""
    tensors = {"model.rotary_emb.inv_freq": torch.zeros(3)}
    for p in parameters(model.config):
        index, _, field = p.name.rpartition(".")
        whole = model.layers[int(index)][field] if index else getattr(model, p.name)
        rows = [n for _, n in p.parts]
        tensors |= {
            name: part.contiguous() for (name, _), part in zip(p.parts, whole.split(rows), strict=True)
        }
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_safetensors_shards(write_config, family):
    folder = write_config(**FAMILIES[family])
    model = Transformer(load_config(folder), weights=5)
    tensors = checkpoint(model)
    names = sorted(tensors)
    assert "model.layers.1.self_attn.q_proj.weight" in names
    for k in range(2):
        save_file({n: tensors[n] for n in names[k::2]}, folder / f"model-{k}.safetensors")
    loaded = Transformer(load_config(folder), weights=folder)
    for mine, theirs in zip(model.layers, loaded.layers, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(model.head, loaded.head) and torch.equal(model.embed, loaded.embed)


def test_weights_that_do_not_fit_are_refused(write_config):
    folder = write_config()
    config = load_config(folder)
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        Transformer(config, weights=folder)
    tensors = checkpoint(Transformer(config))
    save_file({k: v for k, v in tensors.items() if "o_proj" not in k}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"o_proj.*missing, with 1 others"):
        Transformer(config, weights=folder)
    save_file({**tensors, "model.norm.weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model.norm.weight.*\(48,\)"):
        Transformer(config, weights=folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        Transformer(config, weights=folder)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
        ({"rope_parameters": "default"}, "rope_parameters"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ],
)
def test_bad_configs_are_refused(write_config, changes, field):
    with pytest.raises(InputError) as caught:
        load_config(write_config(**changes))
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_files_that_are_no_config_are_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError):
        load_config(tmp_path)


def test_unknown_names_devices_and_dtypes_are_refused(write_config):
    with pytest.raises(InputError, match=r"llama-3\.1-8b"):
        load_config("llama-9")
    config = load_config(write_config())
    for options in ({"dtype": "int4"}, {"device": "tpu"}):
        with pytest.raises(InputError):
            Transformer(config, **options)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "field"),
    [(64, "bfloat16", None), (16, "float32", None), (96, "float32", "head_dim"), (8, "float32", "head_dim"),
     (64, "float64", "dtype")],
)  # fmt: skip
def test_what_the_kernel_cannot_take_is_refused(write_config, head_dim, dtype, field):
    config = load_config(write_config(head_dim=head_dim))
    if field is None:
        check_kernel(config, dtype)
        return
    with pytest.raises(InputError) as caught:
        check_kernel(config, dtype)
    assert caught.value.field == field


def test_the_kernel_is_asked_before_weights_are_made_on_cuda_only(write_config, monkeypatch):
    config = load_config(write_config(head_dim=24))
    Transformer(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="head_dim"):
        Transformer(config, "cuda")


def test_shipped_configs_have_their_published_sizes():
    assert {"llama-3.1-8b", "qwen3-8b"} <= set(config_names())
    assert geometry(load_config("llama-3.1-8b"), 2).parameters == 8_030_261_248
    assert geometry(load_config("qwen3-8b"), 2).parameters == 8_190_735_360
    assert geometry(load_config("llama-3.1-8b"), 2).kv_bytes_per_token == 131_072
    assert json.dumps(load_config("qwen3-8b").raw)
