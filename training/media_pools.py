"""Pictures, clips and sounds composed and encoded once, for an LLM to be asked about.

They are read as the model reads them: a clip in five pieces, a sound in three, averaged. Every second batch is changed
first, so that what the LLM is told does not hang on how the training media were made.

Shapes: B media, P media of a pool, S pieces of a medium, F frames of a piece, C feature width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.encoders.imagebind import ImageBindEncoder
from anygen.encoders.imagebind_clips import (
    CLIP_SECONDS,
    MEL_MEAN,
    MEL_STD,
    SAMPLING_RATE,
    SOUND_CLIPS,
    VIDEO_CLIPS,
    clip_starts,
    filter_banks,
)
from anygen.encoders.imagebind_inputs import normalised
from anygen.errors import ConfigError, ModalityError
from anygen.training.contrastive import augment
from anygen.training.icons import IconSet
from anygen.training.loop import bf16_on_gpu
from anygen.training.motion import FPS, MotionSource
from anygen.training.pictures import PictureSource
from anygen.training.requests import Seen
from anygen.training.sound_captions import DRUM_KIT, Sound, canonical
from anygen.training.sound_mixing import SoundSource
from anygen.training.sounds import SoundBank


@dataclass(frozen=True, slots=True)
class Pool:
    """Encoded media of one modality."""

    features: Tensor
    """float[P, 1, C], on the CPU."""
    shown: list[Seen]
    names: Tensor
    """long[P], the numbers of what is shown or heard."""


@torch.no_grad()
def encode_pictures(source: PictureSource, encoder: ImageBindEncoder, count: int) -> Pool:
    """Composes and encodes `count` pictures; names are the numbers of concepts."""
    features, shown, icons = [], [], list[int]()
    for number, batch in enumerate(source.pictures(count, most=256)):
        pixels = augment(batch.pixels) if number % 2 else batch.pixels
        features.append(_encode(encoder, normalised(pixels)))
        shown += [Seen("image", len(shown) + row, drawing) for row, drawing in enumerate(batch.drawings)]
        icons += list(batch.icons)
    # One copy at the end: a copy of each batch would wait for the device, which composes while the host draws.
    return Pool(torch.cat(features).cpu(), shown, source.icons.concept[icons].long().cpu())


@torch.no_grad()
def encode_clips(source: MotionSource, encoder: ImageBindEncoder, count: int) -> Pool:
    """Composes and encodes `count` clips; names are the numbers of the concepts that move."""
    trunk = encoder.config.vision
    assert trunk is not None
    picked = pieces(source.frames, trunk.frames, trunk.clip_seconds)
    features, shown, concepts = [], [], list[int]()
    for number, batch in enumerate(source.clips(count, most=64)):
        pixels = same_change(batch.pixels) if number % 2 else batch.pixels
        values = normalised(pixels[:, picked]).transpose(2, 3)  # [B, S, F, 3, H, W] -> [B, S, 3, F, H, W]
        features.append(_encode(encoder, values))
        shown += [Seen("video", len(shown) + row, shot) for row, shot in enumerate(batch.shots)]
        concepts += batch.concepts
    return Pool(torch.cat(features).cpu(), shown, torch.tensor(concepts))


@torch.no_grad()
def encode_sounds(source: SoundSource, encoder: ImageBindEncoder, count: int) -> Pool:
    """Composes and encodes `count` sounds; names are places in `sound_names`."""
    trunk = encoder.config.audio
    assert trunk is not None
    numbers = {sound.label: number for number, sound in enumerate(sound_names(source.bank))}
    features, shown, names = [], [], list[int]()
    for number, batch in enumerate(source.clips(count)):
        waves = batch.waveforms
        if number % 2:
            waves = waves + torch.rand(len(waves), 1, device=waves.device) * 0.01 * torch.randn_like(waves)
        planes = windows(waves, trunk.height, trunk.plane_width)
        if number % 2:  # louder or softer, as in the encoder's own training
            planes = planes + 0.15 * torch.randn(len(planes), 1, 1, 1, 1, device=planes.device)
        features.append(_encode(encoder, planes))
        shown += [Seen("audio", len(shown) + row, sound) for row, sound in enumerate(batch.sounds)]
        names += [numbers[sound.label] for sound in batch.sounds]
    return Pool(torch.cat(features).cpu(), shown, torch.tensor(names))


def sound_names(bank: SoundBank) -> list[Sound]:
    """All that a bank can make, as plain sounds: instruments, what is struck, the drum kit, effects."""
    music = [Sound(kind="music", label=row.name) for row in bank.instruments]
    beats = [Sound(kind="beat", label=label) for label in (*(row.name for row in bank.percussion), DRUM_KIT)]
    return music + beats + [Sound(kind="effect", label=row.label) for row in bank.effects]


def names_of(icons: IconSet, bank: SoundBank | None) -> list[str]:
    """Everything that pools may show: the concepts' labels, and behind them, where there is a bank, its sounds."""
    return [concept.label for concept in icons.concepts] + [canonical(s) for s in (sound_names(bank) if bank else ())]


