"""What of a model trains, and how fast: parts by name, adapters of the LLM, weights by pattern, learning rates by part.

    trains: [input_projectors.image, llm]      # whole parts, or one modality of a part; of the LLM its adapter
    peft: {kind: lora, rank: 16}               # an adapter in place of none, or `keep` the one that is there
    unfreeze: ["llm.*.layers.1?.*"]            # the LLM's and encoders' own weights, by the pattern of their names
    learning_rates: {llm: 1.0e-4, input_projectors.audio: 1.0e-3}

Source: per-part freezing by name, TinyLLaVA's share recipe (arXiv:2402.14289), which trains a tower from its 12th layer
on; learning rates by part, NExT-GPT's and nanoVLM's; adapters, PEFT.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from anygen.config import Config
from anygen.errors import ConfigError
from anygen.llm import LLM
from anygen.model import AnyGenModel

PARTS = ("llm", "signal_tokens", "input_projectors", "output_projectors")
"""What `trains` may name; encoders and the LLM's own weights train by `unfreeze`."""
NAMED = {"lora": "LORA", "qlora": "LORA", "ia3": "IA3", "prefix": "PREFIX_TUNING"}
"""Kinds that have a short name here -> PEFT's type. Any other type of PEFT is named as PEFT does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftSettings(Config):
    """The LLM's adapter."""

    kind: str = "keep"
    """`keep` trains the adapter that the model has; `rows` trains none, so that of the LLM only the new tokens' rows
    move; `lora`, `qlora` (the LLM in 4 bits below it), `ia3`, `prefix` or a type of PEFT (`VERA`, `LN_TUNING`, …) start
    a new one. PEFT has no bottleneck adapters; `ADAPTION_PROMPT`, LLaMA-Adapter's, changes the attention's code and is
    refused."""
    rank: int = 16
    """Of LoRA's matrices; virtual tokens of a prefix."""
    alpha: int | None = None
    """LoRA's scale times its rank; None takes twice the rank."""
    dropout: float = 0.0
    """LoRA's."""
    targets: tuple[str, ...] | str = "all-linear"
    """Layers that carry LoRA or IA3, by the end of their names."""
    renew: bool = False
    """Drops the adapter that the model has, and what it learned, and starts a new one."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of PEFT's configuration."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"peft.rank is at least 1, got {self.rank}")
        if self.kind not in ("keep", "rows") and self.kind not in NAMED:
            _peft_type(self.kind)

    @property
    def quantization(self) -> str | None:
        """The bits that the LLM is to be loaded in."""
        return "4bit" if self.kind == "qlora" else None

    @property
    def fresh(self) -> bool:
        """Whether a new adapter is made."""
        return self.kind not in ("keep", "rows")


def peft_config(settings: PeftSettings) -> Any:
    """PEFT's configuration of a new adapter.

    Raises:
        ConfigError: PEFT knows no such kind, or not with these options.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    name = NAMED.get(settings.kind) or _peft_type(settings.kind)
    made = {kind.value: maker for kind, maker in PEFT_TYPE_TO_CONFIG_MAPPING.items()}[name]
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    if name == "LORA":
        alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
        options |= {"r": settings.rank, "lora_alpha": alpha, "lora_dropout": settings.dropout}
        options["target_modules"] = targets
    elif name == "PREFIX_TUNING":
        options["num_virtual_tokens"] = settings.rank
    elif name == "IA3":
        if isinstance(settings.targets, tuple):
            options["target_modules"] = targets
    elif isinstance(settings.targets, tuple):
        options["target_modules"] = targets
    try:
        return made(**(options | settings.options))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"peft: {settings.kind} cannot be made ({error})") from None


def _peft_type(kind: str) -> str:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = [one.value for one in PEFT_TYPE_TO_CONFIG_MAPPING if one.value != "ADAPTION_PROMPT"]
    if kind.upper() not in known:
        near = get_close_matches(kind.lower(), ["keep", "rows", *NAMED, *(name.lower() for name in known)], n=1)
        hint = f", did you mean '{near[0]}'?" if near else f"; known: keep, rows, {', '.join(NAMED)}, or a type of PEFT"
        raise ConfigError(f"peft.kind: unknown kind '{kind}'{hint}")
    return kind.upper()


def adapt(llm: LLM, settings: PeftSettings) -> None:
    """Gives the LLM the adapter that the settings ask for.

    Raises:
        ConfigError: it has one already that is not to be dropped, or the new one does not fit the LLM.
    """
    if not settings.fresh:
        return
    if llm.has_adapter:
        if not settings.renew:
            raise ConfigError(
                "the model has an adapter already; peft.kind: keep trains that one, peft.renew: true drops it"
            )
        llm.remove_adapter()
    try:
        llm.add_adapter(peft_config(settings))
    except ValueError as error:
        raise ConfigError(f"peft: {settings.kind} does not fit this LLM ({str(error).splitlines()[0]})") from None


@dataclass(frozen=True, slots=True)
class Selection:
    """What trains."""

    parts: tuple[str, ...]
    patterns: tuple[str, ...] = ()


