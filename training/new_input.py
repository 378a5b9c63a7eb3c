"""Gives a model a sense that a plugin brings: media with captions -> a trained input projector, and nothing else.

The media are encoded once. The projector first meets the LLM's own embeddings of the captions' words, thousands of
media a second (`naming.py`), then the LM loss of the answers, through the frozen LLM and its adapter.

Source: encoder alignment, MM-LLMs survey (arXiv:2401.13601) eq. 2; LLaVA's first stage (arXiv:2304.08485), which leaves
the LLM frozen and asks in many ways.
Shapes: M media, T feature tokens, C feature width, N prompt tokens of a medium, K captions.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from anygen.config import Config
from anygen.errors import ConfigError
from anygen.extension import InputModality, input_modality
from anygen.grafting import add_input
from anygen.messages import MediaPart, Message, TextPart
from anygen.model import AnyGenModel
from anygen.model_config import PartConfig
from anygen.training.adapters import Pairs, answers, collate, finish, forget_checkpoints, load, read_pairs, words_of
from anygen.training.loop import RunLog, lowering
from anygen.training.media_pools import Pool
from anygen.training.naming import meet_names, name_embeddings
from anygen.training.trainer import fit, identity_of


@dataclass(frozen=True, kw_only=True, slots=True)
class NewInputRecipe(Config):
    """Everything that decides the result."""

    modality: str
    """What is to be read; an installed plugin declares it."""
    data: str
    """JSONL, or encoded media (`adapters.Pairs`)."""
    held_out: str | None = None
    """Of the same kind; measured at the end."""
    model: str = "anygen-mini"
    """The model that is given the sense."""
    name: str | None = None
    """What the new model is called; None keeps the old name."""
    encoder: str | None = None
    """Directory of a trained encoder; None takes the one that comes with the plugin."""
    projector: PartConfig | None = None
    """None takes the one that the plugin declares."""
    questions: tuple[str, ...] = ()
    """None given takes those that the plugin declares."""
    answer: str | None = None
    """With {caption} in it; None takes the one that the plugin declares."""
    feature_noise: float = 0.5
    """Features get Gaussian noise of up to so much of their own deviation, as in CapDec (arXiv:2211.00575)."""
    name_steps: int = 500
    """Steps in which the projector meets the embeddings of the captions' words."""
    steps: int = 100
    """Steps through the LLM."""
    batch_size: int = 16
    learning_rate: float = 5e-4
    checkpoint_steps: int = 50
    """How often the state is written, for a run that is killed to go on from; 0 never."""
    resume: bool = True
    """Goes on from the last checkpoint of a run of the same recipe in the same folder; false begins anew."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.answer is not None and "{caption}" not in self.answer:
            raise ConfigError(f"answer must say the caption, as in 'This is {{caption}}.', got '{self.answer}'")
        if min(self.steps, self.name_steps, self.checkpoint_steps) < 0 or self.batch_size < 1:
            raise ConfigError("steps, name_steps and checkpoint_steps are not negative, and batch_size is at least 1")


class Questions(Dataset[dict[str, Any]]):
    """Conversations of one question about one medium; item `n` is the same whoever asks for it."""

    def __init__(
        self,
        model: AnyGenModel,
        modality: str,
        pairs: Pairs,
        questions: Sequence[str],
        answer: str,
        *,
        count: int,
        noise: float,
        seed: int,
    ) -> None:
        self.model, self.modality, self.pairs = model, modality, pairs
        self.questions, self.answer, self.count, self.seed = questions, answer, count, seed
        self.noise = noise * pairs.features.std((0, 1))
        shuffled = list(range(len(pairs.captions)))
        random.Random(seed).shuffle(shuffled)
        self.order = shuffled

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng = random.Random(f"{self.seed}/{number}")
        row = self.order[number % len(self.order)]
        question = TextPart(rng.choice(self.questions))
        medium: Any = MediaPart(self.modality, row)  # type: ignore[arg-type]  # its features stand in for it
        parts = (question, medium) if rng.random() < 0.5 else (medium, question)
        said = self.answer.replace("{caption}", self.pairs.captions[row])
        messages = [Message("user", parts), Message("assistant", (TextPart(said),))]
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        feature = self.pairs.features[row]
        noise = torch.randn(feature.shape, generator=generator) * self.noise * rng.random()
        return {"example": self.model.prompts.example(messages), "feature": feature + noise}

    def told(self, number: int) -> str:
        """An item in words."""
        row = self.order[number % len(self.order)]
        return f"row {row + 1}: {self.pairs.captions[row]}"

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Items -> the arguments of the model's forward pass."""
        media = {self.modality: torch.stack([item["feature"] for item in items])}
        return collate(self.model, [item["example"] for item in items], media=media, conditions={})


