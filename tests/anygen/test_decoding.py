"""The decoder against a plain one: no cache, no batch, one full pass a token."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anygen.decoding import (
    Answer,
    DecodingConfig,
    DecodingStats,
    Detokenizer,
    End,
    Routed,
    Run,
    collect,
    decode,
)
from anygen.errors import ConfigError, MessageError
from anygen.llm import LLM
from anygen.messages import MediaPart, Message, TextPart
from anygen.model import AnyGenModel
from anygen.prompts import Prompt

PICTURE = MediaPart("image", media=None)  # type: ignore[arg-type]
QUESTIONS = ["Draw", "a red apple", "What is the user, the assistant?", "Here", "this is a long apple. " * 4, "?"]
LENGTH = 40
ENDS = [2, *range(150, 160)]
"""Ends that a random model comes upon, so that rows leave the batch at different times."""
Make = Callable[..., AnyGenModel]


def say(role: Any, *parts: str | MediaPart) -> Message:
    return Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


@pytest.fixture
def talker(tiny_model: Make) -> AnyGenModel:
    """With an adapter that matters, and a head under which routes, runs and words mix."""
    model = tiny_model(adapter=True, tie_word_embeddings=False)
    rows = model.signal_tokens.head_rows
    assert rows is not None
    head: Any = model.llm.head
    with torch.no_grad():
        ends = []
        for question in QUESTIONS:
            ids = torch.tensor([model.prompts.prompt([say("user", question)]).ids])
            ends.append(model(input_ids=ids).hidden_states[0, -1])
        wanted = torch.tensor([1.0, -1.0] * (len(ends) // 2))
        rows[0] = torch.linalg.lstsq(torch.stack(ends), wanted, driver="gelsd").solution  # every other: words
        rows[1] = -rows[0]
        torch.manual_seed(2)
        rows[2:] = 1.6 * head.weight.std() * torch.randn(len(rows) - 2, 32)  # signal tokens tempt as much as words
    model.llm.base.generation_config.eos_token_id = ENDS  # type: ignore[union-attr]
    return model


def prompts(model: AnyGenModel) -> list[Prompt]:
    asked = [[say("user", question)] for question in QUESTIONS]
    asked.append([say("user", PICTURE, "What is this?")])
    asked.append([say("user", "Draw"), say("assistant", "An apple.", PICTURE), say("user", PICTURE, "and ", PICTURE)])
    return [model.prompts.prompt(messages) for messages in asked]


def pictures(prompt: Prompt, number: int) -> dict[str, Tensor]:
    """Features for the pictures of one prompt."""
    generator = torch.Generator().manual_seed(number)
    return {"image": torch.randn(len(prompt.media), 1, 6, generator=generator)} if prompt.media else {}


def together(given: list[Prompt]) -> dict[str, Tensor]:
    return {"image": torch.cat([pictures(p, i)["image"] for i, p in enumerate(given) if p.media])}


@torch.no_grad()
def by_hand(model: AnyGenModel, prompt: Prompt, media: dict[str, Tensor], length: int, max_runs: int) -> Answer:
    """One full pass over everything for every token; ids, route and states, no text."""
    signals = model.signal_tokens

    def hidden(ids: list[int]) -> Tensor:
        embeds = model.embed(torch.tensor([ids]), media)
        return model.llm.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][0]

    words, shown = signals.logits(hidden(prompt.ids)[-1])[:2].tolist()
    if words >= shown and not prompt.holds_media:
        return Answer("words")
    answer, ids, said = Answer("media"), [*prompt.ids, signals.media_id], []
    while len(said) < length:
        states = hidden(ids)
        logits = model.logits(states[-1])
        starts = {run.start: modality for modality, run in signals.runs.items()}
        for token in range(signals.vocab_size, len(logits)):
            if token not in starts or len(answer.parts) >= max_runs:
                logits[token] = -torch.inf
        token = int(logits.argmax())
        run = list(signals.runs[starts[token]]) if token in starts else [token]
        ids, said = ids + run, said + run
        if token in starts:
            answer.parts.append(Run(0, starts[token], hidden(ids)[-len(run) :]))
        if token in model.llm.eos_ids:
            break
    answer.ids = tuple(said)
    return answer


def same_runs(made: Answer, wanted: Answer) -> None:
    assert [run.modality for run in made.runs] == [run.modality for run in wanted.runs]
    for ours, theirs in zip(made.runs, wanted.runs, strict=True):
        torch.testing.assert_close(ours.states, theirs.states, rtol=1e-4, atol=1e-4)


def test_a_batch_says_what_each_prompt_alone_says_by_hand(talker: AnyGenModel) -> None:
    given = prompts(talker)
    config = DecodingConfig(max_new_tokens=LENGTH, max_runs=3)
    batched = collect(decode(talker, given, media=together(given), config=config), len(given))
    for number, (prompt, made) in enumerate(zip(given, batched, strict=True)):
        wanted = by_hand(talker, prompt, pictures(prompt, number), LENGTH, max_runs=3)
        assert made.route == wanted.route
        if made.route == "media":
            assert made.ids == wanted.ids
            same_runs(made, wanted)
        alone = collect(decode(talker, [prompt], media=pictures(prompt, number), config=config), 1)[0]
        assert (alone.route, alone.ids, alone.text, alone.reason) == (
            made.route,
            made.ids,
            made.text,
            made.reason,
        )
        same_runs(made, alone)
    assert len({len(answer.ids) for answer in batched}) > 4
    # the cases are worth the name: both routes, unequal numbers of runs of both modalities, several in one answer
    assert {answer.route for answer in batched} == {"words", "media"}
    counts = {len(answer.runs) for answer in batched if answer.route == "media"}
    assert len(counts) > 1 and max(counts) > 1
    assert {run.modality for answer in batched for run in answer.runs} == {"image", "audio"}


def test_words_equal_the_untouched_models_own_token_for_token(talker: AnyGenModel, tiny_llm: Any) -> None:
    untouched: LLM = tiny_llm(tie_word_embeddings=False)
    untouched.base.generation_config.eos_token_id = ENDS  # type: ignore[union-attr]
    given = prompts(talker)
    config = DecodingConfig(max_new_tokens=LENGTH, route="words")
    answers = collect(decode(talker, given, config=config), len(given))
    for prompt, answer in zip(given, answers, strict=True):
        ids = torch.tensor([prompt.base_ids])
        wanted: Any = untouched.base.generate(ids, do_sample=False, max_new_tokens=LENGTH)  # type: ignore[operator]
        assert list(answer.ids) == wanted[0, ids.shape[1] :].tolist()
    chosen = collect(decode(talker, given[:6], config=replace(config, route=None)), 6)
    spoken = [answer for answer in chosen if answer.route == "words"]
    assert spoken  # chosen or fixed, the route leads to the same words
    assert all(answer in answers for answer in spoken)


def test_the_adapter_is_on_again_after_words(talker: AnyGenModel) -> None:
    given, config = prompts(talker), DecodingConfig(max_new_tokens=5)
    before = talker.state_dict()
    first = collect(decode(talker, given[:6], config=config), 6)
    assert [a.ids for a in collect(decode(talker, given[:6], config=config), 6)] == [a.ids for a in first]
    assert set(talker.state_dict()) == set(before)  # nothing was frozen or thawed on the way


def test_a_run_costs_one_pass(talker: AnyGenModel) -> None:
    given = prompts(talker)
    config = DecodingConfig(max_new_tokens=LENGTH, route="media")
    for number, prompt in enumerate(given):
        stats, calls = DecodingStats(), []
        decoder: Any = talker.llm.base.get_decoder()
        hook = decoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        events = decode(talker, [prompt], media=pictures(prompt, number), config=config, stats=stats)
        answer = collect(events, 1)[0]
        hook.remove()
        signal_tokens = sum(len(run.states) for run in answer.runs)
        assert stats.runs == len(answer.runs)
        assert stats.text_tokens == len(answer.ids) - signal_tokens
        assert stats.prompt_passes + stats.passes == len(calls)
        # one for the route, one a token but the last, one a run
        last = 0 if answer.parts and isinstance(answer.parts[-1], Run) and answer.reason == "length" else 1
        assert stats.passes == 1 + stats.text_tokens - last + stats.runs


def test_runs_of_unequal_lengths_may_start_at_one_step(talker: AnyGenModel) -> None:
    given, signals = prompts(talker)[:2], talker.signal_tokens
    last = [talker(input_ids=torch.tensor([[*p.ids, signals.media_id]])).hidden_states[0, -1] for p in given]
    assert signals.head_rows is not None
    with torch.no_grad():  # the first says image_0 at once, the second audio_0
        for modality, wanted in {"image": [99.0, -99.0], "audio": [-99.0, 99.0]}.items():
            row = signals.runs[modality].start - signals.vocab_size
            solution = torch.linalg.lstsq(torch.stack(last), torch.tensor(wanted), driver="gelsd").solution
            signals.head_rows[row] = solution
    config = DecodingConfig(max_new_tokens=1, route="media")
    answers = collect(decode(talker, given, config=config), 2)
    assert [answer.ids for answer in answers] == [tuple(signals.runs["image"]), tuple(signals.runs["audio"])]
    for prompt, answer in zip(given, answers, strict=True):
        ids = torch.tensor([[*prompt.ids, signals.media_id, *answer.ids]])
        states = talker(input_ids=ids).hidden_states[0, -len(answer.ids) :]
        torch.testing.assert_close(answer.runs[0].states, states, rtol=1e-4, atol=1e-4)


def test_half_runs_and_stray_signal_tokens_are_impossible(talker: AnyGenModel) -> None:
    given, signals = prompts(talker), talker.signal_tokens
    for length in (1, 2, 3, 7):  # also where the limit falls into a run
        config = DecodingConfig(max_new_tokens=length, route="media", temperature=3.0)
        events = decode(talker, given, media=together(given), config=config, seeds=range(len(given)))
        for answer in collect(events, len(given)):
            left = list(answer.ids)
            while left:
                run = next((list(r) for r in signals.runs.values() if r.start == left[0]), left[:1])
                assert left[: len(run)] == run
                assert len(run) > 1 or run[0] < signals.vocab_size
                left = left[len(run) :]


def test_a_modality_without_generator_is_not_begun(talker: AnyGenModel) -> None:
    given, config = prompts(talker), DecodingConfig(max_new_tokens=LENGTH, route="media")
    media = together(given)
    free = collect(decode(talker, given, media=media, config=config), len(given))
    assert {run.modality for answer in free for run in answer.runs} == {"image", "audio"}
    bound = collect(decode(talker, given, media=media, config=config, drawable=["image"]), len(given))
    assert {run.modality for answer in bound for run in answer.runs} == {"image"}
    none = collect(decode(talker, given, media=media, config=replace(config, max_runs=0)), len(given))
    assert not any(answer.runs for answer in none)


def test_a_message_with_media_is_never_answered_blindly(talker: AnyGenModel) -> None:
    assert talker.signal_tokens.head_rows is not None
    with torch.no_grad():
        talker.signal_tokens.head_rows[1] = talker.signal_tokens.head_rows[0]  # words win every draw
    given, config = prompts(talker), DecodingConfig(max_new_tokens=3)
    routes = [answer.route for answer in collect(decode(talker, given, media=together(given), config=config), 8)]
    assert routes == ["words"] * 6 + ["media"] * 2


def test_a_draw_depends_on_its_seed_and_not_on_its_batch(talker: AnyGenModel) -> None:
    given = prompts(talker)[:6]
    config = DecodingConfig(max_new_tokens=20, temperature=1.0, top_p=0.9)
    seeds = [7, 8, 9, 7, 8, 9]
    batched = collect(decode(talker, given, config=config, seeds=seeds), 6)
    alone = [
        collect(decode(talker, [prompt], config=config, seeds=[seed]), 1)[0]
        for prompt, seed in zip(given, seeds, strict=True)
    ]
    assert [answer.ids for answer in batched] == [answer.ids for answer in alone]
    other = collect(decode(talker, given, config=config, seeds=[1] * 6), 6)
    assert [answer.ids for answer in other] != [answer.ids for answer in batched]


def test_a_tiny_top_p_is_greedy(talker: AnyGenModel) -> None:
    given = prompts(talker)[:6]
    greedy = collect(decode(talker, given, config=DecodingConfig(max_new_tokens=20)), 6)
    config = DecodingConfig(max_new_tokens=20, temperature=1.0, top_p=1e-6)
    drawn = collect(decode(talker, given, config=config, seeds=range(6)), 6)
    assert [answer.ids for answer in drawn] == [answer.ids for answer in greedy]


def test_events_come_in_order_and_text_in_deltas(talker: AnyGenModel) -> None:
    given = prompts(talker)
    events = list(decode(talker, given, media=together(given), config=DecodingConfig(max_new_tokens=LENGTH)))
    for sample in range(len(given)):
        own = [event for event in events if event.sample == sample]
        assert isinstance(own[0], Routed) and isinstance(own[-1], End)
        assert sum(isinstance(event, Routed | End) for event in own) == 2
    for answer in collect(events, len(given)):
        kinds = [isinstance(part, str) for part in answer.parts]
        assert not any(a and b for a, b in zip(kinds, kinds[1:], strict=False))
        assert all(part for part in answer.parts if isinstance(part, str))


def test_states_may_be_projected_in_any_mode(talker: AnyGenModel) -> None:
    config = DecodingConfig(max_new_tokens=LENGTH, route="media")
    answers = collect(decode(talker, prompts(talker)[:6], config=config), 6)
    run = next(run for answer in answers for run in answer.runs)
    assert not run.states.is_inference()
    made = talker.project(run.modality, run.states[None])
    next(iter(made.tensors.values())).sum().backward()


def test_the_answer_ends_with_the_context(talker: AnyGenModel) -> None:
    config: Any = talker.llm.base.config
    prompt = prompts(talker)[0]
    config.max_position_embeddings = len(prompt.ids) + 4
    for route in ("words", "media"):
        answer = collect(decode(talker, [prompt], config=DecodingConfig(route=route)), 1)[0]
        assert answer.reason == "stop" or len(prompt.ids) + len(answer.ids) <= config.max_position_embeddings
    config.max_position_embeddings = len(prompt.ids)
    with pytest.raises(MessageError, match=f"has {len(prompt.ids) + 1} tokens, and the LLM reads at most"):
        decode(talker, [prompt])


def test_nothing_gives_nothing_and_what_cannot_be_decoded_is_refused(talker: AnyGenModel) -> None:
    assert list(decode(talker, [])) == []
    with pytest.raises(ConfigError, match=r"temperature 1\.0 needs one seed a prompt, 2 in all"):
        decode(talker, prompts(talker)[:2], config=DecodingConfig(temperature=1.0), seeds=[1])
    for field, value, message in [
        ("max_new_tokens", 0, "max_new_tokens is at least 1, got 0"),
        ("max_runs", -1, "max_runs is not negative, got -1"),
        ("temperature", -0.5, "temperature is not negative, got -0.5"),
        ("top_p", 0.0, "top_p is above 0 and at most 1, got 0.0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            DecodingConfig(**{field: value})


@pytest.mark.parametrize("text", ["plain words", "naïve — 🍎🎺 äöü", "👩‍🚀 in space", " leading and trailing \n"])
def test_characters_are_given_out_whole(tiny_tokenizer: Any, text: str) -> None:
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text.split())
    speak = Detokenizer(tiny_tokenizer)
    deltas = [speak.push(token) for token in ids] + [speak.flush()]
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)


def test_a_half_character_at_the_end_is_left_out(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("a🍎", add_special_tokens=False)["input_ids"]
    speak = Detokenizer(tiny_tokenizer)
    assert "".join([speak.push(token) for token in ids[:-1]] + [speak.flush()]) == "a"
    assert "".join([speak.push(token) for token in tiny_tokenizer("b")["input_ids"]]) == "b"
