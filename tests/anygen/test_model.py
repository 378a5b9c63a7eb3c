import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anygen.component import read_safetensors
from anygen.errors import CheckpointError, ConfigError, ModalityError
from anygen.features import Features
from anygen.llm import LLM
from anygen.losses import lm_loss
from anygen.messages import MediaPart, Message, TextPart
from anygen.model import AnyGenModel, fill_slots
from anygen.model_config import AnyGenConfig, ModalityConfig, PartConfig, SourceConfig
from anygen.prompts import pad

PICTURE, SOUND = (MediaPart(modality, media=None) for modality in ("image", "audio"))  # type: ignore
Make = Callable[..., AnyGenModel]


def say(role: Any, *parts: str | MediaPart) -> Message:
    return Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


def batch(model: AnyGenModel) -> dict[str, Any]:
    """Two conversations of unequal length: two pictures read, two pictures and a sound made."""
    examples = [
        model.prompts.example([say("user", PICTURE, "Draw it"), say("assistant", "An apple.", PICTURE)]),
        model.prompts.example([say("user", "See ", PICTURE), say("assistant", "Here.", SOUND, "And a user.", PICTURE)]),
    ]
    ids, mask = pad([example.ids for example in examples], 0)
    labels, _ = pad([example.labels for example in examples], -100)
    torch.manual_seed(1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "media": {"image": torch.randn(2, 1, 6)},
        "conditions": {
            "image": {"prompt_embeds": torch.randn(2, 5, 8)},
            "audio": {"generated_prompt_embeds": torch.randn(1, 2, 4), "prompt_embeds": torch.randn(1, 3, 6)},
        },
    }


def test_the_lm_loss_equals_plain_cross_entropy_on_all_logits(tiny_model: Make) -> None:
    model = tiny_model()
    inputs = batch(model)
    output = model(**inputs)
    logits = model.logits(output.hidden_states)
    assert logits.shape[-1] == model.llm.vocab_size + len(model.signal_tokens)
    torch.testing.assert_close(output.lm_loss, lm_loss(logits, inputs["labels"]))


def test_it_equals_a_resized_llm(tiny_model: Make) -> None:
    model = tiny_model()
    inputs = batch(model)
    text = inputs["input_ids"].clamp(min=0)  # no media
    resized = model.llm.base
    wanted = model(input_ids=text, attention_mask=inputs["attention_mask"], labels=inputs["labels"])
    old = model.llm.vocab_size
    resized.resize_token_embeddings(old + len(model.signal_tokens), mean_resizing=False)
    embedding: Any = resized.get_input_embeddings()
    embedding.weight.data[old:] = model.signal_tokens.rows.data
    same = resized(input_ids=text, attention_mask=inputs["attention_mask"], labels=inputs["labels"])
    torch.testing.assert_close(wanted.lm_loss, same.loss)


