"""Conversations -> packed batches of token ids, media and captions, and the losses of a batch.

Whatever depends on where something stands in a batch is found by the collator, on the host: asked on the device, each
such question would make the host wait for the answer, and the device then for the host.

Shapes: R rows, W tokens of a row, D LLM width, M media or runs of one modality, N slots of a medium, S signal tokens,
P media of a pool, L learned tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from anygen.generators.base import Generator
from anygen.losses import IGNORED, token_loss
from anygen.messages import MediaPart
from anygen.model import AnyGenModel, AnyGenOutput
from anygen.prompts import slot_ids
from anygen.signal_tokens import MEDIA, WORDS
from anygen.training.conditions import caption_tokens
from anygen.training.packing import block_mask, rows_of, segments_of
from anygen.training.requests import Conversations


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
        model: whose tokens these are.
        width: W, tokens of a row.
        route_weight: of the loss at a route, in that of any other token.
    """

    def __init__(
        self,
        features: Mapping[str, Tensor],
        generators: Mapping[str, Generator],
        model: AnyGenModel,
        width: int,
        *,
        route_weight: float = 1.0,
    ) -> None:
        self.features, self.width, self.route_weight = features, width, route_weight
        self.routes = torch.tensor([model.signal_tokens.id(route) for route in (WORDS, MEDIA)])
        self.signals, self.slots = model.signal_tokens, slot_ids(model.settings.slots)
        # Taken here, since text encoders are loaded when first asked for, and a forked worker cannot reach the GPU.
        self.texts = {modality: cast(Any, generator).text for modality, generator in generators.items()}

    def __call__(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """Rows of examples -> the arguments of `packed_losses`.

        Returns:
            `input_ids`, `labels`, `segments` and `position_ids`, long[R, W]; `learned` and `targets`, long[L], which
            states (of the flat batch) predict which token, and `weights` float32[L]; by modality `media`
            float[M, 1, C] and `slots` long[M * N], `captions` (token ids by name) and `runs` long[M, S], the places in
            the flat batch.
        """
        ids = [[example["ids"] for example in row] for row in rows]
        segments, places = segments_of(ids, self.width)
        input_ids, labels = (
            rows_of([[example[name] for example in row] for row in rows], self.width, fill)
            for name, fill in (("ids", 0), ("labels", IGNORED))
        )
        media: dict[str, list[int]] = {}
        captions: dict[str, list[str]] = {}
        for example in (example for row in rows for example in row):
            for part in example["media"]:
                media.setdefault(part.modality, []).append(part.media)
            for part in example["captions"]:
                captions.setdefault(part.modality, []).append(part.media)
        learned = torch.zeros_like(labels, dtype=torch.bool)
        learned[:, :-1] = labels[:, 1:] != IGNORED
        learned = learned.flatten().nonzero().flatten()
        targets = labels.flatten()[learned + 1]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "segments": segments,
            "position_ids": places,
            "learned": learned,
            "targets": targets,
            "weights": 1 + (self.route_weight - 1) * torch.isin(targets, self.routes),
            "media": {modality: self.features[modality][numbers] for modality, numbers in media.items()},
            "slots": {name: (input_ids == self.slots[name]).flatten().nonzero().flatten() for name in media},
            "captions": {name: caption_tokens(self.texts[name], said) for name, said in captions.items()},
            "runs": {name: self._runs(input_ids, name) for name in captions},
        }

    def _runs(self, input_ids: Tensor, modality: str) -> Tensor:
        starts = self.signals.run_starts(input_ids, modality)  # [M, 2]
        return starts[:, :1] * self.width + starts[:, 1:] + torch.arange(len(self.signals.runs[modality]))


def packed_losses(
    model: AnyGenModel,
    decoder: Callable[[Tensor, Tensor, Tensor], Tensor],
    batch: Mapping[str, Any],
    media: Mapping[str, Tensor],
    conditions: Mapping[str, Mapping[str, Tensor]],
) -> AnyGenOutput:
    """The losses of `AnyGenModel.forward` for a batch of `Collator`, without a look at the device's values.

    Args:
        model: whose media each make one feature.
        decoder: embeddings float[R, W, D], mask bool[R, 1, W, W] and positions long[R, W] -> states float[R, W, D].
        batch: on the model's device.
        media: modality -> float[M, 1, C], the batch's features, perhaps moved.
        conditions: modality -> name -> float[M, ...], the targets.
    """
    ids = batch["input_ids"]
    embeds = model.signal_tokens.embed(ids, model.llm.embedding).flatten(0, 1)
    for modality, values in media.items():
        tokens = model.project_input(modality, model.encode(modality, values)).values.flatten(0, 1)
        embeds = embeds.index_copy(0, batch["slots"][modality], tokens.to(embeds.dtype))
    hidden = decoder(embeds.view(*ids.shape, -1), block_mask(batch["segments"]), batch["position_ids"])
    states = hidden.flatten(0, 1)
    output = AnyGenOutput(hidden_states=hidden)
    output.lm_loss = output.loss = token_loss(
        model.logits(states[batch["learned"]]), batch["targets"], batch["weights"]
    )
    losses = [
        model.alignment_loss(name, model.project(name, states[batch["runs"][name]]), target)
        for name, target in conditions.items()
    ]
    if losses:
        output.alignment_loss = torch.stack(losses).mean()
        output.loss = output.lm_loss + model.alignment_weight * output.alignment_loss
    return output
