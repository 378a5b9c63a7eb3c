"""anygen: any mix of text, image, video and audio in; an interleaved answer of all of them out.

    from anygen import AnyGenPipeline

    pipe = AnyGenPipeline.from_pretrained()
    reply = pipe("Draw a red apple.", seed=7)
    reply.images[0].save("apple.png")

Names are imported on first use, so that `import anygen` costs milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anygen.media import Audio, Image, Video
    from anygen.pipeline import AnyGenPipeline
    from anygen.reply import Reply

__version__ = "0.1.0"
__all__ = ["AnyGenPipeline", "Audio", "Image", "Reply", "Video", "__version__"]

_HOME = {
    "AnyGenPipeline": "anygen.pipeline",
    "Reply": "anygen.reply",
    "Image": "anygen.media",
    "Video": "anygen.media",
    "Audio": "anygen.media",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'anygen' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
