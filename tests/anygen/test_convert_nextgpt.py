"""Checkpoints laid out as NExT-GPT's two code lines do, converted, against plain re-computations from their tensors."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from anygen.cli import main
from anygen.convert_nextgpt import convert_nextgpt
from anygen.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from anygen.llm import LLM
    from anygen.model import AnyGenModel

WIDTH, FEATURES = 32, 6
CONDITIONS = {"image": (5, 8), "video": (3, 6), "audio": (1, 7)}
SHORT = {"image": "img", "video": "vid", "audio": "aud"}
COUNTS = {"image": 4, "video": 24, "audio": 8}
V1_TOKENS = {m: [f"[{SHORT[m].upper()}{i}]" for i in range(count)] for m, count in COUNTS.items()}
V2_TOKENS = {m: [f"<{m}_{i:02d}>" for i in range(count)] for m, count in COUNTS.items()}
V1_NAMES = {m: f"gen_text_hidden_fcs{end}.0" for m, end in (("image", ""), ("video", "_video"), ("audio", "_audio"))}
V2_NAMES = {m: f"mm_output_{short}_projector" for m, short in SHORT.items()}


class PlainProjector(nn.Module):
    """The output projector as NExT-GPT writes it down, at another width."""

    def __init__(self, length: int, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 16)
        self.tfm = nn.Transformer(16, 4, 4, 4, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.model = nn.Linear(16, channels)
        self.query_embs = nn.Parameter(torch.randn(1, length, 16))

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        return self.model(self.tfm(self.fc(states + embeddings), self.query_embs.repeat(len(states), 1, 1)))


@dataclass
class Published:
    """A checkpoint on disk, and the modules that its tensors are from."""

    directory: Path
    llm_directory: Path
    llm: Any
    inputs: nn.Module
    outputs: dict[str, PlainProjector]
    ids: dict[str, list[int]]
    """Modality -> ids of its signal tokens."""
    files: dict[str, dict[str, Tensor]]

    def save(self) -> None:
        for name, state in self.files.items():
            torch.save(state, self.directory / name)

    def kept(self) -> list[int]:
        signals = {token for ids in self.ids.values() for token in ids}
        return [token for token in range(self.llm.config.vocab_size) if token not in signals]


def build(
    tiny_llm: "Callable[..., LLM]", folder: Path, added: list[str], tokens: dict[str, list[str]], inputs: nn.Module
) -> Published:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaForCausalLM

    base, directory = folder / "llm", folder / "checkpoint"
    tiny_llm(tie_word_embeddings=False).save_base(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(1)
    llm = LlamaForCausalLM.from_pretrained(base)
    llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    llm.config.save_pretrained(directory)
    lora = LoraConfig(r=2, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    llm = get_peft_model(llm, lora)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():  # rows of words train along, all but the first 100
            if "lora_" in name:
                parameter.normal_(std=0.3)
            if "embed_tokens" in name or "lm_head" in name:
                parameter[100:] += 0.1 * torch.randn_like(parameter[100:])
    ids = {modality: tokenizer.convert_tokens_to_ids(names) for modality, names in tokens.items()}
    outputs = {modality: PlainProjector(*condition).eval() for modality, condition in CONDITIONS.items()}
    return Published(directory, base, llm.eval(), inputs, outputs, ids, {})


@pytest.fixture
def v1(tiny_llm: "Callable[..., LLM]", tmp_path: Path) -> Published:
    """With the keys of stage 3, as peft 0.3 names them."""
    return build_v1(tiny_llm, tmp_path, ["<Img>", "</Img>", *sum(V1_TOKENS.values(), [])])


def build_v1(tiny_llm: "Callable[..., LLM]", folder: Path, added: list[str]) -> Published:
    torch.manual_seed(0)
    made = build(tiny_llm, folder, added, V1_TOKENS, nn.Linear(FEATURES, WIDTH))
    state = {f"llama_proj.{key}": value for key, value in made.inputs.state_dict().items()}
    for modality, projector in made.outputs.items():
        state |= {f"{V1_NAMES[modality]}.{key}": value for key, value in projector.state_dict().items()}
    wanted = ("lora_", "embed_tokens", "lm_head")
    llm = {f"llama_model.{k}": v for k, v in made.llm.state_dict().items() if any(name in k for name in wanted)}
    assert "llama_model.base_model.model.model.layers.1.self_attn.o_proj.lora_B.default.weight" in llm
    made.files = {"pytorch_model.pt": {key: nn.Parameter(value) for key, value in (state | llm).items()}}
    made.save()
    return made


@pytest.fixture
def v2(tiny_llm: "Callable[..., LLM]", tmp_path: Path) -> Published:
    """Files of three stages, of which the last count, and a folder with LoRA."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    made = build(tiny_llm, tmp_path, ["▁", *sum(V2_TOKENS.values(), [])], V2_TOKENS, mlp)
    renamed = {"fc": "in_fc", "model": "out_fc"}
    outputs: dict[str, Tensor] = {}
    for modality, projector in made.outputs.items():
        for key, value in projector.state_dict().items():
            layer, dot, rest = key.partition(".")
            outputs[f"model.{V2_NAMES[modality]}.{renamed.get(layer, layer)}{dot}{rest}"] = value
    state = made.llm.state_dict()
    rows = {f"model.{part}.weight": value for part, value in _rows(state).items()}
    rows["lm_head.weight"] = rows.pop("model.lm_head.weight")
    stale = {key: torch.zeros_like(value) for key, value in rows.items()}
    inputs = {f"model.mm_input_projector.layer.{key}": value for key, value in mlp.state_dict().items()}
    made.files = {
        "mm_input_projector.bin": inputs | stale,
        "mm_output_projector.bin": outputs | stale,
        "non_lora_trainables.bin": {f"base_model.model.{key}": value for key, value in rows.items()},
    }
    made.save()
    lora = made.directory / "lora"
    made.llm.peft_config["default"].save_pretrained(lora)
    adapter = {k.replace(".default", ""): v for k, v in state.items() if "lora_" in k}
    torch.save(adapter, lora / "adapter_model.bin")
    return made


