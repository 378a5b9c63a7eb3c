"""What the generators conditioned on one text encoder's states share: the encoder, sampling and loss, the folder.

Source: Rombach et al. 2022 (arXiv:2112.10752).
Differs: the empty caption's condition is stored beside the weights, so that generating needs no text encoder in
memory; and a folder may name a part of another generator's folder instead of holding a copy:

    shared.json   {"vae": "../image/vae", "text_encoder": "../image/text_encoder", "tokenizer": "../image/tokenizer"}

"spatial" among them is the folder of an image UNet, whose layers a UNet over clips has between its own.

Shapes: B batch, L condition tokens, C condition width, c latent channels, h w latent sides, H W sides in pixels;
latents are [B, c, h, w], or [B, c, F, h, w] where a medium has F frames.
"""

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from anygen.component import SHARD
from anygen.config import Config
from anygen.errors import CheckpointError, ConfigError
from anygen.features import Condition, ConditionSpec
from anygen.generators.denoising import DenoisingGenerator, Predictor
from anygen.progress import quiet_libraries
from anygen.stepwise import Steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDS = "prompt_embeds"
SHARED = "shared.json"
SPATIAL = "spatial"
_SHAREABLE = ("vae", "text_encoder", "tokenizer", SPATIAL)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults(Config):
    """What `generate` uses where its caller says nothing; stored as `sampling.json`."""

    steps: int = 20
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Weight of the conditional direction; 1 switches guidance off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """The part of the way from noise (0) to the sample (1) that is guided; the steps beside it cost half."""

    def __post_init__(self) -> None:
        begin, end = self.guidance_interval
        if not 0 <= begin < end <= 1:
            raise ConfigError(f"guidance_interval: two numbers that rise between 0 and 1, not {[begin, end]}")


