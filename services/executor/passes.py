"""The forward part of a pass: by a recorded graph where one fits, else each launch by the host. Knows rows, not requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from services.executor.batch import Segment, build_batch, host_rows
from services.executor.features import PassFeatures
from services.executor.graphs import GraphKey, PaddedPass, Recording, graph_key, graph_sizes
from services.executor.model import Decoder, KvCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassOutput:
    """Hidden states of all rows, logits of those that want them (None: of none), the first row of each segment.

    The tensors hold until the next pass.
    """

    hidden_TH: Tensor
    logits_RV: Tensor | None
    starts: tuple[int, ...]
    is_replay: bool = False


class Passes:
    """Passes of one decoder over one cache. Recordings are made when they are first needed, or all by `record_all`."""

    def __init__(self, decoder: Decoder, cache: KvCache, max_graph_rows: int = 0) -> None:
        """Passes of up to `max_graph_rows` rows are recorded, on a CUDA device."""
        self._decoder, self._cache = decoder, cache
        self._sizes = graph_sizes(max_graph_rows) if decoder.device.type == "cuda" else ()
        self._group = decoder.config.num_heads // decoder.config.num_kv_heads
        self._recordings: dict[GraphKey, Recording] = {}
        self._pool: object = None

    def run(self, segments: Seq[Segment], features: PassFeatures) -> PassOutput:
        """One pass; `features` gets the states after the layers that it wishes."""
        key = graph_key(segments, self._sizes, self._group, features.wish.layers)
        if key is not None:
            recording = self._recording(key)
            if recording.padded.fill(segments):
                hidden_TH, logits_TV, states = recording.replay()
                starts = host_rows(segments).starts
                num_rows = starts[-1] + len(segments[-1].tokens)
                features.adopt([state_TH[:num_rows] for state_TH in states])
                return PassOutput(
                    hidden_TH=hidden_TH[:num_rows], logits_RV=logits_TV[:num_rows], starts=tuple(starts), is_replay=True
                )
        return self._eager(segments, features)

    @torch.inference_mode()
    def record_all(self, layers: tuple[int, ...] = ()) -> int:
        """Record every size, the largest first, so that the smaller ones find memory to share; returns how many there are."""
        for size in reversed(self._sizes):
            for is_wide in (False, True):
                self._recording(GraphKey(size, is_wide, layers))
        return len(self._recordings)

    def _recording(self, key: GraphKey) -> Recording:
        if any(other.layers != key.layers for other in self._recordings):
            self._recordings.clear()  # the planner's drafter is another one
        if key not in self._recordings:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._recordings[key] = Recording(PaddedPass(self._decoder, self._cache, key), self._pool)
        return self._recordings[key]

    def _eager(self, segments: Seq[Segment], features: PassFeatures) -> PassOutput:
        batch = build_batch(segments, self._decoder.device)
        hidden_TH = self._decoder.forward(batch, self._cache, features)
        features.keep(self._decoder.config.num_layers, hidden_TH)
        logits_RV = self._decoder.logits(hidden_TH[batch.logit_rows]) if len(batch.logit_rows) else None
        return PassOutput(hidden_TH=hidden_TH, logits_RV=logits_RV, starts=batch.starts)
