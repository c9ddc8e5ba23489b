"""HTTP/2 as gRPC servers speak it (RFC 9113), over asyncio: streams of length-prefixed messages.

Envoy's exchange with the picker is some six frames each way for every request. grpcio's server spends 0.7 ms
of CPU on them, because each message changes threads twice, and the library h2 0.33 ms; this takes 0.1 ms. It
is all that gRPC asks of HTTP/2: no server push, no priorities, no compression of messages. Flow control holds
both ways; header compression is hpack's. Each message is answered as it comes, in the thread of the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from struct import Struct
from typing import Protocol

from hpack import Decoder, HPACKError

from servegym.runtime.keep_alive import keep_alive

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITISED = 0x1, 0x1, 0x4, 0x8, 0x20  # flags
TABLE_SIZE, INITIAL_WINDOW = 1, 4  # settings
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR = 0, 1, 3, 6  # why a connection ends
REFUSED_STREAM, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 7, 9, 11
OK, NOT_FOUND, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, INVALID_ARGUMENT = 0, 5, 8, 12, 13, 3  # of gRPC

MOST_FRAME = 1 << 14  # bytes; no peer may send less, and none has to take more
WINDOW, MOST_WINDOW = (1 << 16) - 1, (1 << 31) - 1
REFILL = 1 << 24  # bytes received, after which the peer may send as many more
MOST_HEADERS = 1 << 16  # bytes of a block
MOST_PATHS = 64  # blocks whose path is remembered

_FRAME, _SETTING, _WORD = Struct(">BHBBI"), Struct(">HI"), Struct(">I")
# Header blocks without state: `:status: 200`, `content-type: application/grpc`; then a literal's start.
_HEAD = b"\x88\x0f\x10\x10application/grpc"
_LITERAL = b"\x00"


class Call(Protocol):
    """One call of a method, from its first message to its end."""

    def message(self, data: bytes) -> Iterable[bytes]:
        """The answers to a message.

        Raises:
            RefusedError: the call ends with this status.
        """

    def close(self) -> None:
        """It is over, whoever ended it; may come twice."""


class RefusedError(Exception):
    """Ends a call.

    Args:
        status: of gRPC. message: in ASCII, for whoever reads the client's log.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class BrokenError(Exception):
    """Ends a connection, with an error code of HTTP/2."""


@dataclass(slots=True, eq=False)
class _Stream:
    """A call's stream.

    Attributes:
        window: bytes that the peer takes at present.
        received: of messages that are not whole. taken: bytes since the peer was last let send more.
        pending: bytes of answers that wait for the window. has_head: the answer's headers are sent.
        trailers: header block that ends the answer; None while there may be more.
        is_cut: we ended it before the peer did.
    """

    call: Call
    window: int
    received: bytearray = field(default_factory=bytearray)
    taken: int = 0
    pending: bytearray = field(default_factory=bytearray)
    has_head: bool = False
    trailers: bytes | None = None
    is_cut: bool = False


