"""A small Llama with random weights and a tokenizer of its own, from a seed; nothing is downloaded.

    python tiny_model.py FOLDER

Stands alone and needs numpy, safetensors and tokenizers, because it is run by the interpreter that has vLLM.
The folder is what `--model` takes: config.json, model.safetensors (2.9 M parameters, float32), tokenizer.json
(byte-level BPE, trained on made-up words) and tokenizer_config.json with a chat template.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

SEED = 0
END = "<|end|>"
VOCABULARY, POSITIONS = 1024, 4096
LAYERS, HIDDEN, WIDE, HEADS, KV_HEADS, HEAD_DIM = 4, 256, 512, 4, 2, 64
SYLLABLES = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
WORDS, SENTENCES = 400, 2000
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def build(folder: Path) -> None:
    """Write the model; the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    tokenizer(rng).save(str(folder / "tokenizer.json"))
    save_file(weights(rng), folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", config()), ("tokenizer_config", tokenizer_config())):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def config() -> dict:
    """The fields of a Hugging Face Llama config."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }


def tokenizer_config() -> dict:
    """What transformers needs beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": POSITIONS,
        "bos_token": END,
        "eos_token": END,
        "chat_template": CHAT,
    }


def tokenizer(rng: np.random.Generator) -> Tokenizer:
    """Byte-level BPE over sentences of made-up words whose frequencies fall as Zipf's law has it."""
    words = ["".join(rng.choice(SYLLABLES, size=rng.integers(1, 5))) for _ in range(WORDS)]
    odds = 1 / np.arange(1, WORDS + 1)
    sentences = (" ".join(rng.choice(words, size=12, p=odds / odds.sum())) for _ in range(SENTENCES))
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    alphabet = sorted(ByteLevel.alphabet())
    made.train_from_iterator(
        sentences,
        BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made


def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Normal weights; `gain` is how much a matrix amplifies.

    With gains of 1 greedy answers soon repeat a few tokens, and a lost one would go unnoticed. Sharp
    attention that outweighs the rest makes them depend on the whole context; a wide head keeps the two best
    tokens apart.
    """

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return rng.normal(0.0, gain * columns**-0.5, (rows, columns)).astype(np.float32)

    parts = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN, 3.0),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN, 3.0),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM, 3.0),
        "mlp.gate_proj": (WIDE, HIDDEN),
        "mlp.up_proj": (WIDE, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDE, 0.3),
    }
    ones = np.ones(HIDDEN, np.float32)
    made = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "model.norm.weight": ones}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        made |= {f"{at}.{name}.weight": matrix(*part) for name, part in parts.items()}
        made |= {f"{at}.{name}.weight": ones for name in ("input_layernorm", "post_attention_layernorm")}
    made["lm_head.weight"] = matrix(VOCABULARY, HIDDEN, 4.0)
    return made


if __name__ == "__main__":
    build(Path(sys.argv[1]))
