"""AudioLDM2 from diffusers' components, conditioned on two tensors: eight generated states and a text sequence.

Source: Liu et al. 2023 (arXiv:2308.05734); classifier-free guidance, Ho & Salimans 2022 (arXiv:2207.12598). The
sampling loop equals `AudioLDM2Pipeline` given all of its conditions, and `SoundText` equals its `encode_prompt` for one
caption (tests/generators/test_audioldm2.py holds both to that).
Differs: each sample's noise is drawn from its own seed; the empty caption's condition is stored beside the weights; a
caption is padded to a fixed length, and GPT-2 counts positions without the padding, so that a condition does not depend
on its batch; sounds come out levelled, and where `sampling.json` says so refined (`mel.refined`). A folder without
CLAP, such as the embedded default's, gives the projection the mean of the T5 states where CLAP's one vector stands
otherwise.

**The mask travels in the condition.** AudioLDM2's UNet is told which rows of `prompt_embeds` are padding, but a
projector that stands in for the text encoder gives embeddings alone. So the rows of padding are zero in what
`encode_text` returns, and `text_mask` reads the mask back from the rows' sizes. For text it is exactly the tokenizer's;
a projector that is fitted to such targets predicts the length along with the rows, and its mask is where rows are
nearer to text than to nothing.

Shapes: B batch, L text tokens, C1 and C2 widths of the two conditions, c latent channels, T frames, F mel bins,
N samples.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from anygen.component import SHARD
from anygen.errors import CheckpointError, ConfigError
from anygen.features import Condition, ConditionSpec
from anygen.generators.denoising import DenoisingGenerator, Predictor
from anygen.generators.latent import SamplingDefaults, save_part
from anygen.generators.mel import LogMel, MelConfig, faded, levelled, refined
from anygen.progress import quiet_libraries
from anygen.stepwise import Steps

GENERATED, EMBEDS = "generated_prompt_embeds", "prompt_embeds"
GENERATED_TOKENS = 8
"""States that GPT-2 adds; every published checkpoint has so many."""
MASK_THRESHOLD = 0.25
"""A row is padding if its root mean square is below this share of the sample's largest."""
MOST_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundDefaults(SamplingDefaults):
    """What `generate` uses where its caller says nothing; stored as `sampling.json`."""

    steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 3.5
    """Weight of the conditional direction; 1 switches guidance off."""
    seconds: float = 10.24
    """Length of a sound."""
    refinement: int = 0
    """Rounds of `mel.refined` behind the vocoder. Large vocoders need none; 8 make up for most of what a small one
    lacks."""

    def __post_init__(self) -> None:
        SamplingDefaults.__post_init__(self)
        if self.refinement < 0:
            raise ConfigError(f"refinement counts rounds, 0 or more, got {self.refinement}")


@dataclass(frozen=True, slots=True)
class SoundTokens:
    """Captions as token ids, for T5 and, where there is one, for CLAP."""

    ids: Tensor
    """int64[B, L]."""
    mask: Tensor
    """int64[B, L], 0 where a caption is padded."""
    clap: tuple[Tensor, Tensor] | None = None
    """Ids and mask, int64[B, M] each."""


