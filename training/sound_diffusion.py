"""Trains the sound generator of the embedded default on latents kept on the device, with both of its conditions.

T5 encoder, projection, GPT-2 and UNet are trained together, then, from that start, the UNet alone: the text side's
output is the space that an output projector is fitted to, and `freeze_text` keeps it.

Source: AudioLDM 2 (arXiv:2308.05734) for the parts and how they are joined; schedule, target and weighting as in
`training/diffusion.py`. Differs: T5 and GPT-2 are small and learn from the diffusion loss alone, without CLAP and
without AudioMAE features as GPT-2's targets.

Shapes: B batch, L text tokens, c latent channels, t f sides of the latents.
"""

import copy
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anygen.errors import ConfigError
from anygen.generators.audioldm2 import (
    EMBEDS,
    GENERATED,
    GENERATED_TOKENS,
    AudioLDM2Generator,
    SoundDefaults,
    SoundText,
    SoundTokens,
)
from anygen.generators.mel import LogMel
from anygen.training.latent_diffusion import (
    CaptionTokens,
    LatentDiffusionRecipe,
    VelocityObjective,
    build_scheduler,
    disturbed,
    fit,
    replace_folder,
)
from anygen.training.loop import (
    AveragedWeights,
    RunLog,
    lowering,
    save_grid,
    start,
)
from anygen.training.sound_autoencoder import as_pictures
from anygen.training.sound_captions import canonical, caption_corpus, said, varied
from anygen.training.sound_mixing import SECONDS, SoundSource
from anygen.training.sounds import SoundBank, load_sounds
from anygen.training.tokenizer import train_tokenizer
from anygen.training.vocoder import save_waves


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundDiffusionRecipe(LatentDiffusionRecipe):
    """Everything that decides the result."""

    sounds: str
    """Directory of the built sound bank."""
    vae: str
    """Directory of the trained mel autoencoder."""
    vocoder: str
    """Directory of the trained vocoder."""
    checksum: str | None = None
    """The sound bank's checksum; None accepts any."""
    start: str | None = None
    """Directory of a generator trained by such a recipe, to go on from; its own sizes and tokenizer then hold."""
    freeze_text: bool = False
    """Trains the UNet alone; the text side is written as it was read."""
    channels: tuple[int, ...] = (48, 80, 96)
    """Widths of three levels; text is attended to in the second and in the middle."""
    text_width: int = 128
    text_layers: int = 3
    gpt_width: int = 96
    gpt_layers: int = 2
    context: int = 24
    """Tokens of a caption, and rows of `prompt_embeds`."""
    vocab_size: int = 1200
    pool: int = 120_000
    """Clips that are composed and encoded once and drawn from."""
    steps: int = 12_000
    learning_rate: float = 1e-3
    sampling: SoundDefaults = field(
        default_factory=lambda: SoundDefaults(steps=16, guidance_scale=3.0, seconds=SECONDS, refinement=8)
    )

    def __post_init__(self) -> None:
        if self.freeze_text and self.start is None:
            raise ConfigError("freeze_text needs a start: an untrained text side would stay as it is")


def build_unet(recipe: SoundDiffusionRecipe, latent_channels: int) -> Any:
    """The untrained UNet; each attended place reads itself, GPT-2's states and T5's states in turn."""
    from diffusers import AudioLDM2UNet2DConditionModel

    blocks: dict[str, Any] = {
        "block_out_channels": recipe.channels,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": ((None, recipe.gpt_width, recipe.text_width),) * 3,
        # heads, in spite of the name; of 16 channels each, which the fast kernels of GPUs take
        "attention_head_dim": tuple(width // 16 for width in recipe.channels),
    }
    return AudioLDM2UNet2DConditionModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        **blocks,
        layers_per_block=1,
        norm_num_groups=16,
    )


def build_text(recipe: SoundDiffusionRecipe, bank: SoundBank) -> SoundText:
    """The untrained text side, and its tokenizer trained on captions of everything in the bank."""
    from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel

    tokenizer = train_tokenizer(caption_corpus(bank, recipe.seed), vocab_size=recipe.vocab_size, context=recipe.context)
    sequence = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=recipe.text_width,
            d_kv=recipe.text_width // 4,
            d_ff=2 * recipe.text_width,
            num_layers=recipe.text_layers,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    language_model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=1,  # it reads and writes states, never tokens
            n_positions=recipe.context + 5 + GENERATED_TOKENS,  # the summary, and a start and an end for each stream
            n_embd=recipe.gpt_width,
            n_layer=recipe.gpt_layers,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return SoundText(
        sequence=sequence,
        tokenizer=tokenizer,
        projection=AudioLDM2ProjectionModel(recipe.text_width, recipe.text_width, recipe.gpt_width),
        language_model=language_model,
        context=recipe.context,
    )


