"""How an evaluation gets its answers: conversations through the LLM in batches, and media through the generators.

Shapes: B cases, S side in pixels, F frames, N samples.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from anygen.decoding import Answer, DecodingConfig, End, Event, Routed, collect, decode
from anygen.features import Condition
from anygen.generators.base import Generator
from anygen.media import Audio, Image, Media, Video
from anygen.messages import MediaPart, Message, TextPart
from anygen.model import AnyGenModel
from anygen.prompts import pad
from anygen.training.sound_measures import clipped
from anygen.training.sound_packages import RATE

T = TypeVar("T")
CHAT_TOKENS = 32
"""How far an answer to small talk is compared with the base LLM's."""


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slices of at most `size`."""
    return (items[first : first + size] for first in range(0, len(items), size))


def asking(text: str, medium: Media | None = None, *, medium_first: bool = False) -> list[Message]:
    """A conversation of one message."""
    parts: list[Any] = [TextPart(text)]
    if medium is not None:
        parts.insert(0 if medium_first else 1, MediaPart(medium.modality, medium))
    return [Message("user", tuple(parts))]


def answer(
    model: AnyGenModel, conversations: Sequence[list[Message]], batch_size: int, max_new_tokens: int = 128
) -> list[Answer]:
    """Greedy answers. Those that words alone answer are left empty, which saves their time."""
    answers: list[Answer] = []
    config = DecodingConfig(max_new_tokens=max_new_tokens)
    for batch in batches(conversations, batch_size):
        prompts = [model.prompts.prompt(messages) for messages in batch]
        media = model.encode_parts([part for prompt in prompts for part in prompt.media])
        events = decode(model, prompts, media=media, config=config)
        answers += collect(_until_media_came(events, len(prompts)), len(prompts))
    return answers


def _until_media_came(events: Iterable[Event], count: int) -> Iterator[Event]:
    """Ends once every sample has its route and those routed to media have ended: these come before the others."""
    routed, waiting = 0, set[int]()
    for event in events:
        yield event
        if isinstance(event, Routed):
            routed += 1
            waiting |= {event.sample} if event.route == "media" else set()
        elif isinstance(event, End):
            waiting.discard(event.sample)
        if routed == count and not waiting:
            return


def by_caption(
    generator: Generator, captions: Sequence[str], seeds: Sequence[int], batch_size: int
) -> list[Tensor | None]:
    """The media of captions by way of the generator's own text encoder, as `as_tensor` gives them."""
    made: list[Tensor | None] = []
    for chosen, sown in zip(batches(captions, batch_size), batches(seeds, batch_size), strict=True):
        made += [as_tensor(medium) for medium in generator.generate(generator.encode_text(chosen), seeds=sown)]
    return made


def by_request(
    model: AnyGenModel,
    generator: Generator,
    conversations: Sequence[list[Message]],
    seeds: Sequence[int],
    batch_size: int,
) -> tuple[list[Tensor | None], list[Answer]]:
    """The first medium of the generator's modality in each answer, None where it has none; and the answers."""
    made, answers = list[Tensor | None](), answer(model, conversations, batch_size)
    for said, sown in zip(batches(answers, batch_size), batches(seeds, batch_size), strict=True):
        runs = [next((run for run in one.runs if run.modality == generator.modality), None) for one in said]
        media: Iterator[Any] = iter(())
        if states := [run.states for run in runs if run is not None]:
            with torch.no_grad():
                condition: Condition = model.project(generator.modality, torch.stack(states))
            media = iter(
                generator.generate(condition, seeds=[s for s, run in zip(sown, runs, strict=True) if run is not None])
            )
        made += [None if run is None else as_tensor(next(media)) for run in runs]
    return made, answers


def as_tensor(medium: Any) -> Tensor:
    """Pictures float[3, S, S] and clips float[F, 3, S, S] in [0, 1], sounds float[N] at 16 kHz and of one length."""
    if isinstance(medium, Video):
        return torch.from_numpy(medium.frames.copy()).permute(0, 3, 1, 2) / 255
    if isinstance(medium, Audio):
        samples = medium.mono
        if medium.sampling_rate != RATE:
            from scipy.signal import resample_poly

            samples = resample_poly(samples, RATE, medium.sampling_rate)
        return clipped(torch.tensor(samples))
    return torch.from_numpy(medium.array).permute(2, 0, 1) / 255


def as_medium(modality: str, values: Tensor, fps: float = 8.0) -> Media:
    """The other way round."""
    if modality == "audio":
        return Audio(values.cpu().numpy(), RATE)
    if modality == "video":
        frames = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return Video(frames.cpu().numpy(), fps)
    return Image.from_any(values)


@torch.inference_mode()
def base_answers(model: AnyGenModel, messages: Sequence[str], max_new_tokens: int = CHAT_TOKENS) -> list[str]:
    """Greedy answers of the LLM without its adapter, by transformers' own template and `generate`."""
    from transformers import GenerationConfig

    if not messages:
        return []
    llm = model.llm
    turns = [[{"role": "user", "content": message}] for message in messages]
    texts = cast(list[str], llm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    encoded = [cast(list[int], llm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    ids, mask = (tensor.to(model.device) for tensor in pad(encoded, llm.eos_ids[0], left=True))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=llm.eos_ids, pad_token_id=llm.eos_ids[0]
    )
    with llm.adapter_off():
        spoken = cast(Any, llm.base).generate(ids, attention_mask=mask, generation_config=config)
    texts = llm.tokenizer.batch_decode(
        spoken[:, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [text.rstrip("\ufffd") for text in texts]  # as decoding does with a character that the limit cuts
