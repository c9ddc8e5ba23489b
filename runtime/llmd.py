"""llm-d's latency predictor, answered from a calibrated profile instead of models that were trained online.

The endpoint picker of llm-d asks a sidecar for the TTFT and TPOT that a request would meet on each engine.
This is a server with the protocol of its prediction server (github.com/llm-d/llm-d-latency-predictor):

    POST /predict               one request
    POST /predict/bulk          {"requests": [...]}; like strict, as no single prediction can fail
    POST /predict/bulk/strict   the same; what llm-d calls for each request that it routes
    GET  /healthz, /readyz, /status

`prefill_tokens_in_flight` makes the queue exact; without it, waiting prompts count as this one. The kind of
the pod, `num_tokens_generated` and `decode_tokens_in_flight` change no answer. There is nothing to train:
samples go to llm-d's training server, or nowhere. Formula and assumptions: `servegym.runtime.latency`.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from servegym.runtime.latency import LatencyModel, Situation

MODEL_TYPE, OBJECTIVE, QUANTILE = "servegym_profile", "mean", 0.5
MOST_REQUESTS = 10_000  # of a bulk, as in llm-d
MOST_BYTES = 8 << 20
BODY_S = 10.0
SLICE = 64  # predictions between two looks at other connections
LARGEST = 2**31 - 1
SHARES = ("kv_cache_percentage", "prefix_cache_score")
COUNTS = ("input_token_length", "num_request_waiting", "num_request_running", "num_tokens_generated")
OPTIONAL = ("prefill_tokens_in_flight", "decode_tokens_in_flight")
POD_TYPES = ("", "prefill", "decode", "monolithic", None)
MODEL = web.AppKey("model", LatencyModel)
LOADED = web.AppKey("loaded", str)


class BodyError(Exception):
    """A body that cannot be used; `where` is the path to the field."""

    def __init__(self, status: int, message: str, where: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.status, self.where = status, where


def make_app(model: LatencyModel) -> web.Application:
    """The server's application; `aiohttp.web.run_app` serves it."""
    app = web.Application(client_max_size=MOST_BYTES, middlewares=[_errors_as_json])
    app[MODEL], app[LOADED] = model, _now()
    app.router.add_post("/predict", _predict)
    app.router.add_post("/predict/bulk", _bulk)
    app.router.add_post("/predict/bulk/strict", _bulk_strict)
    app.router.add_get("/healthz", _health)
    app.router.add_get("/readyz", _ready)
    app.router.add_get("/status", _status)
    return app


async def _predict(request: web.Request) -> web.Response:
    situation = read_situation(await _body(request))
    return web.json_response((await _predictions(request.app, [situation]))[0])


async def _bulk_strict(request: web.Request) -> web.Response:
    return web.json_response(await _answer(request))


async def _bulk(request: web.Request) -> web.Response:
    return web.json_response({**await _answer(request), "errors": []})


async def _answer(request: web.Request) -> dict[str, Any]:
    start = time.perf_counter()
    predictions = await _predictions(request.app, read_bulk(await _body(request)))
    return {
        "predictions": predictions,
        "total_requests": len(predictions),
        "successful_predictions": len(predictions),
        "failed_predictions": 0,
        "processing_time_ms": 1e3 * (time.perf_counter() - start),
    }


async def _predictions(app: web.Application, situations: list[Situation]) -> list[dict[str, Any]]:
    common = {"predicted_at": _now(), **_model_fields(app)}
    answers = []
    for number, situation in enumerate(situations):
        if number % SLICE == SLICE - 1:
            await asyncio.sleep(0)
        latency = app[MODEL].predict(situation)
        answers.append({"ttft_ms": 1e3 * latency.ttft_s, "tpot_ms": 1e3 * latency.tpot_s, **common})
    return answers


async def _health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok", "service": "servegym predictor"})


async def _ready(request: web.Request) -> web.Response:
    return web.json_response({"status": "ready", **_model_fields(request.app)})


async def _status(request: web.Request) -> web.Response:
    profile = request.app[MODEL].profile
    models = {"ttft_model": True, "tpot_model": True}
    fields = {"is_ready": True, "training_server_url": "", "models_exist": models, "profile": profile.name}
    return web.json_response({**fields, **_model_fields(request.app)})


def _model_fields(app: web.Application) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "objective_type": OBJECTIVE,
        "quantile": QUANTILE,
        "last_model_load": app[LOADED],
    }


async def _body(request: web.Request) -> Any:
    """The JSON of a body.

    Raises:
        BodyError: 400 for a body that is not JSON, 408 for one that does not end.
    """
    try:
        async with asyncio.timeout(BODY_S):
            raw = await request.read()
    except TimeoutError:
        raise BodyError(408, f"the body did not end within {BODY_S:.0f} s") from None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BodyError(400, f"not JSON: {error}") from error


def read_bulk(body: Any) -> list[Situation]:
    """The requests of a bulk.

    Raises:
        BodyError: 422, naming the row and the field.
    """
    rows = body.get("requests") if isinstance(body, dict) else None
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST_REQUESTS:
        raise BodyError(422, f"must be a list of 1 to {MOST_REQUESTS} requests", ("requests",))
    return [read_situation(row, ("requests", number)) for number, row in enumerate(rows)]


def read_situation(row: Any, where: tuple[str | int, ...] = ()) -> Situation:
    """One request.

    Raises:
        BodyError: 422, naming the field.
    """
    if not isinstance(row, dict):
        raise BodyError(422, "must be an object", where)
    shares = [_number(row, name, 1.0, where) for name in SHARES]
    length, waiting, running, _ = (_count(row, name, where) for name in COUNTS)
    queued, _ = (_count({name: 0, **row}, name, where) for name in OPTIONAL)
    if row.get("pod_type") not in POD_TYPES:
        raise BodyError(422, "must be prefill, decode, monolithic or empty", (*where, "pod_type"))
    return Situation(
        kv_usage=shares[0],
        running=running,
        waiting=waiting,
        queued_tokens=queued,
        prompt_tokens=max(length, 1),
        cached_share=shares[1],
    )


def _count(row: dict[str, Any], name: str, where: tuple[str | int, ...]) -> int:
    value = _number(row, name, LARGEST, where)
    if value != int(value):
        raise BodyError(422, "must be a whole number", (*where, name))
    return int(value)


def _number(row: dict[str, Any], name: str, most: float, where: tuple[str | int, ...]) -> float:
    if name not in row:
        raise BodyError(422, "is missing", (*where, name))
    value = row[name]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= most or not math.isfinite(value):
        raise BodyError(422, f"must be a number from 0 to {most:g}", (*where, name))
    return value


@web.middleware
async def _errors_as_json(request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
    """Errors in the form of llm-d's server: {"detail": [{"loc": [...], "msg": ...}]}."""
    try:
        return await handler(request)
    except BodyError as refusal:
        detail: list[dict[str, Any]] = [{"loc": ["body", *refusal.where], "msg": str(refusal)}]
        return web.json_response({"detail": detail}, status=refusal.status)
    except web.HTTPException as error:
        return web.json_response({"detail": error.reason}, status=error.status)


def _now() -> str:
    return datetime.now(UTC).isoformat()
