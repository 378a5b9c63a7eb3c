"""Pickles that are read or refused, and ImageBind's release at tiny size."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anygen.cli import main
from anygen.convert import compare, convert_imagebind, read_pickle
from anygen.encoders.imagebind import ImageBindEncoder, ImageBindModel
from anygen.encoders.imagebind_config import ImageBindConfig, MotionConfig, PlaneConfig, TextConfig, VisionConfig
from anygen.errors import CheckpointError, ConfigError, OutputError

CONFIG = ImageBindConfig(
    out_dim=8,
    vision=VisionConfig(width=16, blocks=2, heads=2, image_size=32, patch=16),
    text=TextConfig(width=12, blocks=2, heads=3, vocab_size=517, context_length=10),
    audio=PlaneConfig(width=12, blocks=1, heads=2, height=32, plane_width=40, stride=12, logit_scale=20),
    depth=PlaneConfig(width=12, blocks=1, heads=2, height=32, plane_width=32, logit_scale=5),
    thermal=PlaneConfig(width=12, blocks=1, heads=2, height=32, plane_width=32, logit_scale=10),
    imu=MotionConfig(width=12, blocks=1, heads=2, steps=40),
)


class Runs:
    """What a pickle can do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.fixture
def release(tmp_path: Path) -> dict[str, Tensor]:
    """The state dict that lies in `imagebind_huge.pth` there."""
    torch.manual_seed(0)
    state = {key: value + 0.01 for key, value in ImageBindModel(CONFIG).state_dict().items()}
    torch.save(state, tmp_path / "imagebind_huge.pth")
    return state


@pytest.fixture
def merges(tmp_path: Path) -> Path:
    path = tmp_path / "bpe.txt"
    path.write_text('"bpe_simple_vocab_16e6.txt#version: 0.2\nd o\ndo g</w>\na n\n')
    return path


def test_tensors_parameters_and_files_of_old_torch_are_read(tmp_path: Path) -> None:
    state = {"a": torch.randn(2, 3), "b": torch.nn.Parameter(torch.randn(2))}
    for name, zipped in (("new.pt", True), ("old.pt", False)):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
        found = read_pickle(tmp_path / name)
        assert all(torch.equal(found[key], value) for key, value in state.items())
        assert not found["b"].requires_grad


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    for value, named in ((Runs(), r"\w+\.system"), (argparse.Namespace(a=1), "argparse.Namespace")):
        for zipped in (True, False):
            torch.save({"a": torch.zeros(2), "b": value}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
            told = rf"a.pt holds {named} beside tensors, which could run code on loading, so it is not read; save its"
            with pytest.raises(CheckpointError, match=told):
                read_pickle(tmp_path / "a.pt")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint .*nowhere.pt"):
        read_pickle(tmp_path / "nowhere.pt")
    torch.save({"a": torch.randn(500)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for spoilt in (b"", b"no pickle at all", whole[:900]):
        (tmp_path / "a.pt").write_bytes(spoilt)
        with pytest.raises(CheckpointError, match=r"a.pt is not a readable checkpoint"):
            read_pickle(tmp_path / "a.pt")
    for value in ({"a": 1}, [torch.zeros(1)]):
        torch.save(value, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="holds something other than a table of tensors; save its state"):
            read_pickle(tmp_path / "a.pt")


def test_a_comparison_counts_each_kind_and_lists_the_first() -> None:
    wanted = {key: (2,) for key in "abcdef"}
    found = compare(wanted, {"a": torch.zeros(2), "b": torch.zeros(3), "x": torch.zeros(1)})
    assert found.matched == {"a": (2,)}
    with pytest.raises(CheckpointError) as error:
        found.check("it")
    assert str(error.value) == (
        "it does not fit, nothing was written: 4 missing (c, d, e, …); 1 unexpected (x); "
        "1 of another shape (b is (3,), not (2,))"
    )
    compare({"a": (2,)}, {"a": torch.zeros(2)}).check("it")


def test_the_release_becomes_an_encoder_of_every_modality(
    release: dict[str, Tensor], merges: Path, tmp_path: Path
) -> None:
    coverage = convert_imagebind(tmp_path, tmp_path / "out", config=CONFIG, vocabulary=merges)
    assert coverage.matched.keys() == release.keys()
    own = ImageBindModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(own[key], value) for key, value in release.items())
    for modality in ("image", "video", "text", "audio", "depth", "thermal", "imu"):
        encoder = ImageBindEncoder.from_pretrained(tmp_path / "out", modality=modality)
        state = encoder.model.state_dict()
        assert state and all(torch.equal(value, release[key]) for key, value in state.items())
    assert ImageBindEncoder.from_pretrained(tmp_path / "out", modality="text").preprocess(["dog"])["inputs"].tolist()


def test_a_release_that_does_not_fit_leaves_nothing(release: dict[str, Tensor], tmp_path: Path) -> None:
    key = "modality_heads.audio.2.weight"
    spoilt = {name: value for name, value in release.items() if name != key} | {
        "modality_heads.imu.3.weight": torch.zeros(8, 13)
    }
    torch.save(spoilt, tmp_path / "imagebind_huge.pth")
    told = rf"1 missing \({key}\); 1 of another shape \(modality_heads.imu.3.weight is \(8, 13\), not \(8, 12\)\)"
    with pytest.raises(CheckpointError, match=told):
        convert_imagebind(tmp_path / "imagebind_huge.pth", tmp_path / "out", config=CONFIG)
    torch.save(release | {"a": Runs()}, tmp_path / "imagebind_huge.pth")
    with pytest.raises(CheckpointError, match="could run code on loading"):
        convert_imagebind(tmp_path, tmp_path / "out", config=CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["imagebind_huge.pth"]


def test_only_an_imagebind_is_replaced_and_only_on_request(release: dict[str, Tensor], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_imagebind(tmp_path, out, config=CONFIG)
    with pytest.raises(OutputError, match="out is not empty; choose another directory"):
        convert_imagebind(tmp_path, out, config=CONFIG)
    convert_imagebind(tmp_path, out, config=CONFIG, overwrite=True)
    (out / "config.json").unlink()
    with pytest.raises(OutputError, match="is not empty and holds no model, so it is not replaced"):
        convert_imagebind(tmp_path, out, config=CONFIG, overwrite=True)


def test_the_command_line_counts_the_trunks(
    release: dict[str, Tensor],
    merges: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = ["convert", "imagebind", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(call) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "imagebind_huge.pth does not fit, nothing was written" in error
    monkeypatch.setattr(ImageBindConfig, "huge", lambda: CONFIG)
    assert main(call) == 0
    shown = capsys.readouterr().out
    assert "thermal" in shown and "the text trunk has no tokenizer" in shown
    assert json.loads((tmp_path / "out" / "config.json").read_text())["out_dim"] == 8
    assert main([*call, "--overwrite", "--vocabulary", str(merges)]) == 0
    assert "the text trunk has no tokenizer" not in capsys.readouterr().out


def test_a_vocabulary_needs_a_trunk_that_reads(release: dict[str, Tensor], merges: Path, tmp_path: Path) -> None:
    config = CONFIG.only("imu")
    torch.save(ImageBindModel(config).state_dict(), tmp_path / "imagebind_huge.pth")
    with pytest.raises(ConfigError, match="this ImageBind reads no texts, so it takes no vocabulary"):
        convert_imagebind(tmp_path, tmp_path / "out", config=config, vocabulary=merges)
