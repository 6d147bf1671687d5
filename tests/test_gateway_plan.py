"""From a request to a plan: limits, defaults, seeds and targets. Pure; no server."""

from __future__ import annotations

import msgspec
import pytest

from common.messages import Slo
from services.gateway.errors import ApiError
from services.gateway.models import ServedModel
from services.gateway.openai_api import ChatRequest, CompletionRequest, convert, decode_json
from services.gateway.plan import Limits, check, check_prompts, derive_seed, fit_max_tokens
from services.gateway.slo import attained, resolve_slo

LIMITS = Limits(max_n=4, max_tokens_limit=100, vocab_size=50)


@pytest.mark.parametrize("body", [b'{"model": "\xff"}', b"\xff\xfe", b"{", b""])
def test_what_is_not_json_is_refused_as_that(body: bytes) -> None:
    with pytest.raises(ApiError, match="not valid JSON") as caught:
        decode_json(body, CompletionRequest)
    assert caught.value.status == 400


def test_a_request_without_prompt_is_named() -> None:
    with pytest.raises(ApiError) as wrong:
        decode_json(b'{"model": "m"}', CompletionRequest)
    assert (wrong.value.status, wrong.value.param) == (400, "prompt")
    with pytest.raises(ApiError) as wrong:
        convert({"model": 3, "messages": [{"role": "user", "content": "x"}]}, ChatRequest)
    assert wrong.value.param == "model"


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (ChatRequest(messages=[]), 40),
        (ChatRequest(messages=[], max_tokens=5), 5),
        (ChatRequest(messages=[], max_tokens=5, max_completion_tokens=6), 6),
        (ChatRequest(messages=[], max_tokens=40), 40),
        (ChatRequest(messages=[], max_tokens=41), None),
        (CompletionRequest(prompt="x"), 16),
        (CompletionRequest(prompt="x", max_tokens=17), 17),
    ],
)
def test_max_tokens(request_: ChatRequest | CompletionRequest, expected: int | None) -> None:
    model = ServedModel("m", 100)
    if expected is None:
        with pytest.raises(ApiError):
            fit_max_tokens(request_, 60, model, LIMITS)
    else:
        assert fit_max_tokens(request_, 60, model, LIMITS) == expected


def test_the_default_of_chat_respects_the_gateways_limit() -> None:
    assert fit_max_tokens(ChatRequest(messages=[]), 10, ServedModel("m", 10_000), LIMITS) == 100
    assert fit_max_tokens(CompletionRequest(prompt="x"), 95, ServedModel("m", 100), LIMITS) == 5


def test_what_is_too_much_for_the_context_is_named() -> None:
    model, chat = ServedModel("m", 1000), ChatRequest(messages=[], max_completion_tokens=101)
    with pytest.raises(ApiError, match="lower max_completion_tokens") as context:
        fit_max_tokens(chat, 900, model, LIMITS)
    assert (context.value.param, context.value.code) == ("max_completion_tokens", "context_length_exceeded")
    with pytest.raises(ApiError) as prompt:
        fit_max_tokens(chat, 1000, model, LIMITS)
    assert (prompt.value.param, prompt.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(ApiError, match="at most 100") as limit:
        fit_max_tokens(chat, 10, model, LIMITS)
    assert (limit.value.param, limit.value.code) == ("max_completion_tokens", "integer_above_max_value")


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("max_tokens", 0, "integer_below_min_value"),
        ("top_logprobs", 1000, "integer_above_max_value"),
        ("temperature", -0.5, "decimal_below_min_value"),
        ("top_p", 1.5, "decimal_above_max_value"),
        ("cache_salt", "", "string_below_min_length"),
        ("stop", ["x"] * 99, "array_above_max_length"),
        ("slo", {"speed": 1}, "unknown_parameter"),
        ("response_format", {"type": "xml"}, "invalid_value"),
        ("seed", "x", "invalid_type"),
    ],
)
def test_what_is_wrong_has_openais_code(field: str, value: object, code: str) -> None:
    with pytest.raises(ApiError) as wrong:
        convert({"messages": [{"role": "user", "content": "x"}], field: value}, ChatRequest)
    assert (wrong.value.code, (wrong.value.param or "").split(".")[0]) == (code, field)


def test_what_would_be_valid_is_told() -> None:
    with pytest.raises(ApiError, match=r"messages\[0\].role: .*valid: 'assistant', 'developer', 'system', 'user'"):
        convert({"messages": [{"role": "robot", "content": "x"}]}, ChatRequest)


def test_limits_are_checked_before_any_work() -> None:
    check(ChatRequest(messages=[], n=4, max_tokens=100), LIMITS)
    with pytest.raises(ApiError):
        check(ChatRequest(messages=[], n=5), LIMITS)
    check_prompts([[0, 49]], LIMITS)
    with pytest.raises(ApiError):
        check_prompts([[0, 50]], LIMITS)


def test_seeds_of_samples_are_unrelated_and_repeatable() -> None:
    seeds = [derive_seed(seed, sample) for seed in (0, 1, 2**63 - 1) for sample in range(8)]
    assert len({*seeds}) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[:8] == [derive_seed(0, sample) for sample in range(8)]
    assert derive_seed(5, 0) == 5


def test_slo_verdicts() -> None:
    assert attained(Slo(), 1.0, 1.0) is None
    assert attained(Slo(tpot_ms=10), 999.0, 10.0) is True
    assert attained(Slo(tpot_ms=10), 999.0, 10.1) is False
    assert attained(Slo(tpot_ms=10, ttft_ms=5), 6.0, 1.0) is False
    assert attained(Slo(tpot_ms=10), 1.0, None) is True
    assert resolve_slo(None, {}, Slo(tpot_ms=1, ttft_ms=2)) == Slo(tpot_ms=1, ttft_ms=2)


def test_errors_encode_as_openai_wants() -> None:
    body = msgspec.json.decode(msgspec.json.encode(ApiError(418, "tea").body))
    assert body == {"error": {"message": "tea", "type": "invalid_request_error", "param": None, "code": None}}
    assert ApiError(503, "x", retry_after_ms=1001).headers == {"retry-after-ms": "1001", "retry-after": "2"}