class SoundText(nn.Module):
    """Captions -> both conditions: T5's states, and what GPT-2 continues the projected states with."""

    def __init__(
        self,
        *,
        sequence: Any,
        tokenizer: Any,
        projection: Any,
        language_model: Any,
        context: int,
        clap: Any = None,
        clap_tokenizer: Any = None,
    ) -> None:
        """Joins loaded parts.

        Args:
            sequence: a `T5EncoderModel`.
            tokenizer: its tokenizer.
            projection: an `AudioLDM2ProjectionModel`; its first input is as wide as CLAP's vector or, without CLAP,
                as T5's states.
            language_model: a `GPT2LMHeadModel`, whose head is never used.
            context: L, the tokens that a caption is cut or padded to.
            clap: a `ClapModel` or None.
            clap_tokenizer: its tokenizer.
        """
        super().__init__()
        self.sequence, self.projection, self.language_model, self.clap = sequence, projection, language_model, clap
        self.tokenizer, self.clap_tokenizer, self.context = tokenizer, clap_tokenizer, context

    def tokenize(self, captions: Sequence[str]) -> SoundTokens:
        """B captions -> token ids, on the CPU."""
        captions = list(captions)
        words = self.tokenizer(
            captions, padding="max_length", max_length=self.context, truncation=True, return_tensors="pt"
        )
        clap = None
        if self.clap is not None:
            heard = self.clap_tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
            clap = heard.input_ids, heard.attention_mask
        return SoundTokens(words.input_ids, words.attention_mask, clap)

    def forward(self, tokens: SoundTokens) -> dict[str, Tensor]:
        """The conditions: `generated_prompt_embeds` float[B, 8, C1], `prompt_embeds` float[B, L, C2]."""
        states = self.sequence(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state
        padded = tokens.mask[..., None].to(states.dtype)
        if self.clap is not None and tokens.clap is not None:
            ids, mask = tokens.clap
            summary = self.clap.get_text_features(ids, attention_mask=mask).pooler_output[:, None]
        else:
            summary = (states * padded).sum(1, keepdim=True) / padded.sum(1, keepdim=True).clamp(min=1)
        projected = self.projection(
            hidden_states=summary,
            hidden_states_1=states,
            attention_mask=torch.ones_like(tokens.mask[:, :1]),
            attention_mask_1=tokens.mask,
        )
        generated = continued(self.language_model.transformer, projected.hidden_states, projected.attention_mask)
        return {GENERATED: generated, EMBEDS: states * padded}


def continued(gpt2: Any, states: Tensor, mask: Tensor, count: int = GENERATED_TOKENS) -> Tensor:
    """The `count` hidden states that GPT-2 appends, each read from all before it: float[B, count, C1].

    Args:
        gpt2: a `GPT2Model`.
        states: float[B, S, C1], its input embeddings.
        mask: int64[B, S], 0 for padding, which takes no position.
    """
    first = states.shape[1]
    for _ in range(count):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        last = gpt2(inputs_embeds=states, attention_mask=mask, position_ids=places, use_cache=False)
        states = torch.cat([states, last.last_hidden_state[:, -1:]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return states[:, first:]


def text_mask(embeds: Tensor) -> Tensor:
    """Which rows of `prompt_embeds` are text: float[B, L, C2] -> int64[B, L]. The first row always is."""
    size = embeds.detach().float().square().mean(-1).sqrt()
    mask = size > MASK_THRESHOLD * size.amax(1, keepdim=True)
    mask[:, 0] = True
    return mask.long()


class AudioLDM2Generator(DenoisingGenerator):
    """A latent-diffusion sound generator: mel autoencoder, UNet, noise schedule, vocoder, and on demand the text side.

    Sounds have the vocoder's sampling rate, one channel, the loudness of `mel.LOUDNESS` and the length asked for.
    """

    modality: ClassVar[str] = "audio"

    def __init__(
        self,
        *,
        vae: Any,
        unet: Any,
        vocoder: Any,
        scheduler: Any,
        unconditional: dict[str, Tensor],
        text: SoundText | Callable[[], SoundText],
        defaults: SoundDefaults | None = None,
    ) -> None:
        """Joins loaded parts.

        Args:
            vae: an `AutoencoderKL` of one channel; maps log-mel spectrograms to latents and back.
            unet: an `AudioLDM2UNet2DConditionModel`; predicts noise or velocity.
            vocoder: a `SpeechT5HifiGan`; maps log-mel spectrograms to waveforms.
            scheduler: any diffusers scheduler; `generate` copies it, so that calls do not share state.
            unconditional: the empty caption's conditions, float[8, C1] and float[L, C2].
            text: the text side, or a function that loads it when `encode_text` is first called.
            defaults: steps, guidance and length where a call states none.
        """
        self.vae, self.unet, self.vocoder, self.scheduler = vae.eval(), unet.eval(), vocoder.eval(), scheduler
        self.unconditional, self._text = dict(unconditional), text
        self.defaults = defaults or SoundDefaults()
        self.condition_spec = ConditionSpec(
            shapes={name: tuple(self.unconditional[name].shape) for name in (GENERATED, EMBEDS)}
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        context: int = 64,
    ) -> Self:
        """Reads a diffusers folder; `unconditional.safetensors` and `sampling.json` are ours and optional.

        Args:
            context: L, where no stored empty condition tells it.

        Raises:
            CheckpointError: a part is missing or damaged.
        """
        from diffusers import AudioLDM2UNet2DConditionModel, AutoencoderKL, DPMSolverMultistepScheduler
        from safetensors.torch import load_file
        from transformers import SpeechT5HifiGan

        directory = Path(directory)
        for part in ("vae", "unet", "vocoder", "scheduler"):
            if not (directory / part).is_dir():
                raise CheckpointError(f"{directory} is not an AudioLDM2 folder: it has no '{part}'")
        try:
            vae: Any = AutoencoderKL.from_pretrained(directory, subfolder="vae", torch_dtype=dtype)
            unet: Any = AudioLDM2UNet2DConditionModel.from_pretrained(directory, subfolder="unet", torch_dtype=dtype)
            with quiet_libraries():
                vocoder: Any = SpeechT5HifiGan.from_pretrained(directory / "vocoder", dtype=dtype)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: {error}") from error
        scheduler = DPMSolverMultistepScheduler.from_pretrained(directory, subfolder="scheduler")
        stored = directory / "unconditional.safetensors"
        unconditional = {name: row.to(dtype) for name, row in load_file(stored).items()} if stored.exists() else {}
        length = len(unconditional[EMBEDS]) if unconditional else context

        def load_text() -> SoundText:
            return load_sound_text(directory, length, dtype).to(unet.device)

        text: SoundText | Callable[[], SoundText] = load_text
        if not unconditional:
            text = load_text()
            unconditional = empty_condition(text)
        defaults = directory / "sampling.json"
        return cls(
            vae=vae,
            unet=unet,
            vocoder=vocoder,
            scheduler=scheduler,
            unconditional=unconditional,
            text=text,
            defaults=SoundDefaults.load(defaults) if defaults.exists() else None,
        ).to(device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a folder whose parts `AudioLDM2Pipeline.from_pretrained` reads; what is None there must be passed."""
        from safetensors.torch import save_file

        directory, text = Path(directory), self.text
        save_part(self.vae, directory / "vae")
        save_part(self.unet, directory / "unet")
        self.vocoder.save_pretrained(directory / "vocoder", max_shard_size=SHARD)
        self.scheduler.save_pretrained(directory / "scheduler")
        text.sequence.save_pretrained(directory / "text_encoder_2", max_shard_size=SHARD)
        text.tokenizer.save_pretrained(directory / "tokenizer_2")
        save_part(text.projection, directory / "projection_model")
        text.language_model.save_pretrained(directory / "language_model", max_shard_size=SHARD)
        if text.clap is not None:
            text.clap.save_pretrained(directory / "text_encoder", max_shard_size=SHARD)
            text.clap_tokenizer.save_pretrained(directory / "tokenizer")
        empty = {name: row.contiguous().cpu() for name, row in self.unconditional.items()}
        save_file(empty, directory / "unconditional.safetensors")
        self.defaults.save(directory / "sampling.json")
        absent = [None, None]
        index = {
            "_class_name": "AudioLDM2Pipeline",
            "feature_extractor": absent,
            "language_model": ["transformers", "GPT2LMHeadModel"],
            "projection_model": ["audioldm2", "AudioLDM2ProjectionModel"],
            "scheduler": ["diffusers", type(self.scheduler).__name__],
            "text_encoder": absent if text.clap is None else ["transformers", "ClapModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": absent if text.clap is None else ["transformers", type(text.clap_tokenizer).__name__],
            "tokenizer_2": ["transformers", type(text.tokenizer).__name__],
            "unet": ["audioldm2", "AudioLDM2UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "vocoder": ["transformers", "SpeechT5HifiGan"],
        }
        (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @property
    def text(self) -> SoundText:
        """The text side, loaded on first use."""
        if not isinstance(self._text, SoundText):
            self._text = self._text()
        return self._text

    @property
    def sampling_rate(self) -> int:
        """Samples a second of what is generated."""
        return self.vocoder.config.sampling_rate

    @property
    def mel_config(self) -> MelConfig:
        """The spectrograms that autoencoder and vocoder know."""
        config = self.vocoder.config
        return MelConfig(sampling_rate=config.sampling_rate, bins=config.model_in_dim, hop=self._hop)

    @property
    def _hop(self) -> int:
        return math.prod(self.vocoder.config.upsample_rates)

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to(self, device: torch.device | str) -> Self:
        """Moves every loaded part."""
        for part in (self.vae, self.unet, self.vocoder):
            part.to(device)
        self.unconditional = {name: row.to(device) for name, row in self.unconditional.items()}
        if isinstance(self._text, SoundText):
            self._text.to(device)
        return self

    @torch.no_grad()  # not inference_mode: its tensors are targets of training
    def encode_text(self, captions: Sequence[str]) -> Condition:
        """B captions -> `generated_prompt_embeds` float[B, 8, C1], `prompt_embeds` float[B, L, C2], padding zero."""
        device = self.text.sequence.device
        tokens = self.text.tokenize(captions)
        clap = None if tokens.clap is None else (tokens.clap[0].to(device), tokens.clap[1].to(device))
        return Condition(self.text(SoundTokens(tokens.ids.to(device), tokens.mask.to(device), clap)))

    @torch.inference_mode()
    def sampling(
        self,
        condition: Condition,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        seconds: float | None = None,
    ) -> Steps[Tensor]:
        """Both conditions and B seeds -> latents float[B, c, T / f, F / f], step by step.

        Args: as of `generate`, where zero rows of `prompt_embeds` are padding, and `seconds`, the length.
        """
        told = self._told(condition)
        length: float = self.defaults.seconds if seconds is None else seconds

        def predictor(guided: bool) -> Predictor:
            if not guided:
                return self._predictor(told)
            empty = {name: self.unconditional[name].to(rows).expand_as(rows) for name, rows in told.items()}
            return self._predictor({name: torch.cat([empty[name], rows]) for name, rows in told.items()})

        def noise() -> Tensor:
            return self._noise(seeds, self._latent_shape(length))

        return (yield from self.guided_sampling(predictor, noise, len(told[EMBEDS]), seeds, steps, guidance_scale))

    def media(self, latents: Tensor, **options: Any) -> list[Any]:
        """Latents float[B, c, T / f, F / f] -> B sounds of `seconds`, levelled, of one channel."""
        from anygen.media import Audio

        waveform = self.decode(latents, options.get("seconds") or self.defaults.seconds)
        waveform = faded(levelled(waveform, self.sampling_rate), self.sampling_rate)
        return [Audio(sound, self.sampling_rate) for sound in waveform.cpu().numpy()]

    @torch.inference_mode()
    def decode(self, latents: Tensor, seconds: float | None = None) -> Tensor:
        """Latents float[B, c, T / f, F / f] -> the vocoder's waveforms float32[B, N], neither levelled nor faded."""
        mel = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        waveform = self.vocoder(mel[:, 0].to(self.vocoder.dtype)).float()
        if rounds := self.defaults.refinement:
            waveform = refined(waveform, mel[:, 0], LogMel(self.mel_config).to(waveform.device), rounds)
        return waveform if seconds is None else waveform[:, : int(seconds * self.sampling_rate)]

    def denoising_loss(self, condition: Condition, media: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the UNet's prediction at random times.

        Args:
            condition: matches `condition_spec`; gradients flow into it, and nowhere else if the parts are frozen.
            media: log-mel spectrograms float[B, 1, T, F], or a list of B sounds, levelled and cut to the shortest.
            generator: for the posterior sample, the times and the noise.

        Raises:
            ConfigError: a sound has another sampling rate than the vocoder.
        """
        mel = media if isinstance(media, Tensor) else self._mels(media)
        return self.prediction_loss(self._predictor(self._told(condition)), self.encode(mel, generator), generator)

    def _told(self, condition: Condition) -> dict[str, Tensor]:
        tensors = self.condition_spec.check(condition).tensors
        return {name: tensors[name].to(self.device, self.unet.dtype) for name in (GENERATED, EMBEDS)}

    def _predictor(self, told: Mapping[str, Tensor]) -> Predictor:
        mask = text_mask(told[EMBEDS])
        return lambda latents, time: self.unet(
            latents,
            time,
            encoder_hidden_states=told[GENERATED],
            encoder_hidden_states_1=told[EMBEDS],
            encoder_attention_mask_1=mask,
            return_dict=False,
        )[0]

    def _mels(self, sounds: Sequence[Any]) -> Tensor:
        """B sounds -> float32[B, 1, T, F], T a multiple of the autoencoder's factor."""
        if wrong := {sound.sampling_rate for sound in sounds} - {self.sampling_rate}:
            raise ConfigError(f"sounds of {self.sampling_rate} Hz are wanted, got one of {min(wrong)} Hz")
        step = self._hop * self._factor
        count = min(sound.samples.shape[1] for sound in sounds) // step * step
        waveform = torch.stack([torch.from_numpy(sound.mono[:count]) for sound in sounds]).to(self.device)
        log_mel = LogMel(self.mel_config).to(self.device)
        return log_mel(levelled(waveform, self.sampling_rate))[:, None]

    def _latent_shape(self, seconds: float) -> tuple[int, int, int]:
        """(c, T / f, F / f) of a sound of that length."""
        frames = int(seconds * self.sampling_rate / self._hop) if math.isfinite(seconds) else 0
        if frames < 1 or seconds > MOST_SECONDS:
            raise ConfigError(f"seconds must be over 0 and at most {MOST_SECONDS:g}, got {seconds:g}")
        rows = -(-frames // self._factor)
        return self.unet.config.in_channels, rows, self.vocoder.config.model_in_dim // self._factor


def load_sound_text(directory: Path, context: int, dtype: torch.dtype) -> SoundText:
    """Reads the text side of an AudioLDM2 folder; CLAP where the folder has it.

    GPT-2 is read as `GPT2LMHeadModel` whatever class the folder names: published folders name `GPT2Model`, with the
    same weights, and diffusers cannot generate with that.
    """
    from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel
    from transformers import AutoTokenizer, ClapModel, GPT2LMHeadModel, T5EncoderModel

    with quiet_libraries():
        sequence: Any = T5EncoderModel.from_pretrained(directory / "text_encoder_2", dtype=dtype)
        language_model: Any = GPT2LMHeadModel.from_pretrained(directory / "language_model", dtype=dtype)
        projection: Any = AudioLDM2ProjectionModel.from_pretrained(
            directory, subfolder="projection_model", torch_dtype=dtype
        )
        clap: Any = None
        if has_clap := (directory / "text_encoder").is_dir():
            clap = ClapModel.from_pretrained(directory / "text_encoder", dtype=dtype)
    return SoundText(
        sequence=sequence,
        tokenizer=AutoTokenizer.from_pretrained(directory / "tokenizer_2"),
        projection=projection,
        language_model=language_model,
        context=context,
        clap=clap,
        clap_tokenizer=AutoTokenizer.from_pretrained(directory / "tokenizer") if has_clap else None,
    ).eval()


@torch.no_grad()
def empty_condition(text: SoundText) -> dict[str, Tensor]:
    """The empty caption's conditions, float[8, C1] and float[L, C2], for a text side on the CPU."""
    return {name: rows[0] for name, rows in text(text.tokenize([""])).items()}
