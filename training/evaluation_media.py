"""The rows of the suite `mini` about sounds and clips: what is heard and seen, how it is played and how it moves.

Every figure stands beside its ceiling: how often the measure is right on true sounds and clips of the same content.

Shapes: B cases, N samples, F frames, S side in pixels.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from anygen.decoding import Answer
from anygen.generators.audioldm2 import AudioLDM2Generator
from anygen.generators.base import Generator
from anygen.generators.mel import LogMel
from anygen.model import AnyGenModel
from anygen.training import sound_captions
from anygen.training.evaluation_answers import answer, as_medium, asking, batches, by_caption, by_request
from anygen.training.evaluation_media_cases import ClipCase, SoundCase, clip_cases, questions, sound_cases
from anygen.training.evaluation_report import Filmed, Heard, Rows
from anygen.training.icons import Concept, IconSet
from anygen.training.measures import Names
from anygen.training.motion import STILL, MotionSource, canonical_clip
from anygen.training.motion_measures import NearestThing, middle_of, motion_of
from anygen.training.sound_autoencoder import convergence
from anygen.training.sound_captions import DRUM_KIT
from anygen.training.sound_measures import NearestSound, directions, intervals, tempo_of
from anygen.training.sound_mixing import SoundSource
from anygen.training.sounds import SoundBank

MUSIC, EFFECTS, FILMED, RESTORED_SOUNDS = 200, 158, 30, 128
"""Cases of a full run: phrases, effects, clips of each motion, sounds through autoencoder and vocoder."""
BAR, NAMING_BAR = 0.85, 0.80


class SoundNames:
    """Finds the sounds that a text names, as `Names` finds concepts."""

    def __init__(self, bank: SoundBank) -> None:
        self.labels = [row.name for row in (*bank.instruments, *bank.percussion)] + [DRUM_KIT]
        named = [Concept("", label, (), 0) for label in self.labels]
        for effect in bank.effects:
            self.labels.append(effect.label)
            words, *others = (_without_article(name) for name in (effect.label, *effect.aliases))
            named.append(Concept("", words, tuple(others), 0))
        self.names = Names(named)

    def named(self, text: str) -> set[str]:
        """The labels of the sounds that are named."""
        return {self.labels[number] for number in self.names.named(text)}


def _without_article(words: str) -> str:
    return words.removeprefix("a ").removeprefix("an ")


def sound_rows(
    rows: Rows, model: AnyGenModel, generator: Generator, bank: SoundBank, nearest: NearestSound, most: int, batch: int
) -> list[Heard]:
    """Asks for sounds in both ways and measures them; returns those of the requests."""
    cases = sound_cases(bank, min(MUSIC, most), min(EFFECTS, most), rows.seed)
    seeds = [case.seed for case in cases]
    source = SoundSource(bank, seed=rows.seed)
    true = [wave for part in batches(cases, 64) for wave in source.make([case.sound for case in part]).waveforms]
    add_sound_rows(rows, "true sounds", judge_sounds(cases, true, nearest), bar=None)
    straight = by_caption(generator, [sound_captions.canonical(case.sound) for case in cases], seeds, batch)
    add_sound_rows(rows, "τ_X path", judge_sounds(cases, straight, nearest))
    made, answers = by_request(model, generator, [asking(case.request) for case in cases], seeds, batch)
    heard = judge_sounds(cases, made, nearest, answers)
    add_sound_rows(rows, "LLM path", heard)
    if isinstance(generator, AudioLDM2Generator):
        count = min(RESTORED_SOUNDS, most)
        for name, value in restored_sounds(generator, bank, count, rows.seed).items():
            rows.add(f"{name}: spectral convergence (0 is best)", value, count, less_is_better=True)
    return heard


def add_sound_rows(rows: Rows, path: str, heard: Sequence[Heard], *, bar: float | None = BAR) -> None:
    """Instrument family, effect class, pitch direction and tempo, each over the sounds that state it."""
    music = [one for one in heard if one.sound.kind == "music"]
    rows.share(f"text -> audio, {path}: instrument family", [one.hit for one in music], bar=bar)
    effects = [one.hit for one in heard if one.sound.kind == "effect"]
    rows.share(f"text -> audio, {path}: effect class", effects, bar=bar)
    directed = [one.direction == one.sound.phrase for one in music if one.sound.phrase in _DIRECTIONS]
    rows.share(f"text -> audio, {path}: pitch rises, falls or repeats", directed, bar=bar)
    timed = [one.tempo == one.sound.tempo for one in heard if one.sound.tempo]
    rows.share(f"text -> audio, {path}: slow or fast", timed, bar=bar)


_DIRECTIONS = ("rising", "falling", "repeated")


def judge_sounds(
    cases: Sequence[SoundCase],
    waveforms: Sequence[Tensor | None],
    nearest: NearestSound,
    answers: Sequence[Answer] | None = None,
) -> list[Heard]:
    """What each sound is most like and how it is played.

    Args:
        cases: B of them.
        waveforms: float[N] at 16 kHz each, or None, which is a miss.
        nearest: over the bank.
        answers: in which the sounds came, if they were made by request.
    """
    there = [n for n, wave in enumerate(waveforms) if wave is not None]
    like, ways, paces = dict[int, str](), dict[int, str | None](), dict[int, float | None]()
    for part in batches(there, 64):
        stacked = torch.stack([wave.cpu() for n in part if (wave := waveforms[n]) is not None])
        like |= zip(part, nearest.find(stacked), strict=True)
        ways |= zip(part, directions(stacked), strict=True)
        paces |= zip(part, intervals(stacked), strict=True)
    return [
        Heard(
            asked=case.request if answers else sound_captions.canonical(case.sound),
            seed=case.seed,
            waveform=waveforms[n],
            answer=answers[n].text if answers else "",
            sound=case.sound,
            sounds_like=like.get(n, ""),
            direction=ways.get(n),
            tempo=tempo_of(paces.get(n), drum_kit=case.sound.label == DRUM_KIT),
            hit=n in like and nearest.kind(like[n]) == nearest.kind(case.sound.label),
        )
        for n, case in enumerate(cases)
    ]


@torch.no_grad()
def restored_sounds(generator: AudioLDM2Generator, bank: SoundBank, count: int, seed: int) -> dict[str, float]:
    """Spectral convergence (arXiv:1808.06719) of held-out sounds, by the autoencoder alone and with the vocoder."""
    log_mel = LogMel(generator.mel_config).to(generator.device)
    alone, spoken = [], []
    for part in SoundSource(bank, seed=seed, held_out=True).clips(count, most=32):
        mel = log_mel(part.waveforms.to(generator.device))
        latents = generator.vae.encode(mel[:, None].to(generator.vae.dtype)).latent_dist.mode()
        alone.append(convergence(generator.vae.decode(latents).sample[:, 0].float(), mel))
        waveforms = generator.decode(latents * generator.vae.config.scaling_factor)
        again = log_mel(waveforms.clamp(-1, 1))
        length = min(again.shape[1], mel.shape[1])
        spoken.append(convergence(again[:, :length], mel[:, :length]))
    names = ("sound autoencoder", "sound autoencoder and vocoder")
    return {n: torch.cat(values).mean().item() for n, values in zip(names, (alone, spoken), strict=True)}


def clip_rows(
    rows: Rows, model: AnyGenModel, generator: Generator, icons: IconSet, nearest: NearestThing, most: int, batch: int
) -> list[Filmed]:
    """Asks for clips in both ways and measures them; returns those of the requests."""
    cases, ceilings = clip_cases(icons, min(FILMED, most), rows.seed)
    read, tried = (sum(numbers) for numbers in zip(*ceilings.values(), strict=True))
    rows.add("text -> video, true clips: motion, before those that cannot be read were left out", read / tried, tried)
    source = MotionSource(icons, seed=rows.seed)
    true = [source.make([case.icon], [case.shot]).pixels[0] for case in cases]
    add_clip_rows(rows, "true clips", judge_clips(cases, true, nearest), bar=None)
    seeds = [case.seed for case in cases]
    straight = by_caption(generator, [canonical_clip(case.shot) for case in cases], seeds, batch)
    add_clip_rows(rows, "τ_X path", judge_clips(cases, straight, nearest))
    made, answers = by_request(model, generator, [asking(case.request) for case in cases], seeds, batch)
    filmed = judge_clips(cases, made, nearest, answers)
    add_clip_rows(rows, "LLM path", filmed)
    return filmed


def add_clip_rows(rows: Rows, path: str, filmed: Sequence[Filmed], *, bar: float | None = BAR) -> None:
    """The concept, and each motion over the clips that ask for it."""
    rows.share(f"text -> video, {path}: concept in the middle frame", [one.hit for one in filmed], bar=bar)
    for motion in dict.fromkeys(one.wanted for one in filmed):
        moved = [one.motion == motion for one in filmed if one.wanted == motion]
        # the bars are for what changes place, size or angle along one line
        rows.share(f"text -> video, {path}: {motion}", moved, bar=None if motion in ("bouncing", STILL) else bar)


def judge_clips(
    cases: Sequence[ClipCase],
    clips: Sequence[Tensor | None],
    nearest: NearestThing,
    answers: Sequence[Answer] | None = None,
) -> list[Filmed]:
    """Which icon each clip's foreground looks like, and how it moves.

    Args:
        cases: B of them.
        clips: float[F, 3, S, S] in [0, 1] each, or None, which is a miss.
        nearest: over the icons to compare with.
        answers: in which the clips came, if they were made by request.
    """
    judged = []
    for number, (case, clip) in enumerate(zip(cases, clips, strict=True)):
        icon = None if clip is None else nearest.find(middle_of(clip.cpu(), case.shot.motion)[None])[0]
        judged.append(
            Filmed(
                asked=case.request if answers else canonical_clip(case.shot),
                seed=case.seed,
                clip=clip,
                answer=answers[number].text if answers else "",
                wanted=case.shot.motion or "",
                motion=None if clip is None else motion_of(clip),
                looks_like="" if icon is None else nearest.label(icon),
                hit=icon is not None and nearest.shows(icon, case.concept),
            )
        )
    return judged


def naming_rows(
    rows: Rows,
    model: AnyGenModel,
    icons: IconSet,
    bank: SoundBank | None,
    nearest: NearestSound | None,
    most: int,
    batch: int,
) -> None:
    """audio -> text and video -> text: whether the answer names what is held-out media show."""
    if bank is not None and nearest is not None and "audio" in model.encoders:
        cases = sound_cases(bank, min(MUSIC, most), min(EFFECTS, most), rows.seed)
        source, names = SoundSource(bank, seed=rows.seed + 1), SoundNames(bank)
        sounds = [case.sound for case in cases]
        waveforms = [wave for part in batches(sounds, 64) for wave in source.make(list(part)).waveforms]
        said = [names.named(one.text) for one in asked_about(model, "audio", waveforms, rows.seed, batch)]
        kinds = [nearest.kind(s.label) in map(nearest.kind, n) for s, n in zip(sounds, said, strict=True)]
        rows.share("audio -> text: instrument family or effect class is named", kinds, bar=NAMING_BAR)
        exact = [sound.label in named for sound, named in zip(sounds, said, strict=True)]
        rows.share("audio -> text: the instrument or effect itself is named", exact)
    if "video" in model.encoders:
        clips, concepts, motions = list[Tensor](), list[int](), list[str | None]()
        for part in MotionSource(icons, seed=rows.seed, held_out=True).clips(min(FILMED * 8, most), most=16):
            clips += list(part.pixels)
            concepts += part.concepts
            motions += [shot.motion for shot in part.shots]
        said = [one.text for one in asked_about(model, "video", clips, rows.seed, batch)]
        known = Names(icons.concepts)
        hits = [concept in known.named(text) for concept, text in zip(concepts, said, strict=True)]
        rows.share("video -> text: the thing is named", hits, bar=NAMING_BAR)
        moving = [motion is not None and motion in text for motion, text in zip(motions, said, strict=True)]
        rows.share("video -> text: the motion is named too, though not asked for", moving)


def asked_about(model: AnyGenModel, modality: str, media: Sequence[Tensor], seed: int, batch_size: int) -> list[Answer]:
    """Answers to held-out questions about media, put before or behind them."""
    rng, wordings = random.Random(seed), questions(modality)
    conversations = [
        asking(rng.choice(wordings), as_medium(modality, medium), medium_first=rng.random() < 0.5) for medium in media
    ]
    return answer(model, conversations, batch_size)
