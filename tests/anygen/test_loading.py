from pathlib import Path
from typing import Any

import pytest
import torch

from anygen.errors import CheckpointError, ConfigError
from anygen.features import Condition
from anygen.loading import choose_device, choose_dtype, load_generator
from anygen.model_config import OutputConfig, PartConfig, SourceConfig, SourcedPartConfig
from anygen.model_parts import load_encoder


@pytest.mark.parametrize(("cuda", "mps", "wanted"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_that_is_there_is_chosen(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device(None) == torch.device(wanted)
    assert choose_device("cpu") == torch.device("cpu")


def test_bfloat16_is_the_default_on_cuda_alone() -> None:
    assert choose_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert choose_dtype(None, torch.device("cpu")) == choose_dtype(None, torch.device("mps")) == torch.float32
    for name in ("bf16", "bfloat16", torch.bfloat16):
        assert choose_dtype(name, torch.device("cpu")) == torch.bfloat16


def test_options_that_a_generator_does_not_load_by_are_its_defaults(tiny_zeroscope: Any, tmp_path: Path) -> None:
    tiny_zeroscope().save_pretrained(tmp_path / "clips")

    def load(**options: Any) -> Any:
        part = SourcedPartConfig(name="zeroscope", source=SourceConfig(path="clips"), options=options)
        output = OutputConfig(signal_tokens=1, condition={}, generator=part, projector=PartConfig(name="mlp"))
        return load_generator(tmp_path, output, torch.device("cpu"), torch.float32)

    assert (load().defaults.steps, load(steps=7).defaults.steps, load(steps=7).defaults.frames) == (3, 7, 3)
    with pytest.raises(ConfigError, match="the generator 'zeroscope' has no options turbo"):
        load(turbo=True)


def test_files_that_a_part_s_own_code_cannot_open_are_told_with_the_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Foreign:
        @classmethod
        def from_pretrained(cls, directory: Path, **_: Any) -> Any:
            return (directory / "weights.bin").read_bytes()

    (tmp_path / "there").mkdir()
    part = SourcedPartConfig(name="smell", source=SourceConfig(path="there"))
    output = OutputConfig(signal_tokens=1, condition={}, generator=part, projector=PartConfig(name="mlp"))
    for module in ("loading", "model_parts"):
        monkeypatch.setattr(f"anygen.{module}.lookup", lambda *_: Foreign)
    with pytest.raises(CheckpointError, match=r"the generator 'smell' cannot be read from .*there: .*weights\.bin"):
        load_generator(tmp_path, output, torch.device("cpu"), torch.float32)
    with pytest.raises(CheckpointError, match=r"the encoder 'smell' cannot be read from .*there: .*weights\.bin"):
        load_encoder(part, lambda source: tmp_path / str(source.path))


def test_models_saved_in_different_types_are_loaded_in_one(tiny_zeroscope: Any, tmp_path: Path) -> None:
    generator = tiny_zeroscope()
    generator.unet.half()
    generator.vae.to(torch.bfloat16)
    generator.save_pretrained(tmp_path)
    again = type(generator).from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for model in (again.unet, again.vae) for p in model.parameters()} == {torch.float32}
    condition = Condition({"prompt_embeds": torch.randn(1, *again.condition_spec.shapes["prompt_embeds"])})
    made = again.generate(condition.to(dtype=torch.bfloat16), seeds=[1], steps=1)  # a plan of another type
    rounded = condition.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    assert made == again.generate(rounded, seeds=[1], steps=1)
