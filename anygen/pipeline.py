"""The whole path in one object: messages in, replies out.

```
messages ─ encoders ─ LLM ─ output projectors ─► plan ─ generators ─► reply
           └───────────── plan() ────────────┘          └─ render() ─┘
```

`pipe(x)` is `render(plan(x))`; `stream(x)` does the same event by event.
"""

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Generator as PythonGenerator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast, overload

import torch

from anygen.answering import answer_stepwise
from anygen.assembling import assemble
from anygen.decoding import Kept, check_fits
from anygen.errors import ConfigError, ModalityError, OutOfMemoryError
from anygen.generators.base import Generator
from anygen.loading import memory
from anygen.media import MediaLimits
from anygen.memory_plan import MemoryPlan
from anygen.messages import is_batch, parse_batch, parse_one
from anygen.model import AnyGenModel
from anygen.offload import Generators
from anygen.planning import (
    Clock,
    asked_for,
    check_making,
    chunks,
    decoding_config,
    places_of,
    plan_batch,
    seeds_of,
)
from anygen.progress import quiet_libraries
from anygen.rendering import make_all, make_stepwise, make_together
from anygen.reply import MadePart, PlannedPart, Reply
from anygen.streaming import Event
from anygen.together import MOST, Lanes

if TYPE_CHECKING:
    from anygen.chat import Chat
    from anygen.model_info import ModelInfo

logger = logging.getLogger(__name__)
Job = tuple[Sequence[PlannedPart], Sequence[int]]
"""Parts of one modality, and their seeds."""


