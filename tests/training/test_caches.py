"""Caches give back what was computed, go on where they were, and notice damage."""

import errno
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from anygen.errors import ConfigError, OutputError
from anygen.training import caches
from anygen.training.caches import TensorCache, fingerprint
from anygen.training.precompute import _alone

KEYS = [f"key {n}" for n in range(7)]


def value(key: str) -> Tensor:
    return torch.tensor([float(key.split()[1]), 0.5])


class Computer:
    """Computes, and counts what it was asked for; dies at its `dies`-th call."""

    def __init__(self, dies: int | None = None) -> None:
        self.asked: list[str] = []
        self.calls, self.dies = 0, dies

    def __call__(self, keys: Sequence[str]) -> tuple[Sequence[str], Mapping[str, Tensor]]:
        self.calls += 1
        if self.calls == self.dies:
            raise KeyboardInterrupt
        self.asked += keys
        return keys, {"v": torch.stack([value(key) for key in keys]), "mask": torch.ones(len(keys), 1).bool()}


def open_cache(folder: Path) -> TensorCache:
    return TensorCache(folder / "cache", {"encoder": "a"})


def test_rows_come_back_in_the_order_they_are_asked_for_in(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    assert cache.fill(KEYS, Computer(), batch_size=2, shard_rows=3) == 7
    for again in (cache, open_cache(tmp_path)):
        rows = again.rows(["key 5", "key 0", "key 5"])
        torch.testing.assert_close(rows["v"], torch.stack([value(k) for k in ("key 5", "key 0", "key 5")]))
        assert rows["v"].dtype == torch.float32 and rows["mask"].dtype == torch.bool
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    killed = Computer(dies=4)  # in the second file
    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path).fill(KEYS, killed, batch_size=1, shard_rows=3)
    cache, rest = open_cache(tmp_path), Computer()
    assert len(cache) == 3 and cache.fill(KEYS, rest, batch_size=2, shard_rows=3) == 4
    assert rest.asked == KEYS[3:]
    torch.testing.assert_close(cache.rows(KEYS)["v"], torch.stack([value(key) for key in KEYS]))
    assert cache.fill([*KEYS, "key 7"], rest) == 1 and rest.asked[-1] == "key 7", "a cache grows"


def test_rows_are_kept_and_told_before_a_file_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = count(step=15.0)  # reads 15 s later each time
    monkeypatch.setattr(caches, "monotonic", lambda: next(clock))
    monkeypatch.setattr(caches.logger, "propagate", True)
    with pytest.raises(KeyboardInterrupt), caplog.at_level("INFO", "anygen.training"):
        open_cache(tmp_path).fill(KEYS, Computer(dies=4), batch_size=1, what="features of image")
    assert caplog.messages == ["features of image: 2 of 7 computed"]
    cache, rest = open_cache(tmp_path), Computer()
    assert cache.keys() == KEYS[:2]
    cache.fill(KEYS, rest, batch_size=1)
    assert rest.asked == KEYS[2:]
    torch.testing.assert_close(open_cache(tmp_path).rows(KEYS)["v"], torch.stack([value(key) for key in KEYS]))


@pytest.mark.parametrize("how", ["changed", "lost"])
def test_a_damaged_file_is_computed_again(how: str, tmp_path: Path) -> None:
    open_cache(tmp_path).fill(KEYS, Computer(), shard_rows=3)
    path = tmp_path / "cache" / "shard-00001.safetensors"
    if how == "lost":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    cache, computer = open_cache(tmp_path), Computer()
    assert len(cache) == 4
    cache.fill(KEYS, computer, shard_rows=3)
    assert computer.asked == KEYS[3:6]
    torch.testing.assert_close(open_cache(tmp_path).rows(KEYS)["v"], torch.stack([value(key) for key in KEYS]))


