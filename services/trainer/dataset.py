"""Training files: JSON lines of conversations to token sequences with a loss mask. Pure; knows no job and no storage."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from common.chat import ChatTemplateError, ChatTokenizer
from common.validation import find_fault

MAX_REPORTED_ERRORS = 10
NO_ANSWER = "there is no assistant message to learn"


class DatasetError(ValueError):
    """The file cannot be trained on; the message lists its first faults by line."""


@dataclasses.dataclass(frozen=True)
class TrainingSequence:
    """A tokenized conversation. `in_loss[i]` says whether predicting `tokens[i]` is trained; never for i = 0."""

    tokens: tuple[int, ...]
    in_loss: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The sequences of a training file, in the file's order."""

    sequences: tuple[TrainingSequence, ...]

    @property
    def num_tokens(self) -> int:
        """All tokens of one epoch."""
        return sum(len(sequence.tokens) for sequence in self.sequences)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens of one epoch that are trained."""
        return sum(sum(sequence.in_loss) for sequence in self.sequences)

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return max(len(sequence.tokens) for sequence in self.sequences)


class _TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_TextPart]
    name: str | None = None
    weight: Literal[0, 1] | None = None


class _Example(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[_Message], Meta(min_length=1)]


def read_dataset(data: bytes, tokenizer: ChatTokenizer, max_length: int, limited_by: str = "") -> Dataset:
    """The training sequences of a file; blank lines are skipped. Faults say what `max_length` is `limited_by`.

    Raises DatasetError with the first faults and their line numbers, or when there is no example at all.
    """
    sequences: list[TrainingSequence] = []
    faults: list[str] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            sequences.append(_sequence(line, tokenizer))
            _check_length(sequences[-1], max_length, limited_by)
        except ValueError as error:
            faults.append(f"line {number}: {error}")
            if len(faults) == MAX_REPORTED_ERRORS:
                faults.append("further lines were not checked")
                break
    if faults:
        raise DatasetError("; ".join(faults))
    if not sequences:
        raise DatasetError("the file has no examples")
    return Dataset(tuple(sequences))


def _sequence(line: bytes, tokenizer: ChatTokenizer) -> TrainingSequence:
    try:
        messages = msgspec.json.decode(line, type=_Example).messages
    except msgspec.ValidationError as error:
        raise DatasetError(str(find_fault(error, _Example))) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"not valid JSON: {error}") from error
    for message in messages:
        if message.weight is not None and message.role != "assistant":
            raise DatasetError(f"weight belongs to assistant messages, not to role {message.role}")
    if not any(message.role == "assistant" for message in messages):
        raise DatasetError(NO_ANSWER)
    trained = [i for i, message in enumerate(messages) if message.role == "assistant" and message.weight != 0]
    tokens, in_loss = tokenize(tokenizer, [_plain(message) for message in messages], trained)
    if not any(in_loss):
        raise DatasetError("no assistant message carries weight")
    return TrainingSequence(tuple(tokens), tuple(in_loss))


def _check_length(sequence: TrainingSequence, max_length: int, limited_by: str) -> None:
    if len(sequence.tokens) > max_length:
        cause = f" ({limited_by})" if limited_by else ""
        raise DatasetError(f"{len(sequence.tokens)} tokens, the limit is {max_length}{cause}")


def _plain(message: _Message) -> dict[str, Any]:
    """The message as the chat template gets it."""
    content = message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
    return {"role": message.role, "content": content} | ({"name": message.name} if message.name else {})


def tokenize(
    tokenizer: ChatTokenizer, messages: Sequence[dict[str, Any]], trained: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and for each whether it belongs to one of the trained messages or ends its turn.

    Raises ChatTemplateError when the template does not let a message be found in the rendered text.
    """
    text = tokenizer.render(messages, add_generation_prompt=False)
    spans = [_span(tokenizer, messages, index, text) for index in trained]
    cuts = [cut for span in spans for cut in span]
    tokens, bounds = _encode_with_bounds(tokenizer, text, cuts)
    in_loss = [False] * len(tokens)
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        for i in range(max(start, 1), _end_of_turn(tokens, start, end, tokenizer.eos_token_ids)):
            in_loss[i] = True
    return tokens, in_loss


def _span(tokenizer: ChatTokenizer, messages: Sequence[dict[str, Any]], index: int, text: str) -> tuple[int, int]:
    """Where the text of message `index` starts and ends: what follows the prompt that would have generated it."""
    prompt = tokenizer.render(messages[:index], add_generation_prompt=True)
    upto = tokenizer.render(messages[: index + 1], add_generation_prompt=False)
    if not (text.startswith(upto) and upto.startswith(prompt)):
        raise ChatTemplateError(
            f"the chat template rewrites earlier text as the conversation grows, so assistant message {index} cannot be located"
        )
    return len(prompt), len(upto)


def _encode_with_bounds(tokenizer: ChatTokenizer, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Tokens of the text, and the token index of each cut (rising positions in the text).

    A token over a cut would mix prompt and answer in a way that never happens while generating; then the pieces
    between the cuts are encoded one by one, as they are when the prompt is encoded and the answer generated.
    """
    tokens = tokenizer.encode(text)
    heads = [tokenizer.encode(text[:cut]) for cut in cuts]
    if all(tokens[: len(head)] == head for head in heads):
        return tokens, [len(head) for head in heads]
    edges = [0, *cuts, len(text)]
    pieces = [tokenizer.encode(text[start:end]) for start, end in itertools.pairwise(edges)]
    bounds = [sum(len(piece) for piece in pieces[: i + 1]) for i in range(len(cuts))]
    return [token for piece in pieces for token in piece], bounds


def _end_of_turn(tokens: Sequence[int], start: int, end: int, eos_token_ids: Sequence[int]) -> int:
    """End of what is trained: after the last end-of-turn token; templates put newlines behind it that nobody generates."""
    return next((i + 1 for i in reversed(range(start, end)) if tokens[i] in eos_token_ids), end)
