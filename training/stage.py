"""A stage on a user's own model and data: what all stages state, and how one runs.

    rows ─► checked, bad ones counted ─► features and conditions cached ─► model loaded without encoders and generators
         ─► parts thawed, the rest frozen ─► `transformers.Trainer` ─► out/model

Source: the stages of NExT-GPT (arXiv:2309.05519) and of the MM-LLMs survey (arXiv:2401.13601), section 2.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch

from anygen.config import Config
from anygen.errors import ConfigError
from anygen.loading import choose_device, choose_dtype, find_generator, model_directory
from anygen.losses import AlignmentConfig
from anygen.model import CONFIG, AnyGenModel
from anygen.model_config import AnyGenConfig
from anygen.training.caches import TensorCache
from anygen.training.chat_rows import Shown
from anygen.training.data_rows import Faults
from anygen.training.precompute import condition_cache, feature_cache, set_image_size
from anygen.training.stage_data import Item, Learned, learn
from anygen.training.trainable import PeftSettings, Selection, adapt, own_words, select

logger = logging.getLogger("anygen.training")

Schedule = Literal["cosine", "linear", "constant"]


POSITIVE = (
    "epochs",
    "max_grad_norm",
    "image_size",
    "min_snr",
    "evaluate_every",
    "save_every",
    "sample_every",
    "retention_every",
    "retention_probes",
)
"""Keys of a recipe whose values are greater than 0, or null where they may be."""
NULLABLE = ("evaluate_every", "save_every", "retention_every")
"""Those of them that null turns off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRecipe(Config):
    """What decides the result of any stage."""

    model: str = "anygen-mini"
    """The model to start from: a name that the hub resolves, or a directory."""
    name: str | None = None
    """What the new model is called; None keeps the old name."""
    trains: tuple[str, ...] = ()
    """Parts that train, such as `input_projectors.image`, `llm` (its adapter); none takes the stage's own."""
    unfreeze: tuple[str, ...] = ()
    """Patterns of the names of the LLM's and the encoders' own weights that train too, such as `llm.*.layers.2?.*` or
    `encoders.image.*`; `llm.*` is all of the LLM. An encoder that trains is not cached."""
    peft: PeftSettings = field(default_factory=PeftSettings)
    learning_rate: float = 1e-3
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Part, or a modality of it, such as `output_projectors.audio` -> its learning rate in place of `learning_rate`."""
    steps: int = 1000
    """Steps of the optimizer."""
    epochs: float | None = None
    """Passes over the data, in place of `steps`."""
    batch_size: int = 8
    """Conversations of a step, of all processes together."""
    accumulate: int = 1
    """Steps forward and back for one of the optimizer."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises."""
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_tokens: int = 1024
    """Longer conversations are bad rows."""
    held_out: float = 0.05
    """Share of the data that is measured only, before and after."""
    bad_rows: float = 0.0
    """Share of a file's rows that may be left out because they do not fit; with more the run stops before training."""
    cache: str | None = None
    """Folder of encoders' features and generators' conditions, which several recipes may share; None: OUT/cache."""
    verify_cache: bool = True
    """Checks the checksums of a cache that is there."""
    image_size: int | None = None
    """Side in pixels that the encoder of images reads them in, where it can; later stages may take a larger one."""
    bf16: bool | None = None
    """Mixed precision, the LLM held in bfloat16; None: on a GPU. Without, all is float32."""
    activation_checkpointing: bool = False
    """Computes activations of the LLM's layers twice and keeps fewer."""
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    """Distance between the output projector's condition and the generator's, in units of the data's own deviation."""
    lm_weight: float = 1.0
    alignment_weight: float = 1.0
    diffusion_weight: float = 0.0
    """Of the conditional diffusion loss (survey eq. 5), for answers whose media have files. Their generators are then
    in memory, frozen."""
    min_snr: float | None = None
    """gamma of the diffusion loss's min-SNR weights (arXiv:2303.09556), such as 5; None weighs all times alike."""
    evaluate_every: int | None = None
    """Steps between measurements of the held-out data; None: before and after only."""
    save_every: int | None = None
    """Steps between checkpoints in OUT/checkpoints, of which two are kept; None: none."""
    resume: bool = True
    """Goes on from the last checkpoint in OUT/checkpoints, if there is one: a run that was stopped; otherwise it begins
    anew."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Where curves go: tensorboard (OUT/tensorboard), wandb, trackio, …, as `transformers.Trainer` knows them."""
    samples: tuple[str, ...] = ()
    """Prompts that are answered now and then; media go to OUT/samples and into TensorBoard."""
    sample_every: int = 500
    retention_every: int | None = None
    """Steps between looks at whether old prompts still get answers of the same kind; None: none."""
    retention_probes: int = 24
    workers: int = 0
    """Processes that make batches."""
    seed: int = 0

    def __post_init__(self) -> None:
        rates = {"learning_rate": self.learning_rate} | {
            f"learning_rates.{k}": v for k, v in self.learning_rates.items()
        }
        for name, value in (rates | {"weight_decay": self.weight_decay}).items():
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name} is 0 or more, got {value:g}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup is a share of the steps, from 0 to 1, got {self.warmup:g}")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                hint = "; null turns it off" if name in NULLABLE else ""
                raise ConfigError(f"{name} is greater than 0, got {value:g}{hint}")
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is 0 or more, got {getattr(self, name)}")
        if not 0 <= self.held_out < 1 or not 0 <= self.bad_rows < 1:
            raise ConfigError("held_out and bad_rows are shares, from 0 to less than 1")
        if min(self.batch_size, self.accumulate, self.max_tokens) < 1 or self.steps < 0:
            raise ConfigError("batch_size, accumulate and max_tokens are at least 1, and steps are not negative")
        if min(self.lm_weight, self.alignment_weight, self.diffusion_weight) < 0:
            raise ConfigError("weights of losses are not negative")

    def count(self, items: int) -> int:
        """Steps of the optimizer with so many items."""
        each = self.batch_size * self.accumulate
        return self.steps if self.epochs is None else max(1, round(self.epochs * items / each))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A stage's data, checked against the model's configuration."""

    items: list[Item]
    text: list[Item] = field(default_factory=list)
    """Text-only conversations that are mixed in."""
    share: float = 0.0
    """Of the text-only ones."""
    exact: bool = True
    """Whether a conversation is always the same, so that its length can be told and checked."""
    words: bool = True
    """Whether there is an LM loss."""
    all_turns: bool = True
    rows: int = 1
    """Rows of a batch that an item becomes; a pair of answers becomes two."""


Prepare = Callable[[AnyGenConfig], Prepared]


@dataclass(slots=True)
class Ready:
    """A stage about to begin."""

    model: AnyGenModel
    directory: Path
    train: list[Item]
    held_out: list[Item]
    text: list[Item]
    features: dict[str, TensorCache]
    conditions: dict[str, TensorCache]
    live: list[str]
    """Input modalities whose encoders run in training."""
    hooks: list[Any]
    make: Callable[[list[Any]], Learned]
    words: bool
    share: float
    lengths: dict[int, int] | None


def llm_dtype(recipe: StageRecipe, device: torch.device) -> torch.dtype:
    """What the LLM's weights are held in: float32 where they train themselves, or where all is to be precise."""
    whole = any(fnmatchcase("llm.model.", pattern.partition("*")[0] + "*") for pattern in recipe.unfreeze)
    return torch.float32 if whole or recipe.bf16 is False else choose_dtype(None, device)


