"""What people and probes read: health, metrics, documentation and the playground. Nothing here needs a network."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict

from fastapi import APIRouter, Request, Response

from serve.errors import Draining, Unavailable
from serve.gateway.docs import docs_page
from serve.gateway.service import Service
from serve.gateway.wire import encode_json
from serve.playground.page import render as playground_page

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def page_routes(service: Service, render_metrics: Callable[[], Awaitable[str]]) -> APIRouter:
    """`/livez /readyz /health /metrics /docs /`.

    The first three are different questions: whether this process answers, or has to be started again; whether to send
    it new requests; whether every model goes forward, wherever it is computed, or a person has to look.
    """
    router = APIRouter()
    page = playground_page()

    @router.get("/livez", tags=["health"], summary="The process answers")
    async def livez() -> Response:
        return _ok()

    @router.get("/readyz", tags=["health"], summary="New requests are taken")
    async def readyz() -> Response:
        if service.drain.is_active:
            raise Draining("the server is shutting down")
        if not service.pool.is_ready:
            raise Unavailable("no model is ready")
        return _ok()

    @router.get("/health", tags=["health"], summary="Every model can be served; its replicas")
    async def health() -> Response:
        census = service.pool.census()
        missing = [name for name, model in census.items() if not (model.ready or model.draining or model.may_sleep)]
        if missing or not census:
            raise Unavailable(f"no replica is ready of {', '.join(map(repr, missing)) or 'any model'}")
        models = {name: asdict(model) for name, model in census.items()}
        return Response(encode_json({"status": "ok", "models": models}), media_type="application/json")

    @router.get("/metrics", tags=["health"], summary="Prometheus metrics of all processes")
    async def metrics() -> Response:
        return Response(await render_metrics(), media_type=METRICS_TYPE)

    @router.get("/docs", include_in_schema=False)
    async def docs(http: Request) -> Response:
        return html_page(docs_page(http.app.openapi()))

    @router.get("/", include_in_schema=False)
    async def playground() -> Response:
        return html_page(page)

    return router


def html_page(text: str) -> Response:
    """A self-contained page that may load nothing, talk to this server only, and run its own scripts only."""
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, flags=re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    scripts_allowed = hashes or "'none'"
    policy = (
        f"default-src 'none'; script-src {scripts_allowed}; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Response(text, media_type="text/html", headers={"content-security-policy": policy})


def _ok() -> Response:
    return Response(encode_json({"status": "ok"}), media_type="application/json")