class Connection(asyncio.Protocol):
    """A client's connection.

    Args:
        open_call: of a method by its path; None where there is no such method.
        most_bytes: of a message.
        connections: those that are open; it adds and takes out itself.
    """

    def __init__(
        self, open_call: Callable[[str], Call | None], most_bytes: int, connections: set[Connection]
    ) -> None:
        self._open_call, self._most_bytes, self._connections = open_call, most_bytes, connections
        self._bytes, self._is_greeted = bytearray(), False
        self._streams: dict[int, _Stream] = {}
        self._ended: dict[int, None] = {}  # streams that the client has ended since the latest look
        self._out: list[bytes] = []  # frames to send
        self._last = 0  # largest number of a stream so far
        self._is_leaving = False
        self._window = self._initial = WINDOW
        self._taken = 0
        self._block: tuple[int, int, bytearray] | None = None  # headers that go on in the next frame
        self._decoder = Decoder(MOST_HEADERS)
        self._paths: dict[bytes, str] = {}
        self._frames = (
            self._data, self._headers, self._ignore, self._reset, self._settings, self._push, self._ping,
            self._ignore, self._widen, self._continue,
        )  # fmt: skip

    # --- of asyncio -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As of any protocol: it is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if connection := transport.get_extra_info("socket"):  # or its calls would be open for ever
            keep_alive(connection)
        self._connections.add(self)
        # Without a table, equal header blocks mean the same.
        settings = _SETTING.pack(TABLE_SIZE, 0) + _SETTING.pack(INITIAL_WINDOW, 2 * REFILL)
        self._write(SETTINGS, 0, 0, settings)
        self._write(WINDOW_UPDATE, 0, 0, _WORD.pack(MOST_WINDOW - WINDOW))
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        """As of any protocol: it is gone."""
        self._connections.discard(self)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.call.close()

    def pause_writing(self) -> None:
        """The client does not read, and is not listened to until it does."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Bytes of frames, cut anywhere."""
        self._bytes += data
        try:
            self._take()
            self._finish_ended()
        except BrokenError as error:
            self._bytes.clear()
            self._write(GOAWAY, 0, 0, _WORD.pack(self._last) + _WORD.pack(error.args[0]))
            self._send()
            self._transport.close()
        else:
            self._send()

    # --- the end ----------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """No call is open."""
        return not self._streams

    def leave(self) -> None:
        """Take no new calls."""
        self._is_leaving = True
        self._write(GOAWAY, 0, 0, _WORD.pack(self._last) + _WORD.pack(NO_ERROR))
        self._send()

    def abort(self) -> None:
        """End at once, with all calls."""
        self._transport.abort()

    # --- frames -----------------------------------------------------------------------------------------

    def _write(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        self._out.append(_frame(kind, flags, number, payload))

    def _send(self) -> None:
        if self._out:
            self._transport.write(b"".join(self._out))
            self._out.clear()

    def _take(self) -> None:
        data, at = self._bytes, 0
        if not self._is_greeted:
            if not PREFACE.startswith(data[: len(PREFACE)]):
                raise BrokenError(PROTOCOL_ERROR)
            if len(data) < len(PREFACE):
                return
            self._is_greeted, at = True, len(PREFACE)
        while len(data) - at >= _FRAME.size:
            high, low, kind, flags, number = _FRAME.unpack_from(data, at)
            length = high << 16 | low
            if length > MOST_FRAME:
                raise BrokenError(FRAME_SIZE_ERROR)
            if len(data) - at < _FRAME.size + length:
                break
            payload = bytes(data[at + _FRAME.size : at + _FRAME.size + length])
            at += _FRAME.size + length
            if self._block is not None and kind != CONTINUATION:
                raise BrokenError(PROTOCOL_ERROR)
            if kind < len(self._frames):
                self._frames[kind](flags, number & MOST_WINDOW, payload)
        del data[:at]

    def _ignore(self, flags: int, number: int, payload: bytes) -> None:
        """Priorities, which are advice; and that the client is about to leave, as it may."""

    def _push(self, flags: int, number: int, payload: bytes) -> None:
        raise BrokenError(PROTOCOL_ERROR)

    def _ping(self, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 8:
            raise BrokenError(FRAME_SIZE_ERROR)
        if not flags & ACK:
            self._write(PING, ACK, 0, payload)

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if flags & ACK:
            self._decoder.max_allowed_table_size = 0
            return
        if len(payload) % _SETTING.size:
            raise BrokenError(FRAME_SIZE_ERROR)
        self._write(SETTINGS, ACK, 0, b"")
        for name, value in _SETTING.iter_unpack(payload):
            if name == INITIAL_WINDOW:
                wider, self._initial = value - self._initial, value
                for stream in self._streams.values():
                    stream.window = _widened(stream.window, wider)
        self._flush_all()

    def _widen(self, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != _WORD.size:
            raise BrokenError(FRAME_SIZE_ERROR)
        more = _WORD.unpack(payload)[0] & MOST_WINDOW
        if not more:
            raise BrokenError(PROTOCOL_ERROR)
        if number == 0:
            self._window = _widened(self._window, more)
            self._flush_all()
        elif (stream := self._streams.get(number)) is not None:
            stream.window = _widened(stream.window, more)
            self._flush(number, stream)

    def _reset(self, flags: int, number: int, payload: bytes) -> None:
        self._check_known(number)
        stream = self._streams.pop(number, None)
        if stream is not None:
            stream.call.close()

    def _check_known(self, number: int) -> None:
        if not 0 < number <= self._last:
            raise BrokenError(PROTOCOL_ERROR)

    # --- headers ----------------------------------------------------------------------------------------

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        payload = _unpadded(flags, payload)
        self._block = number, flags, bytearray(payload[5:] if flags & PRIORITISED else payload)
        if flags & END_HEADERS:
            self._headed()

    def _continue(self, flags: int, number: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != number:
            raise BrokenError(PROTOCOL_ERROR)
        self._block[2].extend(payload)
        if len(self._block[2]) > MOST_HEADERS:
            raise BrokenError(ENHANCE_YOUR_CALM)
        if flags & END_HEADERS:
            self._headed()

    def _headed(self) -> None:
        """A header block is whole: a new call, or the trailers of one."""
        assert self._block is not None
        (number, flags, block), self._block = self._block, None
        path, ends = self._path(bytes(block)), bool(flags & END_STREAM)
        if number > self._last:
            self._opened(number, path)
        elif not ends:
            raise BrokenError(PROTOCOL_ERROR)
        if ends:
            self._ended[number] = None

    def _opened(self, number: int, path: str) -> None:
        if number % 2 == 0:
            raise BrokenError(PROTOCOL_ERROR)
        self._last = number
        if self._is_leaving:
            self._write(RST_STREAM, 0, number, _WORD.pack(REFUSED_STREAM))
            return
        call = self._open_call(path)
        stream = self._streams[number] = _Stream(call or _NoCall(), self._initial)
        if call is None:
            self._finish(number, stream, UNIMPLEMENTED, "there is no such method")

    def _path(self, block: bytes) -> str:
        """What is called. Clients say the same again and again, and decoding takes longer than all else."""
        if block in self._paths:
            return self._paths[block]
        try:
            fields = dict(self._decoder.decode(block, raw=True))
        except HPACKError as error:
            raise BrokenError(COMPRESSION_ERROR) from error
        path = fields.get(b":path", b"").decode("latin-1")
        if self._decoder.header_table_size == 0 and len(self._paths) < MOST_PATHS:
            self._paths[block] = path
        return path

    # --- messages ---------------------------------------------------------------------------------------

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        self._check_known(number)
        self._taken = self._refill(0, self._taken + len(payload))
        stream = self._streams.get(number)
        if stream is None or stream.trailers is not None or number in self._ended:
            return  # what was on its way when the call ended
        stream.taken += len(payload)
        stream.received += _unpadded(flags, payload)
        try:
            self._answer(number, stream)
        except RefusedError as refused:
            stream.is_cut = not flags & END_STREAM
            self._finish(number, stream, refused.status, refused.message)
        else:
            self._refill_stream(number, stream)
            if flags & END_STREAM:
                self._ended[number] = None

    def _refill_stream(self, number: int, stream: _Stream) -> None:
        """A client that takes no answers may not send for ever."""
        if not stream.pending:
            stream.taken = self._refill(number, stream.taken)

    def _refill(self, number: int, taken: int) -> int:
        """Let the client send as much again as was taken from it, where that is much; what is then open."""
        if taken < REFILL:
            return taken
        self._write(WINDOW_UPDATE, 0, number, _WORD.pack(taken))
        return 0

    def _answer(self, number: int, stream: _Stream) -> None:
        """Answer the messages that have come."""
        received = stream.received
        while len(received) >= 5:
            size = _WORD.unpack_from(received, 1)[0]
            if received[0]:
                raise RefusedError(UNIMPLEMENTED, "compressed messages are not understood")
            if size > self._most_bytes:
                raise RefusedError(RESOURCE_EXHAUSTED, "the message is too large")
            if len(received) < 5 + size:
                return
            message = bytes(received[5 : 5 + size])
            del received[: 5 + size]
            for answer in stream.call.message(message):
                stream.pending += b"\0" + _WORD.pack(len(answer)) + answer
                self._flush(number, stream)
            self._send()  # not behind other streams' messages that came with this one

    def _finish_ended(self) -> None:
        """End the calls that the client has ended; Envoy resets them at once, and hears nothing more."""
        for number in self._ended:
            stream = self._streams.get(number)
            if stream is not None and stream.trailers is None:
                self._finish(number, stream, OK)
        self._ended.clear()

    def _finish(self, number: int, stream: _Stream, status: int, message: str = "") -> None:
        """End a call behind the answers that it has."""
        stream.call.close()
        stream.received.clear()
        stream.trailers = _literal("grpc-status", str(status))
        if message:
            stream.trailers += _literal("grpc-message", message)
        self._flush(number, stream)

    def _flush_all(self) -> None:
        for number, stream in list(self._streams.items()):
            if stream.pending:
                self._flush(number, stream)

    def _flush(self, number: int, stream: _Stream) -> None:
        """Send what the windows allow; then the trailers, if it is all."""
        pending, before = stream.pending, len(self._out)
        if pending and not stream.has_head:
            stream.has_head = True
            self._write(HEADERS, END_HEADERS, number, _HEAD)
        while pending and (size := min(len(pending), stream.window, self._window, MOST_FRAME)) > 0:
            self._write(DATA, 0, number, bytes(pending[:size]))
            del pending[:size]
            stream.window -= size
            self._window -= size
        if stream.trailers is not None and not pending:
            block = stream.trailers if stream.has_head else _HEAD + stream.trailers
            self._write(HEADERS, END_HEADERS | END_STREAM, number, block)
            if stream.is_cut:
                self._write(RST_STREAM, 0, number, _WORD.pack(NO_ERROR))
            del self._streams[number]
        if len(self._out) > before:
            self._refill_stream(number, stream)


class _NoCall:
    """Of a method that there is not."""

    def message(self, data: bytes) -> Iterable[bytes]:
        """Nothing."""
        return ()

    def close(self) -> None:
        """Nothing."""


def _frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    length = len(payload)
    return _FRAME.pack(length >> 16, length & 0xFFFF, kind, flags, number) + payload


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise BrokenError(PROTOCOL_ERROR)
    return payload[1 : len(payload) - payload[0]]


def _widened(window: int, more: int) -> int:
    if window + more > MOST_WINDOW:
        raise BrokenError(FLOW_CONTROL_ERROR)
    return window + more


def _literal(name: str, value: str) -> bytes:
    """A header field that leaves no trace in the compression; each part of at most 126 bytes."""
    parts = name.encode(), value.encode("ascii", "replace")[:126]
    return _LITERAL + b"".join(bytes((len(part),)) + part for part in parts)
