"""Input projectors meet the names of what is shown."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from anygen.features import Features
from anygen.projectors.input import (
    FeatureShift,
    LinearProjector,
    LinearProjectorConfig,
    MemoryProjector,
    MemoryProjectorConfig,
)
from anygen.training.media_pools import Pool
from anygen.training.naming import measure_names, meet_names, name_embeddings, remember

if TYPE_CHECKING:
    from anygen.llm import LLM


def test_names_are_embedded_as_in_a_sentence_cut_and_filled_up(tiny_llm: "Callable[..., LLM]") -> None:
    llm = tiny_llm()
    names = ["cat", "red double-decker bus with a bell"]
    made = name_embeddings(llm, names, 3)
    torch.testing.assert_close(name_embeddings(llm, ["a cat", names[1]], 3), made)
    table = cast(Any, llm.embedding).weight
    for name, row in zip(names, made, strict=True):
        ids = llm.tokenizer(f"a {name}", add_special_tokens=False)["input_ids"]
        first = len(llm.tokenizer("a", add_special_tokens=False)["input_ids"])
        ids = ids[first : first + 3]
        torch.testing.assert_close(row[: len(ids)], table[ids].float())
        (end,) = llm.tokenizer("\n", add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(row[len(ids) :], table[[end] * (3 - len(ids))].float())


def pool(features: Tensor, names: Tensor) -> Pool:
    return Pool(features.unsqueeze(1), [], names)


def test_a_projector_learns_names_that_the_features_tell_apart_and_no_others() -> None:
    torch.manual_seed(0)
    told, centres = torch.randn(6, 2, 4), torch.randn(6, 8)
    centres[5] = centres[4]  # these two look the same
    names = torch.arange(6).repeat(80)
    shown = pool(centres[names] + 0.05 * torch.randn(480, 8), names)
    projector = LinearProjector(LinearProjectorConfig(tokens=2), feature_dim=8, llm_dim=4)

    def project(modality: str, features: Features) -> Features:
        assert modality == "image"
        return projector(features)

    before = measure_names(project, "image", shown.features, names, told)
    met = meet_names(
        project,
        projector.parameters(),
        {"image": shown},
        told,
        noise={"image": torch.full((8,), 0.1)},
        steps=300,
        batch_size=64,
        learning_rate=5e-2,
        held_out=60,
    )["image"]
    assert before["nearest"] < 0.5
    assert 0.65 < met["nearest"] < 0.9  # all but the two that look the same
    assert met["residual"] < 0.5 * before["residual"]
    again = measure_names(project, "image", shown.features[-60:], names[-60:], told)
    assert again == met


def test_a_shared_memory_names_each_modality_in_spite_of_its_gap_and_learns_both() -> None:
    torch.manual_seed(0)
    keys, told = nn.functional.normalize(torch.randn(12, 16), dim=-1), torch.randn(12, 2, 6)
    things = {"image": torch.arange(8).repeat(40), "audio": torch.arange(8, 12).repeat(80)}
    gaps = {"image": 0.1 * torch.randn(16), "audio": 0.3 * torch.randn(16)}
    pools = {m: pool(keys[n] + gaps[m] + 0.02 * torch.randn(320, 16), n) for m, n in things.items()}
    projector = MemoryProjector(
        MemoryProjectorConfig(memories=12, words=24, tokens=2, width=8, scale=8), feature_dim=16, llm_dim=6
    )
    shift = FeatureShift(16)
    remember(projector, {"audio": shift}, pools, keys, told)

    def project(modality: str, features: Features) -> Features:
        return projector(shift(features) if modality == "audio" else features)

    torch.testing.assert_close(shift.shift, gaps["image"] - gaps["audio"], rtol=0, atol=0.02)
    first = {m: measure_names(project, m, p.features, p.names, told) for m, p in pools.items()}
    assert min(figure["nearest"] for figure in first.values()) > 0.9  # untrained: what is recalled is told
    met = meet_names(
        project,
        [*projector.parameters(), *shift.parameters()],
        pools,
        told,
        noise={m: torch.full((16,), 0.01) for m in pools},
        steps=60,
        batch_size=64,
        held_out=40,
    )
    assert list(met) == ["image", "audio"]
    for modality, figures in met.items():
        assert figures["nearest"] == 1.0 and figures["residual"] < 0.5 * first[modality]["residual"]


def test_names_that_begin_alike_count_as_the_same() -> None:
    told = torch.randn(3, 2, 4)
    told[1] = told[0]

    def project(modality: str, features: Features) -> Features:
        return Features(told, features.mask.repeat_interleave(2, 1))

    assert measure_names(project, "image", torch.zeros(3, 1, 8), torch.tensor([1, 0, 2]), told) == {
        "residual": 0.0,
        "nearest": 1.0,
    }
