import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_1samp, ks_2samp, spearmanr

from servegym.envs.workloads import GENERATORS, generate, load
from servegym.envs.workloads.fits import fit
from servegym.errors import InputError

FITTED = ("azure2023_conv", "azure2023_code", "servegen_general", "servegen_reason", "arxiv_summarization")
SPECS = [*(name for name, g in GENERATORS.items() if not g.form), "llumnix:128-1024:cv2.5", "fixed:64-8"]
SPECS += ["weka_agentic", "weka_agentic:60000", "flood:azure2023_conv+arxiv_summarization:x4"]


@pytest.mark.parametrize("name", [*FITTED, "mooncake_conversation"])
def test_lengths_have_the_published_means_and_rank_correlation(name):
    good = fit(name)["goodness"]  # itself one finite sample of heavy tails
    w = generate(name, 100_000, seed=1)
    assert w.output_tokens.mean() == pytest.approx(good["mean_output"]["generated"], rel=0.05)
    assert w.prompt_tokens.mean() == pytest.approx(good["mean_prompt"]["generated"], rel=0.08)
    if name != "mooncake_conversation":  # its prompts come from sessions, not from the copula alone
        rank = spearmanr(w.prompt_tokens, w.output_tokens).statistic
        assert rank == pytest.approx(good["spearman"]["generated"], abs=0.02)


@pytest.mark.parametrize(
    "name", ["azure2023_conv", "mooncake_conversation", "servegen_general", "servegen_reason"]
)
def test_arrivals_have_the_published_burstiness(name):
    """CV of the gaps and variance-to-mean ratio of counts, over windows as long as the fit's."""
    good, rate = fit(name)["goodness"], fit(name)["arrival"]["rate_rps"]
    span_s = 21_600 if name.startswith("servegen") else 2_100
    runs = [generate(name, int(rate * span_s), seed=seed).arrived_at_s for seed in range(8)]
    assert np.mean([len(a) / a[-1] for a in runs]) == pytest.approx(rate, rel=0.15)
    assert np.mean([cv(a) for a in runs]) == pytest.approx(good["cv"]["generated"], rel=0.08)
    for bin_s in (1, 10):
        got = np.mean([dispersion(a, bin_s) for a in runs])
        assert got == pytest.approx(good[f"idc_{bin_s}s"]["generated"], rel=0.25)


def test_code_completion_is_on_and_off_in_batches():
    good = fit("azure2023_code")["goodness"]
    runs = [generate("azure2023_code", 6_500, seed=seed).arrived_at_s for seed in range(12)]
    assert np.mean([dispersion(a, 1) for a in runs]) == pytest.approx(good["idc_1s"]["generated"], rel=0.35)
    assert np.mean([cv(a) for a in runs]) > 6
    gaps = np.concatenate([np.diff(a) for a in runs])
    assert (gaps < 0.05).mean() > 0.3  # batches
    assert gaps.max() > 60  # OFF periods


def test_conversations_continue_and_share_as_published():
    f = fit("mooncake_conversation")
    w = generate("mooncake_conversation", 6_848)
    assert (w.turn > 0).mean() == pytest.approx(f["prefix"]["continue_share"], abs=0.03)
    assert len(set(w.prefix_ids[w.prefix_offsets[:-1]])) == 1  # the common first block
    assert ideal_hit(w) == pytest.approx(f["goodness"]["ideal_block_hit"]["trace"], abs=0.03)
    assert (w.after == -1).all()


def test_agents_have_the_published_sessions():
    f = fit("weka_agentic")
    w = generate("weka_agentic", 29_000)
    good = f["goodness"]
    assert w.output_tokens.mean() == pytest.approx(good["mean_output"]["generated"], rel=0.06)
    assert w.prompt_tokens.mean() == pytest.approx(good["mean_prompt"]["generated"], rel=0.12)
    assert ideal_hit(w) == pytest.approx(good["block_hit"]["trace"], abs=0.02)
    gaps = w.gap_s[w.after >= 0]
    tool, user = good["gap_median_after_tool_call_s"], good["gap_median_after_end_of_turn_s"]
    assert tool["trace"] < np.median(gaps) < user["trace"]
    assert w.rate_rps == pytest.approx(1.0, rel=0.01)
    shrunk = np.flatnonzero((w.after >= 0) & (w.prompt_tokens < w.prompt_tokens[w.after]))
    assert 0.004 < len(shrunk) / len(w) < 0.016  # 0.0088 in the trace
    for row in shrunk:
        now, last = (w.prefix_ids[w.prefix_offsets[r] : w.prefix_offsets[r + 1]] for r in (row, w.after[row]))
        assert not np.intersect1d(now[25:], last).size  # compaction keeps the system prompt at most


def test_agents_of_a_smaller_context_window():
    whole, small = (generate(name, 4_000, seed=2) for name in ("weka_agentic", "weka_agentic:60000"))
    assert small.prompt_tokens.max() == 60_000 < np.median(whole.prompt_tokens)
    assert small.output_tokens.mean() == pytest.approx(whole.output_tokens.mean(), rel=0.1)
    shrunk = [((w.after >= 0) & (w.prompt_tokens < w.prompt_tokens[w.after])).sum() for w in (whole, small)]
    assert shrunk[1] > 2 * shrunk[0]