def test_conditions_come_from_the_states_at_the_signal_positions(tiny_model: Make) -> None:
    model = tiny_model(adapter=True)
    inputs = batch(model)
    output = model(**inputs)
    for row, (modality, run) in enumerate([("image", 0), ("image", 1), ("audio", 0)]):
        # one conversation at a time, the whole model by hand
        line = [0, 1, 1][row]
        ids = inputs["input_ids"][line, : int(inputs["attention_mask"][line].sum())]
        embeds = model.signal_tokens.embed(ids[None], model.llm.embedding)
        tokens: Any = model.input_projectors["image"]
        seen = tokens(Features(inputs["media"]["image"][line : line + 1], torch.ones(1, 1, dtype=torch.bool)))
        embeds[0, ids == -1] = seen.values[0]
        hidden = model.llm.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1]
        place = (ids >= model.signal_tokens.runs[modality].start) & (ids < model.signal_tokens.runs[modality].stop)
        rows = model.signal_tokens.rows[ids[place] - model.llm.vocab_size][None]
        wanted = model.output_projectors[modality](hidden[:, place], rows)
        for name, value in wanted.tensors.items():
            torch.testing.assert_close(output.conditions[modality][name][run], value[0], rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_parts(tiny_model: Make) -> None:
    model = tiny_model()
    inputs = batch(model)
    model.alignment_weight = 0.25
    output = model(**inputs)
    torch.testing.assert_close(output.loss, output.lm_loss + 0.25 * output.alignment_loss)
    alone = model(**{key: value for key, value in inputs.items() if key != "labels"})
    assert alone.lm_loss is None
    torch.testing.assert_close(alone.loss, 0.25 * output.alignment_loss)
    model.set_metric("image", {"prompt_embeds": torch.zeros(8, 2)})  # a reader that sees nothing
    blind = model(**inputs)
    assert blind.alignment_loss < output.alignment_loss


def test_padding_on_either_side_changes_nothing(tiny_model: Make) -> None:
    model = tiny_model()
    inputs = batch(model)
    masks = inputs["attention_mask"].bool()
    lines, labels = (
        [line[mask].tolist() for line, mask in zip(inputs[name], masks, strict=True)]
        for name in ("input_ids", "labels")
    )
    ids, mask = pad(lines, 0, left=True)
    left = inputs | {"input_ids": ids, "attention_mask": mask, "labels": pad(labels, -100, left=True)[0]}
    torch.testing.assert_close(model(**left).loss, model(**inputs).loss)


@pytest.mark.parametrize("adapter", [False, True])
def test_only_projectors_rows_and_the_adapter_get_gradients(tiny_model: Make, adapter: bool) -> None:
    model = tiny_model(adapter=adapter)
    model(**batch(model)).loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    ours = ("input_projectors.", "output_projectors.", "signal_tokens.")
    assert {name for name in moved if not name.startswith(ours)} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    still = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert still == set()
    rows = model.signal_tokens.rows.grad
    assert rows is not None and rows.abs().sum(1).min() > 0
    table = model.trainable_parameters()
    assert (table["llm"][0] > 0) == adapter and table["signal_tokens"] == (7 * 32, 7 * 32)


def test_bfloat16_weights_train_float32_rows_under_autocast(tiny_model: Make) -> None:
    model = tiny_model(adapter=True)
    exact = model(**batch(model)).loss
    for name, parameter in model.llm.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch(model)).loss
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss.item() / exact.item() - 1) < 0.05
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_features_may_be_given_in_three_forms(tiny_model: Make) -> None:
    model = tiny_model()
    inputs = batch(model)
    values = inputs["media"]["image"]
    wanted = model(**inputs).loss
    padded = Features(torch.cat([values, values], 1), torch.tensor([[True, False]] * 2))
    torch.testing.assert_close(model(**inputs | {"media": {"image": padded}}).loss, wanted)


def test_an_encoder_is_run_without_gradient(tiny_llm: Callable[..., LLM], tiny_config: AnyGenConfig) -> None:
    from anygen.config import Config
    from anygen.encoders.base import Encoder

    class Mean(Encoder):
        modality, feature_dim = "image", 6

        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.linear = torch.nn.Linear(3, 6)

        def preprocess(self, media: Any) -> dict[str, Tensor]:
            return {"pixels": torch.stack(list(media))}

        def forward(self, **tensors: Tensor) -> Features:
            values = self.linear(tensors["pixels"].mean((-1, -2))).unsqueeze(1)
            return Features(values, torch.ones(values.shape[:2], dtype=torch.bool))

    encoder = Mean()
    model = AnyGenModel(tiny_config, tiny_llm(), {"image": encoder}).initialize(seed=0).eval()
    inputs, pixels = batch(model), torch.randn(2, 3, 4, 4)
    features = encoder(pixels=pixels).values.detach()
    loss = model(**inputs | {"media": {"image": {"pixels": pixels}}}).loss
    torch.testing.assert_close(loss, model(**inputs | {"media": {"image": features}}).loss)
    parts: Any = [MediaPart("image", pixels[0]), MediaPart("image", pixels[1])]  # type: ignore[arg-type]
    torch.testing.assert_close(model.encode_parts(parts)["image"].values, features)
    with pytest.raises(ModalityError, match="the model cannot read audio; it reads text, image"):
        model.encode_parts([SOUND])
    loss.backward()
    assert encoder.linear.weight.grad is None


