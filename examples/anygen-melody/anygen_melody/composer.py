"""Captions -> conditions -> melodies: a bag of words and a recurrent network that says one note after another.

Shapes: B melodies, N notes, L condition tokens, C their width, E hidden width.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anygen.component import Component
from anygen.config import Config
from anygen.features import Condition, ConditionSpec
from anygen.generators.base import Generator
from anygen_melody.melody import INSTRUMENTS, Melody

TEMPOS, LENGTHS, LOWEST, SPAN = (70, 110, 168), (0.5, 1.0, 2.0), 55, 27
"""Beats a minute, beats of a note, the lowest pitch and how many there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComposerConfig(Config):
    words: tuple[str, ...] = ("melody",)
    """What the text encoder knows; others are not heard."""
    notes: int = 16
    width: int = 128


class Composer(Component, Generator):  # a part with weights of its own, and a generator
    """The network."""

    config_class, modality = ComposerConfig, "melody"
    condition_spec = ConditionSpec(shapes={"melody": (4, 32)})

    def __init__(self, config: ComposerConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.told = nn.Sequential(
            nn.Linear(len(config.words), width), nn.GELU(), nn.Linear(width, 128), nn.LayerNorm(128)
        )
        self.start = nn.Linear(128, width)
        self.head = nn.Linear(width, len(TEMPOS) * len(INSTRUMENTS))
        self.style = nn.Embedding(len(TEMPOS) * len(INSTRUMENTS), width)
        self.note = nn.Embedding(SPAN * len(LENGTHS) + 1, width)
        self.next = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, SPAN * len(LENGTHS))

    @classmethod
    def from_pretrained(cls, directory: Any, *, device: Any = "cpu", **options: Any) -> "Composer":
        """Small enough for float32 everywhere: a `dtype` is not used."""
        return super().from_pretrained(directory).to(device)

    def encode_text(self, captions: Any) -> Condition:
        """B captions -> `melody` float[B, L, C]."""
        said = [set(re.findall(r"[a-z]+", caption.lower())) for caption in captions]
        bags = torch.tensor([[float(word in words) for word in self.config.words] for words in said])
        return Condition({"melody": self.told(bags.to(self.device)).unflatten(1, (4, 32))})

    def logits(self, condition: Tensor, style: Tensor, notes: Tensor) -> tuple[Tensor, Tensor]:
        """float[B, L, C], long[B], long[B, N] -> of styles float[B, K], of each note float[B, N, V]."""
        start = self.start(condition.flatten(1))
        before = torch.cat([torch.full_like(notes[:, :1], self.note.num_embeddings - 1), notes[:, :-1]], 1)
        given = self.note(before) + (start + self.style(style))[:, None]
        return self.head(start), self.out(self.next(given, torch.tanh(start)[None].contiguous())[0])

    @torch.no_grad()
    def generate(self, condition: Condition, *, seeds: Any, guidance_scale: Any = None, **options: Any) -> list[Any]:
        """B conditions and seeds -> B melodies, a step a note; a higher guidance scale takes likelier notes."""
        heat, on_step = 1 / (guidance_scale or 1.2), options.get("on_step") or (lambda done, total: None)
        told = condition.tensors["melody"].to(self.device, self.dtype)
        chances = [torch.Generator().manual_seed(seed) for seed in seeds]
        style, notes = (torch.zeros(len(told), n, dtype=torch.long, device=self.device) for n in (1, 0))
        for place in range(self.config.notes + 1):  # the style first
            styles, following = self.logits(told, style[:, 0], torch.cat([notes, torch.zeros_like(style)], 1))
            likely = ((following[:, -1] if place else styles) / heat).softmax(-1).cpu()
            drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(likely, chances, strict=True)]
            picked = torch.stack(drawn).to(self.device)
            style, notes = (style, torch.cat([notes, picked], 1)) if place else (picked, notes)
            on_step(place + 1, self.config.notes + 1)
        return [self._melody(*row) for row in zip(style[:, 0].tolist(), notes.tolist(), strict=True)]

    def _melody(self, style: int, notes: list[int]) -> Melody:
        tempo, instrument = divmod(style, len(INSTRUMENTS))
        pairs = [(LOWEST + note // len(LENGTHS), LENGTHS[note % len(LENGTHS)]) for note in notes]
        return Melody(pairs, TEMPOS[tempo], list(INSTRUMENTS)[instrument])

    def denoising_loss(self, condition: Condition, media: Any, *, generator: Any = None) -> Tensor:
        """The negative log-likelihood a note of melodies that this composer could say; there is no noise in it."""
        style = [TEMPOS.index(m.tempo) * len(INSTRUMENTS) + list(INSTRUMENTS).index(m.instrument) for m in media]
        notes = [[(p - LOWEST) * len(LENGTHS) + LENGTHS.index(b) for p, b in m.notes] for m in media]
        aims, said = torch.tensor(style, device=self.device), torch.tensor(notes, device=self.device)
        styles, following = self.logits(condition.tensors["melody"], aims, said)
        loss = nn.functional.cross_entropy
        return loss(following.flatten(0, 1), said.flatten()) + loss(styles, aims) / 4
