"""The tokens by which the LLM says what comes next: a route for the answer, then runs that stand for media.

The LLM itself is never resized: its new tokens' rows live here, are trained alone and saved alone. A token's id
continues after the LLM's vocabulary, id V + r for row r. Rows: `<|words|>`, `<|media|>`, then for each output
modality, in configuration order, `<|image_0|>` ... `<|image_3|>`.

Source: NExT-GPT (arXiv:2309.05519) signals each modality by a fixed number of tokens (image 4, video 24, audio 8).
Differs: NExT-GPT resizes the LLM, so that its whole embedding matrix trains; here R rows do.
Shapes: B batch, T tokens, S signal tokens of a run, V the LLM's vocabulary, R new rows, D LLM width.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anygen.config import Config
from anygen.errors import ConfigError

WORDS, MEDIA = "<|words|>", "<|media|>"
"""The two routes: an answer of words alone, by the untouched LLM; an answer with media, by the adapted one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalTokensConfig(Config):
    counts: Mapping[str, int] = field(default_factory=dict)
    """Output modality -> S, the tokens of one of its runs."""

    def __post_init__(self) -> None:
        for modality, count in self.counts.items():
            if count < 1:
                raise ConfigError(f"a run of '{modality}' has at least 1 signal token, got {count}")
            if f"<|{modality}|>" in (WORDS, MEDIA):
                raise ConfigError(f"'{modality}' is the name of a route, not of a modality")

    def strings(self) -> list[str]:
        """All R new tokens in row order."""
        runs = [f"<|{modality}_{i}|>" for modality, count in self.counts.items() for i in range(count)]
        return [WORDS, MEDIA, *runs]


class SignalTokens(nn.Module):
    """R trainable rows beside an LLM of V tokens."""

    rows: nn.Parameter
    """float32[R, D], the input embeddings; with tied embeddings also what the head reads."""

    def __init__(self, config: SignalTokensConfig, *, vocab_size: int, width: int, tied: bool = True) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.width = vocab_size, width
        self.strings = config.strings()
        self.rows = nn.Parameter(torch.zeros(len(self.strings), width))
        self.head_rows = None if tied else nn.Parameter(torch.zeros(len(self.strings), width))
        self.words_id, self.media_id = vocab_size, vocab_size + 1
        start = vocab_size + 2
        self.runs: dict[str, range] = {}
        for modality, count in config.counts.items():
            self.runs[modality] = range(start, start + count)
            start += count
        self._numbers = {string: vocab_size + row for row, string in enumerate(self.strings)}

    def __len__(self) -> int:
        return len(self.strings)

    @property
    def modalities(self) -> list[str]:
        """The output modalities, in row order."""
        return list(self.runs)

    def id(self, string: str) -> int:
        """The id of a new token's string.

        Raises:
            ConfigError: it is none of ours.
        """
        if string not in self._numbers:
            raise ConfigError(f"there is no signal token '{string}'; known: {', '.join(self.strings)}")
        return self._numbers[string]

    def initialize(
        self, embedding: Tensor, head: Tensor | None = None, *, generator: torch.Generator, noise: float = 0.1
    ) -> None:
        """Sets every row to the mean of the LLM's rows plus noise (MiniGPT-5, arXiv:2310.02239).

        Args:
            embedding: float[V, D], the LLM's input embeddings.
            head: float[V, D], its output embeddings where they are not tied.
            generator: the source of the noise, on the CPU.
            noise: its size, in standard deviations of the LLM's rows.
        """
        targets = [(self.rows, embedding)]
        if self.head_rows is not None:
            targets.append((self.head_rows, embedding if head is None else head))
        with torch.no_grad():
            for rows, source in targets:
                source = source.detach().float()
                spread = torch.randn(rows.shape, generator=generator).to(source.device)
                rows.copy_(source.mean(0) + noise * source.std() * spread)

    @torch.no_grad()
    def adopt(self, other: "SignalTokens") -> None:
        """Takes over the rows of another's tokens that have the same names; the others stay as they are.

        Raises:
            ConfigError: they are rows for another LLM.
        """
        if (other.width, other.head_rows is None) != (self.width, self.head_rows is None):
            raise ConfigError(f"rows of width {other.width} do not fit an LLM of width {self.width}")
        there = {string: row for row, string in enumerate(other.strings)}
        pairs = [(row, there[string]) for row, string in enumerate(self.strings) if string in there]
        own, given = (list(rows) for rows in zip(*pairs, strict=True))  # the routes at least
        self.rows[own] = other.rows[given].to(self.rows)
        if self.head_rows is not None and other.head_rows is not None:
            self.head_rows[own] = other.head_rows[given].to(self.head_rows)

    def check_vocabulary(self, vocabulary: Collection[str]) -> None:
        """Refuses an LLM whose own tokens carry our names.

        Raises:
            ConfigError: lists the tokens that collide.
        """
        if taken := [string for string in self.strings if string in vocabulary]:
            raise ConfigError(
                f"the LLM's vocabulary already holds {', '.join(taken)}; rename the output modality, "
                "or use the LLM before it was extended"
            )

    def embed(self, ids: Tensor, base: nn.Module) -> Tensor:
        """long[B, T] -> float[B, T, D] in the LLM's type: ids below V from `base`, the others from the rows.

        Args:
            ids: below V + R; negative ids (slots) get the embedding of token 0, to be replaced by the caller.
            base: the LLM's input embedding. A scale that it applies by itself (Gemma 3) is applied to our rows too.
        """
        embeds = base(ids.masked_fill((ids < 0) | (ids >= self.vocab_size), 0))
        new = self.row_embeddings(ids.sub(self.vocab_size).clamp(min=0), base)
        return torch.where((ids >= self.vocab_size).unsqueeze(-1), new.to(embeds.dtype), embeds)

    def row_embeddings(self, rows: Tensor, base: nn.Module) -> Tensor:
        """long[...] row numbers -> float32[..., D], as the LLM would have embedded them."""
        scale: Any = getattr(base, "embed_scale", None)
        new = F.embedding(rows, self.rows)
        return new if scale is None else new * scale

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., D], what the LLM's head reads -> float32[..., R]."""
        rows = self.rows if self.head_rows is None else self.head_rows
        # in full precision even under autocast: routes are decided here, and R columns cost nothing
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), rows.float())

    def forbidden(self, modalities: Collection[str] | None = None) -> Tensor:
        """bool[R]: what must not be sampled on its own inside an answer: routes, all but the first token of a run,
        and the first token of a modality that is not among `modalities` (none given: all are allowed)."""
        mask = torch.ones(len(self), dtype=torch.bool, device=self.rows.device)
        for modality, run in self.runs.items():
            if modalities is None or modality in modalities:
                mask[run.start - self.vocab_size] = False
        return mask

    def run_starts(self, ids: Tensor, modality: str) -> Tensor:
        """long[B, T] -> long[M, 2]: (row, column) of the first token of each run of `modality`, in reading order.

        Raises:
            ConfigError: a run is cut off or its tokens are out of order.
        """
        run = self.runs[modality]
        starts = (ids == run.start).nonzero()
        columns = starts[:, 1:] + torch.arange(len(run), device=ids.device)  # [M, S]
        if len(starts):
            whole = columns[:, -1].max() < ids.shape[1]
            wanted = torch.arange(run.start, run.stop, device=ids.device)
            if not whole or not bool((ids[starts[:, :1], columns] == wanted).all()):
                raise ConfigError(f"a run of '{modality}' is not whole: its {len(run)} tokens must stand together")
        return starts
