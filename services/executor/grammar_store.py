"""Compiled constraints of one executor, made on a thread of their own. Knows time and memory limits, not what a grammar is."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.messages import Constraint, InferenceRequest, Rejected
from services.executor.grammar import Grammar, GrammarError, GrammarState, Vocabulary
from services.executor.model_config import ModelConfig

MAX_GRAMMARS = 32
MAX_WAIT_S = 2.5
"""Longest that a request waits for its grammar: admission takes an executor for dead that is silent for 4 s."""


class GrammarStore:
    """The grammars used last. The vocabulary is read when the first one is asked for."""

    def __init__(self, model_dir: Path, config: ModelConfig) -> None:
        self._model_dir = model_dir
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._vocabulary: Vocabulary | None = None
        self._grammars: OrderedDict[Constraint, Grammar] = OrderedDict()

    async def state_of(self, request: InferenceRequest) -> GrammarState | Rejected | None:
        """The state of the request's constraint after the tokens that it generated elsewhere; None without a constraint."""
        constraint = request.constraint
        if constraint is None:
            return None
        making = self._thread.submit(self._make, constraint, request)
        try:
            state = await asyncio.wait_for(asyncio.wrap_future(making), MAX_WAIT_S)
        except GrammarError as error:
            return Rejected(reason="invalid", message=f"{constraint.kind}: {error}")
        except TimeoutError:
            return self._late(constraint, has_started=not making.cancelled())
        if state.complete_at is not None and not request.ignore_eos:
            return Rejected(reason="invalid", message="the output so far is complete under its constraint")
        return state

    def _late(self, constraint: Constraint, *, has_started: bool) -> Rejected:
        if has_started and self._vocabulary is not None:
            return Rejected(reason="invalid", message=f"{constraint.kind}: too complex: compiling takes over {MAX_WAIT_S:g} s")
        return Rejected(reason="overloaded", message="other constraints are being compiled", retry_after_ms=1000)

    def _make(self, constraint: Constraint, request: InferenceRequest) -> GrammarState:
        """Runs on the thread."""
        if self._vocabulary is None:
            config = self._config
            self._vocabulary = Vocabulary.load(self._model_dir, config.vocab_size, config.eos_token_ids)
        grammar = self._grammars.pop(constraint, None) or Grammar(constraint, self._vocabulary)
        self._grammars[constraint] = grammar
        if len(self._grammars) > MAX_GRAMMARS:
            self._grammars.popitem(last=False)
        generated = request.prompt_tokens[len(request.prompt_tokens) - request.num_generated :]
        return grammar.start(generated, request.stop_token_ids)