@pytest.mark.parametrize("length", [0, 50, -1])
def test_a_file_that_is_cut_off_is_computed_again_though_checksums_are_not_checked(length: int, tmp_path: Path) -> None:
    open_cache(tmp_path).fill(KEYS, Computer(), shard_rows=3)
    path = tmp_path / "cache" / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    cache, computer = TensorCache(tmp_path / "cache", {"encoder": "a"}, verify=False), Computer()
    assert len(cache) == 4
    cache.fill(KEYS, computer)
    assert computer.asked == KEYS[3:6]
    torch.testing.assert_close(open_cache(tmp_path).rows(KEYS)["v"], torch.stack([value(key) for key in KEYS]))


def test_what_cannot_be_computed_is_not_kept(tmp_path: Path) -> None:
    def some(keys: Sequence[str]) -> tuple[Sequence[str], Mapping[str, Tensor]]:
        kept = [key for key in keys if key != "key 2"]
        return kept, {"v": torch.stack([value(key) for key in kept])} if kept else {}

    cache = open_cache(tmp_path)
    cache.fill(KEYS[:4], some, batch_size=1)
    assert "key 2" not in cache and "key 3" in cache
    with pytest.raises(ConfigError, match="holds nothing for 'key 2'; fill it first"):
        cache.rows(["key 3", "key 2"])


@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_numbers_that_half_precision_does_not_hold_are_refused(bad: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'v' holds values that are no numbers, or beyond what half precision"):
        open_cache(tmp_path).fill(["k"], lambda keys: (keys, {"v": torch.tensor([[bad]])}))


def test_rows_of_several_shapes_are_refused(tmp_path: Path) -> None:
    def growing(keys: Sequence[str]) -> tuple[Sequence[str], Mapping[str, Tensor]]:
        return keys, {"v": torch.zeros(len(keys), int(keys[0].split()[1]) + 1)}

    with pytest.raises(ConfigError, match=r"'v' differs in shape from row to row \(\[\(1,\), \(2,\)\]\)"):
        open_cache(tmp_path).fill(KEYS[:2], growing, batch_size=1)
    with pytest.raises(ConfigError, match="'v' differs in shape from row to row"):
        open_cache(tmp_path).fill(KEYS[:2], growing, batch_size=1, shard_rows=1)


def test_a_full_disk_is_told_and_leaves_what_was_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_cache(tmp_path).fill(KEYS[:3], Computer())

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match="the disk of .*cache is full; what was computed so far is kept"):
        open_cache(tmp_path).fill(KEYS, Computer())
    assert len(open_cache(tmp_path)) == 3 and not list((tmp_path / "cache").glob(".*.tmp"))


def test_a_cache_of_something_else_and_a_broken_index_are_refused(tmp_path: Path) -> None:
    open_cache(tmp_path).fill(KEYS, Computer())
    with pytest.raises(ConfigError, match="holds what {'encoder': 'a'} computed, not {'encoder': 'b'}"):
        TensorCache(tmp_path / "cache", {"encoder": "b"})
    for broken in ("{", "[]", "null", "{}", '{"identity": {}, "shards": [{}]}', '{"identity": {}, "shards": 3}'):
        (tmp_path / "cache" / caches.INDEX).write_text(broken)
        with pytest.raises(ConfigError, match="index.json is damaged .*; delete the folder to compute it anew"):
            open_cache(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, in which nobody can make a folder")
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, why in ((tmp_path / "file", "it is a file"), (Path("/proc/c"), "No such file or directory")):
        with pytest.raises(OutputError, match=f"^cache: the folder {place} cannot be written: {why}$"), _alone(place):
            pass
    with pytest.raises(FileNotFoundError, match="its own"), _alone(tmp_path / "cache"):
        raise FileNotFoundError("its own")


def test_a_disk_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: Permission denied (os error 13)")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(OutputError, match="cache cannot be written: I/O error: Permission denied"):
        open_cache(tmp_path).fill(KEYS, Computer())


def test_a_part_is_told_by_its_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(200_000))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(bytes(199_999) + b"1")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
