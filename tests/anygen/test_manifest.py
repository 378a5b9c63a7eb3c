import json
from pathlib import Path

import pytest

from anygen.errors import CheckpointError
from anygen.manifest import sha256, verify, write_manifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_bytes(bytes(range(256)))
    (tmp_path / "anygen.json").write_text("{}")
    (tmp_path / "README.md").write_text("A card may be edited.")
    write_manifest(tmp_path)
    return tmp_path


def test_it_lists_every_file_but_documents_hidden_ones_and_itself(model: Path) -> None:
    (model / ".git").mkdir()
    (model / ".git" / "config").touch()
    write_manifest(model)
    files = json.loads((model / "manifest.json").read_text())["files"]
    assert list(files) == ["anygen.json", "vae/model.safetensors"]
    # sha256 of two bytes and of none, as published everywhere
    assert files["anygen.json"]["sha256"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert files["vae/model.safetensors"]["bytes"] == 256
    (model / "empty").touch()
    assert sha256(model / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_an_intact_directory_passes_and_a_card_may_change(model: Path) -> None:
    (model / "README.md").write_text("Edited.")
    (model / "extra.txt").write_text("Not listed.")
    verify(model)


def test_every_flipped_byte_names_its_file(model: Path) -> None:
    path = model / "vae" / "model.safetensors"
    for place in (0, 100, 255):
        data = bytearray(range(256))
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"is damaged: vae/model\.safetensors has another content"):
            verify(model)


def test_a_missing_shard_and_a_cut_file_are_both_named(model: Path) -> None:
    (model / "vae" / "model.safetensors").unlink()
    (model / "anygen.json").write_text("{} ")
    with pytest.raises(CheckpointError, match=r"anygen.json has 3 bytes, not 2; vae/model.safetensors is missing\."):
        verify(model)


def test_many_faults_are_counted(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.bin").write_text("x")
    write_manifest(tmp_path)
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    with pytest.raises(CheckpointError, match="4.bin is missing and 2 more. Delete it, and fetch or install it again"):
        verify(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"a": 3}}'])
def test_a_damaged_manifest_is_told(text: str, model: Path) -> None:
    (model / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged \("):
        verify(model)


def test_a_directory_without_a_manifest_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        verify(tmp_path)