def _rows(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "embed_tokens": state["base_model.model.model.embed_tokens.weight"],
        "lm_head": state["base_model.model.lm_head.weight"],
    }


def load(directory: Path) -> "AnyGenModel":
    from anygen.model import AnyGenModel

    return AnyGenModel.from_pretrained(directory, encoders=False)


@pytest.fixture
def converted(v1: Published, tmp_path: Path) -> "AnyGenModel":
    convert_nextgpt(v1.directory, tmp_path / "out", llm=str(v1.llm_directory))
    return load(tmp_path / "out")


def compare_llm(made: Published, model: "AnyGenModel", runs: dict[str, list[int]]) -> None:
    """Words and whole runs in one sequence: states, and the logits of every row."""
    kept = made.kept()
    words: list[list[int]] = [[5, kept[-1]], [7], [], [200, 120]]
    new = [[kept.index(token) for token in some] for some in words]
    ids, ours, start = list(words[0]), list(new[0]), len(kept) + 2
    for run, old_words, new_words in zip(runs.values(), words[1:], new[1:], strict=True):
        ids += [*run, *old_words]
        ours += [*range(start, start + len(run)), *new_words]
        start += len(run)
    with torch.no_grad():
        plain = made.llm(input_ids=torch.tensor([ids]), output_hidden_states=True)
        hidden = model(input_ids=torch.tensor([ours])).hidden_states
        logits = model.logits(hidden)
    torch.testing.assert_close(hidden, plain.hidden_states[-1], rtol=1e-4, atol=1e-5)
    order = [token for run in runs.values() for token in run]
    torch.testing.assert_close(logits[..., : len(kept)], plain.logits[..., kept], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[..., len(kept) + 2 :], plain.logits[..., order], rtol=1e-4, atol=1e-4)


