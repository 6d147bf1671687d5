"""Tiny engines for the tests of the executor: models and their oracle, and a driver that checks every stream."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.messages import DraftTree, DraftTrees, FinishReason, InferenceRequest, LatencyProfile, Sampling, Slo, TokenChunk
from services.executor.engine import Engine, Iteration
from services.executor.model import Decoder
from services.executor.training_work import TrainingEvent
from services.executor.views import Limits
from tests.drafts import Draft
from tests.helpers import as_decoder, tiny_model

torch.set_num_threads(1)  # a tiny operation takes microseconds, to share it among threads up to milliseconds

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
PROFILE = LatencyProfile(points=((1, 5.0), (64, 6.0), (1024, 40.0)), backward_ms_per_token=0.1)


@functools.cache
def tiny_pair(family: str = "llama", **overrides: Any) -> tuple[Any, Decoder]:
    """A random transformers model without an end token, and our decoder with its weights; do not change them."""
    model = tiny_model(family, **(SHAPE | overrides))
    with tempfile.TemporaryDirectory() as folder:
        return model, as_decoder(model, Path(folder))


PROMPTS = {f"r{i}": tuple(random.Random(i).choices(range(97), k=n)) for i, n in enumerate((1, 2, 5, 8, 19, 33))}
NUM_TOKENS = 18


@functools.cache
def truth() -> dict[str, list[int]]:
    """What transformers generates for each of PROMPTS; do not change it."""
    model, _ = tiny_pair()
    return {name: greedy(model, prompt, NUM_TOKENS) for name, prompt in PROMPTS.items()}


def all_requests(**fields: Any) -> list[InferenceRequest]:
    """A request for each of PROMPTS."""
    return [tiny_request(name, prompt, NUM_TOKENS, **fields) for name, prompt in PROMPTS.items()]


def ending_at(decoder: Decoder, *eos_token_ids: int) -> Decoder:
    """The same decoder with these end tokens."""
    changed = copy.copy(decoder)
    changed.config = dataclasses.replace(decoder.config, eos_token_ids=eos_token_ids)
    return changed


def greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What transformers generates, without stopping."""
    ids = torch.tensor([list(prompt)])
    options = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    assert len(out) == len(prompt) + num_tokens
    return out[len(prompt) :]


def random_prompt(num_tokens: int, seed: int = 0, vocab_size: int = 97) -> tuple[int, ...]:
    """Token ids of a tiny vocabulary."""
    return tuple(random.Random(seed).choices(range(vocab_size), k=num_tokens))


def tiny_request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    sampling: Sampling | None = None,
    slo: Slo | None = None,
    **fields: Any,
) -> InferenceRequest:
    """A request to a tiny engine."""
    return InferenceRequest(
        request_id=request_id,
        model="tiny",
        prompt_tokens=tuple(prompt),
        max_tokens=max_tokens,
        sampling=sampling or Sampling(),
        slo=slo or Slo(),
        **fields,
    )


def tiny_engine(decoder: Decoder, **overrides: Any) -> Engine:
    """An engine with pages of four slots and a clock that stands still, so that plans depend on the test alone."""
    options: dict[str, Any] = {
        "num_pages": 96,
        "page_size": 4,
        "profile": PROFILE,
        "limits": Limits(),
        "max_model_len": 4096,
        "max_sequences": 64,
        "max_tree_nodes": 64,
        "max_draft_tokens": 1024,
        "executor_id": "executor",
        "clock": lambda: 1000.0,
    } | overrides
    return Engine(decoder, **options)


class Streams:
    """The tokens of each request; raises when a stream breaks its contract: numbered without gaps, one end, nothing after."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.ends: dict[str, TokenChunk] = {}
        self._next_seq: dict[str, int] = defaultdict(int)

    def take(self, chunks: Iterable[TokenChunk]) -> None:
        """Check and keep chunks in the order in which they were sent."""
        for chunk in chunks:
            assert chunk.request_id not in self.ends, f"{chunk} after the end"
            assert chunk.seq == self._next_seq[chunk.request_id], f"{chunk} out of order"
            assert chunk.tokens or chunk.finish_reason or chunk.prompt_logprobs, f"{chunk} says nothing"
            assert (chunk.usage is not None) == bool(chunk.tokens or chunk.finish_reason)
            self._next_seq[chunk.request_id] += 1
            self.tokens[chunk.request_id] += chunk.tokens
            if chunk.finish_reason is not None:
                self.ends[chunk.request_id] = chunk

    def reason(self, request_id: str) -> FinishReason | None:
        """Why the request ended."""
        return self.ends[request_id].finish_reason


class Driver:
    """Runs an engine as its actor does: trees in, one pass, chunks out, backward work."""

    def __init__(self, engine: Engine, draft: Draft | None = None) -> None:
        self.engine = engine
        self.streams = Streams()
        self.events: list[TrainingEvent] = []
        self.iterations: list[Iteration] = []
        self._draft = draft

    def step(self) -> Iteration:
        """One iteration."""
        if self._draft is not None:
            set_trees(self.engine, *(self._draft(s) for s in self.engine.sequences.values() if s.is_decoding))
        iteration = self.engine.forward_pass()
        self.streams.take(iteration.chunks)
        self.events += self.engine.backward_pass().events
        self.iterations.append(iteration)
        return iteration

    def run(self, max_iterations: int = 1000) -> Streams:
        """Iterate until nothing is left to do."""
        for _ in range(max_iterations):
            if not self.engine.has_work:
                return self.streams
            self.step()
        raise AssertionError(f"work is left after {max_iterations} iterations")


def serve(
    decoder: Decoder,
    *requests: InferenceRequest,
    draft: Draft | None = None,
    adapters: dict[str, str] | None = None,
    engine: Engine | None = None,
) -> Driver:
    """A driver that has run these requests together to their end; `adapters` names those that do not use the base model."""
    engine = engine or tiny_engine(decoder)
    for request in requests:
        assert engine.submit(request, (adapters or {}).get(request.request_id)) is None
    driver = Driver(engine, draft)
    driver.run()
    return driver


def set_trees(engine: Engine, *trees: DraftTree | None) -> None:
    """Give trees to an engine, as a planner's message."""
    given = tuple(tree for tree in trees if tree is not None)
    engine.set_trees(DraftTrees(planner_id="planner", iteration=engine.num_iterations, trees=given))
