"""What generators are conditioned on, for those who align an LLM with it: targets of captions, and how to measure.

Shapes: B captions, L condition tokens, C condition width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anygen.errors import ConfigError
from anygen.generators.audioldm2 import GENERATED, AudioLDM2Generator, SoundTokens
from anygen.generators.base import Generator
from anygen.generators.latent import EMBEDS, LatentDiffusionGenerator
from anygen.registry import lookup

GENERATORS = {"image": "stable_diffusion", "video": "zeroscope", "audio": "audioldm2"}
"""Output modality -> the generator of anygen-mini, by its registered name."""


def load_generators(directories: Mapping[str, str], device: torch.device) -> dict[str, Generator]:
    """Output modality -> generator.

    Raises:
        ConfigError: a modality that anygen-mini does not make; lists those that it does.
    """
    if unknown := sorted(set(directories) - set(GENERATORS)):
        raise ConfigError(f"anygen-mini does not make {', '.join(unknown)}; it makes {', '.join(GENERATORS)}")
    return {
        modality: lookup("generator", GENERATORS[modality]).from_pretrained(directory, device=device)
        for modality, directory in directories.items()
    }


def caption_tokens(text: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    """B captions -> the token ids that a generator's text encoder reads, by name, on the CPU."""
    tokens = text.tokenize(captions)
    return {"ids": tokens} if isinstance(tokens, Tensor) else {"ids": tokens.ids, "mask": tokens.mask}


@torch.no_grad()
def caption_targets(generator: Any, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the text encoder makes of `caption_tokens`: name -> float[B, L, C], the generator's condition."""
    if isinstance(generator, LatentDiffusionGenerator):
        return {EMBEDS: generator.text.encoder(input_ids=tokens["ids"]).last_hidden_state}
    return generator.text(SoundTokens(tokens["ids"], tokens["mask"]))


def encode_captions(generator: Generator, captions: Sequence[str], batch_size: int = 512) -> dict[str, Tensor]:
    """The generator's conditions for any number of captions: name -> float16[B, L, C] on the CPU."""
    parts = [
        generator.encode_text(captions[row : row + batch_size]).tensors for row in range(0, len(captions), batch_size)
    ]
    return {name: torch.cat([part[name].to(torch.float16).cpu() for part in parts]) for name in parts[0]}


def alignment_metrics(generator: Any, captions: Sequence[str], floor: float = 0.1) -> dict[str, Tensor]:
    """For each tensor of the condition float[C, C]: differences as cross-attention sees them, in units of variance.

    Keys and values are linear in the condition, so the squared length of `(u - v) @ metric` is the mean of their
    squared differences over all cross-attention layers that read the tensor, plus `floor` of the plain distance. It is
    scaled so that the captions' own conditions differ by 1 from their mean: modalities, and the tensors of one, then
    count alike, and an error of 1 is that of always telling the mean.

    Args:
        generator: with a UNet and a text encoder.
        captions: some hundred, of all kinds.
        floor: in units of what the layers see of a mean direction.
    """
    targets, metrics = encode_captions(generator, captions), {}
    for name, maps in cross_attention(generator).items():
        gram = torch.stack([weight.T @ weight / weight.shape[0] for weight in maps]).sum(0)
        gram = gram / gram.diagonal().mean() * (1 - floor) + floor * torch.eye(len(gram), device=gram.device)
        values, vectors = torch.linalg.eigh(gram)
        metric = vectors * values.clamp(min=0).sqrt()
        told = targets[name].to(metric)
        spread = ((told - told.mean(0)) @ metric).square().mean().sqrt()
        metrics[name] = metric / spread.clamp(min=1e-6)
    return metrics


def cross_attention(generator: Any) -> dict[str, list[Tensor]]:
    """Tensor of the condition -> float[E, C], the weights of all keys and values that read it."""
    two = isinstance(generator, AudioLDM2Generator)
    found: dict[str, list[Tensor]] = {GENERATED: [], EMBEDS: []} if two else {EMBEDS: []}
    for name, layer in generator.unet.named_modules():
        # Temporal attention, in `temp_attentions` and `transformer_in`, reads no condition.
        if not (name.endswith(("attn2.to_k", "attn2.to_v")) and ".attentions." in name):
            continue
        read = EMBEDS
        if two:
            # A level has one attention for each entry of `cross_attention_dim`, in turn: None reads the latents
            # themselves, the first two places read GPT-2's states and those behind read T5's.
            widths = generator.unet.config.cross_attention_dim[0]
            place = int(name.split(".attentions.")[1].split(".")[0]) % len(widths)
            if widths[place] is None:
                continue
            read = GENERATED if place <= 1 else EMBEDS
        found[read].append(layer.weight.detach().float())
    return found