class TextConditioner:
    """Captions -> prompt embeddings: the last hidden states of a CLIP text encoder, padded to its full context."""

    def __init__(self, encoder: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Joins a `CLIPTextModel` and its tokenizer."""
        self.encoder, self.tokenizer = encoder, tokenizer

    @property
    def context(self) -> int:
        """L, the tokens that a caption is cut or padded to."""
        return self.encoder.config.max_position_embeddings

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """B captions -> int64[B, L], cut or padded to the encoder's context."""
        return self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.context,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def __call__(self, ids: Tensor) -> Tensor:
        """int64[B, L] -> float[B, L, C]. As in Stable Diffusion, padding is attended to."""
        return self.encoder(input_ids=ids).last_hidden_state


class LatentDiffusionGenerator(DenoisingGenerator):
    """VAE, UNet, noise schedule, and on demand the text encoder; a modality adds its shapes and its media."""

    folder_name: ClassVar[str]
    """What messages call a folder of such parts."""
    unet_class: ClassVar[str]
    """The UNet's class in diffusers."""
    pipeline_index: ClassVar[Mapping[str, Any]]
    """What `model_index.json` says beyond the five parts."""
    defaults_class: ClassVar[type[SamplingDefaults]] = SamplingDefaults

    def __init__(
        self,
        *,
        vae: Any,
        unet: Any,
        scheduler: Any,
        unconditional: Tensor,
        text: TextConditioner | Callable[[], TextConditioner],
        defaults: SamplingDefaults | None = None,
    ) -> None:
        """Joins loaded parts, and sets them to evaluation mode.

        Args:
            vae: an `AutoencoderKL`; maps pictures in [-1, 1] to latents and back.
            unet: of `unet_class`; predicts noise or velocity from (latents, time, prompt embeddings).
            scheduler: any diffusers scheduler; `generate` copies it, so that calls do not share state.
            unconditional: float[L, C], the empty caption's prompt embeddings.
            text: the text encoder, or a function that loads it when `encode_text` is first called.
            defaults: steps and guidance where a call states none.
        """
        self.vae, self.unet, self.scheduler = vae.eval(), unet.eval(), scheduler
        self.unconditional, self._text = unconditional, text
        self.defaults = defaults or self.defaults_class()
        self.condition_spec = ConditionSpec(shapes={EMBEDS: tuple(unconditional.shape)})

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Reads a diffusers folder; `unconditional.safetensors`, `sampling.json` and `shared.json` are ours, optional.

        Raises:
            CheckpointError: a part is missing or damaged.
        """
        import diffusers
        from safetensors.torch import load_file

        directory = Path(directory)
        shared = read_shared(directory)
        where = {part: directory / shared.get(part, part) for part in ("vae", "unet", "scheduler", *_SHAREABLE)}
        for part in ("vae", "unet", "scheduler", *(part for part in (SPATIAL,) if part in shared)):
            if not where[part].is_dir():
                shown = f"'{part}'" if part not in shared else f"'{part}' at {shared[part]}, where {SHARED} has it"
                raise CheckpointError(f"{directory} is not a {cls.folder_name} folder: it has no {shown}")
        try:
            vae: Any = diffusers.AutoencoderKL.from_pretrained(where["vae"], torch_dtype=dtype)
            unet = cls.load_unet(where["unet"], dtype, where[SPATIAL] if SPATIAL in shared else None)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: {error}") from error
        scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(where["scheduler"])

        def load_text() -> TextConditioner:
            from transformers import AutoTokenizer, CLIPTextModel

            with quiet_libraries():
                encoder: Any = CLIPTextModel.from_pretrained(where["text_encoder"], dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(where["tokenizer"])
            return TextConditioner(encoder.to(unet.device).eval(), tokenizer)

        text: TextConditioner | Callable[[], TextConditioner] = load_text
        if (stored := directory / "unconditional.safetensors").exists():
            unconditional = load_file(stored)[EMBEDS].to(dtype)
        else:
            text = load_text()
            with torch.no_grad():
                unconditional = text(text.tokenize([""]))[0]
        defaults = directory / "sampling.json"
        return cls(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            unconditional=unconditional,
            text=text,
            defaults=cls.defaults_class.load(defaults) if defaults.exists() else None,
        ).to(device)

    def save_pretrained(self, directory: str | Path, *, shared: Mapping[str, str] | None = None) -> None:
        """Writes a folder that `from_pretrained` reads, and the diffusers pipeline as well unless parts are shared.

        Args:
            directory: is made.
            shared: part ("vae", "text_encoder", "tokenizer" or "spatial") -> the folder, relative to `directory`, that
                holds it already. The caller vouches for its being the same; nothing is copied.

        Raises:
            ConfigError: `shared` names another part, an absolute path, or a folder that is not there.
        """
        from safetensors.torch import save_file

        directory, shared = Path(directory), dict(shared or {})
        directory.mkdir(parents=True, exist_ok=True)
        check_shared(shared)
        if absent := [path for path in shared.values() if not (directory / path).is_dir()]:
            raise ConfigError(f"shared parts: there is no folder {directory / absent[0]}")
        if "vae" not in shared:
            save_part(self.vae, directory / "vae")
        self.save_unet(directory / "unet", spatial=SPATIAL not in shared)
        self.scheduler.save_pretrained(directory / "scheduler")
        if "text_encoder" not in shared:
            self.text.encoder.save_pretrained(directory / "text_encoder", max_shard_size=SHARD)
        if "tokenizer" not in shared:
            self.text.tokenizer.save_pretrained(directory / "tokenizer")
        save_file({EMBEDS: self.unconditional.contiguous().cpu()}, directory / "unconditional.safetensors")
        self.defaults.save(directory / "sampling.json")
        if shared:
            _write_json(directory / SHARED, shared)
            return  # an index would promise diffusers parts that are not in this folder
        parts = {
            "scheduler": ["diffusers", type(self.scheduler).__name__],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", type(self.text.tokenizer).__name__],
            "unet": ["diffusers", self.unet_class],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        _write_json(directory / "model_index.json", dict(sorted((dict(self.pipeline_index) | parts).items())))

    @classmethod
    def load_unet(cls, directory: Path, dtype: torch.dtype, spatial: Path | None) -> Any:
        """The UNet, whose spatial layers lie in `spatial` if that is given.

        Raises:
            CheckpointError: the class has no UNet that could take them from there, or a weight does not fit.
        """
        import diffusers

        if spatial is not None:
            raise CheckpointError(f"{directory}: a {cls.unet_class} cannot have its spatial layers from another UNet")
        return getattr(diffusers, cls.unet_class).from_pretrained(directory, torch_dtype=dtype)

    def save_unet(self, directory: Path, *, spatial: bool) -> None:
        """Writes the UNet, without its spatial layers if `spatial` is not set.

        Raises:
            ConfigError: the class has no UNet that could be without them.
        """
        if not spatial:
            raise ConfigError(f"'{SPATIAL}': a {self.unet_class} cannot have its spatial layers from another UNet")
        save_part(self.unet, directory)

    @property
    def text(self) -> TextConditioner:
        """The text encoder, loaded on first use."""
        if not isinstance(self._text, TextConditioner):
            self._text = self._text()
        return self._text

    @property
    def factor(self) -> int:
        """Pixels a latent's side: how often the VAE halves."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of a picture of the UNet's own latent size."""
        side = self.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.factor, width * self.factor

    def to(self, device: torch.device | str) -> Self:
        """Moves every loaded part."""
        self.vae.to(device)
        self.unet.to(device)
        self.unconditional = self.unconditional.to(device)
        if isinstance(self._text, TextConditioner):
            self._text.encoder.to(device)
        return self

    @torch.no_grad()  # not inference_mode: its tensors are targets of training
    def encode_text(self, captions: Sequence[str]) -> Condition:
        """B captions -> `prompt_embeds` float[B, L, C]."""
        ids = self.text.tokenize(captions).to(self.text.encoder.device)
        return Condition({EMBEDS: self.text(ids)})

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents float[B, c, ...] -> pixels in [0, 1]."""

    def denoise(
        self,
        condition: Condition,
        noise: Callable[[], Tensor],
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Steps[Tensor]:
        """The guided sampling loop, step by step, for latents of any shape; returns float[B, c, ...].

        Args:
            condition: matches `condition_spec`.
            noise: draws float[B, c, ...] of unit variance; called once all else is known to fit.
            seeds: those that `noise` draws from, to be counted.
            steps: denoising steps.
            guidance_scale: 1 or less switches guidance off, and halves the work.

        Raises:
            ConfigError: the condition does not fit, or the seeds are not one a sample.
        """
        embeds = self.condition_spec.check(condition).tensors[EMBEDS].to(self.device, self.unet.dtype)

        def predictor(guided: bool) -> Predictor:
            told = torch.cat([self.unconditional.to(embeds).expand_as(embeds), embeds]) if guided else embeds
            return lambda latents, time: self.unet(latents, time, encoder_hidden_states=told, return_dict=False)[0]

        return self.guided_sampling(predictor, noise, len(embeds), seeds, steps, guidance_scale)

    def latent_loss(self, condition: Condition, latents: Tensor, generator: torch.Generator | None) -> Tensor:
        """Mean squared error of the UNet's prediction for float[B, c, ...] at random times.

        Args:
            condition: matches `condition_spec`; gradients flow into it, and nowhere else if the parts are frozen.
            latents: scaled as the UNet wants them.
            generator: for the noise and the times.
        """
        embeds = self.condition_spec.check(condition).tensors[EMBEDS].to(self.device, self.unet.dtype)
        return self.prediction_loss(
            lambda noisy, times: self.unet(noisy, times, encoder_hidden_states=embeds).sample, latents, generator
        )

    def _latent_sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(h, w) of the stated sides in pixels, or of the UNet's own."""
        sides = (height or self.size[0], width or self.size[1])
        if any(side % self.factor or side < self.factor for side in sides):
            raise ConfigError(
                f"height and width must be multiples of {self.factor} pixels, got {sides[0]} and {sides[1]}"
            )
        return sides[0] // self.factor, sides[1] // self.factor


def read_shared(directory: Path) -> dict[str, str]:
    """Part -> relative folder, of a generator's `shared.json`; empty without one.

    Raises:
        CheckpointError: it is not JSON, or not of that form.
    """
    if not (path := directory / SHARED).exists():
        return {}
    try:
        shared = json.loads(path.read_text(encoding="utf-8"))
        check_shared(shared)
    except (json.JSONDecodeError, UnicodeDecodeError, ConfigError) as error:
        raise CheckpointError(f"{path} does not say which parts are shared: {error}") from None
    return shared


def check_shared(shared: object) -> None:
    """Raises ConfigError unless `shared` maps shareable parts to relative folders."""
    if not isinstance(shared, dict):
        raise ConfigError(f'wanted is an object such as {{"vae": "../image/vae"}}, not {type(shared).__name__}')
    for part, path in shared.items():
        if part not in _SHAREABLE:
            raise ConfigError(f"'{part}' cannot be shared; what can: {', '.join(_SHAREABLE)}")
        if not isinstance(path, str) or not path or PurePosixPath(path).is_absolute() or "\\" in path or ":" in path:
            raise ConfigError(f"'{part}' must be a relative folder with forward slashes, not {path!r}")


def to_uint8(pixels: Tensor) -> list[Any]:
    """float[B, 3, H, W] in [0, 1] -> B arrays uint8[H, W, 3]."""
    return list((pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def save_part(part: Any, directory: Path) -> None:
    """Saves a diffusers model in shards, without the directory that it was loaded from, which diffusers would note."""
    part.save_pretrained(directory, max_shard_size=SHARD)
    config = directory / "config.json"
    known = json.loads(config.read_text(encoding="utf-8"))
    known.pop("_name_or_path", None)
    _write_json(config, known)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
