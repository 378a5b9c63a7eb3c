"""Plain talk that nobody wrote: the LLM continues its own template's opening of a user's turn, and answers it.

Source: Magpie (arXiv:2406.08464). The questions teach the route "words alone"; the answers, which the untouched LLM
gives anew at every use, stand in the history of conversations that go on to ask for pictures.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from anygen.llm import LLM
from anygen.prompts import pad

_SHOWS = re.compile(
    r"\b(draw|paint|sketch|picture|image|photo|illustrat|icon|show me|video|clip|animat|sound|audio|music|sing|hear"
    r"|logo|poster|emoji|portrait|depict|visual)",
    re.IGNORECASE,
)

_SENTENCES = re.compile(r".*[.!?](?=\s|$)", re.DOTALL)


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


@torch.inference_mode()
def self_answers(
    llm: LLM, prompts: Sequence[str], *, batch_size: int = 256, max_new_tokens: int = 96
) -> dict[str, str]:
    """The untouched LLM's greedy answer to each prompt, in a new chat; long answers end with a whole sentence.

    A prompt whose answer has no whole sentence within `max_new_tokens` is left out.
    """
    answers: dict[str, str] = {}
    with llm.adapter_off():
        for first in range(0, len(prompts), batch_size):
            asked = prompts[first : first + batch_size]
            rows = [_question(llm, prompt) for prompt in asked]
            ids, mask = (part.to(llm.device) for part in pad(rows, llm.eos_ids[0], left=True))
            made = llm.base.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens
            )
            texts = llm.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
            for prompt, text in zip(asked, texts, strict=True):
                if whole := _SENTENCES.match(text.strip()):
                    answers[prompt] = whole.group()
    return answers


def _question(llm: LLM, prompt: str) -> list[int]:
    turn = [{"role": "user", "content": prompt}]
    ids = llm.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    return cast(list[int], ids)


def write(llm: LLM, path: Path, count: int, seed: int) -> None:
    """Writes `self_prompts`, one a line."""
    path.write_text("\n".join(self_prompts(llm, count, seed=seed)) + "\n", encoding="utf-8")
