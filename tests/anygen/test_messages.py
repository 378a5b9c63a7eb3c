import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

from anygen import media_base
from anygen.errors import MediaError, MessageError
from anygen.media import Image, Media, MediaLimits, register_media
from anygen.media_base import MEDIA
from anygen.messages import MediaPart, Message, Part, TextPart, is_batch, parse, parse_batch, parse_one

PICTURE = Image.from_any(np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8))
SHOWN = MediaPart("image", PICTURE)
DATA = PICTURE._repr_png_()
BASE64 = base64.b64encode(DATA).decode()
URI = f"data:image/png;base64,{BASE64}"


def user(*parts: Part) -> list[Message]:
    return [Message("user", parts)]


class Answer:
    """What a reply looks like to a conversation."""

    def to_message(self) -> Message:
        return Message("assistant", (TextPart("Here is an apple."), SHOWN))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return PICTURE.save(tmp_path / "picture.png")


def test_a_string_is_one_user_message() -> None:
    assert parse("Draw a cat") == user(TextPart("Draw a cat"))


def test_a_string_in_a_list_is_text_even_if_it_names_a_file(path: Path) -> None:
    assert parse([str(path)]) == user(TextPart(str(path)))


def test_lists_mix_text_and_whatever_stands_for_media(path: Path) -> None:
    for media in (PICTURE, PICTURE.pil, path, SHOWN, {"type": "image", "image": PICTURE}):
        assert parse(["What is this?", media]) == user(TextPart("What is this?"), SHOWN)
        assert parse(media) == user(SHOWN)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": PICTURE},
        {"type": "image", "image": PICTURE.pil},
        {"type": "image", "image": PICTURE.array},
        {"type": "image", "image": torch.from_numpy(PICTURE.array).permute(2, 0, 1)},
        {"type": "image", "image": DATA},
        {"type": "image", "image": URI},
        {"type": "image", "url": URI},
        {"type": "image", "base64": BASE64},
        {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
        {"type": "image_url", "image_url": URI},
    ],
)
def test_every_spelling_of_a_picture_is_the_same_part(part: dict[str, Any]) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}
    assert parse([message]) == parse(message) == user(TextPart("What is this?"), SHOWN)


def test_paths_in_parts(path: Path) -> None:
    for part in ({"image": str(path)}, {"path": path}, {"url": path.as_uri()}):
        assert parse({"role": "user", "content": [{"type": "image", **part}]}) == user(SHOWN)


def test_openais_sounds_and_clips_reach_their_media_type() -> None:
    soundfile = pytest.importorskip("soundfile", reason="sound files need soundfile")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.linspace(-0.5, 0.5, 100, dtype=np.float32), 8000, format="WAV", subtype="FLOAT")
    data = base64.b64encode(buffer.getvalue()).decode()
    uri = f"data:audio/wav;base64,{data}"
    for part in (
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": uri}},
        {"type": "audio_url", "audio_url": {"url": uri}},
        {"type": "audio", "audio": buffer.getvalue()},
    ):
        [message] = parse({"role": "user", "content": [part]})
        assert [part.modality for part in message.parts if isinstance(part, MediaPart)] == ["audio"]
        np.testing.assert_allclose(message.media[0].mono, np.linspace(-0.5, 0.5, 100))  # type: ignore[attr-defined]
    gif = io.BytesIO()
    PICTURE.pil.save(gif, "GIF", save_all=True, append_images=[PICTURE.pil.rotate(180)], duration=100)
    uri = "data:image/gif;base64," + base64.b64encode(gif.getvalue()).decode()
    [message] = parse({"role": "user", "content": [{"type": "video_url", "video_url": {"url": uri}}]})
    assert repr(message.media[0]) == "Video(2 frames, 5×4, 10 fps)"


