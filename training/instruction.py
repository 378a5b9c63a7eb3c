"""Teaches the LLM of the embedded default to read pictures, to answer with them, and to stay itself in plain talk.

One stage for what NExT-GPT (arXiv:2309.05519) does in three, because the LLM is small: input projector (pictures are
named and described), signal rows and output projector (caption-only alignment, MM-LLMs survey eq. 4: no picture is
generated or read on the output side), and a LoRA adapter. The LM loss covers text, routes and signal tokens; the
alignment is trained in the very contexts in which runs are emitted.
Differs from NExT-GPT: alignment distances are taken as the generator's cross-attention sees them (`attention_metric`).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from anygen.config import Config
from anygen.encoders.imagebind import ImageBindEncoder
from anygen.encoders.imagebind_inputs import normalised
from anygen.errors import ConfigError
from anygen.generators.stable_diffusion import EMBEDS, StableDiffusionGenerator
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
from anygen.signal_tokens import WORDS
from anygen.training.contrastive import augment
from anygen.training.loop import Pace, Progress, RunLog
from anygen.training.losses import AlignmentConfig
from anygen.training.magpie import self_answers
from anygen.training.packing import PackedBatches, PackedDecoder, block_mask, rows_of, segments_of
from anygen.training.pictures import PictureSource, load_icons
from anygen.training.requests import Conversations, PoolPicture, self_prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructionRecipe(Config):
    """Everything that decides the result."""

    icons: str
    """Directory of the built icon set."""
    encoder: str
    """Directory of the trained ImageBind."""
    generator: str
    """Directory of the trained image generator."""
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
    """Each picture's features get Gaussian noise of up to so much of their own size, so that the LLM reads a picture
    whose style it has not seen by what is near it."""
    answers: int = 1024
    """Plain questions that the LLM answers once, for conversations that go on after its answer."""
    prompt_tokens: int = 4
    """N, LLM tokens made of one picture."""
    signal_tokens: int = 4
    """S, as NExT-GPT's for images."""
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
class Picture:
    """The pool of encoded pictures."""

    features: Tensor
    """float[P, 1, C]."""
    shown: list[PoolPicture]


