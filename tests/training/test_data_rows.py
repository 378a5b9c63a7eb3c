"""Rows of every kind of file are the same rows, and what is wrong with some is told by their places."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anygen.errors import ConfigError
from anygen.training import data_rows
from anygen.training.data_rows import Faults, RowFault, Rows, SourceOfRows, open_rows, read

ROWS = [{"caption": f"a thing number {n}", "note": {"n": n}} for n in range(5)]


def itself(rows: Rows, number: int) -> dict[str, Any]:
    return rows[number]


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """The same rows in every format."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "r.jsonl").write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(tmp_path / "r.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    tar(tmp_path / "r.tar", {f"{n:03d}.json": json.dumps(row).encode() for n, row in enumerate(ROWS)})
    return {
        "jsonl": str(tmp_path / "r.jsonl"),
        "parquet": str(tmp_path / "r.parquet"),
        "datasets": str(tmp_path / "saved"),
        "webdataset": str(tmp_path / "r.tar"),
    }


def test_every_kind_of_file_gives_the_same_rows(files: dict[str, Any]) -> None:
    for kind, path in files.items():
        found = read(path, itself)
        assert [{k: v for k, v in row.items() if k != "members"} for row in found] == ROWS, kind
        (rows,) = open_rows(path)
        assert rows[3]["note"] == {"n": 3}, "rows are given again, in any order"


def test_a_tar_is_grouped_as_webdataset_groups_it(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    members = {"a/1.jpg": b"one", "a/1.seg.png": b"two", "a/1.json": b"{}", "a/2.jpg": b"three", "b/1.JPG": b"four"}
    path = tar(tmp_path / "s.tar", members | {"a/.hidden": b"", "a/_x.jpg": b"", "README": b"none"})
    theirs = [
        {k: v for k, v in sample.items() if not k.startswith("__") and k != "json"}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
        if not sample["__key__"].endswith(("/", "/_x", "README"))
    ]
    assert [row["members"] for row in read(str(path), itself)] == theirs


def test_a_pattern_names_several_files_and_columns_get_other_names(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": f"caption {number}"}) + "\n")
    told = SourceOfRows(path=str(tmp_path / "*.jsonl"), columns={"caption": "text"})
    assert [row["caption"] for row in read(told, itself)] == ["caption 0", "caption 1"]
    with pytest.raises(ConfigError, match=r"0.jsonl: 1 of 1 rows do not fit \(line 1\): it has no 'words', only text"):
        read(SourceOfRows(path=str(tmp_path / "0.jsonl"), columns={"caption": "words"}), itself)


def test_captions_are_lines_and_what_does_not_fit_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes(
        b"\xef\xbb\xbfa  red apple\n\n a red apple \r\nan old shoe\n\xff\xfe rose\n" + b"x" * 100_000 + b"\n"
    )
    with pytest.raises(ConfigError) as caught:
        read(str(path), itself)
    assert str(caught.value) == (
        f"{path}: 2 of 4 rows do not fit (lines 5, 6): it is not UTF-8; "
        "it has 100,000 characters; a caption has at most 2,000; bad_rows allows a share of 0"
    )
    assert [row["caption"] for row in read(str(path), itself, 0.5)] == ["a red apple", "an old shoe"]


def test_broken_lines_are_counted_and_left_out_up_to_a_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps(row).encode() for row in ROWS]
    lines[1], lines[3] = b'{"caption": ', b"[1, 2]"
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join([*lines, b'"\xff"']) + b"\n")
    monkeypatch.setattr(data_rows.logger, "propagate", True)
    with pytest.raises(
        ConfigError, match=r"3 of 6 rows do not fit \(lines 2, 4, 6\): it is not JSON .*; it is no JSON"
    ):
        read(str(path), itself, 0.49)
    with caplog.at_level("WARNING", "anygen.training"):
        assert read(str(path), itself, 0.5) == [ROWS[0], ROWS[2], ROWS[4]]
    assert "3 of 6 rows do not fit" in caplog.text and "they are left out" in caplog.text
    monkeypatch.setattr(data_rows, "LONGEST", 20)
    with pytest.raises(ConfigError, match="the line has 50 bytes, more than 20"):
        read(str(path), itself, 0.9)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["c.txt", "c.jsonl"])
def test_a_file_of_utf_16_is_refused_whole(name: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes("".join(f'{{"caption": "a thing {n}"}}\n' for n in range(5)).encode(encoding))
    with pytest.raises(ConfigError, match=rf"{name} is UTF-16, or holds NUL characters; save it as UTF-8"):
        read(str(tmp_path / name), itself, 0.9)


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl"])
def test_lines_of_utf_16_behind_others_do_not_fit(name: str, tmp_path: Path) -> None:
    lines = [f'{{"caption": "a thing {n}"}}\n' for n in range(4)]
    (tmp_path / name).write_bytes("".join(lines[:3]).encode() + lines[3].rstrip().encode("utf-16-le"))
    with pytest.raises(ConfigError, match=r"\(line 4\): it holds NUL characters, as UTF-16 does;"):
        read(str(tmp_path / name), itself)
    assert len(read(str(tmp_path / name), itself, 0.5)) == 3


def test_the_mark_of_utf_8_is_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n" for row in ROWS).encode())
    assert read(str(path), itself) == ROWS
    path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(ROWS[0]).encode())
    assert read(str(path), itself) == ROWS[:1]
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf\na red apple")
    assert read(str(tmp_path / "c.txt"), itself) == [{"caption": "a red apple"}]


@pytest.mark.parametrize(
    ("pack", "tool"), [(gzip.compress, "gunzip"), (bz2.compress, "bunzip2"), (lzma.compress, "unxz")]
)
def test_a_compressed_tar_is_refused(pack: Callable[[bytes], bytes], tool: str, tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", {"0.txt": b"a red apple"})
    path.write_bytes(pack(path.read_bytes()))
    with pytest.raises(ConfigError) as caught:
        read(str(path), itself)
    assert str(caught.value) == f"{path} is compressed; unpack it first, as with {tool} < s.tar > unpacked.tar"


def test_a_report_is_one_sentence_however_many_there_are() -> None:
    faults = Faults("f.jsonl", "line", 100, [(n, f"reason {n % 5}") for n in range(20)])
    assert faults.report() == (
        "f.jsonl: 20 of 100 rows do not fit (lines 0, 1, 2, 3, 4, 5, 6, 7 and 12 more): "
        "reason 0; reason 1; reason 2; and 2 other reasons"
    )
    faults.found = faults.found[:4]
    assert faults.report().endswith("reason 0; reason 1; reason 2; and 1 other reason")


def refuse(rows: Rows, number: int) -> None:
    raise RowFault("no")


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("gone.jsonl", None, "there is no file .*gone.jsonl with data"),
        ("a.csv", b"x", "the suffix '.csv' tells no kind of data; known: .jsonl"),
        ("e.jsonl", b"\n\n", "e.jsonl is empty"),
        ("t.tar", b"no tar", "t.tar is not a tar file, or is cut off"),
        ("p.parquet", b"no table", "p.parquet is not a readable Parquet file"),
    ],
)
def test_files_that_cannot_be_read_are_told(name: str, data: bytes | None, told: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("datasets")
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=told):
        read(str(tmp_path / name), itself)


def test_rows_that_are_all_bad_stop_whatever_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"1 of 1 rows do not fit \(line 1\): no"):
        read(str(tmp_path / "r.jsonl"), refuse, 0.99)
    (tmp_path / "d").mkdir()
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match="the dataset .*d cannot be read"):
        read(str(tmp_path / "d"), itself)