def test_a_conversation_keeps_roles_order_and_generated_media() -> None:
    history = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Draw an apple"},
        Answer(),
        Message("user", (TextPart("And what is "), SHOWN, TextPart("this?"))),
    ]
    messages = parse(history)
    assert [message.role for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[2] == Answer().to_message() and messages[2].media == (PICTURE,)
    assert messages[3].text == "And what is this?"
    assert messages == parse([message.to_dict() for message in messages]) == parse(messages)


def test_text_puts_a_space_where_media_stood_between_words() -> None:
    parts = (TextPart("Here."), SHOWN, TextPart(""), TextPart("And"), TextPart(" there."))
    assert Message("assistant", parts).text == "Here. And there."
    assert Message("assistant", (SHOWN,)).text == ""


def test_empty_text_beside_media_is_dropped() -> None:
    assert parse(["", PICTURE]) == user(SHOWN)


# --- batches -------------------------------------------------------------------------------------------------


def test_what_is_a_batch() -> None:
    message = {"role": "user", "content": "Hello"}
    assert is_batch(["Draw a cat", "Draw a dog"]) and is_batch(["Draw a cat"])
    assert is_batch([[message], [message]]) and is_batch(["Draw a cat", ["What?", PICTURE]])
    for one in ("Draw", [], ["What?", PICTURE], [message], [message, Answer()], [Path("a.png")], message, PICTURE):
        assert not is_batch(one)


def test_a_batch_is_one_conversation_each() -> None:
    assert parse_batch(["a", "b"]) == [parse_one("a"), parse_one("b")]
    assert parse_batch([["a", PICTURE], "b"]) == [parse_one(["a", PICTURE]), parse_one("b")]
    assert parse_batch(["a", PICTURE]) == [parse_one(["a", PICTURE])]
    assert parse_batch("a") == [parse_one("a")]
    assert parse_one(["a", "b"]) == user(TextPart("a"), TextPart("b"))


def test_a_conversation_to_be_answered_ends_with_the_user() -> None:
    history = [{"role": "user", "content": "Draw an apple"}, Answer()]
    assert len(parse(history)) == 2
    with pytest.raises(MessageError, match="the last message is the assistant's; .* ends with the user's"):
        parse_one(history)


# --- bad input -----------------------------------------------------------------------------------------------


def said(*parts: object) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty; say something, or pass media"),
        (" \n", "the prompt is empty"),
        (["", " "], "the prompt is empty"),
        ([], "the prompt is an empty list"),
        ([said("Hello"), said()], "message 2 is empty"),
        ({"role": "user", "content": ""}, "the message is empty"),
        (None, "the prompt is None; wanted: a string, a media value"),
        (["What?", 3], "the prompt, part 2, is 3; wanted: a string, a media value"),
        ({"role": "robot", "content": "Hi"}, "message has the unknown role 'robot'; known: system, user, a"),
        ({"role": ["user"], "content": "Hi"}, "unknown role ['user']"),
        ([said("Hi"), {"role": "user"}], 'message 2 has no "content"; wanted: {"role": "user", "content": …}'),
        ([said("Hi"), {"content": "Hi"}], 'message 2 has no "role"'),
        ([said("Hi"), "there"], "message 2 is 'there' among messages; a list holds either messages or the parts"),
        ({"content": "Hi"}, 'the prompt has no "type"; wanted: {"type": "text", "text": …}'),
        (said({"text": "Hi"}), 'the message has no "type"'),
        (said({"type": "text"}), 'the message has no "text"; wanted: {"type": "text"'),
        (said("Hi", {"type": "smell", "smell": 1}), "message, part 2, is of the unknown type 'smell'; known: text, "),
        (said({"type": "image"}), 'message has no image; wanted: {"type": "image", "image": …}, or with "path"'),
        (said({"type": "image_url"}), 'has no "url"; wanted: {"type": "image_url", "image_url": {"url": …}}'),
        (said({"type": "input_audio", "input_audio": {}}), 'has no "data"; wanted: {"type": "input_audio"'),
        (said(None), "the message is None; wanted: a string"),
        ([DATA], "the prompt is bytes, which may be any modality; wrap it: Image.from_any"),
        (["a", np.zeros((2, 2))], "part 2, is ndarray, which may be any modality"),
        (torch.zeros(2), "the prompt is Tensor, which may be any modality"),
        ([Path("notes.xyz")], "the path notes.xyz, whose suffix '.xyz' tells no modality; say which it is"),
        ([["a"], ["b"]], "the prompt, part 1, is list; wanted: a string"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_prompt_is_told(prompt: object, message: str) -> None:
    with pytest.raises(MessageError) as raised:
        parse(prompt)
    assert message in str(raised.value)


def test_media_errors_pass_through_with_their_text(path: Path) -> None:
    with pytest.raises(MediaError, match="there is no file none.png"):
        parse(["What?", Path("none.png")])
    with pytest.raises(MediaError, match="is a URL, and fetching is off"):
        parse(said({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}))
    with pytest.raises(MediaError, match="at most 19 are decoded"):
        parse([path], limits=MediaLimits(max_pixels=19))
    with pytest.raises(MediaError, match="the base64 is of type int; a string of base64 is wanted"):
        parse(said({"type": "image", "base64": 3}))
    with pytest.raises(MediaError, match="the input_audio data is not valid base64"):
        parse(said({"type": "input_audio", "input_audio": {"data": "éééé"}}))


def test_a_message_of_an_unknown_role_cannot_be_made() -> None:
    with pytest.raises(MessageError, match="a message has the unknown role 'tool'"):
        Message("tool", (TextPart("Hi"),))  # type: ignore[arg-type]


def test_a_plugins_modality_is_a_type_of_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_base, "MEDIA", table := dict(MEDIA))
    monkeypatch.setattr("anygen.media.MEDIA", table)
    monkeypatch.setattr("anygen.messages.MEDIA", table)

    @register_media
    @dataclass(frozen=True)
    class Scent(Media):
        modality = "scent"
        suffixes = (".txt",)
        notes: tuple[str, ...]

        @classmethod
        def _decode(cls, data: bytes, name: str, limits: MediaLimits) -> Self:
            return cls(tuple(data.decode().split()))

        @classmethod
        def _convert(cls, value: object) -> Self:
            raise MediaError("a scent is a text of its notes")

        def _write(self, path: Path, suffix: str, metadata: Mapping[str, Any]) -> None:
            path.write_text(" ".join(self.notes))

    rose = MediaPart("scent", Scent(("rose", "musk")))
    for part in (
        {"type": "scent", "scent": b"rose musk"},
        {"type": "scent_url", "scent_url": {"url": "data:,rose%20musk"}},
        rose.media,
    ):
        assert parse(["What is this?", part]) == user(TextPart("What is this?"), rose)
    with pytest.raises(MediaError, match="a scent is wanted, this is an image"):
        parse(said({"type": "scent", "scent": PICTURE}))
    with pytest.raises(MessageError, match="unknown type 'taste'; known: text, image, video, audio, scent, image_url"):
        parse(said({"type": "taste"}))