@torch.no_grad()
def encode_pool(source: PictureSource, encoder: ImageBindEncoder, count: int) -> Picture:
    """Composes `count` pictures, half of them with the contrastive stage's augmentation, and encodes them."""
    features, shown = [], []
    size = min(256, count)
    batches = source.batches(size)
    for number in range(max(1, count // size)):
        batch = next(batches)
        pixels = augment(batch.pixels) if number % 2 else batch.pixels
        features.append(encoder(inputs=normalised(pixels)).values.float().cpu())
        for icon, drawing in zip(batch.icons, batch.drawings, strict=True):
            shown.append(PoolPicture(len(shown), int(source.icons.concept[icon]), drawing))
    return Picture(torch.cat(features), shown)


class Examples:
    """Conversations as token ids; example `n` is the same whoever asks for it."""

    def __init__(self, conversations: Conversations, model: AnyGenModel) -> None:
        self.conversations = conversations
        self.prompts, self.words = model.prompts, model.signal_tokens.id(WORDS)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """`ids`, `labels`, `pictures` (pool rows, in reading order) and `captions` (of all runs)."""
        conversation = self.conversations[number]
        # Runs of earlier answers stand in the input as well, and are aligned like the last one's.
        captions = [
            part.media
            for message in conversation.messages
            if message.role == "assistant"
            for part in message.parts
            if isinstance(part, MediaPart)
        ]
        if conversation.words:
            prompt = self.prompts.prompt(conversation.messages)
            # Only the route is learned: the words that follow are the untouched LLM's own.
            ids, labels = [*prompt.ids, self.words], [-100] * len(prompt.ids) + [self.words]
            return {"ids": ids, "labels": labels, "pictures": prompt.media, "captions": captions}
        example = self.prompts.example(conversation.messages)
        return {"ids": example.ids, "labels": example.labels, "pictures": example.media, "captions": captions}


class Collator:
    """Lays packed examples out in rows, fetches their pictures' features, tokenises the captions of their runs."""

    def __init__(self, pool: Picture, generator: StableDiffusionGenerator, width: int) -> None:
        self.features, self.text, self.width = pool.features, generator.text, width

    def __call__(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """Rows of examples -> `input_ids`, `labels`, `segments`, `position_ids`, features and caption ids."""
        ids = [[example["ids"] for example in row] for row in rows]
        segments, places = segments_of(ids, self.width)
        labels = rows_of([[example["labels"] for example in row] for row in rows], self.width, IGNORED)
        batch: dict[str, Any] = {
            "input_ids": rows_of(ids, self.width, 0),
            "labels": labels,
            "segments": segments,
            "position_ids": places,
        }
        pictures = [part.media for row in rows for example in row for part in example["pictures"]]
        if pictures:
            batch["media"] = {"image": self.features[pictures]}
        captions = [caption for row in rows for example in row for caption in example["captions"]]
        batch["caption_ids"] = self.text.tokenize(captions) if captions else None
        return batch


def _only(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return rows[0]


class InstructionTrainer(Trainer):
    """`transformers.Trainer`, with the generator's text encoder giving each batch its alignment targets."""

    def __init__(self, *args: Any, text_encoder: Any, recipe: InstructionRecipe, log: RunLog, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.text_encoder, self.recipe, self.log_file = text_encoder, recipe, log
        graph = recipe.compile  # both pay off together
        self.decoder = PackedDecoder(self.model.llm, bf16=recipe.bf16, compile=recipe.compile, graph=graph)  # type: ignore[union-attr]
        self.pace = Pace()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own losses, over the states that the packed decoder makes."""
        ids, media = inputs["input_ids"], inputs.get("media")
        if media is not None and self.recipe.feature_noise:
            media = {"image": noisy(media["image"], self.recipe.feature_noise)}
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.recipe.bf16):
            embeds, conditions = model.embed(ids, media), None
            if inputs["caption_ids"] is not None:
                with torch.no_grad():
                    target = self.text_encoder(input_ids=inputs["caption_ids"]).last_hidden_state
                conditions = {"image": {EMBEDS: target}}
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


def noisy(features: Tensor, most: float) -> Tensor:
    """float[M, T, C] with Gaussian noise; a picture's level is uniform in [0, most] of its features' own size."""
    level = most * torch.rand(len(features), 1, 1, device=features.device)
    return features + level * features.square().mean((1, 2), keepdim=True).sqrt() * torch.randn_like(features)


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


def build(recipe: InstructionRecipe, llm: LLM, generator: StableDiffusionGenerator, feature_dim: int) -> AnyGenModel:
    """The model with fresh projectors, signal rows and adapter; its parts are named as anygen-mini ships them."""
    from peft import LoraConfig

    spec = {name: tuple(shape) for name, shape in generator.condition_spec.shapes.items()}
    width = recipe.projector_width
    config = AnyGenConfig(
        name="anygen-mini",
        llm=SourceConfig(repo="smollm2-135m-instruct"),
        modalities={
            "image": ModalityConfig(
                input=InputConfig(
                    encoder=SourcedPartConfig(
                        name="imagebind",
                        source=SourceConfig(path="encoders/imagebind"),
                        options={"modality": "image"},
                    ),
                    feature_dim=feature_dim,
                    slots=recipe.prompt_tokens,
                    projector=PartConfig(name="mlp", options={"tokens": recipe.prompt_tokens}),
                ),
                output=OutputConfig(
                    signal_tokens=recipe.signal_tokens,
                    condition=spec,
                    generator=SourcedPartConfig(name="stable_diffusion", source=SourceConfig(path="generators/image")),
                    projector=PartConfig(
                        name="text_fc",
                        options={
                            "width": width,
                            "encoder_layers": recipe.projector_layers,
                            "decoder_layers": recipe.projector_layers,
                            "heads": 4,
                            "ffn": 4 * width,
                        },
                    ),
                ),
            )
        },
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    llm.add_adapter(LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=targets))
    return AnyGenModel(config, llm).initialize(seed=recipe.seed)


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


def train(recipe: InstructionRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/model`: configuration, projectors, signal rows and adapter in bf16."""
    from anygen import hub

    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log = RunLog(out, "instruction")
    icons = load_icons(recipe.icons, recipe.checksum)
    generator = StableDiffusionGenerator.from_pretrained(recipe.generator, device=device)
    encoder = ImageBindEncoder.from_pretrained(recipe.encoder, modality="image").float().to(device)
    pool = encode_pool(PictureSource(icons, seed=recipe.seed + 3, device=device), encoder, recipe.pool)
    dtype, llm_directory = torch.bfloat16 if recipe.bf16 else torch.float32, hub.resolve(recipe.llm)
    if recipe.start is not None:
        model = AnyGenModel.from_pretrained(
            recipe.start, dtype=dtype, device=device, encoders=False, resolve=lambda _: llm_directory
        )
    else:
        llm = LLM.from_pretrained(llm_directory, dtype=dtype, device=device)
        model = build(recipe, llm, generator, encoder.feature_dim).to(device)
    model.alignment = AlignmentConfig(mse=1.0)
    model.alignment_weight = recipe.alignment_weight
    model.set_metric("image", {EMBEDS: attention_metric(generator.unet)})
    freeze_others(model, recipe.trains)
    questions = random.Random(recipe.seed).sample(self_prompts(), min(recipe.answers, len(self_prompts())))
    answers = self_answers(model.llm, questions)
    log.write(pictures=len(pool.shown), answers=len(answers))
    for part, (trainable, total) in model.trainable_parameters().items():
        log.write(part=part, trainable=trainable, parameters=total)
    conversations = Conversations(icons.concepts, pool.shown, recipe.seed, recipe.mixture, answers)
    batches = PackedBatches(
        Examples(conversations, model),
        Collator(pool, generator, recipe.row_tokens),
        batches=recipe.steps,
        rows=recipe.rows,
        width=recipe.row_tokens,
        chunk=recipe.chunk,
        lanes=recipe.workers,
        seed=recipe.seed,
    )
    text_encoder = generator.text.encoder.requires_grad_(False)
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
        seed=recipe.seed,
        disable_tqdm=True,
    )
    trainer = InstructionTrainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=_only,
        callbacks=[Watch(recipe, out / "model")],
        text_encoder=text_encoder,
        recipe=recipe,
        log=log,
    )
    trainer.train()
    model.save_pretrained(out / "model", dtype=torch.bfloat16, parts=False)
    steps = trainer.state.global_step
    log.write(final=True, step=steps, tokens=steps * recipe.rows * recipe.row_tokens)
    return {"steps": float(steps)}
