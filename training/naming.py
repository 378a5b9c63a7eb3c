"""A start for input projectors: features first meet the LLM's own embeddings of the name of what is seen or heard.

Through the LLM a projector learns a name from the loss of its few tokens, one medium at a time. Met directly, without
the LLM, thousands of media a second do; what is left for the LM loss is to tell alike names apart, and all that is no
name. Source: initialising the embedding of something shown from its name's, as textual inversion does
(arXiv:2208.01618), here for a projector and all names at once.

Shapes: K names, N prompt tokens, D LLM width, P media, C feature width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anygen.features import Features
from anygen.llm import LLM
from anygen.projectors.base import InputProjector


@torch.no_grad()
def name_embeddings(llm: LLM, names: Sequence[str], tokens: int) -> Tensor:
    """float32[K, N, D]: the LLM's embeddings of the first N tokens of each name, filled up with those of line ends."""
    embedding: Any = llm.embedding
    ids = llm.tokenizer([f" {name}" for name in names], add_special_tokens=False)["input_ids"]
    (end,) = llm.tokenizer("\n", add_special_tokens=False)["input_ids"][:1]
    rows = [[*row[:tokens], *[end] * (tokens - len(row))] for row in ids]
    return embedding(torch.tensor(rows, device=embedding.weight.device)).float()


def meet_names(
    projector: InputProjector,
    features: Tensor,
    concepts: Tensor,
    names: Tensor,
    *,
    noise: Tensor,
    steps: int,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    held_out: int = 1024,
) -> dict[str, float]:
    """Trains the projector to make of each medium the embeddings of its name.

    Args:
        projector: makes N tokens of one feature.
        features: float[P, 1, C].
        concepts: long[P], which name each has.
        names: float[K, N, D].
        noise: float[C], the most that features are moved, see `instruction.noisy`.
        steps: of AdamW, with a learning rate that falls to zero.
        batch_size: media a step.
        learning_rate: at the start.
        held_out: media at the pool's end that are measured only; at most an eighth of it.

    Returns:
        On held-out media, `residual`, the squared error as a share of the names' variance, and `nearest`, the share
        whose own name is nearest.
    """
    from anygen.training.instruction import noisy

    device = names.device
    seen = len(features) - min(held_out, len(features) // 8)
    variance = (names - names.mean(0)).square().mean()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))
    for _ in range(steps):
        rows = torch.randint(seen, (batch_size,))
        made = _tokens(projector, noisy(features[rows].to(device), noise))
        loss = (made - names[concepts[rows].to(device)]).square().mean() / variance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return measure_names(projector, features[seen:], concepts[seen:], names)


@torch.no_grad()
def measure_names(projector: InputProjector, features: Tensor, concepts: Tensor, names: Tensor) -> dict[str, float]:
    """`residual` and `nearest` of `meet_names` for these media."""
    concepts, variance = concepts.to(names.device), (names - names.mean(0)).square().mean()
    made = _tokens(projector, features.to(names.device))
    error = (made - names[concepts]).square().mean() / variance
    nearest = torch.cdist(made.flatten(1), names.flatten(1)).argmin(1)
    # Names that begin alike may have the very same embeddings.
    right = (names[nearest] == names[concepts]).flatten(1).all(1)
    return {"residual": error.item(), "nearest": right.float().mean().item()}


def _tokens(projector: InputProjector, features: Tensor) -> Tensor:
    mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    return projector(Features(features, mask)).values
