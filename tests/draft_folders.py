"""Folders that drafters with weights are loaded from, made for the tiny model of tests/tiny.py. Knows no planner."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from common.fingerprint import fingerprint
from kernels.drafting.files import write_drafter
from kernels.drafting.head import DraftHead, HeadShape, Span
from tests.tiny import PROMPTS, SHAPE, tiny_pair, truth

LAYERS = (1, 2)
STEPS = 3


def model_folder(folder: Path) -> Path:
    """The tiny model itself, whose fingerprint drafters are found by."""
    tiny_pair()[0].save_pretrained(folder)
    return folder


def near_model_folder(folder: Path, noise: float = 0.005, **changes: Any) -> Path:
    """A draft model of the same vocabulary: the tiny model with noise on its weights, often right and often not."""
    model = copy.deepcopy(tiny_pair()[0]) if not changes else tiny_pair(**changes)[0]
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def states(tokens: Sequence[int]) -> torch.Tensor:
    """Rows [T, F] of the tiny model after LAYERS, the last layer's before the final norm."""
    model, _ = tiny_pair()
    kept: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][0]))
    with torch.no_grad():
        hidden = model(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states
    hook.remove()
    return torch.cat([hidden[layer][0] for layer in LAYERS[:-1]] + kept, dim=1)


def features_folder(folder: Path, model_dir: Path, num_steps: int = 60) -> Path:
    """A head that has learnt what the tiny model says to PROMPTS by heart, so that it is often right."""
    vocabulary = range(SHAPE["vocab_size"])
    shape = HeadShape(
        hidden_size=SHAPE["hidden_size"], intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=16, feature_layers=LAYERS,
        window=16, rope_theta=1000.0, rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    head = DraftHead(shape, torch.randn(len(vocabulary) + 1, shape.hidden_size))
    texts = [(*PROMPTS[name], *out) for name, out in truth().items()]
    spans, following, start = [], [], 0
    for text, name in zip(texts, truth(), strict=True):
        padded = torch.tensor([*text, *[0] * STEPS])
        num_rows = len(text) - 1
        following.append(torch.stack([padded[i + 1 : i + 2 + STEPS] for i in range(num_rows)]))
        spans.append(Span(start, start + num_rows, torch.arange(len(PROMPTS[name]) - 1, num_rows - STEPS)))
        start += num_rows
    features_TF, following_TS = torch.cat([states(text)[:-1] for text in texts]), torch.cat(following)
    wanted_RS = torch.cat([following_TS[span.start + span.rows_R] for span in spans])
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(num_steps):
        outs = head.unroll(features_TF, following_TS, spans, STEPS)
        loss = torch.stack([F.cross_entropy(head.logits(out), wanted_RS[:, i + 1]) for i, out in enumerate(outs)]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    write_drafter(folder, head, vocabulary, fingerprint=fingerprint(model_dir), max_depth=STEPS)
    return folder
