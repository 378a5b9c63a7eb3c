"""The caption tokenizer of the embedded default: byte-level BPE over the captions that it will meet, lower-cased.

Shared by the text trunk of the encoder and the text encoder of the generator. The end token has the largest id,
because ImageBind and CLIP pool at `argmax(ids)`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, context: int) -> Any:
    """A `PreTrainedTokenizerFast` that wraps captions in START and END and pads with END, as CLIP's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=sorted(alphabet), show_progress=False)
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens([START, END])
    start, end = core.token_to_id(START), core.token_to_id(END)
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=START, eos_token=END, pad_token=END, model_max_length=context
    )


def load_tokenizer(directory: Path) -> Any:
    """Reads what `save_pretrained` wrote."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)
