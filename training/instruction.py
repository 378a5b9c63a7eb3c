"""Teaches the LLM of the embedded default to read media, to answer with them, and to stay itself in plain talk.

One stage for what NExT-GPT (arXiv:2309.05519) does in three, because the LLM is small: input projector (pictures, clips
and sounds are named and described), signal rows and output projectors (caption-only alignment, MM-LLMs survey eq. 4:
nothing is generated or read on the output side), and a LoRA adapter. The LM loss covers text, routes and signal tokens;
the alignment is trained in the very contexts in which runs are emitted.
Differs from NExT-GPT: alignment distances are taken as the generator's cross-attention sees them
(`conditions.alignment_metrics`); modalities of one encoder share one input projector.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from anygen.component import load_strict
from anygen.config import Config
from anygen.encoders.imagebind_config import ImageBindConfig
from anygen.errors import ConfigError
from anygen.generators.base import Generator
from anygen.llm import LLM
from anygen.model import AnyGenModel
from anygen.model_config import (
    AnyGenConfig,
    InputConfig,
    ModalityConfig,
    OutputConfig,
    PartConfig,
    SourceConfig,
    SourcedPartConfig,
)
from anygen.projectors.input import FeatureShift, MemoryProjector
from anygen.saving import replacing
from anygen.training.conditions import (
    GENERATORS,
    alignment_metrics,
    caption_targets,
    load_generators,
)
from anygen.training.conversation_batches import Collator, Examples, packed_losses
from anygen.training.loop import Pace, Progress, RunLog, lowering
from anygen.training.losses import AlignmentConfig
from anygen.training.magpie import self_answers
from anygen.training.media_pools import Pool, make_pools, names_of, text_features
from anygen.training.naming import meet_names, name_embeddings, noisy, remember
from anygen.training.packing import PackedBatches, PackedDecoder
from anygen.training.pictures import load_icons
from anygen.training.requests import Conversations, self_prompts
from anygen.training.sounds import load_sounds
from anygen.training.wishes import captions_of, wishes_of


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructionRecipe(Config):
    """Everything that decides the result."""

    icons: str
    """Directory of the built icon set."""
    encoder: str
    """Directory of the trained ImageBind."""
    generators: dict[str, str]
    """Output modality -> directory of its trained generator."""
    sounds: str | None = None
    """Directory of the built sound bank; needed where sounds are made or heard."""
    llm: str = "smollm2-135m-instruct"
    """A name that the hub resolves, or a directory."""
    start: str | None = None
    """Directory of a model that this recipe trained before, to go on from; its own sizes then hold. What it does not
    make yet is added, what it does not read yet needs its input projector in `renew`."""
    checksum: str | None = None
    """The icon set's checksum; None accepts any."""
    sounds_checksum: str | None = None
    """The sound bank's checksum; None accepts any."""
    trains: tuple[str, ...] = ("llm", "signal_tokens", "input_projectors", "output_projectors")
    """The parts that train (of the LLM, its adapter); all else stands still."""
    mixture: dict[str, float] | None = None
    """Kind of conversation -> weight; None takes `requests.MIXTURE`."""
    pools: dict[str, int] = field(default_factory=lambda: {"image": 60_000})
    """Input modality (image, video, audio) -> media of it that are encoded once and asked about. The first one's
    projector is shared by the others."""
    feature_noise: float = 0.5
    """Each medium's features get Gaussian noise of up to so much of its pool's own deviation, so that the LLM reads a
    picture whose style it has not seen by what is near it. Source: CapDec (arXiv:2211.00575), for texts."""
    input_width: int = 384
    """Of the input projector's hidden layer."""
    name_steps: int = 1000
    """Steps in which the input projector first meets the LLM's own embeddings of the names of what is shown."""
    renew: tuple[str, ...] = ()
    """Parts that are not taken from `start`, but made and trained anew."""
    answers: int = 1024
    """Plain questions that the LLM answers once, for conversations that go on after its answer."""
    prompt_tokens: int = 4
    """N, LLM tokens made of one medium."""
    signal_tokens: dict[str, int] = field(default_factory=lambda: {"image": 4})
    """Output modality -> S, 4 where none is given, as NExT-GPT's for images."""
    projector_widths: dict[str, int] = field(default_factory=dict)
    """Output modality -> width of its output projector, 256 where none is given; 160 has 40 % of its bytes."""
    shared_projectors: dict[str, str] = field(default_factory=dict)
    """Output modality -> the one whose output projector makes its conditions as well, as clips' and pictures' are of
    one text encoder."""
    projector_layers: int = 2
    lora_rank: int = 8
    lora_alpha: int = 16
    rows: int = 48
    """Rows of a batch; each holds several conversations."""
    row_tokens: int = 320
    """Tokens of a row; a multiple of 8 is fastest. Longer conversations are left out."""
    chunk: int = 16
    """Batches that are packed together."""
    steps: int = 5000
    minutes: float | None = None
    save_steps: int = 500
    """How often the model so far is written; only the last is kept."""
    learning_rate: float = 1e-3
    """Of output projectors and signal rows."""
    input_learning_rate: float = 5e-4
    """Of input projectors, which know the names already."""
    lora_learning_rate: float = 5e-4
    alignment_weight: float = 3.0
    route_weight: float = 3.0
    """Of the token that decides between words and media, against one of an answer's words: talk has no other."""
    compile: bool = False
    """Compiles each of the LLM's layers and captures the decoder as a CUDA graph; the first step takes a minute."""
    bf16: bool = True
    """Mixed precision, with the LLM's weights in bfloat16. A CPU needs AMX for it to pay."""
    workers: int = 0
    """Processes that make examples."""
    seed: int = 0

    def __post_init__(self) -> None:
        if unmade := sorted(set(self.pools) - set(self.generators)):
            made = ", ".join(self.generators) or "nothing"
            raise ConfigError(
                f"pools: what is asked about can be asked for as well, and no generator makes {', '.join(unmade)}; "
                f"generators makes {made}"
            )
        if empty := [modality for modality, size in self.pools.items() if size < 1]:
            raise ConfigError(f"pools: {empty[0]} needs at least 1 medium; leave it out if it is not to be read")
        if "audio" in self.generators and self.sounds is None:
            raise ConfigError("the recipe makes audio, so it must name the sound bank: sounds: data/sounds")


