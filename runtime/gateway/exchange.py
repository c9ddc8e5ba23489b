"""One exchange of Envoy's external processing: messages in, answers out, one for each HTTP request.

The protocol is the Endpoint Picker Protocol 1.0 of the Gateway API Inference Extension (its
docs/proposals/004-endpoint-picker-protocol): the pick goes into the header and into the `envoy.lb` dynamic
metadata `x-gateway-destination-endpoint`, best engine first, the next ones for retries;
`envoy.lb.subset_hint` restricts it; the engine that served comes back in
`x-gateway-destination-endpoint-served`; 503 without an engine, 429 for what is shed.

Two processing modes of bodies are understood, by what Envoy says in `protocol_config`:

- BUFFERED requests, and responses of which only the head comes: the books need the head (first token), the
  end (Envoy closes the exchange) and of some streams the body, for which the response to the head asks by
  `mode_override`, as far as `Watch` allows. The Envoy of `servegym gateway` does not send a request's head,
  which would be a message and a wait of its own, but what is read of it as attributes of the body; it takes
  the headers that an answer sets from its metadata.
- FULL_DUPLEX_STREAMED both ways, as the extension's gateways are set up: every chunk comes and is sent back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    HttpHeaders,
    ImmediateResponse,
    ProcessingRequest,
    ProcessingResponse,
)

from servegym.runtime.gateway.asks import CLASS_HEADER, SESSION_HEADER, SLO_HEADERS, read_ask
from servegym.runtime.gateway.books import Flight
from servegym.runtime.gateway.picker import NO_ENGINE, Picker, Refusal
from servegym.runtime.gateway.readings import ORCA_REQUEST, ORCA_RESPONSE, parse_load
from servegym.runtime.gateway.settings import ServiceClass
from servegym.runtime.gateway.telemetry import Telemetry

PICKED, SERVED = "x-gateway-destination-endpoint", "x-gateway-destination-endpoint-served"
SUBSET = "x-gateway-destination-endpoint-subset"
PATIENCE = "x-envoy-upstream-rq-per-try-timeout-ms"  # until an answer begins; Envoy keeps it to itself
LB, HINT = "envoy.lb", "envoy.lb.subset_hint"
SET, SET_HEADERS = "servegym.headers", (PICKED, ORCA_REQUEST, PATIENCE)  # metadata of a pick; its keys
STATUS, REQUEST_ID = ":status", "x-request-id"
FILTER = "envoy.filters.http.ext_proc"
ATTRIBUTES = {  # by the expression that Envoy evaluates, the header that it is
    f"request.headers['{name}']": name
    for name in (REQUEST_ID, CLASS_HEADER, SESSION_HEADER, *SLO_HEADERS.values())
}
RESPONSE_HEADERS = (STATUS, ORCA_RESPONSE)  # that are read
CHUNK_BYTES = 1 << 15  # of a body that goes back piece by piece; Envoy takes at most 64 KiB
TAIL_BYTES = 2048  # of a body, where its usage stands
KINDS = {400: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error"}

_OVERWRITE = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_DUPLEX, _STREAMED = ProcessingMode.FULL_DUPLEX_STREAMED, ProcessingMode.STREAMED
# Answers that are always the same are made once.
_NO_CHANGE, _SEEN = [ProcessingResponse(request_headers={})], [ProcessingResponse(response_body={})]
_EVENT = re.compile(rb"(?:^|\n)data:(?! ?\[DONE\])")
_USAGE = re.compile(rb'"(prompt|completion|input|output)_tokens" ?: ?(\d{1,9})\b')


class Watch:
    """How many response chunks may pass the picker: a bucket of `per_s` a second.

    A stream takes out what it is predicted to send when it is let in, and the difference at its end.
    """

    def __init__(self, per_s: float) -> None:
        self._per_s, self._level, self._at_s = per_s, per_s, 0.0

    def admit(self, chunks: int, now_s: float) -> bool:
        """Whether to watch an answer of about so many chunks."""
        self._level = min(self._per_s, self._level + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._level <= 0.0:
            return False
        self._level -= chunks
        return True

    def settle(self, chunks: int) -> None:
        """So many more passed than were predicted."""
        self._level -= chunks


class Exchange:
    """The state of one exchange; `close` ends it.

    Args:
        picker, classes, watch, telemetry: shared by all.
        now: seconds on the view's clock.
        max_body_bytes: of a request body that is collected piece by piece.
    """

    def __init__(
        self,
        picker: Picker,
        classes: dict[str, ServiceClass],
        watch: Watch,
        telemetry: Telemetry,
        now: Callable[[], float],
        max_body_bytes: int,
    ) -> None:
        self._picker, self._classes, self._watch = picker, classes, watch
        self._telemetry, self._now, self._max_body = telemetry, now, max_body_bytes
        self._headers: dict[str, str] = {}
        self._subset: list[str] | None = None
        self._body = bytearray()
        self._duplex_in = self._duplex_out = self._decided = False
        self._tail = b""
        self._reserved = self._chunks = 0
        self.flight: Flight | None = None

    def answer(self, message: ProcessingRequest) -> Iterable[ProcessingResponse]:
        """The answers to one message, in order; they are not the caller's to change."""
        if message.HasField("protocol_config"):
            self._duplex_in = message.protocol_config.request_body_mode == _DUPLEX
            self._duplex_out = message.protocol_config.response_body_mode == _DUPLEX
        kind = message.WhichOneof("request")
        if kind == "request_headers":
            return self._request_headers(message)
        if kind == "request_body":
            return self._request_body(message)
        if kind == "response_headers":
            return [self._response_headers(message)]
        if kind == "response_body":
            return self._response_body(message.response_body.body, message.response_body.end_of_stream)
        if kind == "request_trailers":
            last = self._decide(end=False) if self._duplex_in and not self._decided else ()
            return [*last, ProcessingResponse(request_trailers={})]
        return [ProcessingResponse(response_trailers={})] if kind == "response_trailers" else ()

    def close(self) -> None:
        """The exchange is over."""
        if self.flight is None:
            return
        self._watch.settle(self._chunks - self._reserved)
        flight, self.flight = self.flight, None
        self._picker.books.ended(flight, self._now())
        engine = self._picker.addresses([flight.request.instance])
        self._telemetry.finished(flight, self._headers.get(REQUEST_ID, ""), engine, self._now())

    # --- request ----------------------------------------------------------------------------------------

    def _request_headers(self, message: ProcessingRequest) -> Iterable[ProcessingResponse]:
        self._headers = _headers(message.request_headers)
        self._subset = _subset(message)
        if message.request_headers.end_of_stream:
            return [self._place(self._picker.any(self._subset) or NO_ENGINE, "request_headers")]
        return () if self._duplex_in else _NO_CHANGE

    def _request_body(self, message: ProcessingRequest) -> Iterable[ProcessingResponse]:
        body, end = message.request_body.body, message.request_body.end_of_stream
        if FILTER in message.attributes:  # in place of the head
            self._headers, self._subset = _attributes(message), _subset(message)
        if not self._duplex_in:
            return [self._place(self._pick(body), "request_body")]
        if self._decided:
            return _pieces(body, end)
        self._body += body
        return self._decide(end) if end or len(self._body) > self._max_body else ()

    def _decide(self, end: bool) -> Iterator[ProcessingResponse]:
        """Pick for a body that came in pieces; then it goes on its way."""
        self._decided = True
        body, self._body = bytes(self._body), bytearray()
        response = self._place(self._pick(body), "request_headers")
        yield response
        if not response.HasField("immediate_response"):
            yield from _pieces(body, end)

    def _pick(self, body: bytes) -> list[int] | Refusal:
        self.close()  # of a stream that sends a second body the first is lost
        ask = read_ask(self._headers, body, self._classes)
        picked = self._picker.pick(ask, self._now(), self._subset)
        if isinstance(picked, Refusal):
            return picked
        self.flight = picked
        self._telemetry.picked(self._picker.decision_s)
        return picked.order

    def _place(self, picked: list[int] | Refusal, phase: str) -> ProcessingResponse:
        if isinstance(picked, Refusal):
            self._telemetry.refused(picked)
            return ProcessingResponse(immediate_response=refuse(picked, self._picker.settings.retry_after_s))
        streams = self.flight is not None and self.flight.ask.streams
        patience_s = self._picker.settings.first_token_timeout_s if streams else None
        return _placed(self._picker.addresses(picked), phase, patience_s)

    # --- response ---------------------------------------------------------------------------------------

    def _response_headers(self, message: ProcessingRequest) -> ProcessingResponse:
        headers, served = _headers(message.response_headers), _served(message)
        load = headers.get(ORCA_RESPONSE)
        if load is not None:
            self._picker.books.loaded(served, parse_load(load))
        wants_body = False
        if self.flight is not None:
            now, status = self._now(), headers.get(STATUS, "")
            first = self._picker.addresses(self.flight.order[:1])
            self._picker.books.begun(self.flight, int(status) if status.isdecimal() else 0, served, now)
            self._telemetry.begun(self.flight, served not in (None, first), now)
            wants_body = self._wants_body(message.response_headers.end_of_stream, now)
        return _begun(load is not None, wants_body and not self._duplex_out)

    def _wants_body(self, is_empty: bool, now: float) -> bool:
        flight = self.flight
        if flight is None or is_empty or flight.status != 200:
            return False
        if self._duplex_out:
            flight.is_watched = True
        else:
            chunks = flight.request.predicted_tokens if flight.ask.streams else 1
            flight.is_watched = self._watch.admit(chunks, now)
            self._reserved = chunks if flight.is_watched else 0
        return flight.is_watched

    def _response_body(self, body: bytes, end: bool) -> list[ProcessingResponse]:
        self._chunks += 1
        if self.flight is not None:
            self._read(self.flight, body)
        if not self._duplex_out:
            return _SEEN
        response = ProcessingResponse()
        piece = response.response_body.response.body_mutation.streamed_response
        piece.body, piece.end_of_stream = body, end
        return [response]

    def _read(self, flight: Flight, body: bytes) -> None:
        """Count the tokens of a chunk and look for the usage behind the last one."""
        first = 1 if self._chunks == 1 else 0
        if flight.ask.streams:
            self._picker.books.tokens(flight, len(_EVENT.findall(body)) - first, self._now())
        self._tail = (self._tail + body[-TAIL_BYTES:])[-TAIL_BYTES:]
        if b"_tokens" in self._tail:
            for name, number in _USAGE.findall(self._tail):
                if name in (b"prompt", b"input"):
                    flight.reported_prompt = int(number)
                else:
                    flight.reported = int(number)


