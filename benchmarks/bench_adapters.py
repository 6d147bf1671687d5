"""What many adapters in one batch cost beside one: checks the pass against the reference, then times both in turn. No bus.

The same rows, each a sequence that decodes, once all with one adapter and once each with its own, of ranks 8, 16 and 32.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from common.messages import LoraSpec
from kernels import ops, reference
from services.executor.batch import Batch, Segment, build_batch
from services.executor.loader import choose_dtype, load_decoder
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder, KvCache
from services.executor.model_config import read_model_config

RANKS = (8, 16, 32)
LIMIT = 1.25
"""What the many may cost, as a multiple of the one."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Relative error of the hidden states' norm, after all layers."""


def random_adapter(decoder: Decoder, rank: int, seed: int) -> LoraAdapter:
    """An adapter on all linears that changes the output a little, in the model's type as served ones are."""
    spec = LoraSpec(rank=rank, alpha=2.0 * rank)
    weights = LoraWeights(spec, decoder.config, dtype=decoder.dtype, device=decoder.device)
    weights.flat.normal_(std=0.02, generator=torch.Generator(decoder.device).manual_seed(seed))
    return LoraAdapter(f"adapter-{seed}", spec, weights)


def decode_batch(decoder: Decoder, num_rows: int, context: int, adapters: Sequence[LoraAdapter | None]) -> Batch:
    """One row per sequence, with the adapters dealt out in runs."""
    segments = [
        Segment(
            tokens=[row % decoder.config.vocab_size],
            positions=[context],
            context_slots=range(row * (context + 1), row * (context + 1) + context),
            slots=[row * (context + 1) + context],
            adapter=adapters[row * len(adapters) // num_rows],
        )
        for row in range(num_rows)
    ]
    return build_batch(segments, decoder.device)


def check(decoder: Decoder, batch: Batch, cache: KvCache) -> None:
    """Raises ValueError unless the pass equals one whose adapters are applied by the reference, segment by segment."""

    def by_reference(y_TO: Tensor, x_TI: Tensor, plan: ops.LoraPlan) -> None:
        reference.segmented_lora(y_TO, x_TI, plan.segments)

    actual = decoder.forward(batch, cache)
    with mock.patch.object(ops, "segmented_lora", by_reference), mock.patch.object(decoder, "stack", None):
        expected = decoder.forward(batch, cache)
    error = float((actual - expected).float().norm() / expected.float().norm())
    if not error <= TOLERANCE[decoder.dtype]:
        raise ValueError(f"relative error {error:.2g} of the hidden states")


def measure(decoder: Decoder, batches: dict[str, Batch], cache: KvCache, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each batch's pass, all asked in turn so that a slow moment hits all."""
    times: dict[str, list[float]] = {name: [] for name in batches}
    for turn, (name, batch) in itertools.product(range(-2, rounds), batches.items()):
        started_at = time.perf_counter()
        decoder.forward(batch, cache)
        if decoder.device.type == "cuda":
            torch.cuda.synchronize()
        if turn >= 0:  # the first ones warm up
            times[name].append((time.perf_counter() - started_at) * 1e3)
    return times


@torch.inference_mode()
def run(
    decoder: Decoder, *, num_rows: int, num_adapters: int, context: int, rounds: int, ranks: Sequence[int] = RANKS
) -> list[dict[str, object]]:
    """A row of results for no adapter, one (of the middle rank), and many."""
    many = [random_adapter(decoder, ranks[i % len(ranks)], i) for i in range(num_adapters)]
    one = random_adapter(decoder, sorted(ranks)[len(ranks) // 2], num_adapters)
    cache = KvCache(decoder.config, num_rows * (context + 1), decoder.dtype, decoder.device)
    choices: dict[str, Sequence[LoraAdapter | None]] = {"none": [None], "one": [one], "many": many}
    batches = {name: decode_batch(decoder, num_rows, context, adapters) for name, adapters in choices.items()}
    for batch in batches.values():
        check(decoder, batch, cache)
    times = measure(decoder, batches, cache, rounds)
    base = statistics.median(times["one"])
    return [
        {
            "adapters": name, "num_adapters": 0 if name == "none" else len(choices[name]), "rows": num_rows, "context": context,
            "p50_ms": statistics.median(values), "min_ms": min(values), "of_one": statistics.median(values) / base,
            "dtype": str(decoder.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        }
        for name, values in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True, help="a folder of safetensors, see `heddle convert`")
    parser.add_argument("--dtype", default="float32", help="half types round further apart than the check allows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/adapters.csv"))
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = choose_dtype(options.dtype, read_model_config(options.model_dir), device)
    decoder = load_decoder(options.model_dir, dtype, device)
    results = run(decoder, num_rows=options.rows, num_adapters=options.adapters, context=options.context, rounds=options.rounds)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0])
        writer.writeheader()
        writer.writerows(results)
    for row in results:
        print(f"{row['adapters']:<5} {row['num_adapters']:>3} adapters  {row['p50_ms']:8.2f} ms  {row['of_one']:.2f} of one")
    print(f"limit: {LIMIT} of one")


if __name__ == "__main__":
    main()
