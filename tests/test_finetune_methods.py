"""Each method as a job: through trainer and executor, exported, and computed as PEFT, or transformers, computes it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers

from common import subjects
from common.bus import Bus
from common.codec import decode
from common.messages import AdapterRecord
from common.peft_folder import WEIGHTS
from services.cli.adapters import export
from services.executor.batch import Segment, build_batch
from services.executor.loader import load_decoder
from services.executor.lora import LoraAdapter
from tests.bottleneck_oracle import inserted
from tests.helpers import CPU, PEFT_WARNING, new_cache, random_tokens
from tests.test_finetune_kills import DATA, EPOCHS, Processes, create, no_more, outcome, processes
from tests.trainer_world import World

__all__ = ["processes"]
pytestmark = [pytest.mark.timeout(240), pytest.mark.filterwarnings(PEFT_WARNING)]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "learning_rate": 0.01, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "rslora": {"rank": 4, "learning_rate": 0.01},
    "ia3": {"learning_rate": 0.1},
    "bottleneck": {"rank": 5, "non_linearity": "gelu", "learning_rate": 0.01},
}


async def test_every_method_trains_and_is_what_others_make_of_it(processes: Processes, tmp_path: Path) -> None:
    bus = await Bus.connect(processes.server.url, "test")
    try:
        world = World(no_more, bus, processes.model_dir)
        await world.upload(DATA)
        loras = [{"method": method} | options for method, options in METHODS.items()]
        jobs = [await create(world, {"hyperparameters": EPOCHS, "lora": lora}) for lora in loras]
        assert [job.lora["method"] for job in jobs] == list(METHODS)
        outcomes = await asyncio.gather(*(outcome(world, job) for job in jobs))
        for job, (losses, weights) in zip(jobs, outcomes, strict=True):
            assert losses[-1][1] < 0.9 * losses[0][1]
            name = (await world.ask("get", job.id)).fine_tuned_model
            await export(bus, name, tmp_path / job.id)
            bucket = await bus.key_value(subjects.ADAPTERS_BUCKET)
            record = decode((await bucket.get(subjects.adapter_key(name))).value or b"", AdapterRecord)
            assert_computed_as_elsewhere(processes.model_dir, tmp_path / job.id, record, weights)
    finally:
        await bus.client.close()


def assert_computed_as_elsewhere(model_dir: Path, exported: Path, record: AdapterRecord, weights: bytes) -> None:
    decoder = load_decoder(model_dir, torch.float32, CPU)
    tokens = random_tokens(decoder, 11)
    adapter = LoraAdapter.from_safetensors(record.name, record.lora, weights, decoder.config)

    def ours(chosen: LoraAdapter | None) -> torch.Tensor:
        rows = range(len(tokens))
        segment = Segment(
            tokens=tokens, positions=rows, context_slots=(), slots=rows, adapter=chosen, wants_logits="all"
        )  # fmt: skip
        return decoder.logits(decoder.forward(build_batch([segment], CPU), new_cache(decoder)))

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        if record.lora.method == "bottleneck":
            inserted(model, safetensors.torch.load_file(exported / WEIGHTS), record.lora)
            adapted = model
        else:
            adapted = peft.PeftModel.from_pretrained(model, str(exported))
        theirs = adapted(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(ours(adapter), theirs, rtol=1e-4, atol=1e-4)
    assert (ours(None) - theirs).abs().max() > 0.05
