"""Batches, augmentation and run of the encoder's contrastive training."""

import json
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen.component import read_safetensors
from anygen.encoders.imagebind import ImageBindEncoder
from anygen.encoders.imagebind_clips import sound_values
from anygen.encoders.imagebind_inputs import token_ids
from anygen.media import Audio, Image, Video
from anygen.training.contrastive import ConceptBatches, ContrastiveRecipe, augment, train
from anygen.training.contrastive_pools import PLANE, ClipMatches, SoundMatches, spectrogram
from anygen.training.icons import IconSet
from anygen.training.pictures import PictureSource
from anygen.training.sound_mixing import SoundSource
from anygen.training.sounds import SoundBank
from anygen.training.tokenizer import train_tokenizer

CONTEXT = 24


@pytest.fixture(scope="module")
def tokenizer():  # noqa: ANN201
    from anygen.training.captions import caption_corpus
    from anygen.training.icons import Concept

    words = "red circle ball blue square green triangle purple bar plank beam orange cross black diamond"
    concepts = [Concept(str(n), word, (), 7) for n, word in enumerate(words.split())]
    return train_tokenizer(caption_corpus(concepts, 0), vocab_size=400, context=CONTEXT).backend_tokenizer


def test_each_concept_is_shown_twice_in_two_styles(icons: IconSet, tokenizer) -> None:
    recipe = ContrastiveRecipe(icons="", concepts_per_batch=4, variants=2)
    batches = ConceptBatches(recipe, PictureSource(icons, seed=0), tokenizer, CONTEXT)
    for pixels, names, captions, concepts in islice(batches, 3):
        assert pixels.shape == (8, 3, 32, 32) and names.shape == captions.shape == (8, CONTEXT)
        assert torch.equal(concepts[0::2], concepts[1::2]) and len(set(concepts.tolist())) == 4
    for concept, row in zip(batches.concepts.tolist(), batches.icons.tolist(), strict=True):
        assert {int(icons.concept[icon]) for icon in row} == {concept}
        assert all(icons.style[a] != icons.style[b] for a, b in pairwise(row))


def test_names_and_captions_name_the_concept(icons: IconSet, tokenizer) -> None:
    batches = ConceptBatches(ContrastiveRecipe(icons=""), PictureSource(icons, seed=0), tokenizer, CONTEXT)
    _, names, captions, concepts = next(iter(batches))
    for ids in (names, captions):
        for row, number in zip(ids.tolist(), concepts.tolist(), strict=True):
            concept, text = icons.concepts[number], tokenizer.decode(row)
            assert any(name in text for name in (concept.label, *concept.aliases)), text


def test_augmenting_keeps_range_and_treats_samples_apart() -> None:
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 32, 32).expand(16, -1, -1, -1).clone()
    changed = augment(pixels)
    assert changed.shape == pixels.shape and 0 <= changed.min() and changed.max() <= 1
    assert len({tuple(picture.flatten().tolist()) for picture in changed}) == 16


def test_augmenting_moves_little_and_mirrors_nothing() -> None:
    torch.manual_seed(0)
    pixels = torch.zeros(64, 3, 32, 32)
    pixels[:, :, 4:12, 4:12] = 1  # in the top left corner
    light = augment(pixels).mean(1)
    light = (light - light.flatten(1).median(1).values[:, None, None]).abs()  # a negative is as good
    corners = torch.stack([light[:, :16, :16], light[:, :16, 16:], light[:, 16:, :16], light[:, 16:, 16:]], 1)
    assert bool((corners.mean((2, 3)).argmax(1) == 0).all())


def test_a_run_writes_an_encoder(large_icons_dir: Path, tmp_path: Path) -> None:
    figures = train(
        ContrastiveRecipe(icons=str(large_icons_dir), vocab_size=400, concepts_per_batch=3, steps=2), tmp_path
    )
    assert set(figures) == {"naming_3D", "naming_cartoon", "naming_emojione"}
    assert all(0 <= share <= 1 for share in figures.values())
    one, other = (ImageBindEncoder.from_pretrained(tmp_path / "imagebind", modality="image") for _ in range(2))
    pixels = IconSet.load(large_icons_dir, styles=("flat",)).pixels[:2, :3].float() / 255
    inputs = one.preprocess([Image.from_any(picture) for picture in pixels])
    values = one(**inputs).values
    assert torch.equal(values, other(**inputs).values) and not torch.equal(values[0], values[1])
    text = ImageBindEncoder.from_pretrained(tmp_path / "imagebind", modality="text")
    assert text(**text.preprocess(["a red circle"])).values.shape[-1] == one.feature_dim
    rows = [json.loads(line) for line in (tmp_path / "contrastive.jsonl").read_text().splitlines()]
    assert rows[1]["step"] == 2 and rows[1]["images"] == 12 and rows[-1]["final"]


