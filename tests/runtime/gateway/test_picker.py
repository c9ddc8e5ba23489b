import pytest

from servegym.runtime.decider import Decider
from servegym.runtime.gateway.asks import Ask
from servegym.runtime.gateway.books import Flight
from servegym.runtime.gateway.picker import NO_ENGINE, SHED, Picker
from servegym.runtime.gateway.readings import Reading
from servegym.runtime.gateway.settings import Settings

SETTINGS = Settings(engines=("http://127.0.0.1:1",), retries=2, shed_waiting=4, stale_s=2.0)
BUDGET_S = 5.0  # no test may depend on how busy the machine is


@pytest.fixture
def make_picker(make_books):
    def make(engines: int = 3, policy: str = "least_request", **settings) -> Picker:
        return Picker(make_books(engines, **settings), Decider(policy, None, BUDGET_S), SETTINGS)

    return make


def ask(**fields) -> Ask:
    return Ask(**{"prompt": b"x" * 400, **fields})


def test_the_policy_chooses_and_the_others_follow_by_requests_in_flight(make_picker):
    picker = make_picker(4)
    orders = [picker.pick(ask(), 1.0).order for _ in range(5)]
    assert [order[0] for order in orders] == [0, 1, 2, 3, 0]
    assert [len(order) for order in orders] == [3] * 5
    assert orders[4][1:] == [1, 2]
    assert picker.decision_s > 0
    assert picker.decider.counts["answered"] == 5


def test_only_engines_of_the_subset_are_picked(make_picker):
    picker = make_picker()
    for _ in range(4):
        flight = picker.pick(ask(), 1.0, ["127.0.0.1:3", "127.0.0.1:2", "10.0.0.1:1"])
        assert set(flight.order) == {1, 2}
    assert picker.pick(ask(), 1.0, []) is NO_ENGINE
    assert picker.pick(ask(), 1.0, ["10.0.0.1:1"]) is NO_ENGINE
    assert picker.able() == [0, 1, 2]
    assert picker.addresses([2, 0]) == "127.0.0.1:3,127.0.0.1:1"


def test_engines_that_are_down_are_not_picked(make_picker):
    picker = make_picker()
    books = picker.books
    books.down(books.engines[0])
    assert all(0 not in picker.pick(ask(), 1.0).order for _ in range(4))
    assert picker.any()[0] in (1, 2)
    for engine in books.engines:
        books.down(engine)
    assert picker.pick(ask(), 1.0) is NO_ENGINE
    assert picker.any() == []


def test_what_may_wait_is_shed_when_all_queues_are_long(make_picker):
    picker = make_picker()
    books = picker.books
    for engine in books.engines[:2]:
        books.read(engine, Reading(9.0, 5.0, 0.9, 0.0), 0.5)
    assert isinstance(picker.pick(ask(priority=1), 1.0), Flight)
    books.read(books.engines[2], Reading(9.0, 5.0, 0.9, 0.0), 0.5)
    assert picker.pick(ask(priority=1), 1.0) is SHED
    assert isinstance(picker.pick(ask(priority=0), 1.0), Flight)
    assert len(books.flights) == 2


def test_the_books_shed_before_a_scrape_shows_the_queue(make_picker):
    picker = make_picker(1, max_seqs=2)
    for _ in range(7):
        picker.pick(ask(), 1.0)
    assert picker.pick(ask(priority=1), 1.0) is SHED


def test_old_readings_leave_the_choice_to_the_fallback(make_picker):
    picker = make_picker(policy="round_robin")
    picker.pick(ask(), 1.9)
    picker.pick(ask(), 2.1)
    assert picker.decider.counts["stale"] == 1
    picker.books.read(picker.books.engines[0], Reading(0.0, 0.0, 0.0, 0.0), 2.5)
    picker.books.down(picker.books.engines[1])
    picker.books.down(picker.books.engines[2])
    picker.pick(ask(), 2.6)  # engines that are down may be unread
    assert picker.decider.counts["stale"] == 1


def test_a_prompt_that_no_engine_can_hold_goes_to_one_that_says_so(make_picker):
    picker = make_picker(2, kv_blocks=10)
    flight = picker.pick(ask(prompt=b"x" * 4000), 1.0)
    assert isinstance(flight, Flight)
    assert len(flight.order) == 2
