"""The caption-only alignment step at its fastest: a caption is read once, for the runs of all output modalities.

```
captions [B,T] ─ LLM, no autograd ─► keys and values ─┐
runs of all modalities [B,S] ─────── LLM ─────────────┴─► states ─ output projectors ─► conditions ─ loss
```

A frozen LLM is causal, so a caption carries no gradient: it is read under `no_grad`, and back-propagation goes through
the S signal positions alone. The runs of all modalities go through the LLM together, each seeing the caption and
itself. No logits are computed. The gradient is exact, whatever is trainable: where something before the runs trains,
such as a LoRA, the caption is read with autograd, and still only once.

Source: caption-only alignment, MM-LLMs survey (arXiv:2401.13601) eq. 4, NExT-GPT (arXiv:2309.05519) section 4.2; many
branches over one prefix in one pass, tree attention of SpecInfer (arXiv:2305.09781).
Shapes: B captions, T caption tokens, S signal tokens of all runs, D LLM width.
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from anygen.errors import ConfigError
from anygen.features import Condition
from anygen.llm import LLM
from anygen.model import AnyGenModel, positions
from anygen.prompts import pad

logger = logging.getLogger("anygen.training")

Way = Literal["joint", "branches", "plain"]
"""How the runs are read: in one pass behind one caption, in a pass for each modality behind one caption, or with the
caption read again for each."""


def prefix_alignment(
    model: AnyGenModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    conditions: Mapping[str, Mapping[str, Tensor]],
    media: Mapping[str, Any] | None = None,
    *,
    constant: bool | None = None,
) -> tuple[Tensor, dict[str, Condition]]:
    """Alignment of one run of each modality behind each prefix, the prefix read once.

    Args:
        model: with any LLM, with or without an adapter.
        input_ids: long[B, T], the prefix; the runs are put behind its last token.
        attention_mask: long[B, T], padded on either side.
        conditions: modality -> name -> float[B, ...], the targets.
        media: as for `AnyGenModel.forward`.
        constant: as for `signal_states`.

    Returns:
        float32[], the mean of the modalities' losses, and their conditions.

    Raises:
        ConfigError: as `AnyGenModel.alignment_loss` and `signal_states`.
    """
    states = signal_states(model, input_ids, attention_mask, list(conditions), media, constant=constant)
    made = {modality: model.project(modality, hidden) for modality, hidden in states.items()}
    losses = [model.alignment_loss(modality, made[modality], target) for modality, target in conditions.items()]
    return torch.stack(losses).mean(), made


def signal_states(
    model: AnyGenModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    modalities: Sequence[str],
    media: Mapping[str, Any] | None = None,
    *,
    constant: bool | None = None,
    way: Way | None = None,
) -> dict[str, Tensor]:
    """The LLM's states at a run of each modality, each behind the same prefix and blind to the others.

    Args:
        model: with any LLM.
        input_ids: long[B, T].
        attention_mask: long[B, T], padded on either side.
        modalities: whose runs.
        media: as for `AnyGenModel.forward`.
        constant: whether the prefix is to be read without autograd; None finds out whether that is exact
            (`is_constant`), which on a GPU waits for the device. True makes signal rows in a prefix count as constants.
        way: how; None takes `fastest_way`.

    Returns:
        modality -> float[B, S of its run, D].

    Raises:
        ConfigError: no modality, or one that the model does not make.
    """
    made = ", ".join(model.signal_tokens.runs)
    if not modalities:
        raise ConfigError(
            f"signal states of no modality are wanted; the model makes {', '.join(model.settings.outputs)}"
        )
    if unknown := [name for name in modalities if name not in model.signal_tokens.runs]:
        made = ", ".join(model.signal_tokens.runs)
        raise ConfigError(f"the model does not make {', '.join(unknown)}; it makes {made}")
    if constant is None:
        constant = is_constant(model, input_ids, media)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
        prefix = model.embed(input_ids, media)
    prefix, lengths = _justified(prefix, attention_mask)
    runs = {modality: model.run_embeddings(modality)[0].to(model.llm.dtype) for modality in modalities}
    way = way or fastest_way(model.llm, prefix.shape[1] + sum(len(run) for run in runs.values()))
    return _WAYS[way](model.llm, prefix, lengths, runs, constant)


def is_constant(model: AnyGenModel, input_ids: Tensor, media: Mapping[str, Any] | None = None) -> bool:
    """Whether nothing trainable is in a prefix long[B, T], nor in the LLM, so that no gradient reaches it."""
    parts: list[nn.Module] = [model.llm, *(model.input_projectors[name] for name in media or {})]
    if any(p.requires_grad for part in parts for p in part.parameters()):
        return False
    trains = model.signal_tokens.rows.requires_grad
    return not (trains and bool((input_ids >= model.signal_tokens.vocab_size).any()))


def _justified(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """float[B, T, D] with its padding moved behind the tokens, and long[B], the numbers of tokens."""
    order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return embeds.gather(1, order.unsqueeze(-1).expand_as(embeds)), mask.long().sum(1)


Runs = Mapping[str, Tensor]
"""modality -> float[S, D], the input embeddings of its run."""


def _joint(llm: LLM, prefix: Tensor, lengths: Tensor, runs: Runs, constant: bool) -> dict[str, Tensor]:
    cache = _read(llm, prefix, constant)
    sizes = [len(run) for run in runs.values()]
    places = torch.cat([torch.arange(size) for size in sizes]).to(lengths.device)
    hidden, _ = llm.hidden_states(
        torch.cat(list(runs.values())).expand(len(prefix), -1, -1),
        attention_mask=tree_mask(lengths, prefix.shape[1], sizes, prefix.dtype),
        position_ids=lengths[:, None] + places,
        cache=cache,
    )
    return dict(zip(runs, hidden.split(sizes, dim=1), strict=True))


def _branches(llm: LLM, prefix: Tensor, lengths: Tensor, runs: Runs, constant: bool) -> dict[str, Tensor]:
    cache, width = _read(llm, prefix, constant), prefix.shape[1]
    seen = torch.arange(width, device=lengths.device) < lengths[:, None]
    states = {}
    for modality, run in runs.items():
        tail = run.expand(len(prefix), -1, -1)
        states[modality], _ = llm.hidden_states(
            tail,
            attention_mask=torch.cat([seen, seen.new_ones(tail.shape[:2])], dim=1).long(),
            position_ids=lengths[:, None] + torch.arange(len(run), device=lengths.device),
            cache=_branch(cache),
        )
    return states


def _plain(llm: LLM, prefix: Tensor, lengths: Tensor, runs: Runs, constant: bool) -> dict[str, Tensor]:
    width = prefix.shape[1]
    columns = torch.arange(width, device=lengths.device) - (width - lengths[:, None])  # [B, T], padding first
    prefix = prefix.gather(1, (columns % width).unsqueeze(-1).expand_as(prefix))
    states = {}
    for modality, run in runs.items():
        tail = run.expand(len(prefix), -1, -1)
        mask = torch.cat([columns >= 0, columns.new_ones(tail.shape[:2], dtype=torch.bool)], dim=1).long()
        row = torch.cat([prefix, tail], dim=1)
        hidden, _ = llm.hidden_states(row, attention_mask=mask, position_ids=positions(mask))
        states[modality] = hidden[:, width:]
    return states


_WAYS: dict[Way, Callable[[LLM, Tensor, Tensor, Runs, bool], dict[str, Tensor]]] = {
    "joint": _joint,
    "branches": _branches,
    "plain": _plain,
}


def _read(llm: LLM, prefix: Tensor, constant: bool) -> Any:
    """The cache that a prefix leaves behind. Its padding comes last, where no token of it looks: no mask is needed."""
    places = torch.arange(prefix.shape[1], device=prefix.device).expand(len(prefix), -1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
        return llm.hidden_states(prefix, position_ids=places, use_cache=True)[1]


def _branch(cache: Any) -> Any:
    """A cache that grows by itself and shares what it holds; a layer's update replaces its tensors."""
    branch = copy(cache)
    branch.layers = [copy(layer) for layer in cache.layers]
    return branch


