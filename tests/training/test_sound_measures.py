"""What is read from sounds, on tones of known pace and direction and on true sounds of the bank."""

import math
from collections.abc import Sequence

import pytest
import torch

from anygen.generators.mel import levelled
from anygen.training.sound_captions import Sound
from anygen.training.sound_measures import (
    NearestSound,
    attacks,
    clipped,
    directions,
    intervals,
    statistics,
    tempo_of,
)
from anygen.training.sound_mixing import SAMPLES, SoundSource
from anygen.training.sound_packages import RATE
from anygen.training.sounds import SoundBank


def notes(keys: Sequence[int], step: float, *, tones: int = 4) -> torch.Tensor:
    """Struck notes with overtones, one every `step` seconds, as float[SAMPLES]."""
    out = torch.zeros(SAMPLES + 2 * RATE)
    for number, key in enumerate(keys[: int(SAMPLES / RATE / step) + 1]):
        time = torch.arange(round(step * RATE)) / RATE
        hertz = 440 * 2 ** ((key - 69) / 12)
        wave = sum((2 * math.pi * hertz * tone * time).sin() / tone for tone in range(1, tones + 1))
        start = round(step * number * RATE)
        out[start : start + len(time)] += torch.as_tensor(wave) * torch.exp(-time * 5)
    return levelled(out[None, :SAMPLES], RATE)[0]


@pytest.mark.parametrize("step", [0.13, 0.3, 0.55])
def test_the_time_from_note_to_note_is_read(step: float) -> None:
    (found,) = intervals(notes([60] * 20, step)[None])
    assert found == pytest.approx(step, abs=0.011)


def test_silence_and_a_steady_tone_have_no_pace() -> None:
    steady = torch.sin(torch.arange(SAMPLES) / 9)
    assert intervals(torch.stack([steady, torch.zeros(SAMPLES)])) == [None, None]


def test_attacks_are_where_notes_begin() -> None:
    strength = attacks(notes([60, 64, 67, 64], 0.5)[None])[0]
    for start in (100, 200, 300):
        assert strength[start - 6 : start + 7].max() > 5 * strength[start - 40 : start - 20].max()


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (0.13, ("fast", "fast")),
        (0.18, ("fast", None)),
        (0.3, (None, "slow")),
        (0.5, ("slow", "slow")),
        (None, (None, None)),
    ],
)
def test_tempo_words_have_other_bounds_for_a_drum_kit(interval: float | None, words: tuple[str, str]) -> None:
    assert (tempo_of(interval), tempo_of(interval, drum_kit=True)) == words


@pytest.mark.parametrize("step", [0.14, 0.3])
def test_rising_falling_and_repeated_notes_are_told_apart(step: float) -> None:
    scale = [48, 50, 52, 53, 55, 57, 59, 60, 62]
    clips = torch.stack([notes(scale, step), notes(scale[::-1], step), notes([55] * 20, step)])
    assert directions(clips) == ["rising", "falling", "repeated"]


def test_a_melody_has_no_direction() -> None:
    assert directions(notes([60, 64, 62, 67, 65, 60, 64, 60, 62, 59], 0.25)[None]) == [None]


def test_silence_has_no_statistics_that_are_not_numbers() -> None:
    assert statistics(torch.zeros(2, SAMPLES)).isfinite().all()


def test_sounds_are_cut_or_filled_to_one_length() -> None:
    assert clipped(torch.ones(10), 4).tolist() == [1.0] * 4 and clipped(torch.ones(2), 4).tolist() == [1.0, 1.0, 0, 0]


def test_true_sounds_are_nearest_to_their_own(bank: SoundBank) -> None:
    nearest, source = NearestSound(bank, takes=6), SoundSource(bank, seed=3)
    sounds = [Sound(kind="music", label=row.name, phrase="repeated") for row in bank.instruments]
    sounds += [Sound(kind="effect", label=effect.label) for effect in bank.effects]
    found = nearest.find(source.make(sounds).waveforms)
    assert found[0] == "flute" and found[4:] == ["a dog barking", "rain falling"]
    assert (
        found[3] == "violin" and nearest.kind("violin") == "strings" and nearest.kind("rain falling") == "rain falling"
    )
    again = NearestSound(bank, takes=6)
    assert torch.equal(again.takes, nearest.takes)
