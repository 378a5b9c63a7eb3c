"""The image autoencoder's objective and its run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anygen.training import autoencoder, recipes
from anygen.training.autoencoder import AutoencoderRecipe, _Objective, build, measure, train
from anygen.training.icons import IconSet
from anygen.training.pictures import PictureSource

TINY = AutoencoderRecipe(icons="", channels=(16, 16, 16, 16), latent_channels=4)


def test_the_objective_is_the_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    vae, pixels = build(TINY), torch.rand(2, 3, 32, 32) * 2 - 1
    noise = torch.randn(2, 4, 4, 4)
    loss, squared = _Objective(vae, kl_weight=0.5)(pixels, noise)
    posterior = vae.encode(pixels).latent_dist
    restored = vae.decode(posterior.mean + posterior.std * noise).sample
    torch.testing.assert_close(squared, F.mse_loss(restored, pixels))
    kernel = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]).expand(3, 1, 3, 3)
    wanted = F.l1_loss(restored, pixels) + 3 * squared
    wanted = wanted + 0.4 * F.conv2d(restored - pixels, kernel, groups=3).abs().mean()
    wanted = wanted + 0.2 * F.avg_pool2d(restored - pixels, 2).abs().mean()
    wanted = wanted + 0.2 * F.avg_pool2d(restored - pixels, 4).abs().mean()
    torch.testing.assert_close(loss, wanted + 0.5 * posterior.kl().mean() / (3 * 32 * 32))


def test_a_run_writes_what_it_measured(trained_vae: tuple[Path, dict[str, float]], icons: IconSet) -> None:
    from diffusers import AutoencoderKL

    out, figures = trained_vae
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32)
    again = measure(vae, PictureSource(icons, seed=1, held_out=True))
    assert abs(again["psnr"] - figures["psnr"]) < 0.01  # the weights are stored in half precision
    assert vae.config["scaling_factor"] == figures["scaling_factor"]
    rows = [json.loads(line) for line in (out / "vae.jsonl").read_text().splitlines()]
    assert rows[0]["pool"] == 32 and rows[1]["step"] == rows[2]["step"] == 2
    assert rows[1]["loss"] > 0 and rows[1]["images"] == 8 and rows[1]["images_per_second"] > 0 and rows[2]["final"]
    assert (out / "vae.png").exists()


def test_latents_have_unit_scale_after_the_stored_factor(
    trained_vae: tuple[Path, dict[str, float]], icons: IconSet
) -> None:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(trained_vae[0] / "vae", torch_dtype=torch.float32)
    pixels = next(PictureSource(icons, seed=2).batches(64)).pixels
    with torch.no_grad():
        latents = vae.encode(pixels * 2 - 1).latent_dist.sample() * vae.config["scaling_factor"]
    assert abs(latents.std().item() - 1) < 0.15


def test_a_recipe_reproduces_its_weights(
    icons_dir: Path, trained_vae: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    recipe = tmp_path / "vae.yaml"
    recipe.write_text(
        f"kind: autoencoder\nout: {tmp_path}/again\nicons: {icons_dir}\nchannels: [16, 16, 16, 16]\n"
        "latent_channels: 4\npool: 32\nbatch_size: 4\nsteps: 3\n"
    )
    assert recipes.run(recipe, ["steps=2"]) == trained_vae[1]
    a, b = (load_file(next((out / "vae").glob("*.safetensors"))) for out in (trained_vae[0], tmp_path / "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert "steps: 2" in (tmp_path / "again" / "vae.recipe.yaml").read_text()


def test_a_frozen_encoder_keeps_the_latents(
    icons_dir: Path, trained_vae: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    before, figures = trained_vae
    recipe = replace(TINY, icons=str(icons_dir), start=str(before / "vae"), freeze_encoder=True, pool=8)
    again = train(replace(recipe, batch_size=4, steps=1, turned=1.0), tmp_path)
    assert again["scaling_factor"] == figures["scaling_factor"]
    a, b = (load_file(next((out / "vae").glob("*.safetensors"))) for out in (before, tmp_path))
    frozen = {key for key in a if torch.equal(a[key], b[key])}
    assert {key for key in a if key.startswith(("encoder.", "quant_conv."))} <= frozen
    assert not torch.equal(a["decoder.conv_in.weight"], b["decoder.conv_in.weight"])
    assert str(before) not in (tmp_path / "vae" / "config.json").read_text()


def test_a_compiled_run_trains(icons_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(autoencoder, "measure", lambda *_: {"psnr": 0.0, "scaling_factor": 1.0})
    monkeypatch.setattr(torch, "compile", lambda module, mode: modes.append(mode) or module)
    recipe = replace(TINY, icons=str(icons_dir), pool=8, batch_size=4, steps=1, compile=True)
    train(replace(recipe, compile_mode="reduce-overhead"), tmp_path)
    assert modes == ["reduce-overhead"]
