"""The request bodies of OpenAI's API as types, and bytes to them. Knows shapes and ranges, not models or transports."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from common.messages import MAX_LOGIT_BIAS, MAX_SALT_CHARS, MAX_TOP_LOGPROBS
from common.validation import find_fault
from services.gateway.errors import ApiError, bad_request

T = TypeVar("T")
G = TypeVar("G", bound="GenerateRequest")
Milliseconds = Annotated[float, Meta(gt=0, le=1e9)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
NumTop = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]

MAX_MESSAGES = 4096
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64


class StreamOptions(Struct, kw_only=True):
    """`include_usage` asks for one more chunk, with the usage and no choices."""

    include_usage: bool | None = None


class SloFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """Latency targets: mean time per output token after the first, and time to the first token."""

    tpot_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None


class JsonSchemaFormat(Struct, kw_only=True):
    """`strict` changes nothing: a schema is always enforced."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`: exactly one of these."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerateRequest(Struct, kw_only=True):
    """What chat and text completions share. Fields not named here are ignored."""

    model: str | None = None
    """The base model if it is not named."""
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    seed: Seed | None = None
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Meta(ge=0, lt=2**31)]], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    slo: SloFields | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31, description="Lower values are prefilled earlier.")] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    """Only requests with the same salt share cached prefixes."""
    user: str | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=MAX_LOGIT_BIAS)] | None = None
    prompt_logprobs: NumTop | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class ContentPart(Struct):
    """One part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(Struct):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    """None in turns of the assistant alone: it may have called tools."""

    def __post_init__(self) -> None:
        if self.content is None and self.role != "assistant":
            raise ValueError("Object missing required field `content`")  # msgspec adds the place

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(GenerateRequest, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: NumTop | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None


class CompletionRequest(GenerateRequest, kw_only=True):
    """Body of POST /v1/completions. `prompt` is text, token ids, or a list of either."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0, description="0 only with echo.")] | None = None
    logprobs: NumTop | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class LoadLoraAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's body, and the base model's name if the adapter's maker called it otherwise."""

    lora_name: str = ""
    lora_path: str = ""
    base_model_name: str | None = None


class UnloadLoraAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's body."""

    lora_name: str = ""
    lora_int_id: int | None = None


class TokenizeRequest(Struct, kw_only=True):
    """Body of POST /tokenize: a prompt, or messages that go through the chat template."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[Annotated[int, Meta(ge=0)]]
    model: str | None = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": (None, []),
    "suffix": (None, ""),
}
"""Parameters that Heddle does not implement yet, and the values that change nothing."""


_LIKE_SLO = re.compile("slos?(?![a-z])")
"""A name that begins with the word, not with `slot` or `slow`."""
_SLO_EXAMPLE = '"slo": {"tpot_ms": 50, "ttft_ms": 1000}'

_CODES: tuple[tuple[str, str], ...] = (
    ("missing required field", "missing_required_parameter"),
    ("unknown field", "unknown_parameter"),
    ("got `", "invalid_type"),
    ("Expected `int` >", "integer_below_min_value"),
    ("Expected `int` <", "integer_above_max_value"),
    ("Expected `float` >", "decimal_below_min_value"),
    ("Expected `float` <", "decimal_above_max_value"),
    ("Expected `array` of length >", "array_below_min_length"),
    ("Expected `array` of length <", "array_above_max_length"),
    ("Expected `object` of length <", "object_above_max_properties"),
    ("Expected `str` of length >", "string_below_min_length"),
    ("Expected `str` of length <", "string_above_max_length"),
)
"""What msgspec says of a value, and OpenAI's code for it; `invalid_value` for all else."""


def check_supported(request: GenerateRequest) -> None:
    """Raises ApiError 400 for a parameter whose value would change the result but is not implemented."""
    for name, neutral in _NEUTRAL.items():
        value = getattr(request, name, None)
        if not any(type(value) is type(allowed) and value == allowed for allowed in neutral):
            raise _unsupported(name)
    if isinstance(request, ChatRequest) and request.tools and request.tool_choice != "none":
        raise bad_request("Tools are not supported.", param="tools", code="unsupported_parameter")
    if isinstance(request, CompletionRequest) and request.best_of not in (None, request.n or 1):
        raise _unsupported("best_of")


def check_names(names: Iterable[str]) -> None:
    """Raises ApiError 400 for a field of the body that was meant for its `slo`; what else we do not know is ignored."""
    for name in names:
        if name in SloFields.__struct_fields__ or (name != "slo" and _LIKE_SLO.match(name)):
            message = f"Unknown field {name[:40]!r}: latency targets are given as {_SLO_EXAMPLE}, either of them or both."
            raise bad_request(message, name[:40], "unknown_parameter")


def decode_generate(data: bytes, kind: type[G]) -> G:
    """The body of a request for text. Raises ApiError 400 that names the field."""
    request = decode_json(data, kind)
    check_names(decode_json(data, dict[str, msgspec.Raw]))
    return request


def convert_generate(body: object) -> ChatRequest | CompletionRequest:
    """A decoded body without a route: a chat if it has `messages`, else a completion. Raises ApiError 400."""
    if not isinstance(body, dict):
        return convert(body, CompletionRequest)
    given = [name for name in ("messages", "prompt") if body.get(name) is not None]
    if len(given) > 1:
        raise bad_request("Give either messages or prompt, not both.", "prompt")
    if not given:
        message = "Invalid request: missing required field `messages` (of a chat) or `prompt` (of a text completion)"
        raise bad_request(message, "messages", "missing_required_parameter")
    request = convert(body, ChatRequest) if "messages" in given else convert(body, CompletionRequest)
    check_names(body)
    return request


def decode_json(data: bytes, kind: type[T]) -> T:
    """The body as a typed request. Raises ApiError 400 that names the field."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(error, kind) from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from error


def convert(value: object, kind: type[T]) -> T:
    """A decoded map as a typed request. Raises ApiError 400 that names the field."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _invalid(error, kind) from error


def _unsupported(name: str) -> ApiError:
    return bad_request(f"The parameter {name!r} is not supported with this value.", param=name, code="unsupported_parameter")


def _invalid(error: msgspec.ValidationError, kind: object) -> ApiError:
    fault = find_fault(error, kind)
    code = next((code for words, code in _CODES if words in fault.problem), "invalid_value")
    return bad_request(f"Invalid request: {fault}", param=fault.param or None, code=code)
