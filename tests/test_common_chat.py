"""Chat templates and tokenizers, on folders written here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.chat import ChatFolderError, ChatTemplateError, ChatTokenizer
from common.model_folder import ModelFolderError
from tests.trainer_fakes import CHATML, write_model_dir

USER = {"role": "user", "content": "hi \u00e9"}


def test_messages_are_rendered_encoded_and_decoded(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(write_model_dir(tmp_path))
    text = tokenizer.render([USER])
    assert text == "<|im_start|>user\nhi \u00e9<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render([USER], add_generation_prompt=False) == "<|im_start|>user\nhi \u00e9<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert ids[0] == 258
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == "user\nhi \u00e9\nassistant\n"


def test_every_end_token_of_the_folder_counts(tmp_path: Path) -> None:
    write_model_dir(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 3]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3, "vocab_size": 300}))
    tokenizer = ChatTokenizer.load(tmp_path)
    assert tokenizer.eos_token_ids == (257, 3, 259)
    assert tokenizer.vocab_size == 300


def test_without_model_config_the_tokenizer_knows_its_size(tmp_path: Path) -> None:
    assert ChatTokenizer.load(write_model_dir(tmp_path)).vocab_size == 260


def test_the_jinja_file_wins_and_a_named_list_has_a_default(tmp_path: Path) -> None:
    write_model_dir(tmp_path)
    listed = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    assert ChatTokenizer.load(tmp_path).render([USER]) == "D"
    (tmp_path / "chat_template.jinja").write_text("J{{ bos_token }}")
    assert ChatTokenizer.load(tmp_path).render([USER]) == "J"


def test_templates_get_what_they_are_written_for(tmp_path: Path) -> None:
    template = (
        "{%- for m in messages -%}{% generation %}{{ m | tojson }}{% endgeneration %}{% if loop.first %}{% break %}{% endif %}"
        "{%- endfor %}{{ bos_token }}{{ strftime_now('%%') }}"
    )
    tokenizer = ChatTokenizer.load(write_model_dir(tmp_path, template))
    assert tokenizer.render([USER, USER]) == '{"role": "user", "content": "hi \u00e9"}<|im_start|>%'


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system role') }}", "{{ messages[0].content / 2 }}", "{{ ''.__class__.__mro__ }}", "{{ [][1].x }}"],
)
def test_refusals_and_faults_of_a_template_are_one_error(tmp_path: Path, template: str) -> None:
    tokenizer = ChatTokenizer.load(write_model_dir(tmp_path, template))
    with pytest.raises(ChatTemplateError):
        tokenizer.render([USER])


def test_a_missing_template_is_an_error_only_when_it_is_needed(tmp_path: Path) -> None:
    write_model_dir(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = ChatTokenizer.load(tmp_path)
    assert tokenizer.encode("a") == [tokenizer.encode("ba")[1]]
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.render([USER])


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ChatFolderError, match=r"tokenizer\.json"):
        ChatTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ChatFolderError, match=r"tokenizer\.json"):
        ChatTokenizer.load(tmp_path)
    write_model_dir(tmp_path, CHATML + "{% if %}")
    with pytest.raises(ChatFolderError, match="compile"):
        ChatTokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelFolderError, match="tokenizer_config"):
        ChatTokenizer.load(tmp_path)
