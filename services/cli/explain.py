"""`heddle explain`: prints what static compilation decides for a model and a PEFT configuration. Computes nothing itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.table import Table

from common.activation_graph import Graph, layer_graph
from common.activation_plan import ActivationPlan, plan_activations
from common.bypasses import Bypass, LayerBypasses, read_bypasses
from common.layer_states import layer_states
from common.memory_table import STAGES, Bytes, MemoryTable, memory_table, saved_share
from common.model_folder import ModelFolderError
from common.model_shape import DTYPE_BYTES, ModelShape, read_model_shape
from common.parallel_plan import Machine, ParallelPlan, candidate_plans, surroundings
from common.peft_folder import PeftFolderError
from common.tensor_states import State
from kernels.cache import cache_dir
from services.cli.models import cached_folder, locate
from services.cli.status import wide_console

MAX_PLANS = 20
"""That are printed of a bypass."""
MAX_DEFAULT_RANKS = 4


class ExplainError(ValueError):
    """The model or the configuration cannot be read; the message names the file or the field."""


def explain_memory(model: str, peft: Path, num_tokens: int, dtype: str | None, recompute_share: float) -> None:
    """Print the memory of one training sequence, tensor by tensor. Raises ExplainError, ModelError."""
    shape, bypasses, dtype = _read(model, peft, dtype)
    plan = plan_activations(shape, bypasses, recompute_share)
    table = memory_table(plan, bypasses, num_tokens, DTYPE_BYTES[dtype])
    console = wide_console()
    console.print(
        f"{Path(model).name}, {_adapted(bypasses)}; one sequence of {num_tokens} tokens, {dtype}, all layers, GB (1e9)\n"
    )
    console.print(_memory(table))
    console.print("\nkept until the backward pass has left the layer, beside keys and values in the KV cache:")
    for line in _kept(plan):
        console.print(line, markup=False, highlight=False)


def explain_parallel(
    model: str, peft: Path, num_tokens: int, dtype: str | None, num_ranks: int | None, machine_of: Callable[[int], Machine]
) -> None:
    """Print the parallel plans of each bypass of the model's last adapted layer, for so many ranks of a machine or, if it is
    not said, for the most that divide the model, up to MAX_DEFAULT_RANKS. Raises ExplainError, ModelError.
    """
    shape, bypasses, dtype = _read(model, peft, dtype)
    common = math.gcd(shape.num_kv_heads, shape.intermediate_size)
    if num_ranks is None:
        num_ranks = next(number for number in range(MAX_DEFAULT_RANKS, 0, -1) if common % number == 0)
    if common % num_ranks:
        fitting = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
        raise ExplainError(
            f"--ranks: {num_ranks} do not divide the model's {shape.num_kv_heads} kv heads and intermediate_size"
            f" {shape.intermediate_size}, as {fitting} do"
        )
    machine = machine_of(num_ranks)
    console = wide_console()
    console.print(
        f"{Path(model).name}, {machine.num_ranks} ranks, {num_tokens} tokens a pass, {dtype}; per rank, forward and backward\n"
    )
    adapted = next(layer for layer in reversed(bypasses) if layer)
    chosen = {}
    for target, bypass in adapted.items():
        around = surroundings(bypass)
        plans = candidate_plans(bypass, shape, machine, num_tokens, DTYPE_BYTES[dtype])
        chosen[target] = plans[0]
        what = f"{bypass.method} on {bypass.target}: X {around.source.value} -> Y {around.target.value}"
        if around.target is State.PARTIAL:
            what += ", which the backbone reduces anyway"
        console.print(what, markup=False, highlight=False)
        console.print(_plans(plans[:MAX_PLANS]))
        console.print(f"and {len(plans) - MAX_PLANS} dearer ones\n" if len(plans) > MAX_PLANS else "")
    legend = (
        "a layer's tensors, with each first plan; [replica, tokens, features]: - whole, | split, = copies, + partial sums\n"
    )
    console.print(legend, markup=False, highlight=False)
    console.print(_states(layer_graph(shape, adapted, num_tokens), adapted, chosen, num_tokens))


def _read(model: str, peft: Path, dtype: str | None) -> tuple[ModelShape, tuple[dict[str, Bypass], ...], str]:
    try:
        shape, own_dtype = read_model_shape(_folder(model))
        bypasses = read_bypasses(peft, shape)
    except (ModelFolderError, PeftFolderError) as error:
        raise ExplainError(str(error)) from error
    if (chosen := dtype or own_dtype) not in DTYPE_BYTES:
        raise ExplainError(f"dtype: {chosen} is none of {', '.join(DTYPE_BYTES)}; choose with --dtype")
    return shape, bypasses, chosen


def _folder(model: str) -> Path:
    """Where the model's config.json is: a folder, which needs nothing else, or the cache."""
    source = locate(model)
    folder = Path(source.location) if source.kind == "folder" else cached_folder(source, cache_dir())
    if not (folder / "config.json").exists():
        raise ExplainError(f"{model} is not in the cache yet: `heddle convert {model}` puts it there")
    return folder


