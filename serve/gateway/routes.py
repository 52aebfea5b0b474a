"""The API's routes. Bodies are read and limited by the middleware, parsed by `schemas.py`."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.errors import InvalidRequest, ModelNotFound
from serve.gateway import context, schemas
from serve.gateway.image_endpoint import ImageEndpoint
from serve.gateway.pool import Pool
from serve.gateway.prompts import encode_chat, encode_text
from serve.gateway.service import Service
from serve.gateway.text_endpoint import CHAT, COMPLETIONS, TextEndpoint
from serve.gateway.tool_use import need_tools_shown
from serve.gateway.wire import encode_json
from serve.request import ModelCard
from serve.text.tokenizer import Tokenizer

LONG_TOKENS = 4096


def api_routes(service: Service) -> APIRouter:
    """Models, chat, completions, images, tokenize, detokenize."""
    router = APIRouter()
    pool, recorder = service.pool, service.telemetry.recorder
    chat, completions = TextEndpoint(CHAT, pool, recorder), TextEndpoint(COMPLETIONS, pool, recorder)
    images = ImageEndpoint(pool, recorder)

    @router.get("/v1/models", tags=["models"], summary="The served models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": _listed(service.pool)})

    @router.get("/v1/models/{model:path}", tags=["models"], summary="One served model; its name may hold slashes")
    async def retrieve_model(http: Request, model: str) -> Response:
        known = {entry["id"]: entry for entry in _listed(service.pool)}
        if model not in known:
            served = ", ".join(repr(name) for name in sorted(known)) or "none"
            raise ModelNotFound(f"there is no such model here; served are {served}", param="model")
        context.of(http.scope).model = known[model]["root"]
        return _json(known[model])

    @router.post(
        "/v1/chat/completions",
        tags=["text"],
        summary="Continue a conversation",
        openapi_extra=_body("ChatCompletionRequest"),
    )
    async def chat_completions(http: Request) -> Response:
        return service.generate(http, schemas.parse_chat(await http.body()), chat)

    @router.post("/v1/completions", tags=["text"], summary="Continue texts", openapi_extra=_body("CompletionRequest"))
    async def text_completions(http: Request) -> Response:
        return service.generate(http, schemas.parse_completion(await http.body()), completions)

    @router.post(
        "/v1/images/generations",
        tags=["images"],
        summary="Draw images",
        openapi_extra=_body("ImageGenerationRequest"),
    )
    async def image_generations(http: Request) -> Response:
        return service.generate(http, schemas.parse_image(await http.body()), images)

    @router.post(
        "/tokenize", tags=["tokens"], summary="Text or messages to token ids", openapi_extra=_body("TokenizeRequest")
    )
    async def tokenize(http: Request) -> Response:
        body = schemas.parse_tokenize(await http.body())
        card = service.pool.models.find(body.model, "text")
        context.of(http.scope).model = card.name
        tokenizer = service.pool.models.tokenizer(card.name)
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            ids = await encode_text(body.prompt, tokenizer, add_special_tokens=special)
        elif body.add_special_tokens:
            raise InvalidRequest("the chat template writes the special tokens", param="add_special_tokens")
        else:
            if body.tools:
                need_tools_shown(card, tokenizer)
            ids = await encode_chat(body, tokenizer, body.tools)
        if len(ids) <= LONG_TOKENS:
            return _tokenized(ids, card, tokenizer, has_strs=bool(body.return_token_strs))
        return await asyncio.to_thread(_tokenized, ids, card, tokenizer, has_strs=bool(body.return_token_strs))

    @router.post("/detokenize", tags=["tokens"], summary="Token ids to text", openapi_extra=_body("DetokenizeRequest"))
    async def detokenize(http: Request) -> Response:
        body = schemas.parse_detokenize(await http.body())
        card = service.pool.models.find(body.model, "text")
        context.of(http.scope).model = card.name
        tokenizer = service.pool.models.tokenizer(card.name)
        if len(body.tokens) > card.max_model_len:
            limit = f"{card.name} has {card.max_model_len} positions"
            raise InvalidRequest(f"tokens has {len(body.tokens)} entries; {limit}", param="tokens")
        if body.tokens and max(body.tokens) >= card.vocab_size:
            raise InvalidRequest(f"tokens holds {max(body.tokens)}; {card.name} has {card.vocab_size}", param="tokens")
        if len(body.tokens) <= LONG_TOKENS:
            return _json({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return _json({"prompt": text})

    return router


def _tokenized(ids: list[int], card: ModelCard, tokenizer: Tokenizer, *, has_strs: bool) -> Response:
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": card.max_model_len, "tokens": ids}
    answer["token_strs"] = [tokenizer.token_text(token_id) for token_id in ids] if has_strs else None
    return _json(answer)


def _json(value: Any) -> Response:
    return Response(encode_json(value), media_type="application/json")


def _listed(pool: Pool) -> list[dict[str, Any]]:
    """OpenAI's Model, for every name and alias; beside it vLLM's `root`, the kind, and what it can be asked for. Of a
    model that sleeps and that no replica has told of yet, only that there is one."""
    listed = [entry for card in pool.models.cards() for entry in _entries(card)]
    unmet = [model for model in pool.hold.models.values() if not pool.models.knows(model.name)]
    return listed + [_entry(name, model.name) for model in unmet for name in model.names]


def _entries(card: ModelCard) -> list[dict[str, Any]]:
    asked_for = {"max_model_len": card.max_model_len} if card.image is None else {"image": asdict(card.image)}
    about = {"created": card.created, "kind": card.kind, **asked_for}
    return [_entry(name, card.name) | about for name in (card.name, *card.aliases)]


def _entry(name: str, root: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "tandem", "root": root, "parent": None}


def _body(schema: str) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{schema}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}
