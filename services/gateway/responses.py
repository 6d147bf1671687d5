"""Answers in OpenAI's shapes: chunks, whole responses and usage. Pure; knows dicts, not bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.gateway.answer import Answer, Piece
from services.gateway.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from services.gateway.plan import Plan


def answer_id(plan: Plan) -> str:
    """The id in all chunks; what follows the dash is the request id."""
    return ("chatcmpl-" if plan.kind == "chat" else "cmpl-") + plan.origin.request_id


def chunk(plan: Plan, piece: Piece) -> dict[str, Any]:
    """One streamed piece. A chat's role comes with its first token: clients take the first chunk for the first token."""
    choice = _choice(plan, piece)
    if plan.kind == "chat":
        choice["delta"] = {"role": "assistant", "content": piece.text} if piece.is_first else {"content": piece.text}
    else:
        choice["text"] = piece.text
    return _chunk(plan, [choice]) | ({"usage": None} if plan.has_usage_chunk else {})


def usage_chunk(answer: Answer) -> dict[str, Any]:
    """The last chunk of a stream that asked for usage."""
    return _chunk(answer.plan, []) | {"usage": usage(answer)}


def response(answer: Answer, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The answer to a request without streaming; `pieces` by choice."""
    plan = answer.plan
    kind = "chat.completion" if plan.kind == "chat" else "text_completion"
    choices = [_choice(plan, piece) | _content(plan, piece.text) for piece in pieces]
    whole = _head(plan, kind) | {"choices": choices, "usage": usage(answer)}
    if plan.prompt_logprobs is not None:
        _add_prompt_logprobs(answer, plan.prompt_logprobs, whole)
    return whole


def _add_prompt_logprobs(answer: Answer, num_top: int, whole: dict[str, Any]) -> None:
    """vLLM's fields: of a chat at the top, of text completions in each choice."""
    told = [
        {"prompt_logprobs": prompt_logprobs(choice.stream.request.prompt_tokens, choice.scored_prompt, num_top)}
        for choice in (answer.choices[:1] if answer.plan.kind == "chat" else answer.choices)
    ]
    for holder, field in zip([whole] if answer.plan.kind == "chat" else whole["choices"], told, strict=True):
        holder |= field


def usage(answer: Answer) -> dict[str, Any]:
    """Token counts, and under `slo` (an extra of ours) what this request measured."""
    prompt_tokens = answer.plan.num_prompt_tokens
    completion_tokens = sum(choice.num_tokens for choice in answer.choices)
    firsts = answer.choices[:: answer.plan.num_samples]
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(c.usage.cached_tokens for c in firsts if c.usage)},
        "slo": _measured(answer),
    }


def _measured(answer: Answer) -> dict[str, Any]:
    usages = [choice.usage for choice in answer.choices if choice.usage is not None]
    return {
        "ttft_ms": _rounded(answer.ttft_ms),
        "target_ttft_ms": answer.plan.slo.ttft_ms,
        "tpot_ms": _rounded(answer.tpot_ms),
        "target_tpot_ms": answer.plan.slo.tpot_ms,
        "attained": answer.is_attained,
        "attainable": answer.is_attainable,
        "verify_steps": sum(item.verify_steps for item in usages),
        "drafted_tokens": sum(item.drafted_tokens for item in usages),
        "accepted_tokens": sum(item.accepted_tokens for item in usages),
    }


def _choice(plan: Plan, piece: Piece) -> dict[str, Any]:
    told = chat_logprobs if plan.kind == "chat" else completion_logprobs
    logprobs = None if piece.scored is None else told(piece.scored)
    return {"index": piece.index, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def _content(plan: Plan, text: str) -> dict[str, Any]:
    if plan.kind == "chat":
        return {"message": {"role": "assistant", "content": text, "refusal": None}}
    return {"text": text}


def _chunk(plan: Plan, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return _head(plan, "chat.completion.chunk" if plan.kind == "chat" else "text_completion") | {"choices": choices}


def _head(plan: Plan, kind: str) -> dict[str, Any]:
    return {"id": answer_id(plan), "object": kind, "created": int(plan.origin.arrived_at), "model": plan.model}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
