"""What the target thinks of texts: hidden states and the normaliser of its distribution, in float32. Knows transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from services.cli.distill_data import Example

MAX_BATCH_ROWS = 2048


@dataclasses.dataclass(frozen=True)
class Trace:
    """What the target holds at each token of an example: features [T, F] in bfloat16, as the executor sends them, the
    logarithm of its softmax's denominator [T], and its favourite next token [T]."""

    example: Example
    features_TF: Tensor
    log_sums_T: Tensor
    favourites_T: Tensor


class Target:
    """A frozen model."""

    def __init__(self, folder: Path, feature_layers: Sequence[int]) -> None:
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # they would mix into ours
        auto: Any = transformers.AutoModelForCausalLM
        self._model: Any = auto.from_pretrained(folder, dtype=torch.float32).eval()
        self._layers = tuple(feature_layers)
        self.config: Any = self._model.config
        self.final_norm: Any = self._model.get_decoder().norm
        self.embedding_VH: Tensor = self._model.get_input_embeddings().weight.detach()
        self.head_VH: Tensor = self._model.get_output_embeddings().weight.detach()
        self._last_TH: Tensor | None = None
        self.final_norm.register_forward_pre_hook(self._keep)

    def _keep(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        self._last_TH = inputs[0]

    @torch.inference_mode()
    def traces(self, examples: Sequence[Example]) -> Iterator[Trace]:
        """One trace per example, those of similar length together; its features are a view of the batch's."""
        for batch in _batches(sorted(examples, key=lambda example: len(example.tokens))):
            width = max(len(example.tokens) for example in batch)
            ids = torch.tensor([[*example.tokens, *[0] * (width - len(example.tokens))] for example in batch])
            out = self._model.get_decoder()(input_ids=ids, output_hidden_states=True, use_cache=False)
            assert self._last_TH is not None
            states = [*out.hidden_states[:-1], self._last_TH]
            features = torch.cat([states[layer] for layer in self._layers], dim=-1).to(torch.bfloat16)
            for i, example in enumerate(batch):
                length = len(example.tokens)
                logits_TV = out.last_hidden_state[i, :length] @ self.head_VH.T
                yield Trace(example, features[i, :length], logits_TV.logsumexp(-1), logits_TV.argmax(-1))


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Neighbours that fit into MAX_BATCH_ROWS rows, padding included."""
    batch: list[Example] = []
    for example in examples:
        if batch and (len(batch) + 1) * len(example.tokens) > MAX_BATCH_ROWS:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
