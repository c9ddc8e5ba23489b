import pytest

from servegym.runtime.gateway.asks import MEDIUM, Ask
from servegym.runtime.gateway.books import MOST_SESSIONS, Sessions
from servegym.runtime.gateway.readings import Load, Reading
from servegym.runtime.gateway.settings import Endpoint

PROMPT = b"x" * 4000


def sent(books, to=(0, 1), now=1.0, **ask):
    flight = books.arrived(Ask(**{"prompt": PROMPT, "streams": True, **ask}), now)
    books.dispatched(flight, list(to), now)
    return flight


def sums(books):
    return [
        (len(x.inflight), x.prompt_tokens, x.streamed_tokens, x.predicted_tokens, x.prefill_tokens)
        for x in books.view.instances
    ]


EMPTY = (0, 0, 0, 0, 0)


def test_a_watched_stream_from_pick_to_end(make_books):
    books = make_books()
    flight = sent(books)
    assert sums(books) == [(1, 1000, 0, 256, 1000), EMPTY, EMPTY]
    books.begun(flight, 200, "127.0.0.1:1", 1.5)
    flight.is_watched = True
    assert sums(books)[0] == (1, 1000, 1, 256, 0)
    books.tokens(flight, 3, 1.8)
    books.advance(9.0)  # what is watched is not estimated
    assert sums(books)[0] == (1, 1000, 4, 256, 0)
    books.ended(flight, 2.0)
    books.ended(flight, 2.0)
    books.tokens(flight, 3, 2.0)
    assert sums(books) == [EMPTY] * 3
    assert not books.flights
    assert books.lengths.output(Ask(b"")) == 4


def test_an_unwatched_stream_is_estimated_from_its_first_token_on(make_books):
    books = make_books()
    flight = sent(books, most_tokens=50)
    books.advance(5.0)
    assert flight.request.streamed_tokens == 0
    books.begun(flight, 200, None, 5.0)
    tpot = books.tpot_s(0)
    books.advance(5.0 + 10.5 * tpot)
    assert flight.request.streamed_tokens == pytest.approx(11, abs=1)
    books.advance(100.0)
    assert flight.request.streamed_tokens == 50


def test_an_answer_that_does_not_stream_counts_as_begun_after_its_prefill(make_books):
    books = make_books()
    flight = sent(books, streams=False)
    prefill_s = 1000 / books.view.fleet.prefill_speed[0]
    books.advance(1.0 + 0.9 * prefill_s)
    assert sums(books)[0][4] == 1000
    books.advance(1.0 + 1.1 * prefill_s)
    assert sums(books)[0][4] == 0
    flight.reported = 12
    books.begun(flight, 200, "127.0.0.1:1", 2.0)
    books.ended(flight, 2.0)
    assert books.lengths.output(Ask(b"")) == 12


def test_time_per_token_is_learned_from_watched_streams(make_books):
    books = make_books()
    profile = books.tpot_s(0)
    for _ in range(60):
        flight = sent(books)
        flight.is_watched = True
        books.begun(flight, 200, None, 1.0)
        books.tokens(flight, 10, 1.0 + 30 * profile)
        books.ended(flight, 2.0)
    assert books.engines[0].tpot_ratio == pytest.approx(3.0, rel=0.1)
    assert books.engines[1].tpot_ratio == 1.0


def told(decoded, decoding_s):
    return Reading(1.0, 0.0, 0.1, 0.0, begun=5.0, generated=5.0 + decoded, decoding_s=decoding_s)


def read_often(books, ratio, begin=0.0, base=(0.0, 0.0), times=60):
    """Readings of engine 0 while it has one request, 20 tokens in 0.2 s."""
    profile = books.tpot_s(0) / books.engines[0].tpot_ratio
    for k in range(1, times + 1):
        reading = told(base[0] + 20.0 * k, base[1] + 20 * ratio * profile * k)
        books.read(books.engines[0], reading, begin + 0.2 * k)


def test_pace_and_lengths_are_learned_from_the_engine_s_metrics_where_they_tell(make_books):
    books = make_books()
    read_often(books, 3.0)
    assert books.engines[0].tpot_ratio == pytest.approx(3.0, rel=0.01)
    assert books.engines[1].tpot_ratio == 1.0
    for n in (20, 60) * 100:
        flight = sent(books, now=20.0)
        books.begun(flight, 200, None, 21.0)
        books.advance(21.0 + 5 * books.tpot_s(0))
        books.ended(flight, 21.0 + (n - 0.5) * books.tpot_s(0))
    assert books.lengths.output(Ask(b"")) == pytest.approx(40, abs=1)
    watched = sent(books, now=20.0)
    watched.is_watched = True
    books.begun(watched, 200, None, 21.0)
    books.tokens(watched, 10, 22.0)
    books.ended(watched, 22.0)
    assert books.engines[0].tpot_ratio == pytest.approx(3.0, rel=0.01)  # it knows better


