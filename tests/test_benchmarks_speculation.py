"""The arithmetic of the speculation benchmark: thinned request files, attainment, goodput, tokens per verify, goals."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_speculation, open_loop
from benchmarks.open_loop import Load, Outcome
from benchmarks.speculation_rows import load_rows, part_rows, tokens_per_verify, tpot_rows, verify_rows
from benchmarks.streams import Sample
from benchmarks.workloads import Arrival, prompts, read_json, thin

RECORDS = [
    {"emission_time_ms": 100.0 * i, "prompt": f"prompt {i % 50}", "slo_ratio": (1.2, -50.0, -150.0)[i % 3]} for i in range(300)
]


def answer(tpot_ms: float, num_tokens: int = 11, verify_steps: int = 5) -> Sample:
    return Sample("text", 10.0, tpot_ms, num_tokens, {"slo": {"verify_steps": verify_steps}})


def outcome(workload: str, target_ms: float, sample: Sample | None) -> Outcome:
    return Outcome(arrival=Arrival(at_s=0.0, workload=workload, prompt="p", tpot_ms=target_ms), sample=sample)


def test_a_thinned_file_has_the_rate_the_order_and_the_targets() -> None:
    arrivals = thin(RECORDS, rate=4.0, seconds=20.0, unloaded_tpot_ms=30.0)
    assert len(arrivals) == 80
    assert [a.at_s for a in arrivals] == sorted(a.at_s for a in arrivals)
    assert max(a.at_s for a in arrivals) <= 20.0
    assert {a.workload: a.tpot_ms for a in arrivals} == {"code": 36.0, "chat": 50.0, "summary": 150.0}
    assert arrivals == thin(RECORDS, rate=4.0, seconds=20.0, unloaded_tpot_ms=30.0)


def test_a_file_with_too_few_requests_is_refused() -> None:
    with pytest.raises(ValueError, match=r"250 requests in 20\.0 s.* at most 201"):
        thin(RECORDS, rate=12.5, seconds=20.0, unloaded_tpot_ms=30.0)


def test_a_file_that_begins_slowly_is_taken_where_it_is_busiest() -> None:
    slow = [{"emission_time_ms": 5000.0 * i, "prompt": "early", "slo_ratio": 1.2} for i in range(10)]
    busy = [record | {"emission_time_ms": 60_000 + 100.0 * i} for i, record in enumerate(RECORDS)]
    arrivals = thin(slow + busy, rate=9.0, seconds=20.0, unloaded_tpot_ms=30.0)
    assert len(arrivals) == 180
    assert "early" not in {a.prompt for a in arrivals}
    assert 0.0 <= arrivals[0].at_s < arrivals[-1].at_s <= 20.0


def test_prompts_of_a_category_come_once_each(tmp_path: Path) -> None:
    path = tmp_path / "requests.json.gz"
    path.write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
    found = prompts(read_json(path), "chat")
    assert len(found) == len(set(found)) == 50
    assert found[0] == "prompt 1"


def test_attainment_counts_the_refused_and_goodput_only_what_met_its_target() -> None:
    outcomes = (
        outcome("code", 20.0, answer(19.0, 100)), outcome("code", 20.0, answer(21.0, 50)),
        outcome("chat", 50.0, None), outcome("chat", 50.0, answer(50.0, 20)),
    )  # fmt: skip
    load = Load(outcomes=outcomes, seconds=10.0)
    assert load.attainment() == load.attainment("code") == load.attainment("chat") == 0.5
    assert (load.goodput, load.throughput) == (12.0, 17.0)
    (row,) = load_rows("file", 1.0, {"heddle": load})
    assert (row["requests"], row["goodput"], row["attainment_code"]) == (4, 12.0, 0.5)


def test_tokens_per_verify_of_both_kinds_of_server_agree() -> None:
    samples = [answer(10.0, num_tokens=11, verify_steps=5), answer(10.0, num_tokens=6, verify_steps=2)]
    assert tokens_per_verify("heddle", samples, 0) == pytest.approx(15 / 7)
    assert tokens_per_verify("vllm ngram-4", samples, 15 - 7) == pytest.approx(15 / 7)


def test_goals_are_judged_in_their_direction() -> None:
    answers = {
        "heddle": [answer(20.0, 11, 4)],
        "heddle none": [answer(40.0)],
        "vllm": [answer(60.0)],
        "vllm ngram-4": [answer(25.0)],
    }
    rows = {row["server"]: row for row in tpot_rows("code", 1, answers)}
    assert (rows["vllm"]["heddle_over_it"], rows["vllm"]["met"]) == (0.333, "yes")
    assert (rows["vllm ngram-4"]["heddle_over_it"], rows["vllm ngram-4"]["met"]) == (0.8, "no")
    assert "goal" not in rows["heddle none"]
    verified = {row["server"]: row for row in verify_rows("code", answers, dict.fromkeys(answers, 0.0))}
    assert (verified["heddle"]["value"], verified["heddle"]["met"]) == (2.5, "no")
    assert "goal" not in verified["vllm"]


def test_parts_are_shares_and_their_rest_has_a_goal() -> None:
    rows = {row["workload"]: row for row in part_rows({"draft": 30.0, "verify": 66.0, "select": 3.0, "commit": 1.0})}
    assert rows["draft"]["value"] == 0.3
    assert (rows["all but draft and verify"]["value"], rows["all but draft and verify"]["met"]) == (0.04, "yes")


def test_a_measurement_shares_a_salt_that_no_other_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    async def timed(http: object, path: str, body: dict[str, Any], headers: dict[str, str]) -> Sample:
        asked.append((body["messages"][0]["content"], body["cache_salt"]))
        return answer(1.0)

    monkeypatch.setattr(open_loop, "timed", timed)
    servers: dict[str, Any] = {name: SimpleNamespace(url=f"http://{name}") for name in ("ours", "theirs")}
    for _ in range(2):
        assert len(bench_speculation.ask(servers, ["a", "b", "c"], 2, 0.0)["theirs"]) == 3
    assert [prompt for prompt, _ in asked[:6]] == ["a", "b", "a", "b", "c", "c"]
    first, second = ({salt for _, salt in half} for half in (asked[:6], asked[6:]))
    assert len(first) == len(second) == len(first | second) - 1


def test_requests_are_sent_at_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, float]] = []

    async def chat(http: object, prompt: str, max_tokens: int, *targets: object) -> Sample:
        begun.append((prompt, asyncio.get_running_loop().time()))
        return answer(1.0)

    monkeypatch.setattr(open_loop, "chat", chat)
    arrivals = [Arrival(at_s=at, workload="chat", prompt=str(at), tpot_ms=50.0) for at in (0.0, 0.08, 0.04)]
    load = asyncio.run(open_loop.send("http://nowhere", arrivals, 4))
    assert [prompt for prompt, _ in begun] == ["0.0", "0.04", "0.08"]
    assert begun[-1][1] - begun[0][1] >= 0.07
    assert len(load.outcomes) == 3