def make_ready(recipe: StageRecipe, out: Path, prepare: Prepare, trains: Sequence[str]) -> Ready:
    """Data, caches and model, in this order, so that what is wrong is told early. As for `stage_run.run`."""
    directory = model_directory(recipe.model)
    config = AnyGenConfig.load(directory / CONFIG)
    check_reports(recipe.report_to)
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # of several processes each has its own
    device = choose_device(None)
    live = trained_encoders(recipe.unfreeze, config)
    prepared = prepare(config)
    everything = [*prepared.items, *prepared.text]
    features, unread = _features(recipe, out, directory, config, everything, live, device)
    items, text = (without(found, unread, recipe.bad_rows) for found in (prepared.items, prepared.text))
    conditions = _conditions(recipe, out, directory, config, items, device)
    dtype, kind = llm_dtype(recipe, device), recipe.peft.quantization
    model = AnyGenModel.from_pretrained(directory, dtype=dtype, device=device, encoders=live, quantization=kind)
    if recipe.image_size is not None and "image" in live:
        set_image_size(model.encoders["image"], "image", recipe.image_size)
    model.alignment, model.alignment_weight = recipe.alignment, recipe.alignment_weight
    for modality, cache in conditions.items():
        model.set_metric(modality, unit_metric(cache))
    torch.manual_seed(recipe.seed)  # here: whether a cache had to be filled must not count
    adapt(model.llm, recipe.peft)
    if recipe.activation_checkpointing:
        base: Any = model.llm.base  # transformers renames the method
        getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)(
            {"use_reentrant": False, "context_fn": model.llm.checkpoint_contexts}
        )
    hooks = select(model, Selection(recipe.trains or tuple(trains), recipe.unfreeze))
    spoken = own_words(model)

    def make(messages: list[Any]) -> Learned:
        return learn(model.prompts, messages, own_words=spoken, all_turns=prepared.all_turns)

    items, lengths = with_lengths(items, make, recipe)
    text, more = with_lengths(text, make, recipe)
    held = min(int(recipe.held_out * len(items)), len(items) - 1)
    picked = torch.randperm(len(items), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    return Ready(
        model=model,
        directory=directory,
        train=[items[number] for number in sorted(picked[held:])],
        held_out=[items[number] for number in sorted(picked[:held])],
        text=text,
        features=features,
        conditions=conditions,
        live=live,
        hooks=hooks,
        make=make,
        words=prepared.words,
        share=prepared.share,
        lengths=lengths | more if prepared.exact else None,
    )


def check_reports(names: Sequence[str]) -> None:
    """Refuses what the trainer cannot report to, before anything is computed.

    Raises:
        ConfigError: an unknown name.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near = get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            raise ConfigError(f"report_to: nothing is known of '{name}'; {hint}")


def _folder(recipe: StageRecipe, out: Path) -> Path:
    return Path(recipe.cache) if recipe.cache is not None else out / "cache"


def _features(
    recipe: StageRecipe,
    out: Path,
    directory: Path,
    config: AnyGenConfig,
    items: Sequence[Item],
    live: Sequence[str],
    device: torch.device,
) -> tuple[dict[str, TensorCache], dict[str, str]]:
    media: dict[str, list[Shown]] = {}
    for item in items:
        for modality, medium in item.media:
            media.setdefault(modality, []).append(medium)
    caches: dict[str, TensorCache] = {}
    unread: dict[str, str] = {}
    for modality, shown in media.items():
        if modality in live:
            continue
        size = recipe.image_size if modality == "image" else None
        folder = _folder(recipe, out)
        caches[modality], faults = feature_cache(
            directory, config, modality, shown, folder, device=device, image_size=size, verify=recipe.verify_cache
        )
        unread |= faults
    return caches, unread


def _conditions(
    recipe: StageRecipe, out: Path, directory: Path, config: AnyGenConfig, items: Sequence[Item], device: torch.device
) -> dict[str, TensorCache]:
    captions: dict[str, list[str]] = {}
    for item in items:
        for modality, caption in item.captions:
            captions.setdefault(modality, []).append(caption)
    if recipe.diffusion_weight and not captions:
        raise ConfigError("diffusion_weight: no answer in the data holds a medium")
    if recipe.diffusion_weight and not any(item.with_media for item in items):
        raise ConfigError("diffusion_weight: the answers of the data hold captions alone, and no medium to learn from")
    for modality in captions:
        find_generator(directory, config.outputs[modality].generator.source)
    folder, verify = _folder(recipe, out), recipe.verify_cache
    return {
        modality: condition_cache(directory, config, modality, told, folder, device=device, verify=verify)
        for modality, told in captions.items()
    }


def trained_encoders(patterns: Sequence[str], config: AnyGenConfig) -> list[str]:
    """The input modalities whose encoders' weights are named by patterns."""
    told = [pattern.split(".")[1] for pattern in patterns if pattern.startswith("encoders.")]
    return [modality for modality in config.inputs if any(fnmatchcase(modality, pattern) for pattern in told)]


def without(items: Sequence[Item], unread: Mapping[str, str], allowed: float) -> list[Item]:
    """Items whose media could all be read.

    Raises:
        ConfigError: those left out are more than the share `allowed` of a file.
    """

    def fault(item: Item) -> str | None:
        return next((unread[medium.key] for _, medium in item.media if medium.key in unread), None)

    return sifted(items, fault, allowed)


def with_lengths(
    items: Sequence[Item], make: Callable[[list[Any]], Learned], recipe: StageRecipe
) -> tuple[list[Item], dict[int, int]]:
    """Items that are not too long, and the tokens of each by its `id`. Raises as `without`."""
    import random

    lengths = {id(item): len(make(item.talk(random.Random(0))).ids) for item in items}

    def fault(item: Item) -> str | None:
        tokens = lengths[id(item)]
        return f"it has {tokens:,} tokens; max_tokens is {recipe.max_tokens:,}" if tokens > recipe.max_tokens else None

    return sifted(items, fault, recipe.bad_rows), lengths


def sifted(items: Sequence[Item], fault: Callable[[Item], str | None], allowed: float) -> list[Item]:
    """Items in which there is no fault; of the others file, place and reason are told. Raises as `without`."""
    files: dict[str, Faults] = {}
    good: list[Item] = []
    for item in items:
        faults = files.setdefault(item.source, Faults(item.source, item.unit))
        faults.rows += 1
        if (why := fault(item)) is None:
            good.append(item)
        else:
            faults.found.append((item.place, why))
    for faults in files.values():
        faults.check(allowed)
    return good


def unit_metric(cache: TensorCache, most: int = 2048) -> dict[str, torch.Tensor]:
    """For each tensor of a condition float[C, C]: distances in units of the captions' own standard deviation."""
    rows = cache.rows(cache.keys()[:most])
    return {
        name: torch.eye(value.shape[-1]) / value.std().clamp(min=1e-6)
        for name, value in rows.items()
        if value.is_floating_point()
    }
