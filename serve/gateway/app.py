"""The gateway's FastAPI application: routes, middleware, errors as JSON. Everything it needs is handed in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serve.errors import TandemError
from serve.gateway import context, schemas
from serve.gateway.auth import Hosts, Keys
from serve.gateway.drain import Drain
from serve.gateway.errors import MethodNotAllowed, RouteNotFound, answer
from serve.gateway.middleware import Body, Gate, Observe
from serve.gateway.pages import page_routes
from serve.gateway.pool import Pool
from serve.gateway.routes import api_routes
from serve.gateway.service import Service
from serve.gateway.telemetry import Telemetry
from serve.gateway.tracing import GatewayTracing
from serve.options import GatewayOptions
from serve.recorder import Recorder

_SCHEMAS: dict[str, type[BaseModel]] = {
    "ChatCompletionRequest": schemas.ChatCompletionRequest,
    "CompletionRequest": schemas.CompletionRequest,
    "ImageGenerationRequest": schemas.ImageGenerationRequest,
    "TokenizeRequest": schemas.TokenizeRequest,
    "DetokenizeRequest": schemas.DetokenizeRequest,
}


def build_app(
    pool: Pool,
    options: GatewayOptions,
    recorder: Recorder,
    render_metrics: Callable[[], Awaitable[str]],
    *,
    keys: Keys | None = None,
    drain: Drain | None = None,
    tracing: GatewayTracing | None = None,
) -> FastAPI:
    """The application. `keys`: those of the options alone when not given."""
    keys = keys or Keys(options.api_key, metrics_require_key=options.metrics_require_key)
    drain = drain or Drain()
    telemetry = Telemetry(recorder, tracing)
    service = Service(pool, options, telemetry, drain)
    recorder.follow("tandem_http_requests_in_flight", lambda: float(drain.num_in_flight))
    app = FastAPI(title="Tandem", docs_url=None, redoc_url=None, openapi_url="/openapi.json", redirect_slashes=False)
    app.include_router(api_routes(service))
    app.include_router(page_routes(service, render_metrics))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_exception_handler(TandemError, _known_error)
    app.add_exception_handler(HTTPException, _routing_error)
    app.add_middleware(Body, options=options)  # innermost first
    app.add_middleware(Gate, keys=keys, hosts=Hosts(options, keys), drain=drain)
    app.add_middleware(Observe, telemetry=telemetry, drain=drain)
    return app


async def _known_error(request: Request, error: Exception) -> Response:
    context.of(request.scope).error = error
    failed = answer(error)
    return Response(failed.body, failed.status, headers=dict(failed.headers), media_type="application/json")


async def _routing_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses, in our shape."""
    if isinstance(error, HTTPException) and error.status_code == 405:
        return await _known_error(request, MethodNotAllowed("this path does not take that method; see /docs"))
    return await _known_error(request, RouteNotFound("there is nothing at this path; see /docs"))


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        described = get_openapi(
            title="Tandem",
            version=_version(),
            description="OpenAI's API for the models served here. Errors: {error: {message, type, param, code}}.",
            routes=app.routes,
        )
        known: dict[str, Any] = {}
        for name, model in _SCHEMAS.items():
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            known |= schema.pop("$defs", {})
            known[name] = schema
        described.setdefault("components", {}).setdefault("schemas", {}).update(known)
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}, {}]
        app.openapi_schema = described
    return app.openapi_schema


def _version() -> str:
    try:
        return metadata.version("tandem-serve")
    except metadata.PackageNotFoundError:
        return "0"
