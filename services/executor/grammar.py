"""Which tokens may come next under a request's constraint. Knows llguidance and token ids; no logits, sequences or bus.

llguidance bounds its own work: grammar size, parser items and lexer steps of each mask. What exceeds a bound is an error of
that grammar, never of the process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from numpy.typing import NDArray

from common.messages import MAX_CONSTRAINT_CHARS, Constraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""A lexer state takes up to 2 kB, and each sequence may have its own; every other limit is the library's."""
WHITESPACE = r"(\x20|\r?\n[\x20\t]{0,32})"
"""Between JSON's tokens: none, a space, or a new line and its indentation. Small models never end it where they may go on."""
MAX_GRAMMAR_CHARS = 16384
PROBE_TOKENS = 16
MAX_PROBE_S = 0.15
"""CPU time that a grammar's first masks may take; ordinary ones take a few ms with the very first, which fills caches."""
MAX_MESSAGE_CHARS = 400


class GrammarError(ValueError):
    """The constraint is malformed, not supported or too complex, or the tokens do not follow it; the message says which."""


class Vocabulary:
    """The bytes of every token of a model, and which tokens end its output."""

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.ends = frozenset(tokenizer.eos_tokens)

    @classmethod
    def load(cls, model_dir: Path, vocab_size: int, eos_token_ids: Seq[int]) -> Vocabulary:
        """Read tokenizer.json; a second or so for large ones. Raises GrammarError without a usable one."""
        path = model_dir / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            tokenizer = LLTokenizer(text, eos_token=list(eos_token_ids) or None)
        except (OSError, ValueError) as error:
            raise GrammarError(f"constraints need the model's tokenizer.json, which cannot be used: {error}") from error
        return cls(tokenizer, vocab_size)

    def ends_with(self, stop_token_ids: Iterable[int]) -> frozenset[int]:
        """The end tokens of a request: the model's, and what it stops at beside them as far as that is no text."""
        known = [token for token in stop_token_ids if 0 <= token < self.tokenizer.vocab_size]
        return self.ends | {token for token in known if self.tokenizer.is_special_token(token)}


