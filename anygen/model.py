"""The model that joins the parts: frozen encoders and LLM, trained projectors and signal rows.

```
media ─ encoder ─ input projector ─► slots ─┐
text ─ embedding ───────────────────────────┼─► LLM ─ head ────────────► text and signal tokens
signal ids ─ signal rows ───────────────────┘    └─ states at the runs ─ output projector ─► conditions
```

Modalities are keys: nothing here knows one from another. Generators are not part of it; the pipeline has them.
Shapes: B batch, T tokens, D LLM width, M media or runs of one modality in a batch, N slots of one media value,
S signal tokens of a run.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from anygen.component import SHARD, load_strict, read_safetensors
from anygen.encoders.base import Encoder
from anygen.errors import ConfigError, ModalityError
from anygen.features import Condition, Features
from anygen.llm import LLM
from anygen.losses import IGNORED, AlignmentConfig, condition_loss, token_loss
from anygen.messages import MediaPart
from anygen.model_config import AnyGenConfig, SourceConfig
from anygen.model_parts import input_projector, load_encoder, output_projector, resolve_by_hub
from anygen.plugins import check_parts, with_plugins
from anygen.prompts import PromptBuilder, slot_ids
from anygen.signal_tokens import SignalTokens, SignalTokensConfig

if TYPE_CHECKING:
    from anygen.static_rows import StaticMemories

CONFIG, PROJECTORS, SIGNAL_TOKENS, ADAPTER = "anygen.json", "projectors", "signal_tokens", "adapter"
"""Names inside a model's directory."""
VOCABULARY, TOKENIZER = "vocabulary", "tokenizer"
"""Names that only a model has whose training changed the LLM's own rows, such as a converted NExT-GPT."""

MediaInput = Mapping[str, Tensor] | Features | Tensor
"""What `forward` takes for M media: an encoder's tensors, or its features (as a tensor if none is padded)."""


@dataclass
class AnyGenOutput(ModelOutput):
    """What `AnyGenModel.forward` returns."""

    loss: Tensor | None = None
    """float32[], `lm_loss + alignment_weight * alignment_loss` of those that were asked for."""
    lm_loss: Tensor | None = None
    """float32[], over the labels."""
    alignment_loss: Tensor | None = None
    """float32[], over the conditions, the mean of the modalities'."""
    hidden_states: Tensor | None = None
    """float[B, T, D], what the head reads."""
    conditions: dict[str, dict[str, Tensor]] | None = None
    """modality -> name -> float[M, ...], of the runs in reading order."""


