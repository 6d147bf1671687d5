"""What several tests need: the one tolerance table, tiny models, training windows driven by hand."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.messages import LoraSpec, OptimizerStep, TrainingSlice
from services.executor.backward import advance
from services.executor.batch import Segment, build_batch
from services.executor.finetune import FinetuneJob
from services.executor.job_steps import StepResult
from services.executor.loader import load_decoder
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder, KvCache
from services.executor.training_sequence import TrainingSequence

TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1e-2),
}
"""dtype -> (rtol, atol) of a result against an oracle computed in a wider type."""

CPU = torch.device("cpu")

PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
"""peft 0.21 calls what transformers 5 renames; tests that make a PEFT model filter it."""


def assert_matches(actual: Tensor, expected: Tensor) -> None:
    """`actual` is what its dtype allows of the oracle `expected`, and finite."""
    rtol, atol = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=atol)


def assert_close_in_norm(actual: Tensor, expected: Tensor, rel: float) -> None:
    """The difference's norm is at most `rel` of the oracle's norm, and the oracle is not zero."""
    norm = expected.norm()
    assert norm > 0
    assert (actual.to(expected.dtype) - expected).norm() <= rel * norm


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers in fp64, by seed and shape; exact in `dtype` too, so that oracle and subject see the same."""
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).double()


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A random transformers model of three layers with grouped attention, large enough weights, and norms that are not 1."""
    import transformers

    options: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 61,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
    } | overrides
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def as_decoder(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Our decoder with the model's weights, through a saved folder."""
    model.save_pretrained(folder)
    return load_decoder(folder, dtype, CPU)


def random_adapter(decoder: Decoder, spec: LoraSpec, *, layers: Sequence[int] | None = None, seed: int = 0) -> LoraAdapter:
    """An adapter in the decoder's type, at least fp32, with both matrices of every target away from zero."""
    dtype = torch.promote_types(decoder.dtype, torch.float32)
    weights = LoraWeights(spec, decoder.config, layers=layers, dtype=dtype)
    weights.flat.copy_(0.3 * randn(*weights.flat.shape, seed=seed))
    return LoraAdapter("adapter", spec, weights)


def _is_view(result: Tensor, source: Tensor) -> bool:
    return result.dtype == source.dtype and result.data_ptr() == source.data_ptr()


class OperatorCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the torch operators that run inside the `with` block and do work: views and reads of sizes do none.

    On a GPU each is one launch, or a fixed number of them.
    """

    VIEWS = (
        "alias as_strided detach expand lift_fresh permute select slice split split_with_sizes squeeze t transpose unsafe_split"
        " unsqueeze view _unsafe_view _reshape_alias unbind chunk is_pinned resolve_conj resolve_neg"
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All operators."""
        return self.by_name.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        is_same = isinstance(result, Tensor) and bool(args) and isinstance(args[0], Tensor) and _is_view(result, args[0])
        if name not in self.VIEWS.split() and not (name == "to" and is_same):
            self.by_name[name] += 1
        return result


def random_tokens(decoder: Decoder, num_tokens: int, seed: int = 0) -> list[int]:
    """Token ids of the decoder's vocabulary."""
    return random.Random(seed).choices(range(decoder.config.vocab_size), k=num_tokens)


def new_cache(decoder: Decoder, num_slots: int = 128) -> KvCache:
    """A cache in the decoder's type, full of values that must never be read."""
    cache = KvCache(decoder.config, num_slots, decoder.dtype, decoder.device)
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(float("nan"))
    return cache


def training_slice(
    tokens: Sequence[int],
    weights: Sequence[float] | None = None,
    *,
    step: int = 0,
    index: int = 0,
    optimizer: OptimizerStep | None = None,
) -> TrainingSlice:
    """A slice of job `job`; without weights, the mean over all predicted tokens."""
    if weights is None:
        weights = [0.0] + [1.0 / (len(tokens) - 1)] * (len(tokens) - 1)
    return TrainingSlice(
        job_id="job", lease=1, step=step, index=index, tokens=tuple(tokens), weights=tuple(weights), optimizer=optimizer
    )


def training_sequence(item: TrainingSlice, decoder: Decoder, adapter: LoraAdapter | None = None) -> TrainingSequence:
    """The slice in work for this adapter, or for one on all linears."""
    adapter = adapter or random_adapter(decoder, LoraSpec(rank=2))
    return TrainingSequence(item, decoder, adapter.activation_plan(decoder.config.shape))


def forward_sequence(
    decoder: Decoder,
    cache: KvCache,
    sequence: TrainingSequence,
    adapter: LoraAdapter,
    windows: Sequence[int],
    slots: Sequence[int],
) -> None:
    """Forward a training sequence in windows of these sizes, over and over until it ends."""
    sequence.slots_T = torch.tensor(slots[: sequence.num_rows], dtype=torch.int64)
    sizes = itertools.cycle(windows)
    while not sequence.is_forwarded:
        start = sequence.num_forwarded
        end = min(start + next(sizes), sequence.num_rows)
        segment = Segment(
            tokens=sequence.tokens[start:end],
            positions=range(start, end),
            context_slots=slots[:start],
            slots=slots[start:end],
            adapter=adapter,
            tape=sequence.tape,
            tape_start=start,
            dropout=sequence.dropout,
        )
        sequence.head(decoder.forward(build_batch([segment], CPU), cache), start)


def train_queued(
    job: FinetuneJob, decoder: Decoder, cache: KvCache, *, forward: Sequence[int] = (1000,), backward: int = 1000
) -> list[StepResult]:
    """Train all queued slices, forward in these windows, backward in pieces of `backward` tokens; returns the steps."""
    results = []
    while group := job.start_next():
        forward_group(decoder, cache, group, job.adapter, forward)
        while (result := job.finish()) is None:
            advance(decoder, cache, job.cursors(), backward * decoder.config.num_layers)
        if result.step is not None:
            results.append(result.step)
    return results


def forward_group(
    decoder: Decoder, cache: KvCache, group: Sequence[TrainingSequence], adapter: LoraAdapter, windows: Sequence[int]
) -> None:
    """Forward sequences one after another, each into cache slots behind those of the one before."""
    first = 0
    for sequence in group:
        forward_sequence(decoder, cache, sequence, adapter, windows, range(first, cache.k[0].shape[0]))
        first += sequence.num_rows