def compare_outputs(made: Published, model: "AnyGenModel", runs: dict[str, list[int]]) -> None:
    torch.manual_seed(3)
    embeddings = _rows(made.llm.state_dict())["embed_tokens"]
    for modality, run in runs.items():
        states = torch.randn(2, len(run), WIDTH)
        with torch.no_grad():
            plain = made.outputs[modality](states, embeddings[run].expand(2, -1, -1))
            ours = model.project(modality, states).tensors["prompt_embeds"]
        torch.testing.assert_close(ours, plain[:, 0] if modality == "audio" else plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.run_embeddings(modality)[0], embeddings[run])


def compare_inputs(made: Published, model: "AnyGenModel") -> None:
    from anygen.features import Features

    torch.manual_seed(4)
    features = torch.randn(2, 1, FEATURES)
    for modality, scale in (("image", 1.0), ("video", 1.0), ("audio", 20.0)):
        ours = model.project_input(modality, Features(features, torch.ones(2, 1, dtype=torch.bool))).values
        torch.testing.assert_close(ours, made.inputs(features * scale))


def test_v1_gives_what_its_own_tensors_give(v1: Published, converted: "AnyGenModel") -> None:
    compare_llm(v1, converted, v1.ids)
    compare_outputs(v1, converted, v1.ids)
    compare_inputs(v1, converted)


def test_words_may_stand_between_signal_tokens_as_in_checkpoints_of_32042_rows(
    tiny_llm: "Callable[..., LLM]", tmp_path: Path
) -> None:
    image, video, audio = V1_TOKENS.values()
    added = ["<Img>", "</Img>", *image, "<Vid>", "</Vid>", *video, "<Aud>", "</Aud>", *audio]
    made = build_v1(tiny_llm, tmp_path, added)
    report = convert_nextgpt(made.directory, tmp_path / "out", llm=str(made.llm_directory))
    assert (report.kept_tokens, report.signal_rows) == (294 + 6, 36)
    model = load(tmp_path / "out")
    compare_llm(made, model, made.ids)
    compare_outputs(made, model, made.ids)
    said: Any = model.llm.tokenizer("<Aud>", add_special_tokens=False)["input_ids"]
    assert said == [294 + 4]


def test_v2_reads_the_spaces_between_its_signal_tokens(v2: Published, tmp_path: Path) -> None:
    report = convert_nextgpt(v2.directory, tmp_path / "out", llm=str(v2.llm_directory))
    space = v2.kept()[-1]
    runs = {m: [token for signal in ids for token in (signal, space)][:-1] for m, ids in v2.ids.items()}
    assert {m: len(run) for m, run in runs.items()} == {"image": 7, "video": 47, "audio": 15}
    model = load(tmp_path / "out")
    compare_llm(v2, model, runs)
    compare_outputs(v2, model, runs)
    compare_inputs(v2, model)
    assert report.superseded[-1] == "mm_output_projector.bin: lm_head.weight" and len(report.superseded) == 4


def test_a_checkpoint_of_an_early_stage_has_no_adapter_and_other_prefixes(v1: Published, tmp_path: Path) -> None:
    state = v1.files["pytorch_model.pt"]
    renamed = {k.replace("base_model.model.", ""): v for k, v in state.items() if "lora_" not in k}
    assert "llama_model.lm_head.weight" in renamed and "llama_model.model.embed_tokens.weight" in renamed
    v1.files = {"pytorch_model.pt": renamed}
    v1.save()
    convert_nextgpt(v1.directory / "pytorch_model.pt", tmp_path / "out", llm=str(v1.llm_directory))
    assert not (tmp_path / "out" / "adapter").exists()
    v1.llm = v1.llm.unload()
    model = load(tmp_path / "out")
    with torch.no_grad():
        plain = v1.llm(input_ids=torch.tensor([[5, 200, 295]]), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model(input_ids=torch.tensor([[5, 200, 295]])).hidden_states, plain)


