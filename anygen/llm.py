"""Any causal language model of transformers, opened where anygen needs it: embeddings in, hidden states out.

The model keeps its own vocabulary and its own weights; an adapter (PEFT) can be on or off, call by call.
Shapes: B batch, T tokens, V vocabulary, D width.
"""

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from anygen.component import check_fit, read_safetensors
from anygen.environment import home
from anygen.errors import CheckpointError, ConfigError
from anygen.quantization import check_quantization, transformers_config

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache


class LLM(nn.Module):
    """An `AutoModelForCausalLM` with its tokenizer and, optionally, one adapter.

    Args:
        model: a causal language model whose state is a key-value cache.
        tokenizer: its tokenizer, with a chat template.

    Raises:
        ConfigError: the model is recurrent, or its logits are not its head's times what its configuration says.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        super().__init__()
        if getattr(model, "_is_stateful", False):
            raise ConfigError(
                f"{type(model).__name__} keeps a recurrent state; anygen needs an attention model, "
                "whose padded columns can be masked"
            )
        self.model: PreTrainedModel | PeftModel = model.requires_grad_(False)
        self._adapter_layers: list[Any] = []
        self._prefix: _Prefix | None = None
        self.tokenizer = tokenizer
        parameters = inspect.signature(cast(nn.Module, model.get_decoder()).forward).parameters
        self._takes_positions = "position_ids" in parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        """The argument that takes a cache; transformers changes the name."""
        self.placed = False
        """Whether its weights lie where they were put when it was loaded, and are not to be moved."""
        self.quantized = False
        """Whether its linear layers are in fewer bits."""
        self.changes = 0
        """Counts what puts weights elsewhere, after which nothing that was captured of them holds."""
        self._scale, self._softcap = _logit_scaling(model)
        self._check_head()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        tokenizer: str | Path | None = None,
        quantization: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
    ) -> Self:
        """Loads model and tokenizer from transformers' files, by default in the type they were saved in.

        Args:
            directory: with both.
            dtype: another type.
            device: where the model goes.
            tokenizer: a directory with another tokenizer; a `generation_config.json` there (the ends of an answer)
                replaces the model's too.
            quantization: "8bit" or "4bit", see `anygen.quantization`.
            device_map: spreads the model over devices, the machine's memory and the disk, as accelerate has it: "auto",
                or module -> device.

        Raises:
            ConfigError: no package is installed that quantises, or `device_map` cannot be followed.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        options: dict[str, Any] = {}
        if (kind := check_quantization(quantization)) is not None:
            options["quantization_config"] = transformers_config(kind, torch.device(device), dtype or torch.bfloat16)
            device_map = device_map or {"": str(device)}
        if device_map is not None:
            options |= {"device_map": device_map, "offload_folder": str(home() / "offload")}
        with _bars_on_terminals_alone():
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    directory, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, **options
                )
            except ValueError as error:
                if device_map is None:
                    raise
                raise ConfigError(f"device_map: {str(error).splitlines()[0][:300]}") from error
        if tokenizer is not None and (Path(tokenizer) / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(str(tokenizer))
        words = AutoTokenizer.from_pretrained(tokenizer or directory, local_files_only=True)
        placed = model if options else cast(nn.Module, model).to(device)
        llm = cls(cast(Any, placed).eval(), words)
        llm.placed, llm.quantized = bool(options), kind is not None
        return llm

    @property
    def base(self) -> "PreTrainedModel":
        """The causal language model itself; its layers carry the adapter, if there is one."""
        if self.has_adapter:
            return cast("PeftModel", self.model).get_base_model()  # type: ignore[return-value]
        return cast("PreTrainedModel", self.model)

    @property
    def embedding(self) -> nn.Module:
        """long[B, T] -> float[B, T, D]; has a `weight` float[V, D]."""
        return cast(nn.Module, self.base.get_input_embeddings())

    @property
    def head(self) -> nn.Module:
        """float[..., D] -> float[..., V]."""
        return cast(nn.Module, self.base.get_output_embeddings())

    @property
    def vocab_size(self) -> int:
        """V, the rows of the embedding; some families pad it beyond their tokenizer."""
        return int(cast(Tensor, self.embedding.weight).shape[0])

    @property
    def width(self) -> int:
        """D."""
        return int(cast(Tensor, self.embedding.weight).shape[1])

    @property
    def tied(self) -> bool:
        """Whether the head reads the embedding's own weights."""
        if cast(Tensor, self.head.weight).is_meta:  # both wait elsewhere
            return bool(self.base.config.get_text_config().tie_word_embeddings)
        return self.head.weight is self.embedding.weight

    @property
    def device(self) -> torch.device:
        """Where the embedding works."""
        weight = cast(Tensor, self.embedding.weight)
        return torch.device(cast(Any, self.embedding)._hf_hook.execution_device) if weight.is_meta else weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the embeddings."""
        return cast(Tensor, self.embedding.weight).dtype

    @property
    def context_length(self) -> int | None:
        """The most tokens that the model was made for; None if it does not say."""
        return getattr(self.base.config.get_text_config(), "max_position_embeddings", None)

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end an answer, as `generate` has them."""
        config = getattr(self.base, "generation_config", None)
        ids = getattr(config, "eos_token_id", None)
        if ids is None:
            ids = self.tokenizer.eos_token_id
        if ids is None:
            raise ConfigError("neither the LLM's generation configuration nor its tokenizer has an end token")
        return [int(i) for i in ids] if isinstance(ids, list | tuple) else [int(ids)]

    def hidden_states(
        self,
        embeds: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: "Cache | None" = None,
        use_cache: bool = False,
    ) -> "tuple[Tensor, Cache | None]":
        """Runs the decoder; no logits are computed.

        Args:
            embeds: float[B, T, D].
            attention_mask: bool or long[B, past + T], false where a column is not to be seen; may have holes.
            position_ids: long[B, T].
            cache: what earlier columns left behind; extended in place.
            use_cache: whether to make a cache if none is given.

        Returns:
            float[B, T, D], the final normalised states that the head reads, and the cache.
        """
        if self._prefix is not None and not self._prefix._disable_adapters:
            cache, attention_mask, position_ids = self._with_prefix(embeds, cache, attention_mask, position_ids)
        positions = {"position_ids": position_ids} if self._takes_positions else {}
        output = cast(nn.Module, self.base.get_decoder())(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            use_cache=use_cache or cache is not None,
            **{self.cache_name: cache},
            **positions,
        )
        hidden = output.last_hidden_state.to(embeds.device)  # the last layer may be on another device
        return hidden, output[self.cache_name] if self.cache_name in output else None

    def _with_prefix(
        self, embeds: Tensor, cache: "Cache | None", mask: Tensor | None, places: Tensor | None
    ) -> "tuple[Cache, Tensor, Tensor]":
        """What `hidden_states` gives the decoder behind a prefix: callers know nothing of its columns."""
        past = 0 if cache is None else cache.get_seq_length() - self.prefix_length
        if cache is None:
            cache = cast("PeftModel", self.model).get_prompt(len(embeds))  # type: ignore[assignment]
        if mask is None:
            mask = embeds.new_ones(len(embeds), past + embeds.shape[1], dtype=torch.long)
        if mask.ndim != 2:
            raise ConfigError("a prefix adapter cannot read packed rows, whose masks are square")
        if places is None:
            places = torch.arange(past, past + embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
        seen = mask.new_ones(len(mask), self.prefix_length)
        return cache, torch.cat([seen, mask], dim=1), places + self.prefix_length  # type: ignore[return-value]

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., D] -> float[..., V], exactly the model's own."""
        return self.scale_logits(self.head(hidden).to(hidden.device))

    def scale_logits(self, logits: Tensor) -> Tensor:
        """What the family does to its head's output: Cohere, Granite and Falcon-H1 scale it, Gemma 2 caps it."""
        if self._scale != 1:
            logits = logits * self._scale
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    @torch.no_grad()
    def replace_vocabulary(self, embedding: Tensor, head: Tensor | None = None) -> None:
        """Puts other rows in place of the vocabulary's, of which there may then be more or fewer.

        Args:
            embedding: float[V, D], the input embeddings.
            head: float[V, D], the output embeddings; none where they are tied.

        Raises:
            CheckpointError: the rows have another width, their numbers differ, or there is a head for a tied LLM.
            ConfigError: there is an adapter, which has taken hold of the layers.
        """
        if self.has_adapter:
            raise ConfigError("the vocabulary cannot be replaced once the LLM has an adapter; do it before adding one")
        wanted = {"embed_tokens": torch.empty(len(embedding), self.width, device="meta")}
        given = {"embed_tokens": embedding}
        if not self.tied:
            wanted["lm_head"] = wanted["embed_tokens"]
        if head is not None:
            given["lm_head"] = head
        check_fit(wanted, given, "the replaced vocabulary")
        self.changes += 1
        self.base.resize_token_embeddings(len(embedding), mean_resizing=False)
        self.model.requires_grad_(False)
        cast(Tensor, self.embedding.weight).copy_(embedding)
        if head is not None:
            cast(Tensor, self.head.weight).copy_(head)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.changes += 1  # `to` and its like
        return super()._apply(*args, **kwargs)

    def no_gradients(self) -> AbstractContextManager[Any]:
        """The context in which the LLM is to answer; weights of some quantising packages refuse inference mode."""
        return torch.no_grad() if self.quantized else torch.inference_mode()

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter was added."""
        return hasattr(self.model, "peft_config")

    def add_adapter(self, config: "PeftConfig") -> None:
        """Adds a fresh, trainable adapter. LoRA starts with no effect.

        Raises:
            ConfigError: there is one already, or it is a kind that adds prompt tokens and is not prefix tuning.
        """
        from peft import PeftType, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        if self.has_adapter:
            raise ConfigError("the LLM has an adapter already; load it without one to start another")
        if config.is_prompt_learning and config.peft_type != PeftType.PREFIX_TUNING:
            raise ConfigError(f"{config.peft_type} adds prompt tokens; use prefix tuning, or an adapter of the layers")
        self.changes += 1
        self.model = get_peft_model(cast("PreTrainedModel", self.model), config)
        switches = BaseTunerLayer | AuxiliaryTrainingWrapper
        self._adapter_layers = [layer for layer in self.model.modules() if isinstance(layer, switches)]
        if config.is_prompt_learning:
            self._prefix = _Prefix(cast(Any, config).num_virtual_tokens)
            self._adapter_layers.append(self._prefix)

    def remove_adapter(self) -> None:
        """Takes the adapter off; what it learned is lost."""
        self.changes += 1
        self.model = self.base if self._prefix is not None else cast("PeftModel", self.model).unload()
        self.model.requires_grad_(False)
        self._adapter_layers, self._prefix = [], None

    def adapter_parameters(self) -> dict[int, nn.Parameter]:
        """The adapter's own parameters, by their `id`."""
        if not self.has_adapter:
            return {}
        config, peft = cast("PeftModel", self.model).active_peft_config, cast("PeftModel", self.model)
        if config.is_prompt_learning:
            return {id(p): p for p in peft.prompt_encoder.parameters()}
        marks = getattr(peft.base_model, "prefix", None)
        named = [(n, p) for n, p in peft.named_parameters() if not marks or marks in n or "modules_to_save" in n]
        return {id(parameter): parameter for _, parameter in named}

    def thaw_adapter(self) -> None:
        """Lets the adapter train, and nothing else of the LLM."""
        for parameter in self.adapter_parameters().values():
            parameter.requires_grad_(True)

    @property
    def prefix_length(self) -> int:
        """Columns that a prefix adapter puts before all others of a cache."""
        return 0 if self._prefix is None else self._prefix.length

    def load_adapter(self, directory: str | Path) -> None:
        """Adds the adapter saved in `directory`, strictly.

        Raises:
            CheckpointError: it lacks keys or has keys that the model does not, listed.
        """
        from peft import PeftConfig, set_peft_model_state_dict

        directory = Path(directory)
        if not (directory / "adapter_config.json").exists():
            raise CheckpointError(f"{directory} holds no adapter: adapter_config.json is missing")
        config = PeftConfig.from_pretrained(str(directory))
        config.base_model_name_or_path = None  # PEFT warns that a directory has another name than the hub's
        config.inference_mode = False  # PEFT saves True, with which a training that goes on would leave it as it is
        self.add_adapter(config)
        state = read_safetensors(directory, "adapter_model")
        check_fit(self._adapter_state(), state, f"the adapter in {directory}")
        set_peft_model_state_dict(self.model, state)

    def save_adapter(
        self, directory: str | Path, *, base_name: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Writes PEFT's format, naming the base model `base_name` (PEFT would write this machine's path).

        `dtype` is the type to store the weights in, their own by default.
        """
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = cast("PeftModel", self.model).active_peft_config
        kept = config.base_model_name_or_path, config.inference_mode
        config.base_model_name_or_path, config.inference_mode = base_name, True
        try:
            config.save_pretrained(str(directory))
        finally:
            config.base_model_name_or_path, config.inference_mode = kept
        written = directory / "adapter_config.json"
        settings = json.loads(written.read_text(encoding="utf-8"))
        if isinstance(named := settings.get("target_modules"), list):  # PEFT keeps a set, in another order each time
            settings["target_modules"] = sorted(named)
            written.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        weights = self._adapter_state().items()
        state = {k: v.detach().cpu().to(dtype or v.dtype).contiguous() for k, v in weights}
        save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})

    def _adapter_state(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        # by default PEFT adds a vocabulary that was resized; ours lies beside the adapter
        return get_peft_model_state_dict(cast("PeftModel", self.model), save_embedding_layers=False)

    def save_base(self, directory: str | Path) -> None:
        """Writes the model, without its adapter, and the tokenizer as transformers does."""
        adapter, base = self.adapter_parameters(), self.base
        theirs = {name for name, parameter in base.named_parameters() if id(parameter) in adapter}
        state = {k.replace(".base_layer.", "."): v for k, v in base.state_dict().items() if k not in theirs}
        with _bars_on_terminals_alone():
            base.save_pretrained(directory, state_dict=state)
        self.tokenizer.save_pretrained(directory)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside, the LLM is the untouched base model, for every thread that uses it."""
        with self._adapters([True] * len(self._adapter_layers)):
            yield

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of `torch.utils.checkpoint`: what is recomputed has the adapter on or off as it was."""
        return nullcontext(), self._adapters([layer._disable_adapters for layer in self._adapter_layers])

    @contextmanager
    def _adapters(self, off: Sequence[bool]) -> Iterator[None]:
        # PEFT's own disable_adapter() makes frozen adapters trainable again on its way out.
        kept = [layer._disable_adapters for layer in self._adapter_layers]
        for layer, value in zip(self._adapter_layers, off, strict=True):
            layer._disable_adapters = value
        try:
            yield
        finally:
            for layer, value in zip(self._adapter_layers, kept, strict=True):
                layer._disable_adapters = value

    @torch.no_grad()
    def _check_head(self) -> None:
        """Compares our logits with the model's on two tokens: no family with a rule of its own may pass unseen."""
        ids = torch.tensor([[self.vocab_size // 2, self.vocab_size // 3]], device=self.device)
        training = self.model.training
        self.model.eval()
        theirs = self.model(input_ids=ids, use_cache=False).logits
        ours = self.logits(self.hidden_states(self.embedding(ids), attention_mask=torch.ones_like(ids))[0])
        self.model.train(training)
        if not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
            raise ConfigError(
                f"{type(self.base).__name__} makes its logits in a way that anygen does not know; "
                "known are a plain head, logit_scale, logits_scaling, lm_head_multiplier, final_logit_softcapping"
            )


class _Prefix:
    """The switch of a prefix adapter, like that of PEFT's layers."""

    def __init__(self, length: int) -> None:
        self.length, self._disable_adapters = length, False


@contextmanager
def _bars_on_terminals_alone() -> Iterator[None]:
    """transformers draws its progress bars into logs and pipes too."""
    from transformers.utils import logging

    hide = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()


def _logit_scaling(model: "PreTrainedModel") -> tuple[float, float | None]:
    """The factor and the soft cap that the family's configuration names; 1 and None for a plain head."""
    config: Any = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    return scale, getattr(config, "final_logit_softcapping", None)
