"""The caption tokenizer."""

from pathlib import Path

import pytest

from anygen.training.captions import caption_corpus
from anygen.training.icons import Concept
from anygen.training.tokenizer import END, START, load_tokenizer, train_tokenizer

CONCEPTS = [Concept("1", "red apple", ("apple",), 4), Concept("2", "Mount Fuji", (), 5)]


@pytest.fixture(scope="module")
def tokenizer():  # noqa: ANN201
    return train_tokenizer(caption_corpus(CONCEPTS, seed=0), vocab_size=400, context=16)


def test_the_end_has_the_largest_id(tokenizer) -> None:
    ids = tokenizer(["a red apple", "!?\u00e9\U0001f34e"], padding=True)["input_ids"]
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == max(map(max, ids))


def test_captions_stand_between_start_and_end_and_are_padded_with_end(tokenizer) -> None:
    (ids,) = tokenizer(["a red apple"], padding="max_length", max_length=16)["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[0] == START and words.index(END) < 10 and set(words[words.index(END) :]) == {END}
    (cut,) = tokenizer(["a red apple " * 20], truncation=True, max_length=16)["input_ids"]
    assert len(cut) == 16 and cut[0] == tokenizer.bos_token_id and cut[-1] == tokenizer.eos_token_id


def test_letters_of_any_case_and_width_are_one(tokenizer) -> None:
    assert tokenizer("MOUNT Fuji")["input_ids"] == tokenizer("mount fuji")["input_ids"]
    assert tokenizer("\uff41pple")["input_ids"] == tokenizer("apple")["input_ids"]  # a full-width a


def test_any_text_comes_back(tokenizer) -> None:
    for text in ("a red apple, in the 3d style", "caf\u00e9 \u65e5\u672c \U0001f600", "x" * 30):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_known_words_are_few_tokens(tokenizer) -> None:
    assert len(tokenizer("red apple")["input_ids"]) <= 2 + 2


def test_it_is_read_back_as_it_was(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    texts = ["two Apples on the left", ""]
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert loaded.model_max_length == 16 and loaded.eos_token_id == tokenizer.eos_token_id
