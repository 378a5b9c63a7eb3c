"""Recipes that extend others; and the recipes for a user's own data, each run at tiny size as its reader would."""

import json
from pathlib import Path
from typing import Any

import pytest

from anygen.errors import ConfigError
from anygen.training import recipes
from anygen.training.recipes import read, run

FOLDER = Path(recipes.__file__).parent / "recipes"
OURS = sorted(FOLDER.glob("*.yaml"))


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "r.yaml"


def test_a_recipe_takes_what_it_does_not_state_from_others(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        base="kind: diffusion\nout: x\nicons: i\nvae: v\nsampling: {steps: 4, guidance_scale: 2.0}\n",
        more="icons: j\nsteps: 7\n",
        r="extends: [base.yaml, more.yaml]\nsampling: {steps: 9}\nout: y\n",
    )
    (one,) = read(path, ["steps=8"])
    recipe: Any = one.recipe
    assert (recipe.icons, recipe.vae, recipe.steps, str(one.out)) == ("j", "v", 8, "y")
    assert (recipe.sampling.steps, recipe.sampling.guidance_scale) == (9, 2.0), "tables are joined"
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "s.yaml").write_text("extends: ../r.yaml\nvae: w\n")
    (one,) = read(tmp_path / "deeper" / "s.yaml")
    assert (one.recipe.vae, one.recipe.icons) == ("w", "j")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"r": "extends: gone.yaml\n"}, "there is no recipe .*gone.yaml, which .*r.yaml extends"),
        ({"r": "extends: s.yaml\n", "s": "extends: r.yaml\n"}, "r.yaml extends itself, by way of .*s.yaml"),
        ({"r": "extends: r.yaml\n"}, "r.yaml extends itself"),
        ({"r": "extends: 3\n"}, "extends names a recipe's file, or a list of them, got 3"),
        ({"r": "extends: s.yaml\n", "s": "- r.yaml\n"}, "extends s.yaml, which is no recipe of keys and values"),
        ({"r": "extends: s.yaml\n", "s": "kind: autoencoder\nicon: i\nout: o\n"}, "unknown key 'icon', did you mean"),
    ],
)
def test_what_cannot_be_extended_is_told(files: dict[str, str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        read(write(tmp_path, **files))


@pytest.mark.parametrize("path", [path for path in OURS if path.stem != "common"], ids=lambda path: path.stem)
def test_the_recipe_for_a_stage_runs_as_it_stands(
    path: Path, user_model: Path, user_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    names = {"pairs": "pictures", "chats": "chats", "talk": "talk", "wanted": "preferences"}
    for name, called in names.items():
        rows = (user_data / f"{name}.jsonl").read_text()
        (tmp_path / "data" / f"{called}.jsonl").write_text(rows)
    for picture in user_data.glob("*.png"):
        (tmp_path / "data" / picture.name).write_bytes(picture.read_bytes())
    (tmp_path / "data" / "captions.txt").write_text((user_data / "captions.txt").read_text())
    changes = [f"model={user_model}", "steps=2", "batch_size=2", "retention_probes=4", "held_out=0.4", "sample_every=2"]
    (one,) = read(path)
    recipe: Any = one.recipe
    assert one.out == Path("runs") / path.stem and recipe.cache == "runs/cache"
    if hasattr(recipe, "captions"):  # the tiny model makes clips
        changes += ["captions={video: data/captions.txt}", "samples=[Film a dog.]"]
        if recipe.diffusion_weight:
            changes += ["captions={video: data/clips.jsonl}"]
            clips(tmp_path / "data")
    if getattr(recipe, "peft", None) is not None and path.stem in ("instruction-tuning", "preference-tuning"):
        changes += ["peft={kind: lora, rank: 2}"]
    if path.stem == "preference-tuning":
        pytest.importorskip("trl")
    figures = run(path, changes)
    assert figures["steps"] == 2 and 0 <= figures["retention"] <= 1
    assert figures["held_out"] != figures["held_out_before"] or path.stem.startswith("preference")
    assert (one.out / "model" / "anygen.json").is_file() and (one.out / f"{path.stem}.recipe.yaml").is_file()


def clips(folder: Path) -> None:
    import numpy as np

    from anygen.media import Video

    rows = []
    for number in range(4):
        Video(np.full((3, 16, 16, 3), 60 * number, np.uint8), 6).save(folder / f"{number}.mp4")
        rows.append({"caption": f"a dog {number}", "video": f"{number}.mp4"})
    (folder / "clips.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
