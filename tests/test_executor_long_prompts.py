"""Long prompts beside tight targets: the planned iterations of whole lives, timed by a synthetic device. Knows no clock."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgpack
import msgspec
import pytest
import torch

from common.codec import decode
from common.latency import Rows, context_costs, corrected, make_profile, predict_ms
from common.messages import LatencyProfile
from kernels.version import kernels_version
from services.executor import profiling
from services.executor.finetune_share import JobView
from services.executor.model import KvCache
from services.executor.passes import Passes
from services.executor.scheduler import plan_iteration
from services.executor.startup import profile_key
from services.executor.views import Limits, SequenceView
from tests.plans import decoding, waiting
from tests.tiny import tiny_pair

DEVICE = LatencyProfile(
    points=((1, 28.0), (16, 29.0), (64, 34.0), (256, 70.0)), ms_per_context_token=2e-4, ms_per_row_context=1e-4
)
"""Behind 6,000 tokens a row costs 0.6 ms, six times what it costs behind none, and any chunk 1.2 ms more."""
JOB = JobView(job_id="job", forward_tokens=100_000, is_backward=False)


@dataclasses.dataclass
class Life:
    """What became of a stream and of the prompts beside it."""

    tpot_ms: float
    longest_ms: float
    prompt_ended_at_ms: float | None
    num_passes_to_end: int | None


def live(
    prompt: int,
    target_ms: float,
    *,
    num_tokens: int = 2000,
    device: LatencyProfile = DEVICE,
    believed: LatencyProfile | None = None,
    jobs: tuple[JobView, ...] = (),
    done: int = 0,
    scored: int = 0,
) -> Life:
    """A stream of `num_tokens` tokens after its first, and a prompt, of which `done` tokens are computed, that waits beside it,
    of which the first `scored` rows are scored. The scheduler knows `believed`, corrected by what each pass takes on `device`.
    """
    profile = believed or device
    clock_ms, longest_ms, starved = 0.0, 0.0, 0
    ended_at_ms: float | None = None
    passes: int | None = None
    for num_decoded in range(num_tokens):
        stream = decoding(
            "stream",
            context_tokens=300 + num_decoded,
            num_decoded=num_decoded,
            max_remaining=num_tokens - num_decoded,
            decode_ms=clock_ms,
            tpot_ms=target_ms,
        )
        views: list[SequenceView] = [stream]
        if done < prompt:
            unscored = max(0, scored - done)
            views.append(waiting("prompt", prompt - done, context_tokens=done, arrived_at=1.0, num_unscored=unscored))
        plan = plan_iteration(clock_ms / 1e3, views, jobs, profile, Limits(), starved)
        starved = plan.num_starved
        took_ms = predict_ms(device, plan.rows)
        profile = corrected(profile, plan.rows, took_ms)
        clock_ms += took_ms
        longest_ms = max(longest_ms, took_ms)
        done += plan.prefill.get("prompt", 0)
        if done >= prompt and ended_at_ms is None:
            ended_at_ms, passes = clock_ms, num_decoded + 1
    return Life(clock_ms / num_tokens, longest_ms, ended_at_ms, passes)


@pytest.mark.parametrize("jobs", [(), (JOB,)])
def test_a_stream_keeps_its_target_beside_a_long_prompt_that_ends(jobs: tuple[JobView, ...]) -> None:
    life = live(6000, 50.0, jobs=jobs)
    assert life.tpot_ms <= 50.0
    assert life.longest_ms <= 50.0
    assert life.prompt_ended_at_ms is not None


def test_the_time_that_a_loose_target_leaves_goes_to_the_prompt() -> None:
    tight, loose = live(6000, 50.0), live(6000, 200.0)
    assert tight.num_passes_to_end is not None
    assert loose.num_passes_to_end is not None
    assert tight.num_passes_to_end > 8 * loose.num_passes_to_end
    assert loose.tpot_ms <= 200.0


@pytest.mark.parametrize("target_ms", [31.6, 32.0, 33.0])
def test_a_target_that_leaves_a_prompt_no_room_is_kept_while_the_prompt_goes_on(target_ms: float) -> None:
    """A decode alone takes 28.1 ms and more, so that within the margin of `safety` hardly a row fits; a chunk takes 10 ms."""
    life = live(6000, target_ms, num_tokens=800, done=5200)
    assert life.tpot_ms <= target_ms
    assert life.num_passes_to_end is not None
    assert life.num_passes_to_end <= 800 / 16 * (Limits().max_prefill_gap + 1)


def test_a_prompt_ends_beside_a_target_that_nothing_can_meet() -> None:
    life = live(6000, 10.0, num_tokens=100)
    assert life.num_passes_to_end is not None
    assert life.longest_ms <= Limits().max_iteration_ms


def test_a_cost_of_context_that_was_measured_wrongly_is_learned_and_the_stream_alone_not_blamed_for_it() -> None:
    """As a profile of 1,000 tokens may be wrong behind 6,000."""
    profile = LatencyProfile(points=DEVICE.points, ms_per_context_token=2e-4, ms_per_row_context=0.5e-4)
    assert live(6000, 50.0, believed=profile).tpot_ms <= 50.0
    alone = Rows().with_segment(1, 500)
    beside = alone.with_segment(64, 6000)
    for rows in (alone, beside) * 300:
        profile = corrected(profile, rows, predict_ms(DEVICE, rows))
    for rows in (alone, beside):
        assert predict_ms(profile, rows) == pytest.approx(predict_ms(DEVICE, rows), rel=0.03)


def test_a_stream_keeps_its_target_beside_a_prompt_that_is_scored() -> None:
    """Each of its rows needs the model's head, so fewer fit beside the stream, down to what its tokens cost alone."""
    device = msgspec.structs.replace(DEVICE, ms_per_scored_row=0.5)
    plain, scored = live(2000, 60.0, device=device), live(2000, 60.0, device=device, scored=1999)
    for life in (plain, scored):
        assert life.tpot_ms <= 60.0
        assert life.longest_ms <= 60.0
    assert plain.num_passes_to_end is not None
    assert scored.num_passes_to_end is not None
    assert scored.num_passes_to_end > 2 * plain.num_passes_to_end
    assert live(2000, 60.0, device=device, believed=DEVICE, scored=1999).longest_ms > 60.0, "the term is what keeps it"


