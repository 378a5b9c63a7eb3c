"""What a stage will take, told before it begins: rows, trainable parameters, memory, time. No weights are read.

The model is built without memory (on torch's meta device), so that its parameters are counted exactly. Activations are
estimated from the LLM's shape; time from the operations of a step and the speed of one matrix product of the LLM's own
shape, measured here and now.

Source: operations of a step, two a parameter and token forward, two back through it and two for its own gradient,
Kaplan et al. (arXiv:2001.08361); what attention layers keep for the backward pass, Korthikanti et al.
(arXiv:2205.05198), counted anew for weights that are frozen, whose inputs need not be kept.
Shapes: T tokens of a batch, D LLM width, F width of its hidden layers, V vocabulary.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from anygen.llm import LLM
from anygen.loading import choose_device, model_directory
from anygen.memory_need import model_need
from anygen.model import ADAPTER, CONFIG, TOKENIZER, AnyGenModel
from anygen.model_config import AnyGenConfig
from anygen.model_parts import load_encoder
from anygen.training.kept_states import constant_states
from anygen.training.precompute import found
from anygen.training.stage import Prepare, StageRecipe, llm_dtype, trained_encoders
from anygen.training.stage_data import Item, learn
from anygen.training.trainable import Selection, adapt, groups, own_words, select

SAMPLE = 200
"""Conversations that are tokenised to tell how long they are."""
EFFICIENCY = {"cuda": 0.35, "cpu": 0.6, "mps": 0.35}
"""Share of a matrix product's speed that a whole step reaches."""


@dataclass(slots=True)
class Estimate:
    """What a stage will take."""

    rows: int
    """Conversations that it learns from."""
    steps: int
    tokens: float
    """Of a conversation, on average."""
    parameters: dict[str, tuple[int, int]]
    """Part -> (trainable, all)."""
    memory: dict[str, int] = field(default_factory=dict)
    """What for -> bytes on the device."""
    seconds: float = 0.0
    """Of the training; caches come on top."""
    device: str = ""
    to_cache: dict[str, int] = field(default_factory=dict)
    """What is computed into caches -> how many."""

    @property
    def bytes(self) -> int:
        """The sum of `memory`."""
        return sum(self.memory.values())


class Blueprint(LLM):
    """An LLM without weights, whose layers and parameters are counted."""

    def _check_head(self) -> None:
        """There is nothing to check."""


