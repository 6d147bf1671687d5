"""The card of a drafter: what it is for, what it was trained on, how good it is. Knows words only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

TEMPLATE = """\
---
library_name: heddle
tags: [speculative-decoding, eagle]
license: apache-2.0
base_model: {model}
---
# A drafter for {model}

One decoder layer on the target's hidden states (after layers {layers}) and token embeddings, after EAGLE. It guesses how
{model} goes on, so that Heddle can verify several tokens in one pass; it never changes what the model says.
{num_parameters:,} trained parameters, {vocabulary:,} of the model's tokens. Other models have no use for it (fingerprint
`{fingerprint}`).

    heddle up --model {model} --draft ngram,features:FOLDER

## Data

{data}

## Training

{training}

## Acceptance

{acceptance}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card says."""

    model: str
    layers: Sequence[int]
    num_parameters: int
    vocabulary: int
    fingerprint: str
    data: str
    training: str
    acceptance: str


def card(facts: Facts) -> str:
    """The card in Markdown."""
    fields = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    return TEMPLATE.format(**fields | {"layers": ", ".join(map(str, facts.layers))})
