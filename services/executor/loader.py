"""Safetensors folder to Decoder. Knows Hugging Face's tensor names; does not import transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.config import ConfigError
from kernels import ops
from services.executor.model import Decoder, LayerNorms, LayerWeights
from services.executor.model_config import ModelConfig, UnsupportedModelError, read_model_config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

STORED_DTYPES = (*DTYPES.values(), torch.float64)


def choose_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's type where the device is fast in it, else float32; on a CPU half precision is bfloat16.

    Raises ConfigError for an unknown name.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"HEDDLE_EXECUTOR_DTYPE must be auto or one of {', '.join(DTYPES)}, not {name}")
        return DTYPES[name]
    wanted = DTYPES.get(config.torch_dtype, torch.float32)
    if device.type != "cpu":
        return wanted
    return torch.bfloat16 if wanted != torch.float32 and ops.has_fast_bfloat16() else torch.float32


def load_decoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The decoder in `folder`, its projections fused.

    Raises UnsupportedModelError for a corrupt, partial or unsupported folder, naming file or tensor.
    """
    config = read_model_config(folder)
    weights = _Weights(folder, dtype, device)
    layers = (_load_layer(weights, f"model.layers.{i}.", config) for i in range(config.num_layers))
    embedding = weights.get("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    head = embedding if config.tie_word_embeddings else weights.get("lm_head.weight", config.vocab_size, config.hidden_size)
    final_norm = weights.get("model.norm.weight", config.hidden_size)
    decoder = Decoder(config, embedding, layers, final_norm, head)
    weights.check_all_used("model.layers.")
    return decoder


def _load_layer(weights: _Weights, prefix: str, config: ModelConfig) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, k, v = config.qkv_sizes
    attention = prefix + "self_attn."
    parts = (("q", q), ("k", k), ("v", v))
    biases = [weights.get(f"{attention}{name}_proj.bias", size) for name, size in parts] if config.qkv_bias else None
    return LayerWeights(
        norms=LayerNorms(
            input_norm_H=weights.get(prefix + "input_layernorm.weight", hidden),
            q_norm_D=weights.get(attention + "q_norm.weight", config.head_dim) if config.qk_norm else None,
            k_norm_D=weights.get(attention + "k_norm.weight", config.head_dim) if config.qk_norm else None,
            post_norm_H=weights.get(prefix + "post_attention_layernorm.weight", hidden),
        ),
        qkv_OH=torch.cat([weights.get(f"{attention}{name}_proj.weight", size, hidden) for name, size in parts]),
        qkv_bias_O=None if biases is None else torch.cat(biases),
        o_HO=weights.get(attention + "o_proj.weight", hidden, q),
        o_bias_H=weights.get(attention + "o_proj.bias", hidden) if config.o_bias else None,
        gate_up_2FH=torch.cat([weights.get(f"{prefix}mlp.{name}_proj.weight", inner, hidden) for name in ("gate", "up")]),
        down_HF=weights.get(prefix + "mlp.down_proj.weight", hidden, inner),
    )


class _Weights:
    """Tensors by name from one or several safetensors files."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._used: set[str] = set()
        for path in _weight_files(folder):
            try:
                file: Any = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise UnsupportedModelError(f"{path} is not a readable safetensors file: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def check_all_used(self, prefix: str) -> None:
        """Raises UnsupportedModelError for a tensor below `prefix` that the configuration has no place for."""
        unused = [name for name in self._files if name.startswith(prefix) and name not in self._used]
        if names := sorted(name for name in unused if not name.endswith("rotary_emb.inv_freq")):
            raise UnsupportedModelError(f"{self._folder}: tensor {names[0]} is not part of what config.json describes")

    def get(self, name: str, *shape: int) -> Tensor:
        self._used.add(name)
        if name not in self._files:
            raise UnsupportedModelError(f"{self._folder}: tensor {name} is missing")
        tensor: Tensor = self._files[name].get_tensor(name)
        if tensor.shape != shape:
            raise UnsupportedModelError(f"{self._folder}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype not in STORED_DTYPES:  # quantized weights are nothing without their scales
            stored = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedModelError(f"{self._folder}: tensor {name} is stored as {stored}, which is not supported")
        return tensor.to(self._device, self._dtype, copy=True)  # one that lies in the mapped file keeps all of it in memory


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UnsupportedModelError(f"{index} is not a readable index of weights: {error!r}") from error
        return [folder / name for name in sorted(names)]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise UnsupportedModelError(f"{folder} has no model.safetensors; convert the model with `heddle convert`")
