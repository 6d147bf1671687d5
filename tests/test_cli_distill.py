"""`heddle distill` on a tiny model: prompts, answers, training and folder, and that what was learned is right more often."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common.chat import ChatTokenizer
from common.fingerprint import fingerprint
from kernels.drafting.files import read_drafter
from services.cli.__main__ import main
from services.cli.distill import DistillOptions, distill
from services.cli.distill_data import Collector, DistillError, Prompt, open_turn, read_prompts
from services.cli.distill_make import prepare
from services.cli.distill_states import HiddenStates
from services.cli.distill_train import Recipe, Trainer
from services.planner.features_head import FeaturesHead
from tests.helpers import tiny_model

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"
WORDS = ["</s>", "<user>", "<assistant>", *(f"{letter}{digit}" for letter in "abcdefgh" for digit in range(8))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer of two-letter words."""
    path = tmp_path_factory.mktemp("tiny") / "tiny"
    tiny_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(WORDS), max_position_embeddings=256, eos_token_id=0, bos_token_id=None,
    ).save_pretrained(path)  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a0"))
    tokenizer.add_special_tokens(WORDS[:3])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.decoder = decoders.WordPiece("##")
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))
    return path


class Server:
    """Answers with a cycle through the words that depends on the prompt's last word: easily learned."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.is_broken = False
        self.num_answers = 10_000

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self._answer), base_url="http://server")

    def _answer(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        if self.is_broken or len(self.bodies) > self.num_answers:
            return httpx.Response(503)
        start = 3 + (7 * len(self.bodies)) % 60
        words = [WORDS[3 + (start + 5 * i) % 64] for i in range(24)]
        return httpx.Response(200, json={"choices": [{"text": " ".join(words), "finish_reason": "stop"}]})


def collect(server: Server, chat: ChatTokenizer, prompts: list[Prompt] | None, num_tokens: int) -> Collector:
    async def run() -> Collector:
        async with server.client() as client:
            collector = Collector(client, "tiny", chat)
            await collector.collect(prompts, num_tokens, lambda done: None)
            return collector

    return asyncio.run(run())


def test_the_model_invents_prompts_behind_an_open_turn(folder: Path) -> None:
    server, chat = Server(), ChatTokenizer.load(folder)
    assert open_turn(chat) == ("<user>", "</s><assistant>")
    collector = collect(server, chat, None, 100)
    invented, answered = server.bodies[0], [body for body in server.bodies if body["temperature"] == 0.0]
    assert (invented["prompt"], invented["temperature"]) == ("<user>", 1.0)
    assert all(body["prompt"].startswith("<user>") and body["prompt"].endswith("</s><assistant>") for body in answered)
    assert 100 <= sum(example.num_answer for example in collector.examples) < 150
    assert all(example.tokens[-1] == 0 and example.kind == "invented" for example in collector.examples)


def test_given_prompts_are_answered_once(folder: Path, tmp_path: Path) -> None:
    server, chat, path = Server(), ChatTokenizer.load(folder), tmp_path / "prompts.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "a1"}, {"role": "assistant", "content": "b1"}]},
        {"text": "a2 a3", "kind": "code"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(path, chat)
    assert prompts == [Prompt("given", "<user>a1</s><assistant>"), Prompt("code", "a2 a3")]
    assert [example.kind for example in collect(server, chat, prompts, 10_000).examples] == ["given", "code"]


def test_no_more_is_asked_for_than_is_needed(folder: Path) -> None:
    server, chat = Server(), ChatTokenizer.load(folder)
    collect(server, chat, [Prompt("given", f"a{i} b{j}") for i in range(8) for j in range(8)], 300)
    assert len(server.bodies) == 12, "of 25 tokens each"


@pytest.mark.parametrize("line", ["{", "[]", '{"messages": 3}', '{"prompt": "x"}', '{"messages": ["x"]}'])
def test_a_line_that_is_no_prompt_is_named(folder: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"text": "a1"}}\n{line}\n')
    with pytest.raises(DistillError, match="line 2") as complaint:
        read_prompts(path, ChatTokenizer.load(folder))
    assert "Error(" not in str(complaint.value)


def test_a_server_that_never_answers_is_an_error(folder: Path) -> None:
    server = Server()
    server.is_broken = True
    with pytest.raises(DistillError, match="503"):
        collect(server, ChatTokenizer.load(folder), None, 100)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (httpx.Response(200, json={"text": "no"}), 'this is no completion: {"text":"no"}'),
        (httpx.ReadTimeout(""), "ReadTimeout"),
    ],
)
def test_what_a_server_did_wrong_is_named(folder: Path, answer: httpx.Response | httpx.ReadTimeout, reason: str) -> None:
    def reply(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, httpx.ReadTimeout):
            raise answer
        return answer

    client = httpx.AsyncClient(transport=httpx.MockTransport(reply), base_url="http://server")
    collector = Collector(client, "tiny", ChatTokenizer.load(folder))
    with pytest.raises(DistillError, match=f"no answer from tiny: {reason}$"):
        asyncio.run(collector.collect(None, 100, lambda done: None))


def test_from_nothing_to_a_drafter(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    options = DistillOptions(
        model=str(folder), out=tmp_path / "drafter", url="http://unused", num_tokens=1500, vocabulary=60, epochs=2, threads=1
    )
    text = distill(options, Server().client())
    assert {path.name for path in options.out.iterdir()} == {"README.md", "config.json", "drafter.safetensors", "answers.jsonl"}
    assert (options.out / "README.md").read_text() == text
    assert "| invented |" in text
    assert " seconds with 1 threads." in text
    assert "Loading weights" not in capfd.readouterr().err
    head = FeaturesHead(options.out)
    assert head.fingerprint == fingerprint(folder)
    assert (len(head.vocabulary), head.feature_layers) == (60, (1, 2, 3))
    with pytest.raises(DistillError, match=r"not empty: it holds a drafter.*--out.*--start.*only answers\.jsonl"):
        distill(options, Server().client())
    (tmp_path / "notes.txt").write_text("mine")
    for out, reason in ((tmp_path, "is not empty; name a new folder"), (tmp_path / "notes.txt", "is not a folder")):
        with pytest.raises(DistillError, match=reason):
            distill(dataclasses.replace(options, out=out), Server().client())


def test_answers_are_kept_as_they_come(folder: Path, tmp_path: Path) -> None:
    server, prompts = Server(), tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": f"a{i} b{j}"}) + "\n" for i in range(8) for j in range(8)))
    options = DistillOptions(
        model=str(folder), out=tmp_path / "drafter", prompts=prompts, url="http://unused", num_tokens=1200, vocabulary=50,
        epochs=1, threads=1,
    )  # fmt: skip
    server.num_answers = 20
    with pytest.raises(DistillError, match="503"):
        distill(options, server.client())
    assert len((options.out / "answers.jsonl").read_text().splitlines()) == 20
    with (options.out / "answers.jsonl").open("a") as file:
        file.write('{"kind": "given", "tok')  # the power failed
    server.num_answers, asked_before = 10_000, {body["prompt"] for body in server.bodies[:20]}
    del server.bodies[:]
    distill(options, server.client())
    assert not asked_before & {body["prompt"] for body in server.bodies}
    assert len((options.out / "answers.jsonl").read_text().splitlines()) == 20 + len(server.bodies) >= 1200 // 25


def test_a_drafter_is_trained_on(folder: Path, tmp_path: Path) -> None:
    first = DistillOptions(
        model=str(folder), out=tmp_path / "first", url="http://unused", num_tokens=900, vocabulary=50, epochs=2, threads=1
    )
    distill(first, Server().client())
    again = dataclasses.replace(first, out=tmp_path / "again", start=first.out, vocabulary=60, epochs=1, seed=1)
    assert "Started from first," in distill(again, Server().client())
    before, after = read_drafter(first.out), read_drafter(again.out)
    assert after.vocabulary == before.vocabulary, "it is the start's"
    assert after.shape == before.shape
    apart = {name: (after.weights[name] - weight).norm() / weight.norm() for name, weight in before.weights.items()}
    assert apart["embedding_VH"] < 0.01, "rounded, not trained"
    assert 1e-4 < apart["o.weight"] < 0.5, "trained on, not anew"


def test_a_drafter_of_another_model_is_not_trained_on(folder: Path, tmp_path: Path) -> None:
    options = DistillOptions(
        model=str(folder), out=tmp_path / "first", url="http://unused", num_tokens=900, vocabulary=50, epochs=1, threads=1
    )
    distill(options, Server().client())
    config = json.loads((options.out / "config.json").read_text())
    (options.out / "config.json").write_text(json.dumps({**config, "fingerprint": "other"}))
    with pytest.raises(DistillError, match="another model"):
        distill(dataclasses.replace(options, out=tmp_path / "again", start=options.out), Server().client())
    with pytest.raises(DistillError, match="nowhere"):
        distill(dataclasses.replace(options, out=tmp_path / "more", start=tmp_path / "nowhere"), Server().client())


def test_training_lowers_the_loss(folder: Path, tmp_path: Path) -> None:
    examples = collect(Server(), ChatTokenizer.load(folder), None, 1500).examples
    with Progress(disable=True) as progress:
        material = prepare(folder, examples, tmp_path, progress, vocabulary_size=67, evaluated_share=0.1, seed=0)
    losses: list[float] = []
    recipe = Recipe(epochs=12.0, batch_rows=150, max_steps=1, map_rate=1e-3, layer_rate=4e-3)
    Trainer(material.head, recipe).train(material.learned, lambda done, loss: losses.append(loss))
    assert len(losses) > 60
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_hidden_states_are_kept_in_a_file_that_leaves_no_trace(tmp_path: Path) -> None:
    texts = [torch.randn(length, 6).bfloat16() for length in (3, 1, 5)]
    states = HiddenStates(tmp_path, num_rows=9, num_features=6)
    kept = [states.keep(text) for text in texts]
    assert all(torch.equal(*pair) for pair in zip(texts, kept, strict=True))
    assert len({each.untyped_storage().data_ptr() for each in kept}) == 1
    assert not list(tmp_path.iterdir())


def test_hidden_states_that_the_disk_cannot_hold_are_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", is_full)
    with pytest.raises(DistillError, match="2,048 bytes of hidden states: No space left"):
        HiddenStates(tmp_path, num_rows=32, num_features=32)
    assert not list(tmp_path.iterdir())


def test_the_command_names_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    arguments = ["distill", "--model", str(folder), "--out", str(tmp_path / "out"), "--prompts", str(tmp_path / "none")]
    with pytest.raises(SystemExit, match="none cannot be read"):
        main(arguments)
