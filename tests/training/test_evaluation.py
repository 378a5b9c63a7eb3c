"""The suite `mini` on a model of real classes at tiny width."""

import ast
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch

from anygen.decoding import Answer, collect, decode
from anygen.encoders.imagebind import ImageBindEncoder
from anygen.encoders.imagebind_config import ImageBindConfig, VisionConfig
from anygen.errors import CheckpointError, ConfigError, ModalityError
from anygen.generators.stable_diffusion import StableDiffusionGenerator
from anygen.llm import LLM
from anygen.messages import Message, TextPart
from anygen.model import AnyGenModel
from anygen.model_config import (
    AnyGenConfig,
    InputConfig,
    ModalityConfig,
    OutputConfig,
    PartConfig,
    SourceConfig,
    SourcedPartConfig,
)
from anygen.training import evaluation_cases
from anygen.training.captions import NUMBERS, Drawing, canonical
from anygen.training.evaluation import (
    MEDIA_KINDS,
    ask,
    draw_captions,
    draw_requests,
    evaluate,
    judge,
    name_pictures,
    small_talk,
)
from anygen.training.evaluation_cases import (
    CONTROLS,
    QUESTIONS,
    Case,
    control_cases,
    held_out_chat,
    held_out_requests,
    pair_cases,
    phrase,
    routing_cases,
)
from anygen.training.evaluation_media_cases import media_requests
from anygen.training.evaluation_report import Asked, Drawn, EvaluationResult, Named, Row, write_report
from anygen.training.icons import IconSet
from anygen.training.measures import NearestIcon, on_white
from anygen.training.pictures import is_held_out

CHAT = ("Hi there!", "What is 8 plus 13?", "How do vaccines work?", "ok")


@pytest.fixture(scope="module")
def generator(trained_generator: tuple[Path, dict[str, float]]) -> StableDiffusionGenerator:
    return StableDiffusionGenerator.from_pretrained(trained_generator[0] / "generator")


@pytest.fixture
def model(tiny_llm: Callable[..., LLM], generator: StableDiffusionGenerator) -> AnyGenModel:
    """Reads pictures by a tiny ImageBind, makes conditions for the tiny generator; with an adapter of some effect."""
    from peft import LoraConfig

    vision = VisionConfig(width=16, blocks=1, heads=2, image_size=32, patch=16)
    torch.manual_seed(0)
    encoder = ImageBindEncoder(ImageBindConfig(out_dim=8, vision=vision), modality="image")
    options = {"width": 16, "heads": 2, "ffn": 16, "encoder_layers": 1, "decoder_layers": 1}
    image = ModalityConfig(
        input=InputConfig(
            encoder=SourcedPartConfig(name="imagebind", source=SourceConfig(path="encoders/imagebind")), feature_dim=8
        ),
        output=OutputConfig(
            signal_tokens=3,
            condition={name: tuple(shape) for name, shape in generator.condition_spec.shapes.items()},
            generator=SourcedPartConfig(name="stable_diffusion", source=SourceConfig(path="generators/image")),
            projector=PartConfig(name="text_fc", options=options),
        ),
    )
    config = AnyGenConfig(name="tiny", llm=SourceConfig(repo="tiny-llm"), modalities={"image": image})
    model = AnyGenModel(config, tiny_llm(max_position_embeddings=512), {"image": encoder}).initialize(seed=0)
    model.llm.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def teach(model: AnyGenModel, route: str, messages: list[str]) -> None:
    """Sets the rows so that these messages get that route, and those routed to media a picture at once."""
    signals, rows = model.signal_tokens, model.signal_tokens.rows.data

    def last(tail: list[int]) -> torch.Tensor:
        states = []
        for message in messages:
            ids = torch.tensor([model.prompts.prompt([Message("user", (TextPart(message),))]).ids + tail])
            with torch.no_grad():
                states.append(model(ids).hidden_states[0, -1])
        return torch.stack(states).mean(0)

    ids = {"words": signals.words_id, "media": signals.media_id}
    wanted, other = (ids[name] - signals.vocab_size for name in (route, "media" if route == "words" else "words"))
    rows[wanted], rows[other] = 4 * last([]), -4 * last([])
    if route == "media":
        rows[signals.runs["image"].start - signals.vocab_size] = 4 * last([signals.media_id])


def test_there_are_enough_held_out_messages() -> None:
    requests = held_out_requests()
    counts = {modality: len(templates) for modality, templates in requests.items()}
    assert counts["image"] >= 200 and counts["text"] >= 100 and counts["images"] >= 20 and len(counts) == 3
    assert sum(counts.values()) >= 330 and len(held_out_chat()) >= 80 and len(QUESTIONS) >= 12
    texts = [text for templates in requests.values() for text in templates] + held_out_chat()
    assert len(set(texts)) == len(texts)


