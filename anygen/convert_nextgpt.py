"""NExT-GPT's checkpoints, of both lines of its code -> a directory that `AnyGenModel.from_pretrained` reads.

Every tensor goes somewhere, or nothing is written:

| in the checkpoint | here |
|---|---|
| `llama_proj`, `mm_input_projector` | `projectors.safetensors`, `input.image`; video and audio share it |
| `gen_text_hidden_fcs{,_video,_audio}.0`, `mm_output_{img,vid,aud}_projector` | the same file, `output.<modality>` |
| `lora_A`, `lora_B` | `adapter/`, in PEFT's format |
| rows of `embed_tokens` and `lm_head` that stand for media | `signal_tokens.safetensors` |
| all other rows, which trained along | `vocabulary.safetensors`, which replaces the LLM's, and `tokenizer/` |

NExT-GPT has no routes: `routes` is false, and the rows of `<|words|>` and `<|media|>`, which are never read, are zero.

Source: NExT-GPT (arXiv:2309.05519), `code/` (v1) and `nextgpt/` (v2) of its repository.
Shapes: R signal rows, D LLM width.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from anygen.convert import SHARD, Coverage, compare, read_pickle
from anygen.convert_nextgpt_lines import V1, V2, Line
from anygen.convert_vocabulary import Vocabulary, end_tokens, read_tokenizer, split
from anygen.errors import CheckpointError, ConfigError
from anygen.features import ConditionSpec
from anygen.model_config import (
    AnyGenConfig,
    InputConfig,
    ModalityConfig,
    OutputConfig,
    PartConfig,
    SourceConfig,
    SourcedPartConfig,
)
from anygen.projectors.output import TextFcLayer, TextFcLayerConfig

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import LlamaConfig

AUDIO_SCALE = 20.0
"""By which ImageBind's release multiplies the embeddings of sounds; NExT-GPT reads them so, our encoder at length 1."""
V1_FILE, V2_FILES = "pytorch_model.pt", ("mm_input_projector.bin", "mm_output_projector.bin", "non_lora_trainables.bin")


