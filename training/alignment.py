"""Decoder alignment on kept states: trains output projectors alone, with the LLM read once for every caption.

While the LLM, its adapter and the signal rows stand still, the states at a run are fixed numbers. They are computed
once, in the contexts in which runs are emitted, kept beside the targets, and the projector is trained on them for as
many passes as it needs: no LLM, no generator and no picture is in memory then. Source: caption-only alignment,
MM-LLMs survey (arXiv:2401.13601) eq. 4; NExT-GPT (arXiv:2309.05519) section 4.2.

Shapes: M runs, S signal tokens, D LLM width.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from anygen.config import Config
from anygen.generators.stable_diffusion import EMBEDS, StableDiffusionGenerator
from anygen.losses import AlignmentConfig
from anygen.messages import MediaPart
from anygen.model import AnyGenModel, positions
from anygen.model_config import PartConfig
from anygen.prompts import pad
from anygen.training.captions import Drawing, canonical, varied
from anygen.training.icons import TRAINED_STYLES
from anygen.training.instruction import attention_metric
from anygen.training.loop import Progress, RunLog, bf16_on_gpu
from anygen.training.pictures import load_icons
from anygen.training.requests import Conversation, Conversations
from anygen.training.wishes import ImageWishes


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentRecipe(Config):
    """Everything that decides the result."""

    icons: str
    """Directory of the built icon set, for its names."""
    model: str
    """Directory of the model whose output projector is trained."""
    generator: str
    """Directory of the trained image generator, whose text encoder gives the targets."""
    llm: str = "smollm2-135m-instruct"
    checksum: str | None = None
    """The icon set's checksum; None accepts any."""
    low_rank: int | None = None
    """Replaces the projector by a `LowRankProjector` of this rank, fitted in closed form; None trains what is there."""
    ridge: float = 3e-3
    """Penalty of the closed form, see `fit_low_rank`."""
    contexts: int = 60_000
    """Conversations that are read: every name in every style first, then free ones."""
    read_batch: int = 32
    batch_size: int = 256
    steps: int = 20_000
    minutes: float | None = None
    learning_rate: float = 1e-3
    ema: float = 0.998
    seed: int = 0


def contexts(conversations: Conversations, count: int, seed: int) -> list[Conversation]:
    """Conversations of words that end with pictures: each concept in each style and in none, then random ones."""
    rng = random.Random(seed)
    wishes = conversations.wishes["image"]
    assert isinstance(wishes, ImageWishes)
    plain = [
        Drawing(label=concept.label, style=style) for concept in wishes.concepts for style in (None, *TRAINED_STYLES)
    ]
    rng.shuffle(plain)
    made = []
    for drawing in plain[:count]:
        words = canonical(drawing) if rng.random() < 0.5 else varied(drawing, rng)
        made.append(conversations.ask_for("image", drawing, words, rng))
    while len(made) < count:
        made.append(conversations.free_request(rng))
    return made