def test_slots_stand_where_they_are_filled() -> None:
    for modality, templates in held_out_requests().items():
        for template in templates:
            slots = sorted(re.findall(r"\{(\w*)\}", template))
            assert slots in {"image": (["x"],), "images": (["x", "y"],), "text": ([], ["x"])}[modality], template


def test_no_training_wording_is_held_out() -> None:
    """Every string of the modules and word lists that the training reads, slots and marks aside, is another."""
    folder = Path(evaluation_cases.__file__).parent
    strings: set[str] = set()
    for name in ("requests.py", "phrases.py", "phrases_media.py", "wishes.py", "instruction.py", "naming.py"):
        nodes = ast.walk(ast.parse((folder / name).read_text(encoding="utf-8")))
        strings |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for path in folder.glob("words/*"):
        if not path.name.startswith("heldout_"):
            text = path.read_text(encoding="utf-8")
            strings |= set(re.findall(r'"([^"]*)"', text)) if path.suffix == ".json" else set(text.splitlines())
    held = [text for templates in held_out_requests().values() for text in templates] + held_out_chat()
    held += [request.text for kind in MEDIA_KINDS for request in media_requests(kind)]
    assert not set(map(_bare, [*held, *QUESTIONS])) & set(map(_bare, strings))


def _bare(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", re.sub(r"\{\w*\}", " slot ", text.lower())))


def test_a_phrase_says_all_of_the_drawing() -> None:
    rng = random.Random(0)
    drawing = Drawing(label="owl", style="flat", place="at the top", background="orange")
    phrases = {phrase(drawing, rng) for _ in range(100)}
    assert all(re.search(r"\b(an|a flat) owl at the top\b", text) and "flat" in text for text in phrases)
    assert all(re.search(r"(on|with|against) an orange background", text) for text in phrases) and len(phrases) > 8
    assert phrase(Drawing(label="owl", count=3, background="park"), rng) == "three owls in a meadow"


def test_pairs_are_different_and_plain(icons: IconSet) -> None:
    cases = pair_cases(icons, 30, seed=1)
    assert len({(case.concept, case.drawing.style) for case in cases}) == 30
    assert len({case.seed for case in cases}) == 30
    for case in cases:
        concept = icons.concepts[case.concept]
        assert canonical(case.drawing).endswith(f"{concept.label}, in the {case.drawing.style} style")
        assert any(name in case.request for name in (concept.label, *concept.aliases)) and "{" not in case.request
    assert pair_cases(icons, 30, seed=1) == cases != pair_cases(icons, 30, seed=2)
    assert pair_cases(icons, 5, seed=1) == cases[:5]


@pytest.mark.parametrize("name", CONTROLS)
def test_control_cases_ask_for_held_out_combinations(name: str, large_icons: IconSet) -> None:
    control = CONTROLS[name]
    cases = control_cases(large_icons, control, 4, seed=0)
    assert cases
    for case in cases:
        value = getattr(case.drawing, control.field)
        assert value in control.values
        words = NUMBERS[value] if name == "count" else value
        assert words in case.request and words in canonical(case.drawing)
        assert is_held_out(replace(case.drawing, background=case.drawing.background or "white"), case.concept)


def test_routing_cases_fill_every_slot(icons: IconSet) -> None:
    cases = routing_cases(icons, None, seed=0)
    assert len(cases) == sum(map(len, held_out_requests().values()))
    assert not any("{" in message and "}" in message for message, _ in cases)
    assert len(routing_cases(icons, 2, seed=0)) == 6


def test_a_picture_of_the_icon_is_a_hit_and_of_another_a_miss(icons: IconSet) -> None:
    drawing = Drawing(label="red circle", style="cartoon")
    case = Case(concept=0, drawing=drawing, request="Draw a ball.", seed=3)
    pictures = [on_white(icons, [0])[0], on_white(icons, [6])[0], on_white(icons, [1])[0], None]
    judged = judge([case] * 4, pictures, NearestIcon(icons))
    assert [sample.hit for sample in judged] == [True, True, False, False]  # icon 6 is the circle in another style
    assert [sample.looks_like for sample in judged] == ["red circle", "red circle", "blue square", ""]
    assert judged[0].asked == "a red circle, in the cartoon style"
    answered = judge([case], pictures[:1], NearestIcon(icons), [Answer(parts=["Here is a red circle."])])
    assert (answered[0].asked, answered[0].answer) == ("Draw a ball.", "Here is a red circle.")


def test_pictures_of_captions_do_not_depend_on_the_batch(icons: IconSet, generator: StableDiffusionGenerator) -> None:
    cases = pair_cases(icons, 5, seed=0)
    together, alone = (draw_captions(generator, cases, size) for size in (5, 1))
    for one, other in zip(together, alone, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=0, atol=2.1 / 255)
    condition = generator.encode_text([canonical(cases[3].drawing)])
    (image,) = generator.generate(condition, seeds=[cases[3].seed])
    assert alone[3] is not None and torch.equal(alone[3] * 255, torch.from_numpy(image.array).permute(2, 0, 1).float())


def test_requests_are_drawn_from_the_first_run_of_their_answer(
    model: AnyGenModel, icons: IconSet, generator: StableDiffusionGenerator
) -> None:
    cases = pair_cases(icons, 3, seed=0)
    teach(model, "media", [case.request for case in cases])
    pictures, answers = draw_requests(model, generator, cases, batch_size=2)
    prompt = model.prompts.prompt([Message("user", (TextPart(cases[1].request),))])
    (alone,) = collect(decode(model, [prompt]), 1)
    condition = model.project("image", alone.runs[0].states[None].detach())
    (image,) = generator.generate(condition, seeds=[cases[1].seed])
    assert pictures[1] is not None and len(answers) == 3
    wanted = torch.from_numpy(image.array).permute(2, 0, 1) / 255
    torch.testing.assert_close(pictures[1], wanted, rtol=0, atol=2.1 / 255)


def test_a_request_that_is_answered_by_words_draws_nothing(
    model: AnyGenModel, icons: IconSet, generator: StableDiffusionGenerator
) -> None:
    cases = pair_cases(icons, 3, seed=0)
    teach(model, "words", [case.request for case in cases])
    pictures, answers = draw_requests(model, generator, cases)
    assert pictures == [None] * 3 and [answer.route for answer in answers] == ["words"] * 3


def test_modalities_are_told_by_the_runs_of_the_answer(model: AnyGenModel) -> None:
    cases = [("Draw a ball.", "image"), ("What is a ball?", "text")]
    teach(model, "media", [message for message, _ in cases])
    assert all(asked.made[0] == "image" for asked in ask(model, cases))
    teach(model, "words", [message for message, _ in cases])
    assert [(asked.made, asked.hit) for asked in ask(model, cases, batch_size=1)] == [((), False), ((), True)]


@pytest.mark.parametrize(
    ("makes", "hits"),
    [
        ((), [True, False, False, False, False]),
        (("image",), [False, True, False, False, False]),
        (None, [False, False, True, False, False]),
        (("image", "audio"), [False, False, False, True, False]),
        (("audio", "image"), [False, False, False, False, True]),
    ],
)
def test_an_answer_holds_what_was_asked_for_in_that_order(makes: tuple[str, ...] | None, hits: list[bool]) -> None:
    answers = [(), ("image",), ("image", "image"), ("image", "audio"), ("audio", "image")]
    assert [Asked(message="", wanted="", makes=makes, made=made).hit for made in answers] == hits


def test_small_talk_is_the_base_model_s_own(model: AnyGenModel) -> None:
    teach(model, "words", list(CHAT))
    assert small_talk(model, CHAT, batch_size=3) == [True] * 4
    teach(model, "media", list(CHAT))
    assert small_talk(model, CHAT, batch_size=3) == [False] * 4


def test_small_talk_notices_an_adapter_that_stays_on(model: AnyGenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    import anygen.training.evaluation as module

    teach(model, "words", list(CHAT))
    base = module.base_answers
    monkeypatch.setattr(model.llm, "adapter_off", nullcontext)
    adapted = base(model, CHAT)
    monkeypatch.undo()
    assert adapted != base(model, CHAT)
    monkeypatch.setattr(module, "base_answers", lambda model, messages: adapted[: len(messages)])
    assert not all(small_talk(model, CHAT))


def test_each_picture_is_asked_about(model: AnyGenModel, icons: IconSet) -> None:
    named = name_pictures(model, on_white(icons, range(3)), [0, 1, 2], icons, seed=0, batch_size=2)
    assert [sample.label for sample in named] == ["red circle", "blue square", "green triangle"]
    assert all(sample.question in QUESTIONS for sample in named)
    again = name_pictures(model, on_white(icons, range(3)), [0, 1, 2], icons, seed=0, batch_size=3)
    assert [sample.answer for sample in named] == [sample.answer for sample in again]


def test_the_suite_measures_every_row(
    model: AnyGenModel, icons_dir: Path, generator: StableDiffusionGenerator, tmp_path: Path
) -> None:
    result = evaluate(model, {"image": generator}, icons_dir, limit=1, report=tmp_path / "report")
    bars = {row.name: row.bar for row in result.rows if row.bar is not None}
    assert list(bars.values()) == [0.95, 0.90, 0.95, 28, 0.97, 0.85, 0.60, 0.95]
    assert [row.cases for row in result.rows][:5] == [1, 1, 1, 1, 64]
    assert len(result.rows) == 18 and all(row.seed == 0 for row in result.rows)
    again = evaluate(model, {"image": generator}, icons_dir, limit=1)
    assert [(row.name, row.value) for row in again.rows] == [(row.name, row.value) for row in result.rows]
    some = evaluate(model, {"image": generator}, icons_dir, limit=1, only=["talk", "modality"])
    names = [row.name for row in result.rows if row.name.startswith(("modality", "small talk"))]
    assert [row.name for row in some.rows] == names and len(names) == 5
    read = json.loads(json.dumps(result.to_dict()))
    assert read["model"] == "tiny" and read["rows"][4]["unit"] == "dB" and read["rows"][4]["met"] is False
    text = (tmp_path / "report" / "README.md").read_text(encoding="utf-8")
    assert all(row.name in text for row in result.rows)
    assert (tmp_path / "report" / "pictures.png").exists() and (tmp_path / "report" / "names.png").exists()


def test_what_the_suite_lacks_is_said(
    model: AnyGenModel, icons_dir: Path, generator: StableDiffusionGenerator, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="there is no suite 'maxi'; known: mini"):
        evaluate(model, {"image": generator}, icons_dir, suite="maxi")
    with pytest.raises(CheckpointError, match="there is no icon set in .*: make it with"):
        evaluate(model, {"image": generator}, tmp_path)
    with pytest.raises(ModalityError, match="needs a Stable Diffusion generator for them; generators given: none"):
        evaluate(model, {}, icons_dir)
    del model.encoders["image"]
    with pytest.raises(ModalityError, match="asks about pictures; encoders loaded: none"):
        evaluate(model, {"image": generator}, icons_dir)


def test_a_result_is_met_if_no_bar_is_missed() -> None:
    def result(*rows: Row) -> EvaluationResult:
        return EvaluationResult(suite="mini", model="m", icons="c", device="cpu", rows=rows)

    good = Row(name="good", value=0.96, bar=0.95, cases=100, seed=0)
    bare = Row(name="bare", value=0.1, cases=60, seed=0)
    bad = Row(name="bad", value=27.94, bar=28, unit="dB", cases=64, seed=0)
    assert (good.met, bare.met, bad.met) == (True, None, False)
    assert result(good, bare).met and not result(good, bad).met


def test_the_table_shows_what_was_measured() -> None:
    from rich.console import Console

    rows = (
        Row(name="concepts", value=0.9571, bar=0.95, cases=500, seed=7),
        Row(name="VAE", value=28.24, bar=28, unit="dB", cases=256, seed=7),
    )
    screen = StringIO()
    result = EvaluationResult(suite="mini", model="m", icons="c", device="cpu", rows=rows)
    Console(file=screen, width=100).print(result.table())
    shown = screen.getvalue()
    assert re.search(r"concepts\s*│\s*0\.957\s*│\s*0\.95\s*│\s*yes\s*│\s*500\s*│\s*7", shown)
    assert re.search(r"VAE\s*│\s*28\.2 dB\s*│\s*28\s*│\s*yes\s*│\s*256\s*│\s*7", shown)


def test_a_report_lists_pictures_names_and_misrouted_messages(tmp_path: Path) -> None:
    from PIL import Image

    red = torch.zeros(3, 16, 16)
    red[0] = 1
    drawn = [
        Drawn(asked="a | b", seed=4, picture=red, answer="Here.", looks_like="apple", hit=True),
        Drawn(asked="c", seed=5, picture=None, answer="", looks_like="", hit=False),
    ]
    named = [Named(picture=red, question="What?", answer="a\nball", label="red circle", hit=False)]
    asked = [
        Asked(message="Draw!", wanted="image", makes=("image",), made=()),
        Asked(message="fine", wanted="text", makes=(), made=()),
    ]
    result = EvaluationResult(suite="mini", model="m", icons="c", device="cpu", rows=())
    write_report(result, tmp_path, drawn=drawn, named=named, asked=asked)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| 1 | a \\| b | Here. |  | 4 |" in text and "| 2 | c |  | nothing | 5 |" in text
    assert "| 1 | What? | a ball | red circle | no |" in text
    assert "| Draw! | image | none |" in text and "fine" not in text
    with Image.open(tmp_path / "pictures.png") as sheet:
        assert sheet.getpixel((8, 20)) == (255, 0, 0) and sheet.getpixel((22 + 8, 20)) == (225, 225, 225)
    write_report(result, tmp_path)  # over the first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "names.png", "pictures.png"]
