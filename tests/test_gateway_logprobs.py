"""Log probabilities and echo as official clients read them: chat and text, whole, streamed, over NATS and after a move."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer, decoders, models

from common.chat import ChatTokenizer
from common.token_bytes import token_bytes_of
from services.gateway.answer import MAX_PIECE_TOKENS, Piece, joined, split
from services.gateway.logprobs import ScoredToken, Scorer, completion_logprobs
from tests.fakes import MODEL, REPLY, SAID, SENTENCES, fake_logprobs, write_tiny_model
from tests.gateway_stage import Connect, staged
from tests.test_gateway_nats import ask

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
PROMPT = "one w\u00f6rld \U0001f468 two"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def expected_logprobs(tokens: list[int]) -> list[float]:
    return [-token / 64 for token in tokens]


@pytest.mark.parametrize("num_top", [0, 3])
async def test_a_chat_tells_every_token(connect: Connect, model_dir: Path, num_top: int) -> None:
    async with staged(connect, model_dir, fake={"chunk_size": 3}) as stage:
        options = CHAT | {"logprobs": True, "top_logprobs": num_top}
        whole = (await stage.openai.chat.completions.create(**options)).choices[0]
        streamed = [chunk async for chunk in await stage.openai.chat.completions.create(**options, stream=True)]
        tokens = stage.tokenizer.encode(REPLY)
        assert whole.logprobs is not None
        content = whole.logprobs.content or []
        assert [entry.logprob for entry in content] == expected_logprobs(tokens)
        assert b"".join(bytes(entry.bytes or ()) for entry in content).decode() == REPLY
        assert {len(entry.top_logprobs) for entry in content} == {num_top}
        if num_top:
            best = content[0].top_logprobs[0]
            assert (best.token, best.logprob, best.bytes) == ("<|im_end|>", -1.0, list(b"<|im_end|>"))
        pieces = [entry for chunk in streamed for entry in (chunk.choices[0].logprobs.content or [])]
        assert pieces == content
        assert whole.message.content == "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == SAID
        assert {request.logprobs for request in stage.executor.requests} == {num_top}
        plain = await stage.openai.chat.completions.create(**CHAT)
        assert plain.choices[0].logprobs is None


async def test_text_completions_and_their_offsets(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"chunk_size": 2}) as stage:
        options: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 12, "logprobs": 2, "n": 2}
        whole = await stage.openai.completions.create(**options)
        streamed = [chunk async for chunk in await stage.openai.completions.create(**options, stream=True)]
        tokens = (stage.tokenizer.encode(REPLY) * 2)[: whole.usage.completion_tokens // 2 if whole.usage else 0]
        for choice in whole.choices:
            told = choice.logprobs
            assert told is not None
            assert told.tokens is not None
            assert told.token_logprobs == expected_logprobs(tokens)
            assert [set(top) >= {"<|im_end|>"} for top in told.top_logprobs or []] == [True] * len(tokens)
            assert all(token in top for token, top in zip(told.tokens, told.top_logprobs or [], strict=True))
            whole_tokens = [token for token in told.tokens if "\ufffd" not in token and token != "<|im_end|>"]
            offsets = dict(zip(told.tokens, told.text_offset or [], strict=True))
            assert all(
                choice.text[offsets[token] :].startswith(token) for token in set(whole_tokens) if told.tokens.count(token) == 1
            )
            mine = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].index == choice.index]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [x for part in mine for x in getattr(part, name)] == getattr(told, name)


@pytest.mark.parametrize("prompt", [PROMPT, None])
@pytest.mark.parametrize("max_tokens", [1, 0])
async def test_echo_with_prompt_logprobs(connect: Connect, model_dir: Path, prompt: str | None, max_tokens: int) -> None:
    """The request that evaluation harnesses send, with the prompt as text and as token ids."""
    async with staged(connect, model_dir) as stage:
        tokens = stage.tokenizer.encode(PROMPT)
        options: dict[str, Any] = {
            "model": MODEL,
            "prompt": prompt or tokens,
            "echo": True,
            "logprobs": 1,
            "max_tokens": max_tokens,
        }
        answer = await stage.openai.completions.create(**options)
        (choice,) = answer.choices
        told = choice.logprobs
        assert told is not None
        said = stage.tokenizer.encode(REPLY)[:max_tokens]
        assert choice.text == PROMPT + stage.tokenizer.decode(said)
        assert told.token_logprobs == [None, *expected_logprobs(tokens[1:] + said)]
        assert told.top_logprobs is not None
        assert told.top_logprobs[0] is None
        assert len(told.tokens or []) == len(told.text_offset or []) == len(tokens) + max_tokens
        assert told.text_offset == [
            len(stage.tokenizer.decode(tokens[:i]).rstrip("\ufffd")) for i in range(len(tokens) + max_tokens)
        ]
        assert (choice.finish_reason, answer.usage and answer.usage.completion_tokens) == ("length", max_tokens)
        streamed = [chunk async for chunk in await stage.openai.completions.create(**options, stream=True)]
        assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
        assert [x for chunk in streamed for x in chunk.choices[0].logprobs.token_logprobs] == told.token_logprobs
        del options["logprobs"]
        assert (await stage.openai.completions.create(**options)).choices[0].text == choice.text
        assert stage.executor.requests[-1].prompt_logprobs is None, "a cached prefix may be used"


async def test_prompt_logprobs_of_vllm(connect: Connect, model_dir: Path) -> None:
    """Beside the choices, with other numbers of alternatives than the output's."""
    async with staged(connect, model_dir) as stage:
        tokens = stage.tokenizer.encode("one two")
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": tokens,
            "prompt_logprobs": 2,
            "logprobs": 1,
            "echo": True,
            "max_tokens": 1,
        }
        choice = (await stage.http.post("/v1/completions", json=body)).json()["choices"][0]
        assert [len(top or {}) <= 2 for top in choice["logprobs"]["top_logprobs"]] == [True] * (len(tokens) + 1)
        first, *others = choice["prompt_logprobs"]
        assert first is None
        assert [entry[str(token)]["logprob"] for token, entry in zip(tokens[1:], others, strict=True)] == expected_logprobs(
            tokens[1:]
        )
        assert others[0]["2"] == {"logprob": -1.0, "rank": 1, "decoded_token": "<|im_end|>"}
        assert others[0]["3"]["rank"] == 2
        assert stage.executor.requests[0].prompt_logprobs == 2
        chat = (await stage.http.post("/v1/chat/completions", json=CHAT | {"prompt_logprobs": 0})).json()
        asked = stage.executor.requests[1].prompt_tokens
        assert [list(entry or ()) for entry in chat["prompt_logprobs"]] == [[], *([str(token)] for token in asked[1:])]
        assert chat["choices"][0]["logprobs"] is None
        (refused,) = await ask(stage, msgspec.json.encode(CHAT | {"prompt_logprobs": 0}))
        assert msgspec.json.decode(refused)["error"]["param"] == "prompt_logprobs", "NATS has streams only"


