"""The suite `mini`: how well the embedded default draws, films, sounds, names, chats, and tells what it is asked for.

Everything is measured on requests that no training has read, on combinations of concept, style, layout and
background that no training has drawn (`pictures.is_held_out`; of plain pictures there is but one each), and on a
drawing style that it never saw; clips and sounds are held out likewise. Cases are drawn by seed before anything is
generated; none is left out afterwards. What a model cannot read or make is not measured.

Shapes: B cases, S side in pixels.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from anygen.decoding import Answer, DecodingConfig, collect, decode
from anygen.errors import ConfigError, ModalityError
from anygen.generators.base import Generator
from anygen.generators.stable_diffusion import StableDiffusionGenerator
from anygen.media import Image
from anygen.messages import Message, TextPart
from anygen.model import AnyGenModel
from anygen.training.autoencoder import measure
from anygen.training.captions import canonical
from anygen.training.evaluation_answers import (
    CHAT_TOKENS,
    answer,
    as_medium,
    asking,
    base_answers,
    batches,
    by_caption,
    by_request,
)
from anygen.training.evaluation_cases import (
    CONTROLS,
    QUESTIONS,
    Case,
    control_cases,
    held_out_chat,
    pair_cases,
    routing_cases,
)
from anygen.training.evaluation_matrix import SEEDS, Judge, joint_encoders, matrix, retrieval
from anygen.training.evaluation_matrix import Media as MediaOfThings
from anygen.training.evaluation_media import clip_rows, naming_rows, sound_rows
from anygen.training.evaluation_media_cases import Filler, MediaRequest, media_requests, questions, routable
from anygen.training.evaluation_report import (
    Asked,
    Cell,
    Drawn,
    EvaluationResult,
    Filmed,
    Heard,
    Named,
    Rows,
    write_report,
)
from anygen.training.icons import STYLES, IconSet
from anygen.training.measures import Names, NearestIcon, on_white
from anygen.training.motion_measures import NearestThing
from anygen.training.pictures import PictureSource
from anygen.training.sound_measures import NearestSound
from anygen.training.sounds import SoundBank

PAIRS, NAMED, CONTROLLED, RESTORED = 500, 300, 60, 256
"""Cases of a full run: (concept, style) pairs; icons to name; pictures a control; VAE reconstructions."""
PARTS = ("image", "modality", "naming", "talk", "controls", "audio", "video", "retrieval", "matrix")
"""What can be measured by itself."""
MEDIA_KINDS = ("video", "audio", "several", "given", "impossible")
"""Kinds of held-out wordings beside those for pictures and small talk."""
_HELD_OUT_STYLES = tuple(style.word for style in STYLES if style.held_out)


def evaluate(
    model: AnyGenModel,
    generators: Mapping[str, Generator],
    icons_dir: Path,
    *,
    sounds_dir: Path | None = None,
    suite: str = "mini",
    only: Collection[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    batch_size: int = 16,
    report: Path | None = None,
) -> EvaluationResult:
    """Measures everything and compares it with the bars.

    Args:
        model: with its image encoder, and those of sounds and clips if they are to be measured; in evaluation mode.
        generators: output modality -> generator; that of images is needed, those of clips and sounds are measured too.
        icons_dir: the built icon set.
        sounds_dir: the built sound bank, read only if the model hears or makes sounds; by default the folder `sounds`
            beside the icon set.
        suite: "mini" is the only one.
        only: names of `PARTS`, the rows to measure; None measures all.
        limit: the most cases of a row, for a quick look; VAE reconstructions come by 64.
        seed: of the cases, and of the media's noise.
        device: where to move the model and the generators; by default they stay where they are.
        batch_size: cases that go through LLM and generator together.
        report: a folder for the table and for media to look at.

    Raises:
        ConfigError: an unknown suite, or unknown rows.
        ModalityError: the model has no image encoder, or no Stable Diffusion generator for images.
        CheckpointError: there is no icon set in `icons_dir`, or no sound bank where one is needed.
    """
    generator = _check(suite, model, generators)
    wanted = frozenset(PARTS if only is None else only)
    if unknown := sorted(wanted - set(PARTS)):
        raise ConfigError(f"there are no rows {', '.join(unknown)}; known: {', '.join(PARTS)}")
    icons = IconSet.load(icons_dir)
    hears = "audio" in generators or "audio" in model.encoders
    bank = SoundBank.load(sounds_dir or icons_dir.with_name("sounds")) if hears else None
    if device is not None:
        model.to(device)
        for one in generators.values():
            one.to(device)

    def most(count: int) -> int:
        return count if limit is None else min(count, limit)

    rows, count, nearest = Rows(seed), 2**31 if limit is None else limit, NearestIcon(icons)
    drawn, asked, named = list[Drawn](), list[Asked](), list[Named]()
    if "image" in wanted:
        drawn = picture_rows(rows, model, generator, icons, nearest, most, batch_size)
    if "modality" in wanted:
        asked = ask(model, routing_cases(icons, limit, seed), batch_size)
        asked += ask_for_media(model, icons, bank, limit, seed, batch_size)
        rows.share("modality asked for", [a.hit for a in asked], bar=0.97)
        for kind in sorted({a.wanted for a in asked}):
            rows.share(f"modality asked for: {kind}", [a.hit for a in asked if a.wanted == kind])
    if "naming" in wanted:
        named = picture_naming_rows(rows, model, icons, icons_dir, most, batch_size)
    talk = small_talk(model, held_out_chat()[:limit], batch_size) if wanted & {"talk", "matrix"} else []
    if "talk" in wanted:
        rows.share("small talk: words alone, the base LLM's own", talk, bar=0.95)
    if "controls" in wanted:
        control_rows(rows, model, generator, icons, most, batch_size)

    filmed, heard, cells = list[Filmed](), list[Heard](), tuple[Cell, ...]()
    if set(generators) | set(model.encoders) > {"image"}:
        thing = NearestThing(icons) if "video" in generators and wanted & {"video", "matrix"} else None
        hearing = bank is not None and wanted & {"audio", "naming", "matrix"}
        sound = NearestSound(bank, device=model.device) if bank is not None and hearing else None
        if bank is not None and sound is not None and "audio" in generators and "audio" in wanted:
            heard = sound_rows(rows, model, generators["audio"], bank, sound, count, batch_size)
        if thing is not None and "video" in wanted:
            filmed = clip_rows(rows, model, generators["video"], icons, thing, count, batch_size)
        if "naming" in wanted:
            naming_rows(rows, model, icons, bank, sound, count, batch_size)
        if "retrieval" in wanted:
            galleries = {number: MediaOfThings(icons, bank, number) for number in range(seed, seed + SEEDS)}
            retrieval(rows, joint_encoders(model), galleries, count, batch_size)
        if "matrix" in wanted:
            cells = matrix(
                rows,
                model,
                generators,
                MediaOfThings(icons, bank, seed),
                Judge(nearest, thing, sound, bank),
                talk=(sum(talk) / max(1, len(talk)), len(talk)),
                most=count,
                batch_size=batch_size,
            )

    result = EvaluationResult(
        suite=suite,
        model=model.settings.name,
        icons=icons.checksum,
        device=str(model.device),
        rows=tuple(rows.found),
        matrix=cells,
        limit=limit,
    )
    if report is not None:
        write_report(result, report, drawn=drawn, named=named, asked=asked, filmed=filmed, heard=heard)
    return result


def picture_rows(
    rows: Rows,
    model: AnyGenModel,
    generator: StableDiffusionGenerator,
    icons: IconSet,
    nearest: NearestIcon,
    most: Callable[[int], int],
    batch_size: int,
) -> list[Drawn]:
    """Draws the same pairs by caption and by request, restores pictures; returns those of the requests."""
    cases = pair_cases(icons, most(PAIRS), rows.seed)
    pictures = draw_captions(generator, cases, batch_size)
    straight = judge(cases, pictures, nearest)
    ceiling = rows.share("text -> image, condition straight from τ_X", [d.hit for d in straight], bar=0.95)
    pictures, answers = draw_requests(model, generator, cases, batch_size)
    drawn = judge(cases, pictures, nearest, answers)
    reached = rows.share("text -> image, through LLM and output projector", [d.hit for d in drawn], bar=0.90)
    names = Names(icons.concepts)
    said = [case.concept in names.named(one.text) for case, one in zip(cases, answers, strict=True)]
    rows.share("the words of these answers name what was asked for", said)
    rows.add("retention: LLM path / τ_X path", reached / ceiling if ceiling else 0.0, len(cases), bar=0.95)
    held_out = PictureSource(icons, seed=rows.seed, device=generator.device, held_out=True)
    restored = max(64, most(RESTORED) // 64 * 64)
    rows.add(
        "VAE reconstruction",
        measure(generator.vae, held_out, count=restored)["psnr"],
        restored,
        bar=28,
        unit="dB",
    )
    return drawn


def picture_naming_rows(
    rows: Rows, model: AnyGenModel, icons: IconSet, icons_dir: Path, most: Callable[[int], int], batch_size: int
) -> list[Named]:
    """Asks what pictures show, in styles that were seen and in the one that was not; returns some of both."""
    batch = next(PictureSource(icons, seed=rows.seed, held_out=True).batches(most(NAMED)))
    shown = [int(icons.concept[icon]) for icon in batch.icons]
    named = name_pictures(model, batch.pixels, shown, icons, seed=rows.seed, batch_size=batch_size)
    rows.share("image -> text, seen styles", [n.hit for n in named], bar=0.85)
    unseen = IconSet.load(icons_dir, styles=_HELD_OUT_STYLES)
    chosen = _known_icons(unseen, icons, most(NAMED), rows.seed)
    shown = [int(unseen.concept[icon]) for icon in chosen]
    foreign = name_pictures(model, on_white(unseen, chosen), shown, icons, seed=rows.seed, batch_size=batch_size)
    rows.share(f"image -> text, held-out style {_HELD_OUT_STYLES[0]}", [n.hit for n in foreign], bar=0.60)
    half = 32  # of each kind on the report's sheet
    return [*named[:half], *foreign[:half]]


def control_rows(
    rows: Rows,
    model: AnyGenModel,
    generator: Generator,
    icons: IconSet,
    most: Callable[[int], int],
    batch_size: int,
) -> None:
    """Background, count and place, by caption and by request."""
    for name, control in CONTROLS.items():
        cases = control_cases(icons, control, most(CONTROLLED), rows.seed)
        for path in ("τ_X", "LLM"):
            pictures = (
                draw_captions(generator, cases, batch_size)
                if path == "τ_X"
                else draw_requests(model, generator, cases, batch_size)[0]
            )
            kept = [p is not None and control.holds(c.drawing, p) for c, p in zip(cases, pictures, strict=True)]
            rows.share(f"{name}, {path} path", kept)


def draw_captions(generator: Generator, cases: Sequence[Case], batch_size: int = 16) -> list[Tensor | None]:
    """The pictures of the cases' captions by way of the generator's own text encoder: B of float[3, S, S]."""
    captions = [canonical(case.drawing) for case in cases]
    return by_caption(generator, captions, [case.seed for case in cases], batch_size)


def draw_requests(
    model: AnyGenModel, generator: Generator, cases: Sequence[Case], batch_size: int = 16
) -> tuple[list[Tensor | None], list[Answer]]:
    """The first picture of the model's answer to each request, None where it has none; and the answers."""
    conversations = [asking(case.request) for case in cases]
    return by_request(model, generator, conversations, [case.seed for case in cases], batch_size)


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
    judged = []
    for number, (case, picture) in enumerate(zip(cases, pictures, strict=True)):
        icon = None if picture is None else nearest.find(picture[None])[0]
        judged.append(
            Drawn(
                asked=case.request if answers else canonical(case.drawing),
                seed=case.seed,
                picture=picture,
                answer=answers[number].text if answers else "",
                looks_like="" if icon is None else nearest.label(icon),
                hit=icon is not None and nearest.shows(icon, case.concept),
            )
        )
    return judged