@dataclass(frozen=True, slots=True)
class NextGPTReport:
    """What `convert_nextgpt` did; written to `conversion.json`."""

    line: str
    files: list[str]
    coverage: Coverage
    superseded: list[str]
    """"file: key" of tensors that a later stage's file holds too, which counts."""
    parts: dict[str, tuple[int, int]]
    """Part -> tensors and parameters."""
    kept_tokens: int
    signal_rows: int
    changed_rows: dict[str, int] | None
    """"embed_tokens" and "lm_head" -> rows of words that differ from the LLM's; None where it was not at hand."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "line": self.line,
            "files": self.files,
            "matched": {key: list(shape) for key, shape in self.coverage.matched.items()},
            "missing": self.coverage.missing,
            "unexpected": self.coverage.unexpected,
            "shapes": self.coverage.shapes,
            "superseded": self.superseded,
            "parts": {part: {"tensors": n, "parameters": size} for part, (n, size) in self.parts.items()},
            "vocabulary": {
                "kept_tokens": self.kept_tokens,
                "signal_rows": self.signal_rows,
                "changed_rows": self.changed_rows,
            },
        }


def convert_nextgpt(
    checkpoint: str | Path,
    out: str | Path,
    *,
    llm: str | None = None,
    encoder: str = "imagebind-huge",
    lora_alpha: int = 32,
    overwrite: bool = False,
) -> NextGPTReport:
    """Converts one checkpoint, whole or not at all.

    Args:
        checkpoint: v1's `pytorch_model.pt` or a directory with it; or a directory with v2's `.bin` files and, in it or
            in one folder of it, `adapter_config.json` with its weights. The tokenizer's files and `config.json` are
            read from that directory, or else from `llm`.
        out: the new directory.
        llm: the LLM's directory or name ("repo" or "repo@revision"). A directory's rows are compared with those of
            the checkpoint. v1's has no published name.
        encoder: ImageBind's directory or name.
        lora_alpha: the strength of v1's LoRA, which its checkpoint does not tell.
        overwrite: replaces a model that lies there.

    Raises:
        CheckpointError: a file is missing, is damaged or holds code; keys are missing, unexpected or mis-shaped; or
            tokenizer, rows and LLM do not belong together.
        ConfigError: no LLM was given for v1, or the input projector is of a kind that anygen does not have.
        OutputError: `out` is not empty, or cannot be written.
    """
    from anygen.saving import replacing

    folder, files, line = _find(Path(checkpoint))
    with replacing(Path(out), overwrite=overwrite) as temporary:
        if (named := llm or line.llm) is None:
            raise ConfigError(
                "the LLM of NExT-GPT v1 (Vicuna 7B v0) is published as a difference alone; "
                "pass its directory or name (--llm)"
            )
        base = Path(named).expanduser() if Path(named).expanduser().is_dir() else None
        state, superseded = _read(files)
        settings = _llm_config(folder, base)
        tokenizer, borrowed = read_tokenizer(folder, base)
        vocabulary = split(
            tokenizer, line.tokens, words=line.words, spaced=line.spaced, extend=borrowed, template=line.template
        )
        lora = _lora(files, state, lora_alpha)
        projector, wanted = _wanted_input(state, line, settings.hidden_size)
        outputs: dict[str, OutputConfig] = {}
        for modality, prefix in line.outputs.items():
            outputs[modality] = _output(state, line, modality, len(vocabulary.runs[modality]))
            layer = _meta_projector(outputs[modality], settings.hidden_size)
            wanted |= {f"{prefix}.{_theirs(k, line)}": tuple(v.shape) for k, v in layer.state_dict().items()}
        rows = ("embed_tokens.weight",) if settings.tie_word_embeddings else ("embed_tokens.weight", "lm_head.weight")
        _check_rows(state, rows, vocabulary)
        wanted |= {row: (vocabulary.size, settings.hidden_size) for row in rows}
        if lora is not None:
            wanted |= _adapter_shapes(settings, lora)
        coverage = compare(wanted, state)
        coverage.check(f"the checkpoint {checkpoint}")
        kept = {row.removesuffix(".weight"): state[row][vocabulary.kept] for row in rows}
        config = _config(line, named if base is None else str(base.resolve()), encoder, projector, state, outputs)
        config.save(temporary / "anygen.json")
        changed = None if base is None else _changed_rows(base, kept)
        parts = {
            "projectors": _write(_projectors(state, line), temporary, "projectors"),
            "signal_tokens": _write(_signal_rows(state, rows, vocabulary), temporary, "signal_tokens"),
            "vocabulary": _write(kept, temporary, "vocabulary"),
        }
        if lora is not None:
            adapter = {f"base_model.model.model.{key}": state[key] for key in wanted if ".lora_" in key}
            lora.base_model_name_or_path, lora.inference_mode = config.llm.repo, True
            lora.save_pretrained(str(temporary / "adapter"))
            parts["adapter"] = _write(adapter, temporary / "adapter", "adapter_model")
        _write_tokenizer(vocabulary, line, temporary / "tokenizer")
        count = sum(map(len, vocabulary.runs.values()))
        report = NextGPTReport(
            line.name, [f.name for f in files], coverage, superseded, parts, len(vocabulary.kept), count, changed
        )
        (temporary / "conversion.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        _finish(temporary)
    return report


def _find(checkpoint: Path) -> tuple[Path, list[Path], Line]:
    """The directory of the tokenizer, the files in order of their stages, and the line."""
    if checkpoint.is_file():
        line = V2 if checkpoint.name in V2_FILES else V1
        files = [checkpoint] if line is V1 else [checkpoint.parent / name for name in V2_FILES]
        folder = checkpoint.parent
    elif checkpoint.is_dir():
        line = V1 if (checkpoint / V1_FILE).is_file() else V2
        files = [checkpoint / name for name in ((V1_FILE,) if line is V1 else V2_FILES)]
        folder = checkpoint
    else:
        raise CheckpointError(f"there is no checkpoint {checkpoint}")
    files = [file for file in files if file.is_file()]
    if not files:
        raise CheckpointError(f"{checkpoint} holds no checkpoint of NExT-GPT: neither {V1_FILE} nor {V2_FILES[0]}")
    if line is V2:
        settings = [folder / "adapter_config.json", *sorted(folder.glob("*/adapter_config.json"))]
        weights = [path.parent / name for path in settings if path.is_file() for name in ("adapter_model.bin", _SAFE)]
        adapter = [path for path in weights if path.is_file()][:1]
        if not adapter and files[-1].name == V2_FILES[-1]:
            raise CheckpointError(
                f"{files[-1]} was saved beside a LoRA, and there is no adapter_config.json with its weights"
            )
        files += adapter
    return folder, files, line


_SAFE = "adapter_model.safetensors"


def _read(files: list[Path]) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors by their bare names; of what several files hold the last counts."""
    from anygen.component import read_safetensors

    merged: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    superseded: list[str] = []
    for file in files:
        tensors = read_safetensors(file.parent, file.stem) if file.suffix == ".safetensors" else read_pickle(file)
        for key, value in tensors.items():
            bare = _bare(key)
            if owners.get(bare) == str(file):
                raise CheckpointError(f"{file} holds {bare} twice")
            if bare in owners:
                superseded.append(f"{Path(owners[bare]).name}: {bare}")
            merged[bare], owners[bare] = value, str(file)
    return merged, superseded


