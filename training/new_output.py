"""Gives a model a way to answer that a plugin brings: captions alone -> signal rows and an output projector.

No medium is made or read. Two stages, both through the frozen LLM and its adapter:

1. the new rows learn when they are said (LM loss) and, with the projector, what they say (alignment). Of the old rows
   only that of `<|words|>` moves, which no LLM reads inside an answer: it has to let go of the new requests. What the
   model answered before to plain questions and to requests for other media is mixed in and has to stay. A model that
   took the new requests for others goes on saying its own words, as nothing that chooses them trains: half of the
   answers to learn are these words, with the new medium in place of the other.
2. the rows stand still, so that the states at the runs are fixed numbers: they are computed once, and the projector
   learns from them for as many passes as it needs.

Source: caption-only alignment, MM-LLMs survey (arXiv:2401.13601) eq. 4 and NExT-GPT (arXiv:2309.05519) section 4.2;
gradients for new rows alone, GILL (arXiv:2305.17216).
Shapes: M captions, S signal tokens, D LLM width, R rows.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from anygen.config import Config
from anygen.decoding import Answer
from anygen.errors import ConfigError
from anygen.extension import OutputModality, output_modality
from anygen.generators.base import Generator
from anygen.grafting import add_output
from anygen.losses import AlignmentConfig, condition_loss
from anygen.messages import MediaPart, Message, TextPart
from anygen.model import AnyGenModel
from anygen.model_config import PartConfig
from anygen.prompts import Example
from anygen.signal_tokens import MEDIA, WORDS
from anygen.training.adapters import answers, collate, finish, forget_checkpoints, load, read_captions
from anygen.training.loop import RunLog, lowering
from anygen.training.phrases import WHOLE
from anygen.training.phrases_media import WHOLE_CLIP, WHOLE_SOUND
from anygen.training.prefix import length_batches
from anygen.training.requests import self_prompts
from anygen.training.trainer import fit, identity_of

logger = logging.getLogger("anygen.training")
OTHERS = {"image": ("Draw {x}.", *WHOLE), "video": ("Film {x}.", *WHOLE_CLIP), "audio": ("Play {x}.", *WHOLE_SOUND)}
"""Output modality -> requests for it, which have to go on as before."""
THINGS = (
    "a dog",
    "a trumpet",
    "an apple",
    "rain",
    "a horse",
    "a guitar",
    "a car",
    "a cat",
    "a bell",
    "a bird",
    "a train",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewOutputRecipe(Config):
    """Everything that decides the result."""

    modality: str
    """What is to be made; an installed plugin declares it."""
    captions: str
    """A text file, one caption a line."""
    model: str = "anygen-mini"
    """The model that is given the way to answer."""
    name: str | None = None
    """What the new model is called; None keeps the old name."""
    generator: str | None = None
    """Directory of a trained generator; None takes the one that comes with the plugin."""
    signal_tokens: int | None = None
    """S; None takes what the plugin declares."""
    projector: PartConfig | None = None
    """None takes the one that the plugin declares."""
    requests: tuple[str, ...] = ()
    """With {caption} in each; none given takes those that the plugin declares."""
    answer: str | None = None
    """With {caption} in it; None takes the one that the plugin declares."""
    held_out: float = 0.1
    """Share of the captions that is measured only."""
    kept: int = 192
    """Plain questions, and as many requests for each other modality, whose answers have to stay as they were."""
    steps: int = 120
    """Of the first stage."""
    batch_size: int = 12
    learning_rate: float = 2e-3
    """Of the rows and the projector."""
    fit_steps: int = 1500
    """Of the second stage."""
    fit_batch_size: int = 128
    fit_learning_rate: float = 1e-3
    alignment_weight: float = 1.0
    checkpoint_steps: int = 50
    """How often the state is written, for a run that is killed to go on from; 0 never."""
    resume: bool = True
    """Goes on from the last checkpoint of a run of the same recipe in the same folder; false begins anew."""
    seed: int = 0

    def __post_init__(self) -> None:
        for template in (*self.requests, *([self.answer] if self.answer is not None else [])):
            if "{caption}" not in template:
                raise ConfigError(
                    f"requests and answer must say the caption, as in 'Make {{caption}}.', got '{template}'"
                )
        counts = self.steps, self.fit_steps, self.checkpoint_steps
        if not 0 <= self.held_out < 1 or min(counts) < 0 or self.batch_size < 2:
            raise ConfigError("held_out is from 0 to less than 1, steps are not negative, batch_size is at least 2")


@dataclass(frozen=True, slots=True)
class Wording:
    """How media of a modality are asked for and presented."""

    modality: str
    requests: Sequence[str]
    answer: str

    def ask(self, caption: str, rng: random.Random) -> Message:
        """A request."""
        return Message("user", (TextPart(rng.choice(self.requests).replace("{caption}", caption)),))

    def conversation(self, caption: str, rng: random.Random) -> list[Message]:
        """A request and its answer; the caption stands in for the medium."""
        medium: Any = MediaPart(self.modality, caption)  # type: ignore[arg-type]
        return [
            self.ask(caption, rng),
            Message("assistant", (TextPart(self.answer.replace("{caption}", caption)), medium)),
        ]


def own_conversations(
    model: AnyGenModel, wording: Wording, captions: Sequence[str], rng: random.Random
) -> dict[int, list[Message]]:
    """A caption's number -> a request for it and the answer in the model's own words, the new medium in place of what
    it showed; of captions that it answers with media already."""
    asks = [wording.ask(caption, rng) for caption in captions]
    found: dict[int, list[Message]] = {}
    for row, (ask, said) in enumerate(zip(asks, answers(model, [[a] for a in asks], max_new_tokens=40), strict=True)):
        if said.runs:
            words = [TextPart(said.parts[0])] if isinstance(said.parts[0], str) else []
            medium: Any = MediaPart(wording.modality, captions[row])  # type: ignore[arg-type]
            found[row] = [ask, Message("assistant", (*words, medium))]
    return found


class Mixture(Dataset[dict[str, Any]]):
    """Every other item a request with its target, the others answers that have to stay.

    Args:
        model: in which the modality is.
        wording: of requests and answers.
        captions: M of them.
        targets: name -> float[M, ...], their conditions.
        kept: the answers that have to stay.
        count: items.
        seed: of what is random about them.
        own: a caption's number -> a conversation in the model's own words, which is taken half of the time.
    """

    def __init__(
        self,
        model: AnyGenModel,
        wording: Wording,
        captions: Sequence[str],
        targets: Mapping[str, Tensor],
        kept: Sequence[Example],
        *,
        count: int,
        seed: int,
        own: Mapping[int, list[Message]] | None = None,
    ) -> None:
        self.model, self.wording, self.captions, self.targets = model, wording, captions, targets
        self.kept, self.count, self.seed, self.own = kept, count, seed, own or {}

    def __len__(self) -> int:
        return self.count

    def _row(self, number: int) -> tuple[int | None, random.Random]:
        """An item's caption, None for an answer that has to stay, and what else is random about it."""
        rng = random.Random(f"{self.seed}/{number}")
        keeps = bool(self.kept) and rng.random() < 0.5
        return None if keeps else rng.randrange(len(self.captions)), rng

    def told(self, number: int) -> str:
        """An item in words."""
        row, _ = self._row(number)
        return "an answer that has to stay" if row is None else self.captions[row]

    def __getitem__(self, number: int) -> dict[str, Any]:
        row, rng = self._row(number)
        if row is None:
            return {"example": rng.choice(self.kept), "row": None}
        talk = self.wording.conversation(self.captions[row], rng)
        if row in self.own and rng.random() < 0.5:
            talk = self.own[row]
        return {"example": self.model.prompts.example(talk), "row": row}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Items -> the arguments of the model's forward pass."""
        rows = [item["row"] for item in items if item["row"] is not None]
        aims = {self.wording.modality: {n: v[rows].float() for n, v in self.targets.items()}} if rows else {}
        return collate(self.model, [item["example"] for item in items], media={}, conditions=aims)


