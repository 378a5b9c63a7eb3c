"""Decoder alignment on a user's captions: the output projector learns the generator's own conditions.

    kind: decoder_alignment
    out: runs/decoder
    model: anygen-mini
    captions: {image: captions.txt}

No medium is made or read, and no diffusion model is in memory. Rows with media files as well, and `diffusion_weight`,
add the conditional diffusion loss through the frozen generator.

Source: caption-only alignment, MM-LLMs survey (arXiv:2401.13601) eq. 4, and eq. 5; NExT-GPT (arXiv:2309.05519) 4.2.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anygen.errors import ConfigError, ModalityError
from anygen.extension import output_modality
from anygen.messages import Message, TextPart
from anygen.model import CONFIG
from anygen.model_config import AnyGenConfig
from anygen.training.chat_rows import Shown, captioned, media_part
from anygen.training.data_rows import Rows, Source, read
from anygen.training.stage import Prepared, StageRecipe
from anygen.training.stage_data import Item, item
from anygen.training.stage_run import run

REQUESTS: dict[str, tuple[str, ...]] = {
    "image": ("Draw {caption}.", "Show me a picture of {caption}.", "{caption}", "I would like to see {caption}."),
    "video": ("Film {caption}.", "Show me a clip of {caption}.", "{caption}", "A video of {caption}, please."),
    "audio": ("Play {caption}.", "Let me hear {caption}.", "{caption}", "A sound of {caption}, please."),
}
"""How media are asked for where neither the recipe nor a plugin says; bare captions are among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderAlignmentRecipe(StageRecipe):
    """Captions, one source for each output modality."""

    captions: dict[str, Source]
    """Output modality -> a text file, one caption a line; or rows `{"caption": words}`, with `{MODALITY: file}` for the
    diffusion loss."""
    requests: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Output modality -> requests with {caption} in each."""
    answer: str = "{caption}"
    """What is said before the medium; may be empty."""

    def __post_init__(self) -> None:
        StageRecipe.__post_init__(self)
        if not self.captions:
            raise ConfigError("captions names no modality, as in captions: {image: captions.txt}")
        if not self.alignment_weight and not self.diffusion_weight:
            raise ConfigError("alignment_weight and diffusion_weight are both 0: nothing would be learned")
        for template in (template for templates in self.requests.values() for template in templates):
            if "{caption}" not in template:
                raise ConfigError(f"requests must say the caption, as in 'Make {{caption}}.', got '{template}'")


def prepare(recipe: DecoderAlignmentRecipe, config: AnyGenConfig) -> Prepared:
    """Reads and checks the captions.

    Raises:
        ConfigError: the model does not make a modality, or too many captions do not fit.
    """
    items: list[Item] = []
    for modality, source in recipe.captions.items():
        if modality not in config.outputs:
            raise ConfigError(
                f"captions: the model does not make {modality}, only {', '.join(config.outputs) or 'text'}"
            )
        asked, parse = recipe.requests.get(modality) or requests(modality), captioned(modality, medium=False)

        def made(
            rows: Rows, number: int, modality: str = modality, asked: tuple[str, ...] = asked, parse: Any = parse
        ) -> Item:
            medium: Shown = parse(rows, number)

            def talk(rng: random.Random) -> list[Message]:
                request = TextPart(rng.choice(asked).replace("{caption}", str(medium.caption)))
                said = recipe.answer.replace("{caption}", str(medium.caption))
                words = (TextPart(said),) if said else ()
                return [Message("user", (request,)), Message("assistant", (*words, media_part(modality, medium)))]

            return item(rows, number, talk, talk(random.Random(0)), length=len(str(medium.caption)) // 2)

        items += read(source, made, recipe.bad_rows)
    learns = recipe.trains and not all(part.startswith("output_projectors") for part in recipe.trains)
    return Prepared(items, exact=False, words=bool(learns or recipe.unfreeze))


def requests(modality: str) -> tuple[str, ...]:
    """How media of a modality are asked for: the plugin's own requests, if one declares it."""
    try:
        declared = output_modality(modality).requests
    except ModalityError:
        declared = ()
    return declared or REQUESTS.get(modality, ("Make {caption}.", "{caption}"))


def trains(recipe: DecoderAlignmentRecipe) -> list[str]:
    """What trains unless the recipe says otherwise: the projectors, of modalities that share one its owner's."""
    from anygen.loading import model_directory

    outputs = AnyGenConfig.load(model_directory(recipe.model) / CONFIG).outputs
    owners = [outputs[m].shares or m if m in outputs else m for m in recipe.captions]
    return [f"output_projectors.{owner}" for owner in dict.fromkeys(owners)]


def train(recipe: DecoderAlignmentRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/model`; result and errors as of `stage_run.run`, and as of `prepare`.

    Only output projectors train unless the recipe says otherwise; then nothing of an answer's words is learned, and
    requests that the model answered with media before are answered as before.
    """
    return run(recipe, out, lambda config: prepare(recipe, config), trains(recipe))