def select(model: AnyGenModel, selection: Selection) -> list[Any]:
    """Freezes everything but what is selected.

    Args:
        model: with its adapter.
        selection: parts, some with a modality behind a dot, and patterns of the names of LLM's and encoders' weights.

    Returns:
        Hooks that keep rows of other modalities as they are; remove them after training.

    Raises:
        ConfigError: a part, modality or pattern names nothing that is there, or nothing trains.
    """
    model.requires_grad_(False)
    hooks: list[Any] = []
    rows: set[int] | None = set()
    for name in selection.parts:
        part, _, modality = name.partition(".")
        if part not in PARTS:
            near = get_close_matches(part, PARTS, n=1)
            raise ConfigError(
                f"trains: there is no part '{part}'" + (f", did you mean '{near[0]}'?" if near else "")
                + f"; known: {', '.join(PARTS)}"
            )  # fmt: skip
        if part == "llm":
            if modality:
                raise ConfigError(
                    f"trains: llm is its adapter, whole; weights of its own are named by unfreeze, not {name}"
                )
            _thaw_adapter(model.llm)
        elif part == "signal_tokens":
            rows = None if not modality or rows is None else rows | _rows(model, modality)
        else:
            _thaw_projectors(model, part, modality)
    if rows is None or rows:
        hooks += _thaw_rows(model, rows)
    for pattern in selection.patterns:
        _thaw_pattern(model, pattern)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("nothing would train: trains and unfreeze name nothing")
    return hooks


def _thaw_adapter(llm: LLM) -> None:
    if not llm.has_adapter:
        raise ConfigError("trains names llm, which has no adapter; start one (peft.kind: lora), or leave llm out")
    llm.thaw_adapter()


def _thaw_projectors(model: AnyGenModel, part: str, modality: str) -> None:
    there = getattr(model, part)
    if modality and modality not in there:
        shares = getattr(model.settings, "inputs" if part == "input_projectors" else "outputs").get(modality)
        if shares is not None and shares.shares is not None:
            raise ConfigError(f"trains: {modality} has the projector of {shares.shares}; name {part}.{shares.shares}")
        raise ConfigError(f"trains: the model has no {part}.{modality}; it has {', '.join(there) or 'none'}")
    (there[modality] if modality else there).requires_grad_(True)


def _rows(model: AnyGenModel, modality: str) -> set[int]:
    runs = model.signal_tokens.runs
    if modality not in runs:
        raise ConfigError(f"trains: the model has no signal_tokens.{modality}; it has {', '.join(runs) or 'none'}")
    return {token - model.signal_tokens.vocab_size for token in runs[modality]}


def _thaw_rows(model: AnyGenModel, rows: set[int] | None) -> list[Any]:
    hooks = []
    for parameter in model.signal_tokens.parameters():
        parameter.requires_grad_(True)
        if rows is not None:
            mask = torch.zeros(len(parameter), 1, device=parameter.device)
            mask[sorted(rows)] = 1
            hooks.append(parameter.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient)))
    return hooks


def _thaw_pattern(model: AnyGenModel, pattern: str) -> None:
    names = {clean(name): parameter for name, parameter in model.named_parameters()}
    if pattern.startswith("generators."):
        raise ConfigError(f"unfreeze: generators stand still, got '{pattern}'; the LLM and encoders can train")
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = get_close_matches(pattern.replace("*", ""), names, n=1, cutoff=0.3)
        raise ConfigError(
            f"unfreeze: no weight's name fits '{pattern}'" + (f"; a name near it is '{near[0]}'" if near else "")
        )
    if fixed := [name for name in found if not names[name].is_floating_point()]:
        raise ConfigError(f"unfreeze: '{fixed[0]}' is quantised and cannot train; use an adapter (peft.kind: qlora)")
    for name in found:
        names[name].requires_grad_(True)


def clean(name: str) -> str:
    """A parameter's name without what PEFT puts into it, so that patterns hold with and without an adapter."""
    return name.replace("llm.model.base_model.model.", "llm.model.").replace(".base_layer.", ".")


def own_weights(model: AnyGenModel) -> set[str]:
    """Of what trains, whose own weights change: "llm", or "encoders.MODALITY"; they have to be written anew."""
    adapter = model.llm.adapter_parameters()
    changed = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in adapter:
            part = name.split(".")
            if part[0] == "llm":
                changed.add("llm")
            elif part[0] == "encoders":
                changed.add(".".join(part[:2]))
    return changed


def own_words(model: AnyGenModel) -> bool:
    """Whether what the LLM says without its adapter, by `<|words|>`, is learned: its own weights train."""
    return model.settings.routes and "llm" in own_weights(model)


def groups(model: nn.Module, rate: float, rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: each part at its rate; biases, norms and signal rows without decay.

    Args:
        model: of which some trains.
        rate: where `rates` names nothing.
        rates: beginning of a name, whole steps between dots -> its learning rate; the longest that fits counts.
        weight_decay: AdamW's.

    Raises:
        ConfigError: a name of `rates` fits nothing that trains.
    """
    told: dict[tuple[float, float, str], list[nn.Parameter]] = {}
    used: set[str] = set()
    trained: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        trained.append(clean(name))
        fits = [key for key in rates if f"{clean(name)}.".startswith(f"{key}.")]
        key = max(fits, key=len, default="")
        used |= set(fits)
        decay = 0.0 if parameter.ndim < 2 or name.startswith("signal_tokens.") else weight_decay
        told.setdefault((rates.get(key, rate), decay, key or "all else"), []).append(parameter)
    if unused := [key for key in rates if key not in used]:
        parts = sorted({".".join(beginning(name)) for name in trained})
        raise ConfigError(
            f"learning_rates: nothing that trains is named '{unused[0]}'; what trains: {', '.join(parts)}"
        )
    return [{"params": part, "lr": lr, "weight_decay": decay, "name": key} for (lr, decay, key), part in told.items()]


def beginning(name: str) -> Sequence[str]:
    """The part that a parameter belongs to, and of projectors and encoders its modality, as steps of its name."""
    steps = name.split(".")
    return steps[:2] if steps[0].endswith(("projectors", "encoders")) else steps[:1]
