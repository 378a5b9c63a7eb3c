"""Recipes are checked whole before anything is loaded."""

from pathlib import Path

import pytest

from anygen.errors import ConfigError, OutputError
from anygen.training import recipes
from anygen.training.autoencoder import AutoencoderRecipe, train

FOLDER = Path(recipes.__file__).parent / "recipes" / "mini"
MINI = sorted(FOLDER.glob("[0-9]*.yaml"))
LISTS = sorted(set(FOLDER.glob("*.yaml")) - set(MINI))
GOOD = "kind: autoencoder\nout: runs/x\nicons: data/icons\nsteps: 10\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    return path


def test_a_recipe_is_its_values(recipe: Path) -> None:
    (run,) = recipes.read(recipe)
    assert (run.name, run.recipe) == ("r", AutoencoderRecipe(icons="data/icons", steps=10))
    assert (run.out, run.train) == (Path("runs/x"), train)


def test_values_of_the_command_line_replace_the_file_s(recipe: Path) -> None:
    (run,) = recipes.read(recipe, ["steps=20", "out=elsewhere", "channels=[16, 32]", "minutes=0.5"])
    assert run.recipe == AutoencoderRecipe(icons="data/icons", steps=20, channels=(16, 32), minutes=0.5)
    assert run.out == Path("elsewhere")


def test_nested_values_are_replaced_alone(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text("kind: diffusion\nout: x\nicons: i\nvae: v\nsampling: {steps: 4, guidance_scale: 2.0}\n")
    (run,) = recipes.read(path, ["sampling.steps=9"])
    assert (run.recipe.sampling.steps, run.recipe.sampling.guidance_scale) == (9, 2.0)  # type: ignore[attr-defined]


def a_list(tmp_path: Path, text: str) -> Path:
    """A list beside two recipes, r and s."""
    for name in ("r", "s"):
        (tmp_path / f"{name}.yaml").write_text(GOOD)
    path = tmp_path / "list.yaml"
    path.write_text(text)
    return path


def test_a_list_is_its_recipes_in_order(tmp_path: Path) -> None:
    path = a_list(tmp_path, "- s.yaml\n- {recipe: r.yaml, steps: 30, out: y}\n")
    runs = recipes.read(path, ["seed=7", "s:steps=20"])
    assert [(run.name, run.out) for run in runs] == [("s", Path("runs/x")), ("r", Path("y"))]
    assert [run.recipe.steps for run in runs] == [20, 30]  # type: ignore[attr-defined]
    assert [run.recipe.seed for run in runs] == [7, 7]  # type: ignore[attr-defined]


def test_a_list_is_run_once_all_of_it_is_known_to_be_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def trained(recipe: AutoencoderRecipe, out: Path) -> dict[str, float]:
        ran.append(f"{out} {recipe.steps}")
        return {"psnr": float(recipe.steps)}

    monkeypatch.setattr("anygen.training.autoencoder.train", trained)
    monkeypatch.chdir(tmp_path)
    path = a_list(tmp_path, "- r.yaml\n- {recipe: s.yaml, steps: 30}\n")
    assert recipes.run(path) == {"r: psnr": 10.0, "s: psnr": 30.0}
    assert ran == ["runs/x 10", "runs/x 30"] and (tmp_path / "runs/x/s.recipe.yaml").exists()
    ran.clear()
    with pytest.raises(ConfigError, match="unknown key 'stepz'"):
        recipes.run(a_list(tmp_path, "- r.yaml\n- {recipe: s.yaml, stepz: 30}\n"))
    assert ran == []


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("- 3\n", [], "entry 1 must be a recipe's file, or 'recipe: FILE' with other values"),
        ("- r.yaml\n- {steps: 3}\n", [], "entry 2 must be a recipe's file"),
        ("- list.yaml\n", [], "entry 1, list.yaml, is a list itself; lists hold recipes"),
        ("- gone.yaml\n", [], "there is no recipe"),
        ("- r.yaml\n- s.yaml\n", ["t:steps=3"], "has no recipe 't'; it has r, s"),
    ],
)
def test_what_is_wrong_with_a_list_is_said(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipes.read(a_list(tmp_path, text), overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", MINI, ids=lambda path: path.stem)
def test_the_recipes_of_the_embedded_default_are_valid_and_pinned(path: Path) -> None:
    (run,) = recipes.read(path)
    read = run.recipe
    assert run.out.parts[0] == "runs" and type(read).from_dict(read.to_dict()) == read
    assert getattr(read, "minutes", None) is None, "a recipe that is to be reproduced states steps"
    assert getattr(read, "checksum", "pinned"), "a recipe that is to be reproduced pins its icon set"


def test_the_lists_of_the_embedded_default_hold_each_recipe_once() -> None:
    listed = [run.name for path in LISTS for run in recipes.read(path)]
    assert LISTS and sorted(listed) == sorted(path.stem for path in MINI)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("kind: [", [], "is not YAML"),
        ("a\n", [], "must hold keys and values, as in 'kind: autoencoder', or a list of recipes"),
        ("kind: vae\nout: x\n", [], "kind is 'vae'; known kinds: autoencoder, diffusion, contrastive"),
        ("kind: autoencoder\nicons: x\n", [], "key 'out' is missing: the folder that the results go to"),
        (GOOD, ["steps"], "'steps' is not of the form key=value"),
        (GOOD, ["=3"], "'=3' is not of the form key=value"),
        (GOOD, ["stepz=3"], "unknown key 'stepz', did you mean 'steps'"),
        (GOOD, ["steps=many"], "'steps': Input should be a valid integer"),
        ("kind: autoencoder\nout: x\n", [], "key 'icons' is missing"),
        ("kind: autoencoder\nout: 5\nicons: x\n", [], "key 'out' is 5, not the folder that the results go to"),
        (GOOD, ["steps.x=3"], "'steps.x=3': steps is 10, which has no keys"),
        (GOOD, ["icons=["], "'icons=[': the value is not YAML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        recipes.read(path, overrides)
    assert message in str(caught.value)


def test_null_takes_a_key_out_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("kind: encoder_alignment\nout: x\nsave_every: 9\ndata: {image: i, audio: a}\n")
    (tmp_path / "heir.yaml").write_text("extends: base.yaml\nsave_every: null\ndata: {image: null, video: v}\n")
    (run,) = recipes.read(tmp_path / "heir.yaml")
    assert run.recipe.to_dict()["data"] == {"audio": "a", "video": "v"} and run.recipe.to_dict()["save_every"] is None
    (run,) = recipes.read(tmp_path / "heir.yaml", ["data.audio=null"])
    assert run.recipe.to_dict()["data"] == {"video": "v"}


def test_results_that_cannot_be_written_are_told(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file cannot take the results: .*exists"):
        recipes.run(recipe, [f"out={tmp_path / 'file'}"])


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no recipe .* that can be read"):
        recipes.read(tmp_path)
    with pytest.raises(ConfigError, match="there is no recipe .*gone.yaml"):
        recipes.read(tmp_path / "gone.yaml")