def _adapted(bypasses: tuple[dict[str, Bypass], ...]) -> str:
    adapted = [layer for layer in bypasses if layer]
    kinds = dict.fromkeys((bypass.method, bypass.rank) for layer in adapted for bypass in layer.values())
    targets = dict.fromkeys(target for layer in adapted for target in layer)
    named = ", ".join(f"{method} of rank {rank}" if rank else method for method, rank in kinds)
    return f"{named} on {', '.join(targets)} of {len(adapted)} layers"


def _kept(plan: ActivationPlan) -> list[str]:
    """One line for each run of layers that are alike."""
    lines = []
    for tape, run in itertools.groupby(enumerate(plan.layers), key=lambda item: item[1].tape):
        numbers = [number for number, _ in run]
        layers = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]} to {numbers[-1]}"
        lines.append(f"  {layers}: {', '.join(f'{tensor.name} [T, {tensor.width}]' for tensor in tape) or 'nothing'}")
    return lines


def _memory(table: MemoryTable) -> Table:
    shown = Table("tensor", "shape", *STAGES, box=None, pad_edge=False, header_style="bold")
    for column in shown.columns[2:]:
        column.justify = "right"
    for row in (*table.forward, *table.backward):
        if any(row.num_bytes):
            shown.add_row(row.name, f"T, {row.width}" if row.width else "", *map(_gb, row.num_bytes))
    for name, total in (("activations", table.forward_total), ("total", table.total)):
        shown.add_row(f"[bold]{name}[/bold]", "", *map(_gb, total))
        shown.add_row("  less than unpruned", "", *(_percent(total, stage) for stage in range(len(STAGES))))
    return shown


def _states(graph: Graph, bypasses: LayerBypasses, plans: Mapping[str, ParallelPlan], num_tokens: int) -> Table:
    shown = Table("tensor", "shape", "state", box=None, pad_edge=False, header_style="bold")
    for name, state in layer_states(graph, bypasses, plans).items():
        shown.add_row(name, f"{num_tokens}, {graph.tensors[name].width}", state.value.replace("[", r"\["))
    return shown


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.4f}" if num_bytes else "-"


def _percent(total: Bytes, stage: int) -> str:
    return f"{saved_share((total[0], 0, 0, total[stage])):.1%}"


def _plans(plans: list[ParallelPlan]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("plan", "us", "GFLOP", "MB sent", "MB sent per update", "MB of weights, moments", "operators"):
        shown.add_column(name, justify="left" if name in ("plan", "operators") else "right")
    for plan in plans:
        shown.add_row(
            plan.name,
            f"{plan.cost_s * 1e6:.1f}",
            f"{plan.flops / 1e9:.3f}",
            f"{plan.comm_bytes / 1e6:.3f}",
            f"{plan.sync_bytes / 1e6:.3f}",
            f"{plan.weight_bytes / 1e6:.3f}",
            " ".join(plan.operators).replace("[", r"\["),
        )
    return shown