class Grammar:
    """A compiled constraint. Raises GrammarError when there is no output that it allows, or when it is too costly."""

    def __init__(self, constraint: Constraint, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._matcher = LLMatcher(vocabulary.tokenizer, _source(constraint), log_level=0, limits=LIMITS)
        _check(self._matcher)
        _probe(GrammarState(self._matcher.deep_copy(), vocabulary, vocabulary.ends))

    def start(self, generated: Seq[int] = (), stop_token_ids: Iterable[int] = ()) -> GrammarState:
        """The state after these output tokens. Raises GrammarError if they do not follow the grammar."""
        state = GrammarState(self._matcher.deep_copy(), self._vocabulary, self._vocabulary.ends_with(stop_token_ids))
        for token in generated:
            state.advance(token)
        return state


class GrammarState:
    """Where one sequence stands in its grammar; one thread at a time may use it.

    `complete_at` is the number of output tokens with which the output was complete, so that nothing more can follow it; None:
    it is not. Beyond it everything is allowed, for requests that go on nevertheless.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, ends: frozenset[int]) -> None:
        self.num_tokens = 0
        self.complete_at: int | None = None
        self._matcher = matcher
        self._vocab_size = vocabulary.vocab_size
        self._ends = ends
        self._end_ids = [token for token in sorted(ends) if token < vocabulary.vocab_size]

    def allowed(self) -> NDArray[np.bool_] | None:
        """Bool [V]: the tokens that may come next, end tokens where the output may end; None: all. Raises GrammarError."""
        if self.complete_at is not None:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        _check(self._matcher)
        allowed_V = np.zeros(self._vocab_size, dtype=np.bool_)
        known = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        allowed_V[: len(known)] = known
        if self._matcher.is_accepting():
            allowed_V[self._end_ids] = True
        if not allowed_V.any():
            raise GrammarError("no token can continue the output")
        return allowed_V

    def advance(self, token: int) -> None:
        """Append an output token. Raises GrammarError if it is not allowed."""
        self.num_tokens += 1
        if self.complete_at is not None:
            return
        if not 0 <= token < self._vocab_size:
            raise GrammarError(f"token {token} is unknown")
        if token in self._ends and self._matcher.is_accepting():
            self.complete_at = self.num_tokens
            return
        self._matcher.consume_token(token)
        _check(self._matcher)
        if self._matcher.is_stopped():
            self.complete_at = self.num_tokens


def _source(constraint: Constraint) -> str:
    """The constraint in the library's own form."""
    if len(constraint.text) > MAX_CONSTRAINT_CHARS:
        raise GrammarError(f"longer than {MAX_CONSTRAINT_CHARS} characters")
    try:
        if constraint.kind == "json_object":
            return _unforced(_json('{"type": "object"}'))
        if constraint.kind == "json_schema":
            return _unforced(_json(constraint.text))
        if constraint.kind == "choice":
            return _unforced({"lark_grammar": _alternatives(constraint.text)})
        if constraint.kind == "regex":
            return _unforced(_only(LLMatcher.grammar_from_regex(ascii_digits(constraint.text))))
        return _unforced({"lark_grammar": _lark_or_gbnf(constraint.text)})
    except ValueError as error:
        raise GrammarError(_short(error)) from error


def ascii_digits(regex: str) -> str:
    """The regex with `\\d` as 0 to 9, as in ECMAScript; the library takes it as any script's digits."""
    found, is_class, at = list[str](), False, 0
    while at < len(regex):
        part = regex[at : at + 2] if regex[at] == "\\" else regex[at]
        if part == r"\d":
            found.append("0-9" if is_class else "[0-9]")
        elif part == r"\D" and not is_class:
            found.append("[^0-9]")
        else:
            found.append(part)
            is_class = part != "]" if is_class else part == "["
        at += len(part)
    return "".join(found)


def _unforced(grammar: dict[str, Any]) -> str:
    """Allows every spelling of text that has to come. By itself the library allows the tokenizer's own spelling only, which
    would not be the target's distribution.
    """
    outer = {"name": "output", "lark_grammar": '%llguidance {"no_forcing": true}\nstart: @constraint'}
    return msgspec.json.encode({"grammars": [outer, grammar | {"name": "constraint"}]}).decode()


def _only(source: str) -> dict[str, Any]:
    (grammar,) = msgspec.json.decode(source)["grammars"]
    return dict(grammar)


def _json(schema: str) -> dict[str, Any]:
    """These options win over those that a schema may carry: it cannot have keywords ignored."""
    options: JsonCompileOptions = {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
    return _only(LLMatcher.grammar_from_json_schema(schema, overrides=options))


def _lark_or_gbnf(text: str) -> str:
    """The library tells them apart, and converts GBNF, in Python that takes quadratic time: in blank space without letting
    other threads run. So blank lines and indentation go first, and the rest is short.
    """
    if len(text) > MAX_GRAMMAR_CHARS:
        raise GrammarError(f"longer than {MAX_GRAMMAR_CHARS} characters")
    return grammar_from("grammar", "\n".join(filter(None, map(str.strip, text.split("\n")))))


def _alternatives(text: str) -> str:
    """A grammar of one terminal: as many alternatives of a rule would cost the parser far more."""
    choices = msgspec.json.decode(text, type=list[str])
    if not choices:
        raise GrammarError("an empty list of choices")
    return "start: CHOICE\nCHOICE: " + " | ".join(msgspec.json.encode(choice).decode() for choice in choices)


def _probe(state: GrammarState) -> None:
    """Walk a few tokens, for what only shows then: an unsatisfiable, exploding or very slow grammar."""
    started_s = time.thread_time()
    for _ in range(PROBE_TOKENS):
        allowed_V = state.allowed()
        if time.thread_time() - started_s > MAX_PROBE_S:
            raise GrammarError("too complex: its first tokens take too long")
        if allowed_V is None:
            return
        choices = np.flatnonzero(allowed_V)
        state.advance(int(choices[len(choices) // 2]))


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(_short(matcher.get_error()))


def _short(error: object) -> str:
    text = str(error).removesuffix("\n<non-verbose/>")
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + "..."
