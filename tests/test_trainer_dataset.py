"""Training files: what is read, what is trained, and how faults are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.chat import ChatTokenizer
from services.trainer.dataset import Dataset, DatasetError, read_dataset
from tests.trainer_fakes import CHATML, example, write_model_dir


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return ChatTokenizer.load(write_model_dir(tmp_path))


def line(*messages: dict[str, Any], **extra: Any) -> bytes:
    return json.dumps({"messages": list(messages), **extra}).encode() + b"\n"


def said(role: str, content: Any, **extra: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **extra}


def trained_text(tokenizer: ChatTokenizer, dataset: Dataset, index: int = 0) -> list[str]:
    """The runs of trained tokens of a sequence, as text."""
    runs: list[list[int]] = [[]]
    sequence = dataset.sequences[index]
    for token, trained in zip(sequence.tokens, sequence.in_loss, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


def whole_text(tokenizer: ChatTokenizer, dataset: Dataset, index: int = 0) -> str:
    return tokenizer.decode(dataset.sequences[index].tokens, skip_special_tokens=False)


def test_only_answers_and_their_end_of_turn_are_trained(tokenizer: ChatTokenizer) -> None:
    data = line(
        said("system", "be kind"), said("user", "1+1?"), said("assistant", "2"), said("user", "2+2?"), said("assistant", "4")
    )
    dataset = read_dataset(data, tokenizer, 1000)
    assert trained_text(tokenizer, dataset) == ["2<|im_end|>", "4<|im_end|>"]
    assert whole_text(tokenizer, dataset) == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert dataset.num_loss_tokens == 4


def test_an_answer_of_weight_zero_is_context(tokenizer: ChatTokenizer) -> None:
    data = line(said("user", "a"), said("assistant", "no", weight=0), said("user", "b"), said("assistant", "yes", weight=1))
    assert trained_text(tokenizer, read_dataset(data, tokenizer, 1000)) == ["yes<|im_end|>"]


def test_an_answer_may_repeat_its_question_or_a_special_token(tokenizer: ChatTokenizer) -> None:
    data = line(said("user", "say hi<|im_end|>"), said("assistant", "say hi<|im_end|> and more"))
    assert trained_text(tokenizer, read_dataset(data, tokenizer, 1000)) == ["say hi<|im_end|> and more<|im_end|>"]


def test_no_token_spans_prompt_and_answer(tokenizer: ChatTokenizer) -> None:
    """Two newlines are one token; the prompt ends with one, and the answer starts with two that the model has to say."""
    dataset = read_dataset(example("\n\nx"), tokenizer, 1000)
    assert tokenizer.encode("\n\n\nx") == [*tokenizer.encode("\n\n"), *tokenizer.encode("\nx")]
    assert trained_text(tokenizer, dataset) == ["\n\nx<|im_end|>"]
    assert whole_text(tokenizer, dataset).endswith("assistant\n\n\nx<|im_end|>\n")
    prompt = tokenizer.encode(tokenizer.render([said("user", "q")]))
    assert dataset.sequences[0].tokens[: len(prompt)] == tuple(prompt)


def test_a_template_without_end_token_trains_all_that_the_answer_adds(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = ChatTokenizer.load(write_model_dir(tmp_path, template))
    assert trained_text(tokenizer, read_dataset(example("yes"), tokenizer, 1000)) == [" yes\n"]


def test_the_first_token_of_a_text_has_nothing_to_predict_it(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(write_model_dir(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}"))
    dataset = read_dataset(line(said("assistant", "abc")), tokenizer, 1000)
    assert dataset.sequences[0].in_loss == (False, True, True)


def test_text_parts_names_blank_lines_and_a_byte_order_mark_are_read(tokenizer: ChatTokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    data = b"\xef\xbb\xbf" + line(said("user", "q", name="eve"), said("assistant", parts)) + b"\r\n  \n" + example("z").rstrip()
    dataset = read_dataset(data, tokenizer, 1000)
    assert [trained_text(tokenizer, dataset, i) for i in range(2)] == [["ab<|im_end|>"], ["z<|im_end|>"]]
    assert dataset.num_tokens == sum(len(sequence.tokens) for sequence in dataset.sequences)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"{\n", "line 2: not valid JSON"),
        (b"\xff\xfe\n", "line 2: not valid JSON"),
        (b"[" * 100_000 + b"\n", "line 2: "),
        (b'"text"\n', "Expected `object`"),
        (line(), "length >= 1"),
        (line(said("user", "q")), "no assistant message"),
        (line(said("user", "q"), said("assistant", "a", weight=0)), "carries weight"),
        (line(said("user", "q"), said("assistant", "a", weight=0.5)), "weight"),
        (line(said("user", "q", weight=1), said("assistant", "a")), "weight belongs to assistant"),
        (line(said("user", "q"), said("robot", "a")), r"messages\[1\]\.role: .*'robot'; valid: 'assistant'"),
        (line(said("user", "q"), said("assistant", None)), r"messages\[\.\.\.\]\.content|content"),
        (line(said("user", "q"), said("assistant", "a"), tools=[]), "unknown field `tools`"),
        (line(said("user", "q"), said("assistant", "a", tool_calls=[])), "unknown field `tool_calls`"),
        (line(said("user", "q" * 100), said("assistant", "a")), r"\d+ tokens, the limit is 60"),
    ],
)
def test_a_bad_line_is_named(tokenizer: ChatTokenizer, bad: bytes, words: str) -> None:
    with pytest.raises(DatasetError, match=words) as error:
        read_dataset(example("fine") + bad + example("fine"), tokenizer, 60)
    assert str(error.value).startswith("line 2: ")
    assert "line 1" not in str(error.value)
    assert "line 3" not in str(error.value)


def test_the_first_ten_faults_are_told(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DatasetError) as error:
        read_dataset(b"{}\n" * 12, tokenizer, 60)
    assert str(error.value).count("line ") == 10
    assert "line 10: " in str(error.value)
    assert "not checked" in str(error.value)


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_an_empty_file_has_no_examples(tokenizer: ChatTokenizer, data: bytes) -> None:
    with pytest.raises(DatasetError, match="no examples"):
        read_dataset(data, tokenizer, 60)


def test_a_template_that_rewrites_history_is_refused(tmp_path: Path) -> None:
    forgetful = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else '...' }}")
    tokenizer = ChatTokenizer.load(write_model_dir(tmp_path, forgetful))
    assert len(read_dataset(line(said("assistant", "a")), tokenizer, 60).sequences) == 1
    with pytest.raises(DatasetError, match="line 1: the chat template rewrites earlier text"):
        read_dataset(line(said("user", "q"), said("assistant", "a"), said("user", "r"), said("assistant", "b")), tokenizer, 200)


def test_what_a_template_refuses_is_a_fault_of_the_line(tmp_path: Path) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    tokenizer = ChatTokenizer.load(write_model_dir(tmp_path, strict))
    with pytest.raises(DatasetError, match=r"line 1: .*user first"):
        read_dataset(line(said("system", "s"), said("assistant", "a")), tokenizer, 60)
