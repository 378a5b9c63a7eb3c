"""Melodies: notes, files, sound; the composer that makes them; and the modality grafted onto anygen-mini."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from anygen_melody import INSTRUMENTS, MELODY, Composer, ComposerConfig, Melody
from train_composer import PACES, captions, compose, fits, wish

from anygen.errors import MediaError
from anygen.media import media_type
from anygen.registry import lookup

HERE = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def composer() -> Composer:
    """The one that comes with the package."""
    assert MELODY.weights is not None
    return Composer.from_pretrained(MELODY.weights)


def events(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """A reader of MIDI by the book: (ticks, status, body), statuses never running."""
    place, clock = 22, 0

    def number() -> int:
        nonlocal place
        value = 0
        while True:
            value, place = value << 7 | data[place] & 0x7F, place + 1
            if data[place - 1] < 0x80:
                return value

    while place < len(data):
        clock += number()
        status, place = data[place], place + 1
        if status == 0xFF:
            status, place = data[place], place + 1
            size = number()
        else:
            size = 1 if status >> 4 == 0xC else 2
        yield clock, status, data[place : place + size]
        place += size


def test_a_midi_file_says_what_the_melody_is(tmp_path: Path) -> None:
    melody = Melody([(60, 1.0), (64, 0.5), (67, 40.0)], tempo=90, instrument="flute")
    data = melody.save(tmp_path / "m.mid", metadata={"prompt": "é" * 200}).read_bytes()
    assert data[:4] == b"MThd" and int.from_bytes(data[18:22], "big") == len(data) - 22
    found = list(events(data))
    played = [(clock, body[0]) for clock, status, body in found if status == 0x90]
    ended = [(clock, body[0]) for clock, status, body in found if status == 0x80]
    assert played == [(0, 60), (480, 64), (720, 67)] and ended == [(480, 60), (720, 64), (720 + 40 * 480, 67)]
    told = {status: body for _, status, body in found}
    assert round(6e7 / int.from_bytes(told[0x51], "big")) == 90 and told[0xC0] == bytes([73])
    assert b"prompt" in told[1] and 0x2F in told


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_every_note_sounds_at_its_pitch_and_length(instrument: str) -> None:
    audio = Melody([(69, 2.0), (57, 2.0)], tempo=120, instrument=instrument).audio()
    assert len(audio.mono) == 2 * 16_000 and np.abs(audio.mono).max() == pytest.approx(0.8, abs=0.01)
    for second, pitch in enumerate((440, 220)):
        spectrum = np.abs(np.fft.rfft(audio.mono[second * 16_000 : (second + 1) * 16_000]))
        assert abs(int(spectrum.argmax()) - pitch) <= 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([],), "a melody has notes"),
        (([(200, 1)],), "pitch 0 to 127"),
        (([(60, 1)], 100, "kazoo"), "known: piano, bells"),
    ],
)
def test_what_is_no_melody_is_refused(arguments: tuple[object, ...], told: str) -> None:
    with pytest.raises(MediaError, match=told):
        Melody(*arguments)  # type: ignore[arg-type]
    with pytest.raises(MediaError, match="song.mid: melodies are made and written, not read"):
        Melody._decode(b"MThd", "song.mid", None)  # type: ignore[arg-type]


def test_the_rules_read_backwards_find_what_the_caption_says() -> None:
    import random

    rng = random.Random(1)
    for _ in range(100):
        said, melody = wish(rng)
        assert [kind for kind, right in fits(melody, said).items() if not right] == [], said
    assert not fits(compose("slow", "happy", "rising", "piano", 16, rng), "a fast melody on the flute")["pace"]
    assert len(captions()) == len(set(captions())) == 4 * 4 * 4 * 6


def test_the_composer_does_what_captions_say_and_repeats_itself_by_seed(composer: Composer) -> None:
    said = [f"a {pace} sad rising melody on the {instrument}" for pace in PACES for instrument in INSTRUMENTS]
    told = composer.encode_text(said)
    made = composer.generate(told, seeds=range(len(said)))
    verdicts = [fits(melody, words) for melody, words in zip(made, said, strict=True)]
    for kind, least in {"pace": 1.0, "instrument": 1.0, "mood": 0.8, "turn": 0.8}.items():
        assert sum(verdict[kind] for verdict in verdicts) >= least * len(said), kind
    again = composer.generate(told[3], seeds=[3])
    assert vars(again[0]) == vars(made[3]), "a melody does not depend on its batch"
    assert vars(composer.generate(told[3], seeds=[4])[0]) != vars(made[3])


def test_teaching_lowers_the_likelihood_of_other_notes() -> None:
    import random

    torch.manual_seed(0)
    rng = random.Random(0)
    composer = Composer(ComposerConfig(words=("slow", "fast", "melody"), width=32))
    optimizer = torch.optim.Adam(composer.parameters(), lr=1e-2)
    said, melodies = zip(*(wish(rng) for _ in range(16)), strict=True)
    losses = []
    for _ in range(30):
        loss = composer.denoising_loss(composer.encode_text(said), melodies)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_package_is_found_by_its_entry_point_and_is_small(counted: Callable[[Path], int]) -> None:
    assert lookup("generator", "composer").__name__ == "Composer"
    assert media_type("melody").__name__ == "Melody"
    assert counted(HERE / "anygen_melody") <= 150
    assert (HERE / "anygen_melody/weights/model.safetensors").stat().st_size < 2e6


def test_anygen_mini_learns_to_answer_with_a_melody(mini: Path, tmp_path: Path) -> None:
    """One step through the LLM: that it runs on the real model, and that what comes out is played."""
    from anygen import AnyGenPipeline
    from anygen.reply import PlannedPart, Reply
    from anygen.training.recipes import run

    (tmp_path / "captions.txt").write_text("a slow sad melody\na fast happy melody on the flute\na dreamy melody\n")
    (tmp_path / "recipe.yaml").write_text(
        f"kind: new_output\nout: {tmp_path}/run\nmodality: melody\ncaptions: {tmp_path}/captions.txt\n"
        "steps: 1\nbatch_size: 2\nkept: 0\nfit_steps: 20\nheld_out: 0.34\n"
    )
    figures = run(tmp_path / "recipe.yaml")
    assert figures["cases"] == 1 and np.isfinite(figures["distance"])
    pipe = AnyGenPipeline.from_pretrained(tmp_path / "run/model", device="cpu")
    assert "melody" in pipe.drawable and pipe.model.settings.plugins == {"anygen-melody": ("generator composer",)}
    condition = pipe.generator("melody").encode_text(["a slow sad melody on the organ"])
    reply = pipe.render(Reply(content=(PlannedPart("melody", condition, "a slow sad melody on the organ"),)))
    assert reply.media[0].instrument == "organ" and "<audio" in reply._repr_html_()  # type: ignore[attr-defined]
    assert [path.suffix for path in reply.save(tmp_path / "out")] == [".mid"]
