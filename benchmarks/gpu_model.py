"""Llama-3.1-8B's shapes with random weights, and passes over them: roots, trees, windows. Knows no clock and downloads nothing.

C context tokens of each sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.attention_cases import binary_tree
from common.messages import LoraSpec, Sampling
from services.executor.batch import Segment
from services.executor.features import FeatureWish, PassFeatures
from services.executor.graphs import GRAPH_SIZES
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder, KvCache, LayerNorms, LayerWeights
from services.executor.model_config import ModelConfig
from services.executor.pages import Slots
from services.executor.passes import Passes
from services.executor.rope import Llama3Bands, Rope
from services.executor.sampling import Draws
from services.executor.tape import ActivationTape

PAGE = 16
DRAFT_BUDGET = 64
"""Draft nodes of all sequences, as an executor's default."""
LLAMA_3_1_8B = ModelConfig(
    hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336, vocab_size=128256,
    rms_norm_eps=1e-5, rope=Rope(theta=500000.0, factor=8.0, bands=Llama3Bands(low=1.0, high=4.0, original_positions=8192)),
    max_position_embeddings=131072, tie_word_embeddings=False, eos_token_ids=(), torch_dtype="bfloat16", qkv_bias=False,
    o_bias=False, qk_norm=False, windows=(None,) * 32,
)  # fmt: skip
TINY = dataclasses.replace(
    LLAMA_3_1_8B, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=40, vocab_size=64,
    max_position_embeddings=2048, windows=(None,),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What a pass holds: so many sequences that decode, draft nodes of each, rows of a finetuning window."""

    num_decodes: int
    num_drafts: int = 0
    num_window_rows: int = 0

    @property
    def name(self) -> str:
        """Beside its number of sequences."""
        parts = ["trees"] * bool(self.num_drafts) + ["window"] * bool(self.num_window_rows)
        return " + ".join(parts) or "plain"

    @property
    def num_rows(self) -> int:
        """Of the pass."""
        return self.num_decodes * (1 + self.num_drafts) + self.num_window_rows


def loads(decodes: tuple[int, ...], budget: int, num_window_rows: int) -> list[Load]:
    """Each number of sequences with and without trees, which share the budget of nodes, and with and without a window."""
    return [
        Load(num_decodes=n, num_drafts=max(budget // n, 1) * has_trees, num_window_rows=num_window_rows * has_window)
        for n in decodes
        for has_trees in (False, True)
        for has_window in (False, True)
    ]


def random_decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A decoder of this shape whose activations stay in range."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, shape[-1] ** -0.5, generator=generator)

    hidden, inner, (q, k, v) = config.hidden_size, config.intermediate_size, config.qkv_sizes
    ones = torch.ones(hidden, dtype=dtype, device=device)
    layers = [
        LayerWeights(
            norms=LayerNorms(input_norm_H=ones, q_norm_D=None, k_norm_D=None, post_norm_H=ones),
            qkv_OH=normal(q + k + v, hidden), qkv_bias_O=None, o_HO=normal(hidden, q), o_bias_H=None,
            gate_up_2FH=normal(2 * inner, hidden), down_HF=normal(hidden, inner),
        )
        for _ in range(config.num_layers)
    ]  # fmt: skip
    return Decoder(config, normal(config.vocab_size, hidden), layers, ones, normal(config.vocab_size, hidden))


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What every pass reads: all matrices but the embedding."""
    hidden, inner, (q, k, v) = config.hidden_size, config.intermediate_size, config.qkv_sizes
    per_layer = hidden * (2 * q + k + v) + 3 * hidden * inner
    return (config.num_layers * per_layer + config.vocab_size * hidden) * dtype.itemsize


def context_bytes(config: ModelConfig, load: Load, num_context: int, dtype: torch.dtype) -> int:
    """Keys and values that a pass reads beside the weights."""
    return load.num_decodes * KvCache.num_bytes(config, num_context, dtype)


class LoadedModel:
    """A decoder with room for the largest load, and whole passes over loads: tables, all layers, tokens on the host."""

    def __init__(self, decoder: Decoder, num_context: int, most: Load) -> None:
        self.decoder, self.num_context = decoder, num_context
        pages = self._pages(1 + most.num_drafts)
        num_pages = most.num_decodes * pages + self._pages(most.num_window_rows) + 1
        self.cache = KvCache(decoder.config, num_pages * PAGE, decoder.dtype, decoder.device)
        self._eager, self._recorded = (Passes(decoder, self.cache, size) for size in (0, GRAPH_SIZES[-1]))
        self._order = np.random.default_rng(0).permutation(num_pages)
        self._adapter = LoraAdapter(
            "window", spec := LoraSpec(rank=16), LoraWeights(spec, decoder.config, device=decoder.device)
        )

    def _pages(self, num_own: int) -> int:
        return -(-(self.num_context + num_own) // PAGE)

    def segments(self, load: Load) -> list[Segment]:
        """Each sequence in pages of its own, in no order."""
        found, first, context = [], 0, self.num_context
        parents = binary_tree(1 + load.num_drafts)
        depths = [int(np.log2(node + 1)) for node in range(len(parents))]
        for i in range(load.num_decodes):
            slots, first = self._slots(first, context + len(parents))
            found.append(
                Segment(
                    tokens=[i % 50] * len(parents), positions=[context + depth for depth in depths], wants_logits="all",
                    context_slots=slots[:context], slots=slots[context:], parents=parents if load.num_drafts else None,
                )
            )  # fmt: skip
        if load.num_window_rows:
            found.append(self._window(load.num_window_rows, self._slots(first, load.num_window_rows)[0]))
        return found

    def _slots(self, first_page: int, num_slots: int) -> tuple[Slots, int]:
        end = first_page + -(-num_slots // PAGE)
        slots = (self._order[first_page:end, None] * PAGE + np.arange(PAGE)).ravel()[:num_slots]
        return slots.astype(np.int64), end

    def _window(self, num_rows: int, slots: Slots) -> Segment:
        config = self.decoder.config
        tape = ActivationTape(self._adapter.activation_plan(config.shape), num_rows, self.decoder.dtype, self.decoder.device)
        return Segment(
            tokens=[1] * num_rows, positions=range(num_rows), context_slots=(), slots=slots, adapter=self._adapter, tape=tape
        )

    def call(self, load: Load, *, is_recorded: bool) -> Callable[[], list[int]]:
        """One pass: replayed where the executor would, or with each launch by the host."""
        segments, passes = self.segments(load), self._recorded if is_recorded else self._eager

        @torch.inference_mode()
        def run() -> list[int]:
            logits_RV = passes.run(segments, PassFeatures(FeatureWish())).logits_RV
            assert logits_RV is not None
            return tokens(logits_RV)

        return run


def tokens(logits_RV: Tensor) -> list[int]:
    """The likeliest of every row, by the executor's own draws."""
    draws = Draws(logits_RV)
    return [draws.token(row, Sampling(temperature=0.0), 0, None) for row in range(len(logits_RV))]
