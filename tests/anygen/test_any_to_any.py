"""Any modality in, any out, on the tiny model of all of them in `conftest.py`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anygen import AnyGenPipeline
from anygen.errors import MessageError
from anygen.media import Audio, Image, Media, Video, read_metadata
from anygen.messages import TextPart
from anygen.reply import Reply
from anygen.streaming import Finished, MediaDone, MediaStarted, MediaStep, TextDelta

ALL = ["image", "video", "audio"]
KINDS = {"Say": "text", "Draw": "image", "Film": "video", "Play": "audio"}
SHORT: Any = {"seed": 4, "max_new_tokens": 4}


def kinds(reply: Reply) -> list[str]:
    return ["text" if isinstance(part, TextPart) else part.modality for part in reply.content]


def close(ours: Reply, theirs: Reply) -> None:
    """Equal but for the last bit of a batch's arithmetic."""
    assert kinds(ours) == kinds(theirs) and ours.text == theirs.text
    for a, b in zip(ours.media, theirs.media, strict=True):
        match a, b:
            case Image(), Image():
                np.testing.assert_allclose(a.array.astype(int), b.array.astype(int), atol=1)
            case Video(), Video():
                np.testing.assert_allclose(a.frames.astype(int), b.frames.astype(int), atol=1)
            case Audio(), Audio():
                np.testing.assert_allclose(a.samples, b.samples, atol=1e-4)


@pytest.mark.parametrize("read", ["text", *ALL])
@pytest.mark.parametrize("words", KINDS)
def test_every_pair_of_the_matrix(anything: AnyGenPipeline, examples: dict[str, Media], words: str, read: str) -> None:
    prompt = words if read == "text" else [words, examples[read]]
    reply = anything(prompt, **SHORT)
    assert kinds(reply)[0] == KINDS[words]
    assert ("encoders" in reply.timings) == (read != "text")


def test_another_medium_of_the_same_modality_gives_another_answer(
    anything: AnyGenPipeline, examples: dict[str, Media]
) -> None:
    image, video, audio = (examples[modality] for modality in ALL)
    assert isinstance(image, Image) and isinstance(video, Video) and isinstance(audio, Audio)
    others = [Image(image.pil.rotate(180)), Video(255 - video.frames, video.fps), Audio(audio.samples[:, ::-1], 8000)]
    for medium, other in zip((image, video, audio), others, strict=True):
        first, second = anything.plan(["Draw", medium], **SHORT), anything.plan(["Draw", other], **SHORT)
        states = [next(iter(part.condition.tensors.values())) for part in (first.content[0], second.content[0])]  # type: ignore[union-attr]
        assert (states[0] - states[1]).abs().max() > 1e-4


def test_one_answer_holds_all_three_in_the_order_asked_for(anything: AnyGenPipeline) -> None:
    reply = anything("All three", seed=4, max_new_tokens=14)
    assert kinds(reply)[:3] == ALL and "text" in kinds(reply)
    (image, *_), (video, *_), (audio, *_) = reply.images, reply.videos, reply.audios
    assert image.size == (16, 16)
    assert (video.frames.shape, video.fps) == ((3, 16, 16, 3), 6)
    assert (audio.samples.shape, audio.sampling_rate) == ((1, 1600), 16_000) and abs(audio.samples).max() <= 0.951


def test_a_batch_goes_through_each_generator_once_and_answers_as_each_prompt_alone(
    anything: AnyGenPipeline, examples: dict[str, Media], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Any] = [["All three"], ["Film"], ["Say"], ["Play", examples["image"]], ["Draw", examples["audio"]]]
    alone = [anything(prompt if len(prompt) > 1 else prompt[0], **SHORT | {"max_new_tokens": 9}) for prompt in prompts]
    calls: list[tuple[str, int]] = []
    for modality in ALL:
        cls = type(anything.generator(modality))

        def counting(self: Any, condition: Any, generate: Any = cls.generate, **options: Any) -> Any:
            calls.append((self.modality, len(condition)))
            return generate(self, condition, **options)

        monkeypatch.setattr(cls, "generate", counting)
    together = anything(prompts, **SHORT | {"max_new_tokens": 9})
    for ours, theirs in zip(together, alone, strict=True):
        close(ours, theirs)
    counts = {modality: sum(kinds(reply).count(modality) for reply in alone) for modality in ALL}
    assert dict(calls) == counts and len(calls) == 3 and min(counts.values()) >= 2