def _bare(key: str) -> str:
    """A key without what DeepSpeed, PEFT, and the stage put around it."""
    key = re.sub(r"^(module\.)?(llama_model\.)?(base_model\.)?(model\.)*", "", key)
    return re.sub(r"\.(lora_[AB])\.default\.", r".\1.", key)


def _llm_config(folder: Path, base: Path | None) -> "LlamaConfig":
    from transformers import LlamaConfig

    for directory in (folder, base):
        if directory is not None and (directory / "config.json").is_file():
            try:
                settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
                return LlamaConfig(**{k: v for k, v in settings.items() if k not in ("model_type", "architectures")})
            except Exception as error:  # transformers checks the values by many means
                raise CheckpointError(f"{directory / 'config.json'} is no configuration of a Llama: {error}") from None
    raise CheckpointError(
        f"there is no config.json beside the checkpoint ({folder}); put the LLM's there, or pass its directory (--llm)"
    )


def _wanted_input(state: Mapping[str, Tensor], line: Line, width: int) -> tuple[PartConfig, dict[str, tuple[int, ...]]]:
    """The input projector as a part, and its keys and shapes."""
    prefix = line.inputs
    if any(key.startswith((f"{prefix}.in_fc.", f"{prefix}.layers.")) for key in state):
        raise ConfigError(
            "the checkpoint's input projector is of the kind 'group', which anygen does not have; "
            "those that can be converted: linear, mlp"
        )
    deep = any(key.startswith(f"{prefix}.layer.") for key in state)
    first = f"{prefix}.layer.0" if deep else prefix
    found = state.get(f"{first}.weight")
    features = found.shape[1] if found is not None and found.ndim == 2 else 1024
    wanted: dict[str, tuple[int, ...]] = {f"{first}.weight": (width, features), f"{first}.bias": (width,)}
    if not deep:
        return PartConfig(name="linear"), wanted
    wanted |= {f"{prefix}.layer.2.weight": (width, width), f"{prefix}.layer.2.bias": (width,)}
    return PartConfig(name="mlp", options={"depth": 2}), wanted


