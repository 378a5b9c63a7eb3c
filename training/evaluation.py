"""The suite `mini`: how well the embedded default draws, names, chats, and tells what it is asked for.

Everything is measured on requests that no training has read, on combinations of concept, style, layout and
background that no training has drawn (`pictures.is_held_out`; of plain pictures there is but one each), and on a
drawing style that it never saw. Cases are drawn by seed before anything is generated; none is left out afterwards.

Shapes: B cases, S side in pixels.
"""

import logging
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from anygen.decoding import Answer, DecodingConfig, End, Event, Routed, collect, decode
from anygen.errors import ConfigError, ModalityError
from anygen.features import Condition
from anygen.generators.base import Generator
from anygen.generators.stable_diffusion import StableDiffusionGenerator
from anygen.media import Image
from anygen.messages import MediaPart, Message, TextPart
from anygen.model import AnyGenModel
from anygen.prompts import pad
from anygen.training.autoencoder import measure
from anygen.training.captions import canonical
from anygen.training.evaluation_cases import (
    CONTROLS,
    QUESTIONS,
    Case,
    control_cases,
    held_out_chat,
    pair_cases,
    routing_cases,
)
from anygen.training.evaluation_report import Asked, Drawn, EvaluationResult, Named, Row, write_report
from anygen.training.icons import STYLES, IconSet
from anygen.training.measures import Names, NearestIcon, on_white
from anygen.training.pictures import PictureSource

logger = logging.getLogger("anygen.training")
T = TypeVar("T")

PAIRS, NAMED, CONTROLLED, RESTORED = 500, 300, 60, 256
"""Cases of a full run: (concept, style) pairs; icons to name; pictures a control; VAE reconstructions."""
CHAT_TOKENS = 32
"""How far an answer to small talk is compared with the base LLM's."""
_HELD_OUT_STYLES = tuple(style.word for style in STYLES if style.held_out)