def test_a_stream_makes_each_medium_as_soon_as_it_is_asked_for(anything: AnyGenPipeline) -> None:
    options: Any = {"seed": 4, "max_new_tokens": 14, "steps": 2}
    events = list(anything.stream("All three", **options))
    told = [event for event in events if not isinstance(event, TextDelta | Finished)]
    wanted: list[tuple[type, int]] = []
    for index in range(3):
        wanted += [(MediaStarted, index), (MediaStep, index), (MediaStep, index), (MediaDone, index)]
    assert [(type(event), event.index) for event in told][:12] == wanted
    assert [event.modality for event in told if isinstance(event, MediaStarted)][:3] == ALL
    done = next(place for place, event in enumerate(events) if isinstance(event, MediaDone))
    last_words = max(place for place, event in enumerate(events) if isinstance(event, TextDelta))
    assert done < last_words
    assert isinstance(finished := events[-1], Finished)
    close(finished.reply, anything("All three", **options))


def test_all_media_are_saved_with_their_origin_and_read_back(anything: AnyGenPipeline, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="MP4 needs PyAV")
    pytest.importorskip("soundfile", reason="WAV needs soundfile")
    reply = anything("All three", seed=4, max_new_tokens=9)
    paths = reply.save(tmp_path)[:3]
    assert [path.name for path in paths] == ["01-all-three.png", "02-all-three.mp4", "03-all-three.wav"]
    for place, path in enumerate(paths):
        told = read_metadata(path)
        assert (told["prompt"], told["model"], told["seed"]) == ("All three", "anything", 4)
        assert told.get("media", 0) == place
    assert Image.from_path(paths[0]) == reply.images[0]
    clip = Video.from_path(paths[1])
    assert (clip.fps, clip.frames.shape) == (6, (3, 16, 16, 3))
    np.testing.assert_allclose(Audio.from_path(paths[2]).samples, reply.audios[0].samples, atol=1e-4)


def test_a_notebook_shows_pictures_and_plays_clips_and_sounds(anything: AnyGenPipeline) -> None:
    pytest.importorskip("av", reason="MP4 needs PyAV")
    pytest.importorskip("soundfile", reason="WAV needs soundfile")
    shown = anything("All three", seed=4, max_new_tokens=9)._repr_html_()
    places = [
        shown.index(tag)
        for tag in (
            '<img src="data:image/png;base64,',
            '<video controls loop autoplay muted src="data:video/mp4;base64,',
            '<audio controls src="data:audio/wav;base64,',
        )
    ]
    assert places == sorted(places)


def test_what_was_made_goes_back_in_and_stays_in_the_conversation(
    anything: AnyGenPipeline, examples: dict[str, Media]
) -> None:
    chat = anything.chat(**SHORT)
    first = chat.send("All three", max_new_tokens=9)
    second = chat.send(["Say", examples["video"], first.audios[0], first.images[0]])
    assert [message.role for message in chat.history] == ["user", "assistant"] * 2
    assert chat.history[1].media == tuple(first.media) and len(chat.history[2].media) == 3
    told = [
        {"role": "user", "content": "All three"},
        first,
        {"role": "user", "content": ["Say", examples["video"], first.audios[0], first.images[0]]},
    ]
    wanted: Any = anything(told, **SHORT)
    assert (wanted.text, wanted.seed) == (second.text, second.seed)
    assert [medium.modality for medium in wanted.media] == [medium.modality for medium in second.media]
    for ours, theirs in zip(second.audios, wanted.audios, strict=True):  # read in two parts, sums round otherwise
        np.testing.assert_allclose(ours.samples, theirs.samples, atol=1e-3)


def test_forty_pictures_are_read_a_few_at_a_time_and_answered_together(
    anything: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [Image.from_any(np.full((16, 16, 3), shade, np.uint8)) for shade in range(40)]
    encoder: Any = anything.model.encoders["image"]
    sizes: list[int] = []
    preprocess = encoder.preprocess

    def counting(media: Any) -> Any:
        sizes.append(len(media))
        return preprocess(media)

    monkeypatch.setattr(encoder, "preprocess", counting)
    reply = anything.plan(["What are these?", *pictures], **SHORT)
    assert sizes == [16, 16, 8] and reply.content
    again = anything.plan(["What are these?", *pictures], **SHORT, batch_size=64)
    assert sizes[3:] == [40] and again.text == reply.text
    other = anything.model.prompts.prompt([_message(["What are these?", *pictures])])
    assert sum(token < 0 for token in other.ids) == 40  # one slot each, and none was dropped


def test_more_pictures_than_the_llm_can_read_are_refused_before_they_are_encoded(
    anything: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anything.model.encoders["image"], "preprocess", lambda _: pytest.fail("encoded"))
    pictures = [Image.from_any(np.zeros((16, 16, 3), np.uint8))] * 300
    told = r"the conversation has \d+ tokens \(300 of them stand for 300 media\), and the LLM reads at most 256"
    for use in (anything, anything.plan, anything.stream):
        with pytest.raises(MessageError, match=told):
            use(["What are these?", *pictures])


def _message(parts: list[Any]) -> Any:
    from anygen.messages import parse_one

    return parse_one(parts)[0]