class AnyGenPipeline:
    """Any mix of text and media in, an interleaved answer out.

        >>> from anygen import AnyGenPipeline
        >>> pipe = AnyGenPipeline.from_pretrained()
        >>> reply = pipe("Draw a red apple.", seed=7)
        >>> reply.images
        [Image(128×128)]
        >>> pipe(["What is this?", reply.images[0]]).images
        []

    Args:
        model: encoders, LLM and projectors, in evaluation mode.
        generators: output modality -> generator.

    Attributes:
        model: as given.
        generators: as given; those of a directory are loaded when first used, and stay or go as `offload` says.
        limits: which media to refuse.
        allow_urls: whether messages may name media by http and https addresses.
        memory_plan: what `from_pretrained` expects to take, and the policy that it chose; `print` it.
    """

    def __init__(self, model: AnyGenModel, generators: Mapping[str, Generator] | None = None) -> None:
        self.model = model
        self.generators = generators if isinstance(generators, Generators) else Generators(generators or {})
        self.limits = MediaLimits()
        self.allow_urls = False
        self.memory_plan: MemoryPlan | None = None
        self.together = True
        """On a GPU, whether generators of one answer take turns (`anygen.together`); ends where memory does not do."""
        self._lanes = Lanes(model.device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        offload: str | None = None,
        quantization: str | None = None,
        generators: Collection[str] | bool | None = None,
        compile: bool | str = False,
        graphs: bool | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        savers: Collection[str] = (),
    ) -> Self:
        """Loads a model: the embedded default, a directory, or a name that `hub.resolve` knows.

            >>> planner = AnyGenPipeline.from_pretrained(generators=False)
            >>> len(planner.generators)
            0

        Args:
            name_or_dir: None is the embedded default, anygen-mini.
            device: by default CUDA, else Apple's MPS, else the CPU.
            dtype: of LLM and generators; by default bfloat16 on CUDA and float32 elsewhere.
            offload: which generators stay in memory. "auto", the default, takes what fits (`anygen.memory_plan`): all,
                as long as there is room; one that is wanted puts away those that were used longest ago. "resident":
                all. "after_use": none; each goes once its media are made. "model_offload", "sequential": their models,
                or layers, come to the GPU one at a time. See `anygen.offload`.
            quantization: "8bit" or "4bit": of the LLM's linear layers (`anygen.quantization`).
            generators: the modalities that may be made; by default all that the model has. False loads none: the
                pipeline then plans, and another one renders.
            compile: compiles what repeats in LLM and generators; the first answer then waits for minutes, once a
                machine. "whole" compiles each model at once, which is longer. See `anygen.speed`.
            graphs: CUDA graphs; by default wherever there is CUDA.
            device_map: spreads the LLM over devices, the machine's memory and the disk, as accelerate has it.
            savers: what takes less memory and longer in generators: "vae_slicing", "vae_tiling", "attention_slicing".

        Raises:
            HubError: there is no such model.
            CheckpointError: it is damaged, or is no anygen model.
            ConfigError: device, dtype, `offload` or `compile` are unknown or not there, or no package quantises.
            ModalityError: the model has no generator for one of `generators`.
            OutOfMemoryError: the GPU is too small; says what would fit.
            UnknownComponentError: a part is from a package that is not installed; says which.
        """
        model, makers, plan = assemble(
            name_or_dir,
            device=device,
            dtype=dtype,
            offload=offload,
            quantization=quantization,
            generators=generators,
            compile=compile,
            graphs=graphs,
            device_map=device_map,
            savers=savers,
        )
        pipe = cls(model, makers)
        pipe.memory_plan = plan
        return pipe

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Writes a directory that `from_pretrained` reads, with checksums, whole or not at all.

            >>> pipe.save_pretrained("my-model", overwrite=True)
            >>> AnyGenPipeline.from_pretrained("my-model").name
            'anygen-mini'

        Args:
            directory: new or empty.
            overwrite: replaces a model's directory.

        Raises:
            OutputError: the directory is not empty, or the disk refuses.
        """
        from anygen.saving import save_model

        with quiet_libraries():
            save_model(Path(directory), self.model, self.generators, overwrite=overwrite)

    @property
    def name(self) -> str:
        """What replies call the model."""
        origin = self.model.origin
        return self.model.settings.name or (origin.resolve().name if origin is not None else "")

    @property
    def device(self) -> torch.device:
        """Where encoders, LLM and projectors are."""
        return self.model.device

    @property
    def drawable(self) -> list[str]:
        """The modalities that a plan may hold: those with a generator; all of the model's if there is none here."""
        outputs = self.model.settings.outputs
        return [m for m in outputs if m in self.generators] if self.generators else list(outputs)

    def generator(self, modality: str) -> Generator:
        """The generator of a modality, loaded if it was not; `offload` may put it away when another one is used.

        Raises:
            ModalityError: there is none here; says which there are.
        """
        self._check_generator(modality)
        return self.generators[modality]

    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]
        self, prompt: list[str] | list[list[Any]], **options: Any
    ) -> list[Reply]: ...
    @overload
    def __call__(self, prompt: object, **options: Any) -> Reply: ...
    def __call__(  # pyright: ignore[reportInconsistentOverload]  # the overloads tell the result's type alone
        self,
        prompt: object,
        *,
        seed: int | Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seconds: float | None = None,
        max_new_tokens: int = 256,
        max_media: int = 8,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int = 16,
        progress: bool | None = None,
        kept: Kept | None = None,
    ) -> Reply | list[Reply]:
        """Answers a prompt, or a list of prompts together.

            >>> pipe("What is the capital of France?").text
            'The capital of France is Paris.'
            >>> [len(reply.images) for reply in pipe(["Draw a cat.", "Draw a dog."], seed=1)]
            [1, 1]

        Args:
            prompt: a string, a media value, a list that mixes both, messages in the chat format, or a list of
                strings or lists, which is a batch. See `anygen.messages`.
            seed: decides noise and draws: medium k is made with seed + k. One for all prompts, so that each is
                answered as it would be alone, or one a prompt; by default drawn at random, and told in the reply.
            steps: the generator's steps; by default its own.
            guidance_scale: how much a medium follows its condition; by default the generator's own.
            seconds: the length of clips and sounds; by default the generators' own. Pictures have none.
            max_new_tokens: the longest answer; one medium counts as its signal tokens.
            max_media: the most media in one answer.
            temperature: 0 takes the likeliest words; above, they are drawn.
            top_p: draws from the likeliest words that together have this probability.
            batch_size: prompts, and media, that go through together.
            progress: shows bars on stderr; by default if that is a terminal.
            kept: what a conversation has left of its last turn, so that only what is new is read; for one prompt.

        Returns:
            A reply, or for a batch a list of them.

        Raises:
            MessageError: the prompt is empty or of no known form, or longer than the LLM reads.
            MediaError: media in it cannot be read.
            ModalityError: the model cannot read a modality, or has no generator for one; says which it has.
            ConfigError: an option is out of range.
            OutOfMemoryError: the device has too little; says what helps.
        """
        check_making(steps, seconds)
        plan = self.plan(
            prompt,
            seed=seed,
            max_new_tokens=max_new_tokens,
            max_media=max_media,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
            kept=kept,
        )
        return self.render(
            plan,
            steps=steps,
            guidance_scale=guidance_scale,
            seconds=seconds,
            batch_size=batch_size,
            progress=progress,
        )

    @overload
    def plan(  # pyright: ignore[reportOverlappingOverload]
        self, prompt: list[str] | list[list[Any]], **options: Any
    ) -> list[Reply]: ...
    @overload
    def plan(self, prompt: object, **options: Any) -> Reply: ...
    def plan(  # pyright: ignore[reportInconsistentOverload]  # the overloads tell the result's type alone
        self,
        prompt: object,
        *,
        seed: int | Sequence[int] | None = None,
        max_new_tokens: int = 256,
        max_media: int = 8,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int = 16,
        kept: Kept | None = None,
    ) -> Reply | list[Reply]:
        """Encoders, LLM and output projectors only: replies whose media parts carry their conditions.

            >>> plan = pipe.plan("Draw a red apple.", seed=7)
            >>> plan.is_plan
            True
            >>> pipe.render(plan) == pipe("Draw a red apple.", seed=7)
            True

        Takes and raises the same as a call.
        """
        conversations = parse_batch(prompt, limits=self.limits, allow_urls=self.allow_urls)
        config = decoding_config(max_new_tokens, max_media, temperature, top_p)
        seeds = seeds_of(seed, len(conversations))
        plans: list[Reply] = []
        for batch in chunks(len(conversations), batch_size):
            with memory():
                plans += plan_batch(
                    self.model,
                    conversations[batch],
                    seeds[batch],
                    config,
                    drawable=self.drawable,
                    name=self.name,
                    batch_size=batch_size,
                    kept=kept,
                )
        return plans if is_batch(prompt) else plans[0]

    @overload
    def render(self, plan: Reply, **options: Any) -> Reply: ...
    @overload
    def render(self, plan: Sequence[Reply], **options: Any) -> list[Reply]: ...
    def render(  # pyright: ignore[reportInconsistentOverload]
        self,
        plan: Reply | Sequence[Reply],
        *,
        seed: int | Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seconds: float | None = None,
        batch_size: int = 16,
        progress: bool | None = None,
    ) -> Reply | list[Reply]:
        """Makes the media of plans; those of all plans go through a generator together.

            >>> plan = pipe.plan("Draw a red apple.")
            >>> variants = [pipe.render(plan, seed=seed) for seed in range(3)]
            >>> len(set(reply.images[0] for reply in variants))
            3

        Args:
            plan: of `plan`, here or in another process; one, or several.
            seed: by default each plan's own.
            steps, guidance_scale, seconds, batch_size, progress: as in a call.

        Raises:
            ModalityError: there is no generator here for a planned part.
            ConfigError: a plan was made for another generator, or an option is out of range.
            OutOfMemoryError: the device has too little; says what helps.
        """
        check_making(steps, seconds)
        plans = [plan] if isinstance(plan, Reply) else list(plan)
        if seed is not None:
            plans = [replace(p, seed=s) for p, s in zip(plans, seeds_of(seed, len(plans)), strict=True)]
        clock = Clock()
        content = [list(p.content) for p in plans]
        places = places_of(plans)
        jobs = {
            modality: ([cast(PlannedPart, content[row][column]) for row, column, _ in own], [s for _, _, s in own])
            for modality, own in places.items()
        }
        made = self._make(
            jobs,
            batch_size=batch_size,
            progress=progress,
            steps=steps,
            guidance_scale=guidance_scale,
            seconds=seconds,
        )
        for modality, own in places.items():
            for (row, column, _), part in zip(own, made[modality], strict=True):
                content[row][column] = part
        clock.lap("generators")
        options = asked_for(steps=steps, guidance_scale=guidance_scale, seconds=seconds)
        replies = [
            replace(p, content=tuple(parts), options=options, timings=dict(p.timings) | clock.laps) if p.is_plan else p
            for p, parts in zip(plans, content, strict=True)
        ]
        return replies[0] if isinstance(plan, Reply) else replies

    def stream(
        self,
        prompt: object,
        *,
        seed: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seconds: float | None = None,
        max_new_tokens: int = 256,
        max_media: int = 8,
        temperature: float = 0.0,
        top_p: float = 1.0,
        kept: Kept | None = None,
    ) -> Iterator[Event]:
        """Answers one prompt event by event; a medium is begun as soon as the LLM has asked for it.

            >>> from anygen.streaming import Finished, TextDelta
            >>> for event in pipe.stream("Draw a red apple.", seed=7):
            ...     if isinstance(event, TextDelta):
            ...         print(event.text, end="")
            ...     if isinstance(event, Finished):
            ...         reply = event.reply
            Here is a red apple.

        Prompt and options are checked at once, before the first event is asked for. Takes and raises the same as a
        call; a list of strings is one message here.
        """
        check_making(steps, seconds)
        conversation = parse_one(prompt, limits=self.limits, allow_urls=self.allow_urls)
        config = decoding_config(max_new_tokens, max_media, temperature, top_p)
        given = self.model.prompts.prompt(conversation)
        check_fits(self.model, [given])
        chosen = seeds_of(seed, 1)[0]
        making = {"steps": steps, "guidance_scale": guidance_scale, "seconds": seconds}
        return answer_stepwise(self, conversation, given, chosen, config, kept, **making)

    def chat(self, *, system: str | None = None, **options: Any) -> "Chat":
        """A conversation that remembers what was said and shown.

            >>> chat = pipe.chat(seed=3)
            >>> reply = chat.send("Draw a red apple.")
            >>> reply = chat.send("Now a green one.")
            >>> [message.role for message in chat.history]
            ['user', 'assistant', 'user', 'assistant']

        Args:
            system: instructions that come first; by default those of the LLM's own template.
            **options: of a call, for every answer.
        """
        from anygen.chat import Chat

        return Chat(self, system=system, **options)

    def info(self) -> "ModelInfo":
        """Parts, sizes, licences, trainable parameters and the modality matrix; `print` it.

            >>> print(pipe.info().reads, pipe.info().makes)
            ('text', 'image', 'video', 'audio') ('text', 'image', 'video', 'audio')

        Raises:
            ConfigError: the pipeline was put together in code and has no directory.
        """
        from anygen.model_info import describe

        if self.model.origin is None:
            raise ConfigError("this pipeline has no directory to read about; save_pretrained and load it first")
        return describe(self.model.origin)

    def _check_generator(self, modality: str) -> None:
        if modality not in self.generators:
            here = ", ".join(self.generators) or "none"
            raise ModalityError(f"there is no generator for {modality} in this pipeline; it has: {here}")

    def _using(self, modality: str) -> AbstractContextManager[Generator]:
        self._check_generator(modality)
        return self.generators.using(modality)

    def _make(self, jobs: Mapping[str, Job], **options: Any) -> dict[str, list[MadePart]]:
        if self.together and self._may_overlap(jobs):
            try:
                return self._make_together(jobs, **options)
            except OutOfMemoryError as error:
                logger.info("media are made one after the other from now on: %s", error)
                self.together = False
        return {modality: self._make_one(modality, *job, **options) for modality, job in jobs.items()}

    def _may_overlap(self, jobs: Mapping[str, Job]) -> bool:
        """Whether there are several modalities, few media of each, and generators that stay where they are."""
        if len(jobs) < 2 or self.device.type != "cuda" or max(len(parts) for parts, _ in jobs.values()) > MOST:
            return False
        return self.generators.offload in ("auto", "resident")

    def _make_together(self, jobs: Mapping[str, Job], **options: Any) -> dict[str, list[MadePart]]:
        with ExitStack() as stack:
            generators = {modality: stack.enter_context(self._using(modality)) for modality in jobs}
            if not all(generator.overlaps for generator in generators.values()):
                return {m: make_all(generators[m], *job, device=self.device, **options) for m, job in jobs.items()}
            if self._lanes.device != self.device:
                self._lanes = Lanes(self.device)
            return make_together(generators, jobs, self._lanes, device=self.device, **options)

    # A generator is put away as soon as these functions, which alone refer to it, are done.
    def _make_one(
        self, modality: str, parts: Sequence[PlannedPart], seeds: Sequence[int], **options: Any
    ) -> list[MadePart]:
        with self._using(modality) as generator:
            return make_all(generator, parts, seeds, device=self.device, **options)

    def make_stepwise(
        self, part: PlannedPart, index: int, seed: int, **options: Any
    ) -> PythonGenerator[Event, None, MadePart]:
        """Makes one medium, event by event; takes and raises the same as `rendering.make_stepwise`."""
        with self._using(part.modality) as generator:
            return (yield from make_stepwise(generator, part, index, seed, device=self.device, **options))
