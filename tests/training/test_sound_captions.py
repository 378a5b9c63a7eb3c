"""What clips hold and how it is said."""

import random
from dataclasses import replace

import pytest

from anygen.training.captions import HELD_OUT_EVERY
from anygen.training.sound_captions import (
    DRUM_KIT,
    PHRASES,
    PITCHES,
    TEMPI,
    UNTIMED,
    Sound,
    canonical,
    caption_corpus,
    is_held_out,
    random_sound,
    said,
    varied,
)
from anygen.training.sounds import SoundBank

TRUMPET = Sound(kind="music", label="trumpet", phrase="rising", tempo="fast", pitch="high")


@pytest.mark.parametrize(
    ("sound", "words"),
    [
        (TRUMPET, "a trumpet playing a fast high rising melody"),
        (Sound(kind="music", label="organ", phrase="chord", pitch="low"), "an organ playing a low chord"),
        (Sound(kind="music", label="piano", phrase="arpeggio"), "a piano playing an arpeggio"),
        (Sound(kind="music", label="tubular bells"), "tubular bells"),
        (Sound(kind="beat", label="snare drum", phrase="beat", tempo="slow"), "a snare drum playing a slow beat"),
        (Sound(kind="effect", label="a dog barking"), "a dog barking"),
        (Sound(kind="effect", label="thunder", behind="rain falling"), "thunder and rain falling"),
    ],
)
def test_canonical_captions(sound: Sound, words: str) -> None:
    assert canonical(sound) == words


def test_every_form_states_all_of_the_sound(bank: SoundBank) -> None:
    rng = random.Random(0)
    for _ in range(1500):
        sound = random_sound(bank, rng)
        text = varied(sound, rng)
        assert sound.label in text
        assert sound.behind is None or sound.behind in text
        if sound.phrase is not None:
            assert any(noun in text for noun in PHRASES[sound.phrase]), text
        if sound.tempo is not None:
            assert any(word in text for word in TEMPI[sound.tempo]), text
        if sound.pitch is not None:
            assert any(word in text for word in PITCHES[sound.pitch]), text


def test_words_of_one_meaning_are_no_words_of_another() -> None:
    words = [word for table in (PHRASES, TEMPI, PITCHES) for group in table.values() for word in group]
    assert len(words) == len(set(words))


def test_one_sound_is_said_in_many_forms() -> None:
    rng = random.Random(0)
    assert len({varied(TRUMPET, rng) for _ in range(300)}) >= 25


def test_random_sounds_are_of_all_kinds_and_make_sense(bank: SoundBank) -> None:
    rng = random.Random(0)
    sounds = [random_sound(bank, rng) for _ in range(4000)]
    assert {sound.kind for sound in sounds} == {"music", "beat", "effect"}
    assert {sound.phrase for sound in sounds} == {None, *PHRASES}
    assert DRUM_KIT in {sound.label for sound in sounds}
    assert all(sound.tempo is None for sound in sounds if sound.phrase in UNTIMED)
    assert {sound.label for sound in sounds if sound.phrase == "chord"} == {"organ"}
    backgrounds = {effect.label for effect in bank.effects if effect.background}
    assert {sound.behind for sound in sounds} == {None, *backgrounds}
    assert not any(sound.behind for sound in sounds if sound.label in backgrounds)


def test_what_is_said_leaves_out_but_never_invents(bank: SoundBank) -> None:
    rng = random.Random(0)
    assert {said(TRUMPET, bank, rng) for _ in range(200)} == {TRUMPET, Sound(kind="music", label="trumpet")}
    dog = Sound(kind="effect", label="a dog barking", behind="rain falling")
    assert {said(dog, bank, rng) for _ in range(200)} == {
        dog,
        replace(dog, label="a dog"),
        replace(dog, label="a bark"),
    }
    assert {said(TRUMPET, bank, rng, left_open=0) for _ in range(200)} == {TRUMPET}


def test_the_held_out_share_is_stable_and_spares_plain_sounds(bank: SoundBank) -> None:
    rng = random.Random(0)
    sounds = {random_sound(bank, rng) for _ in range(20_000)}
    sounds |= {replace(sound, label=f"{sound.label}{n}") for sound in sounds for n in range(30)}
    marked = {sound for sound in sounds if sound.tempo or sound.pitch or sound.behind}
    held = {sound for sound in sounds if is_held_out(sound)}
    assert held < marked and 0.6 / HELD_OUT_EVERY < len(held) / len(marked) < 1.5 / HELD_OUT_EVERY
    assert is_held_out(Sound(kind="music", label="flute", phrase="melody", tempo="fast")) is False
    assert is_held_out(replace(TRUMPET, label="flute", phrase="falling", pitch="low")) in (True, False)


def test_the_corpus_holds_every_name(bank: SoundBank) -> None:
    corpus = caption_corpus(bank, seed=0, number=20)
    assert {"flute", "organ", "snare drum", "a dog barking", "a dog", "rain falling"} <= set(corpus)
    assert corpus == caption_corpus(bank, seed=0, number=20)