def test_a_run_goes_on_from_another_and_adds_the_trunk_that_it_lacks(
    large_icons_dir: Path, sound_bank_dir: Path, tmp_path: Path
) -> None:
    first = ContrastiveRecipe(icons=str(large_icons_dir), vocab_size=400, concepts_per_batch=3, steps=1)
    train(first, tmp_path / "one")
    start = str(tmp_path / "one" / "imagebind")
    more = replace(first, start=start, sounds=str(sound_bank_dir), sound_pool=8, sounds_per_batch=4, measured=4)
    more = replace(more, steps=2, start_rate=0.0, whole_from=0.0, ema=0.0)
    train(more, tmp_path / "two")
    train(replace(more, learning_rate=0.0), tmp_path / "three")
    one, two, three = (read_safetensors(tmp_path / name / "imagebind") for name in ("one", "two", "three"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())  # these trunks stand still
    assert any(not torch.equal(two[key], three[key]) for key in two.keys() - one.keys())  # the new one learns
    assert {key.split(".")[1] for key in two.keys() - one.keys()} == {"audio"}
    tokenizers = [(tmp_path / name / "imagebind" / "tokenizer.json").read_text() for name in ("one", "two")]
    assert json.loads(tokenizers[0])["model"] == json.loads(tokenizers[1])["model"]
    rows = [json.loads(line) for line in (tmp_path / "two" / "contrastive.jsonl").read_text().splitlines()]
    assert any(row.get("whole") for row in rows)


def words_of(tokenizer: Any) -> Any:
    return partial(token_ids, tokenizer, context_length=CONTEXT)


def test_the_frames_of_a_clip_are_changed_alike(large_icons: IconSet, tokenizer: Any) -> None:
    device = torch.device("cpu")
    pool = ClipMatches(large_icons, 8, words_of(tokenizer), seed=0, device=device)
    pool.frames = pool.frames[:, :1].expand(-1, 16, -1, -1, -1)  # nothing moves
    torch.manual_seed(0)
    still = pool.draw(6, augment)
    assert still.values.shape == (6, 1, 3, 2, *large_icons.pixels.shape[-2:])
    assert torch.equal(*still.values[:, 0].unbind(2))
    assert len({tuple(clip.flatten().tolist()) for clip in still.values}) == 6
    assert still.names.shape == still.captions.shape == (6, CONTEXT)


def test_clips_of_one_thing_and_motion_are_one_thing(large_icons: IconSet, tokenizer: Any) -> None:
    pool = ClipMatches(large_icons, 30, words_of(tokenizer), seed=0, device=torch.device("cpu"))
    same = (pool.things[:, None] == pool.things[None]) == (pool.names[:, None] == pool.names[None]).all(-1)
    assert bool(same.all()) and 6 < len(pool.things.unique()) < 30


def test_sounds_are_read_in_windows_as_the_encoder_reads_them(bank: SoundBank, tokenizer: Any) -> None:
    pool = SoundMatches(bank, 12, words_of(tokenizer), seed=0, device=torch.device("cpu"))
    heard = pool.draw(5)
    assert heard.values.shape == (5, 1, 128, PLANE) and int(heard.things.max()) < len(pool.labels)
    wave = next(SoundSource(bank, seed=6).clips(1)).waveforms
    plane = spectrogram(wave)[0, 0]
    [[first, *_]] = sound_values([Audio(wave[0].numpy(), 16_000)], 128, PLANE)
    steps = 198  # two seconds; the encoder then fills up with silence
    assert (plane[:, :steps] - first[0, :, :steps]).abs().mean() < 0.02  # means of 2 s and of all differ a little


def test_a_run_with_clips_and_sounds_writes_their_trunks(
    large_icons_dir: Path, sound_bank_dir: Path, tmp_path: Path
) -> None:
    recipe = ContrastiveRecipe(
        icons=str(large_icons_dir),
        sounds=str(sound_bank_dir),
        vocab_size=500,
        variants=1,
        concepts_per_batch=2,
        clips=4,
        clips_per_batch=2,
        sound_pool=4,
        sounds_per_batch=2,
        measured=2,
        steps=1,
    )
    figures = train(recipe, tmp_path)
    assert 0 <= figures["naming_motions"] <= 1 and 0 <= figures["naming_sounds"] <= 1
    heard = ImageBindEncoder.from_pretrained(tmp_path / "imagebind", modality="audio")
    values = heard.preprocess([Audio(np.random.default_rng(0).normal(0, 0.1, 40_960).astype(np.float32), 16_000)])
    assert heard(**values).values.shape == (1, 1, 256)
    seen = ImageBindEncoder.from_pretrained(tmp_path / "imagebind", modality="video")
    clip = Video(np.zeros((16, 128, 128, 3), dtype=np.uint8), 8.0)
    assert seen(**seen.preprocess([clip])).values.shape == (1, 1, 256)
