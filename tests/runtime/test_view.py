"""The router's book, arrivals, and settings."""

import math

import pytest

from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.spec import InstanceSpec, parse_cluster
from servegym.envs.cluster.world import build_world
from servegym.envs.scenario import Scenario
from servegym.errors import InputError
from servegym.runtime.view import Arrivals, ClusterView, InstanceSettings, InstanceView, RequestView

SUMS = ("prompt_tokens", "streamed_tokens", "predicted_tokens", "prefill_tokens", "urgent")


def view(count: int = 2, **fields) -> ClusterView:
    settings = InstanceSettings.of("a100-llama-3.1-8b", block_tokens=16)
    return ClusterView([InstanceView(settings) for _ in range(count)], **fields)


def sums(cluster: ClusterView, i: int) -> dict[str, int]:
    return {name: getattr(cluster.instances[i], name) for name in SUMS}


def test_the_book_of_a_request_from_arrival_to_end():
    cluster = view(least_urgent=1)
    cluster.instances[0].cached = {1, 2, 4}
    request = RequestView("a", 1.0, 70, 9, priority=0, prefix=(1, 2, 3, 4))
    cluster.arrived(request)
    cluster.dispatched(request, 0)
    # Two blocks of 16 hit; the fourth stands behind a gap.
    expected = {
        "prompt_tokens": 70,
        "streamed_tokens": 0,
        "predicted_tokens": 9,
        "prefill_tokens": 38,
        "urgent": 1,
    }
    assert sums(cluster, 0) == expected
    cluster.moved(request, 1)
    assert sums(cluster, 0) == dict.fromkeys(SUMS, 0)
    assert sums(cluster, 1) == expected | {"prefill_tokens": 70}
    cluster.streamed(request, 0)  # a chunk without a token
    assert cluster.instances[1].prefill_tokens == 70
    cluster.streamed(request)
    cluster.streamed(request, 3)
    assert sums(cluster, 1) == expected | {"prefill_tokens": 0, "streamed_tokens": 4}
    cluster.moved(request, 0)
    assert sums(cluster, 0) == expected | {"prefill_tokens": 0, "streamed_tokens": 4}
    for _ in range(2):
        cluster.finished(request)
        assert sums(cluster, 0) == dict.fromkeys(SUMS, 0)
    assert not any(instance.inflight for instance in cluster.instances)


def test_a_lost_request_goes_out_again():
    cluster = view()
    request = RequestView("a", 0.0, 50, 5)
    cluster.arrived(request)
    cluster.dispatched(request, 0)
    cluster.streamed(request, 2)
    cluster.finished(request)
    cluster.dispatched(request, 1)
    assert cluster.instances[1].streamed_tokens == 2 and cluster.instances[0].streamed_tokens == 0
    cluster.finished(request)
    with pytest.raises(InputError, match="not in flight"):
        cluster.moved(request, 0)
    cluster.finished(RequestView("never sent", 0.0, 1, 1))


def test_a_second_request_of_the_same_key_does_not_strike_out_the_first():
    cluster = view()
    first, second = RequestView("a", 0.0, 50, 5), RequestView("a", 0.0, 60, 5)
    cluster.dispatched(first, 0)
    second.instance = 0
    cluster.finished(second)
    assert cluster.instances[0].inflight == {"a": first}


def test_a_full_prompt_in_the_cache_still_computes_a_token():
    cluster = view()
    cluster.instances[0].cached = {1, 2}
    request = RequestView("a", 0.0, 32, 5, prefix=(1, 2))
    cluster.dispatched(request, 0)
    assert request.booked_tokens == 16


def test_arrivals():
    arrivals = Arrivals()
    for at in (0.5, 0.7, 3.2, 19.9):
        arrivals.add(at, 100)
    assert arrivals.gap_s == pytest.approx(16.7)
    now = 20.1
    rate = sum(math.exp(-(now - at) / 10.0) / 10.0 for at in (0.5, 0.7, 3.2, 19.9))
    assert arrivals.rates(now) == (pytest.approx(rate), pytest.approx(100 * rate))
    assert arrivals.history(now) == [0.0] * 14 + [1.0, 0.0]  # seconds 5 to 20; of 0 and 3 nothing is left
    assert arrivals.history(1000.0) == [0.0] * 16


def test_settings_are_the_models():
    fleet, engine = "1xa100-llama-3.1-8b+1xl40s-llama-3.1-8b", {"swap_gib": 2}
    scenario = Scenario(clusters=(fleet,), requests=60, engine=engine)
    world = build_world(make_episodes(scenario, 1, 0), 1, scenario=scenario)
    for i, spec in enumerate(parse_cluster(fleet, **engine).instances):
        mine, model = InstanceSettings.of(spec), world.setting[0, i]
        for name, value in mine.setting._asdict().items():
            assert value == model[name], name
        assert mine.prefill_tokens_per_s == model["prefill_tokens_per_s"]
        assert mine.decode_tokens_per_s == model["decode_tokens_per_s"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: InstanceSettings.of("a100-llama-3.1-8b", blocks=3), "blocks"),
        (lambda: InstanceSettings.of("a100-llama-3.1-8b", profile="other"), "profile"),
        (lambda: InstanceSettings.of("nowhere"), "nowhere"),
        (lambda: InstanceSettings.of("a100-llama-3.1-8b", max_seqs=0), "max_seqs"),
        (lambda: InstanceSettings.of(InstanceSpec("a100-llama-3.1-8b"), kv_blocks=3), "spec"),
        (lambda: ClusterView([]), "instances"),
    ],
)
def test_impossible_settings_are_refused(make, told):
    with pytest.raises(InputError, match=told):
        make()
