"""The chat format of data, wherever its media lie, and what does not fit it."""

import base64
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anygen.errors import ConfigError
from anygen.media import Image
from anygen.messages import MediaPart, Message, TextPart
from anygen.model_config import AnyGenConfig
from anygen.training.chat_rows import Shown, captioned, check_fit, conversation, preference, shown
from anygen.training.data_rows import RowFault, read
from anygen.training.encoder_alignment import EncoderAlignmentRecipe, prepare

PICTURE = Image.from_any(np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3))
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": "p.png"}, {"type": "text", "text": "Play this."}]},
        {"role": "assistant", "content": ["Here.", {"type": "audio", "caption": "a  guitar"}]},
    ]
}


@pytest.fixture
def png(tmp_path: Path) -> bytes:
    PICTURE.save(tmp_path / "p.png")
    return (tmp_path / "p.png").read_bytes()


def chat_with(picture: Any, key: str = "image") -> dict[str, Any]:
    row = json.loads(json.dumps(CHAT))
    row["messages"][0]["content"][0] = {"type": "image", key: picture}
    return row


def lines(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def of_every_kind(folder: Path, png: bytes) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    encoded = base64.b64encode(png).decode()
    kinds = {
        "a file": lines(folder / "file.jsonl", CHAT),
        "base64": lines(folder / "b.jsonl", chat_with(encoded, "base64")),
        "a data URI": lines(folder / "u.jsonl", chat_with(f"data:image/png;base64,{encoded}")),
    }
    table = chat_with({"bytes": png, "path": None})
    table["messages"][1]["content"][0] = {"type": "text", "text": "Here."}
    datasets.Dataset.from_list([table]).to_parquet(str(folder / "t.parquet"))
    column = {"messages": json.dumps(chat_with(None)["messages"]), "images": [{"bytes": png, "path": None}]}
    datasets.Dataset.from_list([column]).save_to_disk(str(folder / "column"))
    with tarfile.open(folder / "t.tar", "w") as file:
        for name, data in {"0.json": json.dumps(chat_with("png")).encode(), "0.png": png}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return kinds | {
        "bytes of a table": str(folder / "t.parquet"),
        "a column of a dataset": str(folder / "column"),
        "a member of a tar": str(folder / "t.tar"),
    }


def test_media_are_the_same_wherever_they_lie(tmp_path: Path, png: bytes) -> None:
    for kind, path in of_every_kind(tmp_path, png).items():
        ((question, answer),) = read(path, conversation)
        picture, text = question.parts
        assert isinstance(picture, MediaPart) and text == TextPart("Play this."), kind
        assert shown(picture).load("image") == PICTURE, kind
        assert shown(picture).key and shown(picture).caption is None
        assert answer.parts == (TextPart("Here."), MediaPart("audio", Shown(caption="a guitar")))  # type: ignore[arg-type]


def test_media_with_captions_are_read_from_rows_and_from_members(tmp_path: Path, png: bytes) -> None:
    rows = lines(tmp_path / "c.jsonl", {"image": "p.png", "caption": "a\n gradient"}, {"caption": "words alone"})
    (medium,) = read(rows, captioned("image"), 0.5)
    assert medium.caption == "a gradient" and medium.load("image") == PICTURE
    assert [m.key != "" for m in read(rows, captioned("image", medium=False))] == [True, False]
    with tarfile.open(tmp_path / "c.tar", "w") as file:
        for name, data in {"0.txt": b"a gradient", "0.png": png}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    (medium,) = read(str(tmp_path / "c.tar"), captioned("image"))
    assert medium.caption == "a gradient" and medium.load("image") == PICTURE


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({}, "it has no 'messages'; wanted: "),
        ({"messages": []}, "its 'messages' is empty; wanted: {\"messages\": ["),
        ({"messages": 3}, "its 'messages' is int; wanted: {\"messages\": ["),
        ({"messages": "Hi"}, "its 'messages' is a string that is no JSON; wanted: {\"messages\": ["),
        ({"messages": [ANSWER]}, "it has no message of the user that its answer could be to"),
        ({"messages": [{"role": "system", "content": "Be brief."}, ANSWER]}, "it has no message of the user"),
        ({"messages": [user("Hi"), ANSWER, user("And?")]}, "its last message is the user's"),
        ({"messages": [user("Hi"), {"role": "assistant"}]}, "message 2 lacks 'role' or 'content'"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "unknown role 'robot'; known: system, user, assistant"),
        ({"messages": [user(""), ANSWER]}, "message 1 is empty"),
        ({"messages": [user(3), ANSWER]}, "message 1 has a part that is neither text nor has a 'type'"),
        ({"messages": [user({"type": "text"}), ANSWER]}, "message 1 has a text part without 'text'"),
        ({"messages": [user({"type": "taste", "taste": "x"}), ANSWER]}, "message 1: there is no modality 'taste'"),
        ({"messages": [user({"type": "image"}), ANSWER]}, "message 1 has image with neither a file nor a caption"),
        ({"messages": [user({"type": "image", "image": "q.png"}), ANSWER]}, "the file q.png is missing"),
        ({"messages": [user({"type": "image", "image": "http://x/q.png"}), ANSWER]}, "a medium is an address"),
        ({"messages": [user({"type": "image", "base64": "?"}), ANSWER]}, "a medium's base64 is broken"),
        ({"messages": [user({"type": "image", "image": 3}), ANSWER]}, "a medium is given as int"),
    ],
)
def test_a_row_that_does_not_fit_says_why(row: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(lines(tmp_path / "r.jsonl", row), conversation)
    assert told in str(caught.value) and "(line 1)" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"chosen": "lacking"}, "it has no 'chosen'; wanted: {.prompt.: .* .chosen.: .* .rejected.: "),
        ({"chosen": None}, "its 'chosen' is empty; wanted: {.prompt.: "),
        ({"rejected": []}, "its 'rejected' is empty; wanted: {.prompt.: "),
        ({"prompt": "Hi"}, "its 'prompt' is a string that is no JSON; wanted: {.prompt.: "),
        ({"rejected": [{"role": "assistant", "content": ""}]}, "message 1 of 'rejected' is empty"),
        ({"prompt": [user("Hi"), ANSWER]}, "its prompt ends with the assistant's message, not with the user's"),
        ({"chosen": [ANSWER, ANSWER]}, "its 'chosen' must be one message of the assistant"),
        ({"rejected": [ANSWER]}, "its two answers are the same"),
    ],
)
def test_a_preference_that_does_not_fit_says_why(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    good = {"prompt": [user("Hi")], "chosen": [ANSWER], "rejected": {"role": "assistant", "content": "No."}}
    (found,) = read(lines(tmp_path / "g.jsonl", good), preference)
    assert (found.chosen.text, found.rejected.text, found.prompt[0].text) == ("Yes.", "No.", "Hi")
    row = {key: value for key, value in (good | changes).items() if value != "lacking"}
    with pytest.raises(ConfigError, match=told):
        read(lines(tmp_path / "b.jsonl", row), preference)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([Message("user", (MediaPart("video", Shown(key="k")),))], "the model does not read video, only image"),  # type: ignore[arg-type]
        ([Message("user", (MediaPart("image", Shown("words")),))], "the image in its question is a caption alone"),  # type: ignore[arg-type]
        ([Message("assistant", (MediaPart("video", Shown("w")),))], "the model does not make video, only image, audio"),  # type: ignore[arg-type]
        ([Message("assistant", (MediaPart("image", Shown(key="k")),))], "the image in its answer has no caption"),  # type: ignore[arg-type]
    ],
)
def test_what_a_model_cannot_learn_from_is_told(messages: list[Message], told: str, tiny_config: AnyGenConfig) -> None:
    with pytest.raises(RowFault, match=told):
        check_fit(messages, tiny_config)


def test_an_encoders_answer_may_hold_other_braces(tmp_path: Path, png: bytes, tiny_config: AnyGenConfig) -> None:
    data = {"image": lines(tmp_path / "c.jsonl", {"image": "p.png", "caption": "a {gradient}"})}
    recipe = EncoderAlignmentRecipe(model="m", data=data, answer="{x} is {caption} {}")  # type: ignore[arg-type]
    (item,) = prepare(recipe, tiny_config).items
    assert item.talk(random.Random(0))[-1].text == "{x} is a {gradient} {}"
