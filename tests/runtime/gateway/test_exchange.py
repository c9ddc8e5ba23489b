"""What the picker answers to messages in any order, without a network."""

import itertools
import json

import pytest
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from servegym.runtime.decider import Decider
from servegym.runtime.gateway.exchange import LB, PICKED, SERVED, Exchange, Watch
from servegym.runtime.gateway.picker import Picker
from servegym.runtime.gateway.settings import Settings, read_classes
from servegym.runtime.gateway.telemetry import Telemetry
from tests.runtime.gateway.engines import EVENT
from tests.runtime.gateway.envoys import BUFFERED, DUPLEX, header_message, picked_of, request_messages

BODY = json.dumps({"prompt": "x" * 400, "stream": True, "max_tokens": 4}).encode()


@pytest.fixture
def make(make_books):
    """An exchange at a time that a test moves on, and its picker."""

    class Made:
        now = 1.0

        def __init__(self, **settings: object) -> None:
            flags = Settings(engines=("http://127.0.0.1:1",), stale_s=1e6, **settings)
            self.picker = Picker(make_books(2), Decider("least_request", None, 5.0), flags)
            self.watch = Watch(flags.watch_per_s)
            self.exchange = Exchange(
                self.picker, read_classes(None), self.watch, Telemetry(), lambda: self.now, 10_000
            )

        def say(self, *messages: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
            return list(itertools.chain.from_iterable(map(self.exchange.answer, messages)))

        def head(self, served: str = "127.0.0.1:1", status: str = "200") -> list[pb.ProcessingResponse]:
            message = header_message("response_headers", False, _status=status)
            message.metadata_context.filter_metadata[LB][SERVED] = served
            return self.say(message)

        def body(self, piece: bytes, end: bool = False) -> None:
            self.say(pb.ProcessingRequest(response_body={"body": piece, "end_of_stream": end}))

        @property
        def request(self):
            return self.exchange.flight.request

    return Made


def test_a_request_is_picked_with_its_body(make):
    made = make()
    (answer,) = made.say(*request_messages(BODY, x_session_id="s", x_slo_ttft_ms="200"))
    assert picked_of(answer) == ["127.0.0.1:1", "127.0.0.1:2"]
    assert not answer.request_body.response.HasField("body_mutation")
    assert made.exchange.flight.ask.session
    assert made.exchange.flight.ask.ttft_s == 0.2


def test_the_head_of_a_request_is_answered_first_where_it_comes_first(make):
    made = make()
    first, second = made.say(*request_messages(BODY, BUFFERED))
    assert first.WhichOneof("response") == "request_headers"
    assert not picked_of(first)
    assert picked_of(second) == ["127.0.0.1:1", "127.0.0.1:2"]
    assert not second.request_body.response.HasField("body_mutation")


def test_a_request_without_a_body_is_placed_and_not_booked(make):
    made = make()
    (answer,) = made.say(header_message("request_headers", True, _method="GET", _path="/v1/models"))
    assert len(picked_of(answer)) == 2
    assert not made.picker.books.flights
    for engine in made.picker.books.engines:
        made.picker.books.down(engine)
    (answer,) = made.say(header_message("request_headers", True, _method="GET", _path="/v1/models"))
    assert answer.immediate_response.status.code == 503


def test_tokens_of_a_watched_stream_are_counted_event_by_event(make):
    made = make()
    made.say(*request_messages(BODY))
    (answer,) = made.head()
    assert answer.mode_override.response_body_mode == ProcessingMode.STREAMED
    assert made.request.streamed_tokens == 1
    made.body(EVENT)
    assert made.request.streamed_tokens == 1  # the head had come with it
    made.body(EVENT * 2)
    assert made.request.streamed_tokens == 3
    made.body(EVENT + b"data: [DONE]\n\n", end=True)
    assert made.request.streamed_tokens == 4


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_the_usage_at_the_end_is_found_however_it_is_cut(make, cut):
    made = make()
    made.say(*request_messages(json.dumps({"prompt": "x" * 400}).encode()))
    made.head()
    answer = (
        b'{"choices": [{"text": "a"}], "usage": {"prompt_tokens": 123, "completion_tokens": 45}}' + b" " * 40
    )
    made.body(answer[:cut])
    made.body(answer[cut:], end=True)
    flight = made.exchange.flight
    assert (flight.reported_prompt, flight.reported) == (123, 45)


def test_failed_answers_are_not_watched(make):
    made = make()
    made.say(*request_messages(BODY))
    (answer,) = made.head(status="503")
    assert not answer.HasField("mode_override")
    made.exchange.close()
    made.exchange.close()
    assert not made.picker.books.flights


def test_messages_out_of_order_and_without_a_request_are_answered(make):
    made = make()
    (answer,) = made.head()
    assert answer.HasField("response_headers")
    made.body(EVENT)
    for kind in ("request_trailers", "response_trailers"):
        (answer,) = made.say(pb.ProcessingRequest(**{kind: {}}))
        assert answer.HasField(kind)
    assert made.say(pb.ProcessingRequest()) == []
    made.exchange.close()


def test_a_second_body_does_not_leave_the_first_in_the_books(make):
    made = make()
    made.say(*request_messages(BODY), *request_messages(BODY))
    made.exchange.close()
    assert not made.picker.books.flights
    assert all(not x.inflight for x in made.picker.books.view.instances)


def test_a_body_beyond_the_limit_is_passed_on_while_it_comes(make):
    made = make()
    head, *pieces = request_messages(b"x" * 25_000, DUPLEX)
    assert made.say(head) == []
    answers = made.say(*pieces)
    assert picked_of(answers[0])
    bodies = [a.request_body.response.body_mutation.streamed_response for a in answers[1:]]
    assert b"".join(b.body for b in bodies) == b"x" * 25_000
    assert [b.end_of_stream for b in bodies] == [False] * (len(bodies) - 1) + [True]


def test_watching_keeps_to_its_rate():
    watch = Watch(100.0)
    assert watch.admit(60, 0.0)
    assert watch.admit(60, 0.0)
    assert not watch.admit(60, 0.0)
    assert not watch.admit(60, 0.1)
    assert watch.admit(60, 0.3)
    watch.settle(-60)  # it ended at once
    assert watch.admit(1, 0.3)
    passed = sum(50 for k in range(1000) if watch.admit(50, 1.0 + k / 100))
    assert 900 <= passed <= 1200


def test_without_a_rate_nothing_is_watched(make):
    made = make(watch_per_s=0.0)
    made.say(*request_messages(BODY))
    (answer,) = made.head()
    assert not answer.HasField("mode_override")


def test_the_header_carries_what_the_metadata_say(make):
    made = make()
    answer = made.say(*request_messages(BODY, x_gateway_destination_endpoint="10.0.0.1:1"))[-1]
    assert answer.dynamic_metadata[LB][PICKED] == "127.0.0.1:1,127.0.0.1:2"
