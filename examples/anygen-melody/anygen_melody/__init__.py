"""Melodies as an answer of anygen."""

from pathlib import Path

from anygen.extension import OutputModality, register_output
from anygen.model_config import PartConfig
from anygen_melody.composer import Composer, ComposerConfig
from anygen_melody.melody import INSTRUMENTS, Melody

__all__ = ["INSTRUMENTS", "MELODY", "Composer", "ComposerConfig", "Melody"]

MELODY = register_output(
    OutputModality(
        media=Melody,
        generator=Composer,
        name="composer",
        condition={"melody": (4, 32)},
        example=lambda: Composer(ComposerConfig(width=8)),
        weights=Path(__file__).parent / "weights",
        projector=PartConfig(name="mlp", options={"width": 256}),
        requests=("Compose {caption}.", "Play me {caption}.", "I want to hear {caption}."),
        talk=(
            "What is a melody?",
            "Who composed the Moonlight Sonata?",
            "How do I learn the piano?",
            "What is a scale?",
        ),
    )
)
