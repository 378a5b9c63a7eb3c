"""Replies without a model: made by hand."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen.errors import CheckpointError, ConfigError, MessageError, OutputError
from anygen.features import Condition
from anygen.media import Audio, Image, Video, read_metadata
from anygen.messages import MediaPart, TextPart, parse
from anygen.reply import MadePart, PlannedPart, Reply, caption_of, next_number, slug

RED = Image.from_any(np.full((4, 4, 3), (200, 10, 10), np.uint8))
BLUE = Image.from_any(np.full((4, 4, 3), (10, 10, 200), np.uint8))
BEEP = Audio(np.zeros((1, 8), np.float32), 8)
CLIP = Video(np.zeros((2, 4, 4, 3), np.uint8), 2)


def reply(*parts: Any, **changes: Any) -> Reply:
    settings: dict[str, Any] = {"prompt": "Draw a red apple", "model": "tiny", "seed": 7}
    return Reply(content=parts, **(settings | changes))


def picture(caption: str = "Here is a red apple.", image: Image = RED, seed: int = 7) -> MadePart:
    return MadePart("image", image, caption, seed)


def condition() -> Condition:
    return Condition({"prompt_embeds": torch.arange(6.0).reshape(1, 2, 3), "mask": torch.tensor([[True, False]])})


def test_views_keep_the_order_of_the_content() -> None:
    made = reply(
        TextPart("One."),
        picture(image=RED),
        TextPart("Two."),
        MadePart("audio", BEEP, "Two.", 8),
        picture(image=BLUE),
        MadePart("video", CLIP, "Two.", 9),
    )
    assert made.text == "One. Two."
    assert made.images == [RED, BLUE] and made.audios == [BEEP] and made.videos == [CLIP]
    assert made.media == [RED, BEEP, BLUE, CLIP]
    assert str(made) == (
        "One.\n[Image(4×4)]\nTwo.\n[Audio(1.00 s, 1 × 8 Hz)]\n[Image(4×4)]\n[Video(2 frames, 4×4, 2 fps)]"
    )


def test_a_reply_stands_in_a_conversation_as_it_is() -> None:
    made = reply(TextPart("Here."), picture())
    assert made.to_message().parts == (TextPart("Here."), MediaPart("image", RED))
    messages = parse([{"role": "user", "content": "Draw"}, made, {"role": "user", "content": "Again"}])
    assert [message.role for message in messages] == ["user", "assistant", "user"]
    assert messages[1] == made.to_message()


def test_replies_with_equal_contents_are_equal_whatever_time_they_took() -> None:
    assert reply(picture(), timings={"llm": 1.0}) == reply(picture(), timings={"llm": 2.0})
    assert reply(picture()) != reply(picture(image=BLUE))
    assert len({reply(picture()), reply(picture(), options={"steps": 2}), reply(picture())}) == 2


def test_files_are_numbered_on_and_named_by_their_captions(tmp_path: Path) -> None:
    out = tmp_path / "some" / "folder"
    made = reply(
        picture(), picture("Here are two green dogs, in the flat style.", BLUE, 8), MadePart("audio", BEEP, "", 9)
    )
    assert [path.name for path in made.save(out)] == ["01-a-red-apple.png", "02-two-green-dogs.png", "03-audio.wav"]
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert [path.name for path in reply(picture()).save(out)] == ["04-a-red-apple.png"]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert Image.from_path(out / "02-two-green-dogs.png") == BLUE


def test_one_medium_alone_is_saved_as_it_would_be_among_all(tmp_path: Path) -> None:
    made = reply(picture(), picture("Here is a blue dog.", BLUE, 8), MadePart("audio", BEEP, "A beep.", 9))
    together = made.save(tmp_path / "all")
    alone = [made.save_medium(place, tmp_path / "one") for place in range(3)]
    assert [path.name for path in alone] == [path.name for path in together]
    assert [read_metadata(path) for path in alone] == [read_metadata(path) for path in together]
    assert made.save_medium(1, tmp_path / "one").name == "04-a-blue-dog.png"
    assert made.save_medium(1, tmp_path / "one", overwrite=True).name == "02-a-blue-dog.png"


def test_overwriting_has_to_be_asked_for(tmp_path: Path) -> None:
    reply(picture()).save(tmp_path)
    again = reply(picture(image=BLUE))
    assert [path.name for path in again.save(tmp_path, overwrite=True)] == ["01-a-red-apple.png"]
    assert Image.from_path(tmp_path / "01-a-red-apple.png") == BLUE
    assert len(list(tmp_path.iterdir())) == 1


def test_a_number_that_another_process_took_is_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "01-a-red-apple.png").write_text("somebody else's")
    monkeypatch.setattr("anygen.reply.next_number", lambda _: 1)  # looked before the other wrote
    assert [path.name for path in reply(picture()).save(tmp_path)] == ["02-a-red-apple.png"]
    assert (tmp_path / "01-a-red-apple.png").read_text() == "somebody else's"


def test_a_disk_that_refuses_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image, "_write", full)
    with pytest.raises(OutputError, match=r"01-a-red-apple\.png cannot be written: No space left on device"):
        reply(picture()).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_files_say_how_they_came_about(tmp_path: Path) -> None:
    paths = reply(picture(), picture(image=BLUE, seed=8), options={"steps": 3}).save(tmp_path)
    told = read_metadata(paths[0])
    assert told.pop("anygen")
    assert told == {
        "prompt": "Draw a red apple",
        "caption": "Here is a red apple.",
        "seed": 7,
        "model": "tiny",
        "steps": 3,
    }
    assert read_metadata(paths[1])["media"] == 1  # made with seed + 1


def test_words_alone_leave_no_folder(tmp_path: Path) -> None:
    assert reply(TextPart("Paris.")).save(tmp_path / "out") == []
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="out cannot be a directory, a file is in the way"):
        reply(picture()).save(tmp_path / "out")
    with pytest.raises(OutputError, match="deeper cannot be a directory, a file is in the way"):
        reply(picture()).save(tmp_path / "out" / "deeper")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="out cannot be made: Permission denied"):
        reply(picture()).save(tmp_path / "out")


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("Here is a red apple.", "a-red-apple"),
        ("Sure! Here are two dogs, in the flat style, on a blue background.", "two-dogs"),
        ("Here's a piñata", "a-piñata"),
        ("And here is a banana.", "a-banana"),
        ("Is there a cat here is the question", "is-there-a-cat-here-is-the-question"),
        ("This is a cat. Do you like it?", "a-cat"),
        ("  Draw   me:  ../../etc/passwd ", "draw-me-etc-passwd"),
        (
            "a very long caption that goes on and on and never comes to an end",
            "a-very-long-caption-that-goes-on-and-on",
        ),
        ("!!!", ""),
        ("", ""),
    ],
)
def test_a_file_is_named_by_the_first_words_that_matter(caption: str, name: str) -> None:
    assert slug(caption) == name


def test_a_caption_is_the_text_right_before() -> None:
    assert caption_of([TextPart("A cat."), picture(), TextPart(" A  dog.\n")], "Draw") == "A dog."
    assert caption_of([TextPart("A cat."), picture()], "Draw") == "A cat."
    assert caption_of([TextPart(" ")], "Draw a\nbird") == "Draw a bird"


def test_numbers_go_on_after_the_highest(tmp_path: Path) -> None:
    assert next_number(tmp_path) == 1
    for name in ("03-a.png", "10-b.png", "notes.txt", "x-99-y.png"):
        (tmp_path / name).touch()
    assert next_number(tmp_path) == 11


def test_a_plan_survives_the_disk(tmp_path: Path) -> None:
    plan = reply(
        TextPart("Here is naïve — art:"),
        PlannedPart("image", condition(), "art"),
        TextPart("Done."),
        finish="length",
        timings={"llm": 0.5},
    )
    path = plan.save_plan(tmp_path / "art.safetensors")
    again = Reply.load_plan(path)
    assert (again.text, again.prompt, again.model, again.seed, again.finish, again.timings) == (
        plan.text,
        plan.prompt,
        plan.model,
        plan.seed,
        plan.finish,
        plan.timings,
    )
    first, part, last = again.content
    assert (first, last) == (plan.content[0], plan.content[2])
    assert isinstance(part, PlannedPart) and (part.modality, part.caption) == ("image", "art")
    assert list(part.condition.tensors) == ["prompt_embeds", "mask"]
    for name, value in condition().tensors.items():
        assert torch.equal(part.condition.tensors[name], value) and part.condition.tensors[name].dtype == value.dtype
    with pytest.raises(OutputError, match=r"art.safetensors exists already"):
        plan.save_plan(path)
    assert plan.save_plan(path, overwrite=True) == path


def test_a_plan_of_words_alone_survives_the_disk(tmp_path: Path) -> None:
    assert Reply.load_plan(reply(TextPart("Paris.")).save_plan(tmp_path / "plan")) == reply(TextPart("Paris."))


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(CheckpointError, match=r"there is no plan .*nowhere"):
        Reply.load_plan(tmp_path / "nowhere")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="text is not a plan that Reply.save_plan wrote"):
        Reply.load_plan(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="other is not a plan that Reply.save_plan wrote"):
        Reply.load_plan(tmp_path / "other")
    with pytest.raises(ConfigError, match="this is a reply, its media are made"):
        reply(picture()).save_plan(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_plan_says_that_its_media_are_not_made_yet(tmp_path: Path) -> None:
    plan = reply(TextPart("Here."), PlannedPart("image", condition(), "Here."))
    assert plan.is_plan and not reply(picture()).is_plan
    assert str(plan) == "Here.\n[image to be made]" and "image to be made" in plan._repr_html_()
    for use in (lambda: plan.images, lambda: plan.save(tmp_path)):
        with pytest.raises(ConfigError, match=r"its media are not made yet; pipe.render\(plan\) makes them"):
            use()
    with pytest.raises(MessageError, match="a plan cannot stand in a conversation"):
        plan.to_message()


def test_a_notebook_shows_text_as_text_and_media_as_media() -> None:
    shown = reply(TextPart("a < b"), picture("<i>"), MadePart("audio", BEEP, "", 8))._repr_html_()
    assert "a &lt; b" in shown and "&lt;i&gt;" in shown
    assert '<img src="data:image/png;base64,' in shown and "<audio controls" in shown
