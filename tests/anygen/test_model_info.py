import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anygen import AnyGenPipeline
from anygen.errors import CheckpointError, ConfigError
from anygen.model_info import describe


def test_counts_are_those_of_the_loaded_parts(tiny_directory: Path, pipe: AnyGenPipeline) -> None:
    parts = {part.role: part for part in describe(tiny_directory).parts}
    table = {name: count for name, (_, count) in pipe.model.trainable_parameters().items()}
    adapter = sum(p.numel() for name, p in pipe.model.llm.named_parameters() if "lora_" in name)
    assert parts["LLM"].parameters == table["llm"] - adapter
    assert parts["LLM adapter"].parameters == adapter
    assert parts["signal rows"].parameters == table["signal_tokens"]
    assert parts["image encoder"].parameters == table["encoders"]
    assert parts["image input projector"].parameters == table["input_projectors"]
    made = [parts[f"{modality} output projector"].parameters or 0 for modality in ("image", "audio")]
    assert sum(made) == table["output_projectors"] and min(made) > 0
    image: object = pipe.generator("image")
    modules = (image.vae, image.unet, image.text.encoder)  # type: ignore[attr-defined]
    assert parts["image generator"].parameters == sum(p.numel() for m in modules for p in m.parameters())
    assert [role for role, part in parts.items() if not part.trained] == [
        "LLM",
        "image encoder",
        "image generator",
        "audio generator",
    ]


def test_it_says_what_the_model_reads_and_makes_and_under_which_licence(pipe: AnyGenPipeline) -> None:
    info = pipe.info()
    assert (info.name, info.licence) == ("tiny", "apache-2.0")
    assert (info.reads, info.makes) == (("text", "image"), ("text", "image", "audio"))
    assert info.matrix["image"] == {"text": True, "image": True, "audio": True}
    assert not any(info.matrix["audio"].values())
    assert info.trained < info.parameters == sum(part.parameters or 0 for part in info.parts)
    shown = str(info)
    assert "tiny (apache-2.0)" in shown and "image generator" in shown
    assert f"{info.parameters:,} parameters; trained to join the parts: {info.trained:,}" in shown
    assert json.loads(json.dumps(info.to_dict()))["matrix"]["text"]["audio"] is True


def test_an_llm_that_is_not_here_yet_is_not_fetched(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYGEN_HOME", str(tmp_path / "cache"))
    shutil.copytree(tiny_directory, tmp_path / "model")
    config = json.loads((tmp_path / "model/anygen.json").read_text())
    config["llm"] = {"repo": "smollm2-135m-instruct"}
    (tmp_path / "model/anygen.json").write_text(json.dumps(config))
    llm = describe(tmp_path / "model").parts[0]
    assert (llm.name, llm.parameters, llm.licence) == ("smollm2-135m-instruct", None, "Apache-2.0")
    assert "fetched at first use" in str(describe(tmp_path / "model")) and not (tmp_path / "cache").exists()
    shutil.copytree(tiny_directory / "llm", tmp_path / "cache/models/smollm2-135m-instruct-0.1.2")
    assert describe(tmp_path / "model").parts[0].parameters == describe(tiny_directory).parts[0].parameters


def test_damage_is_told(tiny_directory: Path, tmp_path: Path, pipe: AnyGenPipeline) -> None:
    shutil.copytree(tiny_directory, tmp_path / "model")
    (tmp_path / "model/projectors.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"projectors\.safetensors is not a readable safetensors file"):
        describe(tmp_path / "model")
    shutil.rmtree(tmp_path / "model/encoders")
    shutil.copy(tiny_directory / "projectors.safetensors", tmp_path / "model")
    with pytest.raises(CheckpointError, match="the image encoder is missing: there is no directory"):
        describe(tmp_path / "model")
    with pytest.raises(ConfigError, match="this pipeline has no directory to read about"):
        pipe.model.origin, origin = None, pipe.model.origin
        try:
            pipe.info()
        finally:
            pipe.model.origin = origin


def test_torch_is_not_needed() -> None:
    code = "import sys, anygen.model_info; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
