"""A forward pass of training windows alone, in units: a layer of some rows. Knows neither how long they take nor who waits.

It can stop between any two units, for whatever has come in meanwhile, and goes on where it stopped: a row's result does not
depend on what shares its units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from common.latency import NO_ROWS, Rows
from kernels.reference import LOGIT_ROWS
from services.executor.batch import Batch, Segment, build_batch
from services.executor.model import Decoder, KvCache
from services.executor.model_config import ModelConfig
from services.executor.training_sequence import TrainingSequence, heads
from services.executor.training_work import Window

MAX_BATCHES = 8
"""Cuts of a pass's rows whose batches are kept: layers that are not interrupted are all cut alike."""

ALMOST = 1.0 - 1e-6
"""A row's share of a budget that its like were taken from: rounding is not to leave the last one out."""


class ForwardUnits:
    """T rows of windows of training sequences, one window behind the other."""

    def __init__(self, decoder: Decoder, cache: KvCache, windows: Sequence[Window]) -> None:
        self._decoder, self._cache = decoder, cache
        self._windows = [(window, window.sequence) for window in windows if isinstance(window.sequence, TrainingSequence)]
        self._segments = [window.segment for window, _ in self._windows]
        self.rows = _rows_of(self._segments)
        """What the latency model knows of it."""
        tokens_T = torch.tensor([token for segment in self._segments for token in segment.tokens], device=decoder.device)
        self._x_TH = F.embedding(tokens_T, decoder.embedding_VH)
        self._layer = self._row = 0
        self._batches: dict[tuple[int, int], Batch] = {}
        self._head_layers = head_layers(decoder.config)

    @property
    def job_ids(self) -> frozenset[str]:
        """Whose windows are not through: the first ones are before the last, and can go back meanwhile."""
        ends = ((window.start + len(window.segment.tokens), window.job_id, sequence) for window, sequence in self._windows)
        return frozenset(job_id for end, job_id, sequence in ends if sequence.num_forwarded < end)

    @property
    def has_begun(self) -> bool:
        """Whether a unit was done."""
        return (self._layer, self._row) > (0, 0)

    @property
    def is_through(self) -> bool:
        """Whether all rows have their losses."""
        return self._layer > self._decoder.config.num_layers

    def advance(self, max_tokens: float, max_unit: float, is_stopped: Callable[[], bool]) -> float:
        """Do up to this much, in units of up to `max_unit`, both in tokens of a whole pass, and return what was done.

        At least a unit, of a row at least; no more when it is stopped then.
        """
        whole = self._decoder.config.num_layers + self._head_layers
        budget = most = max_tokens * whole
        while not self.is_through and (budget == most or budget >= self._row_layers * ALMOST):
            num_rows = int(min(budget, max_unit * whole, len(self._x_TH) * whole) / (self._row_layers * ALMOST))
            budget -= self._unit(max(1, num_rows))
            if is_stopped():
                break
        return (most - budget) / whole

    @property
    def is_at_head(self) -> bool:
        """Whether all rows are through the layers, and some have no losses yet."""
        return self._layer == self._decoder.config.num_layers

    @property
    def _row_layers(self) -> float:
        """What a row costs in the next unit, in layers."""
        return self._head_layers if self.is_at_head else 1.0

    def _unit(self, max_rows: int) -> float:
        """The next rows through their layer, or to their losses and gradients; returns the work in tokens times layers."""
        row_layers, start = self._row_layers, self._row
        end = min(start + (min(max_rows, LOGIT_ROWS) if self.is_at_head else max_rows), len(self._x_TH))
        if self.is_at_head:
            parts = [(*self._windows[index], first, last) for index, first, last in self._parts(start, end)]
            heads([(seq, window.start + first, last - first) for window, seq, first, last in parts], self._x_TH[start:end])
        else:
            batch = self._batch(start, end)
            self._x_TH[start:end] = self._decoder.layer(self._layer, self._x_TH[start:end], batch, self._cache)
        self._row = end
        if end == len(self._x_TH):
            self._layer, self._row = self._layer + 1, 0
        return (end - start) * row_layers

    def _batch(self, start: int, end: int) -> Batch:
        """The batch of rows [start, end)."""
        if (start, end) not in self._batches:
            if len(self._batches) >= MAX_BATCHES:
                self._batches.clear()
            cut = [_cut(self._segments[index], first, last) for index, first, last in self._parts(start, end)]
            self._batches[start, end] = build_batch(cut, self._decoder.device)
        return self._batches[start, end]

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(window, first row in it, last) of rows [start, end)."""
        before = 0
        for index, segment in enumerate(self._segments):
            first, last = max(start - before, 0), min(end - before, len(segment.tokens))
            if first < last:
                yield index, first, last
            before += len(segment.tokens)


def head_layers(config: ModelConfig) -> float:
    """What the head of a row costs, forward and back, in layers of a forward pass: by its weights."""
    q, k, v = config.qkv_sizes
    layer = config.hidden_size * (2 * q + k + v + 3 * config.intermediate_size)
    return 2 * config.vocab_size * config.hidden_size / layer


def _rows_of(segments: Sequence[Segment]) -> Rows:
    rows = NO_ROWS
    for segment in segments:
        rows = rows.with_segment(len(segment.tokens), len(segment.context_slots))
    return rows


def _cut(segment: Segment, first: int, last: int) -> Segment:
    """Rows [first, last) of a window."""
    if (first, last) == (0, len(segment.tokens)):
        return segment
    slots = np.asarray(segment.slots, dtype=np.int64)
    return dataclasses.replace(
        segment,
        tokens=segment.tokens[first:last],
        positions=segment.positions[first:last],
        context_slots=np.concatenate([np.asarray(segment.context_slots, dtype=np.int64), slots[:first]]),
        slots=slots[first:last],
        tape_start=segment.tape_start + first,
    )
