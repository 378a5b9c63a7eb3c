from collections.abc import Callable
from typing import Any

import pytest

from anygen.errors import ConfigError, MessageError, ModalityError
from anygen.llm import LLM
from anygen.messages import MediaPart, Message, TextPart
from anygen.prompts import OPEN, PromptBuilder, pad
from anygen.signal_tokens import SignalTokens, SignalTokensConfig

PICTURE, OTHER, SOUND = (MediaPart(modality, media=None) for modality in ("image", "image", "audio"))  # type: ignore


def say(role: Any, *parts: str | MediaPart) -> Message:
    return Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


@pytest.fixture
def builder(tiny_tokenizer: Any) -> PromptBuilder:
    config = SignalTokensConfig(counts={"image": 2, "audio": 1})
    return PromptBuilder(tiny_tokenizer, SignalTokens(config, vocab_size=320, width=4), {"image": 3, "depth": 1})


def plain(builder: PromptBuilder, *turns: tuple[str, str], ask: bool = True) -> list[int]:
    """What transformers makes of the same conversation."""
    chat = [{"role": role, "content": text} for role, text in turns]
    made: Any = builder.tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=ask)
    return list(made["input_ids"]) if not isinstance(made, list) else made


def text(builder: PromptBuilder, ids: list[int]) -> str:
    """Ids as text, new tokens and slots by their names."""
    signals, shown = builder.signal_tokens, ""
    for i in ids:
        if i < 0:
            shown += f"[{i}]"
        elif i >= signals.vocab_size:
            shown += signals.strings[i - signals.vocab_size]
        else:
            shown += str(builder.tokenizer.decode([i]))
    return shown


@pytest.mark.parametrize(
    "question", ["What is this?", "  spaces \n\n", "an äpple 🍎", "<|image_0|> <|words|>", f"{OPEN}0:0\ue001"]
)
def test_a_prompt_of_words_has_the_very_ids_of_the_chat_template(builder: PromptBuilder, question: str) -> None:
    prompt = builder.prompt([say("user", question)])
    assert prompt.ids == prompt.base_ids == plain(builder, ("user", question))
    assert prompt.media == [] and not prompt.holds_media


def test_a_model_without_routes_has_none_and_may_have_text_around_its_slots(builder: PromptBuilder) -> None:
    around = {"image": ("<Img>", "</Img> ")}
    bare = PromptBuilder(builder.tokenizer, builder.signal_tokens, builder.slots, around=around, routes=False)
    turns = [say("user", PICTURE, "so?"), say("assistant", "Yes ", PICTURE)]
    example = bare.example(turns)
    assert text(bare, example.ids) == (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\n<Img>[-1][-1][-1]</Img> so?<|im_end|>\n"
        "<|im_start|>assistant\nYes <|image_0|><|image_1|><|im_end|>"
    )
    learned = [token for token, label in zip(example.ids, example.labels, strict=True) if label == token]
    assert text(bare, learned) == "Yes <|image_0|><|im_end|>"


def test_slots_stand_where_media_stood(builder: PromptBuilder) -> None:
    prompt = builder.prompt([say("user", "See ", PICTURE, " and ", OTHER), say("user", "so?")])
    assert text(builder, prompt.ids) == (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nSee [-1][-1][-1] and [-1][-1][-1]"
        "<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.media == [PICTURE, OTHER] and prompt.holds_media
    assert prompt.base_ids == plain(builder, ("user", "See  and "), ("user", "so?"))


def test_earlier_answers_keep_route_and_runs_in_the_adapter_view_alone(builder: PromptBuilder) -> None:
    history = [
        say("system", "Be brief"),
        say("user", "Hi"),
        say("assistant", "Hello"),
        say("user", "Draw it"),
        say("assistant", "An apple.", PICTURE, "Listen.", SOUND),
        say("user", PICTURE, "What is it?"),
        say("assistant", "A pear"),
        say("user", "Thanks"),
    ]
    prompt = builder.prompt(history)
    assert text(builder, prompt.ids) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<|words|>Hello<|im_end|>\n<|im_start|>user\nDraw it<|im_end|>\n"
        "<|im_start|>assistant\n<|media|>An apple.<|image_0|><|image_1|>Listen.<|audio_0|><|im_end|>\n"
        "<|im_start|>user\n[-1][-1][-1]What is it?<|im_end|>\n<|im_start|>assistant\n<|media|>A pear<|im_end|>\n"
        "<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not prompt.holds_media  # the message to be answered has words alone
    assert prompt.media == [PICTURE]  # a generated picture is a run, an uploaded one is read
    turns = [(message.role, message.text) for message in history]
    assert prompt.base_ids == plain(builder, *turns)


def test_an_example_is_the_prompt_and_then_the_answer_up_to_its_end(builder: PromptBuilder) -> None:
    asked, answer = say("user", PICTURE, "Draw another"), say("assistant", "A pear.", OTHER)
    example, prompt = builder.example([asked, answer]), builder.prompt([asked])
    learned = example.ids[len(prompt.ids) :]
    forced = {*builder.signal_tokens.runs["image"][1:]}
    assert forced & set(learned)
    expected = [-100 if token in forced else token for token in learned]  # decoding forces all of a run but its start
    assert example.labels == [-100] * len(prompt.ids) + expected
    assert text(builder, learned) == "<|media|>A pear.<|image_0|><|image_1|><|im_end|>"
    assert (example.media, example.drawn) == ([PICTURE], [OTHER])


def test_an_answer_of_words_is_learned_as_one(builder: PromptBuilder) -> None:
    example = builder.example([say("user", "Hi"), say("assistant", "Hello")])
    assert text(builder, [label for label in example.labels if label >= 0]) == "<|words|>Hello<|im_end|>"


def test_an_answer_ends_where_its_template_ends_turns(builder: PromptBuilder, tiny_tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tiny_tokenizer)
    other.eos_token = "<|endoftext|>"  # the template's <|im_end|> is no longer the tokenizer's end, as for Gemma
    example = PromptBuilder(other, builder.signal_tokens, {}).example([say("user", "Hi"), say("assistant", "Yo")])
    assert text(builder, [label for label in example.labels if label >= 0]).startswith("<|words|>Yo<|im_end|>")


def test_what_cannot_be_read_is_refused(builder: PromptBuilder) -> None:
    with pytest.raises(ModalityError, match="the model cannot read audio; it reads text, image, depth"):
        builder.prompt([say("user", SOUND)])
    with pytest.raises(MessageError, match="there is no message to answer"):
        builder.prompt([])
    with pytest.raises(MessageError, match="ends with the assistant's answer"):
        builder.example([say("user", "Hi")])


def test_an_llm_without_chat_template_is_refused(builder: PromptBuilder, tiny_tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template; anygen needs an instruction-tuned model"):
        PromptBuilder(bare, builder.signal_tokens, {})


def test_padding_on_either_side() -> None:
    ids, mask = pad([[1, 2, 3], [4]], 0)
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad([[1, 2, 3], [4]], 9, left=True, multiple=4)
    assert ids.tolist() == [[9, 1, 2, 3], [9, 9, 9, 4]] and mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]


def test_the_builder_of_a_model_knows_its_llm(tiny_llm: Callable[..., LLM], tiny_model: Any) -> None:
    prompt = tiny_model().prompts.prompt([say("user", PICTURE, "What is this?")])
    assert prompt.ids.count(-1) == 2