@torch.inference_mode()
def read_states(model: AnyGenModel, items: Sequence[Conversation], batch_size: int) -> tuple[Tensor, list[str]]:
    """The states at every run of the conversations: float16[M, S, D] and the M captions, in the items' order.

    What all conversations begin with (the template's system turn) is read once. Conversations are read in the order
    of their length, so that little is padding.
    """
    examples = [model.prompts.example(item.messages).ids for item in items]
    shared = next(
        (n for n, column in enumerate(zip(*examples, strict=False)) if len(set(column)) > 1),
        min(len(ids) for ids in examples) - 1,
    )
    device = model.device
    start = torch.tensor([examples[0][:shared]], device=device)
    states: list[Tensor | None] = [None] * len(items)
    order = sorted(range(len(items)), key=lambda number: len(examples[number]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        ids, mask = (part.to(device) for part in pad([examples[row][shared:] for row in rows], 0))
        seen = torch.cat([mask.new_ones(len(rows), shared), mask], 1)
        _, cache = model.llm.hidden_states(model.embed(start.expand(len(rows), -1)), use_cache=True)
        hidden, _ = model.llm.hidden_states(
            model.embed(ids), attention_mask=seen, position_ids=positions(seen)[:, shared:], cache=cache
        )
        starts = model.signal_tokens.run_starts(ids, "image")
        columns = starts[:, 1:] + torch.arange(len(model.signal_tokens.runs["image"]), device=device)
        picked = hidden[starts[:, :1], columns].to(torch.float16).cpu()
        for line, row in enumerate(rows):
            states[row] = picked[starts[:, 0].cpu() == line]
    captions = [
        str(part.media)
        for item in items
        for message in item.messages
        if message.role == "assistant"
        for part in message.parts
        if isinstance(part, MediaPart)
    ]
    return torch.cat([part for part in states if part is not None]), captions


@torch.no_grad()
def fit_low_rank(
    states: Tensor, targets: Tensor, *, rank: int, ridge: float, metric: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced-rank ridge regression of conditions on states: the best low-rank linear projector, without gradients.

    Source: Izenman 1975, reduced-rank regression; the ridge solution's predictions are projected on their first
    principal directions, which is optimal for the given rank.

    Args:
        states: float[M, S, D].
        targets: float[M, L, C].
        rank: at most as many directions are kept.
        ridge: of the penalty, in units of the states' mean variance times M.
        metric: float[C, C], invertible; errors are measured through it.

    Returns:
        down float[rank, S * D], up float[L * C, rank], bias float[L * C]: `LowRankProjector`'s weights.
    """
    x, y = states.flatten(1).double(), targets.double()
    if metric is not None:
        y = y @ metric.double()
    y = y.flatten(1)
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    penalty = ridge * gram.diagonal().mean()
    weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), x.T @ y)  # [S * D, L * C]
    # The predictions' principal directions, from the small side: x @ weight and root @ weight have equal Gram matrices.
    root = torch.linalg.cholesky(gram + 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)).mH
    predicted = root @ weight  # [S * D, L * C]
    values, vectors = torch.linalg.eigh(predicted @ predicted.T)
    kept = min(rank, len(values))
    up = predicted.T @ (vectors[:, -kept:] / values[-kept:].clamp(min=1e-12).sqrt())  # orthonormal columns
    down = (weight @ up).T
    bias = y_mean - up @ (down @ x_mean)
    if metric is not None:
        back, width = torch.linalg.inv(metric.double()), metric.shape[0]
        up = torch.einsum("lcr,cd->ldr", up.view(-1, width, up.shape[1]), back).flatten(0, 1)
        bias = (bias.view(-1, width) @ back).flatten()
    return down.float(), up.float(), bias.float()


def with_low_rank(model: AnyGenModel, rank: int) -> AnyGenModel:
    """The same model with an untrained `LowRankProjector` for images."""
    modality = model.settings.modalities["image"]
    assert modality.output is not None
    output = replace(modality.output, projector=PartConfig(name="low_rank", options={"rank": rank}))
    config = replace(model.settings, modalities=model.settings.modalities | {"image": replace(modality, output=output)})
    other = AnyGenModel(config, model.llm, cast(Any, dict(model.encoders)))
    other.signal_tokens.load_state_dict(model.signal_tokens.state_dict())
    other.input_projectors.load_state_dict(model.input_projectors.state_dict())
    return other.eval()


@torch.no_grad()
def _distance(model: AnyGenModel, states: Tensor, targets: Tensor, metric: Tensor) -> float:
    """Squared error as the generator's cross-attention sees it, as a share of the targets' variance."""
    made = model.project("image", states.to(model.device).float()).tensors[EMBEDS].cpu()
    aim, seen_by = targets.float(), metric.cpu()
    error, spread = ((made - aim) @ seen_by).square().mean(), ((aim - aim.mean(0)) @ seen_by).square().mean()
    return (error / spread).item()


def train(recipe: AlignmentRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/model`, where only the output projector is new."""
    from anygen import hub

    torch.manual_seed(recipe.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log = RunLog(out, "alignment")
    icons = load_icons(recipe.icons, recipe.checksum)
    generator = StableDiffusionGenerator.from_pretrained(recipe.generator, device=device)
    llm_directory = hub.resolve(recipe.llm)
    model = AnyGenModel.from_pretrained(
        recipe.model, dtype=torch.bfloat16, device=device, encoders=False, resolve=lambda _: llm_directory
    )
    items = contexts(Conversations([ImageWishes(icons.concepts)], [], recipe.seed), recipe.contexts, recipe.seed)
    states, captions = read_states(model, items, recipe.read_batch)
    log.write(read=len(states), contexts=len(items))
    held_out = min(1024, len(states) // 8)
    with torch.inference_mode():
        targets = torch.cat(
            [
                generator.encode_text(captions[row : row + 512]).tensors[EMBEDS].to(torch.float16).cpu()
                for row in range(0, len(captions), 512)
            ]
        )
    metric = attention_metric(generator.unet)
    if recipe.low_rank is not None:
        model = with_low_rank(model, recipe.low_rank)
        seen = slice(len(states) - held_out)
        down, up, bias = fit_low_rank(
            states[seen], targets[seen], rank=recipe.low_rank, ridge=recipe.ridge, metric=metric.cpu()
        )
        model.output_projectors["image"].load_state_dict({"down.weight": down, "up.weight": up, "up.bias": bias})
        loss = _distance(model, states[:1024], targets[:1024], metric)
        unseen = _distance(model, states[-held_out:], targets[-held_out:], metric)
        model.save_pretrained(out / "model", dtype=torch.bfloat16, parts=False)
        log.write(final=True, low_rank=recipe.low_rank, loss=loss, held_out=unseen)
        return {"loss": loss, "held_out": unseen}
    unseen = _distance(model, states[-held_out:], targets[-held_out:], metric)
    log.write(step=0, held_out=unseen)
    kept_states, kept_targets = states[-held_out:], targets[-held_out:]
    states, targets = states[:-held_out].to(device), targets[:-held_out].to(device)
    model.alignment = AlignmentConfig(mse=1.0)
    model.set_metric("image", {EMBEDS: metric})
    projector = model.output_projectors["image"].train()
    optimizer = torch.optim.AdamW(
        projector.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=device.type == "cuda",
    )
    average = torch.optim.swa_utils.AveragedModel(
        projector, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema)
    )
    progress, loss = Progress(recipe.steps, recipe.minutes), torch.zeros(())
    while not progress.done:
        for group in optimizer.param_groups:
            group["lr"] = progress.learning_rate(recipe.learning_rate, warmup=100)
        rows = torch.randint(len(states), (recipe.batch_size,), device=device)
        with bf16_on_gpu(device):
            condition = model.project("image", states[rows].float())
            loss = model.alignment_loss("image", condition, {EMBEDS: targets[rows].float()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(projector)
        progress.step += 1
        if progress.step % 100 == 0 or progress.done:
            log.write(step=progress.step, loss=loss.item())
    projector.load_state_dict(average.module.state_dict())
    unseen = _distance(model, kept_states, kept_targets, metric)
    model.save_pretrained(out / "model", dtype=torch.bfloat16, parts=False)
    log.write(final=True, step=progress.step, loss=loss.item(), held_out=unseen)
    return {"steps": float(progress.step), "loss": loss.item(), "held_out": unseen}
