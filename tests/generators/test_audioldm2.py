import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen.errors import CheckpointError, ConfigError
from anygen.features import Condition
from anygen.generators.audioldm2 import (
    EMBEDS,
    GENERATED,
    AudioLDM2Generator,
    SoundDefaults,
    text_mask,
)
from anygen.generators.mel import LOUDNESS, PEAK, LogMel
from anygen.media import Audio

CAPTIONS = ["a trumpet playing a fast rising melody", "a dog"]
SECONDS = 0.1
Make = Callable[..., AudioLDM2Generator]


@pytest.fixture(scope="module")
def generator(tiny_audioldm2: Make) -> AudioLDM2Generator:
    return tiny_audioldm2()


def make_pipeline(generator: AudioLDM2Generator) -> Any:
    from diffusers import AudioLDM2Pipeline

    text = generator.text
    parts: dict[str, Any] = {"text_encoder": text.clap, "tokenizer": text.clap_tokenizer, "feature_extractor": None}
    pipeline: Any = AudioLDM2Pipeline(
        vae=generator.vae,
        text_encoder_2=text.sequence,
        projection_model=text.projection,
        language_model=text.language_model,
        tokenizer_2=text.tokenizer,
        unet=generator.unet,
        scheduler=generator.scheduler,
        vocoder=generator.vocoder,
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def given(generator: AudioLDM2Generator, condition: Condition, **settings: Any) -> dict[str, Any]:
    """The pipeline's arguments for our condition."""
    empty = {name: row.expand(len(condition), -1, -1) for name, row in generator.unconditional.items()}
    return {
        "prompt_embeds": condition.tensors[EMBEDS],
        "generated_prompt_embeds": condition.tensors[GENERATED],
        "attention_mask": text_mask(condition.tensors[EMBEDS]),
        "negative_prompt_embeds": empty[EMBEDS],
        "negative_generated_prompt_embeds": empty[GENERATED],
        "negative_attention_mask": text_mask(empty[EMBEDS]),
        "num_inference_steps": 3,
        "audio_length_in_s": SECONDS,
    } | settings


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sounds_equal_those_of_the_diffusers_pipeline(generator: AudioLDM2Generator, guidance: float) -> None:
    pipeline, condition = make_pipeline(generator), generator.encode_text(CAPTIONS)
    arguments = given(generator, condition, guidance_scale=guidance)
    latents, theirs = (
        pipeline(
            **arguments, generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)], output_type=kind
        ).audios
        for kind in ("latent", "pt")
    )
    ours = generator.sample(condition, [5, 6], 3, guidance)
    torch.testing.assert_close(ours, latents, atol=1e-5, rtol=0)
    waveform = generator.decode(ours, SECONDS)
    assert waveform.shape == (2, 1600) and waveform.std() > 1e-3
    torch.testing.assert_close(waveform, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_conditions_with_clap_equal_those_of_the_pipeline_for_one_caption(caption: str, tiny_audioldm2: Make) -> None:
    generator = tiny_audioldm2(clap=True)
    embeds, mask, generated = make_pipeline(generator).encode_prompt(
        [caption], "cpu", 1, False, transcription=[caption], max_new_tokens=8
    )
    ours = generator.encode_text(CAPTIONS)[CAPTIONS.index(caption)].tensors
    length = embeds.shape[1]
    assert text_mask(ours[EMBEDS]).tolist() == [mask[0].tolist() + [0] * (24 - length)]
    torch.testing.assert_close(ours[EMBEDS][:, :length], embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[GENERATED], generated, atol=1e-5, rtol=0)
    assert not ours[EMBEDS][:, length:].any()


def test_a_condition_does_not_depend_on_its_batch(generator: AudioLDM2Generator) -> None:
    together = generator.encode_text([*CAPTIONS, ""])
    for row, caption in enumerate([*CAPTIONS, ""]):
        alone = generator.encode_text([caption])
        for name in (GENERATED, EMBEDS):
            torch.testing.assert_close(alone.tensors[name], together[row].tensors[name])


def test_both_conditions_and_the_mask_reach_the_sound(generator: AudioLDM2Generator) -> None:
    condition = generator.encode_text(CAPTIONS[:1])
    plain = generator.sample(condition, [0])
    for name in (GENERATED, EMBEDS):
        changed = Condition(condition.tensors | {name: condition.tensors[name].flip(-1)})
        assert not torch.allclose(generator.sample(changed, [0]), plain)
    shorter = condition.tensors[EMBEDS].clone()
    shorter[:, 4:] = 0
    assert not torch.allclose(generator.sample(Condition(condition.tensors | {EMBEDS: shorter}), [0]), plain)


def test_the_mask_is_read_from_the_rows_sizes() -> None:
    rows = torch.randn(2, 5, 6).sign()
    sizes = torch.tensor([[1.0, 0.9, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert text_mask(rows * sizes[..., None]).tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert text_mask(rows * sizes[..., None] * 30)[0].tolist() == [1, 1, 1, 0, 0]


def test_a_sound_does_not_depend_on_its_batch(generator: AudioLDM2Generator) -> None:
    condition = generator.encode_text([*CAPTIONS, ""])
    together = generator.sample(condition, [1, 2, 3])
    for row, seed in enumerate((1, 2, 3)):
        torch.testing.assert_close(generator.sample(condition[row], [seed]), together[row : row + 1])


def test_sounds_are_levelled_and_as_long_as_asked(generator: AudioLDM2Generator) -> None:
    condition = generator.encode_text(CAPTIONS)
    for seconds, count in ((None, 1600), (0.43, 6880)):
        for sound in generator.generate(condition, seeds=[0, 1], seconds=seconds):
            assert isinstance(sound, Audio) and sound.sampling_rate == 16000
            assert sound.samples.shape == (1, count) and sound.samples.dtype == np.float32
            assert abs(sound.samples).max() <= PEAK + 1e-6
            assert 10 * np.log10(np.square(sound.samples).mean()) <= LOUDNESS + 0.5


def test_refined_sounds_are_nearer_to_the_spectrogram_that_the_autoencoder_gave(
    generator: AudioLDM2Generator, tiny_audioldm2: Make
) -> None:
    latents = generator.sample(generator.encode_text(CAPTIONS), [0, 1])
    with torch.no_grad():
        mel = generator.vae.decode(latents / generator.vae.config.scaling_factor).sample[:, 0]
    finer = tiny_audioldm2()
    finer.defaults = SoundDefaults(seconds=SECONDS, refinement=6)
    log_mel = LogMel(generator.mel_config)
    plain, refined = ((log_mel(one.decode(latents)) - mel).abs().mean() for one in (generator, finer))
    assert refined < 0.7 * plain
    with pytest.raises(ConfigError, match="refinement counts rounds, 0 or more, got -1"):
        SoundDefaults(refinement=-1)


def test_a_saved_folder_gives_the_same_sounds_here_and_in_diffusers(
    generator: AudioLDM2Generator, tmp_path: Path
) -> None:
    from diffusers import AudioLDM2Pipeline

    generator.save_pretrained(tmp_path)
    loaded = AudioLDM2Generator.from_pretrained(tmp_path)
    condition = generator.encode_text(CAPTIONS)
    sounds = (part.decode(part.sample(condition, [4, 5])) for part in (loaded, generator))
    torch.testing.assert_close(*sounds)
    again = loaded.encode_text(CAPTIONS)
    for name in (GENERATED, EMBEDS):
        torch.testing.assert_close(again.tensors[name], condition.tensors[name])
    assert loaded.defaults == generator.defaults and loaded.condition_spec == generator.condition_spec
    loaded.save_pretrained(tmp_path / "again")
    assert not [path for path in (tmp_path / "again").rglob("*.json") if str(tmp_path) in path.read_text()]
    absent: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor"))
    pipeline: Any = AudioLDM2Pipeline.from_pretrained(tmp_path, **absent)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        **given(generator, condition[0], guidance_scale=4.0),
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    ).audios
    torch.testing.assert_close(generator.sample(condition[0], [4]), theirs, atol=1e-5, rtol=0)


def test_a_folder_with_clap_and_a_bare_gpt2_is_read(tmp_path: Path, tiny_audioldm2: Make) -> None:
    generator = tiny_audioldm2(clap=True)
    generator.save_pretrained(tmp_path)
    generator.text.language_model.transformer.save_pretrained(tmp_path / "language_model")
    (tmp_path / "unconditional.safetensors").unlink()
    loaded = AudioLDM2Generator.from_pretrained(tmp_path, context=24)
    for name in (GENERATED, EMBEDS):
        torch.testing.assert_close(loaded.unconditional[name], generator.unconditional[name])
        one, other = (part.encode_text(CAPTIONS).tensors[name] for part in (loaded, generator))
        torch.testing.assert_close(one, other)


def test_a_published_folder_that_names_gpt2model_is_read_with_all_its_weights(
    generator: AudioLDM2Generator, tmp_path: Path
) -> None:
    from transformers import GPT2LMHeadModel

    generator.save_pretrained(tmp_path)
    bare = generator.text.language_model.transformer
    bare.save_pretrained(tmp_path / "language_model")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["language_model"] = ["transformers", "GPT2Model"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert json.loads((tmp_path / "language_model" / "config.json").read_text())["architectures"] == ["GPT2Model"]
    loaded = AudioLDM2Generator.from_pretrained(tmp_path).text.language_model
    assert isinstance(loaded, GPT2LMHeadModel)
    ours, theirs = loaded.transformer.state_dict(), bare.state_dict()
    assert set(ours) == set(theirs)
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    assert loaded.lm_head.weight is loaded.transformer.wte.weight  # which the file has, so that nothing is random


def test_no_text_encoder_is_loaded_to_generate(generator: AudioLDM2Generator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    for part in ("text_encoder_2", "language_model", "projection_model"):
        for weights in (tmp_path / part).glob("*.safetensors"):
            weights.unlink()
    loaded = AudioLDM2Generator.from_pretrained(tmp_path)
    condition = Condition({GENERATED: torch.randn(1, 8, 8), EMBEDS: torch.randn(1, 24, 12)})
    assert isinstance(loaded.generate(condition, seeds=[0])[0], Audio)


def test_steps_are_reported_and_bad_requests_refused(generator: AudioLDM2Generator) -> None:
    condition = generator.encode_text(["a dog"])
    seen: list[tuple[int, int]] = []
    generator.generate(condition, seeds=[0], steps=2, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(ConfigError, match="1 conditions need 1 seeds, got 2"):
        generator.sample(condition, [0, 1])
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        generator.sample(condition, [0], 0)
    for seconds in (-1.0, 61.0, float("nan")):
        with pytest.raises(ConfigError, match=f"over 0 and at most 60, got {seconds:g}"):
            generator.sample(condition, [0], seconds=seconds)
    with pytest.raises(ConfigError, match=r"\(24, 12\).* is wanted, got"):
        generator.sample(Condition({EMBEDS: torch.zeros(1, 24, 12)}), [0])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_denoising_loss_is_the_textbook_one(prediction_type: str, tiny_audioldm2: Make) -> None:
    generator = tiny_audioldm2(prediction_type=prediction_type)
    condition, mel = generator.encode_text(["a dog"]), torch.randn(1, 1, 8, 16)
    loss = generator.denoising_loss(condition, mel, generator=torch.Generator().manual_seed(3))

    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        latents = generator.vae.encode(mel).latent_dist.sample(draws) * 0.7
        noise = torch.randn(latents.shape, generator=draws)
        time = torch.randint(1000, (1,), generator=draws)
        kept = generator.scheduler.alphas_cumprod[time].view(1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        tensors = condition.tensors
        predicted = generator.unet(
            noisy,
            time,
            encoder_hidden_states=tensors[GENERATED],
            encoder_hidden_states_1=tensors[EMBEDS],
            encoder_attention_mask_1=generator.text.tokenize(["a dog"]).mask,
        ).sample
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    wanted = noise if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(loss, (predicted - wanted).square().mean())


def test_the_denoising_loss_reaches_both_conditions(generator: AudioLDM2Generator) -> None:
    tensors = {GENERATED: torch.randn(1, 8, 8).requires_grad_(), EMBEDS: torch.randn(1, 24, 12).requires_grad_()}
    generator.denoising_loss(Condition(dict(tensors)), torch.zeros(1, 1, 8, 16)).backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in tensors.values())


def test_the_denoising_loss_takes_sounds_as_well(generator: AudioLDM2Generator) -> None:
    from anygen.generators.mel import LogMel

    noise = np.random.default_rng(0).normal(0, 0.3, 1300).clip(-1, 1).astype(np.float32)
    mel = LogMel(generator.mel_config)
    condition = generator.encode_text(["a dog"])
    loudness = 10 ** (LOUDNESS / 20) / np.sqrt(np.square(noise[:1280]).mean())
    taken = mel(torch.from_numpy(noise[:1280] * loudness)[None])[:, None]
    losses = [
        generator.denoising_loss(condition, media, generator=torch.Generator().manual_seed(3))
        for media in (taken, [Audio(noise, 16000)])
    ]
    torch.testing.assert_close(*losses)
    with pytest.raises(ConfigError, match="sounds of 16000 Hz are wanted, got one of 8000 Hz"):
        generator.denoising_loss(condition, [Audio(noise, 8000)])


def test_a_folder_without_a_part_is_named(generator: AudioLDM2Generator, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an AudioLDM2 folder: it has no 'vae'"):
        AudioLDM2Generator.from_pretrained(tmp_path)
    generator.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no file named diffusion_pytorch_model"):
        AudioLDM2Generator.from_pretrained(tmp_path)
