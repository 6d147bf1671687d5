"""Constraints that reach an executor over the bus: compiled beside the passes, bounded, bad ones refused by name."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common.messages import Admitted, Constraint, Rejected, Sampling
from services.executor import grammar_store
from services.executor.grammar import Grammar, Vocabulary
from tests.executor_stage import MODEL, Connect, Stage, known_profile, running_executor
from tests.fakes import write_tiny_model
from tests.grammars import CONSTRAINTS, ids, text_of, tokenizer
from tests.tiny import tiny_pair, tiny_request

DEEP = "[" * 5000
BAD: dict[str, Constraint] = {
    "unclosed group": Constraint(kind="regex", text="(a"),
    "look-around": Constraint(kind="regex", text="(?=a)b"),
    "longer than 65536": Constraint(kind="regex", text="a" * 70_000),
    "Invalid type: strng": Constraint(kind="json_schema", text='{"type": "strng"}'),
    "type must be": Constraint(kind="json_schema", text='{"type": {"a": 1}}'),
    "unclosed ": Constraint(kind="json_schema", text='{"type": "string", "pattern": "((a"}'),
    "uniqueItems": Constraint(
        kind="json_schema", text='{"type": "array", "uniqueItems": true, "x-guidance": {"lenient": true}}'
    ),
    "minimum": Constraint(kind="json_schema", text='{"type": "integer", "minimum": 5, "maximum": 3}'),
    "schema": Constraint(kind="json_schema", text="true"),
    "not present|retriev": Constraint(kind="json_schema", text='{"$ref": "file:///etc/passwd"}'),
    "recursion": Constraint(kind="json_schema", text=json.dumps({"const": 1})[:-2] + DEEP + "]" * 5000 + "}"),
    "json_schema: ": Constraint(kind="json_schema", text="{"),
    "NoExtension|no token": Constraint(kind="json_schema", text='{"$ref": "#"}'),
    "schema too large": Constraint(
        kind="json_schema",
        text=json.dumps({"allOf": [{"anyOf": [{"properties": {f"{side}{i}": {}}} for side in ("a", "b")]} for i in range(40)]}),
    ),
    "unknown name": Constraint(kind="grammar", text="start: missing"),
    "nested|recursion depth|deep": Constraint(kind="grammar", text="start: " + "(" * 8000 + '"a"' + ")" * 8000),
    "longer than 16384": Constraint(kind="grammar", text="\n" * 60_000),
    "No 'root'": Constraint(kind="grammar", text="\n \t" * 5000),
    "GBNF": Constraint(kind="grammar", text="root ::= ((("),
    "list of choices": Constraint(kind="choice", text="[]"),
    "Expected `str`": Constraint(kind="choice", text="[1]"),
    "got `object`": Constraint(kind="choice", text="{"),
}
HEAVY = [
    "a" * 65_000,
    "(.{1,1000}){1,1000}",
    "(a|b)*a(a|b){1000}",
    ".*a.{300}b",
    r"(\w{1,500} ){1,500}",
    "(((((.*a){20}.*b){20}.*c){20}.*d){20})",
]
"""They explode at some time, or never: what becomes of them depends on the vocabulary."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("model") / MODEL
    write_tiny_model(folder)
    files = {name: (folder / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    tiny_pair(vocab_size=tokenizer().vocab_size)[0].save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": list(tokenizer().eos_token_ids)}
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
async def stage(connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    known_profile(monkeypatch)
    async with running_executor(connect, model_dir) as stage:
        yield stage


def request(name: str, constraint: Constraint | None, **fields: Any) -> Any:
    values: dict[str, Any] = {"sampling": Sampling(temperature=1.0, seed=3)} | fields
    return tiny_request(name, ids("hello"), 40, constraint=constraint, **values)


async def answer(stage: Stage, name: str, kind: str) -> str:
    assert isinstance(await stage.admit(request(name, CONSTRAINTS[kind][0])), Admitted)
    return text_of(await stage.output(name))


async def test_bad_constraints_are_refused_and_harm_nobody(stage: Stage) -> None:
    assert isinstance(await stage.admit(request("bystander", None, ignore_eos=True)), Admitted)
    for part, constraint in BAD.items():
        refused = await stage.admit(request("bad", constraint))
        assert isinstance(refused, Rejected), constraint
        assert refused.reason == "invalid", refused
        assert refused.message.startswith(f"{constraint.kind}: ")
        assert any(each in refused.message for each in part.split("|")), (part, refused.message[:300])
        assert len(refused.message) < 600
    assert len(await stage.output("bystander")) == 40
    assert CONSTRAINTS["choice"][1](await answer(stage, "good", "choice"))
    assert not stage.counters().get("failed_iterations")


async def test_expensive_constraints_end_as_they_must_and_nobody_else_does(stage: Stage) -> None:
    for number, regex in enumerate(HEAVY):
        taken = await stage.admit(request(f"heavy{number}", Constraint(kind="regex", text=regex)))
        reason = (await stage.end(f"heavy{number}")).finish_reason if isinstance(taken, Admitted) else taken.reason
        assert reason in ("stop", "length", "error", "invalid")
    assert CONSTRAINTS["regex"][1](await answer(stage, "good", "regex"))
    assert not stage.counters().get("failed_iterations")


async def test_a_request_goes_on_after_what_it_generated(stage: Stage) -> None:
    constraint = CONSTRAINTS["choice"][0]
    for name, so_far, expected in (("a", "redd", "ish"), ("b", "a blu", "e one")):
        generated = ids(so_far)
        moved = tiny_request(name, (*ids("hello"), *generated), 40, constraint=constraint, num_generated=len(generated))
        assert isinstance(await stage.admit(moved), Admitted)
        assert text_of(await stage.output(name)) == expected
    for so_far, why in (("blue", "choice: "), ("green", "complete")):
        generated = ids(so_far)
        wrong = tiny_request("c", (*ids("hello"), *generated), 40, constraint=constraint, num_generated=len(generated))
        refused = await stage.admit(wrong)
        assert isinstance(refused, Rejected)
        assert refused.reason == "invalid"
        assert why in refused.message
    for num_generated, tokens in ((-3, ids("hello")), (9, ids("hello")), (2, (5, -7, 2**62))):
        refused = await stage.admit(tiny_request("c", tokens, 40, constraint=constraint, num_generated=num_generated))
        assert isinstance(refused, Rejected)
        assert refused.reason == "invalid"


async def test_a_slow_grammar_holds_up_nobody(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CONSTRAINTS["choice"][1](await answer(stage, "first", "choice"))
    release, started = threading.Event(), threading.Event()

    class SlowGrammar(Grammar):
        def __init__(self, constraint: Constraint, vocabulary: Vocabulary) -> None:
            started.set()
            assert release.wait(20)
            super().__init__(constraint, vocabulary)

    monkeypatch.setattr(grammar_store, "Grammar", SlowGrammar)
    monkeypatch.setattr(grammar_store, "MAX_WAIT_S", 0.2)
    slow = asyncio.create_task(stage.admit(request("slow", Constraint(kind="regex", text="a+"))))
    await asyncio.to_thread(started.wait, 10)
    queued = asyncio.create_task(stage.admit(request("queued", CONSTRAINTS["choice"][0])))
    assert isinstance(await stage.admit(request("free", None)), Admitted)
    await stage.output("free")
    refused = await slow
    assert isinstance(refused, Rejected)
    assert (refused.reason, "too complex" in refused.message) == ("invalid", True)
    busy = await queued
    assert isinstance(busy, Rejected)
    assert (busy.reason, busy.retry_after_ms > 0) == ("overloaded", True)
    release.set()
    monkeypatch.setattr(grammar_store, "MAX_WAIT_S", 10.0)
    assert CONSTRAINTS["choice"][1](await answer(stage, "later", "choice"))


async def test_few_grammars_are_kept(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Constraint] = []

    class CountedGrammar(Grammar):
        def __init__(self, constraint: Constraint, vocabulary: Vocabulary) -> None:
            compiled.append(constraint)
            super().__init__(constraint, vocabulary)

    monkeypatch.setattr(grammar_store, "Grammar", CountedGrammar)
    monkeypatch.setattr(grammar_store, "MAX_GRAMMARS", 2)
    for number, letter in enumerate("aabacab"):
        await stage.admit(request(f"r{number}", Constraint(kind="regex", text=f"{letter}+")))
        await stage.output(f"r{number}")
    assert [constraint.text[0] for constraint in compiled] == ["a", "b", "c", "b"]


async def test_without_a_tokenizer_constraints_are_refused(
    connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known_profile(monkeypatch)
    folder = tmp_path / MODEL
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("tokenizer.json"))
    async with running_executor(connect, folder) as stage:
        refused = await stage.admit(request("r", CONSTRAINTS["json_object"][0]))
        assert isinstance(refused, Rejected)
        assert refused.reason == "invalid"
        assert "tokenizer.json" in refused.message
        assert isinstance(await stage.admit(request("free", None)), Admitted)
        await stage.output("free")
