import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen.errors import CheckpointError, ConfigError
from anygen.features import Condition
from anygen.generators.latent import EMBEDS, SHARED
from anygen.generators.zeroscope import ClipDefaults, ZeroscopeGenerator
from anygen.media import Video
from anygen.stepwise import drained

Make = Callable[..., ZeroscopeGenerator]
PARTS = {part: f"../image/{part}" for part in ("vae", "text_encoder", "tokenizer")}


@pytest.fixture(scope="module")
def generator(tiny_zeroscope: Make) -> ZeroscopeGenerator:
    return tiny_zeroscope()


@pytest.fixture(scope="module")
def saved(generator: ZeroscopeGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds all its parts; not to be changed."""
    directory = tmp_path_factory.mktemp("zeroscope")
    generator.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("sampler", ["DPMSolverMultistepScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_clips_equal_those_of_the_diffusers_pipeline(
    generator: ZeroscopeGenerator, guidance: float, sampler: str
) -> None:
    import diffusers

    scheduler = getattr(diffusers, sampler).from_config(generator.scheduler.config)
    pipeline: Any = diffusers.TextToVideoSDPipeline(
        vae=generator.vae,
        text_encoder=None,  # type: ignore[arg-type]
        tokenizer=None,  # type: ignore[arg-type]
        unet=generator.unet,
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    condition = generator.encode_text(["a red apple", "two dogs"])

    def theirs(output_type: str) -> torch.Tensor:
        return pipeline(
            prompt_embeds=condition.tensors[EMBEDS],
            negative_prompt_embeds=generator.unconditional.expand(2, -1, -1),
            num_frames=3,
            num_inference_steps=3,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
            output_type=output_type,
        ).frames

    same = ZeroscopeGenerator(
        vae=generator.vae,
        unet=generator.unet,
        scheduler=scheduler,
        unconditional=generator.unconditional,
        text=generator.text,
    )
    ours = same.sample(condition, [5, 6], 3, guidance, frames=3)
    torch.testing.assert_close(ours, theirs("latent"), atol=1e-5, rtol=0)
    torch.testing.assert_close(same.decode(ours), theirs("pt"), atol=1e-5, rtol=0)


def test_a_clip_does_not_depend_on_its_batch(generator: ZeroscopeGenerator) -> None:
    condition = generator.encode_text(["a red apple", "two dogs", ""])
    together = generator.sample(condition, [1, 2, 3])
    for row, seed in enumerate((1, 2, 3)):
        torch.testing.assert_close(generator.sample(condition[row], [seed]), together[row : row + 1])


def test_frames_decoded_in_parts_are_those_decoded_at_once(
    generator: ZeroscopeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(2, 4, 5, 8, 8)
    monkeypatch.setattr("anygen.generators.zeroscope.FRAMES_AT_ONCE", 10)
    whole = generator.decode(latents)
    sizes: list[int] = []
    decode = generator.vae.decode
    monkeypatch.setattr(generator.vae, "decode", lambda part, **kw: sizes.append(len(part)) or decode(part, **kw))
    monkeypatch.setattr("anygen.generators.zeroscope.FRAMES_AT_ONCE", 4)
    torch.testing.assert_close(generator.decode(latents), whole)
    assert whole.shape == (2, 5, 3, 16, 16) and sizes == [4, 4, 2]
    one = generator.vae.decode(latents[1:, :, 3] / 0.7).sample
    torch.testing.assert_close(whole[1, 3], (one[0] / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_frames_see_each_other_and_dropout_is_off(generator: ZeroscopeGenerator) -> None:
    assert any(module.p > 0 for module in generator.unet.modules() if isinstance(module, torch.nn.Dropout))
    condition = generator.encode_text(["two dogs"])
    noise = torch.randn(1, 4, 3, 8, 8)
    changed = noise.clone()
    changed[:, :, 0] += 1
    one, same, other = (drained(generator.denoise(condition, lambda n=n: n, [0], 1)) for n in (noise, noise, changed))
    assert torch.equal(one, same)
    assert not torch.allclose(one[:, :, 2], other[:, :, 2], atol=1e-4)


def test_a_video_has_the_model_s_length_and_rate_and_other_sizes_can_be_asked_for(
    generator: ZeroscopeGenerator,
) -> None:
    condition = generator.encode_text(["two dogs"])
    (clip,) = generator.generate(condition, seeds=[0], steps=1)
    assert isinstance(clip, Video) and clip.frames.shape == (3, 16, 16, 3) and (clip.fps, clip.seconds) == (6.0, 0.5)
    wide = generator.generate(condition, seeds=[0], steps=1, height=24, width=32, frames=2)[0]
    assert wide.frames.shape == (2, 24, 32, 3)
    for seconds, frames in ((0.8, 5), (0.01, 1)):
        assert len(generator.generate(condition, seeds=[0], steps=1, seconds=seconds)[0].frames) == frames
    pixels = generator.decode(generator.sample(condition, [0], 1))[0].permute(0, 2, 3, 1) * 255
    assert np.abs(pixels.numpy() - clip.frames).max() <= 0.5


def test_a_saved_folder_gives_the_same_clips_here_and_in_diffusers(generator: ZeroscopeGenerator, saved: Path) -> None:
    from diffusers import TextToVideoSDPipeline

    loaded = ZeroscopeGenerator.from_pretrained(saved)
    condition = generator.encode_text(["a red apple"])
    torch.testing.assert_close(loaded.sample(condition, [4]), generator.sample(condition, [4]))
    torch.testing.assert_close(loaded.encode_text(["a red apple"]).tensors[EMBEDS], condition.tensors[EMBEDS])
    assert loaded.defaults == generator.defaults and not loaded.unet.training
    pipeline: Any = TextToVideoSDPipeline.from_pretrained(saved)
    pipeline.set_progress_bar_config(disable=True)
    clip = pipeline(
        "a red apple", num_frames=3, num_inference_steps=3, guidance_scale=4.0, output_type="np",
        generator=torch.Generator().manual_seed(4),
    ).frames[0]  # fmt: skip
    assert np.abs(clip * 255 - loaded.generate(condition, seeds=[4])[0].frames).max() <= 0.51


def test_no_text_encoder_is_loaded_to_generate(generator: ZeroscopeGenerator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "text_encoder")
    loaded = ZeroscopeGenerator.from_pretrained(tmp_path)
    assert len(loaded.generate(Condition({EMBEDS: torch.randn(2, 6, 16)}), seeds=[0, 1], steps=1)) == 2


def test_a_plain_diffusers_folder_loads_with_usual_defaults(generator: ZeroscopeGenerator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    for ours in ("unconditional.safetensors", "sampling.json"):
        (tmp_path / ours).unlink()
    loaded = ZeroscopeGenerator.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.unconditional, generator.unconditional)
    assert (loaded.defaults.guidance_scale, loaded.defaults.frames, loaded.defaults.fps) == (9.0, 16, 8.0)


# --- parts that another generator's folder holds -------------------------------------------------------------


@pytest.fixture
def shared(generator: ZeroscopeGenerator, tmp_path: Path) -> Path:
    """generators/video, whose VAE and text encoder lie in generators/image."""
    generator.save_pretrained(tmp_path / "image")
    generator.save_pretrained(tmp_path / "video", shared=PARTS)
    return tmp_path / "video"


def test_shared_parts_are_not_copied_and_give_the_same_clips(generator: ZeroscopeGenerator, shared: Path) -> None:
    assert sorted(path.name for path in shared.iterdir()) == [
        "sampling.json", "scheduler", "shared.json", "unconditional.safetensors", "unet",
    ]  # fmt: skip
    loaded = ZeroscopeGenerator.from_pretrained(shared)
    condition = generator.encode_text(["two dogs"])
    torch.testing.assert_close(loaded.encode_text(["two dogs"]).tensors[EMBEDS], condition.tensors[EMBEDS])
    (one,), (same,) = (part.generate(condition, seeds=[4]) for part in (loaded, generator))
    assert one == same
    both = shared.parent.rename(shared.parent.with_name("moved"))
    ZeroscopeGenerator.from_pretrained(both / "video")


def test_a_shared_folder_is_made_whole_by_saving_it_elsewhere(
    generator: ZeroscopeGenerator, shared: Path, tmp_path: Path
) -> None:
    ZeroscopeGenerator.from_pretrained(shared).save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole" / SHARED).exists() and (tmp_path / "whole" / "model_index.json").exists()
    shutil.rmtree(tmp_path / "image")
    condition = generator.encode_text(["two dogs"])
    loaded = ZeroscopeGenerator.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(loaded.sample(condition, [4]), generator.sample(condition, [4]))
    assert str(tmp_path) not in (tmp_path / "whole" / "vae" / "config.json").read_text()


def test_a_missing_shared_part_is_named_with_its_place(shared: Path) -> None:
    shutil.rmtree(shared.parent / "image" / "vae")
    with pytest.raises(CheckpointError, match=r"it has no 'vae' at \.\./image/vae, where shared\.json has it"):
        ZeroscopeGenerator.from_pretrained(shared)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "does not say which parts are shared: Expecting"),
        ("[]", 'wanted is an object such as {"vae": "../image/vae"}, not list'),
        (
            json.dumps({"unet": "../image/unet"}),
            "'unet' cannot be shared; what can: vae, text_encoder, tokenizer, spatial",
        ),
        (json.dumps({"vae": "/image/vae"}), "'vae' must be a relative folder with forward slashes, not '/image/vae'"),
        (json.dumps({"vae": "..\\vae"}), "must be a relative folder with forward slashes"),
        (json.dumps({"vae": 3}), "must be a relative folder with forward slashes, not 3"),
    ],
)
def test_a_bad_list_of_shared_parts_is_refused(shared: Path, content: str, message: str) -> None:
    (shared / SHARED).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        ZeroscopeGenerator.from_pretrained(shared)
    assert message in str(caught.value)


def test_saving_refuses_to_share_what_is_not_there(generator: ZeroscopeGenerator, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shared parts: there is no folder .*image/vae"):
        generator.save_pretrained(tmp_path / "video", shared=PARTS)


# --- guidance in an interval ---------------------------------------------------------------------------------


def restricted(generator: ZeroscopeGenerator, begin: float, end: float) -> ZeroscopeGenerator:
    return ZeroscopeGenerator(
        vae=generator.vae,
        unet=generator.unet,
        scheduler=generator.scheduler,
        unconditional=generator.unconditional,
        text=generator.text,
        defaults=replace(generator.defaults, guidance_interval=(begin, end)),
    )


def test_guidance_is_weighed_in_where_its_interval_says(
    generator: ZeroscopeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    condition = generator.encode_text(["two dogs"])
    sizes: list[int] = []
    forward = generator.unet.forward
    monkeypatch.setattr(generator.unet, "forward", lambda x, *a, **kw: sizes.append(len(x)) or forward(x, *a, **kw))
    made = {}
    for interval, wanted in {
        (0.0, 1.0): [2, 2, 2, 2],
        (0.0, 0.5): [2, 2, 1, 1],
        (0.25, 0.75): [1, 2, 2, 1],
        (0.5, 1.0): [1, 1, 2, 2],
    }.items():
        sizes.clear()
        made[interval] = restricted(generator, *interval).sample(condition, [4], 4, 5.0)
        assert sizes == wanted
    assert torch.equal(made[0.0, 1.0], generator.sample(condition, [4], 4, 5.0))
    sizes.clear()
    plain = restricted(generator, 0.25, 0.75).sample(condition, [4], 4, 1.0)
    assert sizes == [1, 1, 1, 1]
    torch.testing.assert_close(plain, generator.sample(condition, [4], 4, 1.0))
    for one, other in combinations([*made.values(), plain], 2):
        assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.5)])
def test_an_interval_that_is_none_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="guidance_interval: two numbers that rise between 0 and 1, not"):
        ClipDefaults(guidance_interval=interval)


# --- requests and loss ---------------------------------------------------------------------------------------


def test_steps_are_reported_and_bad_requests_refused(generator: ZeroscopeGenerator) -> None:
    condition = generator.encode_text(["two dogs"])
    seen: list[tuple[int, int]] = []
    generator.generate(condition, seeds=[0], steps=2, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(ConfigError, match="1 conditions need 1 seeds, got 2"):
        generator.sample(condition, [0, 1])
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        generator.sample(condition, [0], 0)
    with pytest.raises(ConfigError, match="a clip has at least 1 frame, got 0"):
        generator.sample(condition, [0], frames=0)
    with pytest.raises(ConfigError, match="told in frames or in seconds, not in both"):
        generator.sample(condition, [0], frames=2, seconds=1.0)
    with pytest.raises(ConfigError, match="multiples of 2 pixels, got 15 and 16"):
        generator.sample(condition, [0], height=15)
    with pytest.raises(ConfigError, match=r"\(6, 16\).* is wanted, got"):
        generator.sample(Condition({EMBEDS: torch.zeros(1, 6, 8)}), [0])
    with pytest.raises(ConfigError, match="at least 1 frame and a positive fps, not 4 and 0"):
        ClipDefaults(frames=4, fps=0)


def test_a_folder_without_a_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a Zeroscope folder: it has no 'vae'"):
        ZeroscopeGenerator.from_pretrained(tmp_path)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_denoising_loss_is_the_textbook_one(prediction_type: str, tiny_zeroscope: Make) -> None:
    generator = tiny_zeroscope(prediction_type=prediction_type)
    condition, pixels = generator.encode_text(["two dogs", ""]), torch.rand(2, 3, 3, 16, 16) * 2 - 1
    loss = generator.denoising_loss(condition, pixels, generator=torch.Generator().manual_seed(3))

    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        frames = generator.vae.encode(pixels.reshape(6, 3, 16, 16)).latent_dist.sample(draws) * 0.7
        latents = frames.view(2, 3, 4, 8, 8).permute(0, 2, 1, 3, 4)
        noise = torch.randn(latents.shape, generator=draws)
        time = torch.randint(1000, (2,), generator=draws)
        kept = generator.scheduler.alphas_cumprod[time].view(2, 1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        predicted = generator.unet(noisy, time, encoder_hidden_states=condition.tensors[EMBEDS]).sample
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    wanted = noise if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(loss, (predicted - wanted).square().mean())


def test_the_denoising_loss_takes_videos_and_reaches_the_condition(generator: ZeroscopeGenerator) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
    embeds = torch.randn(1, 6, 16, requires_grad=True)
    losses = [
        generator.denoising_loss(Condition({EMBEDS: embeds}), media, generator=torch.Generator().manual_seed(3))
        for media in (pixels, [Video(frames, 8)])
    ]
    torch.testing.assert_close(*losses)
    losses[0].backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="the videos of a batch are of one shape, got"):
        generator.denoising_loss(Condition({EMBEDS: embeds}), [Video(frames, 8), Video(frames[:1], 8)])


def test_a_perfect_denoiser_gives_the_data_back(generator: ZeroscopeGenerator) -> None:
    data = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(9))

    class Perfect(torch.nn.Module):
        dtype, device, config = torch.float32, torch.device("cpu"), generator.unet.config

        def forward(self, noisy: torch.Tensor, time: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            kept = generator.scheduler.alphas_cumprod[time]
            noise = (noisy - kept.sqrt() * data) / (1 - kept).sqrt()
            return (kept.sqrt() * noise - (1 - kept).sqrt() * data,)

    perfect = ZeroscopeGenerator(
        vae=generator.vae,
        unet=Perfect(),
        scheduler=generator.scheduler,
        unconditional=generator.unconditional,
        text=generator.text,
    )
    landed = perfect.sample(generator.encode_text(["two dogs"]), [0], 8, 1.0, frames=3)
    torch.testing.assert_close(landed, data, atol=1e-3, rtol=0)


def test_the_registry_knows_it() -> None:
    from anygen.registry import lookup

    assert lookup("generator", "zeroscope") is ZeroscopeGenerator