def build_parts(recipe: SoundDiffusionRecipe, bank: SoundBank, vae: Any) -> tuple[Any, SoundText]:
    """The UNet and the text side to train, in float32: untrained, or those of `recipe.start`.

    Raises:
        CheckpointError: there is no generator in `recipe.start`.
        ConfigError: it makes other latents than the autoencoder's.
    """
    latent_channels = vae.config.latent_channels
    if recipe.start is None:
        return build_unet(recipe, latent_channels), build_text(recipe, bank)
    generator = AudioLDM2Generator.from_pretrained(recipe.start)
    if (made := generator.unet.config.in_channels) != latent_channels:
        raise ConfigError(f"{recipe.start} makes {made} latent channels, the autoencoder has {latent_channels}")
    return generator.unet, generator.text


def with_mask(ids: Tensor, end: int) -> SoundTokens:
    """Ids int64[B, L] whose captions are ended, and then padded, by the token `end` -> ids and mask."""
    ends = (ids == end).long()
    return SoundTokens(ids, ((ends.cumsum(1) - ends) == 0).long())


class SoundLatentPool:
    """Composed clips as latents, each with two captions, on the training device."""

    def __init__(self, recipe: SoundDiffusionRecipe, source: SoundSource, vae: Any, text: SoundText) -> None:
        rng, bank, tokenize = random.Random(recipe.seed + 1), source.bank, CaptionTokens(text)
        log_mel = LogMel().to(source.device)
        latents: list[Tensor] = []
        tokens: list[Tensor] = []
        for batch in source.clips(recipe.pool):
            with torch.no_grad():
                posterior = vae.encode(log_mel(batch.waveforms)[:, None].to(vae.dtype)).latent_dist
                latents.append((posterior.sample() * vae.config.scaling_factor).to(torch.bfloat16))
            captions = []
            for sound in batch.sounds:
                captions.append(canonical(said(sound, bank, rng, left_open=0.08)))
                captions.append(varied(said(sound, bank, rng), rng))
            tokens.append(tokenize(captions))
        self.latents = torch.cat(latents)
        device = self.latents.device
        self.tokens = torch.cat(tokens).view(len(self.latents), 2, -1).to(device)
        self.empty = tokenize([""])[0].to(device)

    def draw(self, size: int, dropout: float) -> tuple[Tensor, Tensor]:
        """float[B, c, t, f] latents and int64[B, L] captions, a share of them empty."""
        device = self.latents.device
        rows = torch.randint(len(self.latents), (size,), device=device)
        tokens = self.tokens[rows, torch.randint(2, (size,), device=device)]
        dropped = torch.rand(size, 1, device=device) < dropout
        return self.latents[rows].float(), torch.where(dropped, self.empty, tokens)


def _conditions(text: SoundText, tokens: SoundTokens) -> Any:
    return text(tokens)


_eagerly: Any = torch.compiler.disable(_conditions)
"""GPT-2's eight passes in a row, unrolled, take longer to compile than a run takes."""


class _Objective(VelocityObjective):
    """With a `SoundText`."""

    def __init__(
        self, unet: Any, text: SoundText, alphas_cumprod: Tensor, min_snr: float | None, condition_noise: float = 0.0
    ) -> None:
        super().__init__(unet, text, alphas_cumprod, min_snr, condition_noise)
        self.end = int(text.tokenizer.eos_token_id)

    def predict(self, noisy: Tensor, tokens: Tensor, times: Tensor) -> Tensor:
        read = with_mask(tokens, self.end)
        conditions = _eagerly(self.text, read)
        generated, embeds = conditions[GENERATED], conditions[EMBEDS]
        if self.condition_noise:
            generated = disturbed(generated, self.condition_noise)
            embeds = disturbed(embeds, self.condition_noise) * read.mask[..., None]
        return self.unet(
            noisy.contiguous(memory_format=torch.channels_last),
            times,
            encoder_hidden_states=generated,
            encoder_hidden_states_1=embeds,
            encoder_attention_mask_1=read.mask,
            return_dict=False,
        )[0]