@pytest.mark.parametrize("rate", [2.0, 50.0])
def test_a_flood_is_one_tenant_for_a_fifth_of_the_time(rate):
    spec = "flood:azure2023_conv+arxiv_summarization:x4"
    runs = [generate(spec, 4_000, seed=seed, rate_rps=rate) for seed in range(4)]
    for w in runs:
        flood = w.class_id == w.class_names.index("flood")
        assert w.class_names == (fit("azure2023_conv")["class"], "flood")
        assert set(w.tenant[flood]) == {0} and set(w.tenant[~flood]) == set(range(1, 17))
        at = w.arrived_at_s[flood] / w.arrived_at_s[~flood][-1]
        assert at[0] >= 0.2 and at[-1] <= 0.7
        assert at[-1] - at[0] == pytest.approx(0.2, abs=0.005)
        # 4 times the mean steady rate for 0.2 of the time: 0.8 requests for each steady one
        assert flood.sum() == pytest.approx(0.8 * (~flood).sum(), rel=0.001)
        papers, chats = w.prompt_tokens[flood], w.prompt_tokens[~flood]
        assert np.median(papers) > 2 * np.median(chats)
    assert np.mean([w.rate_rps for w in runs]) == pytest.approx(rate, rel=0.4)  # slow swings of the fit
    assert len({w.arrived_at_s[w.class_id == 1][0] / w.arrived_at_s[-1] for w in runs}) == len(runs)
    first = np.bincount(runs[0].tenant)[1:]
    assert first[0] > 1.5 * first[1] > first[-1]


def test_chats_have_the_published_turns():
    good = fit("sharegpt_turns")["goodness"]
    w = generate("sharegpt_turns", 20_000, rate_rps=0.05)  # slow, so that few sessions are cut
    assert w.output_tokens.mean() == pytest.approx(good["mean_output"]["generated"], rel=0.05)
    assert len(w) / (w.turn == 0).sum() == pytest.approx(good["mean_turns"]["generated"], rel=0.07)
    first = w.prompt_tokens[w.turn == 0]
    assert first.mean() == pytest.approx(157.9, rel=0.15)  # mean of first_user_tokens in the fit
    grown = w.after >= 0
    said = w.prompt_tokens[w.after[grown]] + w.output_tokens[w.after[grown]]
    assert (w.prompt_tokens[grown] > said).all()


@pytest.mark.parametrize(("mean", "alpha"), [(128, 2.0), (256, 1.5), (512, 1.15), (1024, 1.0005)])
def test_llumnix_lengths_follow_the_power_law(mean, alpha):
    w = generate(f"llumnix:{mean}-{mean}:cv4", 60_000, rate_rps=26, seed=3)
    rank = np.arange(1, 2 * mean)
    p = rank**-alpha / (rank**-alpha).sum()
    length = np.minimum(np.ceil(rank * mean / (p * rank).sum()), 6144)
    assert np.isin(w.output_tokens, length).all()
    expected, spread = (p * length).sum(), np.sqrt((p * length**2).sum())
    assert abs(w.output_tokens.mean() - expected) < 4 * spread / np.sqrt(len(w))
    assert cv(w.arrived_at_s) == pytest.approx(4, rel=0.05)
    assert w.rate_rps == pytest.approx(26, rel=0.08)


def test_fixed_lengths_arrive_as_poisson():
    w = generate("fixed:1024-256", 20_000, rate_rps=16)
    assert set(w.prompt_tokens) == {1024} and set(w.output_tokens) == {256}
    gaps = np.diff(w.arrived_at_s)
    assert ks_1samp(gaps, lambda x: 1 - np.exp(-16 * x)).pvalue > 0.01


