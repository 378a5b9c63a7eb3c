"""What an evaluation found: its rows, the table that is printed, and a folder with pictures for people to look at."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anygen.files import writing

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from rich.table import Table
    from torch import Tensor

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

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None without one."""
        return None if self.bar is None else self.value >= self.bar

    @property
    def figure(self) -> str:
        """The value as it is printed."""
        return f"{self.value:.1f} {self.unit}" if self.unit else f"{self.value:.3f}"


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
class Asked:
    """A message, what it asked for, and how many media its answer held."""

    message: str
    wanted: str
    """text, image or images."""
    media: int

    @property
    def hit(self) -> bool:
        """None for text, one for image, two or more for images."""
        return {"text": self.media == 0, "image": self.media == 1, "images": self.media > 1}[self.wanted]


def write_report(
    result: EvaluationResult,
    out: Path,
    *,
    drawn: Sequence[Drawn] = (),
    named: Sequence[Named] = (),
    asked: Sequence[Asked] = (),
) -> None:
    """Writes `out/README.md` and its sheets, over those of an earlier run.

    Raises:
        OutputError: the disk refuses.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# {result.model}: evaluation `{result.suite}`",
        "",
        f"Device {result.device}, icon set {result.icons[:12]}, {sum(row.seconds for row in result.rows):.0f} s.",
        "",
        *_markdown(["what", "value", "bar", "met", "cases", "seed"], [_cells(row) for row in result.rows]),
    ]
    if drawn:
        drawn = drawn[:SHOWN]
        lines += ["", "## Pictures", "", "As they came, not chosen; a grey field stands where no picture was made.", ""]
        lines += _sheet([sample.picture for sample in drawn], out / "pictures.png")
        cells = [
            [
                str(n),
                sample.asked,
                sample.answer,
                "" if sample.hit else sample.looks_like or "nothing",
                str(sample.seed),
            ]
            for n, sample in enumerate(drawn, start=1)
        ]
        lines += _markdown(["", "asked", "answer", "looks more like", "seed"], cells)
    if named:
        named = named[:SHOWN]
        lines += ["", "## Names", "", "As they came, not chosen.", ""]
        lines += _sheet([sample.picture for sample in named], out / "names.png")
        cells = [
            [str(n), sample.question, sample.answer, sample.label, "yes" if sample.hit else "no"]
            for n, sample in enumerate(named, start=1)
        ]
        lines += _markdown(["", "question", "answer", "shown", "named"], cells)
    if missed := [sample for sample in asked if not sample.hit]:
        lines += ["", "## Answered with another modality than asked for", ""]
        lines += _markdown(["message", "wanted", "media"], [[s.message, s.wanted, str(s.media)] for s in missed])
    with writing(out / "README.md", overwrite=True) as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cells(row: Row) -> list[str]:
    bar = "" if row.bar is None else f"{row.bar:g}"
    met = {None: "", True: "yes", False: "no"}[row.met]
    return [row.name, row.figure, bar, met, str(row.cases), str(row.seed)]


def _markdown(headings: list[str], rows: list[list[str]]) -> list[str]:
    """A table; whatever a cell holds stays in its cell."""
    table = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in table]


def _sheet(pictures: "Sequence[Tensor | None]", path: Path, columns: int = 8) -> list[str]:
    """Writes the numbered pictures as one PNG and returns the lines that show it."""
    from PIL import Image, ImageDraw

    side = next((picture.shape[-1] for picture in pictures if picture is not None), 128)
    gap, head = 6, 14
    cell, line = side + gap, side + gap + head
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * cell, rows * line), "white")
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        x, y = number % columns * cell, number // columns * line
        draw.text((x + 2, y + 1), str(number + 1), fill="black")
        sheet.paste((225, 225, 225) if picture is None else _pil(picture), (x, y + head, x + side, y + head + side))
    with writing(path, overwrite=True) as temporary:
        sheet.save(temporary, format="PNG")
    return [f"![{path.stem}]({path.name})", ""]


def _pil(picture: "Tensor") -> "Picture":
    from anygen.media import Image

    return Image.from_any(picture.clamp(0, 1)).pil