def make_pools(
    sizes: Mapping[str, int],
    encoder: str,
    icons: IconSet,
    bank: SoundBank | None,
    *,
    seed: int,
    device: torch.device,
) -> dict[str, Pool]:
    """Modality -> its pool; names number the rows of `names_of`.

    Args:
        sizes: modality (image, video, audio) -> P.
        encoder: directory of the trained ImageBind.
        icons: what is seen.
        bank: what is heard.
        seed: of the media.
        device: where they are composed and encoded.

    Raises:
        ConfigError: the ImageBind lacks a modality's trunk, or there is no sound bank for sounds.
    """
    if "audio" in sizes and bank is None:
        raise ConfigError("pools: sounds are to be heard, so the recipe must name the sound bank: sounds: data/sounds")
    encoders = {}
    for modality in sizes:  # before any of them is filled, which takes a minute
        try:
            encoders[modality] = ImageBindEncoder.from_pretrained(encoder, modality=modality).to(device)
        except ModalityError as error:
            raise ConfigError(f"pools: the encoder {encoder} cannot read {modality}: {error}") from None

    def sounds(count: int) -> Pool:
        assert bank is not None
        pool = encode_sounds(SoundSource(bank, seed=seed + 2, device=device), encoders["audio"], count)
        return Pool(pool.features, pool.shown, pool.names + len(icons.concepts))

    fill: dict[str, Callable[[int], Pool]] = {
        "image": lambda n: encode_pictures(PictureSource(icons, seed=seed, device=device), encoders["image"], n),
        "video": lambda n: encode_clips(MotionSource(icons, seed=seed + 1, device=device), encoders["video"], n),
        "audio": sounds,
    }
    return {modality: fill[modality](count) for modality, count in sizes.items()}


@torch.no_grad()
def text_features(directory: str, texts: Sequence[str], device: torch.device) -> Tensor:
    """float32[K, C], what the trained ImageBind makes of texts."""
    encoder = ImageBindEncoder.from_pretrained(directory, modality="text").float().to(device)
    batches = (encoder.preprocess(texts[row : row + 256])["inputs"].to(device) for row in range(0, len(texts), 256))
    return torch.cat([encoder(inputs=batch).values[:, 0] for batch in batches])


def pieces(frames: int, count: int, seconds: float) -> list[list[int]]:
    """Which frames of a clip at `FPS` the encoder reads, in each of its pieces: S lists of F."""
    picked = []
    for start in clip_starts(frames / FPS, VIDEO_CLIPS, seconds):
        last = min(math.ceil((start + seconds) * FPS - 1e-6), frames) - 1
        first = min(math.ceil(start * FPS - 1e-6), last)
        picked.append(torch.linspace(first, last, count).long().tolist())
    return picked


def windows(waves: Tensor, bins: int, steps: int) -> Tensor:
    """float[B, N] at 16 kHz -> float[B, S, 1, bins, steps], as `imagebind_clips.sound_values` makes them one by one."""
    length = min(CLIP_SECONDS * SAMPLING_RATE, waves.shape[1])
    starts = [int(start * SAMPLING_RATE) for start in clip_starts(waves.shape[1] / SAMPLING_RATE, SOUND_CLIPS)]
    cut = torch.stack([waves[:, start : start + length] for start in starts], 1)  # [B, S, n]
    energies = filter_banks(cut - cut.mean(-1, keepdim=True), bins)[:, :, :steps].transpose(2, 3)
    filled = F.pad(energies, (0, steps - energies.shape[-1]))
    return ((filled - MEL_MEAN) / MEL_STD)[:, :, None]


def same_change(clips: Tensor) -> Tensor:
    """float[B, F, 3, H, W] in [0, 1], all frames of a clip augmented alike."""
    generator, change = torch.Generator(clips.device), int(torch.randint(2**31, (1,)))
    return torch.stack([augment(frame, generator.manual_seed(change)) for frame in clips.unbind(1)], 1)


def _encode(encoder: ImageBindEncoder, values: Tensor) -> Tensor:
    with bf16_on_gpu(values.device):
        return encoder(inputs=values).values.float()