def test_the_costs_of_context_are_found_from_two_passes() -> None:
    narrow, wide = Rows().with_segment(1, 1024), Rows().with_segment(64, 1024)
    alone = make_profile([(1, 28.0), (64, 34.0)])

    def slower(rows: Rows) -> float:
        return predict_ms(DEVICE, rows) - predict_ms(alone, Rows(rows.tokens))

    found = context_costs((narrow, slower(narrow)), (wide, slower(wide)))
    assert found == pytest.approx((DEVICE.ms_per_context_token, DEVICE.ms_per_row_context))
    assert context_costs((narrow, 5.0), (wide, 4.0)) == pytest.approx((5.0 / 1024, 0.0)), "noise makes nothing cheaper"
    assert context_costs((narrow, -1.0), (wide, -2.0)) == (0.0, 0.0)


def test_the_measurement_finds_a_device_in_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []

    def pass_ms(_: Passes, num_tokens: int, context_tokens: int = 0) -> float:
        assert num_tokens + context_tokens <= profiling.NUM_SLOTS
        passes.append((num_tokens, context_tokens))
        return predict_ms(DEVICE, Rows().with_segment(num_tokens, context_tokens))

    monkeypatch.setattr(profiling, "_pass_ms", pass_ms)
    monkeypatch.setattr(profiling, "_scoring_ms", lambda decoder: 0.25 * profiling.SCORED_ROWS)
    decoder = tiny_pair(max_position_embeddings=2048)[1]
    found = profiling.measure_profile(decoder, KvCache(decoder.config, 1, decoder.dtype, decoder.device), 1024)
    assert found.ms_per_scored_row == 0.25
    for rows in ((1, 0), (1, 8000), (32, 500), (16, 6000)):
        segment = Rows().with_segment(*rows)
        assert predict_ms(found, segment) == pytest.approx(predict_ms(DEVICE, segment))
    assert sum(context > 0 for _, context in passes) == 8
    short = tiny_pair(max_position_embeddings=50)[1]
    assert profiling.measure_profile(short, KvCache(short.config, 1, short.dtype, short.device), 1024).points


def test_a_cost_of_context_that_noise_has_hidden_can_still_be_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_pass_ms", lambda passes, num_tokens, context_tokens=0: 20.0 + num_tokens)
    decoder = tiny_pair(max_position_embeddings=2048)[1]
    profile = profiling.measure_profile(decoder, KvCache(decoder.config, 1, decoder.dtype, decoder.device), 1024)
    assert profile.ms_per_row_context == pytest.approx(2 * 32 / (32 * (32 + 2 * 16 + 32 + 3 * 48)))
    profile = msgspec.structs.replace(profile, ms_per_row_context=2e-5)
    device = msgspec.structs.replace(profile, ms_per_row_context=2e-4)
    alone = Rows().with_segment(1, 10)
    beside = alone.with_segment(64, 6000)
    for rows in (alone, beside) * 1500:
        profile = corrected(profile, rows, predict_ms(device, rows))
    assert predict_ms(profile, beside) == pytest.approx(predict_ms(device, beside), rel=0.05)
    assert predict_ms(profile, alone) == pytest.approx(predict_ms(device, alone), rel=0.1)


def test_a_profile_of_before_the_term_is_read_and_measured_anew() -> None:
    old = msgpack.packb({"points": [[1, 5.0]], "ms_per_context_token": 0.1, "backward_ms_per_token": 0.2, "correction": 1.5})
    profile = decode(old, LatencyProfile)
    assert profile.ms_per_row_context == profile.ms_per_scored_row == 0.0
    assert predict_ms(profile, Rows(1, 10, 10_000)) == pytest.approx(1.5 * 6.0)
    key = profile_key("model", torch.float32, torch.device("cpu"), 2)
    assert ".row-context.scored-row." in key, "what older versions kept lies under another key"


def test_other_kernels_have_another_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new release must not start with what the old one's kernels took."""
    (tmp_path / "native").mkdir()
    source = tmp_path / "native" / "linear.c"
    keys = set()
    for text in ("old", "new", "old"):
        source.write_text(text)
        kernels_version.cache_clear()
        version = kernels_version(tmp_path)
        monkeypatch.setattr("services.executor.startup.kernels_version", lambda version=version: version)
        keys.add(profile_key("model", torch.float32, torch.device("cpu"), 2))
    kernels_version.cache_clear()
    assert len(keys) == 2


def test_graphs_of_other_sizes_have_another_profile() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    keys = [profile_key("model", torch.float32, device, 2, size) for device in (cuda, cpu) for size in (0, 256)]
    assert len(set(keys)) == 3, "on a CPU there are none"


@pytest.mark.parametrize(
    ("name", "value"), [("version", lambda _: "99.0"), ("kernels_version", lambda: "ffffffff"), ("ops.interprets_triton", True)]
)
def test_another_release_and_another_choice_of_kernels_have_another_profile(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> str:
        return profile_key("model", torch.float32, torch.device("cpu"), 2)

    before = key()
    monkeypatch.setattr(f"services.executor.startup.{name}", value)
    assert key() != before
