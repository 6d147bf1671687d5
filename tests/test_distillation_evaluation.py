"""Held-out texts of a distillation: scored between its steps, by the head as it is, and nothing changes by it."""

from __future__ import annotations

import pytest
import torch

from common.messages import EvaluationSlice
from kernels.drafting.head import DraftHead, Span
from services.executor.job_steps import OutOfOrderSliceError
from services.executor.lesson import LessonSequence
from tests.distillation_stage import VOCABULARY, forwarded, lesson, new_job, opened, texts, trained, whole_loss
from tests.tiny import Driver, random_prompt


def held_out(step: int, index: int, num_tokens: int = 40) -> EvaluationSlice:
    """A text whose second half has weights of one."""
    item = lesson(step, index, num_tokens, tokens=random_prompt(num_tokens, seed=7 + index))
    weights = tuple(float(weight > 0) for weight in item.weights)
    return EvaluationSlice(job_id="job", lease=1, step=step, index=index, tokens=item.tokens, weights=weights)


def test_held_out_texts_are_scored_as_the_head_is_and_change_nothing() -> None:
    slices, told, plain = texts(4), new_job(), new_job()
    losses = trained(slices, plain)
    engine = opened(slices[:4], told)
    driver = Driver(engine)
    driver.run(10_000)
    before = told.checkpoint()
    for index, num_tokens in enumerate((60, 25, 2, 150)):
        engine.training.accept(held_out(2, index, num_tokens))
        engine.training.accept(held_out(2, index, num_tokens))  # asked again
    driver.run(10_000)
    scores = [event.score for event in driver.events if event.score is not None]
    assert [(score.step, score.index, score.num_tokens) for score in scores] == [(2, 0, 30), (2, 1, 13), (2, 2, 0), (2, 3, 75)]
    for score, num_tokens in zip(scores, (60, 25, 2, 150), strict=True):
        if score.num_tokens:
            held = held_out(2, score.index, num_tokens)
            item = lesson(0, 0, tokens=held.tokens, weights=held.weights)
            sequence = forwarded(new_job(), item)
            assert score.loss == pytest.approx(whole_loss(told.head, sequence, item).item(), rel=1e-4)
            assert score.num_correct == hits(told.head, sequence)
    assert any(score.num_correct for score in scores)
    assert told.checkpoint() == before
    for item in slices[4:]:
        engine.training.accept(item)
    driver.run(10_000)
    assert [event.step.loss for event in driver.events if event.step is not None] == losses
    assert told.artifact() == plain.artifact()


def test_slices_behind_a_held_out_text_wait_for_it() -> None:
    slices, plain, held_back = texts(3), new_job(), new_job()
    losses = trained(slices, plain)
    engine = opened(slices[:2], held_back)
    driver = Driver(engine)
    driver.run(10_000)
    engine.training.accept(held_out(1, 0))
    for item in slices[2:]:
        engine.training.accept(item)
    driver.run(10_000)
    told = [(event.score is not None, event.step.loss if event.step else None) for event in driver.events]
    assert told == [(False, losses[0]), (True, None), (False, losses[1]), (False, losses[2])]
    assert held_back.artifact() == plain.artifact()


@pytest.mark.parametrize("step", [0, 1])
def test_held_out_texts_are_taken_between_steps_only(step: int) -> None:
    engine = opened(texts(1)[:1])
    with pytest.raises(OutOfOrderSliceError, match="step 0 is next"):
        engine.training.accept(held_out(step, 0))


def hits(head: DraftHead, sequence: LessonSequence) -> int:
    """First guesses of the head that are the target's favourites, all rows at once."""
    rows_R = torch.tensor(sequence.trained)
    span = Span(0, sequence.num_rows, rows_R)
    (out_RH,) = head.unroll(sequence.features_TF.float(), sequence.places_T[1 : sequence.num_rows + 1, None], [span], 1)
    favourites_R = sequence.truth(rows_R + 1).favourites_R
    guesses_R = head.logits(out_RH).argmax(-1)
    return int(((guesses_R == favourites_R) & (favourites_R < len(VOCABULARY))).sum())