async def test_a_stop_string_ends_numbers_with_the_text(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"chunk_size": 4}) as stage:
        answer = await stage.openai.chat.completions.create(**CHAT, logprobs=True, stop=", one")
        assert answer.choices[0].message.content == SAID[: SAID.index(", one")]
        assert answer.choices[0].logprobs is not None
        assert answer.usage is not None
        assert len(answer.choices[0].logprobs.content or []) == answer.usage.completion_tokens
        min_tokens = len(stage.tokenizer.encode(SAID[: SAID.index(" two")]))
        options = CHAT | {"stop": [", one", "three"], "extra_body": {"min_tokens": min_tokens}}
        later = await stage.openai.chat.completions.create(**options)
        assert later.choices[0].message.content == SAID[: SAID.index("three")], "min_tokens holds for stop strings too"


@pytest.mark.parametrize("stall_at", [1, 5])
async def test_a_request_that_moves_tells_every_token_once(connect: Connect, model_dir: Path, stall_at: int) -> None:
    """Its executor dies within the prompt's numbers, or within the output."""
    fake = {"stall_at": stall_at, "num_stalls": 1, "chunk_size": 2}
    async with staged(connect, model_dir, fake=fake) as stage:
        tokens = stage.tokenizer.encode(SENTENCES[0])
        second = await stage.second_executor()
        create = stage.openai.completions.create(model=MODEL, prompt=tokens, echo=True, logprobs=0, max_tokens=9)
        answering = asyncio.ensure_future(create)
        await stage.executor.stalled.wait()
        await stage.executor.kill()
        told = (await answering).choices[0].logprobs
        assert told is not None
        assert told.token_logprobs == [None, *expected_logprobs(tokens[1:] + stage.tokenizer.encode(REPLY)[:9])]
        (moved,) = second.requests
        assert (moved.prompt_logprobs is None) == (moved.num_generated > 0)


