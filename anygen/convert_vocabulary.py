"""A vocabulary that NExT-GPT extended -> the LLM's words, and the rows that stand for media.

```
0 … 31999    the LLM's own                    ┐
32000 32001  <Img> </Img>, text like any other ┘ kept, in order: the tokenizer and `vocabulary.safetensors`
32002 …      [IMG0] … [VID0] … [AUD0] …          signal rows
```

Source: NExT-GPT (arXiv:2309.05519), the two lines of its code.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anygen.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNTS = {"image": 4, "video": 24, "audio": 8}
"""The signal tokens of each modality, in the order in which both lines add them."""
SPACE = "▁"
"""What the second line's tokenizer puts between signal tokens, and its projectors read with them."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The two halves of an extended vocabulary."""

    tokenizer: "PreTrainedTokenizerBase"
    """Of the kept tokens alone, which are numbered anew."""
    size: int
    """All tokens, kept or not."""
    kept: list[int]
    """Old ids of the kept tokens, by their new ids."""
    runs: dict[str, list[int]]
    """Modality -> old ids of one whole run, S of them."""


def read_tokenizer(beside: Path, base: Path | None) -> "tuple[PreTrainedTokenizerBase, bool]":
    """The tokenizer beside a checkpoint, or else that of the LLM; and whether it is the LLM's.

    Raises:
        CheckpointError: neither has one, or it cannot be read.
    """
    from transformers import AutoTokenizer

    for directory in (beside, base):
        if directory is None or not any((directory / f"tokenizer{end}").is_file() for end in (".json", ".model")):
            continue
        try:
            return AutoTokenizer.from_pretrained(directory, local_files_only=True), directory is not beside
        except Exception as error:  # the library raises many kinds
            raise CheckpointError(f"the tokenizer in {directory} cannot be read: {error}") from None
    raise CheckpointError(
        f"there is no tokenizer beside the checkpoint ({beside}); put its tokenizer files there, "
        "or pass the LLM's directory (--llm)"
    )


def split(
    tokenizer: "PreTrainedTokenizerBase",
    names: Mapping[str, str],
    *,
    words: tuple[str, ...],
    spaced: bool,
    extend: bool,
    template: str,
) -> Vocabulary:
    """Takes the signal tokens out of a tokenizer.

    Args:
        tokenizer: changed, if it is to be extended.
        names: modality -> how its signal tokens are called, such as "[IMG{}]".
        words: other tokens that were added before them.
        spaced: whether a space stands between the signal tokens of a run.
        extend: adds the tokens first: the tokenizer is the LLM's own.
        template: the chat template of the result.

    Raises:
        CheckpointError: a modality has no signal token, the space is no token, or a signal token is one of the LLM's.
    """
    if extend:
        tokenizer.add_tokens([*words, *(names[modality].format(i) for modality, n in COUNTS.items() for i in range(n))])
    known = tokenizer.get_vocab()
    runs: dict[str, list[int]] = {}
    for modality, name in names.items():
        strings = (name.format(i) for i in count())
        runs[modality] = list(iter(lambda strings=strings: known.get(next(strings), -1), -1))
        if not runs[modality]:
            raise CheckpointError(f"the tokenizer has no {name.format(0)}: it is not the one of a NExT-GPT")
    gone = {token for run in runs.values() for token in run}
    kept = [token for token in range(len(tokenizer)) if token not in gone]
    if spaced:
        if SPACE not in known:
            raise CheckpointError(f"the tokenizer has no token {SPACE}, which stands between signal tokens")
        runs = {modality: _between(run, known[SPACE]) for modality, run in runs.items()}
    return Vocabulary(_without(tokenizer, gone, kept, template), len(tokenizer), kept, runs)


def end_tokens(tokenizer: "PreTrainedTokenizerBase", mark: str = "###") -> list[int]:
    """The ids that end an answer of the first line, which was taught to close with a line of `###`."""

    def ids(text: str) -> list[int]:
        return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])

    known = tokenizer.get_vocab()
    found = [tokenizer.eos_token_id, *ids(f"\n{mark}")[len(ids("\n")) :][:1], known.get(SPACE + mark)]
    return list(dict.fromkeys(int(token) for token in cast(list[Any], found) if token is not None))


def _between(run: list[int], space: int) -> list[int]:
    return [token for pair in zip(run, [space] * len(run), strict=True) for token in pair][:-1]


def _without(
    tokenizer: "PreTrainedTokenizerBase", gone: set[int], kept: list[int], template: str
) -> "PreTrainedTokenizerBase":
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    data = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    numbers = {old: new for new, old in enumerate(kept)}
    if min(gone) < len(data["model"]["vocab"]):
        raise CheckpointError(f"the signal token {min(gone)} is one of the LLM's own {len(data['model']['vocab'])}")
    added = [token for token in data["added_tokens"] if token["id"] not in gone]
    data["added_tokens"] = [token | {"id": numbers[token["id"]]} for token in added]
    special = {name: tokenizer.special_tokens_map[name] for name in _SPECIAL if name in tokenizer.special_tokens_map}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), chat_template=template, **cast(Any, special)
    )


_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
