"""Distillation in the executor: what a head learns from, its gradients against autograd, the same bits however it is cut."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch
from torch import Tensor

from common.latency import drafter_corrected, drafter_ms_per_token
from common.messages import DrafterSpec, LatencyProfile, Slo
from kernels.drafting.files import CONFIG, WEIGHTS
from kernels.drafting.head import DraftHead
from kernels.drafting.start import RIDGE, LeastSquares, Solution, fit_rows
from services.executor import lesson_units
from services.executor.adapter_spec import InvalidAdapterError
from services.executor.lesson_units import UPDATE_COST, LessonUnits
from services.executor.views import Limits
from services.planner.features_head import FeaturesHead
from tests.distillation_stage import SPEC, TIGHT, VOCABULARY, forwarded, lesson, new_job, opened, texts, trained, whole_loss
from tests.tiny import SHAPE, Driver, random_prompt, tiny_pair, tiny_request


def test_a_lesson_is_what_the_target_thinks() -> None:
    item = lesson(0, num_tokens=90)
    sequence = forwarded(new_job(), item)
    model, kept = tiny_pair()[0], list[Tensor]()
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][0]))
    with torch.no_grad():
        out = model(torch.tensor([item.tokens]), output_hidden_states=True)
    hook.remove()
    states_TF = torch.cat([out.hidden_states[1][0], kept[0]], dim=1)[: sequence.num_rows]
    torch.testing.assert_close(sequence.features_TF.float(), states_TF, atol=1e-4, rtol=2**-7)
    rows_R = torch.arange(44, 89)
    probs_RV = out.logits[0].softmax(-1)[rows_R][:, list(VOCABULARY)]
    truth = sequence.truth(rows_R)
    wanted = probs_RV.topk(truth.probs_Rk.shape[1], dim=1)
    torch.testing.assert_close(truth.probs_Rk, wanted.values, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(probs_RV.gather(1, truth.top_Rk), wanted.values, atol=1e-6, rtol=1e-4)
    places = {token: i for i, token in enumerate(VOCABULARY)}
    favourites = out.logits[0].argmax(-1)[rows_R].tolist()
    assert truth.favourites_R.tolist() == [places.get(token, len(VOCABULARY)) for token in favourites]


@pytest.mark.parametrize("seed", range(3))
def test_units_add_up_to_the_gradient_of_the_whole_text(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(lesson_units, "NOISE", 0.0)
    monkeypatch.setattr(lesson_units, "sampled_classes", lambda num_classes, *_: torch.arange(num_classes))
    rng = random.Random(seed)
    turns = [rng.choice([0.0, 0.01, 0.03]) for _ in range(10) for _ in range(24)]  # the window is 128, a read part 64 rows
    item = lesson(0, num_tokens=240, weights=(0.0, *turns[1:]), tokens=random_prompt(240, seed))
    job = new_job()
    sequence = forwarded(job, item)
    for unit in LessonUnits(job.head, sequence, SPEC.num_steps, seed):
        unit.run()
    got = {name: parameter.grad for name, parameter in job.head.named_parameters() if parameter.requires_grad}
    head = DraftHead(job.head.shape, job.head.embedding_VH)
    head.load_state_dict(job.head.state_dict())
    loss = whole_loss(head, sequence, item)
    loss.backward()  # type: ignore[no-untyped-call]
    assert sequence.loss == pytest.approx(loss.item(), rel=1e-5)
    assert len(got) == 14
    for name, grad in got.items():
        torch.testing.assert_close(grad, head.get_parameter(name).grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_loss_falls_and_the_head_finds_the_favourites() -> None:
    driver = Driver(opened(texts(30)))
    driver.run(10_000)
    steps = [event.step for event in driver.events if event.step is not None]
    assert [step.step for step in steps] == list(range(30))
    assert sum(step.loss for step in steps[-4:]) < 0.7 * sum(step.loss for step in steps[:4])
    accuracy = [step.num_correct / step.num_tokens for step in steps]
    assert sum(accuracy[-4:]) > sum(accuracy[:4]) + 2.0


def test_neither_windows_nor_requests_beside_it_change_a_bit() -> None:
    slices = texts(6)
    alone, cut, beside = new_job(), new_job(), new_job()
    losses = trained(slices, alone, limits=Limits(idle_iteration_ms=10_000.0))
    assert trained(slices, cut, limits=TIGHT) == losses
    engine = opened(slices, beside)
    for i in range(3):
        assert engine.submit(tiny_request(f"r{i}", random_prompt(9, i), 25, slo=Slo(tpot_ms=12.0)), None) is None
    driver = Driver(engine)
    driver.run(10_000)
    assert [event.step.loss for event in driver.events if event.step is not None] == losses
    assert alone.artifact() == cut.artifact() == beside.artifact() != new_job().artifact()


@pytest.mark.parametrize("start_steps", [0, 2, 5])
def test_a_restored_job_goes_on_to_the_bit(start_steps: int) -> None:
    slices, spec = texts(6), spec_with(start_steps=start_steps)
    whole, first = new_job(spec), new_job(spec)
    losses = trained(slices, whole)
    engine = opened(slices[:8], first)
    driver = Driver(engine)
    while first.step < 3 or not first.is_forwarded:  # in the middle of step 3, which is forgotten
        driver.step()
    resumed = new_job(spec, seed=2)
    resumed.restore(first.checkpoint())
    assert resumed.step == 3
    assert trained(slices[6:], resumed) == losses[3:]
    assert resumed.artifact() == whole.artifact()
    assert resumed.checkpoint() == whole.checkpoint()


def test_what_no_job_can_be_restored_from_is_named() -> None:
    other = new_job(spec_with(vocabulary=VOCABULARY[1:])).checkpoint()
    for data, reason in ((other, "another vocabulary"), (b"{}", "safetensors"), (safetensors.torch.save({}), "no step")):
        with pytest.raises(InvalidAdapterError, match=reason):
            new_job().restore(data)


def spec_with(**fields: Any) -> DrafterSpec:
    return msgspec.structs.replace(SPEC, **fields)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"vocabulary": ()}, "vocabulary"),
        ({"vocabulary": (5, 4)}, "vocabulary"),
        ({"vocabulary": (5, 97)}, "vocabulary"),
        ({"vocabulary": (-1, 5)}, "vocabulary"),
        ({"start_steps": -1}, "start_steps"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 7}, "num_steps"),
    ],
)
def test_an_impossible_drafter_is_refused_by_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidAdapterError, match=f"drafter.{field}"):
        new_job(spec_with(**fields))


def test_parts_of_a_ridge_regression_solve_the_whole() -> None:
    chance = torch.Generator().manual_seed(0)
    inputs, outputs = torch.randn(900, 300, generator=chance), torch.randn(900, 7, generator=chance)
    sums = LeastSquares.empty(300, 7)
    for part in (slice(0, 500), slice(500, 900)):
        sums.add(inputs[part], outputs[part])
    gram = inputs.double().T @ inputs.double()
    wanted = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(300), inputs.double().T @ outputs.double())
    torch.testing.assert_close(Solution(sums).solved().double(), wanted, atol=1e-5, rtol=1e-4)


def test_the_first_steps_give_the_first_weights() -> None:
    slices, job = texts(3), new_job(spec_with(start_steps=2))
    engine = opened(slices, job)
    driver = Driver(engine)
    while job.step < 2:
        driver.step()
    lessons = [forwarded(new_job(), msgspec.structs.replace(item, step=0, index=0)) for item in slices[:4]]
    parts = [fit_rows(job.head, each.features_TF[1:], each.places_T[2 : each.num_rows]) for each in lessons]
    inputs, outputs = (torch.cat(each) for each in zip(*parts, strict=True))
    hidden = SHAPE["hidden_size"]
    sums = LeastSquares.empty(inputs.shape[1], hidden)
    sums.add(inputs, outputs)
    map_IO = Solution(sums).solved()
    torch.testing.assert_close(job.head.features.weight.data, map_IO[hidden:].T, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(job.head.fuse.weight.data[:, :hidden], map_IO[:hidden].T, atol=1e-4, rtol=1e-3)
    driver.run()
    losses = [event.step.loss for event in driver.events if event.step is not None]
    assert losses[2] < 0.9 * losses[0]


def test_units_wait_until_they_are_paid_for() -> None:
    job = new_job()
    forwarded(job, lesson(0))
    costs = []
    for unit in LessonUnits(job.head, job.group[0], SPEC.num_steps, 1):
        unit.run()
        costs.append(unit.cost / job._model_cost)
    costs.append(UPDATE_COST * sum(each.numel() for each in job._optimizer.parameters.values()) / job._model_cost)
    budget, paid, spent = max(costs) / 7, 0.0, 0.0
    while job.finish() is None:
        done = job.advance(budget)
        paid, spent = paid + budget, spent + done
        assert spent <= paid * (1 + 1e-9)
        assert done <= budget + max(costs)
    assert spent == pytest.approx(sum(costs))


def test_a_distillation_beside_requests_keeps_their_targets() -> None:
    """On a clock that runs as the latency model says, drafters' units included: each target is met, and the head learns."""
    profile = LatencyProfile(points=((1, 10.0), (1001, 1010.0)), backward_ms_per_token=2.0, drafter_correction=1.0)
    now = [1000.0]
    engine = opened(texts(2), profile=profile, clock=lambda: now[0])
    for i in range(3):
        assert engine.submit(tiny_request(f"r{i}", random_prompt(4, i), 60, slo=Slo(tpot_ms=30.0)), None) is None
    learned, since = 0.0, dict[str, float]()
    counts: dict[str, int] = {}
    while engine.sequences:
        iteration = engine.forward_pass()
        assert engine._plan is not None
        now[0] += engine._plan.forward_ms / 1e3
        for chunk in iteration.chunks:
            counts[chunk.request_id] = counts.get(chunk.request_id, 0) + len(chunk.tokens)
            since.setdefault(chunk.request_id, now[0])
            if chunk.finish_reason:
                mean_ms = (now[0] - since[chunk.request_id]) * 1e3 / (counts[chunk.request_id] - 1)
                assert mean_ms <= 30.0
        work = engine.backward_pass()
        engine.profile = profile
        learned += work.drafter_tokens
        now[0] += work.drafter_tokens * drafter_ms_per_token(profile) / 1e3
    assert learned > 100


def test_the_latency_model_learns_what_a_head_costs() -> None:
    profile = LatencyProfile(points=((1, 10.0), (100, 100.0)))
    assert drafter_ms_per_token(profile) == pytest.approx(4.0)
    for _ in range(40):
        profile = drafter_corrected(profile, 10.0, 5.0)
    assert drafter_ms_per_token(profile) == pytest.approx(0.5, rel=0.05)
    assert drafter_corrected(profile, 0.0, 5.0) == profile


def test_a_planner_loads_the_artifact(tmp_path: Path) -> None:
    job = new_job()
    trained(texts(2), job)
    data = job.artifact()
    (tmp_path / WEIGHTS).write_bytes(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    (tmp_path / CONFIG).write_text(header["__metadata__"]["config"])
    head = FeaturesHead(tmp_path)
    assert (head.fingerprint, head.feature_layers, head.hidden_size) == ("name", (1, 2), SHAPE["hidden_size"])
    assert head.vocabulary == list(VOCABULARY)
