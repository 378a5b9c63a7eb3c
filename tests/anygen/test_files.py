import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anygen.errors import OutputError
from anygen.files import build_once, is_disk_full, writing


def test_the_file_appears_whole_and_alone(tmp_path: Path) -> None:
    with writing(tmp_path / "a.txt") as temporary:
        temporary.write_text("all")
        assert list(tmp_path.iterdir()) == [temporary]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "all")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_everything_as_it_was(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), writing(tmp_path / "a.txt", overwrite=True) as temporary:
        temporary.write_text("half")
        raise error
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a.txt exists already"), writing(tmp_path / "a.txt") as temporary:
        temporary.write_text("mine")
        (tmp_path / "a.txt").write_text("theirs")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "theirs")]


def test_without_hard_links_the_rename_still_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with writing(tmp_path / "a.txt") as temporary:
        temporary.write_text("mine")
    assert (tmp_path / "a.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="exists already"), writing(tmp_path / "b.txt") as temporary:
        temporary.write_text("mine")
        (tmp_path / "b.txt").write_text("theirs")


def test_a_dangling_link_counts_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match="exists already"), writing(tmp_path / "a.txt"):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a.txt cannot be written: No space left on device"):
        with writing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            Path("/dev/full").write_text("more")
    assert not list(tmp_path.iterdir())

    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        Path("/dev/full").write_text("more")

    with pytest.raises(OutputError, match="the disk of .* is full; nothing was left behind"):
        build_once(tmp_path / "made", build)
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]


def test_a_full_disk_is_known_by_words_too() -> None:
    assert is_disk_full(RuntimeError("serializing: I/O error: No space left on device (os error 28)"))
    assert is_disk_full(OSError(errno.EDQUOT, "quota")) and not is_disk_full(OSError(errno.EIO, "broken"))


def test_a_folder_is_built_once_and_only_once(tmp_path: Path) -> None:
    runs: list[Path] = []

    def build(folder: Path) -> None:
        runs.append(folder)
        (folder / "a.txt").write_text("all")

    for _ in range(2):
        build_once(tmp_path / "deep" / "made", build)
    assert len(runs) == 1 and (tmp_path / "deep" / "made" / "a.txt").read_text() == "all"
    assert not runs[0].exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_build_that_fails_leaves_nothing_and_can_be_repeated(error: type[BaseException], tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(error):
        build_once(tmp_path / "made", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]
    build_once(tmp_path / "made", lambda folder: None)
    assert (tmp_path / "made").is_dir()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".made.0123abcd.tmp").mkdir()
    build_once(tmp_path / "made", lambda folder: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made.lock", "made"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="/file/made cannot be made: .*File exists"):
        build_once(tmp_path / "file" / "made", lambda folder: None)


def test_two_processes_at_once_both_succeed(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from anygen.files import build_once

def build(folder):
    with open({str(tmp_path / "runs")!r}, "a") as log:
        log.write("run\\n")
    (folder / "a.txt").write_text("half")
    time.sleep(0.2)
    (folder / "a.txt").write_text("all")

build_once(Path({str(tmp_path / "made")!r}), build)
assert (Path({str(tmp_path / "made")!r}) / "a.txt").read_text() == "all"
"""
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert (tmp_path / "runs").read_text() == "run\n"