def _only(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return rows[0]


class InstructionTrainer(Trainer):
    """`transformers.Trainer`, with the generators' text encoders giving each batch its alignment targets."""

    def __init__(
        self,
        *args: Any,
        generators: Mapping[str, Generator],
        deviations: Mapping[str, Tensor],
        recipe: InstructionRecipe,
        log: RunLog,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.generators, self.recipe, self.log_file = generators, recipe, log
        self.deviations = {name: spread.to(self.args.device) for name, spread in deviations.items()}
        graph = recipe.compile  # both pay off together
        self.decoder = PackedDecoder(self.model.llm, bf16=recipe.bf16, compile=recipe.compile, graph=graph)  # type: ignore[union-attr]
        self.pace = Pace()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own losses, over the states that the packed decoder makes."""
        ids = inputs["input_ids"]
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.recipe.bf16):
            media = {
                name: noisy(seen, self.recipe.feature_noise * self.deviations[name])
                for name, seen in inputs["media"].items()
            }
            conditions = {
                name: caption_targets(self.generators[name], tokens) for name, tokens in inputs["captions"].items()
            }
            output = packed_losses(model, self.decoder.run, inputs, media, conditions)
        if self.state.global_step % 50 == 0:
            align = output.alignment_loss
            assert output.lm_loss is not None
            self.log_file.write(
                step=self.state.global_step,
                lm_loss=output.lm_loss.item(),
                alignment_loss=None if align is None else align.item(),
                tokens_per_second=self.pace.report(self.state.global_step * ids.numel()),
            )
        return (output.loss, output) if return_outputs else output.loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The batches as they come: their examples are random already."""
        return SequentialSampler(cast(PackedBatches, self.train_dataset if train_dataset is None else train_dataset))

    def create_optimizer(self, model: Any = None) -> Any:
        """Three learning rates: the adapter's, the input projectors', and that of what begins from nothing."""
        if self.optimizer is None:
            recipe, parts = self.recipe, {".lora_": "adapter", "input_projectors.": "input"}
            rates = {"adapter": recipe.lora_learning_rate, "input": recipe.input_learning_rate}
            groups: dict[str, list[torch.nn.Parameter]] = {}
            for name, parameter in cast(torch.nn.Module, self.model).named_parameters():
                if parameter.requires_grad:
                    part = next((part for key, part in parts.items() if key in name), "output")
                    groups.setdefault(part, []).append(parameter)
            fused = self.args.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": group, "lr": rates.get(part, recipe.learning_rate), "part": part}
                    for part, group in groups.items()
                ],
                betas=(0.9, 0.98),
                weight_decay=0.01,
                fused=fused,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of `Progress`, by steps or by the clock."""
        if self.lr_scheduler is None:
            progress = Progress(self.recipe.steps, self.recipe.minutes)

            def factor(step: int, warmup: int) -> float:
                progress.step = step
                return progress.learning_rate(1.0, warmup=warmup)

            optimizer = optimizer or self.optimizer
            # An adapter that knows its work is not to follow the first gradients of projectors that know nothing.
            knows = self.recipe.start is not None and bool(self.recipe.renew)
            by_group: list[Callable[[int], float]] = [
                partial(factor, warmup=500 if knows and group["part"] == "adapter" else 100)
                for group in optimizer.param_groups
            ]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, by_group)
        return self.lr_scheduler


class Watch(TrainerCallback):
    """Writes the model now and then, and ends the run when its minutes are over."""

    def __init__(self, recipe: InstructionRecipe, directory: Path) -> None:
        self.progress, self.every, self.directory = Progress(recipe.steps, recipe.minutes), recipe.save_steps, directory

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Asks the trainer to stop."""
        self.progress.step = state.global_step
        if state.global_step % self.every == 0:
            with replacing(self.directory, overwrite=True) as fresh:
                kwargs["model"].save_pretrained(fresh, dtype=torch.bfloat16, parts=False)
        control.should_training_stop = control.should_training_stop or self.progress.done
        return control


def settings(
    recipe: InstructionRecipe, generators: Mapping[str, Generator], feature_dim: int, told: Tensor
) -> AnyGenConfig:
    """The parts of anygen-mini, named as it ships them.

    Args:
        recipe: their sizes.
        generators: output modality -> generator.
        feature_dim: the encoder's.
        told: float[K, N, D], the embeddings of the names that the input projector remembers.
    """
    memory = {
        "memories": len(told),
        "words": len(told.flatten(0, 1).unique(dim=0)),
        "tokens": recipe.prompt_tokens,
        "width": recipe.input_width,
    }
    owner = next(iter(recipe.pools), None)
    inputs = {
        modality: InputConfig(
            encoder=SourcedPartConfig(
                name="imagebind",
                source=SourceConfig(path="encoders/imagebind"),
                options={"modality": modality},
            ),
            feature_dim=feature_dim,
            slots=recipe.prompt_tokens,
            projector=PartConfig(name="memory", options=memory) if modality == owner else PartConfig(name="linear"),
            shares=None if modality == owner else owner,
        )
        for modality in recipe.pools
    }

    def transformer(modality: str) -> PartConfig:
        width, layers = recipe.projector_widths.get(modality, 256), recipe.projector_layers
        options = {"width": width, "encoder_layers": layers, "decoder_layers": layers, "heads": 4, "ffn": 4 * width}
        return PartConfig(name="text_fc", options=options)

    outputs = {
        modality: OutputConfig(
            signal_tokens=recipe.signal_tokens.get(modality, 4),
            condition={name: tuple(shape) for name, shape in generator.condition_spec.shapes.items()},
            generator=SourcedPartConfig(name=GENERATORS[modality], source=SourceConfig(path=f"generators/{modality}")),
            projector=PartConfig(name="text_fc") if modality in recipe.shared_projectors else transformer(modality),
            shares=recipe.shared_projectors.get(modality),
        )
        for modality, generator in generators.items()
    }
    return AnyGenConfig(
        name="anygen-mini",
        llm=SourceConfig(repo="smollm2-135m-instruct"),
        modalities={
            modality: ModalityConfig(input=inputs.get(modality), output=outputs.get(modality))
            for modality in dict.fromkeys([*inputs, *outputs])
        },
    )


def build(recipe: InstructionRecipe, config: AnyGenConfig, llm: LLM) -> AnyGenModel:
    """The model with fresh projectors, signal rows and adapter."""
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    llm.add_adapter(LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=targets))
    return AnyGenModel(config, llm).initialize(seed=recipe.seed)


