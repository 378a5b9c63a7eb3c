"""Trains the trunks of the embedded default's ImageBind into one space: images and text, clips and sounds if wished.

Source: ImageBind (arXiv:2305.05665): InfoNCE with the image as the hub. Every batch shows each of its concepts in two
drawing styles, and all pictures and names of one concept are positives (UniCL, arXiv:2204.03610), so that a style never
seen is still named; whole captions are matched one to one, so that style, place, count and background are kept too.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anygen.component import load_strict, read_safetensors
from anygen.config import Config
from anygen.encoders.imagebind import ImageBindModel
from anygen.encoders.imagebind_config import ImageBindConfig
from anygen.encoders.imagebind_inputs import load_tokenizer, normalised, token_ids
from anygen.training.captions import canonical, caption_corpus, said, varied, with_article
from anygen.training.contrastive_pools import ClipMatches, Matched, SoundMatches, clip_corpus
from anygen.training.icons import Concept, IconSet
from anygen.training.loop import AveragedWeights, Progress, RunLog, bf16_on_gpu, lowering, start
from anygen.training.losses import contrastive_loss
from anygen.training.pictures import PictureSource, load_icons
from anygen.training.sound_captions import caption_corpus as sound_corpus
from anygen.training.sounds import load_sounds
from anygen.training.tokenizer import train_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveRecipe(Config):
    """Everything that decides the result."""

    icons: str
    """Directory of the built icon set."""
    checksum: str | None = None
    """The icon set's checksum; None accepts any."""
    start: str | None = None
    """Directory of an ImageBind that such a recipe trained, to go on from with its tokenizer; trunks that it lacks are
    new."""
    start_rate: float = 1.0
    """Of the trunks that come from `start`, as a share of the learning rate: where new trunks join, those that know
    their work are to keep it. ImageBind itself freezes them (section 3.2)."""
    vocab_size: int = 4096
    variants: int = 8
    """Pictures composed of each icon."""
    concepts_per_batch: int = 512
    """Each is shown twice, where possible in two styles."""
    clips: int = 0
    """Clips in the pool; 0 leaves video out, which then is read as its trunk reads pictures."""
    clips_per_batch: int = 256
    sounds: str | None = None
    """Directory of the built sound bank; None leaves audio out."""
    sound_pool: int = 40_000
    sounds_per_batch: int = 512
    measured: int = 512
    """Held-out clips, and sounds, that are named at the end."""
    steps: int = 6000
    minutes: float | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    caption_weight: float = 0.5
    """Of the one-to-one match of whole captions."""
    style_weight: float = 0.5
    """Of the match between two styles of one concept."""
    drop_path: float = 0.1
    """Of the vision trunk."""
    drop_patches: float = 0.5
    """Share of a picture's patches that a step leaves out: twice as fast, and a name must not hang on one detail."""
    whole_from: float = 1.0
    """The share of the run after which pictures are read whole, as they will be (FLIP, arXiv:2212.00794, section 3)."""
    ema: float = 0.998
    compile: bool = False
    seed: int = 0