def test_the_pace_of_an_engine_that_runs_more_than_we_were_told(make_books):
    books = make_books(max_seqs=4)
    for k in range(1, 61):
        reading = told(2000.0 * k, 2000 * 3.0 * books.tpot_s(0) / books.engines[0].tpot_ratio * k)
        books.read(books.engines[0], reading._replace(running=400.0), 0.2 * k)
    assert books.engines[0].tpot_ratio == pytest.approx(3.0, rel=0.01)


def test_lengths_are_not_learned_at_a_pace_that_is_not(make_books):
    books = make_books()
    books.down(books.engines[0])
    books.up(books.engines[0])
    books.read(books.engines[0], told(1e6, 1e5), 1.0)  # from before
    flight = sent(books)
    books.begun(flight, 200, None, 2.0)
    books.ended(flight, 60.0)
    assert books.lengths.output(Ask(b"")) == 256


@pytest.mark.parametrize("lie", [(1.0, 1e12), (1e9, 1.0), (1e9, 1e7), (0.0, 1.0), (1.0, 0.0), (-5.0, -5.0)])
def test_a_pace_that_cannot_be_is_not_learned(make_books, lie):
    books = make_books()
    read_often(books, 3.0)
    end = (20.0 * 60, 60 * 20 * 3.0 * books.tpot_s(0) / 3.0)
    books.read(books.engines[0], told(end[0] + lie[0], end[1] + lie[1]), 12.2)
    assert books.engines[0].tpot_ratio == pytest.approx(3.0, rel=0.01)
    read_often(books, 3.0, 12.2, (end[0] + lie[0], end[1] + lie[1]))
    assert books.engines[0].tpot_ratio == pytest.approx(3.0, rel=0.01)


def test_the_pace_is_of_the_load_between_two_readings_not_of_that_at_the_last(make_books):
    books = make_books()
    books.engines[0].is_told = True
    now, tokens, took = 0.0, 0.0, 0.0
    for _ in range(40):
        flights = [sent(books, now=now) for _ in range(64)]
        for flight in flights:
            books.begun(flight, 200, None, now)
        step = books.tpot_s(0) / books.engines[0].tpot_ratio
        now += 1.0
        books.advance(now)
        tokens, took = tokens + 64.0 / step, took + 64.0
        for flight in flights:
            books.ended(flight, now)
        sent(books, now=now, to=(1,))
        books.read(books.engines[0], told(tokens, took), now)
    assert books.engines[0].tpot_ratio == pytest.approx(1.0, rel=0.02)


def test_an_estimate_follows_the_load_from_when_it_changes_on(make_books):
    books = make_books()
    flight = sent(books)
    books.begun(flight, 200, None, 2.0)
    alone = books.tpot_s(0)
    books.advance(2.0 + 100.5 * alone)
    assert flight.request.streamed_tokens == 101
    for _ in range(60):
        sent(books)
    together = books.tpot_s(0)
    assert together > 1.1 * alone
    books.advance(2.0 + 100.5 * alone + 100 * together)
    assert flight.request.streamed_tokens == 201


def test_a_failed_answer_teaches_nothing(make_books):
    books = make_books()
    flight = sent(books)
    books.begun(flight, 500, None, 1.2)
    books.ended(flight, 1.2)
    assert books.lengths.output(Ask(b"")) == 256
    assert sums(books) == [EMPTY] * 3


def test_the_engine_that_served_has_the_request(make_books):
    books = make_books()
    flight = sent(books, session="s")
    books.begun(flight, 200, "127.0.0.1:2", 2.0)
    assert [x[0] for x in sums(books)] == [0, 1, 0]
    assert books.sessions.look("s") == (1, 1)  # one turn, though two engines were asked
    books.begun(flight, 200, "1.2.3.4:5", 2.0)  # of nobody's
    assert [x[0] for x in sums(books)] == [0, 1, 0]


def test_turns_of_a_session_and_its_prefix(make_books):
    books = make_books()
    sent(books, session="s")
    later = books.arrived(Ask(PROMPT + b"y" * 400, session="s"), 2.0).request
    assert (later.turn, later.last_instance) == (1, 0)
    hits = [x.cached_tokens(later, later.prompt_tokens - 1) for x in books.view.instances]
    assert hits == [992, 0, 0]
    assert sent(books).request.booked_tokens == 1000 - 992


def test_a_flight_does_not_hold_its_prompt(make_books):
    books = make_books()
    flight = sent(books)
    assert (flight.ask.prompt, flight.prompt_bytes) == (b"", len(PROMPT))


