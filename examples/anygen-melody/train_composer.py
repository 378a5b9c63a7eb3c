"""Trains the composer on melodies that a few rules of music make up, and writes the captions for `anygen train`.

    python train_composer.py anygen_melody/weights ../../data/melody

A caption may say a tempo, a mood, a direction and an instrument; what it leaves open is drawn. Happy is a major key,
sad a minor one, dreamy the five notes of the pentatonic. No file is read: there is no tune in it that somebody owns.
"""

import random
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
from anygen_melody import INSTRUMENTS, Composer, ComposerConfig, Melody
from anygen_melody.composer import LENGTHS, LOWEST, SPAN, TEMPOS

SCALES = {"happy": (0, 2, 4, 5, 7, 9, 11), "sad": (0, 2, 3, 5, 7, 8, 10), "dreamy": (0, 2, 4, 7, 9)}
PACES = {"slow": 0, "moderate": 1, "fast": 2}
TURNS = ("rising", "falling", "winding")
STEPS, BATCH, RATE, SEED = 3000, 128, 2e-3, 0


def caption(pace: str | None, mood: str | None, turn: str | None, instrument: str | None) -> str:
    """'a slow sad rising melody on the flute'; what is None is left out."""
    words = " ".join(word for word in (pace, mood, turn) if word)
    return f"a {words} melody".replace("a  ", "a ") + (f" on the {instrument}" if instrument else "")


def compose(pace: str, mood: str, turn: str, instrument: str, notes: int, rng: random.Random) -> Melody:
    """A walk on the scale of the mood, which goes where the caption says."""
    root, scale = LOWEST + rng.choice((0, 2, 3, 5)), SCALES[mood]
    ladder = [root + 12 * octave + step for octave in range(3) for step in scale]
    ladder = [pitch for pitch in ladder if pitch < LOWEST + SPAN]
    ends = {"rising": (0, len(ladder) - 1), "falling": (len(ladder) - 1, 0)}
    first, last = ends.get(turn, (len(ladder) // 2, len(ladder) // 2))
    pairs: list[tuple[int, float]] = []
    for place in range(notes):
        share = place / (notes - 1)
        aim = first + (last - first) * share
        if turn == "winding":
            aim += len(ladder) / 3 * (1 if place // 4 % 2 else -1) * (1 - abs(2 * (place % 4) - 3) / 6) * (share < 0.9)
        rung = max(0, min(len(ladder) - 1, round(aim + rng.gauss(0, 0.6))))
        last_one = place == notes - 1
        pairs.append((ladder[rung], 2.0 if last_one else rng.choices(LENGTHS, (0.35, 0.55, 0.1))[0]))
    return Melody(pairs, TEMPOS[PACES[pace]], instrument)


def wish(rng: random.Random) -> tuple[str, Melody]:
    """A random caption and a melody that it fits."""
    pace, mood, turn, instrument = (rng.choice(list(options)) for options in (PACES, SCALES, TURNS, INSTRUMENTS))
    said = [word if rng.random() < 0.75 else None for word in (pace, mood, turn, instrument)]
    return caption(*said), compose(pace, mood, turn, instrument, ComposerConfig().notes, rng)


def captions() -> list[str]:
    """All that can be said."""
    options = [[None, *kind] for kind in (PACES, SCALES, TURNS, INSTRUMENTS)]
    return [caption(*words) for words in product(*options)]


def fits(melody: Melody, words: str) -> dict[str, bool]:
    """What the caption says, by kind -> whether the notes do it; the rules are read backwards."""
    pitches, found = [pitch for pitch, _ in melody.notes], {}
    for word in words.split():
        if word in PACES:
            found["pace"] = melody.tempo == TEMPOS[PACES[word]]
        elif word in INSTRUMENTS:
            found["instrument"] = melody.instrument == word
        elif word in SCALES:
            share = {mood: max(_inside(pitches, root, scale) for root in range(12)) for mood, scale in SCALES.items()}
            rivals = [share[mood] for mood in SCALES if mood != word and not set(SCALES[word]) <= set(SCALES[mood])]
            found["mood"] = share[word] > 0.9 and share[word] >= max(rivals, default=0)
        elif word in TURNS:
            climb = float(np.corrcoef(pitches, range(len(pitches)))[0, 1]) if len(set(pitches)) > 1 else 0.0
            found["turn"] = word == ("rising" if climb > 0.8 else "falling" if climb < -0.8 else "winding")
    return found


def _inside(pitches: list[int], root: int, scale: tuple[int, ...]) -> float:
    return sum((pitch - root) % 12 in scale for pitch in pitches) / len(pitches)


def main(out: Path, data: Path) -> None:
    """Trains, measures, writes."""
    torch.manual_seed(SEED)
    rng, everything = random.Random(SEED), captions()
    words = sorted({*PACES, *SCALES, *TURNS, *INSTRUMENTS})
    composer = Composer(ComposerConfig(words=tuple(words))).train()
    optimizer = torch.optim.AdamW(composer.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for step in range(1, STEPS + 1):
        said, melodies = zip(*(wish(rng) for _ in range(BATCH)), strict=True)
        loss = composer.denoising_loss(composer.encode_text(said), melodies)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(composer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"{step}: {loss:.3f}", flush=True)
    made = composer.eval().generate(composer.encode_text(everything), seeds=range(len(everything)))
    verdicts = [fits(melody, words) for melody, words in zip(made, everything, strict=True)]
    for kind in ("pace", "instrument", "mood", "turn"):
        told = [verdict[kind] for verdict in verdicts if kind in verdict]
        print(f"{kind}: {sum(told) / len(told):.3f} of {len(told)}")
    composer.half().save_pretrained(out)
    data.mkdir(parents=True, exist_ok=True)
    (data / "captions.txt").write_text("".join(f"{line}\n" for line in everything))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