def test_what_does_not_match_in_number_is_refused(tiny_model: Make) -> None:
    model = tiny_model()
    inputs = batch(model)
    with pytest.raises(ConfigError, match="the prompt has 4 slots for image, the projector gave 6 tokens"):
        model(**inputs | {"media": {"image": torch.randn(3, 1, 6)}})
    with pytest.raises(ConfigError, match="the prompt has slots for media, but no media were given"):
        model(**inputs | {"media": None})
    with pytest.raises(ConfigError, match=r"the input has 2 runs of image, the targets are for \[3\]"):
        model(**inputs | {"conditions": {"image": {"prompt_embeds": torch.randn(3, 5, 8)}}})
    with pytest.raises(ModalityError, match="the encoder of image is not loaded .loaded: none.; give its features"):
        model(**inputs | {"media": {"image": {"inputs": torch.randn(2, 3, 4, 4)}}})
    with pytest.raises(ModalityError, match="the model cannot read audio; it reads text, image"):
        model(**inputs | {"media": {"audio": torch.randn(2, 1, 6)}})
    with pytest.raises(ConfigError, match="the prompt has 1 slots for image, the projector gave 2 tokens"):
        fill_slots(torch.zeros(1, 2, 3), torch.tensor([[True, False]]), torch.ones(2, 3), "image")


def write(model: AnyGenModel, directory: Path) -> Callable[[str], Path]:
    """Writes model and LLM; returns where to find the LLM."""
    model.llm.save_base(directory / "llm")
    return lambda name: directory / "llm" if name == "tiny-llm" else directory / "nowhere"


@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_through_disk_gives_the_same_output(tiny_model: Make, tmp_path: Path, tied: bool) -> None:
    from peft import LoraConfig

    model = tiny_model(tie_word_embeddings=tied)
    resolve = write(model, tmp_path)
    model.llm.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.eval().save_pretrained(tmp_path / "model")
    again = AnyGenModel.from_pretrained(tmp_path / "model", encoders=False, resolve=resolve)
    inputs = batch(model)
    ours, theirs = model(**inputs), again(**inputs)
    torch.testing.assert_close(theirs.loss, ours.loss, rtol=0, atol=0)
    torch.testing.assert_close(theirs.hidden_states, ours.hidden_states, rtol=0, atol=0)
    assert again.settings == model.settings
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "adapter",
        "anygen.json",
        "projectors.safetensors",
        "signal_tokens.safetensors",
    ]
    keys = read_safetensors(tmp_path / "model", "projectors")
    assert all(key.startswith(("input.image.", "output.image.", "output.audio.")) for key in keys)


