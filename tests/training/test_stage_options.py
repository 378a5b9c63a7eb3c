"""Options of stages: the diffusion loss, resolution, going on, and what is told while a stage runs."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anygen.component import read_safetensors
from anygen.errors import CheckpointError, ConfigError
from anygen.features import Condition
from anygen.generators.denoising import snr_weights
from anygen.media import Video
from anygen.model import AnyGenOutput
from anygen.training import decoder_alignment, encoder_alignment, instruction_tuning
from anygen.training.decoder_alignment import DecoderAlignmentRecipe
from anygen.training.encoder_alignment import EncoderAlignmentRecipe
from anygen.training.instruction_tuning import InstructionTuningRecipe
from anygen.training.stage_trainer import StageTrainer, diffusion


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Three captions, two of them with clips."""
    random = np.random.default_rng(0)
    rows: list[dict[str, str]] = [{"caption": "a dog"}]
    for number in range(2):
        Video(random.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8), 6).save(tmp_path / f"{number}.mp4")
        rows.append({"caption": f"{number + 1} dogs", "video": f"{number}.mp4"})
    (tmp_path / "clips.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "clips.jsonl"


def curve(out: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_diffusion_loss_is_equation_5_with_its_weights(
    gamma: float | None, tiny_zeroscope: Callable[..., Any]
) -> None:
    generator = tiny_zeroscope()
    generator.min_snr = gamma
    media = [Video(np.full((3, 16, 16, 3), value, np.uint8), 6) for value in (20, 220)]
    states = torch.randn(3, *generator.condition_spec.shapes["prompt_embeds"], requires_grad=True)
    output = AnyGenOutput(conditions={"video": {"prompt_embeds": states}})
    loss = diffusion(output, {"video": ([0, 2], media)}, {"video": generator}, torch.Generator().manual_seed(3))
    loss.backward()
    assert states.grad is not None
    assert [bool(part.any()) for part in states.grad] == [True, False, True]

    drawn = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3))))
    pixels = torch.stack([torch.tensor(clip.frames).permute(0, 3, 1, 2) for clip in media]).float() / 127.5 - 1
    latents = generator.encode(pixels.flatten(0, 1), drawn).unflatten(0, (2, 3)).transpose(1, 2)
    noise = torch.randn(latents.shape, generator=drawn)
    times = torch.randint(generator.scheduler.config.num_train_timesteps, (2,), generator=drawn)
    predicted = generator.unet(
        generator.add_noise(latents, noise, times), times, encoder_hidden_states=states[[0, 2]]
    ).sample
    errors = F.mse_loss(predicted, generator.target(latents, noise, times), reduction="none").flatten(1).mean(1)
    weights = snr_weights(generator.scheduler.alphas_cumprod, times, gamma, "v_prediction")
    torch.testing.assert_close(loss, (errors * weights).mean(), rtol=1e-4, atol=1e-5)


def test_the_diffusion_loss_is_trained_beside_the_captions(user_model: Path, clips: Path, tmp_path: Path) -> None:
    recipe = DecoderAlignmentRecipe(
        model=str(user_model),
        captions={"video": str(clips)},
        diffusion_weight=0.5,
        min_snr=5.0,
        steps=4,
        batch_size=3,
        held_out=0,
        report_to=(),
    )
    decoder_alignment.train(recipe, tmp_path / "out")
    first = {name: curve(tmp_path / "out", name)[0] for name in ("loss", "alignment_loss", "diffusion_loss")}
    assert first["loss"] == pytest.approx(first["alignment_loss"] + 0.5 * first["diffusion_loss"], rel=1e-4)


def test_a_stage_may_read_smaller_pictures_and_keeps_their_features_apart(
    user_model: Path, user_data: Path, tmp_path: Path
) -> None:
    def run(size: int | None, out: str) -> float:
        data: dict[str, Any] = {"image": str(user_data / "pairs.jsonl")}
        recipe = EncoderAlignmentRecipe(
            model=str(user_model), data=data, cache=str(tmp_path / "cache"), image_size=size, steps=1, report_to=()
        )
        encoder_alignment.train(recipe, tmp_path / out)
        return curve(tmp_path / out, "loss")[0]

    assert run(8, "small") != run(None, "own") == run(16, "same")
    assert len(list((tmp_path / "cache").glob("features-*"))) == 3
    with pytest.raises(ConfigError, match="image_size 9 is not a multiple of patch 8"):
        run(9, "odd")