@lowering("batch_size", "fit_batch_size")
def train(recipe: NewOutputRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/model`.

    Returns:
        Of captions that were not trained on: `distance`, the squared error of the condition in that of always telling
        the mean, and `made`, the share of requests that got one medium of the modality and no other, with `cases`; and
        `kept`, the share of old prompts whose answers still are of the same kind.

    Raises:
        ModalityError: no plugin declares the modality.
        ConfigError: the model makes it already, or the captions do not fit.
    """
    torch.manual_seed(recipe.seed)
    declared, log = output_modality(recipe.modality), RunLog(out, "new_output")
    directory = recipe.generator or declared.weights
    if directory is None:
        raise ConfigError(f"the plugin of {recipe.modality} brings no weights; name a generator: generator: DIR")
    captions = read_captions(Path(recipe.captions))
    model = load(recipe.model)
    generator = declared.generator.from_pretrained(directory, device=model.device)
    figures = teach(model, generator, captions, declared, recipe, log)
    finish(model, out, {recipe.modality: generator}, name=recipe.name)
    forget_checkpoints(out)
    log.write(final=True, **figures)
    return figures


def teach(
    model: AnyGenModel,
    generator: Generator,
    captions: Sequence[str],
    declared: OutputModality,
    recipe: NewOutputRecipe,
    log: RunLog,
) -> dict[str, float]:
    """Adds the modality to a frozen model and trains its rows and projector. Arguments and result as of `train`."""
    modality, rng = recipe.modality, random.Random(recipe.seed)
    shuffled = rng.sample(list(captions), len(captions))
    held = shuffled[: round(recipe.held_out * len(shuffled))]
    known = shuffled[len(held) :]
    wording = Wording(modality, recipe.requests or declared.requests, recipe.answer or declared.answer)
    old = old_prompts(model, declared, recipe.kept, rng)
    before = kinds_of_answers(model, old)
    own = own_conversations(model, wording, known, rng)
    add_output(
        model,
        generator,
        signal_tokens=recipe.signal_tokens or declared.signal_tokens,
        projector=recipe.projector or declared.projector,
        seed=recipe.seed,
    )
    projector = model.output_projectors[modality].requires_grad_(True)
    model.alignment, model.alignment_weight = AlignmentConfig(mse=1.0), recipe.alignment_weight
    told = targets_of(generator, known)
    spread = {name: value.std().clamp(min=1e-6) for name, value in told.items()}
    model.set_metric(modality, {n: torch.eye(v.shape[-1]) / spread[n] for n, v in told.items()})
    kept = [keep(model, messages, answer) for messages, answer in zip(old, before, strict=True)]
    if recipe.steps:
        parameters, hooks = rows_to_train(model, modality)
        for name, (trainable, total) in model.trainable_parameters().items():
            log.write(part=name, trainable=trainable, parameters=total)
        count = recipe.steps * recipe.batch_size
        data = Mixture(model, wording, known, told, kept, count=count, seed=recipe.seed, own=own)
        both = [*parameters, *projector.parameters()]
        size, groups = recipe.batch_size, [{"params": both, "lr": recipe.learning_rate}]
        fit(model, data, data.collate, groups, log, steps=recipe.steps, batch_size=size, **_running(recipe, "rows"))
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.requires_grad_(False)
    figures: dict[str, float] = {}
    if recipe.fit_steps:
        conversations = [wording.conversation(caption, rng) for caption in known] + [*own.values()]
        aims = {name: torch.cat([value, value[[*own]]]) for name, value in told.items()}
        _fit_projector(model, modality, read_states(model, modality, conversations), aims, recipe, log)
    projector.requires_grad_(False)
    model.eval()
    if held:
        states = read_states(model, modality, [wording.conversation(caption, rng) for caption in held])
        mean = {name: value.mean(0) for name, value in told.items()}
        figures["distance"] = distance(model, modality, states, targets_of(generator, held), mean)
        asked = answers(model, [[wording.ask(caption, rng)] for caption in held], max_new_tokens=40)
        figures |= {"made": sum(made(a) == [modality] for a in asked) / len(held), "cases": float(len(held))}
        if figures["made"] < 0.5:
            other = next(answer for answer in asked if made(answer) != [modality])
            showed = " and ".join(made(other)) or "no medium"
            right = round(figures["made"] * len(held))
            told_so = f"{right} of {len(held)} requests that were held out got one {modality} and nothing else"
            logger.warning("%s; one was answered by '%s' with %s: take more steps", told_so, other.text, showed)
    if old:
        now = kinds_of_answers(model, old)
        same = sum(a.route == b.route and made(a) == made(b) for a, b in zip(before, now, strict=True))
        figures["kept"] = same / len(old)
    return figures


def made(answer: Answer) -> list[str]:
    """The modalities of an answer's media."""
    return [run.modality for run in answer.runs]


def kinds_of_answers(model: AnyGenModel, prompts: Sequence[list[Message]]) -> list[Answer]:
    """Answers whole if they have media; of those of words the beginning, whose route is what counts."""
    said = answers(model, prompts, max_new_tokens=1)
    shown = [place for place, answer in enumerate(said) if answer.route == "media"]
    for place, whole in zip(shown, answers(model, [prompts[place] for place in shown]), strict=True):
        said[place] = whole
    return said


def old_prompts(model: AnyGenModel, declared: OutputModality, count: int, rng: random.Random) -> list[list[Message]]:
    """Plain questions, talk about the new modality, and requests for what the model makes already."""
    texts = [*declared.talk, *rng.sample(self_prompts(), min(count, len(self_prompts())))] if count else []
    for modality in model.settings.outputs:
        if modality in OTHERS and count:
            plain = [t for t in OTHERS[modality] if "{x}" in t]
            texts += [rng.choice(plain).format(x=rng.choice(THINGS)) for _ in range(count // 2)]
    return [[Message("user", (TextPart(text),))] for text in texts]


def keep(model: AnyGenModel, messages: list[Message], answer: Answer) -> Example:
    """What the model said, as an example: of an answer of words the route alone, which the untouched LLM goes on from.

    The ids of runs are those of the model as it is now.
    """
    ids, signals = model.prompts.prompt(messages).ids, model.signal_tokens
    if not model.settings.routes or answer.route == "words":
        said = [signals.id(WORDS)] if model.settings.routes else list(answer.ids)
    else:
        said = [signals.id(MEDIA)]
        for part in answer.parts:
            if isinstance(part, str):
                said += model.llm.tokenizer(part, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
            else:
                said += list(signals.runs[part.modality])
        said += model.llm.eos_ids[:1] if answer.reason == "stop" else []
    forced = {token for run in signals.runs.values() for token in run[1:]}
    return Example([*ids, *said], [-100] * len(ids) + [-100 if t in forced else t for t in said], [], [])


def rows_to_train(model: AnyGenModel, modality: str) -> tuple[list[nn.Parameter], list[Any]]:
    """The rows' parameters, made trainable, and the hooks that keep all rows but the new and that of `<|words|>`."""
    signals = model.signal_tokens
    run = [token - signals.vocab_size for token in signals.runs[modality]]
    words = signals.words_id - signals.vocab_size
    rows = [(signals.rows, run if signals.head_rows is not None else [*run, words])]
    if signals.head_rows is not None:
        rows.append((signals.head_rows, [*run, words]))
    hooks = []
    for parameter, moving in rows:
        mask = torch.zeros(len(parameter), 1, device=parameter.device)
        mask[moving] = 1
        hooks.append(parameter.requires_grad_(True).register_hook(lambda gradient, mask=mask: gradient * mask))
    return [parameter for parameter, _ in rows], hooks


@torch.no_grad()
def targets_of(generator: Generator, captions: Sequence[str], batch_size: int = 256) -> dict[str, Tensor]:
    """The generator's own conditions: name -> float32[M, ...] on the CPU."""
    parts = [generator.encode_text(captions[i : i + batch_size]).tensors for i in range(0, len(captions), batch_size)]
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}


@torch.no_grad()
def read_states(
    model: AnyGenModel, modality: str, conversations: Sequence[list[Message]], batch_size: int = 24
) -> Tensor:
    """float32[M, S, D]: the states at the run that each conversation ends with, on the CPU.

    Conversations go through in batches of like length.
    """
    size, found = len(model.signal_tokens.runs[modality]), []
    examples = [model.prompts.example(messages) for messages in conversations]
    batches = length_batches([len(example.ids) for example in examples], batch_size, seed=0)
    for rows in batches:
        batch = collate(model, [examples[row] for row in rows], media={}, conditions={})
        ids = batch["input_ids"].to(model.device)
        hidden = model(ids, batch["attention_mask"].to(model.device)).hidden_states
        starts = model.signal_tokens.run_starts(ids, modality)
        columns = starts[:, 1:] + torch.arange(size, device=ids.device)
        found.append(hidden[starts[:, :1], columns].float().cpu())
    order = torch.tensor([row for rows in batches for row in rows])
    return torch.cat(found)[order.argsort()]


@torch.no_grad()
def distance(
    model: AnyGenModel, modality: str, states: Tensor, targets: Mapping[str, Tensor], mean: Mapping[str, Tensor]
) -> float:
    """Squared error of the projected states, in that of always telling `mean`; averaged over a condition's tensors."""
    guesses = model.project(modality, states.to(model.device)).tensors
    shares = [
        (guesses[n].float().cpu() - aim).square().sum() / (aim - mean[n]).square().sum().clamp(min=1e-9)
        for n, aim in targets.items()
    ]
    return float(torch.stack(shares).mean())


class _Objective(nn.Module):
    """A projector with its loss, for the trainer."""

    def __init__(self, model: AnyGenModel, modality: str) -> None:
        super().__init__()
        self.projector, self.metric = model.output_projectors[modality], model.metrics[modality]
        self.embeddings = model.run_embeddings(modality).detach()

    def forward(self, states: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """float[B, S, D], name -> float[B, ...]."""
        condition = self.projector(states, self.embeddings.expand(len(states), -1, -1))
        return {"loss": condition_loss(condition.tensors, targets, metrics=self.metric)}


class _States(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    def __init__(self, states: Tensor, targets: Mapping[str, Tensor]) -> None:
        self.states, self.targets = states, targets

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.states[number], {name: value[number] for name, value in self.targets.items()}

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Any]:
        """Items -> the arguments of `_Objective`."""
        names = items[0][1]
        return {
            "states": torch.stack([states for states, _ in items]),
            "targets": {name: torch.stack([aims[name] for _, aims in items]) for name in names},
        }


def _fit_projector(
    model: AnyGenModel,
    modality: str,
    states: Tensor,
    targets: Mapping[str, Tensor],
    recipe: NewOutputRecipe,
    log: RunLog,
) -> None:
    objective, data = _Objective(model, modality), _States(states, targets)
    groups = [{"params": list(objective.projector.parameters()), "lr": recipe.fit_learning_rate}]
    size = min(recipe.fit_batch_size, len(data))
    fit(
        objective.train(),
        data,
        data.collate,
        groups,
        log,
        steps=recipe.fit_steps,
        batch_size=size,
        weight_decay=0.01,
        **_running(recipe, "projector"),
    )


def _running(recipe: NewOutputRecipe, phase: str) -> dict[str, Any]:
    return {
        "seed": recipe.seed,
        "phase": phase,
        "checkpoint_steps": recipe.checkpoint_steps,
        "resume": recipe.resume,
        "identity": identity_of(recipe),
    }
