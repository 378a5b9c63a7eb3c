"""A start for input projectors: features first meet the LLM's own embeddings of the name of what is seen or heard.

Through the LLM a projector learns a name from the loss of its few tokens, one medium at a time. Met directly, without
the LLM, thousands of media a second do; what is left for the LM loss is to tell alike names apart, and all that is no
name. Source: initialising the embedding of something shown from its name's, as textual inversion does
(arXiv:2208.01618), here for a projector and all names at once.

Shapes: K names, N prompt tokens, D LLM width, P media, C feature width.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anygen.features import Features
from anygen.llm import LLM
from anygen.projectors.input import FeatureShift, MemoryProjector
from anygen.training.media_pools import Pool

Project = Callable[[str, Features], Features]
"""(modality, features float[B, 1, C]) -> N tokens of each."""


@torch.no_grad()
def name_embeddings(llm: LLM, names: Sequence[str], tokens: int) -> Tensor:
    """float32[K, N, D]: the LLM's embeddings of the first N tokens of each name, filled up with those of line ends.

    An article before a name is left out.
    """
    embedding: Any = llm.embedding
    bare = [re.sub("^(an?|the) ", "", name) for name in names]
    ids = llm.tokenizer([f" {name}" for name in bare], add_special_tokens=False)["input_ids"]
    (end,) = llm.tokenizer("\n", add_special_tokens=False)["input_ids"][:1]
    rows = [[*row[:tokens], *[end] * (tokens - len(row))] for row in ids]
    return embedding(torch.tensor(rows, device=embedding.weight.device)).float()


@torch.no_grad()
def remember(
    projector: MemoryProjector,
    shifts: Mapping[str, FeatureShift],
    pools: Mapping[str, Pool],
    keys: Tensor,
    told: Tensor,
) -> None:
    """Fills a projector's memory, and brings the modalities that share it to where its own lies.

    Args:
        projector: of the one modality of `pools` that has no shift.
        shifts: of the modalities that share it.
        pools: modality -> its media.
        keys: float[K, C], unit features of the names.
        told: float[K, N, D], their embeddings.
    """
    features = {modality: pool.features[:, 0].to(keys) for modality, pool in pools.items()}
    gaps = {m: (features[m] - keys[pools[m].names.to(keys.device)]).mean(0) for m in pools}
    (owner,) = set(pools) - set(shifts)
    for modality, shift in shifts.items():
        shift.bridge(gaps[modality], gaps[owner])
    brought = [features[m] + gaps[owner] - gaps[m] for m in pools]
    projector.remember(keys, torch.cat(brought), told)


def meet_names(
    project: Project,
    parameters: Iterable[nn.Parameter],
    pools: Mapping[str, Pool],
    told: Tensor,
    *,
    noise: Mapping[str, Tensor],
    steps: int,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    held_out: int = 1024,
) -> dict[str, dict[str, float]]:
    """Trains projectors to make of each medium the embeddings of its name.

    Args:
        project: makes N tokens of one feature.
        parameters: of the projectors.
        pools: modality -> its media.
        told: float[K, N, D], the names' embeddings.
        noise: modality -> float[C], the most that features are moved, see `noisy`.
        steps: of AdamW, with a learning rate that falls to zero.
        batch_size: media of each modality a step.
        learning_rate: at the start.
        held_out: media at each pool's end that are measured only; at most an eighth of it.

    Returns:
        For each modality, on held-out media, `residual`, the squared error as a share of the names' variance, and
        `nearest`, the share whose own name is nearest of all.
    """
    device, variance = told.device, (told - told.mean(0)).square().mean()
    # All of it on the device: a step that fetched its media would wait for the host.
    media = {m: (pool.features.to(device), pool.names.to(device), noise[m].to(device)) for m, pool in pools.items()}
    seen = {m: len(pool.features) - min(held_out, len(pool.features) // 8) for m, pool in pools.items()}
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))
    for _ in range(steps):
        losses = []
        for modality, (features, names, most) in media.items():
            rows = torch.randint(seen[modality], (batch_size,), device=device)
            made = _tokens(project, modality, noisy(features[rows], most))
            losses.append((made - told[names[rows]]).square().mean() / variance)
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        schedule.step()
    return {
        m: measure_names(project, m, features[seen[m] :], names[seen[m] :], told)
        for m, (features, names, _) in media.items()
    }


def noisy(features: Tensor, most: Tensor) -> Tensor:
    """float[M, T, C] with Gaussian noise; a medium's level is uniform in [0, most], `most` float[C]."""
    level = torch.rand(len(features), 1, 1, device=features.device)
    return features + level * most * torch.randn_like(features)


@torch.no_grad()
def measure_names(project: Project, modality: str, features: Tensor, names: Tensor, told: Tensor) -> dict[str, float]:
    """`residual` and `nearest` of `meet_names` for these media: features float[P, 1, C], names long[P]."""
    variance = (told - told.mean(0)).square().mean()
    made = _tokens(project, modality, features)
    error = (made - told[names]).square().mean() / variance
    nearest = torch.cdist(made.flatten(1), told.flatten(1)).argmin(1)
    # Names that begin alike may have the very same embeddings.
    right = (told[nearest] == told[names]).flatten(1).all(1)
    return {"residual": error.item(), "nearest": right.float().mean().item()}


def _tokens(project: Project, modality: str, features: Tensor) -> Tensor:
    mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    return project(modality, Features(features, mask)).values
