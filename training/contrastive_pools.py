"""Clips and sounds for the contrastive training, composed once and kept on the training device with their words.

Shapes: B samples, F frames, S side, M mel bins, K spectrogram steps, L tokens.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anygen.encoders.imagebind_clips import MEL_MEAN, MEL_STD, filter_banks
from anygen.encoders.imagebind_inputs import normalised
from anygen.training.captions import with_article
from anygen.training.icons import TRAINED_STYLES, Concept, IconSet
from anygen.training.motion import MOTIONS, MotionSource, canonical_clip, random_shot, said_of_clip, varied_clip
from anygen.training.sound_captions import Sound, bare, canonical, said, varied
from anygen.training.sound_mixing import SoundSource
from anygen.training.sounds import SoundBank

Words = Callable[[Sequence[str]], Tensor]
"""Texts -> token ids int64[B, L]."""
PAIR = 4
"""Frames between the two of a clip of half a second."""
PLANE = 204
"""Steps of 10 ms that the audio trunk reads."""


class Matched(NamedTuple):
    """Media with the words for them."""

    values: Tensor
    """What the trunk takes."""
    names: Tensor
    """int64[B, L]."""
    captions: Tensor
    """int64[B, L]."""
    things: Tensor
    """int64[B]; media of one thing have one number."""


class ClipMatches:
    """Composed clips, read in pairs of frames.

    Args:
        icons: what moves.
        number: clips of the pool.
        words: the tokenizer.
        seed: of the clips and their captions.
        device: where the pool stays.
    """

    def __init__(self, icons: IconSet, number: int, words: Words, *, seed: int, device: torch.device) -> None:
        rng, self.icons, self.seed = random.Random(seed + 5), icons, seed
        frames, captions, names, things = [], [], [], []
        for batch in MotionSource(icons, seed=seed + 4, device=device).clips(number):
            frames.append((batch.pixels * 255).round().to(torch.uint8))
            for concept, shot in zip(batch.concepts, batch.shots, strict=True):
                stated = said_of_clip(shot, icons.concepts[concept], rng)
                captions += [canonical_clip(stated), varied_clip(stated, rng)]
                # The same thing at rest and moving: a name of its own for each motion keeps them apart.
                names.append(f"{with_article(icons.concepts[concept].label)} {shot.motion}")
                things.append(names[-1])
        self.frames = torch.cat(frames)  # uint8[N, F, 3, S, S]
        self.captions = words(captions).view(len(self.frames), 2, -1).to(device)
        self.names = words(names).to(device)
        numbers = {thing: number for number, thing in enumerate(dict.fromkeys(things))}
        self.things = torch.tensor([numbers[thing] for thing in things], device=device)

    def draw(self, size: int, augment: Callable[[Tensor, torch.Generator], Tensor]) -> Matched:
        """`size` clips as float[B, 1, 3, 2, S, S]: two frames half a second apart, changed alike, normalised."""
        device = self.frames.device
        rows = torch.randint(len(self.frames), (size,), device=device)
        starts = torch.randint(self.frames.shape[1] - PAIR + 1, (size,), device=device)
        generator = torch.Generator(device)
        change = int(torch.randint(2**31, (1,)))
        pair = []
        for frame in (starts, starts + PAIR - 1):
            pixels = self.frames[rows, frame].float() / 255
            pair.append(normalised(augment(pixels, generator.manual_seed(change))))
        captions = self.captions[rows, torch.randint(2, (size,), device=device)]
        return Matched(torch.stack(pair, 2)[:, None], self.names[rows], captions, self.things[rows])

    @torch.no_grad()
    def accuracy(self, model: Any, words: Words, count: int) -> float:
        """Share of held-out clips whose motion is the nearest of ten, given what moves."""
        device = self.frames.device
        source = MotionSource(self.icons, seed=self.seed, device=device, held_out=True)
        hits = total = 0
        for batch in source.clips(count, most=32):
            middle = (self.frames.shape[1] - PAIR) // 2
            starts = (0, middle, self.frames.shape[1] - PAIR)
            pairs = torch.stack([batch.pixels[:, [s, s + PAIR - 1]].transpose(1, 2) for s in starts], 1)
            values = normalised(pairs.transpose(2, 3)).transpose(2, 3).to(model.dtype)  # [B, 3 clips, 3, 2, S, S]
            seen = model.embed("vision", values)
            labels = [with_article(self.icons.concepts[concept].label) for concept in batch.concepts]
            texts = [f"{label} {motion}" for label in labels for motion in MOTIONS]
            named = model.embed("text", words(texts).to(device)).view(len(labels), len(MOTIONS), -1)
            nearest = (named.float() @ seen.float()[:, :, None]).squeeze(2).argmax(1).tolist()
            hits += sum(list(MOTIONS)[n] == shot.motion for n, shot in zip(nearest, batch.shots, strict=True))
            total += len(labels)
        return hits / total


class SoundMatches:
    """Composed sounds as spectrograms, read in windows of two seconds.

    Args: as `ClipMatches`, with a sound bank.
    """

    def __init__(self, bank: SoundBank, number: int, words: Words, *, seed: int, device: torch.device) -> None:
        rng, self.bank, self.seed = random.Random(seed + 7), bank, seed
        planes, captions, names, things = [], [], [], []
        for batch in SoundSource(bank, seed=seed + 6, device=device).clips(number):
            planes.append(spectrogram(batch.waveforms).to(torch.float16))
            for sound in batch.sounds:
                stated = said(sound, bank, rng)
                captions += [canonical(stated), varied(stated, rng)]
                names.append(rng.choice([canonical(bare(sound)), canonical(bare(said(sound, bank, rng, left_open=0)))]))
                things.append(sound.label)
        self.planes = torch.cat(planes)  # float16[N, 1, M, K]
        self.captions = words(captions).view(len(self.planes), 2, -1).to(device)
        self.names = words(names).to(device)
        self.labels = {label: number for number, label in enumerate(dict.fromkeys(things))}
        self.things = torch.tensor([self.labels[thing] for thing in things], device=device)

    def draw(self, size: int) -> Matched:
        """`size` sounds as float[B, 1, M, 204], louder or softer, a band and a stretch of time silenced."""
        device = self.planes.device
        rows = torch.randint(len(self.planes), (size,), device=device)
        start = torch.randint(self.planes.shape[-1] - PLANE + 1, (size, 1), device=device)
        steps = start + torch.arange(PLANE, device=device)
        planes = self.planes[rows].gather(3, steps[:, None, None].expand(-1, 1, self.planes.shape[2], -1)).float()
        planes = planes + 0.15 * torch.randn(size, 1, 1, 1, device=device)
        for axis, most in ((2, 16), (3, 24)):  # SpecAugment (arXiv:1904.08779)
            length = planes.shape[axis]
            first = torch.randint(length, (size, 1), device=device)
            last = first + torch.randint(most, (size, 1), device=device)
            line = torch.arange(length, device=device)
            silent = (line >= first) & (line < last)
            silent = silent[:, None, :, None] if axis == 2 else silent[:, None, None, :]
            planes = planes.masked_fill(silent, 0.0)
        captions = self.captions[rows, torch.randint(2, (size,), device=device)]
        return Matched(planes, self.names[rows], captions, self.things[rows])

    @torch.no_grad()
    def accuracy(self, model: Any, words: Words, count: int) -> float:
        """Share of held-out sounds whose nearest name, of all in the bank, is their own."""
        device = self.planes.device
        sounds = [_bare_of(self.bank, label) for label in self.labels]
        named = model.embed("text", words([canonical(sound) for sound in sounds]).to(device)).float()
        hits = total = 0
        for batch in SoundSource(self.bank, seed=self.seed, device=device, held_out=True).clips(count):
            planes = spectrogram(batch.waveforms)
            starts = (0, (planes.shape[-1] - PLANE) // 2, planes.shape[-1] - PLANE)
            windows = torch.stack([planes[..., s : s + PLANE] for s in starts], 1).to(model.dtype)
            heard = model.embed("audio", windows)
            nearest = (heard.float() @ named.T).argmax(1).tolist()
            labels = list(self.labels)
            hits += sum(labels[n] == sound.label for n, sound in zip(nearest, batch.sounds, strict=True))
            total += len(nearest)
        return hits / total


def spectrogram(waves: Tensor, bins: int = 128) -> Tensor:
    """float[B, N] at 16 kHz -> float[B, 1, M, K], normalised as ImageBind reads sounds."""
    waves = waves - waves.mean(1, keepdim=True)
    return ((filter_banks(waves, bins).transpose(1, 2) - MEL_MEAN) / MEL_STD)[:, None]


def clip_corpus(concepts: Sequence[Concept], seed: int) -> list[str]:
    """Captions of clips, for training the tokenizer."""
    rng = random.Random(seed)
    texts = []
    for concept in concepts:
        for _ in range(4):
            shot = said_of_clip(random_shot(concept, rng.choice(TRAINED_STYLES), rng), concept, rng)
            texts.append(varied_clip(shot, rng))
    return texts


def _bare_of(bank: SoundBank, label: str) -> Sound:
    music = {row.name for row in bank.instruments}
    effects = {row.label for row in bank.effects}
    return Sound(kind="music" if label in music else "effect" if label in effects else "beat", label=label)
