"""SmolLM2's GGUF file, from the package that carries it, as an ordinary transformers directory.

transformers reads GGUF at 20 s a start; what is written here loads in half a second.

Source: SmolLM2 (arXiv:2502.02737). The rule that splits the text before BPE is that of llama.cpp's pre-tokenizer
"smollm", which the file names: each digit alone, then GPT-2's pattern.
Differs: transformers reads such a file without the digits' rule, and then "\\n\\n1" gets other tokens than those
that the model was trained on.
"""

import io
from contextlib import redirect_stderr
from pathlib import Path

from anygen.progress import quiet_libraries


def convert(gguf: Path, target: Path) -> None:
    """Writes `config.json`, `generation_config.json`, the tokenizer and `model.safetensors` (bfloat16) to `target`.

    Args:
        gguf: a llama-architecture GGUF file.
        target: an existing directory.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Then
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet_libraries(), redirect_stderr(io.StringIO()):  # the GGUF reader's own bar has no switch
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.backend_tokenizer.pre_tokenizer = Then([Digits(individual_digits=True), ByteLevel(False)])
        plain = GgufConfig(dequantize=True)  # packed weights would refuse to be saved
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=plain, dtype=torch.bfloat16
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(target)
        model.save_pretrained(target, max_shard_size="1GB")
    # safetensors writes for the owner alone; a cache may serve several users.
    (target / "model.safetensors").chmod((target / "config.json").stat().st_mode)
