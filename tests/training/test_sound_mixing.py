"""Scores and the waveforms made of them."""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from anygen.errors import ConfigError
from anygen.generators.mel import PEAK
from anygen.training.sound_captions import DRUM_KIT, Phrase, Pitch, Sound, Tempo, is_held_out
from anygen.training.sound_mixing import INTERVALS, SAMPLES, SECONDS, Event, Mixer, SoundPool, SoundSource, score
from anygen.training.sound_packages import RATE
from anygen.training.sounds import SoundBank


def keys(bank: SoundBank, events: list[Event]) -> list[int]:
    """The MIDI keys that events of an instrument sound."""
    roots = {stem: root for row in bank.instruments for stem, root in zip(row.stems, row.roots, strict=True)}
    return [round(roots[event.stem] + 12 * float(np.log2(event.rate))) for event in events]


@pytest.mark.parametrize("tempo", ["slow", None, "fast"])
@pytest.mark.parametrize("phrase", ["rising", "falling", "melody", "repeated", "arpeggio"])
def test_scores_have_the_phrase_and_the_tempo(bank: SoundBank, phrase: Phrase, tempo: Tempo | None) -> None:
    rng = random.Random(0)
    for _ in range(20):
        events = score(Sound(kind="music", label="flute", phrase=phrase, tempo=tempo), bank, rng)
        starts = np.diff([event.start for event in events])
        low, high = INTERVALS[tempo]
        assert low - 1e-6 <= starts.min() and starts.max() <= high + 1e-6 and np.ptp(starts) < 1e-6
        steps = np.diff(keys(bank, events))
        assert len(events) >= 3 and events[-1].start < SECONDS
        match phrase:
            case "rising":
                assert (steps > 0).all()
            case "falling":
                assert (steps < 0).all()
            case "repeated":
                assert (steps == 0).all()
            case _:
                assert (steps != 0).all() and (len(steps) < 6 or (steps > 0).any() and (steps < 0).any())


def test_pitch_words_order_the_keys_and_stay_on_the_instrument(bank: SoundBank) -> None:
    rng = random.Random(0)

    def heard(pitch: Pitch | None) -> list[int]:
        sound = Sound(kind="music", label="flute", phrase="note", pitch=pitch)
        return [keys(bank, score(sound, bank, rng))[0] for _ in range(50)]

    low, middle, high = heard("low"), heard(None), heard("high")
    assert max(low) < min(middle) and max(middle) < min(high)
    assert min(low) >= bank.instruments[0].low and max(high) <= bank.instruments[0].high


def test_chords_sound_together(bank: SoundBank) -> None:
    events = score(Sound(kind="music", label="organ", phrase="chord"), bank, random.Random(0))
    assert len(events) >= 3 and len({event.start for event in events}) == 1
    assert len(set(keys(bank, events))) == len(events)


def test_beats_repeat_and_strokes_do_not(bank: SoundBank) -> None:
    rng = random.Random(0)
    assert len(score(Sound(kind="beat", label="snare drum", phrase="hit"), bank, rng)) == 1
    slow, fast = (
        score(Sound(kind="beat", label="snare drum", phrase="beat", tempo=tempo), bank, rng)
        for tempo in ("slow", "fast")
    )
    assert 3 <= len(slow) < len(fast) / 2
    kit = score(Sound(kind="beat", label=DRUM_KIT, phrase="beat"), bank, rng)
    struck = {event.stem for event in kit}
    assert len(struck) == 3 and struck <= {stem for row in bank.percussion for stem in row.stems}


def test_an_effect_may_have_another_behind_it_and_softer(bank: SoundBank) -> None:
    dog, rain = bank.effects[0], bank.effects[1]
    sound = Sound(kind="effect", label=dog.label, behind=rain.label)
    events = score(sound, bank, random.Random(0))
    behind = [event for event in events if event.stem in rain.stems]
    assert behind and len(behind) < len(events)
    assert max(event.gain for event in behind) < min(event.gain for event in events if event.stem in dog.stems)


