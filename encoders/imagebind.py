"""ImageBind: one embedding space for images, video, text, audio, depth, thermal and motion.

Each modality has its own tokens, transformer and head; a modality is a key, present or not:

    tokens ─► transformer ─► norm ─► class token (text: last token) ─► projection ─► length 1 ─► logit scale

Source: ImageBind (arXiv:2305.05665) and its released checkpoint `imagebind_huge`, whose 1,311 keys load unchanged.
Differs: nothing in the values; other than the release it takes only the sizes it was configured for.
Shapes: B batch, S clips of a sample, T tokens, C trunk width, E output width (`out_dim`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anygen.component import Component, load_strict, read_safetensors
from anygen.encoders.base import Encoder
from anygen.encoders.imagebind_clips import sound_values, video_values
from anygen.encoders.imagebind_config import (
    TRUNKS,
    ImageBindConfig,
    MotionConfig,
    PlaneConfig,
    TextConfig,
    TrunkConfig,
    VisionConfig,
)
from anygen.encoders.imagebind_inputs import image_values, load_tokenizer, sensor_values, thermal_values, token_ids
from anygen.encoders.imagebind_layers import (
    Head,
    LogitScale,
    MotionTokens,
    PatchTokens,
    Stem,
    Transformer,
    Tubelets,
    WordTokens,
)
from anygen.errors import ConfigError, ModalityError
from anygen.features import Features


class ImageBindModel(Component):
    """All trunks of a configuration, with the parameter names of the published weights."""

    config_class = ImageBindConfig
    config: ImageBindConfig

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        self.config = config
        trunks = config.trunks
        self.modality_preprocessors = nn.ModuleDict({name: _tokens(name, trunks[name]) for name in trunks})
        self.modality_trunks = nn.ModuleDict({name: _transformer(trunks[name]) for name in trunks})
        self.modality_heads = nn.ModuleDict({name: _head(trunks[name], config.out_dim) for name in trunks})
        self.modality_postprocessors = nn.ModuleDict({name: _scale(trunks[name]) for name in trunks})

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embeds each trunk's inputs; more than one clip a sample are averaged.

        Args:
            inputs: by trunk: vision float[B, 3, H, W] or float[B, S, 3, frames, H, W], text long[B, T], audio
                float[B, 1, bins, steps] or float[B, S, 1, bins, steps], depth and thermal float[B, 1, H, W],
                imu float[B, channels, steps].

        Returns:
            By trunk float[B, E]: the mean over clips of vectors of length 1, times the trunk's logit scale (vision
            has none). As in the release the mean is not brought back to length 1: that is `embed`.

        Raises:
            ModalityError: a trunk does not exist.
            MediaError: a tensor has another shape.
        """
        return {
            name: self.modality_postprocessors[self._known(name)](self._pooled(name, values)).to(self.dtype)
            for name, values in inputs.items()
        }

    def embed(self, trunk: str, values: Tensor) -> Tensor:
        """Inputs as for `forward` -> float[B, E] of length 1, before the logit scale. Raises the same."""
        return F.normalize(self._pooled(trunk, values), dim=-1).to(self.dtype)

    def tokens(self, trunk: str, values: Tensor) -> Tensor:
        """Inputs as for `forward` -> float[B, S * T, C], the normed tokens that pooling picks from.

        The class token comes first in every clip; text has none. Raises the same.
        """
        hidden = self._hidden(trunk, values)  # [B * S, T, C]
        return hidden.reshape(len(values), -1, hidden.shape[-1])

    def logit_scale(self, trunk: str) -> Tensor:
        """float[]; the factor between `embed` and `forward` for a single clip.

        Raises:
            ModalityError: the trunk does not exist, or is vision, which has none.
        """
        scale = self.modality_postprocessors[self._known(trunk)]
        if isinstance(scale, nn.Identity):
            raise ModalityError(f"the trunk '{trunk}' has no logit scale")
        return scale(torch.ones((), device=self.device))

    def _hidden(self, trunk: str, values: Tensor) -> Tensor:
        # clips [B, S, ...] -> [B * S, ...]
        tokens = self.modality_preprocessors[self._known(trunk)](values.flatten(0, 1) if values.ndim >= 5 else values)
        return self._head(trunk).norm(self.modality_trunks[trunk](tokens))

    def _pooled(self, trunk: str, values: Tensor) -> Tensor:
        hidden = self._hidden(trunk, values)  # [B * S, T, C]
        if trunk == "text":
            picked = hidden[torch.arange(len(hidden), device=hidden.device), values.argmax(dim=-1)]
        else:
            picked = hidden[:, 0]
        units = self._head(trunk).project(picked)  # [B * S, E]
        return units.reshape(len(values), -1, self.config.out_dim).mean(1)

    def _known(self, trunk: str) -> str:
        if trunk not in self.modality_trunks:
            raise ModalityError(f"this ImageBind has no trunk '{trunk}'; it has {', '.join(self.modality_trunks)}")
        return trunk

    def _head(self, trunk: str) -> Head:
        head = self.modality_heads[trunk]
        return cast(Head, head["proj"] if isinstance(head, nn.ModuleDict) else head)


