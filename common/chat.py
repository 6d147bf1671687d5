"""A model's tokenizer and chat template: text to token ids and back, messages to text. Knows no model, request or loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from common.model_folder import ModelFolderError, end_token_ids, read_json_object, token_text
from common.token_bytes import token_bytes_of

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatFolderError(ModelFolderError):
    """The model folder has no readable tokenizer, or a chat template that does not compile; the message names the place."""


class ChatTemplateError(ValueError):
    """The template is missing, broken, or refuses these messages; the message says why."""


class ChatTokenizer:
    """One model's tokenizer. Rendered text holds its special tokens, so it is encoded without adding any.

    `eos_token_ids` end a turn or the text; `vocab_size` is the model's (its logits may outnumber the tokenizer's words).
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str | None, special: Mapping[str, str], eos: Sequence[int], vocab_size: int
    ) -> None:
        self._tokenizer = tokenizer
        self._template = _compile(template) if template is not None else None
        self._special = dict(special)
        self.eos_token_ids: tuple[int, ...] = tuple(eos)
        self.vocab_size = vocab_size
        self.max_token_chars: int = max(map(len, tokenizer.get_vocab()), default=1)
        """A text of n characters has at least n / max_token_chars tokens."""
        self.token_bytes = token_bytes_of(tokenizer)
        added = tokenizer.get_added_tokens_decoder().items()
        self.special_ids = frozenset(number for number, token in added if token.special)

    @classmethod
    def load(cls, model_dir: Path) -> ChatTokenizer:
        """Read a Hugging Face folder: tokenizer.json, tokenizer_config.json, chat_template.jinja, (generation_)config.json.

        Raises ModelFolderError for a file that cannot be used: ChatFolderError for the tokenizer and a template that does not
        compile.
        """
        path = model_dir / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # what `tokenizers` raises for malformed files has no type of its own
            raise ChatFolderError(f"{path} is not a readable tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = read_json_object(model_dir / "tokenizer_config.json")
        special = {name: token_text(settings[name]) for name in SPECIAL_TOKENS if settings.get(name) is not None}
        stated = read_json_object(model_dir / "config.json").get("vocab_size")
        vocab_size = stated if type(stated) is int and stated > 0 else tokenizer.get_vocab_size()
        try:
            return cls(tokenizer, _read_template(model_dir, settings), special, end_token_ids(model_dir), vocab_size)
        except ChatTemplateError as error:
            raise ChatFolderError(f"{model_dir}: {error}") from error

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; names of special tokens in it become those tokens. Releases the GIL."""
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these ids; bytes that are no whole character yet come out as U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it. Raises ChatTemplateError."""
        if self._template is None:
            raise ChatTemplateError("the model has no chat template")
        values = {"messages": list(messages), "tools": None, "documents": None, **self._special}
        try:
            return self._template.render(add_generation_prompt=add_generation_prompt, **values)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise ChatTemplateError(f"the chat template cannot render these messages: {error}") from error


def _compile(template: str) -> jinja2.Template:
    """The environment that Hugging Face templates are written for; user text cannot reach beyond the sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"the chat template does not compile: {error}") from error


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks assistant text for training frameworks; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - declared so in the base class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _read_template(model_dir: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the template (of several: the one named default) in tokenizer_config.json."""
    path = model_dir / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template