def renewed(recipe: InstructionRecipe, config: AnyGenConfig, model: AnyGenModel) -> AnyGenModel:
    """The model with the parts of `recipe.renew` made anew, as `config` has them, and with those that it lacks.

    The others are kept: signal rows by their names, projectors by their modalities.

    Raises:
        ConfigError: it is not projectors that are to be made anew, or what is kept has other sizes in `config`.
    """
    if unknown := sorted(set(recipe.renew) - {"input_projectors", "output_projectors"}):
        raise ConfigError(f"only input_projectors and output_projectors can be made anew, not {', '.join(unknown)}")
    fresh = AnyGenModel(config, model.llm).initialize(seed=recipe.seed)
    fresh.signal_tokens.adopt(model.signal_tokens)
    for name in ("input_projectors", "output_projectors"):
        if name not in recipe.renew:
            known = getattr(model, name)
            for modality, part in getattr(fresh, name).items():
                if modality in known:
                    load_strict(part, known[modality].state_dict(), f"{recipe.start}: {name}.{modality}")
    return fresh


def freeze_others(model: AnyGenModel, trains: Sequence[str]) -> None:
    """Freezes what is trainable in all parts but those named.

    Raises:
        ConfigError: the model has no such part; lists those that it has.
    """
    parts = dict(model.named_children())
    if unknown := sorted(set(trains) - set(parts)):
        raise ConfigError(f"unknown parts: {', '.join(unknown)}; the model has {', '.join(parts)}")
    for name, part in parts.items():
        if name not in trains:
            part.requires_grad_(False)