class ConceptBatches:
    """Batches that show each drawn concept twice, with its name and a whole caption.

    Pictures are composed and captions tokenised once, several of each icon, and kept on the training device: drawing a
    batch is then a few gathers, and the trunks never wait for the host.
    """

    def __init__(self, recipe: ContrastiveRecipe, source: PictureSource, tokenizer: Any, context: int) -> None:
        icons, self.device = source.icons, source.device
        rng = random.Random(recipe.seed + 2)
        self.size = min(recipe.concepts_per_batch, len(icons.concepts))
        self.variants = recipe.variants
        pixels: list[Tensor] = []
        captions: list[str] = []
        for first in range(0, len(icons.pixels), 128):
            shown = range(first, min(first + 128, len(icons.pixels)))
            batch = source.make([icon for icon in shown for _ in range(self.variants)])
            pixels.append((batch.pixels * 255).round().to(torch.uint8))
            for icon, drawing in zip(batch.icons, batch.drawings, strict=True):
                concept = icons.concepts[int(icons.concept[icon])]
                for _ in range(2):
                    stated = said(drawing, concept, rng, open_style=0.05)
                    captions.append(canonical(stated) if rng.random() < 0.7 else varied(stated, rng))
        self.pixels = torch.cat(pixels)  # uint8[N * V, 3, S, S], an icon's V pictures together
        self.captions = token_ids(tokenizer, captions, context).view(len(self.pixels), 2, -1).to(self.device)
        names = [self._names(concept) for concept in icons.concepts]
        self.names = token_ids(tokenizer, [name for four in names for name in four], context)
        self.names = self.names.view(len(names), 4, -1).to(self.device)
        by_concept: dict[int, list[int]] = {}
        for icon, concept in enumerate(icons.concept.tolist()):
            by_concept.setdefault(concept, []).append(icon)
        self.concepts = torch.tensor(sorted(by_concept), device=self.device)
        # int64[K, 2 * widest]: a concept's icons, repeated to fill the row; two neighbours differ wherever they can.
        widest = max(len(listed) for listed in by_concept.values())
        rows = [(by_concept[c] * (2 * widest))[: 2 * widest] for c in self.concepts.tolist()]
        self.icons = torch.tensor(rows, device=self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Endlessly: pixels float[B, 3, S, S] in [0, 1], name and caption ids int64[B, L], concepts int64[B]."""
        while True:
            drawn = torch.randperm(len(self.concepts), device=self.device)[: self.size]
            place = torch.randint(self.icons.shape[1] - 1, (self.size,), device=self.device)
            pairs = torch.stack([self.icons[drawn, place], self.icons[drawn, place + 1]], 1).flatten()
            rows = pairs * self.variants + torch.randint(self.variants, pairs.shape, device=self.device)
            concepts = self.concepts[drawn].repeat_interleave(2)
            spoken = self.names[concepts, torch.randint(4, pairs.shape, device=self.device)]
            written = self.captions[rows, torch.randint(2, pairs.shape, device=self.device)]
            yield self.pixels[rows].float() / 255, spoken, written, concepts

    @staticmethod
    def _names(concept: Concept) -> list[str]:
        """Four ways to name it: with and without article, and by aliases where it has them."""
        others = [with_article(alias) for alias in concept.aliases] or [concept.label]
        return [concept.label, with_article(concept.label), others[0], others[-1]]


def augment(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random colour, focus, slight turn and shift, and noise, each sample its own: float[B, 3, S, S] in [0, 1].

    Nothing is mirrored: arrows, letters and "on the left" would change their meaning. Equal generators give equal
    changes, as the frames of a clip want.
    """
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1, device=device).uniform_(low, high, generator=generator)

    def rarely(share: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, device=device, generator=generator) < share

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    angle, scale = uniform(-0.35, 0.35).flatten(), uniform(0.75, 1.25)
    stretch = uniform(0.85, 1.18).flatten()
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = angle.cos() * stretch, angle.cos() / stretch
    theta[:, 0, 1], theta[:, 1, 0] = -angle.sin() * stretch, angle.sin() / stretch
    theta[:, :, :2] /= scale.view(-1, 1, 1)
    theta[:, :, 2] = torch.empty(count, 2, device=device).uniform_(-0.12, 0.12, generator=generator)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    # Another hand draws the same thing in other proportions: a smooth random warp.
    warp = normal(count, 2, 5, 5) * uniform(0, 0.06)
    warp = F.interpolate(warp, size=pixels.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    moved = F.grid_sample(pixels, grid + warp, padding_mode="border", align_corners=False)
    pixels = torch.where(rarely(0.8), moved, pixels)
    gray = pixels.mean(1, keepdim=True)
    pixels = gray + (pixels - gray) * uniform(0.4, 1.6)  # saturation
    # A turn of the colour circle: rotation about the gray axis (Rodrigues' formula on RGB).
    turn = uniform(-0.5, 0.5) * rarely(0.5)
    cross = (pixels.roll(-1, 1) - pixels.roll(1, 1)) / 3**0.5
    pixels = gray + (pixels - gray) * turn.cos() + cross * turn.sin()
    pixels = torch.where(rarely(0.1), gray.expand_as(pixels), pixels)
    # Another palette: each new channel a random mix of the old ones, each with its own contrast curve.
    mix = torch.eye(3, device=device) + normal(count, 3, 3) * uniform(0, 0.35)[:, 0]
    mix = mix / mix.sum(2, keepdim=True).clamp(min=0.3)  # white stays white
    mixed = torch.einsum("bij,bjhw->bihw", mix, pixels).clamp(1e-3, 1)
    mixed = mixed ** torch.exp(normal(count, 3, 1, 1) * 0.25)
    pixels = torch.where(rarely(0.4), mixed, pixels)
    pixels = torch.where(rarely(0.1), pixels.roll(1, 1), pixels)  # other colours altogether
    levels = uniform(3, 8).round()
    pixels = torch.where(rarely(0.15), (pixels * levels).round() / levels, pixels)  # flat areas
    across = (pixels - pixels.roll(1, 3)).abs() + (pixels - pixels.roll(1, 2)).abs()
    pixels = torch.where(rarely(0.08), 1 - across.mean(1, keepdim=True).expand_as(pixels) * 2, pixels)  # lines alone
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (pixels - mean) * uniform(0.7, 1.3) + mean + uniform(-0.15, 0.15)
    soft = F.avg_pool2d(F.pad(pixels, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    pixels = torch.where(rarely(0.2), soft, pixels)
    return (pixels + normal(*pixels.shape) * uniform(0, 0.04)).clamp(0, 1)


class _Objective(nn.Module):
    """The trunks and all their matches in one module."""

    def __init__(self, model: ImageBindModel, recipe: ContrastiveRecipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(
        self,
        pixels: Tensor,
        names: Tensor,
        captions: Tensor,
        concepts: Tensor,
        clips: Matched | None = None,
        sounds: Matched | None = None,
    ) -> Tensor:
        """Arguments as the batches yield them, pixels augmented and normalised."""
        seen = self.model.embed("vision", pixels)
        loss = self._match("text", seen, Matched(pixels, names, captions, concepts))
        # Rows come in pairs of one concept: the first of each pair against the second.
        scale = self.model.logit_scale("text")
        loss = loss + self.recipe.style_weight * contrastive_loss(seen[0::2], seen[1::2], scale, concepts[0::2])
        if clips is not None:
            loss = loss + self._match("text", self.model.embed("vision", clips.values), clips)
        if sounds is not None:
            loss = loss + self._match("audio", self.model.embed("audio", sounds.values), sounds)
        return loss

    def _match(self, scaled_by: str, made: Tensor, media: Matched) -> Tensor:
        """Media with their names, all of one thing being positives, and one to one with their captions."""
        name, caption = self.model.embed("text", torch.cat([media.names, media.captions])).chunk(2)
        scale = self.model.logit_scale(scaled_by)
        loss = contrastive_loss(made, name, scale, media.things)
        return loss + self.recipe.caption_weight * contrastive_loss(made, caption, scale)


@lowering("concepts_per_batch", "clips_per_batch", "sounds_per_batch")
def train(recipe: ContrastiveRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/imagebind` (config, bf16 weights, tokenizer); returns zero-shot accuracies."""

    accelerator = start(recipe.seed)
    device, log = accelerator.device, RunLog(out, "contrastive")
    icons = load_icons(recipe.icons, recipe.checksum)
    bank = load_sounds(recipe.sounds, None) if recipe.sounds is not None else None
    config = ImageBindConfig.mini(recipe.vocab_size, audio=bank is not None)
    assert config.text is not None and config.vision is not None
    context = config.text.context_length
    config = replace(
        config, vision=replace(config.vision, drop_path=recipe.drop_path, drop_patches=recipe.drop_patches)
    )
    model = ImageBindModel(config)
    taken: set[str] = set()
    if recipe.start is not None:
        tokenizer, taken = go_on_from(Path(recipe.start), model)
        log.write(start=recipe.start, taken=sorted(taken))
    else:
        corpus = caption_corpus(icons.concepts, recipe.seed)
        if recipe.clips:
            corpus += clip_corpus(icons.concepts, recipe.seed)
        if bank is not None:
            corpus += sound_corpus(bank, recipe.seed)
        tokenizer = train_tokenizer(corpus, vocab_size=recipe.vocab_size, context=context).backend_tokenizer
    log.write(parameters=sum(p.numel() for p in model.parameters()))
    objective: Any = _Objective(model, recipe)
    groups = parameter_groups(recipe, model, taken)
    optimizer: Any = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=device.type == "cuda")
    objective, optimizer = accelerator.prepare(objective, optimizer)
    average = AveragedWeights(model, recipe.ema)
    step_fn: Any = torch.compile(objective) if recipe.compile else objective
    words = partial(token_ids, tokenizer, context_length=context)
    batches = iter(ConceptBatches(recipe, PictureSource(icons, seed=recipe.seed, device=device), tokenizer, context))
    clips = ClipMatches(icons, recipe.clips, words, seed=recipe.seed, device=device) if recipe.clips else None
    sounds = SoundMatches(bank, recipe.sound_pool, words, seed=recipe.seed, device=device) if bank is not None else None
    progress = Progress(recipe.steps, recipe.minutes)
    patches: Any = model.modality_preprocessors["vision"]
    while not progress.done:
        if patches.dropped and progress.fraction >= recipe.whole_from:
            patches.dropped = 0
            log.write(step=progress.step, whole=True)
        for group in optimizer.param_groups:
            group["lr"] = progress.learning_rate(recipe.learning_rate * group["rate"], warmup=300)
        pixels, names, captions, concepts = next(batches)
        shown = clips.draw(recipe.clips_per_batch, augment) if clips is not None else None
        heard = sounds.draw(recipe.sounds_per_batch) if sounds is not None else None
        with bf16_on_gpu(device):
            loss = step_fn(normalised(augment(pixels)), names, captions, concepts, shown, heard)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, progress.step)
        progress.step += 1
        if progress.step % 100 == 0 or progress.done:
            log.write(step=progress.step, loss=loss.item(), images=progress.step * len(pixels))
    trained = average.module
    figures = {
        f"naming_{style}": naming_accuracy(
            trained, tokenizer, IconSet.load(Path(recipe.icons), styles=(style,)), device
        )
        for style in ("3D", "cartoon", "emojione")
    }
    if clips is not None:
        figures["naming_motions"] = clips.accuracy(trained, words, recipe.measured)
    if sounds is not None:
        figures["naming_sounds"] = sounds.accuracy(trained, words, recipe.measured)
    trained.to(torch.bfloat16).save_pretrained(out / "imagebind")
    tokenizer.save(str(out / "imagebind" / "tokenizer.json"))
    log.write(final=True, step=progress.step, **figures)
    return figures


def parameter_groups(recipe: ContrastiveRecipe, model: ImageBindModel, taken: set[str]) -> list[dict[str, Any]]:
    """For AdamW: matrices decay, and trunks that are `taken` from a start have another `rate` than new ones."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = recipe.start_rate if name.split(".")[1] in taken else 1.0
        groups.setdefault((rate, recipe.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": group, "rate": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def go_on_from(directory: Path, model: ImageBindModel) -> tuple[Any, set[str]]:
    """Gives a model the trunks of the ImageBind in `directory`.

    Returns:
        Its tokenizer, and the names of the trunks.

    Raises:
        CheckpointError: a trunk that both have is of another shape there; names the keys.
        ConfigError: the tokenizer is missing or has more tokens than the text trunk.
    """
    state, own = read_safetensors(directory), model.state_dict()
    there = {key.split(".")[1] for key in state}
    fresh = {key: value for key, value in own.items() if key.split(".")[1] not in there}
    load_strict(model, state | fresh, str(directory))
    assert model.config.text is not None
    tokenizer = load_tokenizer(directory / "tokenizer.json", model.config.text.vocab_size)
    return tokenizer, there


@torch.no_grad()
def naming_accuracy(model: ImageBindModel, tokenizer: Any, icons: IconSet, device: torch.device) -> float:
    """Share of icons, plain on white, whose nearest label in the joint space is their own."""
    from anygen.training.captions import Drawing
    from anygen.training.compose import compose

    assert model.config.text is not None
    labels = [with_article(concept.label) for concept in icons.concepts]
    ids = token_ids(tokenizer, labels, model.config.text.context_length).to(device)
    names = model.embed("text", ids)
    hits = 0
    for first in range(0, len(icons.pixels), 256):
        pixels = icons.pixels[first : first + 256].to(device)
        white = torch.ones(len(pixels), 3, *pixels.shape[-2:], device=device)
        plain = compose(pixels, [Drawing(label="")] * len(pixels), white)
        seen = model.embed("vision", normalised(plain).to(model.dtype))
        nearest = (seen.float() @ names.float().T).argmax(1)
        hits += int((nearest.cpu() == icons.concept[first : first + 256]).sum())
    return hits / len(icons.pixels)
