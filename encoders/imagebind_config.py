"""The sizes of an ImageBind, by trunk.

Source: ImageBind (arXiv:2305.05665), appendix B, and its released checkpoint.
Shapes: E output width (`out_dim`).
"""

from dataclasses import dataclass, replace
from typing import Self

from anygen.config import Config
from anygen.errors import ConfigError, ModalityError

TRUNKS = ("vision", "text", "audio", "depth", "thermal", "imu")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkConfig(Config):
    """What every modality's transformer has."""

    width: int
    blocks: int
    heads: int
    drop_path: float = 0.0
    """Probability of dropping the last block's branches in training; earlier blocks' rises evenly to it."""

    def __post_init__(self) -> None:
        if min(self.width, self.blocks, self.heads) < 1 or self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of heads {self.heads}, or blocks < 1")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path is {self.drop_path}, not in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig(TrunkConfig):
    """Images and clips; the only trunk with a norm before its blocks, and the only one without a logit scale."""

    image_size: int = 224
    """Height and width in pixels."""
    patch: int = 14
    frames: int = 2
    """Frames of a clip, all spanned by each patch; a still image is taken as this many equal frames."""
    clip_seconds: float = 2.0
    """Length of each of the five clips that a video is read in."""
    drop_patches: float = 0.0
    """Share of each picture's patches that training leaves out, drawn at random (FLIP, arXiv:2212.00794)."""

    def __post_init__(self) -> None:
        TrunkConfig.__post_init__(self)
        if not 0 <= self.drop_patches < 1:
            raise ConfigError(f"drop_patches is {self.drop_patches}, not in [0, 1)")
        if self.image_size % self.patch:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig(TrunkConfig):
    """Causal; the feature is read at the end-of-text token, which must have the largest id of the vocabulary."""

    vocab_size: int = 49408
    context_length: int = 77
    logit_scale: float = 1 / 0.07
    """Initial value; learned, at most 100."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaneConfig(TrunkConfig):
    """One-channel planes: spectrograms, depth and thermal maps. Attention has one learned key and value more."""

    height: int = 224
    plane_width: int = 224
    patch: int = 16
    stride: int = 16
    logit_scale: float
    """Fixed."""

    @property
    def patches(self) -> int:
        """Patches of a plane; borders that hold no whole patch are left out."""
        rows = (self.height - self.patch) // self.stride + 1
        return rows * ((self.plane_width - self.patch) // self.stride + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionConfig(TrunkConfig):
    """IMU: accelerometer and gyroscope. Attention has one learned key and value more."""

    channels: int = 6
    steps: int = 2000
    kernel: int = 8
    """Steps of a token."""
    head_dropout: float = 0.5
    logit_scale: float = 5.0
    """Fixed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBindConfig(Config):
    """A trunk that is None does not exist."""

    out_dim: int = 1024
    """E, the width of the common space."""
    vision: VisionConfig | None = None
    text: TextConfig | None = None
    audio: PlaneConfig | None = None
    depth: PlaneConfig | None = None
    thermal: PlaneConfig | None = None
    imu: MotionConfig | None = None

    def __post_init__(self) -> None:
        if not self.trunks:
            raise ConfigError(f"an ImageBind needs one of {', '.join(TRUNKS)}")

    @property
    def trunks(self) -> dict[str, TrunkConfig]:
        """The trunks that exist, in a fixed order."""
        return {name: trunk for name in TRUNKS if (trunk := getattr(self, name)) is not None}

    def only(self, trunk: str) -> Self:
        """The same with that one trunk.

        Raises:
            ModalityError: it does not exist; lists those that do.
        """
        if trunk not in self.trunks:
            raise ModalityError(f"this ImageBind has no trunk '{trunk}'; it has {', '.join(self.trunks)}")
        return replace(self, **{name: None for name in TRUNKS if name != trunk})

    @classmethod
    def huge(cls) -> Self:
        """The published model, 1,200.8 million parameters."""
        return cls(
            out_dim=1024,
            vision=VisionConfig(width=1280, blocks=32, heads=16),
            text=TextConfig(width=1024, blocks=24, heads=16),
            audio=PlaneConfig(
                width=768,
                blocks=12,
                heads=12,
                drop_path=0.1,
                height=128,
                plane_width=204,
                stride=10,
                logit_scale=20,
            ),
            depth=PlaneConfig(width=384, blocks=12, heads=8, logit_scale=5),
            thermal=PlaneConfig(width=768, blocks=12, heads=12, logit_scale=10),
            imu=MotionConfig(width=512, blocks=6, heads=8, drop_path=0.7),
        )

    @classmethod
    def mini(cls, vocab_size: int, *, audio: bool = False) -> Self:
        """Images of 128 pixels, short clips and short texts, some 8 million parameters; 2 million more with sounds.

        Its clips are of half a second, so that two frames of one show how something moves.
        """
        return cls(
            out_dim=256,
            vision=VisionConfig(width=256, blocks=6, heads=4, image_size=128, patch=8, clip_seconds=0.5),
            text=TextConfig(width=192, blocks=4, heads=4, vocab_size=vocab_size, context_length=32),
            audio=PlaneConfig(width=192, blocks=4, heads=4, height=128, plane_width=204, logit_scale=20)
            if audio
            else None,
        )
