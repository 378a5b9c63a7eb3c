"""Recipes for a plugin's modality: what moves, what it learns, and what bad input gets. On a tiny LLM."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen import extension, registry
from anygen.config import Config
from anygen.encoders.base import Encoder
from anygen.errors import CheckpointError, ConfigError, ModalityError
from anygen.extension import InputModality, OutputModality
from anygen.features import Condition, ConditionSpec, Features
from anygen.generators.base import Generator
from anygen.media_base import MEDIA, Media
from anygen.messages import MediaPart
from anygen.model import AnyGenModel
from anygen.model_config import PartConfig
from anygen.training import new_input, new_output
from anygen.training.adapters import Pairs, read_captions, read_pairs
from anygen.training.loop import RunLog
from anygen.training.new_input import NewInputRecipe
from anygen.training.new_output import NewOutputRecipe
from anygen.training.recipes import read
from anygen.training.trainer import SafeTrainer


class Smell(Media):
    modality, suffixes = "smell", (".txt",)

    def __init__(self, value: float) -> None:
        self.value = value

    @classmethod
    def _decode(cls, data: bytes, name: str, limits: Any) -> "Smell":
        return cls(float(data))

    @classmethod
    def _convert(cls, value: Any) -> "Smell":
        return cls(float(value))

    def _write(self, path: Any, suffix: str, metadata: Any) -> None:
        path.write_text(str(self.value))


@dataclass(frozen=True, kw_only=True, slots=True)
class NoseConfig(Config):
    width: int = 4


class Nose(Encoder):
    config_class = NoseConfig
    modality = "smell"

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config, self.feature_dim = config or NoseConfig(), 4
        self.scale = torch.nn.Parameter(torch.ones(4))

    def preprocess(self, media: Any) -> dict[str, torch.Tensor]:
        return {"air": torch.tensor([[smell.value] for smell in media])}

    def forward(self, **tensors: torch.Tensor) -> Features:
        air = tensors["air"]
        values = torch.stack([air, air.sin(), air.cos(), air.square()], -1) * self.scale
        return Features(values, torch.ones(len(air), 1, dtype=torch.bool))


class Perfume(Generator):
    modality = "smell"
    condition_spec = ConditionSpec(shapes={"notes": (1, 2)})

    @classmethod
    def from_pretrained(cls, directory: Any, *, device: Any = "cpu", dtype: Any = torch.float32) -> "Perfume":
        return cls()

    def save_pretrained(self, directory: Any) -> None:
        Path(directory).mkdir(parents=True)

    def to(self, device: Any) -> "Perfume":
        return self

    def encode_text(self, captions: Any) -> Condition:
        rows = [[float("rose" in caption), float("strong" in caption)] for caption in captions]
        return Condition({"notes": torch.tensor(rows)[:, None]})

    def generate(self, condition: Condition, *, seeds: Any, **options: Any) -> list[Any]:
        return [Smell(seed) for seed in seeds]

    def denoising_loss(self, condition: Condition, media: Any, *, generator: Any = None) -> Any: ...


INPUT = InputModality(
    media=Smell,
    encoder=Nose,
    name="nose",
    features=(1, 4),
    example=lambda: Smell(0),
    projector=PartConfig(name="mlp", options={"tokens": 2}),
)
OUTPUT = OutputModality(
    media=Smell,
    generator=Perfume,
    name="perfume",
    condition={"notes": (1, 2)},
    example=Perfume,
    signal_tokens=2,
    projector=PartConfig(name="mlp", options={"width": 32}),
    talk=("What is a smell?",),
)


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both, for one test."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "_plugins_loaded", True)
    monkeypatch.setattr(extension, "_inputs", {})
    monkeypatch.setattr(extension, "_outputs", {})
    media = dict(MEDIA)
    extension.register_input(INPUT)
    extension.register_output(OUTPUT)
    yield
    MEDIA.clear()
    MEDIA.update(media)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve smells in files, two captions."""
    lines = []
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(str(number / 4))
        lines.append(json.dumps({"smell": f"{number}.txt", "caption": "a rose" if number > 5 else "an old  shoe"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path / "rows.jsonl"


def state(model: AnyGenModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def losses(log: RunLog) -> list[float]:
    reports = [json.loads(line) for line in log.path.read_text().splitlines()]
    return [report["loss"] for report in reports if "loss" in report]


def test_reading_moves_the_new_projector_alone_and_learns(
    tiny_model: Callable[..., AnyGenModel], rows: Path, tmp_path: Path
) -> None:
    pairs = read_pairs(rows, Nose())
    assert pairs.features.shape == (12, 1, 4) and pairs.captions[5:7] == ["an old shoe", "a rose"]
    model = tiny_model(adapter=True).requires_grad_(False)
    before = state(model)
    recipe = NewInputRecipe(modality="smell", data="", name_steps=200, steps=24, batch_size=6, learning_rate=5e-3)
    log = RunLog(tmp_path / "log", "new_input")
    figures = new_input.teach(model, Nose(), pairs, INPUT, recipe, log)
    assert figures["nearest"] >= 0.9
    after = state(model)
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
    assert {name.split(".")[1] for name in set(after) - set(before)} == {"smell"}
    curve = losses(log)
    assert sum(curve[-4:]) < 0.98 * sum(curve[:4])
    told = new_input.measure(model, "smell", pairs, INPUT, recipe)
    assert told["cases"] == 12 and 0 <= told["named"] <= 1


def test_the_share_that_is_named_counts_answers_word_for_word(
    tiny_model: Callable[..., AnyGenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from anygen.decoding import Answer

    said = [Answer(parts=[text]) for text in ("This is a rose.", "THIS IS  a rose.", "This is a rose garden.", "Rose")]
    monkeypatch.setattr(new_input, "answers", lambda *arguments, **options: said)
    pairs = Pairs(torch.zeros(4, 1, 4), ["a rose"] * 4)
    figures = new_input.measure(tiny_model(), "smell", pairs, INPUT, NewInputRecipe(modality="smell", data=""))
    assert figures == {"named": 0.5, "cases": 4.0}


@pytest.mark.parametrize("tied", [True, False])
def test_making_moves_new_rows_and_that_of_words_alone_and_learns_the_condition(
    tiny_model: Callable[..., AnyGenModel], tmp_path: Path, tied: bool
) -> None:
    captions = [f"a {how} {what}" for how in ("strong", "faint") for what in ("rose", "shoe", "rose tree", "old shoe")]
    model = tiny_model(adapter=True, tie_word_embeddings=tied, max_position_embeddings=512).requires_grad_(False)
    before = state(model)
    recipe = NewOutputRecipe(
        modality="smell",
        captions="",
        kept=6,
        steps=12,
        batch_size=6,
        fit_steps=200,
        fit_batch_size=6,
        fit_learning_rate=5e-3,
        held_out=0.25,
        requests=("Make {caption}.",),
    )
    log = RunLog(tmp_path / "log", "new_output")
    figures = new_output.teach(model, Perfume(), captions, OUTPUT, recipe, log)
    assert set(figures) == {"distance", "made", "cases", "kept"} and figures["cases"] == 2
    after, signals = state(model), model.signal_tokens
    old = [name for name in before if not name.startswith("signal_tokens.")]
    assert [name for name in old if not torch.equal(before[name], after[name])] == []
    words, count = signals.words_id - signals.vocab_size, len(before["signal_tokens.rows"])
    for name in ("signal_tokens.rows", "signal_tokens.head_rows"):
        if name in before:
            moved = (after[name][:count] != before[name]).any(1).nonzero().flatten().tolist()
            assert moved == ([words] if tied or name.endswith("head_rows") else [])
    known = [c for c in captions if c not in held(captions, recipe)]
    states = new_output.read_states(model, "smell", [conversation(caption) for caption in known])
    assert states.shape == (6, 2, 32)
    aims = new_output.targets_of(Perfume(), known)
    mean = {"notes": aims["notes"].mean(0)}
    assert new_output.distance(model, "smell", states, aims, mean) < 0.1
    assert new_output.distance(model, "smell", states.flip(0), aims, mean) > 0.5, "another's states say another thing"


def test_a_model_that_shows_something_else_learns_the_new_in_its_own_words(
    tiny_model: Callable[..., AnyGenModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from anygen.decoding import Answer, Run

    model = tiny_model(adapter=True, max_position_embeddings=512).requires_grad_(False)
    captions = ["a rose", "an old shoe", "tea"]
    asked: list[list[str]] = []
    run = Run(0, "image", torch.zeros(4, 32))

    def said(_: AnyGenModel, talks: Any, **__: Any) -> list[Answer]:
        asked.append([talk[-1].text for talk in talks])
        kinds = [["It smells, look: ", run], [run, "There."], ["I cannot smell."]]
        return [Answer(parts=list(kinds[number % 3])) for number, _ in enumerate(talks)]

    monkeypatch.setattr(new_output, "answers", said)
    wording = new_output.Wording("smell", ["Make {caption}."], OUTPUT.answer)
    own = new_output.own_conversations(model, wording, captions, random.Random(0))
    assert asked == [[f"Make {caption}." for caption in captions]] and list(own) == [0, 1]
    for row, words in ((0, "It smells, look: "), (1, "")):
        ask, answer = own[row]
        assert ask.text == f"Make {captions[row]}." and answer.text == words
        medium: Any = MediaPart("smell", captions[row])  # type: ignore[arg-type]
        assert answer.parts[-1] == medium
    grafted = new_output.add_output(model, Perfume(), signal_tokens=2, projector=OUTPUT.projector)
    data = new_output.Mixture(grafted, wording, captions, {}, [], count=200, seed=0, own=own)
    items = [data[number] for number in range(200)]
    mine = [grafted.prompts.example(own[0]).ids == item["example"].ids for item in items if item["row"] == 0]
    assert 0.3 < sum(mine) / len(mine) < 0.7
    theirs = [
        item["example"].ids == grafted.prompts.example(conversation("tea")).ids for item in items if item["row"] == 2
    ]
    assert all(theirs) and len(theirs) > 20

    monkeypatch.setattr(new_output, "kinds_of_answers", lambda model, prompts: [Answer() for _ in prompts])
    recipe = NewOutputRecipe(modality="smell", captions="", kept=2, steps=2, batch_size=2, fit_steps=2, held_out=0.25)
    with caplog.at_level("WARNING", logger="anygen.training"):
        fresh = tiny_model(adapter=True, max_position_embeddings=512).requires_grad_(False)
        figures = new_output.teach(fresh, Perfume(), [*captions, "rain"], OUTPUT, recipe, RunLog(tmp_path, "x"))
    assert figures["made"] == 0
    assert (
        "0 of 1 requests that were held out got one smell and nothing else; one was answered by 'It smells"
        in caplog.text
    )


def held(captions: list[str], recipe: NewOutputRecipe) -> list[str]:
    shuffled = random.Random(recipe.seed).sample(captions, len(captions))
    return shuffled[: round(recipe.held_out * len(shuffled))]


def conversation(caption: str) -> Any:
    return new_output.Wording("smell", ["Make {caption}."], OUTPUT.answer).conversation(caption, random.Random(0))


def test_the_states_read_in_a_batch_are_those_of_a_manual_pass(tiny_model: Callable[..., AnyGenModel]) -> None:
    from anygen.grafting import add_output

    model = add_output(tiny_model(), Perfume(), signal_tokens=2, projector=OUTPUT.projector)
    talks = [conversation("a rose"), conversation("a very old and very strong shoe")]
    together = new_output.read_states(model, "smell", talks)
    for talk, states in zip(talks, together, strict=True):
        ids = model.prompts.example(talk).ids
        start = ids.index(model.signal_tokens.runs["smell"].start)
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).hidden_states
        torch.testing.assert_close(states, hidden[0, start : start + 2], rtol=1e-4, atol=1e-4)


def test_what_is_kept_of_an_answer_is_its_route_or_its_media(tiny_model: Callable[..., AnyGenModel]) -> None:
    from anygen.decoding import Answer, Run
    from anygen.messages import Message, TextPart

    model = tiny_model()
    signals, asked = model.signal_tokens, [Message("user", (TextPart("Hello"),))]
    words = new_output.keep(model, asked, Answer(route="words", parts=["What?"]))
    assert words.ids[-1] == signals.words_id and [i for i in words.labels if i >= 0] == [signals.words_id]
    run = Run(0, "image", torch.zeros(3, 32))
    shown = new_output.keep(model, asked, Answer(route="media", parts=["Here", run], reason="stop"))
    learned = [i for i in shown.labels if i >= 0]
    assert learned[0] == signals.media_id and signals.runs["image"].start in learned
    assert not set(signals.runs["image"][1:]) & set(learned) and set(signals.runs["image"]) <= set(shown.ids)
    assert learned[-1] in model.llm.eos_ids


def test_encoded_media_are_kept_and_read_back(rows: Path, tmp_path: Path) -> None:
    pairs = read_pairs(rows, Nose())
    again = read_pairs(pairs.save(tmp_path / "pairs.safetensors"), Nose())
    assert again.captions == pairs.captions
    torch.testing.assert_close(again.features, pairs.features.half().float(), rtol=0, atol=0)
    Pairs(torch.zeros(2, 1, 3), ["a", "b"]).save(tmp_path / "narrow.safetensors")
    with pytest.raises(ConfigError, match=r"narrow.safetensors has features \(2, 1, 3\), the encoder's width is 4"):
        read_pairs(tmp_path / "narrow.safetensors", Nose())
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="broken.safetensors does not hold features"):
        read_pairs(tmp_path / "broken.safetensors", Nose())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"smell": "0.txt", "caption": "a"}\nno json\n{"caption": "a"}\n', "lines 2, 3 do not fit; wanted on each li"),
        ('{"smell": "0.txt", "caption": 3}\n', "lines 1 do not fit"),
        ("\n\n", "it is empty; wanted on each line"),
    ],
)
def test_rows_that_do_not_fit_are_told_by_their_lines(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_pairs(tmp_path / "bad.jsonl", Nose())
    with pytest.raises(ConfigError, match="there is no file .* with media and captions"):
        read_pairs(tmp_path / "absent.jsonl", Nose())


def test_captions_are_read_once_each_and_bad_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a  rose\n\n a rose \nan old shoe\n")
    assert read_captions(tmp_path / "c.txt") == ["a rose", "an old shoe"]
    (tmp_path / "c.txt").write_text("a rose\na rose\n")
    with pytest.raises(ConfigError, match="has 1 captions, one a line; at least 2 are needed"):
        read_captions(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe rose")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_captions(tmp_path / "c.txt")
    with pytest.raises(ConfigError, match="there is no file"):
        read_captions(tmp_path / "d.txt")


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("kind: new_input\nout: o\nmodality: smell\ndata: d\nanswer: This.\n", "answer must say the caption"),
        ("kind: new_input\nout: o\nmodality: smell\ndata: d\nbatch_size: 0\n", "batch_size is at least 1"),
        ("kind: new_output\nout: o\nmodality: smell\ncaptions: c\nrequests: [Go.]\n", "got 'Go.'"),
        ("kind: new_output\nout: o\nmodality: smell\ncaptions: c\nheld_out: 1\n", "held_out is from 0 to less than 1"),
        ("kind: new_output\nout: o\nmodality: smell\ncaption: c\n", "unknown key 'caption', did you mean 'captions'"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_loaded(
    recipe: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(recipe)
    with pytest.raises(ConfigError, match=told):
        read(tmp_path / "r.yaml")


def test_what_no_plugin_declares_and_what_has_no_weights_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModalityError, match="no installed plugin declares how to read 'taste'; declared: smell"):
        new_input.train(NewInputRecipe(modality="taste", data="d"), tmp_path)
    with pytest.raises(ModalityError, match="no installed plugin declares how to make 'taste'; declared: smell"):
        new_output.train(NewOutputRecipe(modality="taste", captions="c"), tmp_path)
    with pytest.raises(ConfigError, match="the plugin of smell brings no weights; name a trained encoder"):
        new_input.train(NewInputRecipe(modality="smell", data="d"), tmp_path)
    with pytest.raises(ConfigError, match="the plugin of smell brings no weights; name a generator"):
        new_output.train(NewOutputRecipe(modality="smell", captions="c"), tmp_path)


def test_a_loss_that_is_no_number_ends_the_run(
    tiny_model: Callable[..., AnyGenModel], rows: Path, tmp_path: Path
) -> None:
    pairs = read_pairs(rows, Nose())
    broken = Pairs(torch.full_like(pairs.features, torch.nan), pairs.captions)
    recipe = NewInputRecipe(modality="smell", data="", name_steps=0, steps=3, batch_size=2)
    with pytest.raises(ConfigError, match="the loss is no number at step 1; lower the learning rate"):
        new_input.teach(
            tiny_model().requires_grad_(False), Nose(), broken, INPUT, recipe, RunLog(tmp_path / "log", "x")
        )


def test_a_run_repeats_itself(tiny_model: Callable[..., AnyGenModel], rows: Path, tmp_path: Path) -> None:
    pairs = read_pairs(rows, Nose())
    recipe = NewInputRecipe(modality="smell", data="", name_steps=5, steps=3, batch_size=4)
    weights = []
    for name in ("a", "b"):
        torch.manual_seed(recipe.seed)
        model = tiny_model().requires_grad_(False)
        new_input.teach(model, Nose(), pairs, INPUT, recipe, RunLog(tmp_path / name, "x"))
        weights.append(model.input_projectors["smell"].state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=0)


def test_states_are_read_in_batches_of_like_length_and_come_back_in_order(
    tiny_model: Callable[..., AnyGenModel],
) -> None:
    model, wording = tiny_model(), new_output.Wording("audio", ("Play {caption}.",), "Here is {caption}.")
    captions = ["a bell " * (1 + (5 * number) % 7) for number in range(9)]
    conversations = [wording.conversation(caption, random.Random(0)) for caption in captions]
    states = new_output.read_states(model, "audio", conversations, batch_size=2)
    for row, conversation in enumerate(conversations):
        alone = new_output.read_states(model, "audio", [conversation], batch_size=1)[0]
        torch.testing.assert_close(states[row], alone, rtol=1e-4, atol=1e-5)


def stopping(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a run at its `step`-th training step, counted over all its stages, as if it were killed."""
    original, done = SafeTrainer.training_step, []

    def training_step(self: Any, *arguments: Any, **options: Any) -> Any:
        done.append(1)
        if len(done) == step:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(SafeTrainer, "training_step", training_step)


def reports(log: RunLog) -> list[Any]:
    """Of a run, without the seconds."""
    lines = [json.loads(line) for line in log.text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("step", [2, 7])
def test_a_sense_that_was_being_taught_is_taught_on_bit_for_bit(
    step: int, tiny_model: Callable[..., AnyGenModel], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = read_pairs(rows, Nose())
    recipe = NewInputRecipe(modality="smell", data="", name_steps=3, steps=8, batch_size=2, checkpoint_steps=3)

    def run(name: str) -> tuple[dict[str, Any], list[Any]]:
        torch.manual_seed(recipe.seed)
        model, log = tiny_model().requires_grad_(False), RunLog(tmp_path / name, "x")
        new_input.teach(model, Nose(), pairs, INPUT, recipe, log)
        return state(model), reports(log)

    weights, told = run("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(step, patch)
        run("cut")
    again, told_again = run("cut")
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert told_again[-len(told) :] == told and (len(told_again) == len(told) or step == 2)  # begun anew, appended


@pytest.mark.parametrize("step", [5, 11])
def test_an_answer_that_was_being_taught_is_taught_on_bit_for_bit(
    step: int, tiny_model: Callable[..., AnyGenModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = NewOutputRecipe(
        modality="smell",
        captions="",
        kept=0,
        steps=6,
        batch_size=2,
        fit_steps=8,
        fit_batch_size=2,
        held_out=0,
        checkpoint_steps=2,
    )

    def run(name: str, recipe: NewOutputRecipe = recipe) -> tuple[dict[str, Any], list[Any]]:
        torch.manual_seed(recipe.seed)
        model, log = tiny_model(max_position_embeddings=512).requires_grad_(False), RunLog(tmp_path / name, "x")
        new_output.teach(model, Perfume(), ["a rose", "an old shoe", "a strong rose"], OUTPUT, recipe, log)
        return state(model), reports(log)

    weights, told = run("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(step, patch)
        run("cut")
    with pytest.raises(CheckpointError, match="is of another run: learning_rate was 0.002, is 0.1; begin anew"):
        run("cut", replace(recipe, learning_rate=0.1))
    again, told_again = run("cut")
    assert told == told_again and all(torch.equal(again[name], value) for name, value in weights.items())