@pytest.mark.parametrize("spec", SPECS)
def test_seed_decides(spec):
    a, b, c = (generate(spec, 300, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(a.arrived_at_s, b.arrived_at_s) and np.array_equal(a.prompt_tokens, b.prompt_tokens)
    assert not np.array_equal(a.arrived_at_s, c.arrived_at_s)


@pytest.mark.parametrize("spec", ["azure2023_conv", "azure2023_code", "mooncake_conversation"])
def test_rate_compresses_time_and_nothing_else(spec):
    a, b = generate(spec, 400, seed=2), generate(spec, 400, seed=2, rate_rps=100.0)
    factor = fit(spec)["arrival"]["rate_rps"] / 100
    np.testing.assert_allclose(b.arrived_at_s, a.arrived_at_s * factor)
    assert np.array_equal(a.prompt_tokens, b.prompt_tokens) and np.array_equal(a.prefix_ids, b.prefix_ids)


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    requests=st.integers(1, 120),
    seed=st.integers(0, 2**32),
    rate=st.none() | st.floats(0.01, 1000),
)
def test_every_workload_keeps_the_contract(spec, requests, seed, rate):
    w = generate(spec, requests, seed=seed, rate_rps=rate)  # make_workload validates it
    assert len(w) == requests
    check_chains(w)


def check_chains(w):
    """Followers stay in their session; ids are dense; an id names one position and one id before it."""
    follows = w.after >= 0
    assert (w.session[follows] == w.session[w.after[follows]]).all()
    assert (w.turn[follows] == w.turn[w.after[follows]] + 1).all()
    if len(w.prefix_ids) == 0:
        return
    assert set(w.prefix_ids) == set(range(w.prefix_ids.max() + 1))
    before: dict[int, int] = {}
    for row in range(len(w)):
        ids = w.prefix_ids[w.prefix_offsets[row] : w.prefix_offsets[row + 1]].tolist()
        assert len(ids) >= w.prompt_tokens[row] // w.prefix_block_tokens
        for last, block in zip([-1, *ids], ids, strict=False):
            assert before.setdefault(block, last) == last


def test_numpy_numbers_are_numbers():
    w = generate("fixed:8-8", np.int64(3), rate_rps=np.float32(2), seed=np.uint32(1))
    assert len(w) == 3


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"name": "nope"}, "name"),
        ({"name": "azure2023_conv:2"}, "name"),
        ({"name": "llumnix:1-2"}, "name"),
        ({"name": "llumnix:128-128:cv0"}, "name"),
        ({"name": "weka_agentic:0"}, "name"),
        ({"name": "weka_agentic:many"}, "name"),
        ({"name": "flood:azure2023_conv"}, "name"),
        ({"name": "flood:azure2023_conv+weka_agentic:x4"}, "name"),
        ({"name": "flood:azure2023_conv+arxiv_summarization:x0"}, "name"),
        ({"name": "fixed:0-1"}, "name"),
        ({"name": "fixed:9999999-1"}, "prompt_tokens, row 0"),
        ({"requests": 0}, "requests"),
        ({"requests": 2.5}, "requests"),
        ({"rate_rps": float("nan")}, "rate_rps"),
        ({"rate_rps": 0.0}, "rate_rps"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_arguments_are_refused(kwargs, field):
    arguments = {"name": "azure2023_conv", "requests": 5} | kwargs
    with pytest.raises(InputError) as error:
        generate(**arguments)
    assert error.value.field == field


def test_shipped_numbers_are_those_of_the_fit(shared_traces):
    ours = fit("azure2023_conv")
    theirs = json.loads((shared_traces / "fits.json").read_text())["traces"]["azure2023_conv"]
    assert ours["lengths"]["rho"] == theirs["lengths"]["rho"]
    assert ours["lengths"]["prompt"]["quantiles"] == theirs["lengths"]["prompt"]["quantiles"]["x"]
    assert ours["arrival"] == theirs["arrival"]["params"]


@pytest.mark.parametrize("name", FITTED)
def test_lengths_are_near_the_trace_they_were_fitted_on(name, shared_traces):
    trace = load(shared_traces / "train" / f"{name}.parquet", rate_rps=1.0)
    w = generate(name, 20_000, seed=4)
    good = fit(name)["goodness"]
    assert ks_2samp(w.prompt_tokens, trace.prompt_tokens).statistic < good["ks_prompt"] + 0.02
    assert ks_2samp(w.output_tokens, trace.output_tokens).statistic < good["ks_output"] + 0.02


def test_sessions_are_near_the_traces_they_were_fitted_on(shared_traces):
    agents = load(shared_traces / "train" / "weka_agentic.parquet", rate_rps=1.0, zero_output="drop")
    w = generate("weka_agentic", 30_000, seed=4)
    good = fit("weka_agentic")["goodness"]
    assert ks_2samp(w.prompt_tokens, agents.prompt_tokens).statistic < good["ks_prompt"] + 0.04
    assert ks_2samp(w.output_tokens, agents.output_tokens).statistic < good["ks_output"] + 0.02
    gaps = [x.gap_s[x.after >= 0] for x in (w, agents)]
    assert ks_2samp(*gaps).statistic < 0.1  # the recorded ones are whole seconds

    chats = load(shared_traces / "train" / "sharegpt_turns.parquet", rate_rps=1.0)
    w = generate("sharegpt_turns", 30_000, seed=4)
    good = fit("sharegpt_turns")["goodness"]
    assert ks_2samp(w.prompt_tokens, chats.prompt_tokens).statistic < good["ks_prompt"] + 0.02
    assert ks_2samp(w.output_tokens, chats.output_tokens).statistic < good["ks_output"] + 0.02


def cv(arrived):
    gaps = np.diff(arrived)
    return gaps.std() / gaps.mean()


def dispersion(arrived, bin_s):
    counts = np.bincount((arrived // bin_s).astype(int))[:-1]
    return counts.var() / counts.mean()


def ideal_hit(w):
    """Share of prompt blocks found in an unlimited cache."""
    seen = np.zeros(w.prefix_ids.max() + 1, bool)
    hits = asked = 0
    for row in range(len(w)):
        ids = w.prefix_ids[w.prefix_offsets[row] : w.prefix_offsets[row + 1]]
        known = seen[ids[: w.prompt_tokens[row] // w.prefix_block_tokens]]
        hits += len(known) if known.all() else int(known.argmin())
        asked += len(known)
        seen[ids] = True
    return hits / asked
