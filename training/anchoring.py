"""Anchors an input projector in the LLM's vocabulary: a picture's slots start as the embeddings of its name's tokens.

The LLM reads names already, so from there the LM loss has little left to teach, and no LLM runs in this stage.
Source: P-Former's vocabulary loss in DLP (arXiv:2307.07063), where prompts are pulled to LM embeddings.
Differs: the targets are the tokens of the concept's own name, not the nearest rows.

Shapes: P pictures, N slots, C feature width, D LLM width.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.config import Config
from anygen.encoders.imagebind import ImageBindEncoder
from anygen.model import AnyGenModel
from anygen.model_config import AnyGenConfig, PartConfig
from anygen.training.instruction import encode_pool
from anygen.training.loop import Progress, RunLog
from anygen.training.pictures import PictureSource, load_icons


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchoringRecipe(Config):
    """Everything that decides the result."""

    icons: str
    """Directory of the built icon set."""
    model: str
    """Directory of the model whose input projector is trained."""
    encoder: str
    """Directory of the trained ImageBind."""
    llm: str = "smollm2-135m-instruct"
    checksum: str | None = None
    """The icon set's checksum; None accepts any."""
    prompt_tokens: int = 8
    """N; a projector of another number is built anew."""
    pool: int = 60_000
    batch_size: int = 512
    steps: int = 6000
    minutes: float | None = None
    learning_rate: float = 1e-3
    seed: int = 0


def name_embeddings(labels: list[str], tokenizer: Any, embedding: Tensor, slots: int) -> Tensor:
    """The embeddings of each name's first `slots` tokens, filled up with those of a space: float32[L, N, D]."""
    space = tokenizer(" ", add_special_tokens=False).input_ids[0]
    rows = [tokenizer(" " + label, add_special_tokens=False).input_ids[:slots] for label in labels]
    return embedding[torch.tensor([row + [space] * (slots - len(row)) for row in rows])].float()


def with_slots(model: AnyGenModel, slots: int) -> AnyGenModel:
    """The same model with a fresh input projector of `slots` tokens a picture."""
    modality = model.settings.modalities["image"]
    assert modality.input is not None
    projector = PartConfig(name="mlp", options={"tokens": slots})
    changed = replace(modality, input=replace(modality.input, slots=slots, projector=projector))
    config: AnyGenConfig = replace(model.settings, modalities=model.settings.modalities | {"image": changed})
    other = AnyGenModel(config, model.llm, cast(Any, dict(model.encoders)))
    other.signal_tokens.load_state_dict(model.signal_tokens.state_dict())
    other.output_projectors.load_state_dict(model.output_projectors.state_dict())
    return other


def train(recipe: AnchoringRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/model`, where only the input projector is new."""
    from anygen import hub

    torch.manual_seed(recipe.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log, icons = RunLog(out, "anchoring"), load_icons(recipe.icons, recipe.checksum)
    encoder = ImageBindEncoder.from_pretrained(recipe.encoder, modality="image").float().to(device)
    pool = encode_pool(PictureSource(icons, seed=recipe.seed + 5, device=device), encoder, recipe.pool)
    llm_directory = hub.resolve(recipe.llm)
    model = AnyGenModel.from_pretrained(
        recipe.model, dtype=torch.float32, encoders=False, resolve=lambda _: llm_directory
    )
    if model.settings.slots["image"] != recipe.prompt_tokens:
        model = with_slots(model, recipe.prompt_tokens)
    labels = [concept.label for concept in icons.concepts]
    embedding = cast(Tensor, model.llm.embedding.weight).detach()
    names = name_embeddings(labels, model.llm.tokenizer, embedding, recipe.prompt_tokens).to(device)
    features = pool.features.to(device)
    concepts = torch.tensor([picture.concept for picture in pool.shown], device=device)
    projector = model.input_projectors["image"].to(device).train()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    progress, loss = Progress(recipe.steps, recipe.minutes), torch.zeros(())
    scale = names.var()
    while not progress.done:
        for group in optimizer.param_groups:
            group["lr"] = progress.learning_rate(recipe.learning_rate, warmup=100)
        rows = torch.randint(len(features), (recipe.batch_size,), device=device)
        made = projector(model.encode("image", features[rows])).values
        loss = F.mse_loss(made, names[concepts[rows]]) / scale
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        if progress.step % 200 == 0 or progress.done:
            log.write(step=progress.step, loss=loss.item())
    model.to("cpu").save_pretrained(out / "model", dtype=torch.bfloat16, parts=False)
    log.write(final=True, step=progress.step, loss=loss.item())
    return {"loss": loss.item(), "steps": float(progress.step)}
