"""The frozen ragged batch of one iteration: decode roots, draft trees, prefill chunks and training windows side by side.

Where the scheduler's ints meet the engine's tensors. Knows rows, slots and adapters, not requests or SLOs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels import ops
from kernels.ops import AttentionPlan, AttentionSegment
from kernels.upload import upload
from services.executor.adapter_rows import AdapterPlan, AdapterRows, arranged, joined
from services.executor.bottlenecks import BASES
from services.executor.dropout import RowDropout
from services.executor.lora import LoraAdapter
from services.executor.pages import Slots
from services.executor.scales import BEFORE_SCALE
from services.executor.tape import ActivationTape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive rows of one sequence. `context_slots` hold its committed keys, `slots` are where its own rows go.

    `parents` (draft trees) makes a row see its ancestors only; None is a causal run. `tape` and `tape_start` are set for
    training windows. `wants_logits` selects all rows, the last one or none.
    """

    tokens: Seq[int]
    positions: Seq[int]
    context_slots: Seq[int] | Slots
    slots: Seq[int] | Slots
    adapter: LoraAdapter | None = None
    parents: Seq[int] | None = None
    wants_logits: str = "none"
    tape: ActivationTape | None = None
    tape_start: int = 0
    dropout: RowDropout | None = None
    """Of the whole training sequence: the window's rows begin at `tape_start`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """Rows [start, end) of the batch are positions tape_start.. of a training sequence."""

    start: int
    end: int
    tape: ActivationTape
    tape_start: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """T rows; `starts[i]` is the first row of segment i; `logit_rows` are the rows whose logits are needed.

    `dropout` is of the last rows of the batch.
    """

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    attention: AttentionPlan
    adapters: AdapterPlan
    training: tuple[TrainingRows, ...]
    logit_rows: Tensor
    starts: tuple[int, ...]
    dropout: RowDropout | None = None

    def apply_adapters(self, layer: int, module: str, y_TO: Tensor, x_TI: Tensor) -> None:
        """Change each adapter's rows of `y_TO` as it wants: by a low-rank update, factors or a bottleneck, in place."""
        bottleneck = self.adapters.bottleneck(layer, module)
        if self.training:
            bases = {BEFORE_SCALE[scale.target]: scale.columns for scale in self.adapters.output_scales(layer, module)}
            bases |= {} if bottleneck is None else {BASES[module]: slice(None)}
            self.save(layer, **{name: y_TO[:, columns] for name, columns in bases.items()})
        self.adapters.apply(layer, module, y_TO, self._dropped(layer, module, x_TI))
        if bottleneck is not None:
            ops.segmented_bottleneck(y_TO, self._dropped(layer, module, y_TO), bottleneck)

    def _dropped(self, layer: int, module: str, x_TI: Tensor) -> Tensor:
        """What adapters see of x: training rows without what dropout drops."""
        if self.dropout is None:
            return x_TI
        first = x_TI.shape[0] - len(self.dropout.keys_T)
        return torch.cat((x_TI[:first], self.dropout.drop(layer, module, x_TI[first:])))

    def save(self, layer: int, **activations: Tensor) -> None:
        """Copy the training rows of those activations [T, width] that their tapes keep of a layer, all in one operation."""
        if not self.training:
            return
        places, rows = [], []
        for window in self.training:
            for name, tensor in activations.items():
                if not window.tape.has(layer, name):
                    continue
                places.append(window.tape.rows(layer, name, window.tape_start, window.tape_start + window.end - window.start))
                rows.append(tensor[window.start : window.end])
        if places:
            torch._foreach_copy_(places, rows)


class HostRows(NamedTuple):
    """Rows on the host, int64: tokens, positions and slots of each, the first row of every segment, its keys' slots."""

    tokens: Slots
    positions: Slots
    slots: Slots
    starts: list[int]
    keys: Slots
    num_keys: list[int]


def host_rows(segments: Seq[Segment]) -> HostRows:
    """The rows of these segments, in their order."""
    keys = [np.concatenate([s.context_slots, s.slots], dtype=np.int64, casting="unsafe") for s in segments]
    starts = itertools.accumulate((len(segment.tokens) for segment in segments), initial=0)
    return HostRows(
        tokens=np.array([token for segment in segments for token in segment.tokens], dtype=np.int64),
        positions=np.array([position for segment in segments for position in segment.positions], dtype=np.int64),
        slots=_joined([np.asarray(segment.slots, dtype=np.int64) for segment in segments]),
        starts=list(starts)[:-1],
        keys=_joined(keys),
        num_keys=[len(own) for own in keys],
    )


def build_batch(segments: Seq[Segment], device: torch.device) -> Batch:
    """The batch of these segments, in their order; neighbours with the same adapter share its launches."""
    host = host_rows(segments)
    logit_rows: list[int] = []
    adapters: list[AdapterRows] = []
    training: list[TrainingRows] = []
    for segment, start in zip(segments, host.starts, strict=True):
        end = start + len(segment.tokens)
        if segment.adapter is not None:
            adapters = joined(adapters, AdapterRows(start=start, end=end, adapter=segment.adapter))
        if segment.tape is not None:
            training.append(TrainingRows(start=start, end=end, tape=segment.tape, tape_start=segment.tape_start))
        logit_rows += {"all": range(start, end), "last": range(end - 1, end), "none": ()}[segment.wants_logits]
    wanted = np.array(logit_rows, dtype=np.int64)
    tokens_T, positions_T, slots_T, logit_rows_R, key_slots = upload([*host[:3], wanted, host.keys], device)
    return Batch(
        tokens_T=tokens_T,
        positions_T=positions_T,
        slots_T=slots_T,
        attention=AttentionPlan(attention_segments(segments, host.starts, key_slots, host.num_keys), key_slots),
        adapters=arranged(tuple(adapters)),
        training=tuple(training),
        logit_rows=logit_rows_R,
        starts=tuple(host.starts),
        dropout=_dropout(segments, device),
    )


def _dropout(segments: Seq[Segment], device: torch.device) -> RowDropout | None:
    first = next((i for i, segment in enumerate(segments) if segment.dropout is not None), len(segments))
    parts = [(s.dropout, s.tape_start, s.tape_start + len(s.tokens)) for s in segments[first:]]
    return RowDropout.joined(parts, device)


def ancestor_mask(parents: Seq[int]) -> Tensor:
    """Bool [n, n]: row i may see node j iff j is i or an ancestor of i; parents precede their children."""
    return torch.from_numpy(_ancestors(parents))


def _ancestors(parents: Seq[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    mask = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def _joined(parts: Seq[Slots]) -> Slots:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def attention_segments(segments: Seq[Segment], starts: Seq[int], slots: Tensor, num_keys: Seq[int]) -> list[AttentionSegment]:
    """`slots` are the keys of all segments, one after another. Masks stay on the host."""
    return [
        AttentionSegment(
            start=start,
            end=start + len(segment.tokens),
            slots_L=slots_L,
            mask_nn=None if segment.parents is None else ancestor_mask(segment.parents),
        )
        for segment, start, slots_L in zip(segments, starts, torch.split(slots, list(num_keys)), strict=True)
    ]
