"""The card of a drafter: what it is for, what it was trained on, how good it is. Knows words and numbers only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from services.cli.distill_evaluate import NUM_TOP, Acceptance

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

Of {num_rows:,} positions of greedy answers to prompts that were held out, the target's next token was among the drafter's first
{tops}, given that the path to it was right, at depths {depths}:

{table}
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
    acceptance: Mapping[str, Acceptance]


def card(facts: Facts) -> str:
    """The card in Markdown."""
    depths = max((len(each.shares[NUM_TOP[0]]) for each in facts.acceptance.values()), default=0)
    header = "| workload | " + " | ".join(f"top-{n}" for n in NUM_TOP) + " | tokens per verified chain |"
    rows = [
        f"| {kind} | " + " | ".join(_shares(each.shares[n]) for n in NUM_TOP) + f" | {each.chain_tokens:.2f} |"
        for kind, each in facts.acceptance.items()
    ]
    return TEMPLATE.format(
        **{field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
        | {"layers": ", ".join(map(str, facts.layers))},
        num_rows=sum(each.num_rows for each in facts.acceptance.values()),
        tops=" or ".join(map(str, NUM_TOP)),
        depths=f"1 to {depths}",
        table="\n".join([header, "|---" * (len(NUM_TOP) + 2) + "|", *rows]),
    )


def _shares(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.2f}" for share in shares)
