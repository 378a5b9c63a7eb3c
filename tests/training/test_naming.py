"""Input projectors meet the names of what is shown."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from anygen.features import Features
from anygen.projectors.input import LinearProjector, LinearProjectorConfig, MLPProjector, MLPProjectorConfig
from anygen.training.naming import measure_names, meet_names, name_embeddings

if TYPE_CHECKING:
    from anygen.llm import LLM


def test_names_are_embedded_as_in_a_sentence_cut_and_filled_up(tiny_llm: "Callable[..., LLM]") -> None:
    llm = tiny_llm()
    names = ["cat", "red double-decker bus with a bell"]
    made = name_embeddings(llm, names, 3)
    table = cast(Any, llm.embedding).weight
    for name, row in zip(names, made, strict=True):
        ids = llm.tokenizer(f"a {name}", add_special_tokens=False)["input_ids"]
        first = len(llm.tokenizer("a", add_special_tokens=False)["input_ids"])
        ids = ids[first : first + 3]
        torch.testing.assert_close(row[: len(ids)], table[ids].float())
        (end,) = llm.tokenizer("\n", add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(row[len(ids) :], table[[end] * (3 - len(ids))].float())


def test_a_projector_learns_names_that_the_features_tell_apart_and_no_others() -> None:
    torch.manual_seed(0)
    names, centres = torch.randn(6, 2, 4), torch.randn(6, 8)
    centres[5] = centres[4]  # these two look the same
    concepts = torch.arange(6).repeat(80)
    features = (centres[concepts] + 0.05 * torch.randn(480, 8)).unsqueeze(1)
    projector = LinearProjector(LinearProjectorConfig(tokens=2), feature_dim=8, llm_dim=4)
    before = measure_names(projector, features, concepts, names)
    met = meet_names(
        projector,
        features,
        concepts,
        names,
        noise=torch.full((8,), 0.1),
        steps=300,
        batch_size=64,
        learning_rate=5e-2,
        held_out=60,
    )
    assert before["nearest"] < 0.5
    assert 0.65 < met["nearest"] < 0.9  # all but the two that look the same
    assert met["residual"] < 0.5 * before["residual"]
    again = measure_names(projector, features[-60:], concepts[-60:], names)
    assert again == met


def test_names_that_begin_alike_count_as_the_same() -> None:
    names = torch.randn(3, 2, 4)
    names[1] = names[0]
    told = names[[0, 1, 2]].flatten(1)

    class Told(MLPProjector):
        def forward(self, features: Features) -> Features:
            return Features(told.view(3, 2, 4), features.mask.repeat_interleave(2, 1))

    projector = Told(MLPProjectorConfig(tokens=2), feature_dim=8, llm_dim=4)
    assert measure_names(projector, torch.zeros(3, 1, 8), torch.tensor([1, 0, 2]), names) == {
        "residual": 0.0,
        "nearest": 1.0,
    }
