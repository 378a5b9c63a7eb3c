"""The data of `stages.py`: what a user might bring, in the formats of docs/training.md, of all that anygen-mini knows.

Things are shown in trained styles and in combinations that were trained on, never in those of `anygen eval`.
"""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from anygen.llm import LLM
from anygen.loading import choose_dtype, model_directory
from anygen.messages import MediaPart, Message
from anygen.model import AnyGenModel
from anygen.training.captions import Drawing, subject
from anygen.training.contrastive import augment
from anygen.training.evaluation_answers import as_medium
from anygen.training.icons import IconSet
from anygen.training.magpie import self_answers
from anygen.training.motion import MotionSource
from anygen.training.pictures import PictureSource, is_held_out
from anygen.training.requests import MIXTURE, Conversation, Conversations, Seen, self_prompts, told
from anygen.training.sound_mixing import SoundSource
from anygen.training.sounds import SoundBank
from anygen.training.wishes import ImageWishes, wishes_of

MODEL = "anygen-mini"
SEED = 20_000
"""Of the data; the model's own training counted from 0."""
MEDIA = {"image": "png", "video": "webp", "audio": "wav"}
"""Modality -> how its files are written."""


def make_data(folder: Path, sets: Path, rows: int, device: torch.device) -> None:
    """Writes pictures.jsonl, captions.txt, chats.jsonl, talk.jsonl and preferences.jsonl, and the media of three.

    Args:
        folder: of the results; what it holds already is left as it is.
        sets: the folder of icons and sounds.
        rows: pictures with captions; there are twice as many captions, half as many chats, a quarter as many pairs.
        device: of the LLM, whose own words answer plain questions.
    """
    if (folder / "preferences.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    icons, bank = IconSet.load(sets / "icons"), SoundBank.load(sets / "sounds")
    wishes, pool = wishes_of([*MEDIA], icons, bank), make_media(folder, icons, bank, rows)
    write(folder / "pictures.jsonl", [{"image": _file(s), "caption": named(s.content)} for s in pool["image"]])
    write(folder / "captions.txt", captions(ImageWishes(icons.concepts), icons, 2 * rows))

    everything, rng = [seen for some in pool.values() for seen in some], random.Random(SEED)
    dtype = choose_dtype(None, device)
    llm = AnyGenModel.from_pretrained(model_directory(MODEL), dtype=dtype, device=device, encoders=[]).llm
    opened = self_answers(llm, rng.sample(self_prompts(), min(1024, rows // 32)), max_new_tokens=48)
    mixture = MIXTURE | {"talk": 0.0}
    chats = answered(llm, Conversations(wishes, everything, SEED, mixture, opened), rows // 2)
    talk = answered(llm, Conversations(wishes, [], SEED + 1, {"talk": 1.0}), rows // 16)
    write(folder / "chats.jsonl", [{"messages": [plain(m) for m in chat]} for chat in chats])
    write(folder / "talk.jsonl", [{"messages": [plain(m) for m in chat]} for chat in talk])
    asked = answered(llm, Conversations(wishes, everything, SEED + 2, mixture, opened), rows // 5)
    pairs = [pair(chat, rng.choice(asked)[-1], rng) for chat in [*asked, *talk[: rows // 20]]]
    write(folder / "preferences.jsonl", [one for one in pairs if teaches(one)])


def make_media(folder: Path, icons: IconSet, bank: SoundBank, rows: int) -> dict[str, list[Seen]]:
    """Writes pictures of all icons in turn, and fewer clips and sounds; modality -> what each shows.

    Every second batch of pictures is changed as in the model's own training, so that it does not hang on how they were
    drawn what is learned of them.
    """
    torch.manual_seed(SEED)
    few = max(8, rows // 20)
    sources: dict[str, Iterable[tuple[Any, Sequence[Any]]]] = {
        "image": (
            (augment(batch.pixels) if number % 2 else batch.pixels, batch.drawings)
            for number, batch in enumerate(PictureSource(icons, seed=SEED).pictures(rows, most=64))
        ),
        "video": ((batch.pixels, batch.shots) for batch in MotionSource(icons, seed=SEED).clips(few, most=16)),
        "audio": ((batch.waveforms, batch.sounds) for batch in SoundSource(bank, seed=SEED).clips(few, most=64)),
    }
    pool: dict[str, list[Seen]] = {modality: [] for modality in sources}
    for modality, batches in sources.items():
        (folder / modality).mkdir(exist_ok=True)
        for values, contents in batches:
            for value, content in zip(values, contents, strict=True):
                seen = Seen(modality, len(pool[modality]), content)
                as_medium(modality, value).save(folder / _file(seen), overwrite=True)
                pool[modality].append(seen)
    return pool


def _file(seen: Seen) -> str:
    return f"{seen.modality}/{seen.index:05d}.{MEDIA[seen.modality]}"


def named(drawing: Drawing) -> str:
    """'These are three dogs.': a caption in the words in which the model names what it sees."""
    things = subject(Drawing(label=drawing.label, count=drawing.count))
    return f"{'This is' if drawing.count == 1 else 'These are'} {things}."


def captions(wishes: ImageWishes, icons: IconSet, count: int) -> list[str]:
    """Different captions of pictures, in the one form in which the model's answers say them."""
    rng, found = random.Random(SEED), dict[str, None]()
    numbers = {concept.label: number for number, concept in enumerate(icons.concepts)}
    while len(found) < count:
        drawing = wishes.wish(rng).content
        if not is_held_out(drawing, numbers[drawing.label]):
            found.setdefault(wishes.caption(drawing))
    return list(found)


def answered(llm: LLM, conversations: Conversations, count: int) -> list[list[Message]]:
    """So many conversations; where one ends with a plain question, the LLM's own answer is put behind it.

    Without a whole sentence of an answer a conversation is left out.
    """
    drawn: list[Conversation] = [conversations[number] for number in range(count)]
    asked = list(dict.fromkeys(one.messages[-1].text for one in drawn if one.words))
    answers = self_answers(llm, asked, batch_size=64, max_new_tokens=48)
    return [
        [*one.messages, told(answers[one.messages[-1].text])] if one.words else one.messages
        for one in drawn
        if not one.words or one.messages[-1].text in answers
    ]


def pair(chat: list[Message], other: Message, rng: random.Random) -> dict[str, Any]:
    """A conversation's answer, preferred to a worse one.

    Worse is one of something else, one without its medium, or with a medium where words were wanted.
    """
    *prompt, chosen = chat
    kind, words, made = rng.random(), chosen.text, any(isinstance(part, MediaPart) for part in chosen.parts)
    rejected = plain(other)
    if made and kind < 0.4:
        rejected = {"role": "assistant", "content": words}
    elif made and kind < 0.6:
        modality = next(part.modality for part in chosen.parts if isinstance(part, MediaPart))
        wrong = rng.choice([name for name in MEDIA if name != modality])
        rejected = {"role": "assistant", "content": [words, {"type": wrong, "caption": words}]}
    elif not made and kind < 0.5:
        rejected = {"role": "assistant", "content": [words, {"type": rng.choice([*MEDIA]), "caption": words}]}
    return {"prompt": [plain(message) for message in prompt], "chosen": [plain(chosen)], "rejected": [rejected]}


def teaches(pair: dict[str, Any]) -> bool:
    """Whether its answers differ in more than the words that the LLM, which stands still, says by itself."""
    messages = (pair["prompt"][-1], *pair["chosen"], *pair["rejected"])
    media = any(not isinstance(message["content"], str) for message in messages)
    return media and pair["chosen"] != pair["rejected"]


def plain(message: Message) -> dict[str, Any]:
    """A message in the chat format: media of questions are files, those of answers are captions."""
    content: list[Any] = []
    for part in message.parts:
        if not isinstance(part, MediaPart):
            content.append({"type": "text", "text": part.text})
        elif message.role == "assistant":
            content.append({"type": part.modality, "caption": part.media})
        else:
            file = _file(Seen(part.modality, int(part.media), None))  # type: ignore[call-overload]
            content.append({"type": part.modality, part.modality: file})
    only = content[0]["text"] if len(content) == 1 and "text" in content[0] else content
    return {"role": message.role, "content": only}


def write(path: Path, rows: Iterable[Any]) -> None:
    """One a line: words as they are, anything else as JSON."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
