"""The page about training keeps its word: its rows are read, its recipes are valid, its files and keys are there."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from anygen.media import Image
from anygen.model_config import AnyGenConfig
from anygen.training import recipes
from anygen.training.chat_rows import captioned, check_fit, conversation, preference
from anygen.training.data_rows import SourceOfRows, read
from anygen.training.instruction_tuning import InstructionTuningRecipe
from anygen.training.preference_tuning import PreferenceTuningRecipe
from anygen.training.stage import StageRecipe
from anygen.training.trainable import PeftSettings

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_its_rows_are_rows(tmp_path: Path, tiny_config: AnyGenConfig) -> None:
    import numpy as np

    Image.from_any(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "guitar.png")
    chats, pairs, wanted = blocks("jsonl")
    for name, text in {"chats": chats, "pairs": pairs, "wanted": wanted}.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    for talk in read(str(tmp_path / "chats.jsonl"), conversation):
        check_fit(talk, tiny_config)
    assert read(str(tmp_path / "pairs.jsonl"), captioned("image"))[0].caption == "a guitar"
    (pair,) = read(str(tmp_path / "wanted.jsonl"), preference)
    assert (pair.chosen.text, pair.rejected.text) == ("", "I cannot draw.")


def test_its_recipes_are_valid(tmp_path: Path) -> None:
    source, heir = blocks("yaml")
    assert SourceOfRows.from_dict(yaml.safe_load(source)["data"]).columns == {"messages": "conversations"}
    folder = ROOT / "training" / "recipes"
    path = tmp_path / "guitars.yaml"
    path.write_text(heir.replace("encoder-alignment.yaml", str(folder / "encoder-alignment.yaml")))
    (one,) = recipes.read(path)
    assert one.recipe.data == {"image": "guitars.jsonl"} and one.out == Path("runs/guitars")  # type: ignore[attr-defined]


def test_its_keys_are_those_of_recipes() -> None:
    known = {f.name for cls in (InstructionTuningRecipe, PreferenceTuningRecipe, PeftSettings) for f in fields(cls)}
    table = PAGE.split("| to | write |")[1].split("\n\n")[0]
    written = {key.split(".")[0] for key in re.findall(r"`([a-z_.]+)(?::|`)", table)}
    prose = set(re.findall(r"`([a-z_]+): ", PAGE.split("## Recipes")[0])) - {"format"}
    values = {"qlora", "ia3", "prefix", "options", "keep", "rows"}
    assert written - values <= known and prose <= known, (written - values - known, prose - known)
    assert {"trains", "unfreeze", "peft", "min_snr", "resume"} <= written
    told = {"samples", "sample_every", "report_to", "cache", "bad_rows", "max_tokens", "all_turns"}
    assert all(f"`{key}" in PAGE for key in told) and told <= {f.name for f in fields(StageRecipe)} | {"all_turns"}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", PAGE))))
def test_its_links_lead_somewhere(link: str) -> None:
    assert (ROOT / "docs" / link).exists()


def test_every_recipe_beside_mini_is_named() -> None:
    there = {path.name for path in (ROOT / "training" / "recipes").glob("*.yaml")} - {"common.yaml"}
    assert all(name in PAGE for name in there)
