"""Every registered projector keeps its contract."""

from pathlib import Path

import pytest
import torch

from anygen.errors import CheckpointError
from anygen.features import ConditionSpec, Features
from anygen.projectors.base import InputProjector, OutputProjector
from anygen.registry import lookup, names

SPECS = [
    ConditionSpec(shapes={"prompt_embeds": (5, 8)}),
    ConditionSpec(shapes={"generated_prompt_embeds": (2, 4), "prompt_embeds": (3, 6)}),
]
SMALL_INPUT = {"memory": {"memories": 5, "words": 4, "width": 8}}
SMALL = {"text_fc": {"width": 16, "heads": 2, "ffn": 16}, "mlp": {"width": 16}}


def make_input(name: str) -> InputProjector:
    torch.manual_seed(0)
    cls = lookup("input_projector", name)
    return cls(cls.config_class.from_dict(SMALL_INPUT.get(name, {})), feature_dim=6, llm_dim=12).eval()


def make_output(name: str, spec: ConditionSpec) -> OutputProjector:
    torch.manual_seed(0)
    cls = lookup("output_projector", name)
    options = cls.config_class.from_dict(SMALL.get(name, {}))
    return cls(options, llm_dim=12, signal_tokens=4, spec=spec).eval()


@pytest.mark.parametrize("name", names("input_projector"))
def test_an_input_projector_maps_each_sample_by_itself(name: str) -> None:
    project = make_input(name)
    given = Features(torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool))
    made = project(given)
    assert made.values.shape[0] == 3 and made.values.shape[-1] == 12
    assert made.mask.shape == made.values.shape[:2] and made.mask.dtype == torch.bool
    alone = project(Features(given.values[1:2], given.mask[1:2]))
    torch.testing.assert_close(made.values[1:2], alone.values)


@pytest.mark.parametrize("spec", SPECS, ids=["one tensor", "two tensors"])
@pytest.mark.parametrize("name", names("output_projector"))
def test_an_output_projector_makes_the_wanted_condition_of_each_sample(name: str, spec: ConditionSpec) -> None:
    project = make_output(name, spec)
    states, embeddings = torch.randn(3, 4, 12), torch.randn(3, 4, 12)
    made = spec.check(project(states, embeddings))
    alone = project(states[1:2], embeddings[1:2])
    for key in spec.shapes:
        torch.testing.assert_close(made.tensors[key][1:2], alone.tensors[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=["one tensor", "two tensors"])
@pytest.mark.parametrize("name", names("output_projector"))
def test_an_output_projector_moves_every_parameter_and_passes_the_gradient_on(name: str, spec: ConditionSpec) -> None:
    project = make_output(name, spec).train()
    states, embeddings = (torch.randn(2, 4, 12, requires_grad=True) for _ in range(2))
    made = project(states, embeddings)
    torch.stack([value.pow(2).sum() for value in made.tensors.values()]).sum().backward()
    still = [key for key, value in project.named_parameters() if value.grad is None]
    assert still == []
    assert states.grad is not None and states.grad.abs().sum() > 0
    if name == "low_rank":  # the embeddings are the same for every run: a linear map's bias holds all they could say
        assert embeddings.grad is None
    else:
        assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("name", names("input_projector"))
def test_an_input_projector_round_trips_through_disk(name: str, tmp_path: Path) -> None:
    project = make_input(name)
    project.save_pretrained(tmp_path)
    again = type(project).from_pretrained(tmp_path, feature_dim=6, llm_dim=12)
    given = Features(torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(again(given).values, project(given).values, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"does not fit: .*not \("):
        type(project).from_pretrained(tmp_path, feature_dim=7, llm_dim=12)


@pytest.mark.parametrize("name", names("output_projector"))
def test_an_output_projector_round_trips_through_disk(name: str, tmp_path: Path) -> None:
    project = make_output(name, SPECS[0])
    project.save_pretrained(tmp_path)
    again = type(project).from_pretrained(tmp_path, llm_dim=12, signal_tokens=4, spec=SPECS[0])
    states, embeddings = torch.randn(2, 4, 12), torch.randn(2, 4, 12)
    made, wanted = again(states, embeddings), project(states, embeddings)
    torch.testing.assert_close(made.tensors["prompt_embeds"], wanted.tensors["prompt_embeds"], rtol=0, atol=0)