@lru_cache(1024)
def _placed(addresses: str, phase: str, patience_s: float | None) -> ProcessingResponse:
    """The pick; `patience_s` is the time that the first engine has until its answer begins."""
    headers = {PICKED: addresses, ORCA_REQUEST: "JSON"}
    if patience_s is not None:
        headers[PATIENCE] = f"{patience_s * 1e3:.0f}"
    response = ProcessingResponse()
    for name, value in headers.items():
        getattr(response, phase).response.header_mutation.set_headers.add(
            header={"key": name, "raw_value": value.encode()}, append_action=_OVERWRITE
        )
        response.dynamic_metadata.fields[SET].struct_value.fields[name].string_value = value
    response.dynamic_metadata.fields[LB].struct_value.fields[PICKED].string_value = addresses
    return response


@lru_cache
def _begun(has_load: bool, wants_body: bool) -> ProcessingResponse:
    """To the head of an answer: without the engine's report, and whether its body shall come, too."""
    response = ProcessingResponse(response_headers={})
    if has_load:
        response.response_headers.response.header_mutation.remove_headers.append(ORCA_RESPONSE)
    if wants_body:
        response.mode_override.response_header_mode = ProcessingMode.SEND
        response.mode_override.response_body_mode = _STREAMED
        response.mode_override.response_trailer_mode = ProcessingMode.SEND
    return response


