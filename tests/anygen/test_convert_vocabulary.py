"""Vocabularies of NExT-GPT, with a tokenizer of the kind that Llama's models have."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from anygen.convert_vocabulary import end_tokens, read_tokenizer, split
from anygen.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = {"image": "[IMG{}]", "audio": "[AUD{}]"}
TEMPLATE = "{{ messages[0]['content'] }}"
ADDED = ["<Img>", "</Img>", "[IMG0]", "[IMG1]", "<Aud>", "[AUD0]", "[AUD1]"]
"""Words stand between the signal tokens too, as in checkpoints of 32,042 rows."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer.model` and `added_tokens.json`, as transformers 4 wrote them."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("llama")
    text = iter(["Draw a red apple. What is this?", "### Human: hello\n### Assistant: the user"] * 20)
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=text,
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()  # type: ignore[call-arg]
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({token: size + i for i, token in enumerate(ADDED)}))
    return folder


def tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    found, borrowed = read_tokenizer(directory, None)
    assert not borrowed
    return found


def test_words_keep_their_ids_and_signal_tokens_go(directory: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    old = tokenizer(directory)
    found = split(old, NAMES, words=(), spaced=False, extend=False, template=TEMPLATE)
    size = len(old) - len(ADDED)
    assert found.runs == {"image": [size + 2, size + 3], "audio": [size + 5, size + 6]}
    assert found.kept == [*range(size + 2), size + 4] and found.size == size + 7
    found.tokenizer.save_pretrained(tmp_path)
    new = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Draw a red apple.", "What <Img> is </Img> this? é", "the <Aud> user\n### Human: hello"):
        ids = old(text, add_special_tokens=False)["input_ids"]
        assert new(text, add_special_tokens=False)["input_ids"] == [found.kept.index(token) for token in ids]  # type: ignore[arg-type]
        assert new.decode(new(text)["input_ids"], skip_special_tokens=True).strip() == text
    assert not set(NAMES.values()) & set(new.get_vocab()) and "[IMG0]" not in new.get_vocab()
    assert (new.bos_token, new.eos_token, new.chat_template) == ("<s>", "</s>", TEMPLATE)
    assert set(end_tokens(new)) == {2, new.convert_tokens_to_ids("###"), new.convert_tokens_to_ids("▁###")}


def test_a_space_stands_between_the_signal_tokens_of_the_second_line(directory: Path) -> None:
    old = tokenizer(directory)
    space = old.convert_tokens_to_ids("▁")
    found = split(old, NAMES, words=(), spaced=True, extend=False, template=TEMPLATE)
    image = old.convert_tokens_to_ids(["[IMG0]", "[IMG1]"])
    assert found.runs["image"] == [image[0], space, image[1]]  # type: ignore[index]
    assert space in found.kept


def test_a_tokenizer_of_another_model_is_refused(directory: Path, tiny_tokenizer: "PreTrainedTokenizerBase") -> None:
    plain = {"words": (), "extend": False, "template": TEMPLATE}
    with pytest.raises(CheckpointError, match=r"the tokenizer has no \[VID0\]: it is not the one of a NExT-GPT"):
        split(tokenizer(directory), {"video": "[VID{}]"}, spaced=False, **plain)  # type: ignore[arg-type]
    digits = {"image": "{}"}
    with pytest.raises(CheckpointError, match=r"the signal token \d+ is one of the LLM's own 294"):
        split(tiny_tokenizer, digits, spaced=False, **plain)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="the tokenizer has no token ▁, which stands between signal tokens"):
        split(tiny_tokenizer, digits, spaced=True, **plain)  # type: ignore[arg-type]


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"the tokenizer in {tmp_path} cannot be read"):
        read_tokenizer(tmp_path, None)
