"""What workloads there are and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from servegym.envs.workloads.formats import READERS
from servegym.envs.workloads.generators import GENERATORS, generate
from servegym.envs.workloads.traces import load
from servegym.envs.workloads.workload import Workload
from servegym.errors import InputError

DEFAULT_WORKLOAD = "azure2023_conv"
DEFAULT_REQUESTS = 10_000


@dataclass(frozen=True)
class Entry:
    """A row of the catalogue.

    Attributes:
        name: what `resolve` takes, or the file's name at its source.
        kind: "generator" (shipped, needs no file) or "trace" (a public file).
        about: one line for people.
        source, license: where it comes from.
        get: how to use it.
    """

    name: str
    kind: str
    about: str
    source: str
    license: str
    get: str


_AS_PUBLISHED = "download, then give its path"
_CONVERTED = "convert to the Parquet columns of servegym.envs.workloads.load, then give its path"
_TRACES = (
    Entry(
        "AzureLLMInferenceTrace_conv.csv, AzureLLMInferenceTrace_code.csv",
        "trace",
        "chat and code completion on Azure, 16 Nov 2023, one hour each",
        "https://github.com/Azure/AzurePublicDataset/tree/master/data",
        "CC-BY-4.0",
        _AS_PUBLISHED,
    ),
    Entry(
        "Azure LLM inference 2024, conv and code",
        "trace",
        "a week of chat and code completion on Azure, May 2024",
        "https://github.com/Azure/AzurePublicDataset/blob/master/AzureLLMInferenceDataset2024.md",
        "CC-BY-4.0",
        _AS_PUBLISHED,
    ),
    Entry(
        "conversation_trace.jsonl, toolagent_trace.jsonl",
        "trace",
        "long-context chat and tool use at Moonshot AI, one hour each, with prefix blocks",
        "https://github.com/kvcache-ai/Mooncake/tree/main/FAST25-release/traces",
        "Apache-2.0",
        _AS_PUBLISHED,
    ),
    Entry(
        "BurstGPT_1.csv, BurstGPT_2.csv, BurstGPT_3.csv",
        "trace",
        "months of a campus-wide ChatGPT and GPT-4 service; failed requests have no output",
        "https://github.com/HPMLL/BurstGPT/releases",
        "CC-BY-4.0",
        _AS_PUBLISHED,
    ),
    Entry(
        "ServeGen",
        "trace",
        "clients of Alibaba's model service: rates, inter-arrival laws and length histograms",
        "https://github.com/alibaba/ServeGen",
        "Apache-2.0",
        _CONVERTED,
    ),
    Entry(
        "kv-cache-tester",
        "trace",
        "coding-agent sessions with prefix blocks and tool-call gaps",
        "https://github.com/callanjfox/kv-cache-tester/tree/master/traces",
        "Apache-2.0",
        _CONVERTED,
    ),
    Entry(
        "ShareGPT_V3_unfiltered_cleaned_split",
        "trace",
        "conversations of ChatGPT users",
        "https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
        "Apache-2.0",
        _CONVERTED,
    ),
    Entry(
        "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
        "trace",
        "token counts of paper summarisation",
        "https://github.com/microsoft/vidur/tree/main/data/processed_traces",
        "MIT",
        _CONVERTED,
    ),
)


def catalogue() -> list[Entry]:
    """Every generator, then every public trace, with source, licence and how to get it."""
    generators = [
        Entry(g.name + g.form, "generator", g.about, g.source, g.license, "shipped, needs no file")
        for g in GENERATORS.values()
    ]
    return [*generators, *_TRACES]


def resolve(
    spec: str = DEFAULT_WORKLOAD,
    *,
    requests: int | None = None,
    rate_rps: float | None = None,
    seed: int = 0,
    zero_output: str = "refuse",
) -> Workload:
    """A workload by name or path.

    Args:
        spec: a generator's name, or the path of a trace (it has a trace's extension or a slash).
        requests: how many; None takes 10,000 of a generator and all of a trace.
        rate_rps: mean rate in requests/s; None takes the fitted or recorded one.
        seed: seed of all draws.
        zero_output: see `load`; ignored by generators.

    Raises:
        InputError: for a name that is not there (the error lists what is), or whatever is wrong inside.
    """
    if Path(spec).suffix.lower() in READERS or "/" in spec or Path(spec).exists():
        return load(spec, limit=requests, rate_rps=rate_rps, seed=seed, zero_output=zero_output)
    if spec.split(":")[0] not in GENERATORS:
        names = ", ".join(g.name + g.form for g in GENERATORS.values())
        raise InputError("workload", "name", spec, f"take one of {names}, or a {', '.join(READERS)} file")
    return generate(spec, DEFAULT_REQUESTS if requests is None else requests, rate_rps=rate_rps, seed=seed)