def test_a_tokenizer_is_extended_in_the_published_order_where_the_checkpoint_has_none(
    v1: Published, tmp_path: Path
) -> None:
    for file in v1.directory.glob("*token*.json"):
        file.unlink()
    (v1.directory / "config.json").unlink()
    convert_nextgpt(v1.directory, tmp_path / "out", llm=str(v1.llm_directory))
    compare_llm(v1, load(tmp_path / "out"), v1.ids)


def test_the_adapter_is_what_peft_itself_loads(v1: Published, converted: "AnyGenModel", tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(v1.llm_directory)
    base.resize_token_embeddings(v1.llm.config.vocab_size)
    peft = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    ours = {key: value for key, value in peft.state_dict().items() if "lora_" in key}
    wanted = {key: value for key, value in v1.llm.state_dict().items() if "lora_" in key}
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[key], wanted[key]) for key in ours)


def test_the_strength_of_the_adapter_can_be_told(v1: Published, tmp_path: Path) -> None:
    convert_nextgpt(v1.directory, tmp_path / "out", llm=str(v1.llm_directory), lora_alpha=8)
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 8)
    assert settings["base_model_name_or_path"] == str(v1.llm_directory)


def test_a_converted_model_is_saved_with_its_own_vocabulary(
    v1: Published, converted: "AnyGenModel", tmp_path: Path
) -> None:
    converted.save_pretrained(tmp_path / "again")
    compare_llm(v1, load(tmp_path / "again"), v1.ids)


def test_prompts_are_those_of_the_first_line_and_media_stand_in_their_tags(converted: "AnyGenModel") -> None:
    from anygen.messages import MediaPart, Message, TextPart

    picture: Any = object()
    said = [Message("user", (MediaPart("image", picture), TextPart("Why?")))]
    ids = converted.prompts.prompt(said).ids
    slot = ids.index(-1)
    decode = converted.llm.tokenizer.decode
    assert (decode(ids[:slot]), decode(ids[slot + 1 :])) == ("### Human: <Img>", "</Img> Why?\n### Assistant:")


def test_answers_have_no_route_and_come_from_the_adapted_llm(v1: Published, converted: "AnyGenModel") -> None:
    from anygen.decoding import DecodingConfig, collect, decode
    from anygen.messages import Message, TextPart

    prompt = converted.prompts.prompt([Message("user", (TextPart("Draw a red apple."),))])
    answer = collect(decode(converted, [prompt], config=DecodingConfig(max_new_tokens=6), drawable=()), 1)[0]
    ids, kept = list(prompt.ids), v1.kept()
    for token in answer.ids:
        with torch.no_grad():
            logits = v1.llm(input_ids=torch.tensor([ids])).logits[0, -1, kept]
        assert token == int(logits.argmax())
        ids.append(token)
    assert answer.route == "media" and len(answer.ids) > 1
    tokenizer: Any = converted.llm.tokenizer
    assert converted.llm.eos_ids == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("#")]


