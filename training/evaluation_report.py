"""What an evaluation found: its rows, the table that is printed, and a folder with pictures for people to look at."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anygen.files import writing

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from anygen.training.sound_captions import Sound

T = TypeVar("T")
logger = logging.getLogger("anygen.training")

SHOWN = 64
"""Pictures on a report's sheet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure."""

    name: str
    value: float
    """A share of the cases in [0, 1], or in `unit`."""
    cases: int
    seed: int
    seconds: float = 0.0
    """Wall time; 0 where it was measured along with another row."""
    bar: float | None = None
    """What the value has to reach; None: it is reported only."""
    unit: str = ""
    hits: str = ""
    """A character a case, in their order: 1 if it counts, 0 if not; empty where the value is no share."""
    less_is_better: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None without one."""
        return None if self.bar is None else self.value >= self.bar

    @property
    def figure(self) -> str:
        """The value as it is printed."""
        return f"{self.value:.1f} {self.unit}" if self.unit else f"{self.value:.3f}"


class Rows:
    """Collects figures, with the wall time since the one before."""

    def __init__(self, seed: int) -> None:
        self.seed, self.found = seed, list[Row]()
        self.clock = time.monotonic()

    def add(self, name: str, value: float, cases: int, **more: Any) -> float:
        """One more row, `more` of its fields given; returns its value."""
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        row = Row(name=name, value=value, cases=cases, seed=self.seed, seconds=round(seconds, 1), **more)
        self.found.append(row)
        logger.info("%s: %s (%d cases, %.0f s)", name, row.figure, cases, seconds)
        return value

    def share(self, name: str, hits: Sequence[bool], *, bar: float | None = None) -> float:
        """A row whose value is the share of hits."""
        told = "".join("1" if hit else "0" for hit in hits)
        return self.add(name, sum(hits) / len(hits) if hits else 0.0, len(hits), bar=bar, hits=told)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One pair of the matrix: something given, something made of it."""

    given: str
    made: str
    value: float
    """The share of answers that show, sound like or name the thing."""
    cases: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """All figures of one run."""

    suite: str
    model: str
    """The model's name."""
    icons: str
    """The checksum of the icon set."""
    device: str
    rows: tuple[Row, ...]
    matrix: tuple[Cell, ...] = ()
    """Every input with every output; empty for a model of one medium."""
    limit: int | None = None
    """The most cases of a row, if that was told."""

    @property
    def met(self) -> bool:
        """Whether every bar is reached."""
        return all(row.met is not False for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; each row also says whether its bar is met."""
        return asdict(self) | {"met": self.met, "rows": [asdict(row) | {"met": row.met} for row in self.rows]}

    def table(self) -> "Table":
        """For `rich.print`."""
        from rich.table import Table

        table = Table(title=f"{self.model}, suite {self.suite}")
        for heading in ("what", "value", "bar", "met", "cases", "seed"):
            table.add_column(heading, justify="left" if heading == "what" else "right")
        for row in self.rows:
            table.add_row(*_cells(row), style={False: "red", True: "green", None: ""}[row.met])
        return table


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A picture that was asked for."""

    asked: str
    """The caption or the request."""
    seed: int
    picture: "Tensor | None"
    """float[3, S, S] in [0, 1]; None if none was made."""
    answer: str
    """The model's words."""
    looks_like: str
    """The label of the nearest icon."""
    hit: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """A picture that was asked about."""

    picture: "Tensor"
    """float[3, S, S] in [0, 1]."""
    question: str
    answer: str
    label: str
    """What it shows."""
    hit: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Filmed:
    """A clip that was asked for."""

    asked: str
    seed: int
    clip: "Tensor | None"
    """float[F, 3, S, S] in [0, 1]; None if none was made."""
    answer: str
    wanted: str
    """The motion that was asked for."""
    motion: str | None
    """The one that was read."""
    looks_like: str
    """The label of the icon nearest to its middle frame."""
    hit: bool
    """Whether that shows the concept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """A sound that was asked for."""

    asked: str
    seed: int
    waveform: "Tensor | None"
    """float[N] at 16 kHz; None if none was made."""
    answer: str
    sound: "Sound"
    """What was asked for."""
    sounds_like: str
    """The nearest of the bank."""
    direction: str | None
    """rising, falling or repeated."""
    tempo: str | None
    """slow or fast."""
    hit: bool
    """Whether the nearest is of the instrument's family, or the effect itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A message, what it asked for, and the media that its answer held."""

    message: str
    wanted: str
    """text, image, images, video, audio, several, given or impossible."""
    makes: tuple[str, ...] | None
    """The modalities asked for, in order; None: two or more images."""
    made: tuple[str, ...]
    """Those of the answer."""

    @property
    def hit(self) -> bool:
        """Whether the answer holds what was asked for, and in that order."""
        if self.makes is None:
            return len(self.made) > 1 and set(self.made) == {"image"}
        return self.made == self.makes


def write_report(
    result: EvaluationResult,
    out: Path,
    *,
    drawn: Sequence[Drawn] = (),
    named: Sequence[Named] = (),
    asked: Sequence[Asked] = (),
    filmed: Sequence[Filmed] = (),
    heard: Sequence[Heard] = (),
) -> None:
    """Writes `out/README.md` and its sheets, over those of an earlier run.

    Raises:
        OutputError: the disk refuses.
    """
    from anygen.training.evaluation_plots import film_strips, mel_plots, sheet

    out.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# {result.model}: evaluation `{result.suite}`",
        "",
        f"Device {result.device}, icon set {result.icons[:12]}, {sum(row.seconds for row in result.rows):.0f} s.",
        "",
        *_markdown(["what", "value", "bar", "met", "cases", "seed"], [_cells(row) for row in result.rows]),
    ]
    if result.matrix:
        lines += ["", "## Any to any", "", "Down: what is given. Across: what is made of it.", ""]
        lines += _matrix(result.matrix)
    if drawn:
        drawn = drawn[:SHOWN]
        lines += ["", "## Pictures", "", "As they came, not chosen; a grey field stands where no picture was made.", ""]
        lines += _shown(sheet([sample.picture for sample in drawn], out / "pictures.png"))
        told = [[one.asked, one.answer, "" if one.hit else one.looks_like or "nothing", str(one.seed)] for one in drawn]
        lines += _markdown(["", "asked", "answer", "looks more like", "seed"], _numbered(told))
    if filmed:
        filmed = _spread(filmed, SHOWN // 3)
        lines += ["", "## Clips", "", "Every second frame, from left to right; one in so many cases, not chosen.", ""]
        lines += _shown(film_strips([sample.clip for sample in filmed], out / "clips.png"))
        told = [
            [one.asked, one.answer, "" if one.hit else one.looks_like or "nothing", one.motion or "", str(one.seed)]
            for one in filmed
        ]
        lines += _markdown(["", "asked", "answer", "looks more like", "motion read", "seed"], _numbered(told))
    if heard:
        heard = _spread(heard, SHOWN // 2)
        lines += ["", "## Sounds", "", "Log-mel spectrograms, high tones on top; one in so many cases, not chosen.", ""]
        lines += _shown(mel_plots([sample.waveform for sample in heard], out / "sounds.png"))
        told = [
            [one.asked, one.answer, one.sounds_like or "nothing", one.direction or "", one.tempo or "", str(one.seed)]
            for one in heard
        ]
        headings = ["", "asked", "answer", "most like", "direction read", "tempo read", "seed"]
        lines += _markdown(headings, _numbered(told))
    if named:
        named = named[:SHOWN]
        lines += ["", "## Names", "", "As they came, not chosen.", ""]
        lines += _shown(sheet([sample.picture for sample in named], out / "names.png"))
        told = [[one.question, one.answer, one.label, "yes" if one.hit else "no"] for one in named]
        lines += _markdown(["", "question", "answer", "shown", "named"], _numbered(told))
    if missed := [sample for sample in asked if not sample.hit]:
        lines += ["", "## Answered with other media than asked for", ""]
        told = [[one.message, one.wanted, ", ".join(one.made) or "none"] for one in missed]
        lines += _markdown(["message", "wanted", "media"], told)
    with writing(out / "README.md", overwrite=True) as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _spread(samples: "Sequence[T]", most: int) -> "list[T]":
    """At most so many, evenly from all."""
    return [samples[n * len(samples) // most] for n in range(most)] if len(samples) > most else list(samples)


def _matrix(cells: Sequence[Cell]) -> list[str]:
    values = {(cell.given, cell.made): f"{cell.value:.2f} ({cell.cases})" for cell in cells}
    made = list(dict.fromkeys(cell.made for cell in cells))
    given = list(dict.fromkeys(cell.given for cell in cells))
    return _markdown(["given", *made], [[row, *(values.get((row, column), "") for column in made)] for row in given])


def _numbered(rows: list[list[str]]) -> list[list[str]]:
    return [[str(number), *row] for number, row in enumerate(rows, start=1)]


def _shown(path: Path) -> list[str]:
    return [f"![{path.stem}]({path.name})", ""]


def _cells(row: Row) -> list[str]:
    bar = "" if row.bar is None else f"{row.bar:g}"
    met = {None: "", True: "yes", False: "no"}[row.met]
    return [row.name, row.figure, bar, met, str(row.cases), str(row.seed)]


def _markdown(headings: list[str], rows: list[list[str]]) -> list[str]:
    """A table; whatever a cell holds stays in its cell."""
    table = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in table]