def test_projectors_may_be_stored_small(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model()
    resolve = write(model, tmp_path)
    model.save_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {v.dtype for v in read_safetensors(tmp_path / "model", "projectors").values()} == {torch.bfloat16}
    again = AnyGenModel.from_pretrained(tmp_path / "model", encoders=False, resolve=resolve)
    assert {p.dtype for p in again.output_projectors.parameters()} == {torch.float32}
    torch.testing.assert_close(again.signal_tokens.rows, model.signal_tokens.rows, rtol=0, atol=0)


def test_an_llm_inside_the_directory_is_written_and_copied_on(
    tiny_llm: Callable[..., LLM], tiny_config: AnyGenConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, llm=SourceConfig(path="llm"))
    model = AnyGenModel(config, tiny_llm()).initialize(seed=0).eval()
    model.save_pretrained(tmp_path / "first")
    second = AnyGenModel.from_pretrained(tmp_path / "first", encoders=False)
    second.save_pretrained(tmp_path / "second")
    third = AnyGenModel.from_pretrained(tmp_path / "second", encoders=False)
    torch.testing.assert_close(third(**batch(third)).loss, model(**batch(model)).loss, rtol=0, atol=0)


def test_two_modalities_share_one_projector_which_is_saved_once(
    tiny_llm: Callable[..., LLM], tiny_config: AnyGenConfig, tmp_path: Path
) -> None:
    image = tiny_config.inputs["image"]
    shared = replace(image, projector=PartConfig(name="linear"), shares="image")
    modalities = tiny_config.modalities | {"video": ModalityConfig(input=shared)}
    model = AnyGenModel(replace(tiny_config, modalities=modalities), tiny_llm()).initialize(seed=0).eval()
    own: Any = model.input_projectors["video"]
    with torch.no_grad():
        own.shift.fill_(0.5)
        own.scale.fill_(2.0)
    seen = torch.randn(3, 1, 6)
    torch.testing.assert_close(model.media_tokens("video", seen), model.media_tokens("image", seen * 2 + 0.5))
    resolve = write(model, tmp_path)
    model.save_pretrained(tmp_path / "model")
    keys = read_safetensors(tmp_path / "model", "projectors")
    assert {key for key in keys if "video" in key} == {"input.video.scale", "input.video.shift"}
    again = AnyGenModel.from_pretrained(tmp_path / "model", encoders=False, resolve=resolve)
    torch.testing.assert_close(again.media_tokens("video", seen), model.media_tokens("video", seen), rtol=0, atol=0)
    model.media_tokens("video", seen).sum().backward()
    assert all(p.grad is not None for name in ("image", "video") for p in model.input_projectors[name].parameters())


def test_two_modalities_share_one_output_projector_and_are_told_apart_by_their_runs(
    tiny_llm: Callable[..., LLM], tiny_config: AnyGenConfig, tmp_path: Path
) -> None:
    image = tiny_config.outputs["image"]
    shared = replace(image, projector=PartConfig(name="text_fc"), shares="image")
    modalities = tiny_config.modalities | {"video": ModalityConfig(output=shared)}
    model = AnyGenModel(replace(tiny_config, modalities=modalities), tiny_llm()).initialize(seed=0).eval()
    states = torch.randn(2, image.signal_tokens, model.llm.width)
    by_video, by_image = (model.project(m, states).tensors["prompt_embeds"] for m in ("video", "image"))
    runs = model.run_embeddings("video").expand(2, -1, -1)
    wanted = model.output_projectors["image"](states, runs).tensors["prompt_embeds"]
    torch.testing.assert_close(by_video, wanted, rtol=0, atol=0)
    assert not torch.allclose(by_video, by_image)
    resolve = write(model, tmp_path)
    model.save_pretrained(tmp_path / "model")
    assert not [key for key in read_safetensors(tmp_path / "model", "projectors") if key.startswith("output.video")]
    again = AnyGenModel.from_pretrained(tmp_path / "model", encoders=False, resolve=resolve)
    torch.testing.assert_close(again.project("video", states).tensors["prompt_embeds"], by_video, rtol=0, atol=0)


def test_missing_and_stray_keys_are_listed(tiny_model: Make, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tiny_model()
    resolve = write(model, tmp_path)
    model.save_pretrained(tmp_path)
    state = read_safetensors(tmp_path, "projectors")
    state["output.image.stray"] = state.pop("output.image.fc.bias")
    save_file(state, tmp_path / "projectors.safetensors")
    wanted = "does not fit: missing output.image.fc.bias; unexpected output.image.stray"
    with pytest.raises(CheckpointError, match=wanted):
        AnyGenModel.from_pretrained(tmp_path, encoders=False, resolve=resolve)
    (tmp_path / "projectors.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the weight file .*projectors\.safetensors is missing"):
        AnyGenModel.from_pretrained(tmp_path, encoders=False, resolve=resolve)


def test_a_missing_encoder_and_a_wrong_option_are_refused(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model()
    resolve = write(model, tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the encoder 'imagebind' is missing: there is no directory"):
        AnyGenModel.from_pretrained(tmp_path, resolve=resolve)
    data = json.loads((tmp_path / "anygen.json").read_text())
    data["modalities"]["image"]["input"]["projector"]["options"] = {"token": 2}
    (tmp_path / "anygen.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="options of the input_projector 'mlp': .* did you mean 'tokens'"):
        AnyGenModel.from_pretrained(tmp_path, encoders=False, resolve=resolve)


def test_transformers_trainer_takes_it_as_it_is(tiny_model: Make, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny_model(adapter=True)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = model(**batch(model)).loss.item()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        save_steps=3,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    dataset: Any = [0, 0, 0]
    trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=lambda _: batch(model))
    trainer.train()
    assert model.eval()(**batch(model)).loss.item() < before
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    saved = read_safetensors(tmp_path / "checkpoint-3")
    assert set(saved) == {name for name, p in model.named_parameters() if p.requires_grad}
