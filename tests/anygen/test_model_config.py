import subprocess
import sys
from pathlib import Path

import pytest

from anygen.errors import ConfigError
from anygen.model_config import AnyGenConfig, SourceConfig

SHORT = {
    "llm": {"repo": "smollm2-135m-instruct"},
    "modalities": {
        "image": {
            "output": {
                "signal_tokens": 4,
                "condition": {"prompt_embeds": [77, 768]},
                "generator": {"name": "stable_diffusion", "source": {"path": "generators/image"}},
            }
        }
    },
}


def test_the_configuration_round_trips_through_disk(tiny_config: AnyGenConfig, tmp_path: Path) -> None:
    tiny_config.save(tmp_path / "anygen.json")
    assert AnyGenConfig.load(tmp_path / "anygen.json") == tiny_config
    assert (list(tiny_config.inputs), list(tiny_config.outputs)) == (["image"], ["image", "audio"])
    assert tiny_config.slots == {"image": 2}


def test_the_shortest_configuration_fits() -> None:
    config = AnyGenConfig.from_dict(SHORT)
    assert config.inputs == {} and config.outputs["image"].condition == {"prompt_embeds": (77, 768)}
    assert config.outputs["image"].projector.name == "text_fc"


def test_a_misspelt_key_is_named_with_its_place() -> None:
    with pytest.raises(ConfigError, match="unknown key 'modalities.image.output.signal_token'"):
        output = SHORT["modalities"]["image"]["output"] | {"signal_token": 4}
        AnyGenConfig.from_dict(SHORT | {"modalities": {"image": {"output": output}}})


def test_a_part_lies_in_one_place_inside_the_directory() -> None:
    with pytest.raises(ConfigError, match="'path' stays inside the model's directory, got '../elsewhere'"):
        SourceConfig(path="../elsewhere")
    with pytest.raises(ConfigError, match="either a 'path' inside the model's directory or a 'repo', not both"):
        SourceConfig(path="llm", repo="org/llm")


def reads(**inputs: dict[str, object]) -> AnyGenConfig:
    encoder = {"name": "imagebind", "source": {"path": "encoders/imagebind"}}
    modalities = {m: {"input": {"encoder": encoder, "feature_dim": 6} | own} for m, own in inputs.items()}
    return AnyGenConfig.from_dict(SHORT | {"modalities": modalities})


def test_an_input_shares_a_projector_that_there_is() -> None:
    config = reads(image={"projector": {"name": "mlp"}}, video={"shares": "image"})
    assert config.inputs["video"].shares == "image" and config.inputs["image"].shares is None
    with pytest.raises(ConfigError, match="video shares the projector of audio, which has none; .* their own: image"):
        reads(image={}, video={"shares": "audio"})
    with pytest.raises(ConfigError, match="video shares the projector of audio, which has none; .* their own: image"):
        reads(image={}, audio={"shares": "image"}, video={"shares": "audio"})
    with pytest.raises(ConfigError, match="shares the projector of video, which has none; .* their own: none"):
        reads(video={"shares": "video"})
    with pytest.raises(ConfigError, match="audio cannot share .* of image: its features are 7 wide, those of image 6"):
        reads(image={}, audio={"shares": "image", "feature_dim": 7})
    with pytest.raises(ConfigError, match="a 'projector' of its own or 'shares' that of image, not both"):
        reads(image={}, video={"shares": "image", "projector": {"name": "mlp"}})


def makes(**outputs: dict[str, object]) -> AnyGenConfig:
    shape = {"signal_tokens": 4, "condition": {"prompt_embeds": [6, 8]}}
    generator = {"name": "stable_diffusion", "source": {"path": "generators/image"}}
    modalities = {m: {"output": shape | {"generator": generator} | own} for m, own in outputs.items()}
    return AnyGenConfig.from_dict(SHORT | {"modalities": modalities})


def test_an_output_shares_the_projector_of_one_with_the_same_condition() -> None:
    config = makes(image={"projector": {"name": "mlp"}}, video={"shares": "image"})
    assert config.outputs["video"].shares == "image" and config.outputs["image"].shares is None
    with pytest.raises(ConfigError, match="video shares the projector of audio, which has none; .* their own: image"):
        makes(image={}, video={"shares": "audio"})
    with pytest.raises(ConfigError, match="audio cannot share the projector of image: it has 2 signal tokens and .* 4"):
        makes(image={}, audio={"shares": "image", "signal_tokens": 2})
    with pytest.raises(ConfigError, match=r"condition \{'prompt_embeds': \(7, 8\)\}, image has 4 and .*\(6, 8\)"):
        makes(image={}, video={"shares": "image", "condition": {"prompt_embeds": [7, 8]}})
    with pytest.raises(ConfigError, match="an output has a 'projector' of its own or 'shares' that of image, not both"):
        makes(image={}, video={"shares": "image", "projector": {"name": "mlp"}})


def test_reading_it_needs_no_torch() -> None:
    code = "import sys, anygen.model_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
