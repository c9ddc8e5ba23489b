"""The picker's gRPC server: external processing and health."""

from __future__ import annotations

import traceback
from collections.abc import AsyncIterator, Callable

import grpc
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from servegym.errors import InputError
from servegym.runtime.gateway.exchange import Exchange
from servegym.runtime.gateway.telemetry import Telemetry

PROCESSOR = "envoy.service.ext_proc.v3.ExternalProcessor"
FRAME_BYTES = 1 << 16  # of a message around the body that it carries


class Processor:
    """Plays one `Exchange` a stream; whatever goes wrong ends that stream, and Envoy goes on without."""

    def __init__(self, open_exchange: Callable[[], Exchange], telemetry: Telemetry) -> None:
        self._open, self._telemetry = open_exchange, telemetry

    async def process(
        self, messages: AsyncIterator[ProcessingRequest | None], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ProcessingResponse]:
        """Answer Envoy's messages until it closes the stream."""
        exchange = self._open()
        try:
            async for message in messages:
                if message is None:
                    self._telemetry.count("malformed")
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this is no ProcessingRequest")
                    return
                for response in exchange.answer(message):
                    if not message.observability_mode:
                        yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # a fault of ours costs one decision, not a request
            self._telemetry.event("fault", error=repr(error), where=traceback.format_exc())
            await context.abort(grpc.StatusCode.INTERNAL, type(error).__name__)
        finally:
            exchange.close()

    def handler(self) -> grpc.GenericRpcHandler:
        """As gRPC servers take it; bytes that are no message come as None, not as a logged traceback."""
        method = grpc.stream_stream_rpc_method_handler(
            self.process, _parse, ProcessingResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(PROCESSOR, {"Process": method})


def _parse(data: bytes) -> ProcessingRequest | None:
    try:
        return ProcessingRequest.FromString(data)
    except DecodeError:
        return None


class Server:
    """The gRPC server of a picker.

    Args:
        open_exchange: makes the state of a new exchange.
        telemetry: hears what goes wrong.
        most_bytes: of a request body.
    """

    def __init__(self, open_exchange: Callable[[], Exchange], telemetry: Telemetry, most_bytes: int) -> None:
        limit = most_bytes + FRAME_BYTES
        options = [("grpc.max_receive_message_length", limit), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options)
        self._health = health.aio.HealthServicer()
        self._server.add_generic_rpc_handlers((Processor(open_exchange, telemetry).handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            InputError: the port is taken.
        """
        try:
            self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise InputError("gateway", "picker_port", port, "cannot listen there; choose another") from error
        await self._server.start()
        await self._health.set("liveness", health_pb2.HealthCheckResponse.SERVING)
        await self.set_ready(False)

    async def set_ready(self, ready: bool) -> None:
        """Tell health checks whether requests are welcome."""
        states = health_pb2.HealthCheckResponse
        for service in ("", "readiness", PROCESSOR):
            await self._health.set(service, states.SERVING if ready else states.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """End when the exchanges under way have ended, or after `grace_s`."""
        await self._server.stop(grace_s)