@lowering("batch_size")
def train(recipe: NewInputRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/model`.

    Returns:
        `nearest`, the share of media whose caption's embeddings are nearest after the first stage; and of held-out
        media `named`, the share whose answer is the right one, word for word, with `cases`, how many there are.

    Raises:
        ModalityError: no plugin declares the modality.
        ConfigError: the model reads it already, or the data do not fit.
    """
    torch.manual_seed(recipe.seed)
    declared, log = input_modality(recipe.modality), RunLog(out, "new_input")
    directory = recipe.encoder or declared.weights
    if directory is None:
        raise ConfigError(f"the plugin of {recipe.modality} brings no weights; name a trained encoder: encoder: DIR")
    encoder = declared.encoder.from_pretrained(directory)
    pairs = read_pairs(Path(recipe.data), encoder)
    held_out = read_pairs(Path(recipe.held_out), encoder) if recipe.held_out is not None else None
    model = load(recipe.model)
    figures = teach(model, encoder, pairs, declared, recipe, log)
    if held_out is not None:
        figures |= measure(model, recipe.modality, held_out, declared, recipe)
    finish(model, out, name=recipe.name)
    forget_checkpoints(out)
    log.write(final=True, **figures)
    return figures


def teach(
    model: AnyGenModel,
    encoder: Any,
    pairs: Pairs,
    declared: InputModality,
    recipe: NewInputRecipe,
    log: RunLog,
) -> dict[str, float]:
    """Adds the encoder to a frozen model and trains its projector. Arguments and result as of `train`."""
    modality, projector = recipe.modality, recipe.projector or declared.projector
    add_input(model, encoder, tokens=pairs.features.shape[1], projector=projector, seed=recipe.seed)
    part = model.input_projectors[modality].requires_grad_(True)
    for name, (trainable, total) in model.trainable_parameters().items():
        log.write(part=name, trainable=trainable, parameters=total)
    captions = list(dict.fromkeys(pairs.captions))
    numbers = torch.tensor([captions.index(caption) for caption in pairs.captions])
    figures: dict[str, float] = {}
    if recipe.name_steps:
        told = name_embeddings(model.llm, captions, model.settings.slots[modality])
        meet_names(
            model.project_input,
            list(part.parameters()),
            {modality: Pool(pairs.features, [], numbers)},
            told,
            noise={modality: recipe.feature_noise * pairs.features.std((0, 1))},
            steps=recipe.name_steps,
            batch_size=min(256, len(pairs.captions)),
            held_out=1,
        )
        figures["nearest"] = _nearest(model, modality, pairs.features, told, numbers)
        log.write(captions=len(captions), **figures)
    if recipe.steps:
        data = Questions(
            model,
            modality,
            pairs,
            recipe.questions or declared.questions,
            recipe.answer or declared.answer,
            count=recipe.steps * recipe.batch_size,
            noise=recipe.feature_noise,
            seed=recipe.seed,
        )
        groups = [{"params": list(part.parameters()), "lr": recipe.learning_rate}]
        fit(
            model,
            data,
            data.collate,
            groups,
            log,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            weight_decay=0.01,
            checkpoint_steps=recipe.checkpoint_steps,
            resume=recipe.resume,
            identity=identity_of(recipe),
        )
    part.requires_grad_(False)
    model.eval()
    return figures


@torch.no_grad()
def measure(
    model: AnyGenModel, modality: str, pairs: Pairs, declared: InputModality, recipe: NewInputRecipe
) -> dict[str, float]:
    """Asks the first question about each medium. Result as of `train`."""
    question = (recipe.questions or declared.questions)[0]
    wanted = [(recipe.answer or declared.answer).replace("{caption}", caption) for caption in pairs.captions]
    asked = [[Message("user", (TextPart(question), MediaPart(modality, row)))] for row in range(len(wanted))]  # type: ignore[arg-type]
    said = [words_of(answer) for answer in answers(model, asked, {modality: pairs.features})]
    right = sum(one.lower() == other.lower() for one, other in zip(said, wanted, strict=True))
    return {"named": right / len(wanted), "cases": float(len(wanted))}


@torch.no_grad()
def _nearest(model: AnyGenModel, modality: str, features: Tensor, told: Tensor, numbers: Tensor) -> float:
    made = torch.cat([model.media_tokens(modality, part.to(model.device)) for part in features.split(256)])
    made = made.view(len(features), -1)
    nearest = torch.cdist(made.float(), told.flatten(1)).argmin(1).cpu()
    return float((told.flatten(1).cpu()[nearest] == told.flatten(1).cpu()[numbers]).all(1).float().mean())
