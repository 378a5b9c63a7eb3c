"""Recipes are checked whole before anything is loaded."""

from pathlib import Path

import pytest

from anygen.errors import ConfigError
from anygen.training import recipes
from anygen.training.autoencoder import AutoencoderRecipe, train

MINI = sorted((Path(recipes.__file__).parent / "recipes" / "mini").glob("*.yaml"))
GOOD = "kind: autoencoder\nout: runs/x\nicons: data/icons\nsteps: 10\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    return path


def test_a_recipe_is_its_values(recipe: Path) -> None:
    assert recipes.read(recipe) == (AutoencoderRecipe(icons="data/icons", steps=10), Path("runs/x"), train)


def test_values_of_the_command_line_replace_the_file_s(recipe: Path) -> None:
    read, out, _ = recipes.read(recipe, ["steps=20", "out=elsewhere", "channels=[16, 32]", "minutes=0.5"])
    assert read == AutoencoderRecipe(icons="data/icons", steps=20, channels=(16, 32), minutes=0.5)
    assert out == Path("elsewhere")


def test_nested_values_are_replaced_alone(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text("kind: diffusion\nout: x\nicons: i\nvae: v\nsampling: {steps: 4, guidance_scale: 2.0}\n")
    read, _, _ = recipes.read(path, ["sampling.steps=9"])
    assert (read.sampling.steps, read.sampling.guidance_scale) == (9, 2.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", MINI, ids=lambda path: path.stem)
def test_the_recipes_of_the_embedded_default_are_valid_and_pinned(path: Path) -> None:
    read, out, _ = recipes.read(path)
    assert out.parts[0] == "runs" and type(read).from_dict(read.to_dict()) == read
    assert getattr(read, "minutes", None) is None, "a recipe that is to be reproduced states steps"
    assert getattr(read, "checksum", "pinned"), "a recipe that is to be reproduced pins its icon set"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("kind: [", [], "is not YAML"),
        ("- a\n", [], "must hold keys and values, as in 'kind: autoencoder'"),
        ("kind: vae\nout: x\n", [], "kind is 'vae'; known kinds: autoencoder, diffusion, contrastive"),
        ("kind: autoencoder\nicons: x\n", [], "key 'out' is missing: the folder that the results go to"),
        (GOOD, ["steps"], "'steps' is not of the form key=value"),
        (GOOD, ["=3"], "'=3' is not of the form key=value"),
        (GOOD, ["stepz=3"], "unknown key 'stepz', did you mean 'steps'"),
        (GOOD, ["steps=many"], "'steps': Input should be a valid integer"),
        ("kind: autoencoder\nout: x\n", [], "key 'icons' is missing"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        recipes.read(path, overrides)
    assert message in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no recipe .*gone.yaml"):
        recipes.read(tmp_path / "gone.yaml")
