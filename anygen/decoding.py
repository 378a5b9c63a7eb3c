"""How the LLM speaks: a route, then words and whole signal runs, many prompts at once.

1. *Route.* The adapter view of every prompt is read once; `<|words|>` or `<|media|>` is chosen for each.
2. *Words.* These prompts are read again in their base view with the adapter off: the untouched LLM answers.
   A model without routes (`AnyGenConfig.routes`) has none of this and goes on with 3.
3. *Media.* These go on from what was read. Once the first token of a run is chosen the rest is forced: all S tokens
   go through the LLM in one pass, in place of S passes. Rows that start no run at that step bring one token, right
   aligned behind masked columns:

```
row 0, starts a run     image_0  image_1  image_2  image_3      positions 9 10 11 12
row 1, says a word         .        .        .      "red"       position  7
```

Shapes: B rows of the batch, T columns, V vocabulary, R new tokens, S signal tokens of a run, D LLM width.
"""

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, Self

import torch
from torch import Tensor

from anygen.config import Config
from anygen.detokenizer import Detokenizer
from anygen.errors import ConfigError, MessageError
from anygen.model import AnyGenModel, MediaInput
from anygen.prompts import Prompt
from anygen.rows import SCORES, DynamicRows, Kept, Rows, column_keys
from anygen.static_rows import StaticRows

__all__ = ["Detokenizer", "DecodingConfig", "DecodingStats", "Kept", "check_fits", "collect", "decode"]

