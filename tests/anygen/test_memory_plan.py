"""What is predicted against what is there, and what is planned for it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anygen import AnyGenPipeline
from anygen.cli import main
from anygen.errors import OutOfMemoryError
from anygen.memory_need import POLICIES, ModelNeed, _generator, model_need
from anygen.memory_plan import fitting, plan_memory, precision_of
from anygen.preset_parts import PRECISIONS, Precision
from anygen.presets import GIB, Need

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def need(llm: float = 12, image: float = 3, video: float = 5, working: float = 2) -> ModelNeed:
    """In GiB of bfloat16."""

    def role(name: str, size: float, **other: float) -> Need:
        sizes = {"fp32": 2 * size, "bf16": size, "8-bit": size, "4-bit": size}
        sizes |= {name.replace("_", "-"): value for name, value in other.items()}
        return Need(role=name, bytes={p: int(sizes[p] * GIB) for p in PRECISIONS})

    llm_need = role("LLM", llm, **{"8_bit": llm / 2, "4_bit": llm / 4})
    makers = (role("image generator", image), role("video generator", video))
    largest: dict[str, dict[Precision, int]] = {
        modality: {p: int(0.5 * GIB * size * (2 if p == "fp32" else 1)) for p in PRECISIONS}
        for modality, size in (("image", image), ("video", video))
    }
    return ModelNeed((llm_need, *makers, role("working memory", working)), largest)


def weights(module: torch.nn.Module, seen: set[int]) -> int:
    tensors = {t.data_ptr(): t for t in (*module.parameters(), *module.buffers())}
    new = {place: t for place, t in tensors.items() if place not in seen}
    seen.update(new)
    return sum(t.numel() * t.element_size() for t in new.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_that_are_predicted_are_those_that_are_loaded(anything_directory: Path, dtype: torch.dtype) -> None:
    pipe = AnyGenPipeline.from_pretrained(anything_directory, device="cpu", dtype=dtype)
    predicted, precision = model_need(anything_directory), precision_of(dtype)
    seen: set[int] = set()
    measured = {"LLM": weights(pipe.model.llm, seen), "encoders": weights(pipe.model.encoders, seen)}
    measured["projectors, signal rows, adapter"] = weights(pipe.model, seen)
    for modality in ("image", "video", "audio"):
        generator: Any = pipe.generator(modality)
        parts = [generator.unet, generator.vae, getattr(generator, "vocoder", None)]
        measured[f"{modality} generator"] = sum(weights(part, seen) for part in parts if part is not None)
    for role, size in measured.items():
        assert predicted.of(role, precision) == pytest.approx(size, rel=0.02, abs=600), role
    keys = f"keys and values of {2048:,} tokens"
    prompt = torch.ones(1, 256, dtype=torch.long)
    _, cache = pipe.model.llm.hidden_states(pipe.model.llm.embedding(prompt), use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))  # type: ignore[union-attr]
    assert predicted.of(keys, precision) == held * 2048 // 256
    assert predicted.unknown == [] and model_need(anything_directory, wanted=["audio"]).generators("bf16").keys() == {
        "audio"
    }


def test_the_decoders_memory_is_of_the_size_that_is_estimated(anything_directory: Path) -> None:
    """The peak of what torch allocates while a picture is decoded."""
    from torch.profiler import ProfilerActivity, profile

    pipe = AnyGenPipeline.from_pretrained(anything_directory, device="cpu")
    generator: Any = pipe.generator("image")
    latents = torch.randn(1, generator.unet.config.in_channels, 32, 32)
    generator.decode(latents)  # what a first call alone allocates does not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        generator.decode(latents)
    events: list[Any] = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    height, width = (32 * generator.factor,) * 2
    estimated = 4 * 6 * height * width * generator.vae.config.block_out_channels[1]
    assert estimated / 3 < peak < 2 * estimated


def test_the_first_policy_that_fits_is_taken() -> None:
    wanted = {23: "resident", 21: "auto", 17: "model_offload", 15: "sequential"}
    for free, policy in wanted.items():
        plan = plan_memory(need(), free * GIB, CUDA, precision="bf16")
        assert (plan.offload, plan.need.total("bf16", policy) <= free * GIB) == (policy, True)
    assert [need().total("bf16", policy) / GIB for policy in POLICIES] == [22, 19, 16.5, 14]
    told = str(plan_memory(need(), 17 * GIB, CUDA, precision="bf16"))
    share = "at most 16.5 GiB of the 17.0 GiB that are free on cuda"
    assert told.splitlines()[0] == f"offload 'model_offload': one model of a generator at a time; {share}"
    assert "  LLM: 12.0 GiB" in told
    assert plan_memory(need(), 100 * GIB, CUDA, precision="bf16", offload="sequential").offload == "sequential"


def test_a_gpu_that_is_too_small_is_told_the_plan_that_would_fit() -> None:
    message = (
        r"cuda is too small: 10.0 GiB are free, and any offload takes at least 14.0 GiB in bf16 \(LLM 12.0 GiB, .*\); "
        r"this would fit: dtype='bfloat16', quantization='8bit', offload='sequential' \(8.0 GiB\)"
    )
    with pytest.raises(OutOfMemoryError, match=message):
        plan_memory(need(), 10 * GIB, CUDA, precision="bf16")
    with pytest.raises(OutOfMemoryError, match="offload='resident' takes at least 22.0 GiB in bf16 .* offload='auto'"):
        plan_memory(need(), 20 * GIB, CUDA, precision="bf16", offload="resident")
    with pytest.raises(OutOfMemoryError, match="nothing fits: take a smaller model, fewer generators="):
        plan_memory(need(), 1 * GIB, CUDA, precision="4-bit")
    assert fitting(need(), 30 * GIB) == "dtype='bfloat16', offload='resident' (22.0 GiB)"


def test_the_machines_own_memory_is_never_refused() -> None:
    assert plan_memory(need(), 1 * GIB, CPU, precision="fp32").offload == "auto"
    assert plan_memory(need(), 1 * GIB, CPU, precision="fp32", offload="resident").offload == "resident"


def test_a_pipeline_logs_its_plan_and_follows_it(
    anything_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="anygen.assembling"):
        pipe = AnyGenPipeline.from_pretrained(anything_directory, device="cpu", savers=["vae_slicing"])
    assert caplog.messages == [str(pipe.memory_plan)] and "offload 'resident'" in caplog.text
    generator: Any = pipe.generator("video")
    assert generator.vae.use_slicing


def test_the_command_line_tells_what_a_model_needs(
    anything_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(anything_directory), "--memory", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["memory"]
    predicted = model_need(anything_directory)
    assert told["offload"]["auto"]["4-bit"] == predicted.total("4-bit", "auto") and told["unknown"] == []
    assert told["needs"]["LLM"]["fp32"] == predicted.of("LLM", "fp32")
    assert main(["info", str(anything_directory), "--memory"]) == 0
    out = capsys.readouterr().out
    assert "offload sequential" in out and "Weights are counted, working memory is estimated" in out


def test_what_is_not_here_yet_is_said_and_not_counted(
    anything_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for path in anything_directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    settings = json.loads((anything_directory / "anygen.json").read_text())
    settings["llm"] = {"path": None, "repo": "nobody/nothing", "revision": None}
    (tmp_path / "anygen.json").unlink()
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "anygen.json").write_text(json.dumps(settings))
    found = model_need(tmp_path)
    assert found.unknown == ["LLM"] and found.total("bf16") == model_need(anything_directory).total("bf16") - sum(
        model_need(anything_directory).of(role, "bf16") for role in ("LLM", "keys and values of 2,048 tokens")
    )
    main(["info", str(tmp_path), "--memory"])
    assert "Not counted, as it is not on this machine yet: LLM." in capsys.readouterr().out


def test_spatial_layers_that_lie_elsewhere_are_counted_with_the_unet(tmp_path: Path) -> None:
    for place, numbers in (("image/unet", 6), ("video/unet", 4), ("video/vae", 3)):
        (tmp_path / place).mkdir(parents=True)
        save_file({"weight": torch.zeros(numbers)}, tmp_path / place / "diffusion_pytorch_model.safetensors")
    (tmp_path / "video/shared.json").write_text(json.dumps({"spatial": "../image/unet"}))
    assert _generator(tmp_path / "video") == {"unet": 10, "vae": 3, "own": 0}