def blueprint(directory: Path, config: AnyGenConfig, live: Sequence[str], recipe: StageRecipe) -> AnyGenModel:
    """The model of a directory without the LLM's weights, with the adapter that the recipe asks for."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = found(directory, config.llm)
    words = directory / TOKENIZER if (directory / TOKENIZER).is_dir() else where
    tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
    told = AutoConfig.from_pretrained(where, local_files_only=True)
    dtype = llm_dtype(recipe, choose_device(None))
    encoders = {m: load_encoder(config.inputs[m].encoder, lambda source: found(directory, source)) for m in live}
    with torch.device("meta"):
        llm = Blueprint(AutoModelForCausalLM.from_config(told, dtype=dtype), cast(Any, tokenizer))
        model = AnyGenModel(config, llm, encoders)
        if (directory / ADAPTER).is_dir() and not (recipe.peft.fresh and recipe.peft.renew):
            from peft import PeftConfig

            adapter = PeftConfig.from_pretrained(str(directory / ADAPTER))
            adapter.base_model_name_or_path, adapter.inference_mode = None, False
            llm.add_adapter(adapter)
        adapt(llm, recipe.peft)
    return model


def estimate(recipe: StageRecipe, prepare: Prepare, trains: Sequence[str]) -> Estimate:
    """Estimates a stage. Arguments as of `stage_run.run`.

    Raises:
        ConfigError: as `stage_run.run`, as far as it can be told without weights.
    """
    directory = model_directory(recipe.model)
    config, device = AnyGenConfig.load(directory / CONFIG), choose_device(None)
    live = trained_encoders(recipe.unfreeze, config)
    prepared = prepare(config)
    model = blueprint(directory, config, live, recipe)
    select(model, Selection(recipe.trains or tuple(trains), recipe.unfreeze))
    groups(model, recipe.learning_rate, recipe.learning_rates, recipe.weight_decay)  # names of rates that fit nothing
    picked = random.Random(0).sample(prepared.items, min(SAMPLE, len(prepared.items)))
    spoken = own_words(model)
    learned = [
        learn(model.prompts, item.talk(random.Random(0)), own_words=spoken, all_turns=prepared.all_turns)
        for item in picked
    ]
    tokens = sum(one.tokens for one in learned) / max(1, len(learned))
    targets = sum(sum(label >= 0 for label in (*one.labels, *one.base_labels)) for one in learned) / max(
        1, len(learned)
    )
    rows = len(prepared.items) - min(int(recipe.held_out * len(prepared.items)), len(prepared.items) - 1)
    told = Estimate(rows, recipe.count(rows), tokens, model.trainable_parameters(), device=str(device))
    told.to_cache = {
        "media": len(
            {medium.key for item in prepared.items for modality, medium in item.media if modality not in live}
        ),
        "captions": len({pair for item in prepared.items for pair in item.captions}),
    }
    batch = recipe.batch_size * prepared.rows
    logits = batch * targets if prepared.words else 0.0
    told.memory = memory(recipe, model, directory, batch * tokens, logits)
    operations = step_operations(model, batch * tokens, logits) * recipe.accumulate
    operations *= told.steps * (4 / 3 if recipe.activation_checkpointing else 1)
    if constant_states(model) and not prepared.words and not recipe.diffusion_weight:  # a context is read once
        drawn = told.steps * batch * recipe.accumulate
        contexts = min(drawn, told.rows * contexts_of(model, prepared.items))
        operations = step_operations(model, contexts * tokens, 0) + projector_operations(model, drawn * tokens)
    told.seconds = operations / (speed(model, device) * EFFICIENCY.get(device.type, 0.35))
    return told


def through_llm(model: AnyGenModel) -> bool:
    """Whether gradients flow back through the LLM: something trains that it reads, or in it."""
    before = (model.signal_tokens, model.input_projectors, model.encoders, model.llm)
    return any(p.requires_grad for part in before for p in part.parameters())


def memory(recipe: StageRecipe, model: AnyGenModel, directory: Path, tokens: float, logits: float) -> dict[str, int]:
    """What for -> bytes, for a batch of so many tokens, of which `logits` are predicted."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    own = {id(p) for p in model.llm.parameters()} - set(model.llm.adapter_parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if recipe.peft.quantization is not None:
        linear = [m.weight for m in model.llm.modules() if isinstance(m, nn.Linear) and id(m.weight) in own]
        weights -= int(sum(w.numel() * (w.element_size() - 0.5625) for w in linear if w is not model.llm.head.weight))
    found = {
        "weights": weights,
        "gradients": sum(p.numel() * p.element_size() for p in trainable),
        "optimizer": sum(8 * p.numel() for p in trainable),
        "activations": int(activations(model, tokens, recipe.activation_checkpointing)),
        "logits": int(3 * 4 * logits * (model.llm.vocab_size + len(model.signal_tokens))),
    }
    if recipe.diffusion_weight:
        found["generators"] = sum(model_need(directory).generators("fp32").values())
    return {name: size for name, size in found.items() if size}


