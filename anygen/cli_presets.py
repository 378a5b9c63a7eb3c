"""`anygen info` of presets: all of them, the parts of one, and the memory it needs."""

import json
import sys
from typing import TYPE_CHECKING, Any

from anygen.preset_parts import PRECISIONS, Part
from anygen.presets import CONTEXT, GIB, PRESETS, WORKING_BYTES, Preset

if TYPE_CHECKING:
    from rich.table import Table

    from anygen.memory_need import ModelNeed

_WIDTH = 200
"""Columns of a table that nobody looks at in a terminal."""
_HEADS = ("fp32", "bf16/fp16", "8-bit", "4-bit")
"""`PRECISIONS` as tables have them."""


def list_presets(*, as_json: bool) -> int:
    """Prints every preset with its parts, marks and memory."""
    if as_json:
        print(json.dumps({"presets": [preset.to_dict() for preset in PRESETS.values()]}))
        return 0
    modalities = list(dict.fromkeys(modality for preset in PRESETS.values() for modality in preset.generators))
    table = _table("preset", "LLM", "encoder", *modalities, right=("bf16 memory",))
    for preset in PRESETS.values():
        made = (preset.generators.get(modality) for modality in modalities)
        cells = [_marked(part) if part else "-" for part in (preset.llm, preset.encoder, *made)]
        table.add_row(preset.name, *cells, size_of(preset.total("bf16")))
    _print(table)
    print("NC: no commercial use; G: terms have to be accepted before it is fetched (`hf auth login`).")
    print("A preset is a recipe: its projectors are to be trained. `anygen info PRESET` tells its parts and sizes.")
    return 0


def show_preset(preset: Preset, *, memory: bool, as_json: bool) -> int:
    """Prints a preset's parts, or with `memory` what it needs in memory."""
    if as_json:
        facts = preset.to_dict()
        print(json.dumps({"name": preset.name, "memory": facts["memory"]} if memory else facts))
    elif memory:
        _show_memory(preset)
    else:
        _show_parts(preset)
    return 0


def show_need(need: "ModelNeed", name: str, *, as_json: bool) -> int:
    """Prints what a model of one's own needs in memory, and what it takes at the most under each policy."""
    from anygen.memory_need import POLICIES

    totals = {policy: {p: need.total(p, policy) for p in PRECISIONS} for policy in POLICIES}
    if as_json:
        needs = {one.role: one.bytes for one in need.needs}
        print(json.dumps({"name": name, "memory": {"needs": needs, "offload": totals, "unknown": need.unknown}}))
        return 0
    table = _table(f"{name} needs", right=_HEADS)
    for one in need.needs:
        table.add_row(one.role, *map(size_of, _by(one.bytes)))
    table.add_section()
    for policy, sizes in totals.items():
        table.add_row(f"offload {policy}", *map(size_of, _by(sizes)))
    _print(table)
    if need.unknown:
        print(f"Not counted, as it is not on this machine yet: {', '.join(need.unknown)}.")
    print(f"Weights are counted, working memory is estimated; keys and values: {CONTEXT:,} tokens.")
    return 0


def size_of(size: int | None) -> str:
    """Bytes for people."""
    if size is None:
        return "unknown"
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{1024 * size / GIB:.1f} MiB"


def _show_parts(preset: Preset) -> None:
    print(f"{preset.name}: {preset.summary}. A recipe: its projectors are to be trained.")
    table = _table("part", "is", "from", "licence", right=("parameters", *_HEADS))
    needs = {need.role: need.bytes for need in preset.needs()}
    for role, part in preset.parts.items():
        sizes = needs["encoders" if role == "encoder" else role]
        licence = " ".join(filter(None, (part.licence or "unknown", part.marks and f"({part.marks})")))
        source = f"{part.repo}@{part.revision[:12] if part.revision else 'unknown'}"
        table.add_row(role, part.title, source, licence, _count(part.parameters), *map(size_of, _by(sizes)))
    for modality, part in preset.generators.items():
        role = f"{modality} text encoders"
        table.add_row(role, "", "", "", _count(part.text_parameters), *map(size_of, _by(needs[role])))
    for role, count in preset.trained().items():
        table.add_row(role, "trained", "", "", _count(count), *[size_of(4 * count)] * len(PRECISIONS))
    _print(table)
    print(_totals(preset))
    if len({*preset.encoder.trunks.values()}) < len(preset.encoder.trunks):
        print(f"encoder: {preset.encoder.title} in float32, loaded for each modality that is read")
    for role, part in preset.parts.items():
        if part.note:
            print(f"{role}: {part.note}")
        if part.directory is not None:
            print(f"{role}: read from the directory {part.directory}; to make it: {part.how}")
    if preset.note:
        print(preset.note)


def _show_memory(preset: Preset) -> None:
    table = _table(f"{preset.name} needs", right=_HEADS)
    needs = preset.needs()
    for answering in (True, False):
        for need in needs:
            if need.answering == answering:
                table.add_row(need.role, *map(size_of, _by(need.bytes)))
        table.add_section()
        role = "to answer" if answering else "with text encoders"
        table.add_row(role, *(size_of(preset.total(p, texts=not answering)) for p in PRECISIONS))
        table.add_section()
    _print(table)
    print(
        f"With all generators resident. Working memory: {size_of(WORKING_BYTES)} in bf16, measured for a picture of "
        f"512 x 512, 16 frames of 320 x 576 and 5 s of sound; keys and values: {CONTEXT:,} tokens. "
        "Text encoders are needed to train on captions, and until a generator was saved with its negative condition."
    )


def _totals(preset: Preset) -> str:
    told = ", ".join(f"{size_of(preset.total(p))} {head}" for p, head in zip(PRECISIONS, _HEADS, strict=True))
    return f"to answer, with an allowance for what is computed: {told} (`anygen info {preset.name} --memory`)"


def _by(sizes: Any) -> list[int | None]:
    return [sizes[precision] for precision in PRECISIONS]


def _count(parameters: int | None) -> str:
    return "unknown" if parameters is None else f"{parameters:,}"


def _marked(part: Part) -> str:
    marks = [mark for mark, true in (("NC", part.non_commercial), ("G", part.gated)) if true]
    return f"{part.title} ({', '.join(marks)})" if marks else part.title


def _table(*left: str, right: tuple[str, ...] = ()) -> "Table":
    from rich.table import Table

    table = Table()
    for head in left:
        table.add_column(head)
    for head in right:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _print(table: "Table") -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