class ImageBindEncoder(Encoder):
    """One modality of an ImageBind; the trunks of the others are neither built nor read.

    Args:
        config: of an ImageBind that has the trunk.
        modality: image, video, text, audio, depth, thermal or imu.
        features: "pooled" gives one token, the embedding of length 1 (T = 1, C = E); "tokens" gives the sequence
            that pooling picks from (C = trunk width).
        tokenizer: only for text: a `tokenizers.Tokenizer`.
    """

    config_class = ImageBindConfig
    config: ImageBindConfig
    name: ClassVar[str] = "imagebind"

    def __init__(
        self,
        config: ImageBindConfig,
        *,
        modality: str = "image",
        features: Literal["pooled", "tokens"] = "pooled",
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        if features not in ("pooled", "tokens"):
            raise ConfigError(f"features is '{features}'; known: pooled, tokens")
        self.trunk = _trunk_of(modality)
        self.config = config.only(self.trunk)
        self.modality, self.features, self.tokenizer = modality, features, tokenizer
        self.model = ImageBindModel(self.config)
        self.feature_dim = config.out_dim if features == "pooled" else self.config.trunks[self.trunk].width

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, modality: str = "image", **kwargs: Any) -> Self:
        """Reads one modality of the ImageBind in `directory`, for text also its `tokenizer.json`.

        Raises:
            ConfigError: the configuration does not fit.
            ModalityError: the ImageBind has no trunk for `modality`.
            CheckpointError: a file or key of the trunk is missing, unexpected or mis-shaped.
        """
        directory = Path(directory)
        config = ImageBindConfig.load(directory / "config.json")
        encoder = cls(config, modality=modality, **kwargs)
        if config.text is not None and modality == "text" and encoder.tokenizer is None:
            encoder.tokenizer = load_tokenizer(directory / "tokenizer.json", config.text.vocab_size)
        state = {  # a memory map: what is left out here is never read
            key: value for key, value in read_safetensors(directory).items() if f".{encoder.trunk}." in key
        }
        load_strict(encoder.model, state, f"{cls.__name__} ({modality}) from {directory}")
        return encoder.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes an ImageBind of this one trunk, for text with its tokenizer."""
        self.model.save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save(str(Path(directory) / "tokenizer.json"))

    def preprocess(self, media: Sequence[Any]) -> dict[str, Tensor]:
        """Media values -> `{"inputs": Tensor}`, as `ImageBindModel.forward` takes them.

        Args:
            media: `Image`, `Video` or `Audio` values; text as str; thermal pictures as `Image` values; depth and
                thermal maps and IMU readings as arrays or tensors of the shape that the trunk takes.

        Raises:
            MediaError: a sample has another shape, or a sound is too short.
            ConfigError: a text encoder was built without a tokenizer.
        """
        return {"inputs": self._values(media)}

    def forward(self, **tensors: Tensor) -> Features:
        """`inputs` as in `preprocess` -> values float[B, T, C], mask bool[B, T].

        T is 1 if pooled. Otherwise it counts the tokens of all clips; text is masked behind its last token.
        """
        values = tensors["inputs"]
        if values.is_floating_point():
            values = values.to(self.dtype)
        if self.features == "pooled":
            pooled = self.model.embed(self.trunk, values).unsqueeze(1)
            return Features(pooled, torch.ones(pooled.shape[:2], dtype=torch.bool, device=pooled.device))
        tokens = self.model.tokens(self.trunk, values)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if self.trunk == "text":
            mask = torch.arange(tokens.shape[1], device=tokens.device) <= values.argmax(-1, keepdim=True)
        return Features(tokens, mask)

    def set_image_size(self, size: int) -> None:
        """Reads pictures and clips of `size` x `size` pixels from now on; positions are interpolated.

        Source: the bicubic interpolation of positions of DINO (arXiv:2104.14294), which ImageBind's release uses.

        Raises:
            ConfigError: it reads no pictures, the size is no multiple of the patch, or changes the number of features.
        """
        trunk = self.config.trunks[self.trunk]
        if not isinstance(trunk, VisionConfig):
            raise ConfigError(f"an ImageBind encoder of {self.modality} reads no pictures, so it has no image size")
        if self.features == "tokens" and size != trunk.image_size:
            raise ConfigError(f"at {size} pixels there are other numbers of tokens than at {trunk.image_size}")
        config = replace(self.config, vision=replace(trunk, image_size=size))
        tokens = cast(PatchTokens, self.model.modality_preprocessors[self.trunk])
        tokens.resize(size // trunk.patch, ((3, size, size), (3, trunk.frames, size, size)))
        self.config = self.model.config = config

    def _values(self, media: Sequence[Any]) -> Tensor:
        trunk = self.config.trunks[self.trunk]
        if isinstance(trunk, VisionConfig):
            if self.modality == "video":
                return video_values(media, trunk.image_size, trunk.frames, trunk.clip_seconds)
            return image_values([image.pil for image in media], trunk.image_size)
        if isinstance(trunk, TextConfig):
            if self.tokenizer is None:
                raise ConfigError("an ImageBind text encoder needs a tokenizer")
            return token_ids(self.tokenizer, media, trunk.context_length)
        if isinstance(trunk, MotionConfig):
            return sensor_values(media, (trunk.channels, trunk.steps))
        assert isinstance(trunk, PlaneConfig)
        if self.trunk == "audio":
            return sound_values(media, trunk.height, trunk.plane_width)
        if self.trunk == "thermal" and trunk.height == trunk.plane_width:
            return thermal_values(media, trunk.height)
        return sensor_values(media, (1, trunk.height, trunk.plane_width))


_TRUNK_OF = {"image": "vision", "video": "vision"} | {name: name for name in TRUNKS[1:]}


def _trunk_of(modality: str) -> str:
    if modality not in _TRUNK_OF:
        raise ModalityError(f"ImageBind has no modality '{modality}'; it has {', '.join(_TRUNK_OF)}")
    return _TRUNK_OF[modality]


def _tokens(name: str, trunk: TrunkConfig) -> nn.Module:
    width = trunk.width
    if isinstance(trunk, VisionConfig):
        size = trunk.image_size
        # the release repeats still images in step 0; `Tubelets` has no need to
        stem = Stem(nn.Sequential(nn.Identity(), Tubelets(width, trunk.frames, trunk.patch)), None)
        shapes = ((3, size, size), (3, trunk.frames, size, size))
        patches, drop = (size // trunk.patch) ** 2, trunk.drop_patches
        return PatchTokens(stem, "rgbt_stem", width=width, patches=patches, shapes=shapes, drop=drop)
    if isinstance(trunk, TextConfig):
        return WordTokens(width, vocab_size=trunk.vocab_size, context_length=trunk.context_length)
    if isinstance(trunk, PlaneConfig):
        stem = Stem(nn.Conv2d(1, width, trunk.patch, stride=trunk.stride, bias=False), nn.LayerNorm(width))
        stem_name = "depth_stem" if name == "depth" else "rgbt_stem"
        shapes = ((1, trunk.height, trunk.plane_width),)
        return PatchTokens(stem, stem_name, width=width, patches=trunk.patches, shapes=shapes)
    assert isinstance(trunk, MotionConfig)
    return MotionTokens(width, channels=trunk.channels, steps=trunk.steps, kernel=trunk.kernel)


def _transformer(trunk: TrunkConfig) -> Transformer:
    return Transformer(
        trunk.width,
        trunk.blocks,
        trunk.heads,
        pre_norm=isinstance(trunk, VisionConfig),
        add_bias_kv=isinstance(trunk, (PlaneConfig, MotionConfig)),
        drop_path=trunk.drop_path,
        causal=isinstance(trunk, TextConfig),
    )


def _head(trunk: TrunkConfig, out_dim: int) -> nn.Module:
    if isinstance(trunk, TextConfig):
        return nn.ModuleDict({"proj": Head(trunk.width, out_dim)})
    if isinstance(trunk, MotionConfig):
        return Head(trunk.width, out_dim, nn.Identity(), nn.Dropout(trunk.head_dropout))
    return Head(trunk.width, out_dim, nn.Identity())


def _scale(trunk: TrunkConfig) -> nn.Module:
    if isinstance(trunk, (TextConfig, PlaneConfig, MotionConfig)):
        return nn.Sequential(nn.Identity(), LogitScale(trunk.logit_scale, learned=isinstance(trunk, TextConfig)))
    return nn.Identity()
