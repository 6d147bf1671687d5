"""The runtime obeys the activation plan: bytes planned are bytes allocated, for any targets and layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.activation_plan import plan_activations
from common.bypasses import bypasses_of
from common.memory_table import memory_table
from common.messages import LoraSpec
from common.model_shape import read_model_shape
from services.executor.adapter_spec import TARGETS
from services.executor.backward import advance
from services.executor.backward_cursor import BackwardCursor
from services.executor.lora import LoraWeights
from services.executor.model_config import read_model_config
from services.executor.training_sequence import TrainingSequence
from tests.helpers import (
    as_decoder,
    forward_sequence,
    new_cache,
    random_adapter,
    random_tokens,
    tiny_model,
    training_sequence,
    training_slice,
)

NUM_ROWS = 10
torch.set_num_threads(1)  # a tiny operation takes microseconds, to share it among threads up to milliseconds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj",), ("o_proj", "up_proj"), ("gate_proj",), ("down_proj",)])
@pytest.mark.parametrize("layers", [(0, 1, 2), (1,), (0, 2)])
def test_bytes_planned_are_bytes_allocated(
    layers: tuple[int, ...], targets: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    decoder = as_decoder(tiny_model(), tmp_path, dtype)
    adapter = random_adapter(decoder, LoraSpec(rank=2, target_modules=targets), layers=layers)
    sequence = training_sequence(training_slice(random_tokens(decoder, NUM_ROWS + 1)), decoder, adapter)
    config = {"peft_type": "LORA", "r": 2, "target_modules": list(targets), "layers_to_transform": list(layers)}
    bypasses = bypasses_of(config, decoder.config.shape)
    plan = plan_activations(decoder.config.shape, bypasses)
    assert sequence.tape.num_bytes == plan.tape_width * NUM_ROWS * dtype.itemsize > 0
    cache = new_cache(decoder)
    forward_sequence(decoder, cache, sequence, adapter, [4, 3], range(NUM_ROWS))
    grads = LoraWeights(adapter.spec, decoder.config, layers=adapter.layers)
    cursor = BackwardCursor(decoder, adapter, grads, sequence)
    assert cursor.accumulator_bytes == plan.accumulator_bytes(NUM_ROWS, dtype.itemsize) > 0
    while not cursor.is_done:
        advance(decoder, cache, [cursor], 7)
    assert sequence.tape.num_bytes == 0
    table = memory_table(plan, bypasses, NUM_ROWS, dtype.itemsize)
    planned = {row.name: row.num_bytes[-1] for row in (*table.forward, *table.backward)}
    in_cache = sum(tensor_SKD[:NUM_ROWS].nbytes for tensor_SKD in (*cache.k, *cache.v))
    assert planned["k"] + planned["v"] == in_cache
    assert table.forward_total[-1] - in_cache == plan.tape_width * NUM_ROWS * dtype.itemsize
    assert planned["dk, dv sums"] == cursor.accumulator_bytes
    assert planned["dx"] == sequence.dx_TH.nbytes
    assert grads.flat.isfinite().all()


def test_the_lowest_layer_keeps_what_its_own_weights_read(tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model(), tmp_path)

    def kept(*targets: str) -> list[list[str]]:
        adapter = random_adapter(decoder, LoraSpec(rank=2, target_modules=targets), layers=(1, 2))
        return [[tensor.name for tensor in layer.tape] for layer in adapter.activation_plan(decoder.config.shape).layers]

    upper = ["x", "q", "m", "gate_up"]
    assert kept(*TARGETS) == [[], ["y", "q", "m", "gate_up"], upper]
    assert kept("down_proj") == [[], ["h"], upper]
    assert kept("o_proj") == [[], ["out", "m", "gate_up"], upper]
    assert kept("up_proj") == [[], ["z", "gate_up"], upper]


@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 2)])
@pytest.mark.parametrize("targets", [TARGETS, ("gate_proj",), ("q_proj", "down_proj")])
def test_what_is_run_again_gives_the_same_gradients(targets: tuple[str, ...], layers: tuple[int, ...], tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model(), tmp_path)
    adapter = random_adapter(decoder, LoraSpec(rank=2, target_modules=targets), layers=layers)
    item = training_slice(random_tokens(decoder, NUM_ROWS + 1))
    found = []
    for share in (0.0, 1.0):
        plan = adapter.activation_plan(decoder.config.shape, share)
        cache, sequence = new_cache(decoder), TrainingSequence(item, decoder, plan)
        forward_sequence(decoder, cache, sequence, adapter, [4, 3], range(NUM_ROWS))
        grads = LoraWeights(adapter.spec, decoder.config, layers=adapter.layers)
        num_bytes = sequence.tape.num_bytes
        advance(decoder, cache, [BackwardCursor(decoder, adapter, grads, sequence)], 1000)
        found.append((num_bytes, grads.flat))
    (kept_bytes, kept), (less_bytes, again) = found
    assert less_bytes < 0.7 * kept_bytes
    torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-6)


def test_the_executor_and_the_command_line_read_the_same_sizes(tmp_path: Path) -> None:
    as_decoder(tiny_model("qwen2", head_dim=10), tmp_path)
    assert read_model_shape(tmp_path)[0] == read_model_config(tmp_path).shape