def begin_with_names(
    recipe: InstructionRecipe, model: AnyGenModel, pools: Mapping[str, Pool], names: Sequence[str], told: Tensor
) -> dict[str, dict[str, float]]:
    """The input projectors remember the names, told as float[K, N, D], and meet them; `meet_names`'s figures."""
    projectors = {modality: model.input_projectors[modality] for modality in pools}
    shifts = {modality: part for modality, part in projectors.items() if isinstance(part, FeatureShift)}
    (projector,) = (part for part in projectors.values() if isinstance(part, MemoryProjector))
    remember(projector, shifts, pools, text_features(recipe.encoder, names, model.device), told)
    noise = {modality: recipe.feature_noise * pool.features.std((0, 1)) for modality, pool in pools.items()}
    parameters = [p for part in projectors.values() for p in part.parameters()]
    return meet_names(model.project_input, parameters, pools, told, noise=noise, steps=recipe.name_steps)


def check_inputs(recipe: InstructionRecipe, model: AnyGenModel) -> None:
    """Refuses a start that does not read what the recipe asks about.

    Raises:
        ConfigError: names what it lacks.
    """
    has = model.settings.inputs
    if lacking := [modality for modality in recipe.pools if modality not in has]:
        raise ConfigError(
            f"start: the model in {recipe.start} does not read {', '.join(lacking)}, only {', '.join(has)}; "
            "train without start, or with renew=[input_projectors]"
        )


