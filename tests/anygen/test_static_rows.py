"""The fast way through the LLM against the plain one, token by token."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from anygen import compiling, static_rows
from anygen.compiling import CompiledLayers
from anygen.decoding import Answer, DecodingConfig, Kept, collect, decode
from anygen.media import Image
from anygen.messages import MediaPart, Message, TextPart
from anygen.model import AnyGenModel
from anygen.prompts import Prompt
from anygen.rows import column_keys, common_prefix
from anygen.static_rows import StaticMemories, StaticMemory

QUESTIONS = ["Draw", "a red apple", "What is the user, the assistant?", "Here", "this is a long apple. " * 4, "?"]


def told(*texts: str) -> list[Message]:
    return [Message("assistant" if i % 2 else "user", (TextPart(text),)) for i, text in enumerate(texts)]


@pytest.fixture
def talker(tiny_model: Callable[..., AnyGenModel]) -> AnyGenModel:
    """With an adapter that matters, rows that mix routes, runs and words, and several ends."""
    model = tiny_model(adapter=True, tie_word_embeddings=False)
    rows, head = model.signal_tokens.head_rows, model.llm.head
    assert rows is not None
    with torch.no_grad():
        ends = [
            model(input_ids=torch.tensor([model.prompts.prompt(told(q)).ids])).hidden_states[0, -1] for q in QUESTIONS
        ]
        wanted = torch.tensor([1.0, -1.0] * (len(ends) // 2))
        rows[0] = torch.linalg.lstsq(torch.stack(ends), wanted, driver="gelsd").solution
        rows[1] = -rows[0]
        torch.manual_seed(2)
        spread: Any = head.weight
        rows[2:] = 1.6 * spread.std() * torch.randn(len(rows) - 2, 32)
    model.llm.base.generation_config.eos_token_id = [2, *range(150, 160)]  # type: ignore[union-attr]
    return model


@pytest.fixture
def fast(emulate: type, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Sets a model on the fast way with emulated graphs; returns the capture."""
    made: list[StaticMemory] = []
    start = StaticMemory.__init__

    def init(self: StaticMemory, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(StaticMemory, "__init__", init)

    def state() -> list[Tensor]:
        layers: list[Any] = [layer for memory in made for layer in memory.cache.layers]
        caches = [t for one in layers if one.is_initialized for t in (one.keys, one.values)]
        return caches + [t for memory in made for t in (memory.seen, memory.next, memory.filled)]

    def quicken(model: AnyGenModel, *, graphs: bool = True, region: Any = None) -> Any:
        capture = emulate(state) if graphs else None
        model.memories = StaticMemories(model, capture=capture, region=region)
        return capture

    return quicken


def prompts(model: AnyGenModel) -> tuple[list[Prompt], dict[str, Tensor]]:
    picture = MediaPart("image", media=None)  # type: ignore[arg-type]
    asked = [told(question) for question in QUESTIONS]
    asked.append([Message("user", (picture, TextPart("What is this?")))])
    asked.append([Message("user", (TextPart("Draw"),)), Message("assistant", (TextPart("An apple."), picture))])
    asked[-1].append(Message("user", (picture, TextPart("and "), picture)))
    given = [model.prompts.prompt(messages) for messages in asked]
    count = sum(len(prompt.media) for prompt in given)
    return given, {"image": torch.randn(count, 1, 6, generator=torch.Generator().manual_seed(1))}


def same(made: Answer, wanted: Answer) -> None:
    assert (made.route, made.ids, made.text, made.reason) == (wanted.route, wanted.ids, wanted.text, wanted.reason)
    assert [run.modality for run in made.runs] == [run.modality for run in wanted.runs]
    for ours, theirs in zip(made.runs, wanted.runs, strict=True):
        torch.testing.assert_close(ours.states, theirs.states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("bucket", [8, 256])
def test_a_batch_of_words_runs_and_media_is_answered_as_the_growing_cache_answers_it(
    talker: AnyGenModel, fast: Any, graphs: bool, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, media = prompts(talker)
    config = DecodingConfig(max_new_tokens=40, max_runs=3)
    wanted = collect(decode(talker, given, media=media, config=config), len(given))
    monkeypatch.setattr(static_rows, "BUCKET", bucket)
    monkeypatch.setattr("anygen.decoding.ROOM", bucket)  # so that memory has to grow on the way
    capture = fast(talker, graphs=graphs)
    for _ in range(2):  # the second time in memory that was used before
        made = collect(decode(talker, given, media=media, config=config), len(given))
        for ours, theirs in zip(made, wanted, strict=True):
            same(ours, theirs)
    assert {answer.route for answer in wanted} == {"words", "media"} and max(len(a.runs) for a in wanted) > 1
    assert not graphs or (capture.captures > 1 and capture.replays > 40)


def test_alone_and_drawn_and_at_the_contexts_end(talker: AnyGenModel, fast: Any) -> None:
    given, media = prompts(talker)
    drawn = DecodingConfig(max_new_tokens=20, temperature=1.0, top_p=0.9)
    config: Any = talker.llm.base.config
    wanted = collect(decode(talker, given[:6], config=drawn, seeds=range(6)), 6)
    first = [collect(decode(talker, [prompt], config=DecodingConfig(max_new_tokens=40)), 1)[0] for prompt in given[:6]]
    length = config.max_position_embeddings
    config.max_position_embeddings = len(given[0].ids) + 4
    short = collect(decode(talker, given[:1], config=DecodingConfig(route="media")), 1)[0]
    config.max_position_embeddings = length
    fast(talker)
    for made, theirs in zip(collect(decode(talker, given[:6], config=drawn, seeds=range(6)), 6), wanted, strict=True):
        same(made, theirs)
    for prompt, theirs in zip(given[:6], first, strict=True):
        same(collect(decode(talker, [prompt], config=DecodingConfig(max_new_tokens=40)), 1)[0], theirs)
    config.max_position_embeddings = len(given[0].ids) + 4
    same(collect(decode(talker, given[:1], config=DecodingConfig(route="media")), 1)[0], short)


def test_an_answer_that_is_left_gives_its_memory_back_and_two_at_a_time_have_two(
    talker: AnyGenModel, fast: Any
) -> None:
    given, _ = prompts(talker)
    config = DecodingConfig(max_new_tokens=30, route="media")
    wanted = [collect(decode(talker, [prompt], config=config), 1)[0] for prompt in given[:2]]
    fast(talker)
    memories = talker.memories
    assert memories is not None
    events = [decode(talker, [prompt], config=config) for prompt in given[:2]]
    told_events: list[list[Any]] = [[], []]
    while True:  # by turns
        new = [next(one, None) for one in events]
        for known, event in zip(told_events, new, strict=True):
            known += [event] if event is not None else []
        if new == [None, None]:
            break
    for known, theirs in zip(told_events, wanted, strict=True):
        same(collect(known, 1)[0], theirs)
    assert len(memories._idle) == 2
    left = decode(talker, given[:1], config=config)
    next(left)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert len(memories._idle) == 2


def test_what_was_captured_of_weights_that_moved_is_forgotten(talker: AnyGenModel, fast: Any) -> None:
    given, _ = prompts(talker)
    config = DecodingConfig(max_new_tokens=10, route="media")
    capture = fast(talker)

    def answered() -> Answer:
        return collect(decode(talker, given[:1], config=config), 1)[0]

    wanted = answered()
    assert capture.captures and talker.memories is not None
    same(answered(), wanted)
    captured = capture.captures
    talker.llm.double()  # weights of another type lie elsewhere
    same(answered(), wanted)
    assert capture.captures > captured and talker.memories._idle[0].cache.layers[0].keys.dtype == torch.float64  # type: ignore[union-attr]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("route", ["words", "media"])
def test_a_conversation_reads_only_what_is_new_and_says_the_same(
    talker: AnyGenModel, fast: Any, static: bool, route: Any
) -> None:
    config = DecodingConfig(max_new_tokens=12, route=route)
    picture = Image.from_any(torch.zeros(4, 4, 3, dtype=torch.uint8).numpy())
    parts = (TextPart("What is this?"), MediaPart("image", picture))
    turns = [[Message("user", parts if route == "media" else parts[:1])]]
    features = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(1))
    texts = ["and then a long apple", "Here", "What is the user?"]

    def answered(turn: list[Message], kept: Kept | None) -> Answer:
        prompt = talker.prompts.prompt(turn)
        media = {"image": features} if prompt.media else None
        return collect(decode(talker, [prompt], media=media, config=config, kept=kept), 1)[0]

    wanted = [answered(turns[0], None)]
    for text in texts:
        said = Message("assistant", (TextPart(wanted[-1].text or "x"),))
        turns.append([*turns[-1], said, Message("user", (TextPart(text),))])
        wanted.append(answered(turns[-1], None))
    if static:
        fast(talker)
    columns: list[int] = []
    decoder: Any = talker.llm.base.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda _, __, given: columns.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    kept, lengths = Kept(), []
    for turn, theirs in zip(turns, wanted, strict=True):
        columns.clear()
        same(answered(turn, kept), theirs)
        prompt = talker.prompts.prompt(turn)
        lengths.append((columns[0], len(prompt.ids if route == "media" else prompt.base_ids)))
    hook.remove()
    assert lengths[0][0] == lengths[0][1]
    for (_, before), (read, whole) in pairwise(lengths):
        assert whole - read >= before - 2  # all of the last prompt but its last tokens, and of its answer what it can


def test_another_medium_in_the_same_place_is_read_again(talker: AnyGenModel) -> None:
    def keys(*media: Any) -> Any:
        parts = [MediaPart("image", medium) for medium in media]
        return column_keys(talker, talker.prompts.prompt([Message("user", (TextPart("a"), *parts, TextPart("b")))]))

    red, blue = (Image.from_any(torch.full((4, 4, 3), v, dtype=torch.uint8).numpy()) for v in (1, 2))
    again = Image.from_any(red.array.copy())
    same_all, first, unknown = keys(red, blue), keys(red, red), keys(None)
    assert common_prefix(same_all, keys(again, blue)) == len(same_all) - 1  # equal pixels are the same medium
    slots = [place for place, key in enumerate(same_all) if isinstance(key, tuple)]
    assert len(slots) == 4 and common_prefix(same_all, first) == slots[2]
    assert common_prefix(unknown, keys(None)) == slots[0]
    assert common_prefix([], [1]) == common_prefix([1], []) == 0


def test_compiled_layers_are_one_code_and_say_the_same(
    talker: AnyGenModel, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", (counter := Counter()))
    given, media = prompts(talker)
    config = DecodingConfig(max_new_tokens=16)
    wanted = collect(decode(talker, given, media=media, config=config), len(given))
    decoder: Any = talker.llm.base.get_decoder()
    layers = CompiledLayers(decoder, talker.llm.cache_name)  # type: ignore[arg-type]
    capture = fast(talker, region=layers)
    made = collect(decode(talker, given, media=media, config=config), len(given))
    for ours, theirs in zip(made, wanted, strict=True):
        same(ours, theirs)
    assert capture.replays > 10
    assert [layer.self_attn.layer_idx for layer in layers.layers] == [0, 1]  # type: ignore[union-attr]
    assert not any("forward" in vars(layer) for layer in layers.layers)
    assert not any("forward" in vars(module) for module in decoder.children())
    assert {type(layer.mlp.down_proj.base_layer) for layer in layers.layers} == {torch.nn.Linear}  # type: ignore[union-attr]
    shapes = {shape for shape in counter.shapes if shape}
    layered = [shape for shape in counter.shapes if shape]
    assert len(layered) <= 3 * len(shapes)  # with and without the adapter, and the norm, but not for each layer


class Counter:
    """A compiler that compiles nothing and counts."""

    def __init__(self) -> None:
        self.shapes: list[Any] = []

    def __call__(self, module: Any, inputs: Any) -> Any:
        self.shapes.append(max((t.shape for t in inputs if isinstance(t, Tensor) and t.ndim == 3), default=()))
        return module.forward
