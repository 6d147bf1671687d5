"""A causal language model of Hugging Face's over one pool of keys and values. Knows tensors and slots, no sequences, no trees.

transformers computes everything but attention, which is registered with it: rows of many sequences lie side by side in one
pass, each row's keys and values go to a slot of the pool, and each segment of rows attends to the slots that it names.
Shapes: T rows, R rows with logits, N query heads, K kv heads, D head_dim, S slots, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from common.config import ConfigError
from kernels import ops

ATTENTION = "heddle_slots"
MIN_SLOTS = 256
"""Fewer would not hold a sequence worth drafting for."""


@dataclasses.dataclass(frozen=True)
class _Pass:
    """Where the rows of one pass go, what they see, and the pool [S, K, D] of each layer."""

    slots_T: Tensor
    plan: ops.AttentionPlan
    keys: list[Tensor]
    values: list[Tensor]


class DraftModel:
    """Weights and pool of a draft model. Not for several threads at a time."""

    def __init__(self, folder: Path, *, kv_bytes: int) -> None:
        """Raises ConfigError, naming the folder, if it holds no model that can be run so, or the pool would be too small."""
        transformers.AttentionInterface.register(ATTENTION, _attend)
        self._model = _loaded(folder)
        config: Any = self._model.config.get_text_config()
        num_heads = config.num_attention_heads
        shape = (
            getattr(config, "num_key_value_heads", None) or num_heads,
            getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        )
        self.vocab_size = int(self._model.get_input_embeddings().num_embeddings)
        self.max_length = int(config.max_position_embeddings)
        slot_bytes = 2 * config.num_hidden_layers * shape[0] * shape[1] * self._model.dtype.itemsize
        self.num_slots = int(kv_bytes // slot_bytes)
        if self.num_slots < MIN_SLOTS:
            raise ConfigError(f"draft_kv_bytes must be at least {MIN_SLOTS * slot_bytes} for {folder}, not {kv_bytes}")
        pools = [torch.empty(self.num_slots, *shape, dtype=self._model.dtype) for _ in range(2 * config.num_hidden_layers)]
        self._keys, self._values = pools[::2], pools[1::2]
        try:
            self.log_probs([0, 0], [0, 1], torch.tensor([0, 1]), [torch.tensor([0, 1])], [2], [1])
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(f"{folder} cannot be a draft model here: {error!r}") from error

    @torch.inference_mode()
    def log_probs(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots_T: Tensor,
        seen: Sequence[Tensor],
        sizes: Sequence[int],
        wanted: Sequence[int],
    ) -> Tensor:
        """Log probabilities [R, V], float32, of what follows the `wanted` rows.

        Segment i has the next `sizes[i]` rows and sees the slots `seen[i]`: those before it, then its own in row order.
        """
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        segments = [
            ops.AttentionSegment(start=start, end=start + size, slots_L=slots_L)
            for start, size, slots_L in zip(starts, sizes, seen, strict=True)
        ]
        logits_1RV = self._model(
            input_ids=torch.tensor([list(tokens)]),
            position_ids=torch.tensor([list(positions)]),
            use_cache=False,
            logits_to_keep=torch.tensor(list(wanted)),
            slot_pass=_Pass(slots_T, ops.AttentionPlan(segments), self._keys, self._values),
        ).logits
        found: Tensor = logits_1RV[0].float().log_softmax(-1)
        return found


def _loaded(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"draft model:{folder}: there is no config.json")
    auto: Any = transformers.AutoModelForCausalLM
    dtype = torch.bfloat16 if ops.has_fast_bfloat16() else torch.float32
    try:
        model, told = auto.from_pretrained(
            folder, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"draft model:{folder} cannot be loaded: {error!r}") from error
    if told["missing_keys"]:
        raise ConfigError(f"draft model:{folder} has no weights for {sorted(told['missing_keys'])[0]}")
    return model.eval()


def _attend(
    module: Any,
    q_1NTD: Tensor,
    k_1KTD: Tensor,
    v_1KTD: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    slot_pass: _Pass,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer, after positions were rotated in; the output is [1, T, N, D]."""
    if unknown := [name for name in ("softcap", "s_aux") if other.get(name) is not None]:
        raise ValueError(f"its attention has {unknown[0]}, which is not computed here")
    keys_SKD, values_SKD = slot_pass.keys[module.layer_idx], slot_pass.values[module.layer_idx]
    keys_SKD[slot_pass.slots_T] = k_1KTD[0].transpose(0, 1)
    values_SKD[slot_pass.slots_T] = v_1KTD[0].transpose(0, 1)
    q_TND = q_1NTD[0].transpose(0, 1).contiguous()
    return ops.ragged_attention(q_TND, keys_SKD, values_SKD, slot_pass.plan, scaling, sliding_window).unsqueeze(0), None
