"""The picker's gRPC server: external processing and health."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable

from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from servegym.errors import InputError
from servegym.runtime.gateway.exchange import Exchange, refuse
from servegym.runtime.gateway.http2 import (
    INTERNAL,
    INVALID_ARGUMENT,
    NOT_FOUND,
    Call,
    Connection,
    RefusedError,
)
from servegym.runtime.gateway.picker import Refusal
from servegym.runtime.gateway.telemetry import Telemetry

PROCESSOR = "envoy.service.ext_proc.v3.ExternalProcessor"
PROCESS, CHECK = f"/{PROCESSOR}/Process", "/grpc.health.v1.Health/Check"
LIVENESS, READINESS = "liveness", "readiness"
FRAME_BYTES = 1 << 16  # of a message around the body that it carries
LOOK_S = 0.01  # pause between two looks at what is still open, at the end


# Envoy's first message is malformed where a header that is read is no text. To let such a request pass would
# let clients around the picker.
_NO_TEXT = ProcessingResponse(
    immediate_response=refuse(Refusal(400, "no_text", "the headers of a request must be UTF-8"), None)
).SerializeToString()


class Processing:
    """Plays one exchange; whatever goes wrong ends it, and Envoy goes on without."""

    def __init__(self, exchange: Exchange, telemetry: Telemetry) -> None:
        self._exchange, self._telemetry, self._has_begun = exchange, telemetry, False

    def message(self, data: bytes) -> list[bytes]:
        """As of any `Call`."""
        try:
            message = ProcessingRequest.FromString(data)
        except DecodeError:
            self._telemetry.count("malformed")
            if self._has_begun:
                raise RefusedError(INVALID_ARGUMENT, "this is no ProcessingRequest") from None
            return [_NO_TEXT]
        self._has_begun = True
        try:
            answers = [answer.SerializeToString() for answer in self._exchange.answer(message)]
            return [] if message.observability_mode else answers
        except Exception as error:  # a fault of ours costs one decision, not a request
            self._fault(error)
            raise RefusedError(INTERNAL, type(error).__name__) from error

    def close(self) -> None:
        """As of any `Call`."""
        try:
            self._exchange.close()
        except Exception as error:
            self._fault(error)

    def _fault(self, error: Exception) -> None:
        self._telemetry.event("fault", error=repr(error), where=traceback.format_exc())


class Health:
    """Answers gRPC's health checks.

    Attributes:
        serves: by name of a service, whether requests are welcome.
    """

    def __init__(self) -> None:
        self.serves = {LIVENESS: True}
        self.set_ready(False)

    def set_ready(self, ready: bool) -> None:
        """Tell whether requests are welcome."""
        self.serves |= dict.fromkeys(("", READINESS, PROCESSOR), ready)

    def message(self, data: bytes) -> list[bytes]:
        """As of any `Call`."""
        try:
            serves = self.serves[HealthCheckRequest.FromString(data).service]
        except DecodeError:
            raise RefusedError(INVALID_ARGUMENT, "this is no HealthCheckRequest") from None
        except KeyError:
            raise RefusedError(NOT_FOUND, "there is no such service") from None
        status = HealthCheckResponse.SERVING if serves else HealthCheckResponse.NOT_SERVING
        return [HealthCheckResponse(status=status).SerializeToString()]

    def close(self) -> None:
        """As of any `Call`."""


class Server:
    """The gRPC server of a picker.

    Args:
        open_exchange: makes the state of a new exchange.
        telemetry: hears what goes wrong.
        most_bytes: of a request body.

    Attributes:
        health: what health checks are told.
    """

    def __init__(self, open_exchange: Callable[[], Exchange], telemetry: Telemetry, most_bytes: int) -> None:
        self._open_exchange, self._telemetry = open_exchange, telemetry
        self._most_bytes = most_bytes + FRAME_BYTES
        self._connections: set[Connection] = set()
        self.health = Health()

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            InputError: the port is taken.
        """
        loop = asyncio.get_running_loop()
        connect = lambda: Connection(self._open, self._most_bytes, self._connections)  # noqa: E731
        try:
            self._server = await loop.create_server(connect, host, port)
        except OSError as error:
            raise InputError("gateway", "picker_port", port, "cannot listen there; choose another") from error

    def _open(self, path: str) -> Call | None:
        if path == PROCESS:
            return Processing(self._open_exchange(), self._telemetry)
        return self.health if path == CHECK else None

    async def stop(self, grace_s: float) -> None:
        """End when the exchanges under way have ended, or after `grace_s`."""
        self._server.close()
        for connection in self._connections:
            connection.leave()
        until = asyncio.get_running_loop().time() + grace_s
        while not all(c.is_idle for c in self._connections) and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(LOOK_S)
        for connection in list(self._connections):
            connection.abort()
        await asyncio.sleep(0)  # they close their calls