def _output(state: Mapping[str, Tensor], line: Line, modality: str, signals: int) -> OutputConfig:
    """Sizes as the checkpoint has them; depth and heads are always 4 + 4 and 4."""
    prefix = line.outputs[modality]
    query = state.get(f"{prefix}.query_embs")
    head = state.get(f"{prefix}.{_theirs('model.bias', line)}")
    feed = state.get(f"{prefix}.tfm.encoder.layers.0.linear1.bias")
    length, channels = line.condition[modality]
    width = TextFcLayerConfig().width
    if query is not None and query.ndim == 3:
        length, width = query.shape[1:]
    if head is not None and head.ndim == 1:
        channels = len(head)
    ffn = len(feed) if feed is not None and feed.ndim == 1 else 4 * width
    name, repo = line.generators[modality]
    return OutputConfig(
        signal_tokens=signals,
        condition={"prompt_embeds": (channels,) if modality == "audio" and length == 1 else (length, channels)},
        generator=SourcedPartConfig(name=name, source=SourceConfig(repo=repo, revision="main")),
        projector=PartConfig(name="text_fc", options={"width": width, "ffn": ffn}),
    )


def _meta_projector(output: OutputConfig, width: int) -> TextFcLayer:
    options = TextFcLayerConfig.from_dict(output.projector.options)
    with torch.device("meta"):
        return TextFcLayer(
            options, llm_dim=width, signal_tokens=output.signal_tokens, spec=ConditionSpec(shapes=output.condition)
        )


def _theirs(key: str, line: Line) -> str:
    layer, dot, rest = key.partition(".")
    return line.projector.get(layer, layer) + dot + rest


def _check_rows(state: Mapping[str, Tensor], rows: tuple[str, ...], vocabulary: Vocabulary) -> None:
    for row in rows:
        if row in state and len(state[row]) != vocabulary.size:
            raise CheckpointError(
                f"{row} has {len(state[row]):,} rows, the tokenizer {vocabulary.size:,} tokens; "
                "put the tokenizer that was saved with the checkpoint beside it"
            )


