"""Finding, checking and converting models: names, folders, GGUF files, damage, two converters at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kernels.cache import cache_dir
from services.cli.convert import convert
from services.cli.models import ModelError, Source, cached_folder, check_folder, is_sound, locate, usable_folder
from services.cli.parser import DEFAULT_MODEL
from tests.helpers import tiny_model


def write_safetensors(path: Path, num_bytes: int = 8) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a model and is sound."""
    folder = tmp_path / "little-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("HEDDLE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_follows_the_environment() -> None:
    assert cache_dir({"HEDDLE_CACHE_DIR": "/x"}) == Path("/x")
    assert cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/heddle")
    assert cache_dir({}) == Path.home() / ".cache" / "heddle"


def test_names_mean_sources(folder: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "some.gguf"
    gguf.write_bytes(b"GGUF")
    assert locate(str(folder)) == Source(kind="folder", name="little-model", location=str(folder))
    assert locate(str(gguf)) == Source(kind="gguf", name="some", location=str(gguf))
    assert locate("owner/name") == Source(kind="hub", name="owner/name", location="owner/name")
    assert locate(DEFAULT_MODEL).location.endswith(".gguf")
    (tmp_path / "folder.with.gguf").mkdir()
    (tmp_path / "folder.with.gguf" / "a.gguf").write_bytes(b"GGUF")
    assert locate(str(tmp_path / "folder.with.gguf")).location.endswith("a.gguf")


@pytest.mark.parametrize("model", ["nothing", "/no/such/folder", "./no/such", "no/such.gguf", "a/b/c", "../x/y"])
def test_a_name_that_means_nothing_is_refused_by_name(model: str) -> None:
    with pytest.raises(ModelError, match=f"no model at {model}"):
        locate(model)


def test_a_folder_without_a_model_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        locate(str(tmp_path))
    (tmp_path / "file.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"file\.bin is a file, but not a \.gguf"):
        locate(str(tmp_path / "file.bin"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=r"2 \.gguf files"):
        locate(str(tmp_path))


def test_a_ready_folder_is_used_in_place(folder: Path, cache: Path) -> None:
    assert usable_folder(locate(str(folder)), cache) == folder
    assert convert(str(folder)) == folder
    assert not cache.exists()


def test_a_file_that_changes_gets_another_cache_folder(tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    before = cached_folder(locate(str(gguf)), tmp_path)
    gguf.write_bytes(b"GGUF2")
    assert cached_folder(locate(str(gguf)), tmp_path) != before


@pytest.mark.parametrize("damage", ["truncated", "longer", "no header", "no object", "empty", "bad config", "bad tokenizer"])
def test_damage_is_noticed_and_named(folder: Path, damage: str) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    changes = {
        "truncated": (weights, data[:-1]),
        "longer": (weights, data + b"x"),
        "no header": (weights, b"\xff" * 64),
        "no object": (weights, (2).to_bytes(8, "little") + b"[]"),
        "empty": (weights, b""),
        "bad config": (folder / "config.json", b"{"),
        "bad tokenizer": (folder / "tokenizer.json", b"[]"),
    }
    path, content = changes[damage]
    path.write_bytes(content)
    with pytest.raises(ModelError, match=str(path)):
        check_folder(folder)
    assert not is_sound(folder)


def test_every_shard_is_checked(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    write_safetensors(folder / "b.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}))
    check_folder(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors"):
        check_folder(folder)


@pytest.fixture
def unconverted(tmp_path: Path) -> Path:
    """A tiny Llama in float32 with its weights in the old format, which has to be converted."""
    folder = tmp_path / "tiny"
    model = tiny_model()
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # type: ignore[no-untyped-call]
    wrapped.save_pretrained(folder)
    return folder


def test_a_folder_is_converted_to_bfloat16_once(unconverted: Path, cache: Path) -> None:
    converted = convert(str(unconverted))
    assert converted.parent == cache / "models"
    with safe_open(converted / "model.safetensors", "pt") as weights:
        expected = torch.load(unconverted / "pytorch_model.bin")["model.norm.weight"].bfloat16()
        assert torch.equal(weights.get_tensor("model.norm.weight"), expected)
    assert json.loads((converted / "tokenizer_config.json").read_text())["model_max_length"] == 128
    written_at = (converted / "model.safetensors").stat().st_mtime_ns
    assert convert(str(unconverted)) == converted
    assert (converted / "model.safetensors").stat().st_mtime_ns == written_at
    assert [path.name for path in cache.rglob("*.partial")] == []


def test_a_damaged_conversion_is_made_again(unconverted: Path, cache: Path) -> None:
    converted = convert(str(unconverted))
    (converted / "model.safetensors").write_bytes(b"")
    assert convert(str(unconverted)) == converted
    assert is_sound(converted)


def test_out_is_never_overwritten_with_another_model(unconverted: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model"
    assert convert(str(unconverted), out) == out
    assert convert(str(unconverted), out) == out
    other = unconverted.rename(tmp_path / "other")
    with pytest.raises(ModelError, match=f"{out} is not empty and holds tiny, not other"):
        convert(str(other), out)


def test_an_unreadable_model_is_one_error_with_its_path_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    gguf = tmp_path / "broken.gguf"
    for content in (b"not a model", b"GGUF" + bytes(100)):
        gguf.write_bytes(content)
        with pytest.raises(ModelError, match=str(gguf)):
            convert(str(gguf))
    assert [path.name for path in cache.rglob("*") if not path.name.endswith(".lock")] == ["models"]


def test_two_processes_convert_a_model_once(unconverted: Path, cache: Path) -> None:
    command = [sys.executable, "-m", "services.cli.convert", str(unconverted)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) for _ in range(2)]
    printed = {process.communicate(timeout=60)[0].strip() for process in both}
    (path,) = printed
    assert is_sound(Path(path))
    assert [process.returncode for process in both] == [0, 0]


def test_the_process_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "services.cli.convert", "nothing"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("heddle: no model at nothing")


@pytest.mark.real_model
def test_the_default_model_has_its_own_tokenizer_and_end_token() -> None:
    folder = convert(DEFAULT_MODEL)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.encode(" 1234\n    5").tokens == ["\u0120", "1", "2", "3", "4", "\u010a\u0120\u0120\u0120\u0120", "5"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
