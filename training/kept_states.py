"""While output projectors alone train, the LLM's states at the runs are constants: each context is read once, and kept.

A caption that comes again in the same words costs a projector's pass, not one of the LLM. The states are exact, and the
loss is the one of `AnyGenModel.forward`.

Shapes: B rows, T tokens, S signal tokens of a run, D LLM width.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anygen.model import AnyGenModel, AnyGenOutput
from anygen.prompts import pad

logger = logging.getLogger("anygen.training")

LIMIT = 2 * 2**30
"""Bytes of states that are kept, in the machine's memory; contexts beyond are read each time."""

Runs = list[tuple[str, Tensor]]
"""Modality and float32[S, D] of each run of a row, modality by modality, in reading order."""


def constant_states(model: AnyGenModel) -> bool:
    """Whether nothing trains but output projectors."""
    return all(name.startswith("output_projectors.") for name, p in model.named_parameters() if p.requires_grad)


class KeptStates:
    """The states at the runs of conversations of words.

    They are read before training, in batches of their own: a context's neighbours in a batch count in the last
    bit, and a run that goes on after a kill has to meet the same numbers.
    """

    def __init__(self, model: AnyGenModel) -> None:
        self.model = model
        self.kept: dict[bytes, Runs] = {}
        self.read = 0
        """Rows that the LLM has read."""

    def fill(self, contexts: Iterable[Sequence[int]], *, batch_size: int = 32, limit: int = LIMIT) -> None:
        """Reads every context that comes more than once, the most frequent first.

        Args:
            contexts: their token ids, as often as they come.
            batch_size: rows that the LLM reads together.
            limit: bytes of states that are kept; contexts beyond are read each time they come.
        """
        counts = Counter(tuple(ids) for ids in contexts)
        often = [list(ids) for ids, count in counts.most_common() if count > 1]
        size = 4 * self.model.llm.width * sum(len(run) for run in self.model.signal_tokens.runs.values())
        often = sorted(often[: max(0, limit // size)], key=len)
        for first in range(0, len(often), batch_size):
            ids, mask = (part.to(self.model.device) for part in pad(often[first : first + batch_size], 0))
            for key, runs in zip(_keys(ids, mask), self._read(ids, mask), strict=True):
                self.kept[key] = runs
        if often:
            others = len(counts) - len(often)
            logger.info("states of %d contexts are kept, %d others read as they come", len(often), others)

    def output(self, batch: Mapping[str, Any]) -> AnyGenOutput:
        """What the model's forward pass gives for `input_ids`, `attention_mask` and `conditions`, without states."""
        model, ids, mask = self.model, batch["input_ids"], batch["attention_mask"]
        keys = _keys(ids, mask)
        missing = [row for row, key in enumerate(keys) if key not in self.kept]
        fresh = dict(zip(missing, self._read(ids[missing], mask[missing]) if missing else [], strict=True))
        rows = [fresh[row] if row in fresh else self.kept[key] for row, key in enumerate(keys)]
        losses = []
        for modality, target in batch["conditions"].items():
            states = torch.stack([run for row in rows for name, run in row if name == modality])
            condition = model.project(modality, states.to(model.device))
            losses.append(model.alignment_loss(modality, condition, target))
        aligned = torch.stack(losses).mean()
        return AnyGenOutput(loss=model.alignment_weight * aligned, alignment_loss=aligned)

    @torch.no_grad()
    def _read(self, ids: Tensor, mask: Tensor) -> list[Runs]:
        model, training = self.model, self.model.llm.training
        model.llm.eval()
        hidden = model(ids, mask).hidden_states
        model.llm.train(training)
        self.read += len(ids)
        found: list[Runs] = [[] for _ in range(len(ids))]
        for modality, run in model.signal_tokens.runs.items():
            for row, column in model.signal_tokens.run_starts(ids, modality).tolist():
                found[row].append((modality, hidden[row, column : column + len(run)].float().cpu()))
        return found


def _keys(ids: Tensor, mask: Tensor) -> list[bytes]:
    rows = zip(ids.cpu(), mask.bool().cpu(), strict=True)
    return [row[real].numpy().tobytes() for row, real in rows]