def reference(bank: SoundBank, event: Event) -> np.ndarray:
    """One event before levelling, sample by sample, between the stem's samples by a straight line."""
    begin, end = bank.offsets[event.stem : event.stem + 2].tolist()
    stem = bank.samples[begin:end].double().numpy() / 32_768 * bank.gains[event.stem].item()
    out, first = np.zeros(SAMPLES), round(event.start * RATE)
    time = np.arange(SAMPLES - first)
    out[first:] = np.interp(time * event.rate, np.arange(len(stem)), stem, right=0.0) * event.gain
    out[first:] *= np.where(time / RATE > event.hold, np.exp(-(time / RATE - event.hold) / 0.06), 1.0)
    return out


def test_mixing_equals_the_plain_way(bank: SoundBank) -> None:
    stems = bank.instruments[0].stems
    scores = [
        [Event(stems[0], 0.1, 0.2, 1.1), Event(stems[1], 0.3, 0.4, 0.9, 0.5)],
        [Event(stems[2], 0.0, 2.0)],
        [],
    ]
    mixed = Mixer(bank)(scores)
    for row, events in enumerate(scores[:2]):
        wanted = sum(reference(bank, event) for event in events)
        got, wanted = mixed[row].double().numpy()[80:-80], np.asarray(wanted)[80:-80]
        gain = (got * wanted).sum() / np.square(wanted).sum()
        assert np.abs(got - gain * wanted).max() < 0.02 * np.abs(got).max()
    assert not mixed[2].any()


def test_a_clip_is_the_same_in_any_batch(bank: SoundBank) -> None:
    rng, sounds = random.Random(0), [Sound(kind="music", label="flute", phrase="melody")] * 3
    scores = [score(sound, bank, rng) for sound in sounds]
    mixer = Mixer(bank)
    torch.testing.assert_close(mixer(scores)[1:2], mixer(scores[1:2]), atol=1e-5, rtol=0)


def test_clips_do_not_clip_and_are_never_silent(bank: SoundBank) -> None:
    for batch in SoundSource(bank, seed=0).clips(12, most=8):
        assert batch.waveforms.shape == (len(batch.sounds), SAMPLES)
        assert batch.waveforms.abs().max() <= PEAK + 1e-5 and batch.waveforms.abs().amax(1).min() > 0.02


def test_a_source_repeats_itself_and_keeps_held_out_sounds_apart(bank: SoundBank) -> None:
    one, other = (next(SoundSource(bank, seed=3).batches(6)) for _ in range(2))
    assert one.sounds == other.sounds and torch.equal(one.waveforms, other.waveforms)
    for held_out in (True, False):
        batch = next(SoundSource(bank, seed=0, held_out=held_out).batches(8))
        assert {is_held_out(sound) for sound in batch.sounds} == {held_out}


def test_a_pool_holds_the_source_s_clips(bank: SoundBank) -> None:
    pool = SoundPool.fill(SoundSource(bank, seed=3), 6)
    (batch,) = SoundSource(bank, seed=3).clips(6)
    assert len(pool) == 6 and pool.sounds == batch.sounds
    torch.manual_seed(0)
    drawn = pool.draw(20)
    assert bool((torch.cdist(drawn, batch.waveforms).min(1).values < 0.01).all())


def dominant(waveform: torch.Tensor) -> float:
    return torch.fft.rfft(waveform).abs().argmax().item() * RATE / len(waveform)


def test_rates_change_the_pitch(bank: SoundBank) -> None:
    render: Callable[[float], torch.Tensor] = lambda rate: Mixer(bank)(  # noqa: E731
        [[Event(bank.instruments[0].stems[0], 0.0, 0.9, rate)]]
    )[0]
    assert dominant(render(1.25)) / dominant(render(1.0)) == pytest.approx(1.25, rel=0.01)


def test_a_bank_with_nothing_held_out_is_refused(bank: SoundBank) -> None:
    small = replace(bank, instruments=bank.instruments[:1], effects=bank.effects[:1])
    with pytest.raises(ConfigError, match="nothing that this sound bank can make is held out"):
        next(SoundSource(small, seed=0, held_out=True).batches(1))