async def test_long_prompts_are_told_in_small_messages(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"max_model_len": 9000}) as stage:
        prompt = (stage.tokenizer.encode(SENTENCES[0]) * 1000)[:8191]
        body = {"model": MODEL, "prompt": prompt, "echo": True, "logprobs": 20, "max_tokens": 1}
        messages = await ask(stage, msgspec.msgpack.encode(body))
        chunks = [msgspec.msgpack.decode(message) for message in messages]
        assert sum(len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks) == 8192
        assert max(map(len, messages)) < 2**20
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


async def test_parameters_reach_the_executor(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        body = {"min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "top_k": 5}
        await stage.openai.chat.completions.create(
            **CHAT, presence_penalty=0.5, frequency_penalty=-0.25, logit_bias={"7": -100, "3": 5}, extra_body=body
        )
        sampling = stage.executor.requests[0].sampling
        assert (sampling.min_p, sampling.repetition_penalty, sampling.min_tokens, sampling.top_k) == (0.1, 1.2, 2, 5)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.25)
        assert sampling.logit_bias == ((7, -100.0), (3, 5.0))


def test_pieces_are_split_and_joined_without_loss() -> None:
    scored = tuple(ScoredToken(b"x", place, -1.0, ()) for place in range(2 * MAX_PIECE_TOKENS + 1))
    whole = Piece(0, "text", "length", True, scored)
    parts = list(split(whole))
    assert [len(part.scored or ()) for part in parts] == [MAX_PIECE_TOKENS, MAX_PIECE_TOKENS, 1]
    assert [part.finish_reason for part in parts] == [None, None, "length"]
    assert joined(parts) == whole
    assert list(split(Piece(0, "", None, False))) == [Piece(0, "", None, False)]


@pytest.mark.parametrize("text", [PROMPT, REPLY, "\x00\x7f \u00ad\u2581\n"])
def test_the_bytes_of_tokens_make_the_text(model_dir: Path, text: str) -> None:
    tokenizer = ChatTokenizer.load(model_dir)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text
    assert tokenizer.token_bytes(10**6) == b""


def test_the_bytes_of_sentencepiece_tokens() -> None:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581hello"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    token_bytes = token_bytes_of(tokenizer)
    assert [token_bytes(token) for token in (257, 1 + 0xE2, 0)] == [b" hello", b"\xe2", b"<unk>"]


def test_alternatives_that_read_the_same_keep_the_better_number(model_dir: Path) -> None:
    tokenizer = ChatTokenizer.load(model_dir)
    first, second = (tokenizer.encode(char)[0] for char in ("\U0001f468", "\u65e5"))
    numbers = fake_logprobs([first], 2)
    assert numbers is not None
    numbers = msgspec.structs.replace(numbers, top_tokens=(second, first))
    scored = Scorer(tokenizer.token_bytes, tokenizer.special_ids).output([first], numbers)
    assert completion_logprobs(scored)["top_logprobs"] == [{"\ufffd": -1.0}]