def test_what_an_image_takes_teaches_nothing_of_text(make_books):
    books = make_books(1)
    flight = books.arrived(Ask(b"what is this?" + MEDIUM + b"0" * 32), 1.0)
    books.dispatched(flight, [0], 1.0)
    books.begun(flight, 200, None, 2.0)
    flight.reported_prompt = 1100
    books.ended(flight, 3.0)
    assert books.lengths.bytes_per_token == 4.0


def test_sessions_that_are_idle_for_longest_are_forgotten():
    sessions = Sessions()
    for name in range(MOST_SESSIONS + 1):
        sessions.went(str(name), 1)
    assert sessions.look("0") == (0, -1)
    assert sessions.look("1") == (1, 1)


def test_readings_of_an_engine(make_books):
    books = make_books()
    engine, x = books.engines[0], books.view.instances[0]
    books.read(engine, Reading(4.0, 2.0, 0.5, 10.0), 3.0)
    assert (x.seen_running, x.seen_waiting, x.seen_kv_usage, x.seen_preemptions) == (4.0, 2.0, 0.5, 10.0)
    books.read(engine, Reading(4.0, 2.0, 0.5, 13.0), 4.0)
    assert (x.seen_preemptions, x.scraped_at_s) == (3.0, 4.0)
    books.read(engine, Reading(4.0, 2.0, 0.5, 1.0), 5.0)  # it was restarted between two scrapes
    assert x.seen_preemptions == 0.0
    books.loaded("127.0.0.1:1", Load(7.0, None))
    books.loaded("127.0.0.1:1", Load(None, 0.75))
    books.loaded("nobody", Load(1.0, 1.0))
    assert (x.seen_waiting, x.seen_kv_usage) == (7.0, 0.75)


def test_the_engine_s_word_on_its_cache_counts_and_the_books_go_on(make_books):
    books = make_books()
    books.down(books.engines[0])
    flight = sent(books)
    books.up(books.engines[0])
    books.read(books.engines[0], Reading(0.0, 0.0, 0.0, 0.0, blocks=100, block_tokens=32), 2.0)
    assert books.view.instances[0].settings.kv_tokens == 3200
    assert books.view.fleet.capacity[0] == 3200
    assert sums(books)[0] == (1, 1000, 0, 256, 1000)
    books.begun(flight, 200, None, 2.0)
    books.ended(flight, 3.0)
    assert sums(books)[0] == EMPTY
    books.read(books.engines[0], Reading(0.0, 0.0, 0.0, 0.0, blocks=7, block_tokens=16), 3.0)
    assert books.view.instances[0].settings.kv_tokens == 3200  # only a new engine is believed


def test_what_had_not_begun_at_a_dead_engine_is_on_its_way_to_the_next(make_books):
    books = make_books()
    waits, begun, alone = sent(books, to=(0, 1, 2)), sent(books, to=(0, 1, 2)), sent(books, to=(0,))
    books.begun(begun, 200, None, 1.5)
    books.down(books.engines[1])
    assert books.down(books.engines[0])
    assert not books.down(books.engines[0])
    books.lost(books.engines[0])
    books.lost(books.engines[0])
    assert (waits.request.instance, begun.request.instance, alone.request.instance) == (2, 0, 0)
    for flight in (waits, begun, alone):
        books.ended(flight, 2.0)
    assert sums(books) == [EMPTY] * 3


def test_a_dead_engine_s_cache_is_empty(make_books):
    books = make_books()
    flight = sent(books)
    assert books.engines[0].index.leading(flight.request.prefix)
    books.down(books.engines[0])
    assert not books.engines[0].index.leading(flight.request.prefix)


def test_engines_come_and_go(make_books):
    books = make_books(3)
    spec, (a, b, c) = books.engines[0].spec, books.engines

    def now(endpoints):
        books.list_engines(endpoints, [spec] * len(endpoints))

    flight = sent(books, to=(1, 0))
    now([a.endpoint])
    assert [x.available for x in books.view.instances] == [True, False, False]
    new = [Endpoint(f"http://127.0.0.1:{k}", "127.0.0.1", k) for k in (8, 9)]
    now([a.endpoint, *new])
    # The place of an engine without requests is taken, that of another waits for their end.
    assert [e.endpoint.port for e in books.engines] == [1, 2, 8, 9]
    assert [e.is_listed for e in books.engines] == [True, False, True, True]
    assert set(books.by_address) == {"127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:8", "127.0.0.1:9"}
    assert len(books.view.fleet.capacity) == 4
    assert list(books.view.instances[1].inflight) == [flight.request.key]
    books.ended(flight, 2.0)
    now([a.endpoint, *new, c.endpoint])
    assert [e.endpoint.port for e in books.engines] == [1, 3, 8, 9]
    now([a.endpoint, b.endpoint, *new])
    assert books.engines[1].endpoint is b.endpoint
    assert not any(x.inflight for x in books.view.instances)