def tree_mask(lengths: Tensor, width: int, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What each signal token sees: the tokens of its prefix, and of its own run itself and those before it.

    Args:
        lengths: long[B], tokens of each prefix.
        width: T, columns of the prefixes, the padding behind the tokens.
        sizes: signal tokens of each run.
        dtype: of the mask.

    Returns:
        float[B, 1, S, T + S], added to attention scores: 0 where something is seen, the type's least number elsewhere.
        Rows are aligned as GPU kernels want them.
    """
    device, total = lengths.device, sum(sizes)
    own = torch.block_diag(*(torch.ones(size, size).tril() for size in sizes)).bool().to(device)  # [S, S]
    seen = torch.arange(width, device=device) < lengths[:, None]  # [B, T]
    rows = -(-(width + total) // 16) * 16
    mask = torch.zeros(len(lengths), 1, total, rows, dtype=dtype, device=device)[..., : width + total]
    least = torch.finfo(dtype).min
    mask[..., :width].masked_fill_(~seen[:, None, None], least)
    mask[..., width:].masked_fill_(~own, least)
    return mask


_checked: "WeakKeyDictionary[LLM, tuple[str | None, Way]]" = WeakKeyDictionary()


def fastest_way(llm: LLM, tokens: int) -> Way:
    """The fastest way that gives this LLM's states: found by trying it on a few tokens, once.

    Families differ in what they make of masks and positions (ALiBi, FlashAttention, soft caps); none is known by name.

    Args:
        llm: of any family.
        tokens: T + S; beyond a sliding window the plain way is taken.
    """
    config: Any = llm.base.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if any(window is not None and tokens > window for window in windows):
        return "plain"
    attention = getattr(config, "_attn_implementation", None)
    if _checked.get(llm, (None, None))[0] != attention:
        _checked[llm] = attention, _find_way(llm)
        logger.info("%s takes runs the %s way", type(llm.base).__name__, _checked[llm][1])
    return _checked[llm][1]


@torch.no_grad()
def _find_way(llm: LLM) -> Way:
    modes = [(module, module.training) for module in llm.modules()]
    llm.eval()  # dropout would hide what is looked for
    try:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(llm.vocab_size, (16,), generator=generator).to(llm.device)
        embeds = llm.embedding(ids)
        prefix, lengths = embeds[:10].view(2, 5, -1), torch.tensor([5, 3], device=llm.device)
        runs = {"first": embeds[10:12], "second": embeds[12:]}
        wanted = _plain(llm, prefix, lengths, runs, True)
        close = 1e-3 if embeds.dtype == torch.float32 else 0.1  # a wrong mask errs by more, rounding in bf16 by 0.03
        ways: tuple[Way, ...] = ("joint", "branches")
        for way in ways:
            try:
                made = _WAYS[way](llm, prefix, lengths, runs, True)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
                continue  # a family that takes no such mask, or whose cache is of another kind
            if all((made[n] - wanted[n]).float().norm() < close * wanted[n].float().norm() for n in runs):
                return way
        return "plain"
    finally:
        for module, mode in modes:
            module.training = mode


def length_batches(lengths: Sequence[int], batch_size: int, *, seed: int, window: int = 64) -> list[list[int]]:
    """Every item once, in batches of like length, which come in a random order.

    Args:
        lengths: of the items.
        batch_size: items of a batch; one batch may have fewer.
        seed: of the order.
        window: batches among which items are sorted; 1 does not sort at all.
    """
    if batch_size < 1 or window < 1:
        raise ConfigError(f"batch_size and window are at least 1, got {batch_size} and {window}")
    rng, batches = random.Random(seed), list[list[int]]()
    order = rng.sample(range(len(lengths)), len(lengths))
    for first in range(0, len(order), window * batch_size):
        part = sorted(order[first : first + window * batch_size], key=lambda item: lengths[item])
        batches += [part[row : row + batch_size] for row in range(0, len(part), batch_size)]
    return rng.sample(batches, len(batches))


class CaptionBatches(Dataset[dict[str, Any]]):
    """Prefixes with their targets, in batches of like length: item `n` is a batch, as `CaptionAlignment` takes it.

    Args:
        prefixes: token ids of each caption, perhaps in its context.
        targets: modality -> name -> float[len(prefixes), ...], computed once.
        batch_size: captions of a batch; one batch may have fewer.
        seed: of the order.
        window: as for `length_batches`.
        multiple: a batch's length is rounded up to it.

    Raises:
        ConfigError: a prefix is empty, or there are not as many targets as prefixes.
    """

    def __init__(
        self,
        prefixes: Sequence[Sequence[int]],
        targets: Mapping[str, Mapping[str, Tensor]],
        *,
        batch_size: int,
        seed: int,
        window: int = 64,
        multiple: int = 8,
    ) -> None:
        if empty := [number for number, ids in enumerate(prefixes) if not ids]:
            raise ConfigError(f"caption {empty[0] + 1} of {len(prefixes)} has no tokens")
        for modality, tensors in targets.items():
            for name, value in tensors.items():
                if len(value) != len(prefixes):
                    raise ConfigError(f"{len(prefixes)} captions, but {len(value)} targets '{name}' of {modality}")
        self.prefixes, self.targets, self.multiple = prefixes, targets, multiple
        self.batches = length_batches([len(ids) for ids in prefixes], batch_size, seed=seed, window=window)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """`input_ids` and `attention_mask`, long[B, T]; `conditions`, modality -> name -> float[B, ...]."""
        rows = self.batches[number]
        ids, mask = pad([self.prefixes[row] for row in rows], 0, multiple=self.multiple)
        aims = {modality: {n: v[rows] for n, v in tensors.items()} for modality, tensors in self.targets.items()}
        return {"input_ids": ids, "attention_mask": mask, "conditions": aims}

    @staticmethod
    def collate(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """For a loader with one batch a step."""
        return batches[0]


class CaptionAlignment(nn.Module):
    """`prefix_alignment` as the module that `transformers.Trainer` and `accelerate` take.

    Args:
        model: whose signal rows and output projectors train, perhaps with an adapter.
        constant: as for `signal_states`; None makes it true unless the LLM has an adapter that trains, so that signal
            rows in prefixes count as constants, and no step waits for the device.
    """

    def __init__(self, model: AnyGenModel, *, constant: bool | None = None) -> None:
        super().__init__()
        self.model = model
        trains = any(p.requires_grad for p in model.llm.parameters())
        self.constant = not trains if constant is None else constant

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, conditions: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """long[B, T] twice, modality -> name -> float[B, ...] -> `loss`, float32[]."""
        loss, _ = prefix_alignment(self.model, input_ids, attention_mask, conditions, constant=self.constant)
        return {"loss": loss}