def ask(model: AnyGenModel, cases: Sequence[tuple[str, str]], batch_size: int = 16) -> list[Asked]:
    """Which media the answer to each message holds; they are not generated. `cases` as of `routing_cases`."""
    answers = answer(model, [asking(message) for message, _ in cases], batch_size)
    makes: dict[str, tuple[str, ...] | None] = {"text": (), "image": ("image",), "images": None}
    return [
        Asked(message=message, wanted=wanted, makes=makes[wanted], made=tuple(run.modality for run in said.runs))
        for (message, wanted), said in zip(cases, answers, strict=True)
    ]


def ask_for_media(
    model: AnyGenModel, icons: IconSet, bank: SoundBank | None, limit: int | None, seed: int, batch_size: int = 16
) -> list[Asked]:
    """The same for clips, sounds, several media, media given with the message, and what cannot be made.

    A model of pictures alone is asked for none of it.

    Args:
        model: is asked what it can read and make, and no more.
        icons: what may be seen.
        bank: what may be heard; needed by a model that hears or makes sounds.
        limit: the most messages of a kind.
        seed: of the things.
        batch_size: messages that are answered together.
    """
    inputs, outputs = set(model.encoders), set(model.settings.outputs)
    if not inputs | outputs > {"image"}:
        return []
    rng, filler, media = random.Random(seed), Filler(icons, bank, seed), MediaOfThings(icons, bank, seed)
    given = inputs if media.heard else inputs - {"audio"}  # where nothing seen is heard, no sound is given
    asked: list[MediaRequest] = []
    for kind in MEDIA_KINDS:
        known = [request for request in media_requests(kind) if routable(request, given, outputs)]
        if kind == "given" and "image" in inputs:
            known += [
                MediaRequest(text=text, kind="given", makes=(), given="image") for text in questions("image")[:12]
            ]
        asked += known if limit is None else rng.sample(known, min(limit, len(known)))
    conversations = []
    for request in asked:
        medium = None
        if request.given is not None:
            modalities = (request.given, *request.makes) if media.heard else (request.given,)
            (value,) = media.make(request.given, media.choose(modalities, 1))
            medium = as_medium(request.given, value)
        conversations.append(asking(filler.fill(request), medium, medium_first=rng.random() < 0.5))
    answers = answer(model, conversations, batch_size)
    return [
        Asked(
            message=conversation[0].text,
            wanted=request.kind,
            makes=request.makes,
            made=tuple(run.modality for run in said.runs),
        )
        for request, conversation, said in zip(asked, conversations, answers, strict=True)
    ]


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
        question = rng.choice(QUESTIONS)
        conversations.append(asking(question, Image.from_any(picture), medium_first=rng.random() >= 0.5))
    answers = answer(model, conversations, batch_size)
    for picture, concept, (message,), said in zip(pictures, concepts, conversations, answers, strict=True):
        label, hit = icons.concepts[concept].label, concept in names.named(said.text)
        named.append(Named(picture=picture, question=message.text, answer=said.text, label=label, hit=hit))
    return named


def small_talk(model: AnyGenModel, messages: Sequence[str], batch_size: int = 16) -> list[bool]:
    """Whether each answer is words alone and, as far as it is compared, what the base LLM's `generate` gives."""
    same = []
    for batch in batches(messages, batch_size):
        prompts = [model.prompts.prompt([Message("user", (TextPart(text),))]) for text in batch]
        events = decode(model, prompts, config=DecodingConfig(max_new_tokens=CHAT_TOKENS))
        answers = collect(events, len(batch))
        # the rows that decoding answered by words in one batch go into one batch here: equal padding, equal rounding
        plain = [row for row, answer in enumerate(answers) if answer.route == "words" and not answer.runs]
        base = dict(zip(plain, base_answers(model, [batch[row] for row in plain]), strict=True))
        same += [base.get(row) == answer.text for row, answer in enumerate(answers)]
    return same


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


def _known_icons(unseen: IconSet, icons: IconSet, count: int, seed: int) -> list[int]:
    """Rows of `unseen` whose concept `icons` has too."""
    known = set(icons.concept.tolist())
    rows = [row for row, concept in enumerate(unseen.concept.tolist()) if concept in known]
    return random.Random(seed).sample(rows, min(count, len(rows)))