class AnyGenModel(nn.Module):
    """Encoders, projectors, signal rows and an LLM.

    Only the projectors, the signal rows and the adapter are trainable; `state_dict` holds what is trainable, and
    with it whatever is not the LLM's or an encoder's, so that a trainer's checkpoints stay small.

    Args:
        config: which parts.
        llm: the language model, with its adapter if there is one.
        encoders: input modality -> its encoder; may lack some, whose features then have to be given.
    """

    def __init__(self, config: AnyGenConfig, llm: LLM, encoders: Mapping[str, Encoder] | None = None) -> None:
        super().__init__()
        self.settings = config  # not `config`: transformers' Trainer writes into a model's `config`
        self.llm = llm
        self.signal_tokens = SignalTokens(
            SignalTokensConfig(counts={m: c.signal_tokens for m, c in config.outputs.items()}),
            vocab_size=llm.vocab_size,
            width=llm.width,
            tied=llm.tied,
        )
        self.signal_tokens.check_vocabulary(llm.tokenizer.get_vocab())
        self.encoders = nn.ModuleDict(dict(encoders or {}))
        self.encoders.requires_grad_(False)
        self.input_projectors = nn.ModuleDict({m: input_projector(c, llm.width) for m, c in config.inputs.items()})
        own = {m: c for m, c in config.outputs.items() if c.shares is None}
        self.output_projectors = nn.ModuleDict({m: output_projector(c, llm.width) for m, c in own.items()})
        self.prompts = self.build_prompts()
        self.alignment = AlignmentConfig()
        self.alignment_weight = 1.0
        self.metrics: dict[str, dict[str, Tensor]] = {}
        self.origin: Path | None = None
        """The directory that this model was loaded from."""
        self.memories: StaticMemories | None = None
        """Where decoding goes the fast way (`anygen.speed`); None is transformers' growing cache."""
        self.register_state_dict_post_hook(_leave_out_frozen)

    def build_prompts(self) -> PromptBuilder:
        """For what is read and made now; made anew when a modality is added."""
        config = self.settings
        around = {m: (c.before, c.after) for m, c in config.inputs.items()}
        return PromptBuilder(self.llm.tokenizer, self.signal_tokens, config.slots, around=around, routes=config.routes)

    def initialize(self, *, seed: int) -> Self:
        """Starts the signal rows from the LLM's own rows; for a model that was not loaded."""
        embedding, head = (cast(Tensor, part.weight) for part in (self.llm.embedding, self.llm.head))
        generator = torch.Generator().manual_seed(seed)
        self.signal_tokens.initialize(embedding, head, generator=generator)
        return self

    @property
    def device(self) -> torch.device:
        """Where the signal rows live."""
        return self.signal_tokens.rows.device

    def set_metric(self, modality: str, tensors: Mapping[str, Tensor]) -> None:
        """Measures alignment of that modality's condition tensors through matrices float[C, K] (see `losses`)."""
        self.metrics[modality] = {name: matrix.detach().to(self.device) for name, matrix in tensors.items()}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        media: Mapping[str, MediaInput] | None = None,
        conditions: Mapping[str, Mapping[str, Tensor]] | None = None,
        position_ids: Tensor | None = None,
        words: Mapping[str, Tensor] | None = None,
    ) -> AnyGenOutput:
        """One pass over whole conversations.

        Args:
            input_ids: long[B, T]; slots have the negative ids of `PromptBuilder.slot_id`, new tokens ids from V on.
            attention_mask: bool or long[B, T], false where a row is padded, on either side.
            labels: long[B, T], as `input_ids`, -100 where nothing is learned.
            media: modality -> its M media, in the reading order of their slots.
            conditions: modality -> name -> float[M, ...], the targets of its M runs, in reading order.
            position_ids: long[B, T], by default the number of tokens before each.
            words: `input_ids`, `attention_mask` and `labels` of answers that the LLM gives without its adapter, in the
                base view (`PromptBuilder.base_example`), in a pass of their own. They count beside `labels`.

        Raises:
            ConfigError: the slots and the media, or the runs and the conditions, do not match in number; or there are
                `words` without `labels`.
            ModalityError: features of a modality without encoder are missing.
        """
        embeds = self.embed(input_ids, media)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = positions(attention_mask)
        hidden, _ = self.llm.hidden_states(embeds, attention_mask=attention_mask, position_ids=position_ids)
        return self.losses(input_ids, hidden, labels, conditions, words)

    def losses(
        self,
        input_ids: Tensor,
        hidden: Tensor,
        labels: Tensor | None = None,
        conditions: Mapping[str, Mapping[str, Tensor]] | None = None,
        words: Mapping[str, Tensor] | None = None,
    ) -> AnyGenOutput:
        """What `forward` makes of the decoder's states, for training loops that run the decoder themselves.

        Args:
            input_ids: long[B, T], for the places of the runs.
            hidden: float[B, T, D], the final states.
            labels: as for `forward`.
            conditions: as for `forward`.
            words: as for `forward`.

        Raises:
            ConfigError: the runs and the conditions do not match in number, or there are `words` without `labels`.
        """
        output = AnyGenOutput(hidden_states=hidden)
        if labels is not None:
            output.lm_loss = output.loss = self.lm_loss(hidden, labels, words)
        elif words is not None:
            raise ConfigError("words are learned beside labels: give both")
        if conditions:
            projected, losses = {}, []
            for modality, target in conditions.items():
                condition = self.run_conditions(modality, input_ids, hidden)
                projected[modality] = condition.tensors
                losses.append(self.alignment_loss(modality, condition, target))
            output.conditions = projected
            output.alignment_loss = alignment = torch.stack(losses).mean()
            weighted = self.alignment_weight * alignment
            output.loss = weighted if output.loss is None else output.loss + weighted
        return output

    def embed(self, input_ids: Tensor, media: Mapping[str, MediaInput] | None = None) -> Tensor:
        """long[B, T] -> float[B, T, D]: words, signal rows, and media in their slots."""
        embeds = self.signal_tokens.embed(input_ids, self.llm.embedding)
        numbers = slot_ids(self.settings.slots)
        for modality, values in (media or {}).items():
            if modality not in numbers:
                raise ModalityError(f"the model cannot read {modality}; it reads {', '.join(['text', *numbers])}")
            embeds = fill_slots(embeds, input_ids == numbers[modality], self.media_tokens(modality, values), modality)
        if not media and bool((input_ids < 0).any()):
            raise ConfigError("the prompt has slots for media, but no media were given")
        return embeds

    def media_tokens(self, modality: str, media: MediaInput) -> Tensor:
        """M media of one modality -> float[sum of their tokens, D], padding left out."""
        projected = self.project_input(modality, self.encode(modality, media))
        return projected.values[projected.mask]

    def project_input(self, modality: str, features: Features) -> Features:
        """Features of one modality -> its tokens, values float[M, N, D]; by another's projector where it shares it."""
        projected = self.input_projectors[modality](features)
        if (owner := self.settings.inputs[modality].shares) is not None:
            projected = self.input_projectors[owner](projected)
        return projected

    def encode(self, modality: str, media: MediaInput) -> Features:
        """An encoder's tensors -> its features; features pass as they are. Only an encoder that trains gets gradients.

        Raises:
            ModalityError: tensors were given, but that encoder is not loaded.
        """
        if isinstance(media, Features):
            return media
        if isinstance(media, Tensor):
            return Features(media, torch.ones(media.shape[:2], dtype=torch.bool, device=media.device))
        if modality not in self.encoders:
            loaded = ", ".join(self.encoders) or "none"
            raise ModalityError(f"the encoder of {modality} is not loaded (loaded: {loaded}); give its features")
        encoder = self.encoders[modality]
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
        with torch.set_grad_enabled(trains):
            return encoder(**cast(Mapping[str, Tensor], media))

    def encode_parts(self, parts: Sequence[MediaPart]) -> dict[str, Features]:
        """Message parts, such as those of several prompts in reading order -> what `forward` takes as `media`.

        Raises:
            ModalityError: the encoder of a part's modality is not loaded.
        """
        encoded = {}
        for modality in dict.fromkeys(part.modality for part in parts):
            values = [part.media for part in parts if part.modality == modality]
            if modality not in self.encoders:
                readable = ", ".join(["text", *self.encoders])
                raise ModalityError(f"the model cannot read {modality}; it reads {readable}")
            tensors = cast(Encoder, self.encoders[modality]).preprocess(values)
            encoded[modality] = self.encode(modality, {name: t.to(self.device) for name, t in tensors.items()})
        return encoded

    def lm_loss(self, hidden: Tensor, labels: Tensor, words: Mapping[str, Tensor] | None = None) -> Tensor:
        """float[B, T, D], long[B, T], as for `forward` -> float32[], the mean over all learned tokens.

        Logits are computed only where something is learned.
        """
        wanted = labels[:, 1:] != IGNORED
        loss = token_loss(self.logits(hidden[:, :-1][wanted]), labels[:, 1:][wanted])
        if words is None:
            return loss
        logits, targets = self.word_logits(words)
        share = len(targets) / (wanted.sum() + len(targets)).clamp(min=1)
        return (1 - share) * loss + share * token_loss(logits, targets)

    def word_logits(self, words: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`words` as for `forward` -> float[M, V], long[M]: the LLM's logits without its adapter, and what was said."""
        mask, said = words["attention_mask"], words["labels"][:, 1:] != IGNORED
        with self.llm.adapter_off():
            embeds = self.llm.embedding(words["input_ids"])
            hidden, _ = self.llm.hidden_states(embeds, attention_mask=mask, position_ids=positions(mask))
        return self.llm.logits(hidden[:, :-1][said]), words["labels"][:, 1:][said]

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., D] -> float32[..., V + R]: the LLM's own logits, then the new tokens'."""
        new = self.llm.scale_logits(self.signal_tokens.logits(hidden))
        return torch.cat([self.llm.logits(hidden).float(), new], dim=-1)

    def run_conditions(self, modality: str, input_ids: Tensor, hidden: Tensor) -> Condition:
        """The conditions of the runs of `modality` that stand in `input_ids`, in reading order."""
        starts = self.signal_tokens.run_starts(input_ids, modality)
        columns = starts[:, 1:] + torch.arange(len(self.signal_tokens.runs[modality]), device=starts.device)
        return self.project(modality, hidden[starts[:, :1], columns])

    def project(self, modality: str, states: Tensor) -> Condition:
        """float[M, S, D], hidden states at the signal positions -> M conditions; by another's projector if shared."""
        projector = self.output_projectors[self.projects(modality)]
        embeddings = self.run_embeddings(modality).expand(len(states), -1, -1)
        if not torch.is_autocast_enabled(states.device.type):
            states = states.to(next(projector.parameters()).dtype)
        return projector(states, embeddings.to(states.dtype))

    def projects(self, modality: str) -> str:
        """The output modality whose projector makes the conditions of this one: itself, unless it shares one."""
        return self.settings.outputs[modality].shares or modality

    def run_embeddings(self, modality: str) -> Tensor:
        """float32[1, S, D], the input embeddings of a run."""
        run = self.signal_tokens.runs[modality]
        rows = torch.arange(run.start, run.stop, device=self.device) - self.signal_tokens.vocab_size
        return self.signal_tokens.row_embeddings(rows, self.llm.embedding).unsqueeze(0)

    def alignment_loss(self, modality: str, condition: Condition, target: Mapping[str, Tensor]) -> Tensor:
        """The distance of M projected conditions from their targets, as `alignment` and `metrics` measure it.

        Raises:
            ConfigError: the input has another number of runs than there are targets.
        """
        if any(len(value) != len(condition) for value in target.values()):
            counts = sorted({len(value) for value in target.values()})
            raise ConfigError(f"the input has {len(condition)} runs of {modality}, the targets are for {counts}")
        return condition_loss(condition.tensors, target, self.alignment, metrics=self.metrics.get(modality))

    def trainable_parameters(self) -> dict[str, tuple[int, int]]:
        """Part -> (trainable, all) parameters, for the table that a stage prints."""
        counts = {}
        for name, child in self.named_children():
            parameters = list(child.parameters())
            trainable = sum(p.numel() for p in parameters if p.requires_grad)
            counts[name] = (trainable, sum(p.numel() for p in parameters))
        return counts

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype | None = None, parts: bool = True) -> None:
        """Writes configuration, projectors, signal rows and adapter; strict `from_pretrained` reads them.

        Args:
            directory: made if it is not there.
            dtype: the type to store projectors and adapter in; their own by default. Signal rows stay float32.
            parts: whether to write the encoders and the LLM too, where the configuration has them inside. What was
                loaded from a directory is copied from there. Generators are the pipeline's to write.
        """
        from huggingface_hub import save_torch_state_dict
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with_plugins(self.settings).save(directory / CONFIG)
        state = {
            key: value.to(dtype) if dtype is not None and value.is_floating_point() else value
            for key, value in self._projector_state().items()
        }
        for stale in directory.glob(f"{PROJECTORS}*.safetensors*"):
            stale.unlink()
        save_torch_state_dict(
            state, directory, filename_pattern=PROJECTORS + "{suffix}.safetensors", max_shard_size=SHARD
        )
        rows = {key: value.detach().cpu() for key, value in self.signal_tokens.state_dict().items()}
        save_file(rows, directory / f"{SIGNAL_TOKENS}.safetensors", metadata={"format": "pt"})
        if self.llm.has_adapter:
            base = self.settings.llm.repo or self.settings.llm.path
            self.llm.save_adapter(directory / ADAPTER, base_name=base, dtype=dtype)
        elif (directory / ADAPTER).exists():
            shutil.rmtree(directory / ADAPTER)
        if self.origin is not None and self.origin.resolve() != directory.resolve():
            for kept in (*self.origin.glob(f"{VOCABULARY}*.safetensors*"), *self.origin.glob(f"{TOKENIZER}/*")):
                (target := directory / kept.relative_to(self.origin)).parent.mkdir(exist_ok=True)
                shutil.copy2(kept, target)
        if parts:
            self._save_parts(directory)

    def _save_parts(self, directory: Path) -> None:
        paths: dict[str | None, str | None] = {self.settings.llm.path: None}
        for modality, config in self.settings.inputs.items():
            paths.setdefault(config.encoder.source.path, modality)
        for path, modality in paths.items():
            if path is None:
                continue
            if self.origin is not None and (self.origin / path).is_dir():
                if (self.origin / path).resolve() != (directory / path).resolve():  # frozen: a copy is exact
                    shutil.copytree(self.origin / path, directory / path, dirs_exist_ok=True)
            elif modality is None:
                self.llm.save_base(directory / path)
            elif modality in self.encoders:
                cast(Encoder, self.encoders[modality]).save_pretrained(directory / path)

    def _projector_state(self) -> dict[str, Tensor]:
        inputs = {f"input.{k}": v for k, v in self.input_projectors.state_dict().items()}
        outputs = {f"output.{k}": v for k, v in self.output_projectors.state_dict().items()}
        return inputs | outputs

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        encoders: bool | Sequence[str] = True,
        resolve: Callable[[str], Path] | None = None,
        quantization: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
    ) -> Self:
        """Loads a directory that `save_pretrained` wrote, in evaluation mode.

        Args:
            directory: with `anygen.json`.
            dtype: the LLM's type, the one it was saved in by default; projectors and signal rows are float32.
            device: where everything goes.
            encoders: whether to load them, or of which modalities.
            resolve: "repo" or "repo@revision" -> directory; the hub by default.
            quantization, device_map: of the LLM, as `LLM.from_pretrained` has them.

        Raises:
            ConfigError: the configuration does not fit.
            CheckpointError: a file or key is missing, unexpected or mis-shaped; the keys are listed.
            HubError: a part cannot be found.
            UnknownComponentError: a part is from a package that is not installed; says which.
        """
        directory = Path(directory)
        config = AnyGenConfig.load(directory / CONFIG)
        check_parts(config, generators=False)

        def find(source: SourceConfig) -> Path:
            if source.path is not None:
                return directory / source.path
            return (resolve or resolve_by_hub)(
                f"{source.repo}@{source.revision}" if source.revision else str(source.repo)
            )

        words = directory / TOKENIZER if (directory / TOKENIZER).is_dir() else None
        llm = LLM.from_pretrained(
            find(config.llm),
            dtype=dtype,
            device=device,
            tokenizer=words,
            quantization=quantization,
            device_map=device_map,
        )
        if any(directory.glob(f"{VOCABULARY}*.safetensors")):
            rows = read_safetensors(directory, VOCABULARY)
            llm.replace_vocabulary(rows["embed_tokens"], rows.get("lm_head"))
        wanted = list(config.inputs) if encoders is True else list(encoders or [])
        loaded = {m: load_encoder(config.inputs[m].encoder, find) for m in wanted}
        model = cls(config, llm, loaded)
        projectors = read_safetensors(directory, PROJECTORS)
        shell = nn.ModuleDict({"input": model.input_projectors, "output": model.output_projectors})
        load_strict(shell, projectors, f"{directory / PROJECTORS}.safetensors")
        rows = read_safetensors(directory, SIGNAL_TOKENS)
        load_strict(model.signal_tokens, rows, f"{directory / SIGNAL_TOKENS}.safetensors")
        if (directory / ADAPTER).exists():
            llm.load_adapter(directory / ADAPTER)
        model.origin = directory
        for child in model.children():
            if child is not llm or not llm.placed:
                child.to(device)
        return model.eval()


def fill_slots(embeds: Tensor, slots: Tensor, tokens: Tensor, modality: str) -> Tensor:
    """Replaces the placeholder embeddings, in reading order, by `tokens`.

    Args:
        embeds: float[B, T, D], the embedded prompt.
        slots: bool[B, T], true where a placeholder stands.
        tokens: float[M, D], one row a slot, M = slots.sum().
        modality: named in the error.

    Raises:
        ConfigError: the numbers differ; masked_scatter would drop rows that are too many without a word.
    """
    if (wanted := int(slots.sum())) != len(tokens):
        raise ConfigError(f"the prompt has {wanted} slots for {modality}, the projector gave {len(tokens)} tokens")
    return embeds.masked_scatter(slots.unsqueeze(-1), tokens.to(embeds.dtype))


def positions(attention_mask: Tensor) -> Tensor:
    """bool or long[B, T] -> long[B, T], the number of tokens before each; padding counts as nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    # Frozen weights are read from their own directories; tied ones could not even be written by safetensors.
    trainable = {f"{prefix}{name}" for name, p in module.named_parameters() if p.requires_grad}
    for key in list(state):
        if key.startswith((f"{prefix}llm.", f"{prefix}encoders.")) and key not in trainable:
            del state[key]