def test_a_run_that_is_killed_and_goes_on_ends_as_one_that_never_stopped(
    user_model: Path,
    user_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = DecoderAlignmentRecipe(
        model=str(user_model),
        captions={"video": str(user_data / "captions.txt")},
        cache=str(user_data / "cache"),
        steps=8,
        batch_size=2,
        save_every=3,
        held_out=0.2,
        report_to=(),
    )
    whole = decoder_alignment.train(recipe, tmp_path / "whole")
    step = StageTrainer.training_step

    def dies(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        decoder_alignment.train(recipe, tmp_path / "parts")
    monkeypatch.setattr(StageTrainer, "training_step", step)
    other = replace(recipe, trains=("output_projectors", "signal_tokens"))
    with pytest.raises(CheckpointError, match=r"checkpoint-3 is of another run: trains was \[\], is \['output_proj"):
        decoder_alignment.train(other, tmp_path / "parts")
    with caplog.at_level("INFO", "anygen"):
        rest = decoder_alignment.train(recipe, tmp_path / "parts")
    assert re.search(r"8 steps of \d rows, on from checkpoint-3$", caplog.text, re.MULTILINE)
    assert rest["held_out"] == whole["held_out"] and rest["steps"] == 8
    new, old = (read_safetensors(tmp_path / run / "model", "projectors") for run in ("parts", "whole"))
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert not (tmp_path / "parts" / "checkpoints").exists(), "there is nothing to go on with"


def test_a_run_that_begins_anew_leaves_nothing_of_the_one_before(
    user_model: Path, user_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints are the newest by number, and would be gone on with."""
    data: dict[str, Any] = {"video": str(user_data / "captions.txt")}
    cache = str(user_data / "cache")
    quick: dict[str, Any] = dict(batch_size=2, save_every=2, held_out=0, steps=8, resume=False)
    recipe = DecoderAlignmentRecipe(model=str(user_model), captions=data, cache=cache, **quick)

    def stopped_at(stop: int) -> set[str]:
        step = StageTrainer.training_step

        def dies(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == stop:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(StageTrainer, "training_step", dies)
            decoder_alignment.train(recipe, tmp_path)
        return {path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")}

    assert stopped_at(7) == {"checkpoint-4", "checkpoint-6"}
    assert stopped_at(3) == {"checkpoint-2"}
    assert len({path.parent for path in (tmp_path / "tensorboard").rglob("events.*")}) == 1
    assert len(list((tmp_path / "tensorboard").rglob("events.*"))) == 1
    figures = decoder_alignment.train(replace(recipe, resume=True), tmp_path)
    assert figures["steps"] == 8 and len(curve(tmp_path, "grad_norm")) == 8


def test_fewer_activations_are_kept_and_the_loss_is_the_same(user_model: Path, user_data: Path, tmp_path: Path) -> None:
    def run(checkpointing: bool) -> list[float]:
        recipe = InstructionTuningRecipe(
            model=str(user_model),
            data=str(user_data / "chats.jsonl"),
            cache=str(user_data / "cache"),
            trains=("signal_tokens", "input_projectors"),
            steps=3,
            batch_size=2,
            held_out=0,
            activation_checkpointing=checkpointing,
            report_to=(),
        )
        instruction_tuning.train(recipe, tmp_path / str(checkpointing))
        return curve(tmp_path / str(checkpointing), "loss")

    np.testing.assert_allclose(run(True), run(False), rtol=1e-5)


def test_curves_samples_and_what_was_known_are_told(user_model: Path, user_data: Path, tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = InstructionTuningRecipe(
        model=str(user_model),
        data=str(user_data / "chats.jsonl"),
        text_data=str(user_data / "talk.jsonl"),
        text_share=0.5,
        cache=str(user_data / "cache"),
        trains=("signal_tokens", "output_projectors"),
        steps=4,
        batch_size=2,
        samples=("Play a dog.",),
        sample_every=2,
        retention_every=2,
        retention_probes=4,
        held_out=0.2,
    )
    figures = instruction_tuning.train(recipe, tmp_path)
    assert 0 <= figures["retention"] <= 1 and len(curve(tmp_path, "retention")) == 3, "with the last line"
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step-000002", "step-000004"}
    (folder,) = {path.parent for path in (tmp_path / "tensorboard").rglob("events.*")}
    events = reading.EventAccumulator(str(folder)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/lm_loss", "eval/loss", "retention"} <= scalars
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 4], "the last one is measured afterwards"
    assert "samples/0/text_summary" in events.Tags()["tensors"]


def test_a_condition_of_some_runs_has_their_rows() -> None:
    condition = Condition({"a": torch.arange(6).view(3, 2)})
    assert condition[torch.tensor([0, 2])].tensors["a"].tolist() == [[0, 1], [4, 5]]