@lowering("batch_size", "pool")
def train(recipe: SoundDiffusionRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/generator`, a diffusers folder in fp16.

    Raises:
        CheckpointError: there is no generator in `recipe.start`.
        ConfigError: the sound bank, or the start, is not what the recipe needs.
    """
    from diffusers import AutoencoderKL
    from transformers import SpeechT5HifiGan

    accelerator = start(recipe.seed)
    device, log = accelerator.device, RunLog(out, "sound-diffusion")
    bank = load_sounds(recipe.sounds, recipe.checksum)
    # Latents and samples in float32: of logarithms, bf16 keeps too few digits.
    vae: Any = AutoencoderKL.from_pretrained(recipe.vae, torch_dtype=torch.float32).to(device).eval()
    vocoder: Any = SpeechT5HifiGan.from_pretrained(recipe.vocoder, dtype=torch.float32)
    vocoder = vocoder.to(device).eval()
    (unet, text), scheduler = build_parts(recipe, bank, vae), build_scheduler()
    pool = SoundLatentPool(recipe, SoundSource(bank, seed=recipe.seed, device=device), vae, text)
    log.write(pool=len(pool.latents), latent_std=pool.latents.float().std().item())
    text.requires_grad_(not recipe.freeze_text)
    objective: Any = _Objective(unet, text, scheduler.alphas_cumprod, recipe.min_snr, recipe.condition_noise)
    objective = objective.to(device, memory_format=torch.channels_last)
    log.write(unet=sum(p.numel() for p in unet.parameters()), text=sum(p.numel() for p in text.parameters()))
    average = AveragedWeights(objective, recipe.ema)

    def pack() -> AudioLDM2Generator:
        averaged: SoundText = average.module.text
        with torch.no_grad():
            conditions = averaged(with_mask(pool.empty[None], average.module.end))
        return AudioLDM2Generator(
            vae=vae,
            unet=average.module.unet,
            vocoder=vocoder,
            scheduler=scheduler,
            unconditional={name: rows[0] for name, rows in conditions.items()},
            text=averaged,
            defaults=recipe.sampling,
        )

    return fit(
        recipe,
        accelerator,
        objective,
        average,
        objective,
        pool.draw,
        log,
        counted="clips",
        show=lambda step: show(pack(), out, "samples" if step is None else f"samples-{step}"),
        show_every=4000,
        write=lambda: save_half(pack(), recipe, out / "generator"),
    )


SHOWN = (
    "a trumpet playing a fast rising melody",
    "a piano playing a slow falling melody",
    "a violin playing a high note",
    "a guitar playing an arpeggio",
    "a flute playing a melody",
    "a drum kit playing a fast beat",
    "a dog barking",
    "rain falling",
    "thunder rumbling and rain falling",
    "a siren wailing",
    "a church bell ringing",
    "a laser gun",
)


def show(generator: AudioLDM2Generator, out: Path, name: str) -> None:
    """Makes each caption of SHOWN with two seeds: `name`.png of spectrograms, `name`.wav one after the other."""
    condition = generator.encode_text([caption for caption in SHOWN for _ in range(2)])
    sounds = generator.generate(condition, seeds=list(range(2)) * len(SHOWN))
    waveforms = torch.stack([torch.from_numpy(sound.mono.copy()) for sound in sounds])
    save_grid(as_pictures(LogMel(generator.mel_config)(waveforms)), out / f"{name}.png", columns=4)
    save_waves(list(waveforms), out / f"{name}.wav")


def save_half(generator: AudioLDM2Generator, recipe: SoundDiffusionRecipe, out: Path) -> None:
    """Writes the generator in fp16 and leaves it as it is; autoencoder and vocoder are copied as they were trained.

    An earlier one in `out` is replaced when the new one is whole.
    """
    from diffusers import AutoencoderKL
    from transformers import SpeechT5HifiGan

    half = AudioLDM2Generator(
        vae=AutoencoderKL.from_pretrained(recipe.vae, torch_dtype=torch.float16),
        unet=copy.deepcopy(generator.unet).half(),
        vocoder=SpeechT5HifiGan.from_pretrained(recipe.vocoder, dtype=torch.float16),
        scheduler=generator.scheduler,
        unconditional={name: row.half() for name, row in generator.unconditional.items()},
        text=copy.deepcopy(generator.text).half(),
        defaults=generator.defaults,
    )
    replace_folder(half, out)