def test_a_report_tells_what_went_where(v1: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    call = ["convert", "nextgpt", str(v1.directory), "--out", str(out), "--llm", str(v1.llm_directory)]
    assert main(call) == 0
    shown = capsys.readouterr().out
    report = json.loads((out / "conversion.json").read_text())
    assert (report["line"], report["files"]) == ("v1", ["pytorch_model.pt"])
    assert len(report["matched"]) == len(v1.files["pytorch_model.pt"])
    assert report["matched"]["llama_proj.weight"] == [WIDTH, FEATURES]
    assert report["missing"] == report["unexpected"] == report["shapes"] == []
    rows = v1.llm.config.vocab_size - 38
    assert report["vocabulary"] == {
        "kept_tokens": rows + 2,
        "signal_rows": 36,
        "changed_rows": {"embed_tokens": rows - 100, "lm_head": rows - 100},
    }
    assert f"rows of words that differ from the LLM's, kept: {rows - 100} of embed_tokens" in shown
    assert "matched" in shown and "unexpected 0" in shown and "vocabulary" in shown
    settings = json.loads((out / "anygen.json").read_text())
    generator = settings["modalities"]["video"]["output"]["generator"]["source"]
    assert (generator["repo"], generator["revision"]) == ("cerspense/zeroscope_v2_576w", "main")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert main(call) == 2
    assert "out is not empty; choose another directory" in capsys.readouterr().err
    assert main([*call, "--overwrite"]) == 0


Break = Callable[[Published], None]


def _drop(made: Published) -> None:
    del made.files["pytorch_model.pt"]["gen_text_hidden_fcs_video.0.tfm.decoder.layers.3.norm3.bias"]


def _drop_lora(made: Published) -> None:
    state = made.files["pytorch_model.pt"]
    for key in [key for key in state if "layers.1.self_attn.k_proj" in key]:
        del state[key]


def _reshape(made: Published) -> None:
    made.files["pytorch_model.pt"]["llama_proj.bias"] = torch.zeros(WIDTH + 1)


def _add(made: Published) -> None:
    made.files["pytorch_model.pt"]["gen_text_hidden_fcs.1.fc.bias"] = torch.zeros(2)


def _more_rows(made: Published) -> None:
    state = made.files["pytorch_model.pt"]
    for key in ("model.embed_tokens", "lm_head"):
        key = f"llama_model.base_model.model.{key}.weight"
        state[key] = torch.cat([state[key], torch.zeros(4, WIDTH)])


def _twice(made: Published) -> None:
    state = made.files["pytorch_model.pt"]
    state["llama_model.lm_head.weight"] = state["llama_model.base_model.model.lm_head.weight"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_drop, r"1 missing \(gen_text_hidden_fcs_video.0.tfm.decoder.layers.3.norm3.bias\)$"),
        (_drop_lora, r"2 missing \(layers.1.self_attn.k_proj.lora_A.weight, layers.1.self_attn.k_proj.lora_B.weight\)"),
        (_reshape, r"1 of another shape \(llama_proj.bias is \(33,\), not \(32,\)\)"),
        (_add, r"1 unexpected \(gen_text_hidden_fcs.1.fc.bias\)"),
        (_more_rows, r"embed_tokens.weight has 336 rows, the tokenizer 332 tokens; put the tokenizer that was saved"),
        (_twice, r"pytorch_model.pt holds lm_head.weight twice"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    v1: Published, tmp_path: Path, spoil: Break, told: str
) -> None:
    spoil(v1)
    v1.save()
    with pytest.raises(CheckpointError, match=told):
        convert_nextgpt(v1.directory, tmp_path / "out", llm=str(v1.llm_directory))
    assert {path.name for path in tmp_path.iterdir()} == {"llm", "checkpoint"}


def test_the_command_line_tells_a_fault_in_one_line(
    v1: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _drop(v1)
    v1.save()
    call = ["convert", "nextgpt", str(v1.directory), "--out", str(tmp_path / "out"), "--llm", str(v1.llm_directory)]
    assert main(call) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "does not fit, nothing was written: 1 missing" in error


def test_the_llm_of_the_first_line_has_to_be_named(v1: Published, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Vicuna 7B v0\) is published as a difference alone; pass its directory"):
        convert_nextgpt(v1.directory, tmp_path / "out")
    convert_nextgpt(v1.directory, tmp_path / "out", llm="someone/vicuna@v0", encoder="imagebind")
    settings = json.loads((tmp_path / "out" / "anygen.json").read_text())
    assert settings["llm"] == {"path": None, "repo": "someone/vicuna", "revision": "v0"}
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["vocabulary"]["changed_rows"] is None


def test_another_llm_is_refused(v1: Published, tiny_llm: "Callable[..., LLM]", tmp_path: Path) -> None:
    tiny_llm(tie_word_embeddings=False, hidden_size=16).save_base(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"has 294 rows of width 16 in .*, the checkpoint 296 of width 32"):
        convert_nextgpt(v1.directory, tmp_path / "out", llm=str(tmp_path / "other"))


def test_files_that_are_not_there_are_named(v1: Published, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint .*nowhere"):
        convert_nextgpt(tmp_path / "nowhere", tmp_path / "out", llm="a/b")
    with pytest.raises(CheckpointError, match=r"neither pytorch_model.pt nor mm_input_projector.bin"):
        convert_nextgpt(v1.llm_directory, tmp_path / "out", llm="a/b")
    settings = (v1.directory / "config.json").read_text()
    (v1.directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is no configuration of a Llama"):
        convert_nextgpt(v1.directory, tmp_path / "out", llm="a/b")
    (v1.directory / "config.json").write_text(settings)
    (v1.directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer beside the checkpoint .*or pass the LLM's directory"):
        convert_nextgpt(v1.directory, tmp_path / "out", llm="a/b")
    (v1.directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json beside the checkpoint .*or pass its directory"):
        convert_nextgpt(v1.directory, tmp_path / "out", llm="a/b")


def test_the_last_stage_of_the_second_line_does_not_go_without_its_lora(v2: Published, tmp_path: Path) -> None:
    (v2.directory / "lora" / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="non_lora_trainables.bin was saved beside a LoRA, and there is no"):
        convert_nextgpt(v2.directory, tmp_path / "out", llm=str(v2.llm_directory))
    (v2.directory / "non_lora_trainables.bin").unlink()
    (v2.directory / "mm_output_projector.bin").unlink()
    with pytest.raises(CheckpointError, match=r"missing \(mm_output_img_projector.query_embs, .*, …\)"):
        convert_nextgpt(v2.directory, tmp_path / "out", llm=str(v2.llm_directory))


def test_a_linear_input_projector_of_the_second_line_is_converted(v2: Published, tmp_path: Path) -> None:
    torch.manual_seed(5)
    v2.inputs = nn.Linear(FEATURES, WIDTH)
    renamed = {f"model.mm_input_projector.{key}": value for key, value in v2.inputs.state_dict().items()}
    v2.files["mm_input_projector.bin"] = renamed
    v2.save()
    convert_nextgpt(v2.directory, tmp_path / "out", llm=str(v2.llm_directory))
    compare_inputs(v2, load(tmp_path / "out"))


def test_media_are_read_by_the_encoder_that_was_named(
    v1: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    from anygen.encoders.imagebind import ImageBindEncoder, ImageBindModel
    from anygen.encoders.imagebind_config import ImageBindConfig, PlaneConfig, VisionConfig
    from anygen.media import Image
    from anygen.messages import MediaPart
    from anygen.model import AnyGenModel

    trunks = ImageBindConfig(
        out_dim=FEATURES,
        vision=VisionConfig(width=16, blocks=1, heads=2, image_size=16, patch=8),
        audio=PlaneConfig(width=16, blocks=1, heads=2, height=32, plane_width=40, logit_scale=20),
    )
    ImageBindModel(trunks).save_pretrained(tmp_path / "imagebind")
    convert_nextgpt(v1.directory, tmp_path / "out", llm=str(v1.llm_directory), encoder=str(tmp_path / "imagebind"))
    model = AnyGenModel.from_pretrained(tmp_path / "out")
    assert list(model.encoders) == ["image", "video", "audio"]
    picture = Image.from_any(np.full((16, 16, 3), 90, dtype=np.uint8))
    features = model.encode_parts([MediaPart("image", picture)])["image"]
    alone = ImageBindEncoder.from_pretrained(tmp_path / "imagebind", modality="image")
    torch.testing.assert_close(features.values, alone(**alone.preprocess([picture])).values)
    assert main(["info", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "nextgpt-v1" in shown and "vocabulary, in place of the LLM's" in shown


def test_the_grouping_projector_is_refused_by_its_name(v2: Published, tmp_path: Path) -> None:
    v2.files["mm_input_projector.bin"] = {"model.mm_input_projector.in_fc.weight": torch.zeros(512, FEATURES)}
    v2.save()
    with pytest.raises(ConfigError, match=r"of the kind 'group', which anygen does not have; .*: linear, mlp"):
        convert_nextgpt(v2.directory, tmp_path / "out", llm=str(v2.llm_directory))
