"""Teaches the LLM of the embedded default to read pictures, to answer with them, and to stay itself in plain talk.

One stage for what NExT-GPT (arXiv:2309.05519) does in three, because the LLM is small: input projector (pictures are
named and described), signal rows and output projector (caption-only alignment, MM-LLMs survey eq. 4: no picture is
generated or read on the output side), and a LoRA adapter. The LM loss covers text, routes and signal tokens; the
alignment is trained in the very contexts in which runs are emitted.
Differs from NExT-GPT: alignment distances are taken as the generator's cross-attention sees them (`attention_metric`).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from anygen.component import load_strict
from anygen.config import Config
from anygen.encoders.imagebind import ImageBindEncoder
from anygen.encoders.imagebind_inputs import normalised
from anygen.errors import ConfigError
from anygen.generators.base import Generator
from anygen.generators.latent import EMBEDS, LatentDiffusionGenerator
from anygen.llm import LLM
from anygen.losses import IGNORED
from anygen.messages import MediaPart
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
from anygen.projectors.input import MemoryProjector
from anygen.registry import lookup
from anygen.signal_tokens import WORDS
from anygen.training.contrastive import augment
from anygen.training.icons import IconSet
from anygen.training.loop import Pace, Progress, RunLog
from anygen.training.losses import AlignmentConfig
from anygen.training.magpie import self_answers
from anygen.training.naming import meet_names, name_embeddings
from anygen.training.packing import PackedBatches, PackedDecoder, block_mask, rows_of, segments_of
from anygen.training.pictures import PictureSource, load_icons
from anygen.training.requests import Conversations, Seen, self_prompts
from anygen.training.sounds import load_sounds
from anygen.training.wishes import ClipWishes, ImageWishes, SoundWishes, Wishes

GENERATORS = {"image": "stable_diffusion", "video": "zeroscope", "audio": "audioldm2"}
"""Output modality -> the generator of anygen-mini, by its registered name."""


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
    """Directory of the built sound bank; needed where sounds are made."""
    llm: str = "smollm2-135m-instruct"
    """A name that the hub resolves, or a directory."""
    start: str | None = None
    """Directory of a model that this recipe trained before, to go on from; its own sizes then hold."""
    checksum: str | None = None
    """The icon set's checksum; None accepts any."""
    trains: tuple[str, ...] = ("llm", "signal_tokens", "input_projectors", "output_projectors")
    """The parts that train (of the LLM, its adapter); all else stands still."""
    mixture: dict[str, float] | None = None
    """Kind of conversation -> weight; None takes `requests.MIXTURE`."""
    pool: int = 60_000
    """Pictures that are encoded once and asked about."""
    feature_noise: float = 0.5
    """Each picture's features get Gaussian noise of up to so much of the pool's own deviation, so that the LLM reads a
    picture whose style it has not seen by what is near it. Source: CapDec (arXiv:2211.00575), for texts."""
    input_width: int = 768
    """Of the input projector's hidden layer."""
    name_steps: int = 2000
    """Steps in which the input projector first meets the LLM's own embeddings of the names of what is shown."""
    renew: tuple[str, ...] = ()
    """Parts that are not taken from `start`, but made and trained anew."""
    answers: int = 1024
    """Plain questions that the LLM answers once, for conversations that go on after its answer."""
    prompt_tokens: int = 4
    """N, LLM tokens made of one picture."""
    signal_tokens: dict[str, int] = field(default_factory=lambda: {"image": 4})
    """Output modality -> S, 4 where none is given, as NExT-GPT's for images."""
    projector_width: int = 256
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
    """Of projectors and signal rows."""
    lora_learning_rate: float = 5e-4
    alignment_weight: float = 3.0
    compile: bool = False
    """Compiles each of the LLM's layers and captures the decoder as a CUDA graph; the first step takes a minute."""
    bf16: bool = True
    """Mixed precision, with the LLM's weights in bfloat16. A CPU needs AMX for it to pay."""
    workers: int = 0
    """Processes that make examples."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Pool:
    """Encoded media of one modality."""

    features: Tensor
    """float[P, 1, C]."""
    shown: list[Seen]
    concepts: Tensor
    """long[P], the numbers of the concepts shown."""


@torch.no_grad()
def text_features(directory: str, texts: Sequence[str]) -> Tensor:
    """float32[K, C], what the trained ImageBind makes of texts."""
    encoder = ImageBindEncoder.from_pretrained(directory, modality="text").float()
    rows = [encoder(**encoder.preprocess(texts[row : row + 256])).values[:, 0] for row in range(0, len(texts), 256)]
    return torch.cat(rows)


@torch.no_grad()
def encode_pictures(source: PictureSource, encoder: ImageBindEncoder, count: int) -> Pool:
    """Composes `count` pictures, half of them with the contrastive stage's augmentation, and encodes them."""
    features, shown, icons = [], [], list[int]()
    size = min(256, count)
    batches = source.batches(size)
    for number in range(max(1, count // size)):
        batch = next(batches)
        pixels = augment(batch.pixels) if number % 2 else batch.pixels
        features.append(encoder(inputs=normalised(pixels)).values.float().cpu())
        shown += [Seen("image", len(shown) + row, drawing) for row, drawing in enumerate(batch.drawings)]
        icons += list(batch.icons)
    return Pool(torch.cat(features), shown, source.icons.concept[icons].long().cpu())


class Examples:
    """Conversations as token ids; example `n` is the same whoever asks for it."""

    def __init__(self, conversations: Conversations, model: AnyGenModel) -> None:
        self.conversations = conversations
        self.prompts, self.words = model.prompts, model.signal_tokens.id(WORDS)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """`ids`, `labels`, `media` (parts with pool rows) and `captions` (parts with captions), in reading order."""
        conversation = self.conversations[number]
        # Runs of earlier answers stand in the input as well, and are aligned like the last one's.
        captions = [
            part
            for message in conversation.messages
            if message.role == "assistant"
            for part in message.parts
            if isinstance(part, MediaPart)
        ]
        if conversation.words:
            prompt = self.prompts.prompt(conversation.messages)
            # Only the route is learned: the words that follow are the untouched LLM's own.
            ids, labels = [*prompt.ids, self.words], [-100] * len(prompt.ids) + [self.words]
            return {"ids": ids, "labels": labels, "media": prompt.media, "captions": captions}
        example = self.prompts.example(conversation.messages)
        return {"ids": example.ids, "labels": example.labels, "media": example.media, "captions": captions}


class Collator:
    """Lays packed examples out in rows, fetches their media's features, tokenises the captions of their runs.

    Args:
        features: input modality -> float[P, 1, C], its pool.
        generators: output modality -> generator, with its text encoder.
        width: W, tokens of a row.
    """

    def __init__(self, features: Mapping[str, Tensor], generators: Mapping[str, Generator], width: int) -> None:
        self.features, self.width = features, width
        # Taken here, since text encoders are loaded when first asked for, and a forked worker cannot reach the GPU.
        self.texts = {modality: cast(Any, generator).text for modality, generator in generators.items()}

    def __call__(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """Rows of examples -> `input_ids`, `labels`, `segments`, `position_ids`; `media` and `captions` by modality."""
        ids = [[example["ids"] for example in row] for row in rows]
        segments, places = segments_of(ids, self.width)
        labels = rows_of([[example["labels"] for example in row] for row in rows], self.width, IGNORED)
        media: dict[str, list[int]] = {}
        captions: dict[str, list[str]] = {}
        for example in (example for row in rows for example in row):
            for part in example["media"]:
                media.setdefault(part.modality, []).append(part.media)
            for part in example["captions"]:
                captions.setdefault(part.modality, []).append(part.media)
        return {
            "input_ids": rows_of(ids, self.width, 0),
            "labels": labels,
            "segments": segments,
            "position_ids": places,
            "media": {modality: self.features[modality][numbers] for modality, numbers in media.items()},
            "captions": {name: caption_tokens(self.texts[name], said) for name, said in captions.items()},
        }


def caption_tokens(text: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    """B captions -> the token ids that a generator's text encoder reads, by name, on the CPU."""
    tokens = text.tokenize(captions)
    return {"ids": tokens} if isinstance(tokens, Tensor) else {"ids": tokens.ids, "mask": tokens.mask}


@torch.no_grad()
def caption_targets(generator: Any, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the text encoder makes of `caption_tokens`: the tensors of the generator's condition."""
    if isinstance(generator, LatentDiffusionGenerator):
        return {EMBEDS: generator.text.encoder(input_ids=tokens["ids"]).last_hidden_state}
    from anygen.generators.audioldm2 import SoundTokens

    return generator.text(SoundTokens(tokens["ids"], tokens["mask"]))


def _only(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return rows[0]


class InstructionTrainer(Trainer):
    """`transformers.Trainer`, with the generator's text encoder giving each batch its alignment targets."""

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
            embeds = model.embed(ids, media)
            conditions = {
                name: caption_targets(self.generators[name], tokens) for name, tokens in inputs["captions"].items()
            }
        hidden = self.decoder.run(embeds, block_mask(inputs["segments"]), inputs["position_ids"])
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.recipe.bf16):
            output = model.losses(ids, hidden, inputs["labels"], conditions)
        if self.state.global_step % 50 == 0:
            align = output.alignment_loss
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
        """Two learning rates: the adapter's, and that of everything trained from scratch."""
        if self.optimizer is None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]  # type: ignore[union-attr]
            groups = [
                {"params": [p for n, p in named if ".lora_" in n], "lr": self.recipe.lora_learning_rate},
                {"params": [p for n, p in named if ".lora_" not in n], "lr": self.recipe.learning_rate},
            ]
            fused = self.args.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of `Progress`, by steps or by the clock."""
        if self.lr_scheduler is None:
            progress = Progress(self.recipe.steps, self.recipe.minutes)

            def factor(step: int) -> float:
                progress.step = step
                return progress.learning_rate(1.0, warmup=100)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler


class Watch(TrainerCallback):
    """Writes the model now and then, and ends the run when its minutes are over."""

    def __init__(self, recipe: InstructionRecipe, directory: Path) -> None:
        self.progress, self.every, self.directory = Progress(recipe.steps, recipe.minutes), recipe.save_steps, directory

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Asks the trainer to stop."""
        self.progress.step = state.global_step
        if state.global_step % self.every == 0:
            kwargs["model"].save_pretrained(self.directory, dtype=torch.bfloat16, parts=False)
        control.should_training_stop = control.should_training_stop or self.progress.done
        return control


def noisy(features: Tensor, most: Tensor) -> Tensor:
    """float[M, T, C] with Gaussian noise; a medium's level is uniform in [0, most], `most` float[C]."""
    level = torch.rand(len(features), 1, 1, device=features.device)
    return features + level * most * torch.randn_like(features)


def attention_metric(unet: Any, floor: float = 0.1) -> Tensor:
    """float[C, C]: measures differences of conditions as the UNet's cross-attention keys and values see them.

    The keys and values are linear in the condition, so the squared length of `(u - v) @ metric` is the mean of their
    squared differences over all cross-attention layers, plus `floor` of the plain distance; scaled to mean 1.
    """
    maps = [
        layer.weight.detach().float()
        for name, layer in unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    ]
    gram = sum(weight.T @ weight / weight.shape[0] for weight in maps)
    assert isinstance(gram, Tensor)
    gram = gram / gram.diagonal().mean() * (1 - floor) + floor * torch.eye(len(gram), device=gram.device)
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()


def settings(
    recipe: InstructionRecipe, generators: Mapping[str, Generator], feature_dim: int, memories: int
) -> AnyGenConfig:
    """The parts of anygen-mini, named as it ships them.

    Args:
        recipe: their sizes.
        generators: output modality -> generator.
        feature_dim: the encoder's.
        memories: names that the input projector remembers.
    """
    inputs = {
        "image": InputConfig(
            encoder=SourcedPartConfig(
                name="imagebind",
                source=SourceConfig(path="encoders/imagebind"),
                options={"modality": "image"},
            ),
            feature_dim=feature_dim,
            slots=recipe.prompt_tokens,
            projector=PartConfig(
                name="memory",
                options={"memories": memories, "tokens": recipe.prompt_tokens, "width": recipe.input_width},
            ),
        )
    }
    width, layers = recipe.projector_width, recipe.projector_layers
    options = {"width": width, "encoder_layers": layers, "decoder_layers": layers, "heads": 4, "ffn": 4 * width}
    outputs = {
        modality: OutputConfig(
            signal_tokens=recipe.signal_tokens.get(modality, 4),
            condition={name: tuple(shape) for name, shape in generator.condition_spec.shapes.items()},
            generator=SourcedPartConfig(name=GENERATORS[modality], source=SourceConfig(path=f"generators/{modality}")),
            projector=PartConfig(name="text_fc", options=options),
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
    """The model with the parts of `recipe.renew` made anew, as `config` has them; the others are kept.

    Raises:
        ConfigError: it is not projectors that are to be made anew, or what is kept has other sizes in `config`.
    """
    if unknown := sorted(set(recipe.renew) - {"input_projectors", "output_projectors"}):
        raise ConfigError(f"only input_projectors and output_projectors can be made anew, not {', '.join(unknown)}")
    fresh = AnyGenModel(config, model.llm)
    for name in ("signal_tokens", "input_projectors", "output_projectors"):
        if name not in recipe.renew:
            load_strict(getattr(fresh, name), getattr(model, name).state_dict(), f"{recipe.start}: {name}")
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


def load_generators(directories: Mapping[str, str], device: torch.device) -> dict[str, Generator]:
    """Output modality -> generator, all of it frozen.

    Raises:
        ConfigError: a modality that anygen-mini does not make; lists those that it does.
    """
    if unknown := sorted(set(directories) - set(GENERATORS)):
        raise ConfigError(f"anygen-mini does not make {', '.join(unknown)}; it makes {', '.join(GENERATORS)}")
    return {
        modality: lookup("generator", GENERATORS[modality]).from_pretrained(directory, device=device)
        for modality, directory in directories.items()
    }


def wishes_of(recipe: InstructionRecipe, icons: IconSet) -> list[Wishes]:
    """What can be asked for, one for each output modality.

    Raises:
        ConfigError: sounds are made, but the recipe names no sound bank.
    """
    if "audio" in recipe.generators and recipe.sounds is None:
        raise ConfigError("the recipe makes audio, so it must name the sound bank: sounds: data/sounds")
    made: dict[str, Callable[[], Wishes]] = {
        "image": lambda: ImageWishes(icons.concepts),
        "video": lambda: ClipWishes(icons.concepts),
        "audio": lambda: SoundWishes(load_sounds(str(recipe.sounds), None), icons.concepts),
    }
    return [made[modality]() for modality in recipe.generators]


def train(recipe: InstructionRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/model`: configuration, projectors, signal rows and adapter in bf16."""
    from anygen import hub

    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log = RunLog(out, "instruction")
    icons = load_icons(recipe.icons, recipe.checksum)
    generators = load_generators(recipe.generators, device)
    encoder = ImageBindEncoder.from_pretrained(recipe.encoder, modality="image").float().to(device)
    pool = encode_pictures(PictureSource(icons, seed=recipe.seed + 3, device=device), encoder, recipe.pool)
    wishes = wishes_of(recipe, icons)
    dtype, llm_directory = torch.bfloat16 if recipe.bf16 else torch.float32, hub.resolve(recipe.llm)
    config = settings(recipe, generators, encoder.feature_dim, len(icons.concepts))
    if recipe.start is not None:
        model = AnyGenModel.from_pretrained(
            recipe.start, dtype=dtype, device=device, encoders=False, resolve=lambda _: llm_directory
        )
        if recipe.renew:
            model = renewed(recipe, config, model).to(device)
    else:
        model = build(recipe, config, LLM.from_pretrained(llm_directory, dtype=dtype, device=device)).to(device)
    deviation = pool.features.std((0, 1))
    if recipe.start is None or "input_projectors" in recipe.renew:
        projector = cast(MemoryProjector, model.input_projectors["image"])
        labels = [concept.label for concept in icons.concepts]
        projector.remember(text_features(recipe.encoder, labels).to(device), pool.features[:, 0].to(device))
        names = name_embeddings(model.llm, labels, recipe.prompt_tokens)
        noise = (recipe.feature_noise * deviation).to(device)
        met = meet_names(projector, pool.features, pool.concepts, names, noise=noise, steps=recipe.name_steps)
        log.write(names=len(labels), **met)
    model.alignment = AlignmentConfig(mse=1.0)
    model.alignment_weight = recipe.alignment_weight
    for modality, generator in generators.items():
        if isinstance(generator, LatentDiffusionGenerator):
            model.set_metric(modality, {EMBEDS: attention_metric(generator.unet)})
    freeze_others(model, recipe.trains)
    questions = random.Random(recipe.seed).sample(self_prompts(), min(recipe.answers, len(self_prompts())))
    answers = self_answers(model.llm, questions)
    log.write(pictures=len(pool.shown), answers=len(answers))
    for part, (trainable, total) in model.trainable_parameters().items():
        log.write(part=part, trainable=trainable, parameters=total)
    conversations = Conversations(wishes, pool.shown, recipe.seed, recipe.mixture, answers)
    batches = PackedBatches(
        Examples(conversations, model),
        Collator({"image": pool.features}, generators, recipe.row_tokens),
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
        deviations={"image": deviation},
        recipe=recipe,
        log=log,
    )
    trainer.train()
    model.save_pretrained(out / "model", dtype=torch.bfloat16, parts=False)
    steps = trainer.state.global_step
    log.write(final=True, step=steps, tokens=steps * recipe.rows * recipe.row_tokens)
    return {"steps": float(steps)}
