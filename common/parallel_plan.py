"""Dependent parallelization (FlexLLM 5.1): all plans of a bypass beside a backbone whose states are given, and their costs.

Knows states, sizes and rates; runs nothing. The backbone is Megatron's: q, k, v, gate, up by columns, o and down by rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from common.bypasses import Bypass
from common.model_shape import ModelShape
from common.tensor_states import ELEMENTWISE_RULES, LINEAR_RULES, Rule, State, Transition, transition

ROW_PARALLEL = ("o_proj", "down_proj")
OPTIMIZER_COPIES = 4
"""fp32 weight, gradient and AdamW's two moments."""
SYNC_BYTES = 4
"""Weights' gradients are fp32."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a rank can do, and what a byte is worth: `memory_weight_s_per_byte` seconds of a pass for one byte less.

    An optimizer step comes once in `passes_per_update` passes of `num_tokens`.
    """

    num_ranks: int
    flops_per_s: float = 150e12
    link_bytes_per_s: float = 200e9
    latency_s: float = 10e-6
    memory_weight_s_per_byte: float = 1e-15
    passes_per_update: int = 8


@dataclass(frozen=True, kw_only=True)
class Step:
    """An operator of a bypass: from `num_in` features to `num_out`. Elementwise ones keep the number."""

    name: str
    is_linear: bool
    num_in: int
    num_out: int
    num_weights: int

    @property
    def flops(self) -> int:
        """Forward, per token."""
        return 2 * self.num_in * self.num_out if self.is_linear else 5 * self.num_out


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the backbone fixes around a bypass: the state of X, and the state in which Y is added to."""

    source: State
    target: State

    @property
    def is_residual(self) -> bool:
        """Whether gradients come, and are wanted, whole on every rank. Elsewhere the backbone sums up those of X anyway."""
        return self.source is self.target is State.REPLICATED


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """One way to run a bypass: `operators` in their order, `states` of what each step makes.

    Costs are per rank, of forward and backward together. `sync_bytes`: all-reduce of the gradients of replicated weights,
    once per optimizer step. `cost_s` is for one pass.
    """

    rules: tuple[int, ...]
    states: tuple[State, ...]
    operators: tuple[str, ...]
    forward_bytes: float
    flops: float
    comm_bytes: float
    num_collectives: int
    sync_bytes: float
    weight_bytes: float
    cost_s: float

    @property
    def name(self) -> str:
        """As in FlexLLM's figure: the rules that its operators follow."""
        return "+".join(map(str, self.rules))


def bypass_steps(bypass: Bypass, shape: ModelShape) -> tuple[Step, ...]:
    """The operators of a bypass."""
    num_in, num_out = shape.linears[bypass.target]
    if bypass.method == "lora":
        return _linear("A", num_in, bypass.rank), _linear("B", bypass.rank, num_out)
    if bypass.method == "bottleneck":
        rank = bypass.rank
        active = Step(name=bypass.activation, is_linear=False, num_in=rank, num_out=rank, num_weights=0)
        return _linear("down", num_out, rank), active, _linear("up", rank, num_out)
    width = num_in if bypass.method == "ia3_input" else num_out
    return (Step(name="scale", is_linear=False, num_in=width, num_out=width, num_weights=width),)


def surroundings(bypass: Bypass) -> Surroundings:
    """What Megatron's states are where the bypass reads and adds.

    A row-parallel linear's output is a partial sum that the backbone reduces anyway: LoRA may add to it before that.
    A serial adapter must read the whole sum.
    """
    is_row = bypass.target in ROW_PARALLEL
    before = State.FEATURES if is_row else State.REPLICATED
    after = State.PARTIAL if is_row else State.FEATURES
    if bypass.method == "lora":
        return Surroundings(source=before, target=after)
    if bypass.method == "ia3_input":
        return Surroundings(source=before, target=before)
    reduced = State.REPLICATED if is_row else State.FEATURES
    return Surroundings(source=reduced, target=reduced)


def candidate_plans(
    bypass: Bypass, shape: ModelShape, machine: Machine, num_tokens: int, dtype_bytes: int
) -> list[ParallelPlan]:
    """All plans whose states fit together, cheapest first; never empty. The first is the choice."""
    steps, around = bypass_steps(bypass, shape), surroundings(bypass)
    choices = [LINEAR_RULES if step.is_linear else ELEMENTWISE_RULES for step in steps]
    plans = [
        _cost(steps, rules, moves, around, machine, num_tokens, dtype_bytes)
        for rules in itertools.product(*choices)
        if None not in (moves := list(_moves(rules, around, machine.num_ranks)))
    ]
    return sorted(plans, key=lambda plan: (plan.cost_s, plan.rules))


def _linear(name: str, num_in: int, num_out: int) -> Step:
    return Step(name=name, is_linear=True, num_in=num_in, num_out=num_out, num_weights=num_in * num_out)


def _moves(rules: tuple[Rule, ...], around: Surroundings, num_ranks: int) -> Iterator[Transition | None]:
    """The transitions before each operator and behind the last."""
    states = [around.source, *(rule.output for rule in rules)]
    wanted = [*(rule.source for rule in rules), around.target]
    for state, target in zip(states, wanted, strict=True):
        yield transition(state, target, num_ranks)


def _cost(
    steps: tuple[Step, ...],
    rules: tuple[Rule, ...],
    moves: list[Transition | None],
    around: Surroundings,
    machine: Machine,
    num_tokens: int,
    dtype_bytes: int,
) -> ParallelPlan:
    ranks = machine.num_ranks
    found = [move for move in moves if move is not None]
    widths = [steps[0].num_in, *(step.num_out for step in steps)]
    forward_bytes = sum(move.share * width * num_tokens * dtype_bytes for move, width in zip(found, widths, strict=True))
    comm_bytes, num_collectives = 2 * forward_bytes, 2 * sum(move.share > 0 for move in found)
    flops = weights = replicated = 0.0
    for step, rule in zip(steps, rules, strict=True):
        flops += (3 if step.num_weights else 2) * step.flops * num_tokens / (ranks if rule.splits_work else 1)
        weights += step.num_weights / (ranks if rule.splits_weight else 1)
        replicated += 0 if rule.splits_weight else step.num_weights
    if around.is_residual:
        if all(rule.number == 1 for rule in rules):
            replicated = 0  # every rank computes the whole gradients
        else:
            comm_bytes += 2 * (ranks - 1) / ranks * steps[0].num_in * num_tokens * dtype_bytes
            num_collectives += 1
    weight_bytes = OPTIMIZER_COPIES * SYNC_BYTES * weights
    sync_bytes = 2 * (ranks - 1) / ranks * replicated * SYNC_BYTES
    sync_s = sync_bytes / machine.link_bytes_per_s + machine.latency_s * (sync_bytes > 0)
    cost_s = (
        flops / machine.flops_per_s
        + comm_bytes / machine.link_bytes_per_s
        + num_collectives * machine.latency_s
        + sync_s / machine.passes_per_update
        + weight_bytes * machine.memory_weight_s_per_byte
    )
    operators = [found[0].name]
    for step, rule, move in zip(steps, rules, found[1:], strict=True):
        operators += [f"{step.name}:{rule.weight}", move.name]
    return ParallelPlan(
        rules=tuple(rule.number for rule in rules),
        states=tuple(rule.output for rule in rules),
        operators=tuple(operator for operator in operators if operator),
        forward_bytes=forward_bytes,
        flops=flops,
        comm_bytes=comm_bytes,
        num_collectives=num_collectives,
        sync_bytes=sync_bytes,
        weight_bytes=weight_bytes,
        cost_s=cost_s,
    )