def evaluate(
    model: AnyGenModel,
    generators: Mapping[str, Generator],
    icons_dir: Path,
    *,
    suite: str = "mini",
    limit: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    batch_size: int = 16,
    report: Path | None = None,
) -> EvaluationResult:
    """Measures everything and compares it with the bars.

    Args:
        model: with its image encoder; in evaluation mode.
        generators: output modality -> generator; that of images is used.
        icons_dir: the built icon set.
        suite: "mini" is the only one.
        limit: the most cases of a row, for a quick look; VAE reconstructions come by 64.
        seed: of the cases, and of the pictures' noise.
        device: where to move the model and the generators; by default they stay where they are.
        batch_size: cases that go through LLM and generator together.
        report: a folder for the table and for pictures to look at.

    Raises:
        ConfigError: an unknown suite.
        ModalityError: the model has no image encoder, or no Stable Diffusion generator for images.
        CheckpointError: there is no icon set in `icons_dir`.
    """
    generator = _check(suite, model, generators)
    icons, unseen = IconSet.load(icons_dir), IconSet.load(icons_dir, styles=_HELD_OUT_STYLES)
    if device is not None:
        model.to(device)
        generator.to(device)

    def most(count: int) -> int:
        return count if limit is None else min(count, limit)

    rows, nearest = _Rows(seed), NearestIcon(icons)
    cases = pair_cases(icons, most(PAIRS), seed)
    pictures = draw_captions(generator, cases, batch_size)
    straight = judge(cases, pictures, nearest)
    ceiling = rows.share("text -> image, condition straight from τ_X", [d.hit for d in straight], bar=0.95)
    pictures, answers = draw_requests(model, generator, cases, batch_size)
    drawn = judge(cases, pictures, nearest, answers)
    reached = rows.share("text -> image, through LLM and output projector", [d.hit for d in drawn], bar=0.90)
    names = Names(icons.concepts)
    said = [case.concept in names.named(answer.text) for case, answer in zip(cases, answers, strict=True)]
    rows.share("the words of these answers name what was asked for", said)
    rows.add("retention: LLM path / τ_X path", reached / ceiling if ceiling else 0.0, len(cases), bar=0.95)

    held_out = PictureSource(icons, seed=seed, device=generator.device, held_out=True)
    restored = max(64, most(RESTORED) // 64 * 64)
    psnr = measure(generator.vae, held_out, count=restored)["psnr"]
    rows.add("VAE reconstruction", psnr, restored, bar=28, unit="dB")

    asked = ask(model, routing_cases(icons, limit, seed), batch_size)
    rows.share("modality asked for", [a.hit for a in asked], bar=0.97)
    for wanted in sorted({a.wanted for a in asked}):
        rows.share(f"modality asked for: {wanted}", [a.hit for a in asked if a.wanted == wanted])

    batch = next(PictureSource(icons, seed=seed, held_out=True).batches(most(NAMED)))
    shown = [int(icons.concept[icon]) for icon in batch.icons]
    named = name_pictures(model, batch.pixels, shown, icons, seed=seed, batch_size=batch_size)
    rows.share("image -> text, seen styles", [n.hit for n in named], bar=0.85)
    chosen = _known_icons(unseen, icons, most(NAMED), seed)
    shown = [int(unseen.concept[icon]) for icon in chosen]
    foreign = name_pictures(model, on_white(unseen, chosen), shown, icons, seed=seed, batch_size=batch_size)
    rows.share(f"image -> text, held-out style {_HELD_OUT_STYLES[0]}", [n.hit for n in foreign], bar=0.60)

    chat = held_out_chat()[:limit]
    rows.share("small talk: words alone, the base LLM's own", small_talk(model, chat, batch_size), bar=0.95)

    for name, control in CONTROLS.items():
        cases = control_cases(icons, control, most(CONTROLLED), seed)
        for path in ("τ_X", "LLM"):
            pictures = (
                draw_captions(generator, cases, batch_size)
                if path == "τ_X"
                else draw_requests(model, generator, cases, batch_size)[0]
            )
            kept = [p is not None and control.holds(c.drawing, p) for c, p in zip(cases, pictures, strict=True)]
            rows.share(f"{name}, {path} path", kept)

    result = EvaluationResult(
        suite=suite,
        model=model.settings.name,
        icons=icons.checksum,
        device=str(model.device),
        rows=tuple(rows.found),
    )
    if report is not None:
        half = 32  # of each kind on the report's sheet
        write_report(result, report, drawn=drawn, named=[*named[:half], *foreign[:half]], asked=asked)
    return result


def draw_captions(generator: Generator, cases: Sequence[Case], batch_size: int = 16) -> list[Tensor | None]:
    """The pictures of the cases' captions by way of the generator's own text encoder: B of float[3, S, S]."""
    pictures: list[Tensor | None] = []
    for batch in _batches(cases, batch_size):
        condition = generator.encode_text([canonical(case.drawing) for case in batch])
        pictures += _generate(generator, condition, [case.seed for case in batch])
    return pictures


def draw_requests(
    model: AnyGenModel, generator: Generator, cases: Sequence[Case], batch_size: int = 16
) -> tuple[list[Tensor | None], list[Answer]]:
    """The first picture of the model's answer to each request, None where it has none; and the answers."""
    pictures: list[Tensor | None] = []
    answers: list[Answer] = []
    for batch in _batches(cases, batch_size):
        answered = _answer(model, [[Message("user", (TextPart(case.request),))] for case in batch])
        runs = [next((run for run in a.runs if run.modality == generator.modality), None) for a in answered]
        drawn: Iterator[Tensor] = iter(())
        if states := [run.states for run in runs if run is not None]:
            with torch.no_grad():
                condition = model.project(generator.modality, torch.stack(states))
            seeds = [case.seed for case, run in zip(batch, runs, strict=True) if run is not None]
            drawn = iter(_generate(generator, condition, seeds))
        pictures += [None if run is None else next(drawn) for run in runs]
        answers += answered
    return pictures, answers


def judge(
    cases: Sequence[Case],
    pictures: Sequence[Tensor | None],
    nearest: NearestIcon,
    answers: Sequence[Answer] | None = None,
) -> list[Drawn]:
    """Which icon each picture looks like, and whether that is a drawing of the concept asked for.

    Args:
        cases: B of them.
        pictures: float[3, S, S] each, or None, which is a miss.
        nearest: over the icons to compare with.
        answers: in which the pictures came, if they were drawn by request.
    """
    icons, judged = nearest.icons, []
    for number, (case, picture) in enumerate(zip(cases, pictures, strict=True)):
        icon = None if picture is None else nearest.find(picture[None])[0]
        judged.append(
            Drawn(
                asked=case.request if answers else canonical(case.drawing),
                seed=case.seed,
                picture=picture,
                answer=answers[number].text if answers else "",
                looks_like="" if icon is None else icons.concepts[int(icons.concept[icon])].label,
                hit=icon is not None and nearest.shows(icon, case.concept),
            )
        )
    return judged


def ask(model: AnyGenModel, cases: Sequence[tuple[str, str]], batch_size: int = 16) -> list[Asked]:
    """How many media the answer to each message holds; they are not generated. `cases` as of `routing_cases`."""
    asked = []
    for batch in _batches(cases, batch_size):
        answers = _answer(model, [[Message("user", (TextPart(message),))] for message, _ in batch])
        asked += [
            Asked(message=message, wanted=wanted, media=len(answer.runs))
            for (message, wanted), answer in zip(batch, answers, strict=True)
        ]
    return asked


def name_pictures(
    model: AnyGenModel, pictures: Tensor, concepts: Sequence[int], icons: IconSet, *, seed: int, batch_size: int = 16
) -> list[Named]:
    """Asks about each of float[B, 3, S, S], with the question before or behind the picture.

    Args:
        model: with an image encoder.
        pictures: in [0, 1].
        concepts: B numbers of what they show.
        icons: whose concepts the numbers count.
        seed: of the questions.
        batch_size: pictures that are asked about together.
    """
    rng, names, named = random.Random(seed), Names(icons.concepts), []
    conversations = []
    for picture in pictures:
        parts = (TextPart(rng.choice(QUESTIONS)), MediaPart("image", Image.from_any(picture)))
        conversations.append([Message("user", parts if rng.random() < 0.5 else parts[::-1])])
    answers = [answer for batch in _batches(conversations, batch_size) for answer in _answer(model, batch)]
    for picture, concept, (message,), answer in zip(pictures, concepts, conversations, answers, strict=True):
        label, hit = icons.concepts[concept].label, concept in names.named(answer.text)
        named.append(Named(picture=picture, question=message.text, answer=answer.text, label=label, hit=hit))
    return named


def small_talk(model: AnyGenModel, messages: Sequence[str], batch_size: int = 16) -> list[bool]:
    """Whether each answer is words alone and, as far as it is compared, what the base LLM's `generate` gives."""
    same = []
    for batch in _batches(messages, batch_size):
        prompts = [model.prompts.prompt([Message("user", (TextPart(text),))]) for text in batch]
        events = decode(model, prompts, config=DecodingConfig(max_new_tokens=CHAT_TOKENS))
        answers = collect(events, len(batch))
        # the rows that decoding answered by words in one batch go into one batch here: equal padding, equal rounding
        plain = [row for row, answer in enumerate(answers) if answer.route == "words" and not answer.runs]
        base = dict(zip(plain, base_answers(model, [batch[row] for row in plain]), strict=True))
        same += [base.get(row) == answer.text for row, answer in enumerate(answers)]
    return same


@torch.inference_mode()
def base_answers(model: AnyGenModel, messages: Sequence[str], max_new_tokens: int = CHAT_TOKENS) -> list[str]:
    """Greedy answers of the LLM without its adapter, by transformers' own template and `generate`."""
    from transformers import GenerationConfig

    if not messages:
        return []
    llm = model.llm
    turns = [[{"role": "user", "content": message}] for message in messages]
    texts = cast(list[str], llm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    encoded = [cast(list[int], llm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    ids, mask = (tensor.to(model.device) for tensor in pad(encoded, llm.eos_ids[0], left=True))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=llm.eos_ids, pad_token_id=llm.eos_ids[0]
    )
    with llm.adapter_off():
        spoken = cast(Any, llm.base).generate(ids, attention_mask=mask, generation_config=config)
    texts = llm.tokenizer.batch_decode(
        spoken[:, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [text.rstrip("\ufffd") for text in texts]  # as decoding does with a character that the limit cuts


def _check(suite: str, model: AnyGenModel, generators: Mapping[str, Generator]) -> StableDiffusionGenerator:
    if suite != "mini":
        raise ConfigError(f"there is no suite '{suite}'; known: mini")
    if "image" not in model.encoders:
        raise ModalityError(f"suite mini asks about pictures; encoders loaded: {', '.join(model.encoders) or 'none'}")
    generator = generators.get("image")
    if not isinstance(generator, StableDiffusionGenerator):
        raise ModalityError(
            "suite mini asks for pictures and needs a Stable Diffusion generator for them; "
            f"generators given: {', '.join(generators) or 'none'}"
        )
    return generator


class _Rows:
    """Collects figures, with the wall time since the one before."""

    def __init__(self, seed: int) -> None:
        self.seed, self.found = seed, list[Row]()
        self.clock = time.monotonic()

    def add(self, name: str, value: float, cases: int, *, bar: float | None = None, unit: str = "") -> float:
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        row = Row(name=name, value=value, cases=cases, seed=self.seed, seconds=round(seconds, 1), bar=bar, unit=unit)
        self.found.append(row)
        logger.info("%s: %s (%d cases, %.0f s)", name, row.figure, cases, seconds)
        return value

    def share(self, name: str, hits: Sequence[bool], *, bar: float | None = None) -> float:
        return self.add(name, sum(hits) / len(hits) if hits else 0.0, len(hits), bar=bar)


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _known_icons(unseen: IconSet, icons: IconSet, count: int, seed: int) -> list[int]:
    """Rows of `unseen` whose concept `icons` has too."""
    known = set(icons.concept.tolist())
    rows = [row for row, concept in enumerate(unseen.concept.tolist()) if concept in known]
    return random.Random(seed).sample(rows, min(count, len(rows)))


def _generate(generator: Generator, condition: Condition, seeds: Sequence[int]) -> list[Tensor]:
    """float[3, S, S] in [0, 1] each, on the CPU."""
    images = generator.generate(condition, seeds=seeds)
    return [torch.from_numpy(image.array).permute(2, 0, 1) / 255 for image in images]


def _answer(model: AnyGenModel, conversations: Sequence[list[Message]], max_new_tokens: int = 128) -> list[Answer]:
    """Greedy answers in one batch. Those that words alone answer are left empty, which saves their time."""
    prompts = [model.prompts.prompt(messages) for messages in conversations]
    config = DecodingConfig(max_new_tokens=max_new_tokens)
    media = model.encode_parts([part for prompt in prompts for part in prompt.media])
    events = decode(model, prompts, media=media, config=config)
    return collect(_until_media_came(events, len(prompts)), len(prompts))


def _until_media_came(events: Iterable[Event], count: int) -> Iterator[Event]:
    """Ends once every sample has its route and those routed to media have ended: these come before the others."""
    routed, waiting = 0, set[int]()
    for event in events:
        yield event
        if isinstance(event, Routed):
            routed += 1
            waiting |= {event.sample} if event.route == "media" else set()
        elif isinstance(event, End):
            waiting.discard(event.sample)
        if routed == count and not waiting:
            return
