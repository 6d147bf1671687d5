"""What all front doors share: from a typed request to a running answer. Knows no HTTP and no NATS subject of its own."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.chat import ChatTemplateError, ChatTokenizer
from common.messages import Slo
from services.gateway.answer import Answer
from services.gateway.errors import ApiError, bad_request, unavailable
from services.gateway.generation import Generations
from services.gateway.metrics import Metrics
from services.gateway.models import Catalog, ServedModel
from services.gateway.openai_api import ChatMessage, ChatRequest, CompletionRequest
from services.gateway.plan import Limits, Origin, Plan, check, check_prompts, make_plan
from services.gateway.slo import resolve_slo
from services.gateway.tokenizer import encode


@dataclass(kw_only=True)
class Core:
    """The gateway's state without its doors."""

    tokenizer: ChatTokenizer
    catalog: Catalog
    generations: Generations
    metrics: Metrics
    limits: Limits
    default_slo: Slo
    request_timeout_s: float
    is_draining: bool = False
    counters: Counter[str] = field(default_factory=Counter)
    answers: set[Answer] = field(default_factory=set)

    async def plan(self, request: ChatRequest | CompletionRequest, headers: Mapping[str, str], request_id: str) -> Plan:
        """Validate, apply the template, tokenize. Raises ApiError. Header names are lower case."""
        if self.is_draining:
            raise unavailable("This gateway is shutting down.", "draining")
        check(request, self.limits)
        slo = resolve_slo(request.slo, headers, self.default_slo)
        origin = Origin(request_id=request_id, arrived_at=time.time(), seed=secrets.randbits(63))
        model = self.catalog.find(request.model, time.monotonic())
        prompts = await self._prompts(request, model)
        check_prompts(prompts, self.limits)
        return make_plan(
            request,
            prompts,
            model=model,
            slo=slo,
            limits=self.limits,
            model_stops=self.tokenizer.eos_token_ids,
            origin=origin,
            echoes=self._echoes(request, prompts),
        )

    async def start(self, plan: Plan) -> Answer:
        """Have the request admitted. Raises ApiError. What is returned must be passed to `end`, whatever happens."""
        now = time.monotonic()
        arrived_at = now - (time.time() - plan.origin.arrived_at)
        answer = Answer(
            plan,
            self.generations,
            self.tokenizer,
            arrived_at=arrived_at,
            deadline=now + self.request_timeout_s,
            on_tokens=self.metrics.observe_tokens,
        )
        self.counters["requests"] += 1
        self.answers.add(answer)
        try:
            await answer.open()
        except ApiError:
            self.answers.discard(answer)
            answer.close()
            raise
        except BaseException:
            self.end(answer)
            raise
        return answer

    def end(self, answer: Answer) -> None:
        """Stop what still runs of the answer and count it; a second call does nothing."""
        if answer not in self.answers:
            return
        self.answers.discard(answer)
        if answer.close() and answer.error is None:
            self.counters["abandoned_requests"] += 1
        self.counters["failed_requests"] += answer.error is not None
        self.metrics.observe(answer, time.monotonic())

    def fail(self, error: ApiError, request_id: str | None = None) -> None:
        """Let the answers with this request id end with an error; without an id, all answers."""
        for answer in self.answers:
            if request_id in (None, answer.plan.origin.request_id):
                for choice in answer.choices:
                    choice.stream.fail(error)

    def chat_text(self, messages: list[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation. Raises ApiError 400 without a template, or when it refuses them."""
        roles = {"developer": "system"}
        plain = [{"role": roles.get(message.role, message.role), "content": message.text} for message in messages]
        try:
            return self.tokenizer.render(plain, add_generation_prompt=add_generation_prompt)
        except ChatTemplateError as error:
            raise bad_request(str(error), "messages") from error

    async def _prompts(self, request: ChatRequest | CompletionRequest, model: ServedModel) -> list[tuple[int, ...]]:
        if isinstance(request, ChatRequest):
            return [await self._encode(self.chat_text(request.messages), model, "messages", add_special_tokens=False)]
        return [
            await self._encode(item, model, "prompt", add_special_tokens=True) if isinstance(item, str) else tuple(item)
            for item in split_prompts(request.prompt)
        ]

    def _echoes(self, request: ChatRequest | CompletionRequest, prompts: list[tuple[int, ...]]) -> tuple[str, ...]:
        """The prompts as the answer repeats them: texts as they came."""
        if isinstance(request, ChatRequest) or not request.echo:
            return ()
        items = zip(split_prompts(request.prompt), prompts, strict=True)
        return tuple(
            item if isinstance(item, str) else self.tokenizer.decode(tokens, skip_special_tokens=False)
            for item, tokens in items
        )

    async def _encode(self, text: str, model: ServedModel, param: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        if len(text) > model.max_model_len * self.tokenizer.max_token_chars:
            raise bad_request("The prompt is longer than the model's context.", param, "context_length_exceeded")
        return await encode(self.tokenizer, text, add_special_tokens=add_special_tokens)


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """OpenAI's four forms of `prompt` as a list of prompts. Raises ApiError 400 for a mixture."""
    if isinstance(prompt, str):
        return [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    numbers = [item for item in prompt if isinstance(item, int)]
    lists = [item for item in prompt if isinstance(item, list)]
    if len(numbers) == len(prompt):
        return [numbers]
    if len(texts) == len(prompt):
        return list(texts)
    if len(lists) == len(prompt):
        return list(lists)
    raise bad_request("prompt must be text, token ids, or a list of either, not a mixture.", "prompt")