def activations(model: AnyGenModel, tokens: float, checkpointing: bool = False) -> float:
    """Bytes that the LLM's layers keep for the backward pass.

    Of each layer: two norms their inputs in float32 and scaled, attention its queries, keys (before and after their
    rotation), values and result, the hidden layer its two halves, their product and the activation. A layer with an
    adapter, or that trains, keeps its input as well. Without gradients through the LLM one layer's are alive at a time.
    """
    config: Any = model.llm.base.config.get_text_config()
    width, layers, size = model.llm.width, config.num_hidden_layers, torch.finfo(model.llm.dtype).bits // 8
    hidden = getattr(config, "intermediate_size", None) or 4 * width
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head
    attention = 3 * heads * head + 3 * keys
    layer = 2 * width * (4 + 2 * size) + size * (attention + 4 * hidden)
    adapter = model.llm.adapter_parameters()
    trains = any(p.requires_grad and (id(p) in adapter or p.ndim == 2) for p in model.llm.parameters())
    layer += size * (3 * width + hidden) if trains else 0
    if not through_llm(model):
        return tokens * layer
    return tokens * (layers * size * width + layer if checkpointing else layers * layer)


def step_operations(model: AnyGenModel, tokens: float, logits: float) -> float:
    """Floating-point operations forward and back for so many tokens, of which `logits` are predicted."""
    rows = {id(part.weight): part.weight.numel() for part in (model.llm.embedding, model.llm.head)}  # type: ignore[union-attr]
    adapter = model.llm.adapter_parameters()
    layers = [p for p in model.llm.parameters() if id(p) not in rows]
    own = sum(p.numel() for p in layers if p.requires_grad)
    back = 2 if through_llm(model) else 0
    head = max(rows.values())
    trained_head = head if any(p.requires_grad and id(p) not in adapter for p in model.llm.parameters()) else 0
    return (
        tokens * ((2 + back) * sum(p.numel() for p in layers) + 2 * own)
        + logits * ((2 + back) * head + 2 * trained_head)
        + projector_operations(model, tokens)
    )


def projector_operations(model: AnyGenModel, tokens: float) -> float:
    """Of these the projectors'; there is about one medium in forty tokens."""
    projectors = [p for part in (model.input_projectors, model.output_projectors) for p in part.parameters()]
    slots = max([*model.settings.slots.values(), *(len(run) for run in model.signal_tokens.runs.values())], default=1)
    return tokens / 40 * slots * sum(p.numel() * (6 if p.requires_grad else 2) for p in projectors)


def contexts_of(model: AnyGenModel, items: Sequence[Item]) -> float:
    """About how many different contexts an item becomes, of those that are drawn at random."""
    tried = random.Random(0).sample(list(items), min(8, len(items)))
    found = [
        len({tuple(learn(model.prompts, one.talk(random.Random(draw)), own_words=False).ids) for draw in range(12)})
        for one in tried
    ]
    return sum(found) / max(1, len(found))


def speed(model: AnyGenModel, device: torch.device) -> float:
    """Operations a second of a matrix product of the LLM's width and type on a device."""
    width = model.llm.width
    left, right = (
        torch.randn(shape, device=device).to(model.llm.dtype) for shape in ((512, width), (width, 4 * width))
    )

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            torch.matmul(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    run(2)
    count = max(3, int(0.1 / max(run(1), 1e-5)))
    return 2 * 512 * width * 4 * width * count / run(count)


def show(name: str, told: Estimate) -> None:
    """Prints an estimate."""
    from rich.console import Console

    from anygen.training.stage_run import print_table

    console = Console(width=100)
    print_table(told.parameters, console)
    cached = ", ".join(f"{count:,} {what}" for what, count in told.to_cache.items() if count)
    steps = f"{told.steps:,} step{'' if told.steps == 1 else 's'}"
    console.print(f"{name}: {told.rows:,} conversations of {told.tokens:.0f} tokens, {steps}")
    if cached:
        console.print(f"computed into caches first: {cached}")
    parts = ", ".join(f"{what} {size / 2**20:,.0f}" for what, size in told.memory.items())
    console.print(f"memory on {told.device}: about {told.bytes / 2**30:.2f} GiB ({parts} MiB)")
    console.print(f"time on {told.device}: about {_time(told.seconds)}, without caches and measurements")


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
