"""Every modality to every other: the 4×4 matrix of an evaluation, and retrieval in the encoders' common space.

Shapes: B things, E width of the space, S side in pixels, F frames, N samples.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.encoders.imagebind import ImageBindEncoder
from anygen.encoders.imagebind_config import ImageBindConfig
from anygen.generators.base import Generator
from anygen.model import AnyGenModel
from anygen.training.captions import Drawing, random_drawing
from anygen.training.evaluation_answers import answer, as_medium, asking, by_request
from anygen.training.evaluation_cases import held_out_requests
from anygen.training.evaluation_media import SoundNames
from anygen.training.evaluation_media_cases import (
    MediaRequest,
    Thing,
    media_requests,
    questions,
    sound_of_thing,
    things,
)
from anygen.training.evaluation_report import Cell, Rows
from anygen.training.icons import SCENES, IconSet
from anygen.training.measures import Names, NearestIcon
from anygen.training.motion import MotionSource, Shot, is_held_out, random_shot
from anygen.training.motion_measures import NearestThing
from anygen.training.pictures import PictureSource
from anygen.training.pictures import is_held_out as is_held_out_picture
from anygen.training.sound_measures import NearestSound
from anygen.training.sound_mixing import SoundSource
from anygen.training.sounds import SoundBank

MODALITIES = ("text", "image", "video", "audio")
MATRIX, GALLERY, SEEDS = 60, 100, 3
"""Cases of a cell; media of each modality that a retrieval chooses among, and how many such galleries are drawn."""


class Media:
    """Held-out media of things, to be given and to be found.

    Args:
        icons: what is seen.
        bank: what is heard; None without sounds.
        seed: of everything that is drawn.
    """

    def __init__(self, icons: IconSet, bank: SoundBank | None, seed: int) -> None:
        self.icons, self.bank, self.rng = icons, bank, random.Random(seed)
        self.pictures = PictureSource(icons, seed=seed, held_out=True)
        self.clips = MotionSource(icons, seed=seed)
        self.seen, self.heard = things(icons), things(icons, bank) if bank is not None else []
        self._icons: dict[int, list[int]] = {}
        for icon, concept in enumerate(icons.concept.tolist()):
            self._icons.setdefault(concept, []).append(icon)

    def choose(self, modalities: Sequence[str], count: int) -> list[Thing]:
        """Different things that exist in all these modalities, at most so many."""
        pool = self.heard if "audio" in modalities else [thing for thing in self.seen if thing.concept in self._icons]
        return self.rng.sample(pool, min(count, len(pool)))

    def make(self, modality: str, chosen: Sequence[Thing], *, alone: bool = False) -> list[Tensor]:
        """One medium of each thing: float[3, S, S], float[F, 3, S, S] or float[N] at 16 kHz.

        Pictures are combinations of thing, style, layout and background that no training has drawn; clips and sounds
        are such combinations where the thing has some: effects have none.

        Args:
            modality: of the media.
            chosen: the things.
            alone: pictures and clips show one copy before a plain colour, and are held out where the thing has such
                combinations. An answer that copies three on a meadow is right, but `Judge` finds no thing in it.
        """
        made: list[Tensor] = []
        for first in range(0, len(chosen), 32):
            part = chosen[first : first + 32]
            if modality == "audio":
                assert self.bank is not None
                sounds = [sound_of_thing(thing, self.bank, self.rng) for thing in part]
                source = SoundSource(self.bank, seed=self.rng.randrange(2**31))
                made += list(source.make(sounds).waveforms)
                continue
            rows = [self.rng.choice(self._icons[thing.concept]) for thing in part]
            if modality == "video":
                made += list(self.clips.make(rows, [self._shot(row, alone) for row in rows]).pixels)
            else:
                drawings = [self._drawing(row) for row in rows] if alone else None
                made += list(self.pictures.make(rows, drawings).pixels)
        return made

    def _shot(self, icon: int, alone: bool) -> Shot:
        concept = int(self.icons.concept[icon])
        drawn = [random_shot(self.icons.concepts[concept], self.icons.style[icon], self.rng) for _ in range(100)]
        drawn = [shot for shot in drawn if not alone or _is_alone(shot.drawing)]
        return next((shot for shot in drawn if is_held_out(shot, concept)), drawn[0])

    def _drawing(self, icon: int) -> Drawing:
        concept = int(self.icons.concept[icon])
        drawn = [random_drawing(self.icons.concepts[concept], self.icons.style[icon], self.rng) for _ in range(300)]
        drawn = [drawing for drawing in drawn if _is_alone(drawing)]
        return next((drawing for drawing in drawn if is_held_out_picture(drawing, concept)), drawn[0])


def _is_alone(drawing: Drawing) -> bool:
    return drawing.count == 1 and drawing.place is None and drawing.background not in SCENES


class Judge:
    """Tells whether a medium or words show, sound like or name a thing."""

    def __init__(
        self, icon: NearestIcon, thing: NearestThing | None, sound: NearestSound | None, bank: SoundBank | None
    ) -> None:
        self.icon, self.thing, self.sound = icon, thing, sound
        self.names = Names(icon.icons.concepts)
        self.sound_names = SoundNames(bank) if bank is not None else None

    def medium(self, modality: str, values: Tensor | None, wanted: Thing) -> bool:
        """Of a picture, a clip (its first frame, or one up to its middle) or a sound; None shows nothing.

        Things in clips are cut out first, those in pictures looked at as they are and cut out: how large they should be
        nobody said.
        """
        if values is None:
            return False
        if modality == "audio":
            assert self.sound is not None and wanted.sound is not None
            return self.sound.kind(self.sound.find(values[None])[0]) == self.sound.kind(wanted.sound.label)
        if modality == "video":
            assert self.thing is not None
            # how it moves was not said: it may be upside down in the middle
            frames = values[[0, len(values) // 4, len(values) // 2]].cpu()
            return any(self.thing.shows(icon, wanted.concept) for icon in self.thing.find(frames))
        found = [self.icon.find(values[None].cpu())[0]]
        found += self.thing.find(values[None].cpu()) if self.thing is not None else []
        return any(self.icon.shows(icon, wanted.concept) for icon in found)

    def words(self, text: str, wanted: Thing) -> bool:
        """By the name of the concept or of its sound."""
        if wanted.concept in self.names.named(text):
            return True
        named = self.sound_names.named(text) if self.sound_names is not None else set[str]()
        return wanted.sound is not None and wanted.sound.label in named


def matrix(
    rows: Rows,
    model: AnyGenModel,
    generators: Mapping[str, Generator],
    media: Media,
    judge: Judge,
    *,
    talk: tuple[float, int],
    most: int,
    batch_size: int,
) -> tuple[Cell, ...]:
    """All pairs that the model has.

    A cell's score is the share of held-out requests, each with a medium of another thing (or its name), whose answer
    holds a medium of the wanted modality that shows or sounds like the thing, or words that name it. Pairs with sounds
    are measured on things that make one. Text to text is plain conversation. What the judge says of true pictures and
    clips, as they are given where some are made, is told beside.

    Args:
        rows: to which each cell is added.
        model: with its encoders.
        generators: output modality -> generator.
        media: to be given.
        judge: of what comes back.
        talk: share and cases of the plain conversations that are answered as the base LLM answers them.
        most: cases of a cell.
        batch_size: cases that go through LLM and generator together.
    """
    cells = []
    for shown in (m for m in ("image", "video") if m in generators and m in model.encoders):
        true = Media(media.icons, media.bank, rows.seed)
        chosen = true.choose((shown,), min(MATRIX, most))
        hits = [judge.medium(shown, m, t) for m, t in zip(true.make(shown, chosen, alone=True), chosen, strict=True)]
        rows.share(f"any to any: true {shown}s, by the same measure", hits)
    for given in (m for m in MODALITIES if m == "text" or m in model.encoders):
        for made in (m for m in MODALITIES if m == "text" or m in generators):
            share, cases = talk
            if (given, made) != ("text", "text"):
                hits = pair(model, generators, media, judge, given, made, min(MATRIX, most), rows.seed, batch_size)
                share, cases = rows.share(f"any to any: {given} -> {made}", hits), len(hits)
            cells.append(Cell(given=given, made=made, value=share, cases=cases))
    return tuple(cells)


def pair(
    model: AnyGenModel,
    generators: Mapping[str, Generator],
    media: Media,
    judge: Judge,
    given: str,
    made: str,
    count: int,
    seed: int,
    batch_size: int,
) -> list[bool]:
    """One cell: whether each answer is of its thing."""
    rng, chosen = random.Random(f"{seed} {given} {made}"), media.choose((given, made), count)
    wordings = _wordings(given, made)
    if given == "text":
        conversations = [asking(rng.choice(wordings).replace("{x}", thing.name)) for thing in chosen]
    else:
        shown = media.make(given, chosen, alone=made in ("image", "video"))
        conversations = [
            asking(rng.choice(wordings), as_medium(given, medium), medium_first=rng.random() < 0.5) for medium in shown
        ]
    if made == "text":
        answers = answer(model, conversations, batch_size)
        return [judge.words(one.text, thing) for one, thing in zip(answers, chosen, strict=True)]
    seeds = [seed + number for number in range(len(chosen))]
    back, _ = by_request(model, generators[made], conversations, seeds, batch_size)
    return [judge.medium(made, medium, thing) for medium, thing in zip(back, chosen, strict=True)]


def _wordings(given: str, made: str) -> list[str]:
    if given != "text":
        return questions(given) if made == "text" else _texts(media_requests("given", given=given, makes=(made,)))
    return held_out_requests()["image"] if made == "image" else _texts(media_requests(made))


def _texts(requests: Sequence[MediaRequest]) -> list[str]:
    return [request.text for request in requests]


def retrieval(
    rows: Rows, encoders: Mapping[str, ImageBindEncoder], media_of: Mapping[int, Media], most: int, batch: int
) -> None:
    """R@1 for each ordered pair of modalities: how often a medium is nearest to the one of its own thing.

    Every gallery holds one medium each of up to `GALLERY` different things, of those that are heard where sounds take
    part; cases are all queries of all galleries.

    Args:
        rows: to which each pair is added.
        encoders: modality -> encoder, all of one space.
        media_of: seed of a gallery -> what its media are made by.
        most: things of a gallery.
        batch: media encoded together.
    """
    present = [modality for modality in MODALITIES if modality in encoders]
    hits: dict[tuple[str, str], list[bool]] = {}
    for media in media_of.values():
        for pool in (present, [modality for modality in present if modality != "audio"]):
            if not (chosen := media.choose(pool, min(GALLERY, most))):
                continue
            space = {m: _embedded(encoders[m], m, chosen, media, batch) for m in pool}
            for query, gallery in ((q, g) for q in pool for g in pool if q != g):
                if "audio" in pool and "audio" not in (query, gallery):
                    continue  # measured on the larger pool of things that need not be heard
                nearest = (space[query] @ space[gallery].T).argmax(1)
                found = (nearest == torch.arange(len(chosen))).tolist()
                hits.setdefault((query, gallery), []).extend(found)
            if "audio" not in present:
                break
    for query, gallery in ((q, g) for q in present for g in present if (q, g) in hits):
        share = hits[query, gallery]
        rows.share(f"retrieval {query} -> {gallery}, R@1 of {len(share) // len(media_of)}", share)


@torch.inference_mode()
def _embedded(encoder: ImageBindEncoder, modality: str, chosen: Sequence[Thing], media: Media, batch: int) -> Tensor:
    """float32[B, E] of length 1, on the CPU."""
    values = [thing.name for thing in chosen] if modality == "text" else media.make(modality, chosen)
    parts = []
    for first in range(0, len(values), batch):
        part = values[first : first + batch]
        read = part if modality == "text" else [as_medium(modality, v) for v in part if isinstance(v, Tensor)]
        tensors = encoder.preprocess(read)
        device = next(encoder.parameters()).device
        features = encoder(**{name: tensor.to(device) for name, tensor in tensors.items()})
        parts.append(F.normalize(features.values.float().mean(1), dim=-1).cpu())
    return torch.cat(parts)


def joint_encoders(model: AnyGenModel) -> dict[str, ImageBindEncoder]:
    """The model's encoders that share a space, pooled, with that of text where their folder has one."""
    found = {
        modality: encoder
        for modality, encoder in model.encoders.items()
        if isinstance(encoder, ImageBindEncoder) and encoder.features == "pooled"
    }
    sources = {str(model.settings.inputs[modality].encoder.source.path) for modality in found}
    if len(sources) > 1:
        return {}
    if found and model.origin is not None and (folder := model.origin / sources.pop()).is_dir():
        found |= text_encoder(folder)
    return found


def text_encoder(folder: Path) -> dict[str, ImageBindEncoder]:
    """The text trunk of the ImageBind in `folder`, if it has one."""
    if ImageBindConfig.load(folder / "config.json").text is None:
        return {}
    return {"text": ImageBindEncoder.from_pretrained(folder, modality="text")}