def refuse(refusal: Refusal, retry_after_s: int | None) -> ImmediateResponse:
    """The answer to a request that no engine gets, as OpenAI's API words errors; None: never try again."""
    error = {"message": refusal.message, "type": KINDS[refusal.status], "code": refusal.status}
    response = ImmediateResponse(
        status={"code": refusal.status}, body=json.dumps({"error": error}).encode(), details=refusal.reason
    )
    headers = {"content-type": "application/json"}
    if retry_after_s is not None:
        headers["retry-after"] = str(retry_after_s)
    for name, value in headers.items():
        response.headers.set_headers.add(header={"key": name, "raw_value": value.encode()})
    return response


def _headers(message: HttpHeaders) -> dict[str, str]:
    """Headers by name; of repeated ones the last."""
    return {
        h.key: h.raw_value.decode("utf-8", "replace") if h.raw_value else h.value
        for h in message.headers.headers
    }


def _attributes(message: ProcessingRequest) -> dict[str, str]:
    """Headers by name, as far as they are read."""
    fields = message.attributes[FILTER].fields
    return {ATTRIBUTES[key]: fields[key].string_value for key in fields if key in ATTRIBUTES}


def _subset(message: ProcessingRequest) -> list[str] | None:
    """The only engines that may serve, or None: all."""
    hint = message.metadata_context.filter_metadata
    if HINT not in hint or SUBSET not in hint[HINT].fields:
        return None
    value = hint[HINT].fields[SUBSET]
    if value.HasField("list_value"):
        return [item.string_value for item in value.list_value.values]
    return [part.strip() for part in value.string_value.split(",")]


def _served(message: ProcessingRequest) -> str | None:
    metadata: Any = message.metadata_context.filter_metadata
    if LB not in metadata or SERVED not in metadata[LB].fields:
        return None
    return metadata[LB].fields[SERVED].string_value


def _pieces(body: bytes, end: bool) -> Iterator[ProcessingResponse]:
    """A body on its way, in pieces that Envoy takes."""
    for at in range(0, max(len(body), 1), CHUNK_BYTES):
        response = ProcessingResponse()
        piece = response.request_body.response.body_mutation.streamed_response
        piece.body = body[at : at + CHUNK_BYTES]
        piece.end_of_stream = end and at + CHUNK_BYTES >= len(body)
        yield response
