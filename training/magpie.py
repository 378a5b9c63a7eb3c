"""Plain questions that nobody wrote: the LLM continues its own template's opening of a user's turn.

Source: Magpie (arXiv:2406.08464). The questions teach the route "words alone"; their answers are never used, because
the untouched LLM gives them anew.
"""

import re
from pathlib import Path

import torch

from anygen.llm import LLM

_SHOWS = re.compile(
    r"\b(draw|paint|sketch|picture|image|photo|illustrat|icon|show me|video|clip|animat|sound|audio|music|sing|hear"
    r"|logo|poster|emoji|portrait|depict|visual)",
    re.IGNORECASE,
)


@torch.inference_mode()
def self_prompts(llm: LLM, count: int, *, seed: int, batch_size: int = 256, max_new_tokens: int = 48) -> list[str]:
    """`count` different user turns of one line, in the order drawn; what might ask for media is left out.

    Args:
        llm: with a chat template that opens a user's turn, as ChatML does.
        count: how many to return.
        seed: of the sampling.
        batch_size: turns sampled at once.
        max_new_tokens: longer turns are dropped.
    """
    torch.manual_seed(seed)
    rendered = llm.tokenizer.apply_chat_template([{"role": "user", "content": "\ue000"}], tokenize=False)
    opening = llm.tokenizer(str(rendered).split("\ue000")[0], return_tensors="pt", add_special_tokens=False)
    kept: dict[str, None] = {}
    while len(kept) < count:
        ids = opening.input_ids.expand(batch_size, -1).to(llm.device)
        made = llm.base.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_p=0.95,
            max_new_tokens=max_new_tokens,
        )
        for row in made[:, ids.shape[1] :].tolist():
            if not any(token in llm.eos_ids for token in row):
                continue  # cut off
            text = str(llm.tokenizer.decode(row, skip_special_tokens=True))
            line = " ".join(text.split())
            if 8 <= len(line) <= 200 and line.isascii() and not _SHOWS.search(line):
                kept.setdefault(line)
    return list(kept)[:count]


def write(llm: LLM, path: Path, count: int, seed: int) -> None:
    """Writes `self_prompts`, one a line."""
    path.write_text("\n".join(self_prompts(llm, count, seed=seed)) + "\n", encoding="utf-8")
