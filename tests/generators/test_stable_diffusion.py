from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen.errors import CheckpointError, ConfigError
from anygen.features import Condition
from anygen.generators.stable_diffusion import (
    EMBEDS,
    SamplingDefaults,
    StableDiffusionGenerator,
    TextConditioner,
    to_uint8,
)
from anygen.media import Image
from anygen.training.diffusion import build_scheduler
from anygen.training.tokenizer import train_tokenizer


def make_generator(*, prediction_type: str = "v_prediction") -> StableDiffusionGenerator:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.7,
    )
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    tokenizer = train_tokenizer(["a red apple", "two dogs"], vocab_size=300, context=6)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = TextConditioner(CLIPTextModel(config).eval(), tokenizer)
    with torch.no_grad():
        unconditional = text(text.tokenize([""]))[0].clone()
    scheduler = build_scheduler()
    scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    return StableDiffusionGenerator(
        vae=vae,
        unet=unet,
        scheduler=scheduler,
        unconditional=unconditional,
        text=text,
        defaults=SamplingDefaults(steps=3, guidance_scale=4.0),
    )


@pytest.fixture(scope="module")
def generator() -> StableDiffusionGenerator:
    return make_generator()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_equal_those_of_the_diffusers_pipeline(generator: StableDiffusionGenerator, guidance: float) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline(
        vae=generator.vae,
        text_encoder=None,  # type: ignore[arg-type]
        tokenizer=None,  # type: ignore[arg-type]
        unet=generator.unet,
        scheduler=generator.scheduler,
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    condition = generator.encode_text(["a red apple", "two dogs"])
    theirs = pipeline(
        prompt_embeds=condition.tensors[EMBEDS],
        negative_prompt_embeds=generator.unconditional.expand(2, -1, -1),
        num_inference_steps=3,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="pt",
    ).images
    ours = generator.decode(generator.sample(condition, [5, 6], 3, guidance))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_picture_does_not_depend_on_its_batch(generator: StableDiffusionGenerator) -> None:
    condition = generator.encode_text(["a red apple", "two dogs", ""])
    together = generator.sample(condition, [1, 2, 3])
    for row, seed in enumerate((1, 2, 3)):
        torch.testing.assert_close(generator.sample(condition[row], [seed]), together[row : row + 1])


def test_a_saved_folder_gives_the_same_pictures_here_and_in_diffusers(
    generator: StableDiffusionGenerator, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    generator.save_pretrained(tmp_path)
    loaded = StableDiffusionGenerator.from_pretrained(tmp_path)
    condition = generator.encode_text(["a red apple"])
    torch.testing.assert_close(loaded.sample(condition, [4]), generator.sample(condition, [4]))
    dogs = (part.encode_text(["two dogs"]).tensors[EMBEDS] for part in (loaded, generator))
    torch.testing.assert_close(*dogs)
    assert loaded.defaults == generator.defaults
    loaded.save_pretrained(tmp_path / "again")
    assert not [path for path in (tmp_path / "again").rglob("*.json") if str(tmp_path) in path.read_text()]
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red apple", num_inference_steps=3, guidance_scale=4.0, output_type="np",
                       generator=torch.Generator().manual_seed(4)).images[0]  # fmt: skip
    ours = loaded.generate(condition, seeds=[4])[0].array
    assert np.abs(picture * 255 - ours).max() <= 0.51


def test_no_text_encoder_is_loaded_to_generate(generator: StableDiffusionGenerator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    loaded = StableDiffusionGenerator.from_pretrained(tmp_path)
    condition = Condition({EMBEDS: torch.randn(1, 6, 16)})
    assert isinstance(loaded.generate(condition, seeds=[0])[0], Image)


def test_without_the_stored_empty_condition_it_is_computed(generator: StableDiffusionGenerator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    (tmp_path / "unconditional.safetensors").unlink()
    loaded = StableDiffusionGenerator.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.unconditional, generator.unconditional)


def test_steps_are_reported_and_bad_requests_refused(generator: StableDiffusionGenerator) -> None:
    condition = generator.encode_text(["two dogs"])
    seen: list[tuple[int, int]] = []
    generator.generate(condition, seeds=[0], steps=2, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(ConfigError, match="1 conditions need 1 seeds, got 2"):
        generator.sample(condition, [0, 1])
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        generator.sample(condition, [0], 0)
    with pytest.raises(ConfigError, match="multiples of 2 pixels, got 15 and 16"):
        generator.sample(condition, [0], height=15)
    with pytest.raises(ConfigError, match=r"\(6, 16\).* is wanted, got"):
        generator.sample(Condition({EMBEDS: torch.zeros(1, 6, 8)}), [0])


def test_other_sizes_than_the_own_can_be_asked_for(generator: StableDiffusionGenerator) -> None:
    condition = generator.encode_text(["two dogs"])
    assert generator.generate(condition, seeds=[0], steps=1, height=24, width=32)[0].size == (32, 24)
    assert generator.size == (16, 16)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_denoising_loss_is_the_textbook_one(prediction_type: str) -> None:
    generator = make_generator(prediction_type=prediction_type)
    condition, pixels = generator.encode_text(["two dogs"]), torch.rand(1, 3, 16, 16) * 2 - 1
    loss = generator.denoising_loss(condition, pixels, generator=torch.Generator().manual_seed(3))

    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        latents = generator.vae.encode(pixels).latent_dist.sample(draws) * 0.7
        noise = torch.randn(latents.shape, generator=draws)
        time = torch.randint(1000, (1,), generator=draws)
        kept = generator.scheduler.alphas_cumprod[time].view(1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        predicted = generator.unet(noisy, time, encoder_hidden_states=condition.tensors[EMBEDS]).sample
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    wanted = noise if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(loss, (predicted - wanted).square().mean())


def test_the_denoising_loss_reaches_the_condition(generator: StableDiffusionGenerator) -> None:
    embeds = torch.randn(1, 6, 16, requires_grad=True)
    loss = generator.denoising_loss(Condition({EMBEDS: embeds}), torch.zeros(1, 3, 16, 16))
    loss.backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0


def test_the_denoising_loss_takes_images_as_well(generator: StableDiffusionGenerator) -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
    condition = generator.encode_text(["two dogs"])
    losses = [
        generator.denoising_loss(condition, media, generator=torch.Generator().manual_seed(3))
        for media in (pixels, [Image.from_any(array)])
    ]
    torch.testing.assert_close(*losses)


def test_a_perfect_denoiser_gives_the_data_back(generator: StableDiffusionGenerator) -> None:
    data = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))

    class Perfect(torch.nn.Module):
        dtype, device, config = torch.float32, torch.device("cpu"), generator.unet.config

        def forward(self, noisy: torch.Tensor, time: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            kept = generator.scheduler.alphas_cumprod[time]
            noise = (noisy - kept.sqrt() * data) / (1 - kept).sqrt()
            return (kept.sqrt() * noise - (1 - kept).sqrt() * data,)

    perfect = StableDiffusionGenerator(
        vae=generator.vae,
        unet=Perfect(),
        scheduler=generator.scheduler,
        unconditional=generator.unconditional,
        text=generator.text,
    )
    landed = perfect.sample(generator.encode_text(["two dogs"]), [0], 8, 1.0)
    torch.testing.assert_close(landed, data, atol=1e-3, rtol=0)


def test_a_folder_without_a_part_is_named(generator: StableDiffusionGenerator, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a Stable Diffusion folder: it has no 'vae'"):
        StableDiffusionGenerator.from_pretrained(tmp_path)
    generator.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no file named diffusion_pytorch_model"):
        StableDiffusionGenerator.from_pretrained(tmp_path)


def test_pixels_become_bytes_by_rounding() -> None:
    pixels = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
    assert to_uint8(pixels)[0].tolist() == [[[0, 128, 255]]]