@lowering("rows")
def train(recipe: InstructionRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/model`: configuration, projectors, signal rows and adapter in bf16."""
    from anygen import hub

    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log = RunLog(out, "instruction")
    icons = load_icons(recipe.icons, recipe.checksum)
    bank = load_sounds(recipe.sounds, recipe.sounds_checksum) if recipe.sounds is not None else None
    generators = load_generators(recipe.generators, device)
    pools = make_pools(recipe.pools, recipe.encoder, icons, bank, seed=recipe.seed + 3, device=device)
    for modality, pool in pools.items():
        log.write(pool=modality, media=len(pool.shown))
    wishes, names = wishes_of(list(recipe.generators), icons, bank), names_of(icons, bank)
    dtype, llm_directory = torch.bfloat16 if recipe.bf16 else torch.float32, hub.resolve(recipe.llm)
    feature_dim = ImageBindConfig.load(Path(recipe.encoder) / "config.json").out_dim
    if recipe.start is not None:
        model = AnyGenModel.from_pretrained(
            recipe.start, dtype=dtype, device=device, encoders=False, resolve=lambda _: llm_directory
        )
        told = name_embeddings(model.llm, names, recipe.prompt_tokens)
        if "input_projectors" not in recipe.renew:
            check_inputs(recipe, model)
        if recipe.renew or set(recipe.generators) - set(model.settings.outputs):
            model = renewed(recipe, settings(recipe, generators, feature_dim, told), model).to(device)
    else:
        llm = LLM.from_pretrained(llm_directory, dtype=dtype, device=device)
        told = name_embeddings(llm, names, recipe.prompt_tokens)
        model = build(recipe, settings(recipe, generators, feature_dim, told), llm).to(device)
    if pools and (recipe.start is None or "input_projectors" in recipe.renew):
        for modality, met in begin_with_names(recipe, model, pools, names, told).items():
            log.write(modality=modality, names=len(names), **met)
    model.alignment = AlignmentConfig(mse=1.0)
    model.alignment_weight = recipe.alignment_weight
    for one in wishes:
        captions = captions_of(one, 512, recipe.seed)
        model.set_metric(one.modality, alignment_metrics(generators[one.modality], captions))
    freeze_others(model, recipe.trains)
    questions = random.Random(recipe.seed).sample(self_prompts(), min(recipe.answers, len(self_prompts())))
    answers = self_answers(model.llm, questions)
    log.write(answers=len(answers))
    for part, (trainable, total) in model.trainable_parameters().items():
        log.write(part=part, trainable=trainable, parameters=total)
    shown = [seen for pool in pools.values() for seen in pool.shown]
    conversations = Conversations(wishes, shown, recipe.seed, recipe.mixture, answers)
    batches = PackedBatches(
        Examples(conversations, model),
        Collator(
            {name: pool.features for name, pool in pools.items()},
            generators,
            model,
            recipe.row_tokens,
            route_weight=recipe.route_weight,
        ),
        batches=recipe.steps,
        rows=recipe.rows,
        width=recipe.row_tokens,
        chunk=recipe.chunk,
        lanes=recipe.workers,
        seed=recipe.seed,
    )
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,  # of batches
        use_cpu=device.type == "cpu",
        max_grad_norm=1.0,
        dataloader_num_workers=recipe.workers,
        dataloader_prefetch_factor=4 if recipe.workers else None,
        accelerator_config={"non_blocking": device.type == "cuda"},
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        logging_steps=200,
        logging_nan_inf_filter=False,  # looking for NaN waits for the GPU at every step
        seed=recipe.seed,
        disable_tqdm=True,
    )
    trainer = InstructionTrainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=_only,
        callbacks=[Watch(recipe, out / "model")],
        generators=generators,
        deviations={name: pool.features.std((0, 1)) for name, pool in pools.items()},
        recipe=recipe,
        log=log,
    )
    trainer.train()
    with replacing(out / "model", overwrite=True) as fresh:
        model.save_pretrained(fresh, dtype=torch.bfloat16, parts=False)
    steps = trainer.state.global_step
    log.write(final=True, step=steps, tokens=steps * recipe.rows * recipe.row_tokens)
    return {"steps": float(steps)}
