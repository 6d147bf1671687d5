"""Tokens to text: characters, stop strings, and independence of how tokens are grouped."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from common.chat import ChatTokenizer
from services.gateway.text_stream import MAX_HELD_TOKENS, Detokenizer, StopMatcher, TextStream
from tests.fakes import write_tiny_model

TEXTS = [
    "The loom lifts the warp threads.",
    "na\u00efve caf\u00e9, \u65e5\u672c\u8a9e and \u0420\u0443\u0441\u0441\u043a\u0438\u0439",
    "a family \U0001f468\u200d\U0001f469\u200d\U0001f467 and a flag \U0001f1e9\U0001f1ea!",
    "  spaces\n\n\tand lines  ",
    "a literal \ufffd stays",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def pushed(stream: TextStream, groups: list[list[int]]) -> tuple[str, int]:
    """(the text, the number of tokens used) of a stream that gets these groups."""
    text, num_tokens = "", 0
    for group in groups:
        piece = stream.push(group)
        text += piece.text
        num_tokens += piece.num_tokens
        if piece.stopped:
            return text, num_tokens
    return text + stream.finish().text, num_tokens


def grouped(tokens: list[int], seed: int) -> list[list[int]]:
    """The tokens cut into groups of random sizes."""
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(len(tokens)), min(3, len(tokens))))
    return [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_token_by_token(tokenizer: ChatTokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer.decode)
    pieces = [detokenizer.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + detokenizer.finish() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(5))
def test_grouping_does_not_matter(tokenizer: ChatTokenizer, text: str, seed: int) -> None:
    tokens = tokenizer.encode(text)
    prompt = tokenizer.encode("What is a loom?")
    assert pushed(TextStream(tokenizer.decode, prompt), grouped(tokens, seed)) == (text, len(tokens))


def test_an_incomplete_character_is_shown_only_at_the_end(tokenizer: ChatTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer.decode)
    tokens = tokenizer.encode("\U0001f468")
    assert len(tokens) == 4
    assert [detokenizer.push(token) for token in tokens[:3]] == ["", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_a_character_may_begin_in_the_prompt(tokenizer: ChatTokenizer) -> None:
    tokens = tokenizer.encode("a\U0001f468b")
    detokenizer = Detokenizer(tokenizer.decode, tokens[:3])
    assert "".join(detokenizer.push(token) for token in tokens[3:]) == "\U0001f468b"


def test_bytes_that_are_no_text_do_not_pile_up(tokenizer: ChatTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer.decode)
    first_byte = tokenizer.encode("\U0001f468")[0]
    pieces = [detokenizer.push(first_byte) for _ in range(3 * MAX_HELD_TOKENS)]
    assert sum(map(len, pieces)) >= 2 * MAX_HELD_TOKENS


def test_special_tokens_have_no_text_and_change_none(tokenizer: ChatTokenizer) -> None:
    (end,) = tokenizer.encode("<|im_end|>")
    detokenizer = Detokenizer(tokenizer.decode)
    tokens = tokenizer.encode(" hello") + [end] * (2 * MAX_HELD_TOKENS) + tokenizer.encode(" world")
    assert "".join(detokenizer.push(token) for token in tokens) == " hello world"


def sentencepiece(words: list[str]) -> Tokenizer:
    """A Llama-2-like tokenizer: spaces as U+2581, unknown characters as bytes, one leading space stripped."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_sentencepiece_keeps_spaces_between_words_and_joins_bytes() -> None:
    words = ["\u2581hello", "\u2581world", "!", "\u2581"]
    tokenizer = sentencepiece(words)
    ids = {word: number for number, word in enumerate(words, start=257)}
    euro = [1 + byte for byte in "\u20ac".encode()]
    tokens = [ids["\u2581hello"], ids["\u2581world"], ids["\u2581"], *euro, *euro, ids["!"], ids["\u2581world"]]
    alone = TextStream(tokenizer.decode)
    assert pushed(alone, [[token] for token in tokens])[0] == "hello world \u20ac\u20ac! world"
    after_prompt = TextStream(tokenizer.decode, [ids["\u2581hello"]])
    assert pushed(after_prompt, [tokens])[0] == " hello world \u20ac\u20ac! world"


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["END"], "all good END not this", "all good "),
        (["END"], "no such thing EN", "no such thing EN"),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        (["abcd", "c"], "xxabcd", "xxab"),
        (["bcd", "abcd"], "xxabcd", "xx"),
        (["aab"], "aaab", "a"),
        (["x"], "", ""),
        ([], "anything", "anything"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings(stops: list[str], text: str, shown: str, size: int) -> None:
    matcher = StopMatcher(stops)
    out = ""
    for i in range(0, len(text), size):
        piece, stopped = matcher.push(text[i : i + size])
        out += piece
        assert shown.startswith(out), "text was shown that belongs to a stop string"
        if stopped:
            break
    else:
        out += matcher.finish()
    assert out == shown


def test_a_stop_string_counts_only_the_tokens_it_needs(tokenizer: ChatTokenizer) -> None:
    tokens = tokenizer.encode("one two three four")
    piece = TextStream(tokenizer.decode, stops=["two"]).push(tokens)
    assert (piece.text, piece.stopped) == ("one ", True)
    assert piece.num_tokens == len(tokenizer.encode("one two"))


def test_a_stop_string_can_end_in_the_rest(tokenizer: ChatTokenizer) -> None:
    stream = TextStream(tokenizer.decode, stops=["\ufffd"])
    assert stream.push(tokenizer.encode("ok\U0001f468")[:-1]).text == "ok"
    assert stream.finish().stopped


def test_the_tiny_model_is_complete(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(write_tiny_model(tmp_path))
    assert (
        tokenizer.render([{"role": "user", "content": "hello"}]) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.max_token_chars >= len("<|endoftext|>")
