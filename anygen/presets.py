"""Presets: full-size models by name, as recipes of published parts. Read without torch.

A preset names its parts, their licences and sizes, and yields the `AnyGenConfig` of a model whose projectors are still
to be trained; it has no weights of its own, so it answers nothing. `anygen info --presets` lists them,
`hub.fetch_parts` finds and fetches what they are made of.

**Memory** is told in bytes, at four precisions. Each part's weights are its parameters in the precision's type, with
what anygen does besides: encoders and what is trained stay in float32; at 8 and 4 bits the linear layers of the LLM
alone are quantised, its embeddings and all generators are in bfloat16. On top there is an allowance: the keys and
values of `CONTEXT` tokens, and `WORKING_BYTES` for what is computed in between.

Source: what is published of each part. Parameters are counted from the published configurations
(tests/anygen/test_presets.py builds each of them without memory). NExT-GPT: arXiv:2309.05519.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any

from anygen.errors import ConfigError
from anygen.model_config import (
    AnyGenConfig,
    InputConfig,
    ModalityConfig,
    OutputConfig,
    PartConfig,
    SourcedPartConfig,
)
from anygen.preset_parts import (
    AUDIOLDM2,
    AUDIOLDM_L,
    IMAGEBIND,
    LLAMA_3_8B,
    PRECISIONS,
    QWEN3_4B,
    SMOLLM3_3B,
    STABLE_AUDIO,
    STABLE_DIFFUSION_1_5,
    STABLE_DIFFUSION_2,
    STABLE_DIFFUSION_3,
    STABLE_DIFFUSION_XL,
    VICUNA_7B,
    VICUNA_7B_V0,
    WAN,
    ZEROSCOPE,
    EncoderPart,
    GeneratorPart,
    LanguageModel,
    Part,
    Precision,
)

GIB = 2**30
CONTEXT = 2048
"""Tokens whose keys and values are allowed for."""
WORKING_BYTES = 57 * GIB // 10
"""What one request took above the weights, everything resident in bfloat16: 23.7 GiB at the peak less 18.0, measured on
one H100 for a picture of 512 x 512, 16 frames of 320 x 576 and 5 s of sound. Larger media take more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What one thing takes in memory."""

    role: str
    bytes: dict[Precision, int | None]
    """None: not known."""
    answering: bool = True
    """Whether it is needed to answer; text encoders are needed to train on captions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A recipe for a model."""

    name: str
    summary: str
    llm: LanguageModel
    encoder: EncoderPart
    generators: Mapping[str, GeneratorPart]
    """Modality -> what makes it."""
    signal_tokens: Mapping[str, int] = field(default_factory=lambda: {"image": 4, "video": 24, "audio": 8})
    """Modality -> S, the tokens of a run."""
    around: tuple[str, str] = ("", "")
    """Text before and behind a media value."""
    routes: bool = True
    """Whether an answer begins with a route (`AnyGenConfig.routes`)."""
    width: int = 512
    """E, of the output projectors."""
    blocks: int = 4
    """Of the output projectors, in the encoder and again in the decoder."""
    converter: str | None = None
    """The `anygen convert` that imports published weights for such a model; None where nobody published any."""
    note: str = ""
    """Where it differs from what it is named after."""

    @property
    def parts(self) -> dict[str, Part]:
        """Role -> part."""
        made = {f"{modality} generator": part for modality, part in self.generators.items()}
        return {"LLM": self.llm, "encoder": self.encoder, **made}

    @property
    def marks(self) -> str:
        """The marks of all parts, each with the roles that bear it."""
        told = []
        for mark, attribute in (("non-commercial", "non_commercial"), ("gated", "gated")):
            if roles := [role for role, part in self.parts.items() if getattr(part, attribute)]:
                told.append(f"{mark}: {', '.join(roles)}")
        return "; ".join(told)

    def config(self) -> AnyGenConfig:
        """The model's configuration: projectors of NExT-GPT's kinds and sizes, parts by their sources."""
        before, after = self.around
        options = {
            "width": self.width,
            "ffn": 4 * self.width,
            "encoder_layers": self.blocks,
            "decoder_layers": self.blocks,
        }
        modalities = {}
        for modality, part in self.generators.items():
            encoder = SourcedPartConfig(
                name=self.encoder.name, source=self.encoder.source, options={"modality": modality}
            )
            reads = InputConfig(
                encoder=encoder,
                feature_dim=self.encoder.feature_dim,
                shares=None if modality == self._owner else self._owner,
                before=before,
                after=after,
            )
            makes = OutputConfig(
                signal_tokens=self.signal_tokens[modality],
                condition=dict(part.condition),
                generator=SourcedPartConfig(name=part.name, source=part.source, options=dict(part.options)),
                projector=PartConfig(name="text_fc", options=options),
            )
            modalities[modality] = ModalityConfig(input=reads, output=makes)
        return AnyGenConfig(name=self.name, llm=self.llm.source, modalities=modalities, routes=self.routes)

    @property
    def _owner(self) -> str:
        """The modality whose input projector the others share."""
        return next(iter(self.generators))

    def trained(self) -> dict[str, int]:
        """What is trained -> its parameters."""
        depth, features = self.llm.width, self.encoder.feature_dim
        counts = {}
        for modality in self.generators:
            if modality == self._owner:
                counts[f"{modality} input projector"] = features * depth + depth
            else:
                counts[f"{modality} input shift"] = 2 * features
        for modality, part in self.generators.items():
            counts[f"{modality} output projector"] = text_fc_parameters(
                depth, part.condition, width=self.width, blocks=self.blocks
            )
        rows = 2 + sum(self.signal_tokens[modality] for modality in self.generators)  # 2 routes
        counts["signal rows"] = rows * depth * (1 if self.llm.tied else 2)
        return counts

    def needs(self) -> list[Need]:
        """What each thing takes; text encoders last."""

        def weights(role: str, parameters: int | None, *, exact: bool = False, answering: bool = True) -> Need:
            size = {p: 4 if exact or p == "fp32" else 2 for p in PRECISIONS}
            told: dict[Precision, int | None] = {
                p: None if parameters is None else parameters * size[p] for p in PRECISIONS
            }
            return Need(role=role, bytes=told, answering=answering)

        wide = {p: 4 if p == "fp32" else 2 for p in PRECISIONS}  # bytes of a number that is computed
        keys = 2 * self.llm.layers * self.llm.key_width * CONTEXT
        makers = self.generators.items()
        return [
            Need(role="LLM", bytes={p: self.llm.weights(p) for p in PRECISIONS}),
            weights("encoders", sum(self.encoder.trunks[modality] for modality in self.generators), exact=True),
            weights("projectors, signal rows", sum(self.trained().values()), exact=True),
            *(weights(f"{modality} generator", part.parameters) for modality, part in makers),
            Need(role=f"keys and values of {CONTEXT:,} tokens", bytes={p: keys * wide[p] for p in PRECISIONS}),
            Need(role="working memory", bytes={p: WORKING_BYTES * wide[p] // 2 for p in PRECISIONS}),
            *(weights(f"{modality} text encoders", part.text_parameters, answering=False) for modality, part in makers),
        ]

    def total(self, precision: Precision, *, texts: bool = False) -> int | None:
        """Bytes that everything takes together, with all generators resident; None if a part's size is not known.

        Args:
            precision: of the weights.
            texts: with the generators' text encoders.
        """
        total = 0
        for need in self.needs():
            if need.answering or texts:
                if (size := need.bytes[precision]) is None:
                    return None
                total += size
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "name": self.name,
            "summary": self.summary,
            "parts": {role: asdict(part) for role, part in self.parts.items()},
            "trained": self.trained(),
            "memory": {
                precision: {
                    "needs": {need.role: need.bytes[precision] for need in self.needs()},
                    "answering": self.total(precision),
                    "with_text_encoders": self.total(precision, texts=True),
                }
                for precision in PRECISIONS
            },
            "note": self.note,
        }


def text_fc_parameters(llm_dim: int, condition: Mapping[str, tuple[int, ...]], *, width: int, blocks: int) -> int:
    """Parameters of NExT-GPT's output projector (`anygen.projectors.output.TextFcLayer`).

    Args:
        llm_dim: D.
        condition: name -> (L, C), or (C,) for one token.
        width: E; the feed-forward blocks are four times as wide.
        blocks: in the encoder and again in the decoder.
    """
    attention = 4 * width * (width + 1)
    feed = 2 * 4 * width * width + 5 * width
    norm = 2 * width
    encoder = blocks * (attention + feed + 2 * norm) + norm
    decoder = blocks * (2 * attention + feed + 3 * norm) + norm
    heads = sum((width + 1) * shape[-1] for shape in condition.values())
    queries = width * sum(shape[0] if len(shape) == 2 else 1 for shape in condition.values())
    return (llm_dim + 1) * width + encoder + decoder + heads + queries


def get(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: there is none; lists the known ones.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ConfigError(f"there is no preset '{name}'{hint}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="nextgpt-7b-v1",
            summary="NExT-GPT as its weights were published",
            llm=VICUNA_7B_V0,
            encoder=IMAGEBIND,
            generators={"image": STABLE_DIFFUSION_1_5, "video": ZEROSCOPE, "audio": AUDIOLDM_L},
            around=("<Img>", "</Img> "),
            routes=False,
            converter="nextgpt",
        ),
        Preset(
            name="nextgpt-7b",
            summary="NExT-GPT's second code line, with AudioLDM 2",
            llm=VICUNA_7B,
            encoder=IMAGEBIND,
            generators={"image": STABLE_DIFFUSION_2, "video": ZEROSCOPE, "audio": AUDIOLDM2},
            around=("", "\n"),
            routes=False,
            converter="nextgpt",
            note=(
                "NExT-GPT's code has AudioLDM here and groups ImageBind's patches; this one has AudioLDM 2, whose "
                "condition is of two tensors, and one linear map of ImageBind's embedding"
            ),
        ),
        Preset(
            name="smollm3-3b",
            summary="the smallest; no part but the encoder is non-commercial",
            llm=SMOLLM3_3B,
            encoder=IMAGEBIND,
            generators={"image": STABLE_DIFFUSION_XL, "video": WAN, "audio": STABLE_AUDIO},
        ),
        Preset(
            name="qwen3-4b",
            summary="no part has terms to be accepted first",
            llm=QWEN3_4B,
            encoder=IMAGEBIND,
            generators={"image": STABLE_DIFFUSION_XL, "video": WAN, "audio": AUDIOLDM2},
        ),
        Preset(
            name="llama-3-8b",
            summary="Llama 3 with Stable Diffusion 3",
            llm=LLAMA_3_8B,
            encoder=IMAGEBIND,
            generators={"image": STABLE_DIFFUSION_3, "video": WAN, "audio": STABLE_AUDIO},
        ),
    )
}
"""Name -> preset."""