ROOM = 256
"""Columns that static memory has for an answer at first; it grows where that is too short."""
Route = Literal["words", "media"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingConfig(Config):
    """How to choose tokens."""

    max_new_tokens: int = 256
    """The longest answer, signal tokens counted; a run that has started is always finished."""
    max_runs: int = 8
    """The most media in one answer."""
    temperature: float = 0.0
    """0 takes the most likely token; above, tokens are drawn. The route is never drawn."""
    top_p: float = 1.0
    """Draws from the smallest set of tokens that together are at least this likely."""
    route: Route | None = None
    """Fixes the route of all answers."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is at least 1, got {self.max_new_tokens}")
        if self.max_runs < 0:
            raise ConfigError(f"max_runs is not negative, got {self.max_runs}")
        if self.temperature < 0:
            raise ConfigError(f"temperature is not negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is above 0 and at most 1, got {self.top_p}")


@dataclass(slots=True)
class DecodingStats:
    """What was done, for benchmarks."""

    prompt_passes: int = 0
    """Passes of the LLM over prompts."""
    passes: int = 0
    """Passes of the LLM over generated tokens."""
    text_tokens: int = 0
    """Tokens of text, the answers' ends included."""
    runs: int = 0
    """Signal runs."""


@dataclass(frozen=True, slots=True)
class Routed:
    """The first event of a sample."""

    sample: int
    route: Route


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text; whole characters only."""

    sample: int
    text: str


@dataclass(frozen=True, slots=True)
class Run:
    """A medium is to be made here."""

    sample: int
    modality: str
    states: Tensor
    """float[S, D], the LLM's final hidden states at the signal positions."""


@dataclass(frozen=True, slots=True)
class End:
    """The last event of a sample."""

    sample: int
    reason: Literal["stop", "length"]
    ids: tuple[int, ...]
    """All that was said after the route: text, runs, and the end token if it came."""


Event = Routed | TextDelta | Run | End


@dataclass(slots=True)
class Answer:
    """All events of one sample."""

    route: Route = "words"
    parts: list[str | Run] = field(default_factory=list)
    """Text and runs in the order in which they were said; no text is empty, no two stand together."""
    reason: Literal["stop", "length"] = "stop"
    ids: tuple[int, ...] = ()
    """All that was said after the route: text, runs, and the end token if it came."""

    @property
    def text(self) -> str:
        """The words alone."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def runs(self) -> list[Run]:
        """The runs alone."""
        return [part for part in self.parts if isinstance(part, Run)]


def decode(
    model: AnyGenModel,
    prompts: Sequence[Prompt],
    *,
    media: Mapping[str, MediaInput] | None = None,
    config: DecodingConfig | None = None,
    seeds: Sequence[int] | None = None,
    drawable: Collection[str] | None = None,
    stats: DecodingStats | None = None,
    kept: Kept | None = None,
) -> Iterator[Event]:
    """Answers prompts, event by event as they happen; the events of one sample are in order.

    Args:
        model: in evaluation mode.
        prompts: B conversations, of any lengths; none gives no events.
        media: modality -> the media in their slots, in reading order over all prompts.
        config: how to choose tokens; greedy by default.
        seeds: one a prompt, needed if tokens are drawn; a sample's draw does not depend on its batch.
        drawable: the output modalities that may be used; all by default.
        stats: counts up while events are taken.
        kept: of the conversation's last turn, for one prompt; what of it comes again is not read again.

    Raises:
        MessageError: a prompt leaves no room for an answer in the LLM's context.
        ConfigError: tokens are to be drawn without seeds, or their number is wrong.
    """
    config, stats = config or DecodingConfig(), stats or DecodingStats()
    if config.temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ConfigError(f"temperature {config.temperature} needs one seed a prompt, {len(prompts)} in all")
    check_fits(model, prompts)
    drawn: Sequence[int | None] = seeds if config.temperature > 0 and seeds else [None] * len(prompts)
    speakers = [
        _Speaker(model, sample, config, seed=seed, drawable=drawable, stats=stats) for sample, seed in enumerate(drawn)
    ]
    return _decode(model, prompts, media, config, speakers, stats, kept)


def check_fits(model: AnyGenModel, prompts: Sequence[Prompt]) -> None:
    """Refuses prompts that leave no room for an answer; `decode` does so itself, after the media were encoded.

    Raises:
        MessageError: tells the tokens, how many of them stand for media, and the LLM's limit.
    """
    limit = model.llm.context_length
    for prompt in prompts:
        longest = max(len(prompt.ids), len(prompt.base_ids)) + 1
        if limit is None or longest < limit:
            continue
        slots = sum(token < 0 for token in prompt.ids)
        share = f" ({slots} of them stand for {len(prompt.media)} media)" if prompt.media else ""
        raise MessageError(f"the conversation has {longest} tokens{share}, and the LLM reads at most {limit}")


def _decode(
    model: AnyGenModel,
    prompts: Sequence[Prompt],
    media: Mapping[str, MediaInput] | None,
    config: DecodingConfig,
    speakers: "list[_Speaker]",
    stats: DecodingStats,
    kept: Kept | None,
) -> Iterator[Event]:
    if not prompts:
        return
    routes: list[Route] = ["words"] * len(prompts)
    batch = None
    routed = model.settings.routes
    if len(prompts) > 1:
        kept = None
    if config.route != "words":
        keys = column_keys(model, prompts[0]) if kept is not None else ()
        batch = _Batch(model, config, stats, adapted=True, kept=kept)
        batch.read([prompt.ids for prompt in prompts], media, keys)
        preferred = batch.routes()
        for row, prompt in enumerate(prompts):
            routes[row] = config.route or ("media" if prompt.holds_media or not routed else preferred[row])
    for row, route in enumerate(routes):
        yield Routed(row, route)
    spoken = [row for row, route in enumerate(routes) if route == "words"]
    shown = [row for row, route in enumerate(routes) if route == "media"]
    if batch is not None:
        with batch:
            if shown:
                batch.keep(shown)
                if routed:
                    batch.feed([[model.signal_tokens.media_id]] * len(shown))
                yield from _speak(batch, [speakers[row] for row in shown])
    if spoken:
        batch = _Batch(model, config, stats, adapted=False, kept=kept)
        with batch:
            batch.read([prompts[row].base_ids for row in spoken], None, prompts[spoken[0]].base_ids)
            yield from _speak(batch, [speakers[row] for row in spoken])


def _speak(batch: "_Batch", speakers: "list[_Speaker]") -> Iterator[Event]:
    """The loop: choose one token a row, let rows that are done leave, feed the others' tokens or runs."""
    while speakers:
        chosen = batch.choose(speakers)
        told = [speaker.take(token, place) for speaker, token, place in zip(speakers, chosen, batch.next, strict=True)]
        if not batch.asynchronous:
            yield from chain.from_iterable(told)
        speakers = batch.leave(speakers)
        hidden = batch.feed([speaker.pending for speaker in speakers]) if speakers else None
        if batch.asynchronous:  # words are spelt out while the device works on the next ones
            yield from chain.from_iterable(told)
        if hidden is not None:
            for row, speaker in enumerate(speakers):
                yield from speaker.show(hidden[row])
            speakers = batch.leave(speakers)


def collect(events: Iterable[Event], count: int) -> list[Answer]:
    """The events of `count` samples -> their answers."""
    answers = [Answer() for _ in range(count)]
    for event in events:
        answer = answers[event.sample]
        match event:
            case Routed(route=route):
                answer.route = route
            case TextDelta(text=text):
                if answer.parts and isinstance(answer.parts[-1], str):
                    answer.parts[-1] += text
                else:
                    answer.parts.append(text)
            case Run():
                answer.parts.append(event)
            case End(reason=reason, ids=ids):
                answer.reason, answer.ids = reason, ids
    return answers


class _Batch:
    """Rows that go through the LLM together, counted; entered, it is left in order however it ends."""

    def __init__(
        self, model: AnyGenModel, config: DecodingConfig, stats: DecodingStats, *, adapted: bool, kept: Kept | None
    ) -> None:
        self.model, self.config, self.stats, self.adapted, self.kept = model, config, stats, adapted, kept
        self.rows: Rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.rows.leave(self.kept if kind is None else None)

    @property
    def next(self) -> list[int]:
        return self.rows.next

    @property
    def asynchronous(self) -> bool:
        return self.rows.asynchronous

    def read(
        self, prompts: Sequence[Sequence[int]], media: Mapping[str, MediaInput] | None, keys: Sequence[Hashable]
    ) -> None:
        """Reads the prompts; `keys` are those of a single one's columns."""
        model = self.model
        if model.memories is None:
            self.rows = DynamicRows(model, adapted=self.adapted, kept=self.kept, keys=keys)
        else:
            longest, runs = max(map(len, prompts)), model.signal_tokens.runs.values()
            room = min(self.config.max_new_tokens, ROOM) + max(map(len, runs), default=0) + 1
            self.rows = StaticRows(
                model.memories, len(prompts), longest, room, adapted=self.adapted, kept=self.kept, keys=keys
            )
        self.rows.read(prompts, media)
        self.stats.prompt_passes += 1

    def feed(self, pending: Sequence[Sequence[int]]) -> Tensor:
        """Gives each row its tokens, one or a whole run -> float[B, longest, D], right aligned."""
        self.stats.passes += 1
        return self.rows.feed(pending)

    def routes(self) -> list[Route]:
        """The likelier route of each row."""
        signals = self.model.signal_tokens
        words, media = (SCORES + route - signals.vocab_size for route in (signals.words_id, signals.media_id))
        return ["media" if scores[media] > scores[words] else "words" for scores in self.rows.scores()]

    def choose(self, speakers: "Sequence[_Speaker]") -> list[int]:
        """One token a row; without the adapter only the LLM's own, with it also the first tokens of runs."""
        chosen = []
        for row, (speaker, scores) in enumerate(zip(speakers, self.rows.scores(), strict=True)):
            starts = speaker.starts(self.next[row]) if self.adapted else []
            new = {start: scores[SCORES + start - speaker.vocab_size] for start in starts}
            if speaker.generator is not None:
                chosen.append(speaker.draw(self.rows.logits(row), new))
                continue
            best, value = int(scores[1]), scores[0]
            for start, score in new.items():
                if score > value:
                    best, value = start, score
            chosen.append(best)
        return chosen

    def leave(self, speakers: "list[_Speaker]") -> "list[_Speaker]":
        """Lets the rows that are done go."""
        alive = [row for row, speaker in enumerate(speakers) if not speaker.done]
        if 0 < len(alive) < len(speakers):
            self.keep(alive)
        return [speakers[row] for row in alive]

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps `rows` alone."""
        self.rows.keep(rows)


class _Speaker:
    """One sample's answer so far: what it may say next, and what its last token means."""

    def __init__(
        self,
        model: AnyGenModel,
        sample: int,
        config: DecodingConfig,
        *,
        seed: int | None,
        drawable: Collection[str] | None,
        stats: DecodingStats,
    ) -> None:
        self.sample, self.config, self.stats = sample, config, stats
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.ends = set(model.llm.eos_ids)
        self.context = model.llm.context_length
        self.runs = {run.start: (modality, list(run)) for modality, run in model.signal_tokens.runs.items()}
        self.vocab_size = model.signal_tokens.vocab_size
        self.drawable = drawable
        self.text = Detokenizer(model.llm.tokenizer)
        self.pending: list[int] = []
        self.modality: str | None = None
        self.said: list[int] = []
        self.shown = 0
        self.done = False

    def starts(self, place: int) -> list[int]:
        """The first tokens of the runs that may come at position `place`, in order."""
        if self.shown >= self.config.max_runs:
            return []
        return [
            start
            for start, (modality, run) in self.runs.items()
            if (self.drawable is None or modality in self.drawable)
            and (self.context is None or place + len(run) <= self.context)
        ]

    def draw(self, logits: Tensor, new: Mapping[int, float]) -> int:
        """float32[V] and the logits of new tokens -> a token, drawn on the CPU so that a seed means the same on
        every device."""
        ids = [*range(len(logits)), *new]
        logits = torch.cat([logits.cpu(), torch.tensor([*new.values()], dtype=torch.float32)])
        weights, order = (logits / self.config.temperature).softmax(0).sort(descending=True)
        before = weights.cumsum(0) - weights
        weights = weights * (before < self.config.top_p)
        return ids[int(order[torch.multinomial(weights, 1, generator=self.generator)])]

    def take(self, token: int, place: int) -> Iterator[Event]:
        """Makes the token chosen for position `place` the next to be fed, or ends the answer; the events say so."""
        if token in self.runs:
            self.modality, self.pending = self.runs[token]
            self.said += self.pending
            return self.flush()
        self.pending = [token]
        self.said.append(token)
        self.stats.text_tokens += 1
        full = self.context is not None and place + 1 >= self.context
        if token in self.ends:
            self.done = True
            return self.end("stop")
        if full or len(self.said) >= self.config.max_new_tokens:
            self.done = True
            return self._tell(token, last=True)
        return self._tell(token, last=False)

    def _tell(self, token: int, *, last: bool) -> Iterator[Event]:
        if delta := self.text.push(token):
            yield TextDelta(self.sample, delta)
        if last:
            yield from self.end("length")

    def show(self, hidden: Tensor) -> Iterator[Event]:
        """float[T, D], the states at what was fed, right aligned: hands them on if it was a run."""
        if self.modality is None:
            return
        # a copy outside of inference mode, so that the projector may run in any mode
        yield Run(self.sample, self.modality, hidden[-len(self.pending) :].clone())
        self.modality = None
        self.shown += 1
        self.stats.runs += 1
        if len(self.said) >= self.config.max_new_tokens:
            yield from self.end("length")

    def flush(self) -> Iterator[Event]:
        """The text that waited for the rest of a character."""
        if rest := self.text.flush():
            yield TextDelta(self.sample, rest)

    def end(self, reason: Literal["stop", "length"]) -> Iterator[Event]:
        """The last events."""
        self.done = True
        yield from self.flush()
        yield End(self.sample, reason, tuple(self.said))