def _lora(files: list[Path], state: Mapping[str, Tensor], alpha: int) -> "LoraConfig | None":
    """The adapter's configuration; none for a checkpoint of a stage before the LLM was tuned."""
    from peft import LoraConfig, PeftConfig

    if files[-1].stem == "adapter_model":
        found = PeftConfig.from_pretrained(str(files[-1].parent))
        if not isinstance(found, LoraConfig):
            raise CheckpointError(f"the adapter in {files[-1].parent} is a {found.peft_type}, not LoRA")
        return found
    ranks = {value.shape[0] for key, value in state.items() if key.endswith(".lora_A.weight")}
    if not ranks:
        return None
    names = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in state if ".lora_" in key}
    targets = sorted(names | {"q_proj", "k_proj", "v_proj", "o_proj"})
    return LoraConfig(r=max(ranks), lora_alpha=alpha, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")


def _adapter_shapes(settings: "LlamaConfig", lora: "LoraConfig") -> dict[str, tuple[int, ...]]:
    """What PEFT makes of the LLM, by the bare names of its tensors."""
    from peft import get_peft_model, get_peft_model_state_dict
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = get_peft_model(cast(Any, LlamaForCausalLM(settings)), lora)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {_bare(key): tuple(value.shape) for key, value in state.items()}


def _config(
    line: Line,
    llm: str,
    encoder: str,
    projector: PartConfig,
    state: Mapping[str, Tensor],
    outputs: Mapping[str, OutputConfig],
) -> AnyGenConfig:
    first = f"{line.inputs}.layer.0.weight" if projector.name == "mlp" else f"{line.inputs}.weight"
    before, after = line.around

    def reads(modality: str) -> InputConfig:
        return InputConfig(
            encoder=SourcedPartConfig(name="imagebind", source=_source(encoder), options={"modality": modality}),
            feature_dim=state[first].shape[1],
            projector=projector if modality == "image" else PartConfig(name="linear"),
            shares=None if modality == "image" else "image",
            before=before,
            after=after,
        )

    modalities = {modality: ModalityConfig(input=reads(modality), output=made) for modality, made in outputs.items()}
    return AnyGenConfig(name=f"nextgpt-{line.name}", llm=_source(llm), modalities=modalities, routes=False)


def _source(name: str) -> SourceConfig:
    if Path(name).expanduser().is_dir():
        return SourceConfig(repo=str(Path(name).expanduser().resolve()))
    repo, _, revision = name.partition("@")
    return SourceConfig(repo=repo, revision=revision or ("main" if "/" in repo else None))


def _projectors(state: Mapping[str, Tensor], line: Line) -> dict[str, Tensor]:
    """`projectors.safetensors`: the checkpoint's tensors under our names, and the shifts of shared inputs."""
    ours = {theirs: own for own, theirs in line.projector.items()}
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(f"{line.inputs}."):
            made[f"input.image.proj.{key.removeprefix(f'{line.inputs}.').removeprefix('layer.')}"] = value
        for modality, prefix in line.outputs.items():
            if key.startswith(f"{prefix}."):
                layer, dot, rest = key.removeprefix(f"{prefix}.").partition(".")
                made[f"output.{modality}.{ours.get(layer, layer)}{dot}{rest}"] = value
    features = next(value for key, value in made.items() if key.startswith("input.") and value.ndim == 2).shape[1]
    for modality, scale in (("video", 1.0), ("audio", AUDIO_SCALE)):
        made[f"input.{modality}.scale"] = torch.full((features,), scale)
        made[f"input.{modality}.shift"] = torch.zeros(features)
    return made


def _signal_rows(state: Mapping[str, Tensor], rows: tuple[str, ...], vocabulary: Vocabulary) -> dict[str, Tensor]:
    """float32[R, D] each: two rows for the routes, then whole runs in the order of the modalities."""
    ids = [token for run in vocabulary.runs.values() for token in run]
    names = dict(zip(rows, ("rows", "head_rows"), strict=False))
    return {
        own: torch.cat([torch.zeros(2, state[row].shape[1]), state[row][ids].float()]) for row, own in names.items()
    }


def _changed_rows(base: Path, kept: Mapping[str, Tensor]) -> dict[str, int] | None:
    """How many rows of the LLM's own vocabulary differ from those of the checkpoint; None without its weights."""
    from safetensors import safe_open

    changed: dict[str, int] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name, key in (("embed_tokens", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")):
                if name not in kept or key not in file.keys():
                    continue
                own = file.get_tensor(key)
                if own.shape[0] > len(kept[name]) or own.shape[1:] != kept[name].shape[1:]:
                    raise CheckpointError(
                        f"the LLM in {base} has {own.shape[0]:,} rows of width {own.shape[1]:,} in {key}, the "
                        f"checkpoint {kept[name].shape[0]:,} of width {kept[name].shape[1]:,}: it is another LLM"
                    )
                same = own.to(kept[name].dtype) == kept[name][: len(own)]
                changed[name] = int((~same.all(1)).sum())
    return changed or None


def _write(tensors: Mapping[str, Tensor], directory: Path, stem: str) -> tuple[int, int]:
    """Writes `stem*.safetensors`; returns the numbers of tensors and of parameters."""
    from huggingface_hub import save_torch_state_dict

    directory.mkdir(exist_ok=True)
    state = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_torch_state_dict(state, directory, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=SHARD)
    return len(state), sum(value.numel() for value in state.values())


def _write_tokenizer(vocabulary: Vocabulary, line: Line, directory: Path) -> None:
    vocabulary.tokenizer.save_pretrained(directory)
    if line is V1:
        from transformers import GenerationConfig

        GenerationConfig(eos_token_id=end_tokens(vocabulary.tokenizer)).save_pretrained(directory)


def _finish(directory: Path) -> None:
    from anygen.manifest import write_manifest

    mode = (directory / "anygen.json").stat().st_mode
    for weights in directory.rglob("*.safetensors"):
        weights.chmod(mode)  # safetensors writes for the owner alone
    write_manifest(directory)
