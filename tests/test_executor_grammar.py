"""What a grammar allows, against a brute-force oracle over the vocabulary; replays; several models' ways to spell bytes."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from common.messages import Constraint
from services.executor.grammar import Grammar, GrammarError, GrammarState, Vocabulary, ascii_digits
from tests.grammars import CHOICES, CONSTRAINTS, grammar, ids, tokenizer, vocabulary

EOS = tokenizer().eos_token_ids[0]
ODD = ['a"b', "a\\b", "a\nb", "\u00e9t\u00e9", "\U0001f9f6", "", "a/b|c", "%start: x"]
PARTS = [("a", "ab", "the", "that"), ("", "a", "ab", "the", "that"), ("", "x")]
LANGUAGES: dict[str, tuple[Constraint, list[str]]] = {
    "choice": (CONSTRAINTS["choice"][0], CHOICES),
    "odd choice": (Constraint(kind="choice", text=json.dumps(ODD)), ODD),
    "regex": (Constraint(kind="regex", text="(ab?|th(e|at)){1,2}x?"), ["".join(parts) for parts in itertools.product(*PARTS)]),
    "slash": (Constraint(kind="regex", text="a/b|a\\\\"), ["a/b", "a\\"]),
    "enum": (Constraint(kind="json_schema", text='{"enum": ["one", 2, null, "on"]}'), ['"one"', "2", "null", '"on"']),
    "lark": (Constraint(kind="grammar", text='start: a\n   | "loom"\n\n\na: "th" /[ei]/'), ["loom", "the", "thi"]),
    "gbnf": (Constraint(kind="grammar", text='\nroot ::= "user" x?\n\nx ::= "s" | " one"\n'), ["user", "users", "user one"]),
}
"""Small languages in the words of each kind, and all their words."""


def oracle(words: list[str], so_far: bytes) -> set[int]:
    """The tokens that keep some word possible, and the end token after a whole word."""
    rests = [word.encode()[len(so_far) :] for word in words if word.encode().startswith(so_far)]
    spelled = {token: piece for token in range(tokenizer().vocab_size) if (piece := _spelling(token))}
    found = {token for token, piece in spelled.items() if any(rest.startswith(piece) for rest in rests)}
    return found | ({EOS} if b"" in rests else set())


def _spelling(token: int) -> bytes:
    if vocabulary().tokenizer.is_special_token(token):
        return b""
    return bytes(vocabulary().tokenizer.decode_bytes([token]))


def allowed(state: GrammarState) -> set[int]:
    allowed_V = state.allowed()
    assert allowed_V is not None
    assert allowed_V.shape == (tokenizer().vocab_size,)
    return set(np.flatnonzero(allowed_V).tolist())


@pytest.mark.parametrize("name", LANGUAGES)
def test_exactly_the_tokens_that_keep_a_word_possible_are_allowed(name: str) -> None:
    constraint, words = LANGUAGES[name]
    rng, endings = random.Random(0), set()
    for _ in range(25):
        state, so_far = grammar(constraint).start(), b""
        while state.complete_at is None:
            expected = oracle(words, so_far)
            assert allowed(state) == expected, (so_far, expected)
            token = rng.choice(sorted(expected))
            state.advance(token)
            so_far += b"" if token == EOS else _spelling(token)
        assert so_far.decode() in words
        assert not {word for word in words if word.encode().startswith(so_far) and word.encode() != so_far} or token == EOS
        assert state.allowed() is None
        endings.add(so_far)
    assert len(endings) > 1


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_replay_equals_going_on(kind: str) -> None:
    rng, compiled = random.Random(1), grammar(CONSTRAINTS[kind][0])
    state, tokens = compiled.start(), list[int]()
    for _ in range(12):
        if state.complete_at is not None:
            break
        replayed = compiled.start(tokens)
        expected = allowed(state)
        assert allowed(replayed) == expected
        tokens.append(rng.choice(sorted(expected)))
        state.advance(tokens[-1])
    assert compiled.start(tokens).complete_at == state.complete_at
    assert len(tokens) > 1


def test_tokens_that_do_not_follow_are_refused() -> None:
    compiled = grammar(CONSTRAINTS["choice"][0])
    for wrong in (ids("x"), ids("redx"), [EOS], [-1], [10**9], [2**70], [tokenizer().vocab_size]):
        with pytest.raises(GrammarError):
            compiled.start(wrong)
    compiled.start(ids("red"))


def test_whitespace_in_json_ends() -> None:
    state = grammar(CONSTRAINTS["json_object"][0]).start(ids("{\n" + " " * 20))
    spaces = 20
    while ids(" ")[0] in allowed(state):
        state.advance(ids(" ")[0])
        spaces += 1
    assert spaces == 32
    for text in ('{"a":1}', '{ "a": 1 }', '{\n  "a": [\n    1\n  ]\n}', '{\r\n\t"a" : {}\r\n}'):
        assert grammar(CONSTRAINTS["json_object"][0]).start(ids(text)).complete_at is not None, text


def test_a_schema_cannot_loosen_itself() -> None:
    loose = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.raises(GrammarError, match="uniqueItems"):
        Grammar(Constraint(kind="json_schema", text=json.dumps(loose)), vocabulary())


def test_a_vocabulary_that_spells_bytes(tmp_path: Path) -> None:
    """As Llama 2 and Mistral do: a visible blank for spaces, and 256 tokens for bytes that have no word."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a", "b"]
    made = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)}, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    bytes_only = Vocabulary.load(tmp_path, len(words) + 5, (2,))  # a model may have more words than its tokenizer
    compiled = Grammar(Constraint(kind="regex", text=" a\u00e9?"), bytes_only)
    state = compiled.start()
    by_name = {word: i for i, word in enumerate(words)}
    assert state.allowed() is not None
    assert {words[i] for i in np.flatnonzero(state.allowed())} == {"\u2581", "\u2581a", "<0x20>"}  # type: ignore[arg-type]
    for word in ("\u2581a", "<0xC3>"):
        state.advance(by_name[word])
    assert {words[i] for i in np.flatnonzero(state.allowed())} == {"<0xA9>"}  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [None, "", "{}", "no json", '{"model": {"type": "BPE"}}'])
def test_without_a_usable_tokenizer(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(GrammarError, match=re.escape("tokenizer.json")):
        Vocabulary.load(tmp_path, 10, (2,))


@pytest.mark.parametrize(
    ("regex", "expected"),
    [
        (r"\d{3}-\d", "[0-9]{3}-[0-9]"),
        (r"[\d.]+\D", "[0-9.]+[^0-9]"),
        (r"\\d[^\]\d]\d", r"\\d[^\]0-9][0-9]"),
        ("a]", "a]"),
        ("a\\", "a\\"),
    ],
)
def test_digits_of_a_regex_are_ascii(regex: str, expected: str) -> None:
    assert ascii_digits(regex) == expected
