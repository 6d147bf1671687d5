"""POST /v1/chat/completions, /v1/completions, /tokenize and /detokenize. Knows HTTP and the core, not NATS."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response

from services.gateway import responses
from services.gateway.answer import Answer, Piece, joined
from services.gateway.core import Core
from services.gateway.docs import body_of
from services.gateway.errors import ApiError, bad_request
from services.gateway.http_errors import json_response
from services.gateway.openai_api import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    decode_generate,
    decode_json,
)
from services.gateway.sse import DONE, EventStream, SendEvent, event, unless_client_leaves
from services.gateway.tokenizer import encode


def inference_routes(core: Core) -> APIRouter:
    """The routes that make or measure text."""
    router = APIRouter(tags=["Inference"])

    @router.post("/v1/chat/completions", summary="Answer a conversation", openapi_extra=body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """OpenAI's chat completions, plus `slo`, `priority` (lower values are prefilled earlier) and vLLM's `top_k`, `min_p`,
        `repetition_penalty`, `min_tokens`, `ignore_eos` and `stop_token_ids`.
        """
        return await _answer(core, request, decode_generate(await request.body(), ChatRequest))

    @router.post("/v1/completions", summary="Continue a text", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """OpenAI's text completions. `prompt` may be text, token ids, or a list of either."""
        return await _answer(core, request, decode_generate(await request.body(), CompletionRequest))

    @router.post("/tokenize", summary="Text to token ids", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """As in vLLM: a prompt, or messages that go through the chat template."""
        return json_response(await _tokenize(core, decode_json(await request.body(), TokenizeRequest)))

    @router.post("/detokenize", summary="Token ids to text", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """As in vLLM: special tokens are shown."""
        tokens = decode_json(await request.body(), DetokenizeRequest).tokens
        if any(token >= core.limits.vocab_size for token in tokens):
            raise bad_request(f"Token ids must be in 0..{core.limits.vocab_size - 1}.", "tokens")
        return json_response({"prompt": core.tokenizer.decode(tokens, skip_special_tokens=False)})

    return router


async def _answer(core: Core, request: Request, body: ChatRequest | CompletionRequest) -> Response:
    plan = await core.plan(body, request.headers, uuid4().hex)
    answer = await unless_client_leaves(request.receive, core.start(plan))
    if plan.is_stream:
        return EventStream(lambda send: _stream(answer, send), lambda: core.end(answer))
    try:
        return json_response(await unless_client_leaves(request.receive, _whole(answer)))
    finally:
        core.end(answer)


async def _whole(answer: Answer) -> dict[str, Any]:
    pieces: list[list[Piece]] = [[] for _ in answer.choices]

    async def emit(piece: Piece) -> None:
        pieces[piece.index].append(piece)

    await answer.run(emit)
    whole = [joined(of_choice) for of_choice in pieces]
    if any(piece.scored for piece in whole):
        return await asyncio.to_thread(responses.response, answer, whole)  # up to millions of numbers
    return responses.response(answer, whole)


async def _stream(answer: Answer, send: SendEvent) -> None:
    async def emit(piece: Piece) -> None:
        await send(event(responses.chunk(answer.plan, piece)))

    try:
        await answer.run(emit)
    except ApiError as error:
        await send(event(error.body))
    else:
        if answer.plan.has_usage_chunk:
            await send(event(responses.usage_chunk(answer)))
    await send(DONE)


async def _tokenize(core: Core, body: TokenizeRequest) -> dict[str, Any]:
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Give either prompt or messages.", "prompt")
    if body.messages is not None:
        text = core.chat_text(body.messages, add_generation_prompt=body.add_generation_prompt is not False)
        add_special_tokens = bool(body.add_special_tokens)
    else:
        text, add_special_tokens = body.prompt or "", body.add_special_tokens is not False
    tokens = await encode(core.tokenizer, text, add_special_tokens=add_special_tokens)
    longest = core.catalog.max_model_len(time.monotonic())
    return {"count": len(tokens), "max_model_len": longest, "tokens": tokens, "token_strs": None}
