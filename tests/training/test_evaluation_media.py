"""The suite `mini` on a model that reads and makes pictures, clips and sounds: real classes at tiny width."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PIL

from anygen.encoders.imagebind import ImageBindEncoder, ImageBindModel
from anygen.encoders.imagebind_config import ImageBindConfig, PlaneConfig, TextConfig, VisionConfig
from anygen.generators.audioldm2 import AudioLDM2Generator, SoundDefaults, SoundText, empty_condition
from anygen.generators.base import Generator
from anygen.generators.stable_diffusion import StableDiffusionGenerator
from anygen.generators.zeroscope import ClipDefaults, ZeroscopeGenerator
from anygen.llm import LLM
from anygen.media import Audio, Video
from anygen.model import AnyGenModel
from anygen.model_config import (
    AnyGenConfig,
    InputConfig,
    ModalityConfig,
    OutputConfig,
    PartConfig,
    SourceConfig,
    SourcedPartConfig,
)
from anygen.training.evaluation import MEDIA_KINDS, ask_for_media, evaluate
from anygen.training.evaluation_answers import as_medium, as_tensor, by_caption
from anygen.training.evaluation_matrix import Judge, Media, joint_encoders, retrieval
from anygen.training.evaluation_media import SoundNames, judge_clips, judge_sounds, restored_sounds
from anygen.training.evaluation_media_cases import (
    Filler,
    clip_cases,
    media_requests,
    phrase_sound,
    questions,
    routable,
    sound_cases,
    things,
)
from anygen.training.evaluation_plots import film_strip, mel_plot, mel_plots
from anygen.training.evaluation_report import Cell, EvaluationResult, Filmed, Heard, Rows, write_report
from anygen.training.icons import Concept, IconSet
from anygen.training.measures import NearestIcon, on_white
from anygen.training.motion import MotionSource
from anygen.training.motion import is_held_out as is_held_out_clip
from anygen.training.motion_measures import TRACKED, NearestThing
from anygen.training.sound_captions import Sound, canonical, is_held_out
from anygen.training.sound_measures import NearestSound
from anygen.training.sound_mixing import SAMPLES, SoundSource
from anygen.training.sounds import SoundBank
from anygen.training.tokenizer import train_tokenizer

SPACE = ImageBindConfig(
    out_dim=8,
    vision=VisionConfig(width=16, blocks=1, heads=2, image_size=32, patch=16),
    audio=PlaneConfig(width=16, blocks=1, heads=2, height=16, plane_width=32, logit_scale=20),
    text=TextConfig(width=16, blocks=1, heads=2, vocab_size=300, context_length=16),
)


@pytest.fixture(scope="module")
def pictures(trained_generator: tuple[Path, dict[str, float]]) -> StableDiffusionGenerator:
    return StableDiffusionGenerator.from_pretrained(trained_generator[0] / "generator")


@pytest.fixture(scope="module")
def films(pictures: StableDiffusionGenerator) -> ZeroscopeGenerator:
    """Four frames, with the parts of the picture generator."""
    from diffusers import UNet3DConditionModel

    torch.manual_seed(0)
    unet: Any = UNet3DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return ZeroscopeGenerator(
        vae=pictures.vae,
        unet=unet,
        scheduler=pictures.scheduler,
        unconditional=pictures.unconditional,
        text=pictures.text,
        defaults=ClipDefaults(steps=1, guidance_scale=1.0, frames=4),
    )


@pytest.fixture(scope="module")
def sounds(pictures: StableDiffusionGenerator) -> AudioLDM2Generator:
    """A third of a second."""
    from diffusers import AudioLDM2UNet2DConditionModel, AutoencoderKL
    from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
        T5Config,
        T5EncoderModel,
    )

    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a flute playing a melody", "a dog"], vocab_size=300, context=24)
    layers = T5Config(vocab_size=300, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
    text = SoundText(
        sequence=T5EncoderModel(layers),
        tokenizer=tokenizer,
        projection=AudioLDM2ProjectionModel(12, 12, 8),
        language_model=GPT2LMHeadModel(GPT2Config(vocab_size=1, n_positions=64, n_embd=8, n_layer=1, n_head=2)),
        context=24,
    ).eval()
    downs: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    ups: dict[str, Any] = {"up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (8, 16)}
    crossed: dict[str, Any] = {
        "cross_attention_dim": ((None, 8, 12),) * 2,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=16,
        upsample_initial_channel=8,
        upsample_rates=[20, 8],
        upsample_kernel_sizes=[40, 16],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        normalize_before=False,
    )
    vae: Any = AutoencoderKL(in_channels=1, out_channels=1, latent_channels=4, norm_num_groups=4, **downs, **ups)
    unet: Any = AudioLDM2UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        **crossed,
    )
    return AudioLDM2Generator(
        vae=vae,
        unet=unet,
        vocoder=SpeechT5HifiGan(vocoder),
        scheduler=pictures.scheduler,
        unconditional=empty_condition(text),
        text=text,
        defaults=SoundDefaults(steps=1, guidance_scale=1.0, seconds=0.32),
    )


@pytest.fixture(scope="module")
def generators(
    pictures: StableDiffusionGenerator, films: ZeroscopeGenerator, sounds: AudioLDM2Generator
) -> dict[str, Generator]:
    return {"image": pictures, "video": films, "audio": sounds}


@pytest.fixture
def model(tiny_llm: Callable[..., LLM], generators: dict[str, Generator], tmp_path: Path) -> AnyGenModel:
    """Three inputs of one ImageBind, whose folder holds its text trunk too, and three outputs."""
    torch.manual_seed(0)
    folder = tmp_path / "model" / "encoders" / "imagebind"
    ImageBindModel(SPACE).save_pretrained(folder)
    tokenizer = train_tokenizer(["a red circle", "a dog"], vocab_size=300, context=16).backend_tokenizer
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"width": 16, "heads": 2, "ffn": 16, "encoder_layers": 1, "decoder_layers": 1}
    source = SourcedPartConfig(name="imagebind", source=SourceConfig(path="encoders/imagebind"))
    modalities = {
        modality: ModalityConfig(
            input=InputConfig(encoder=source, feature_dim=8),
            output=OutputConfig(
                signal_tokens=3,
                condition={name: tuple(shape) for name, shape in generator.condition_spec.shapes.items()},
                generator=SourcedPartConfig(name="any", source=SourceConfig(path=f"generators/{modality}")),
                projector=PartConfig(name="text_fc", options=options),
            ),
        )
        for modality, generator in generators.items()
    }
    config = AnyGenConfig(name="tiny", llm=SourceConfig(repo="tiny-llm"), modalities=modalities)
    encoders = {modality: ImageBindEncoder.from_pretrained(folder, modality=modality) for modality in modalities}
    model = AnyGenModel(config, tiny_llm(max_position_embeddings=512), encoders).initialize(seed=0)
    from peft import LoraConfig

    model.llm.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.origin = tmp_path / "model"
    return model.eval()


@pytest.fixture(scope="module")
def heard_icons_dir(icons_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes, two of which are called by names of things that are heard; the bank lies beside them."""
    folder = tmp_path_factory.mktemp("data") / "icons"
    shutil.copytree(icons_dir, folder)
    index = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    index["concepts"][0]["label"], index["concepts"][2]["label"] = "flute", "dog"
    (folder / "icons.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def linked(icons: IconSet) -> IconSet:
    """The shapes under names of things that are heard."""
    names = ["flute", "organ", "dog face", "violin", "rainbow", "tuba"]
    concepts = tuple(Concept(str(n), name, ("dog",) if n == 2 else (), 7) for n, name in enumerate(names))
    return IconSet(
        concepts=concepts,
        pixels=icons.pixels,
        concept=icons.concept,
        style=icons.style,
        panoramas=icons.panoramas,
        checksum="",
    )


# --- the cases -----------------------------------------------------------------------------------------------


def test_there_are_enough_held_out_messages_of_every_kind() -> None:
    requests = [request for kind in MEDIA_KINDS for request in media_requests(kind)]
    assert all(len(media_requests(kind)) >= 60 for kind in MEDIA_KINDS)
    assert len({request.text for request in requests}) == len(requests) >= 300
    inputs = ("image", "video", "audio")
    assert all(len(media_requests("given", given=g, makes=(m,))) >= 8 for g in inputs for m in inputs)
    assert all(len(questions(modality)) >= 12 for modality in inputs)
    orders = {request.makes for request in media_requests("several")}
    assert len(orders) >= 9 and max(map(len, orders)) == 3


def test_slots_stand_where_they_are_filled() -> None:
    for request in (request for kind in MEDIA_KINDS for request in media_requests(kind)):
        slots = sorted(re.findall(r"\{(\w*)\}", request.text))
        if request.bare:
            assert slots == ["x"], request.text
        elif request.kind in ("given", "impossible"):
            assert slots == [], request.text
        else:
            assert slots == ["x", "y", "z"][: len(request.makes)], request.text


def test_requests_for_several_media_name_them_in_the_order_of_the_answer(icons: IconSet, bank: SoundBank) -> None:
    filler = Filler(icons, bank, 0)
    asked = media_requests("several")
    filled = [filler.fill(request) for request in asked]
    assert not any("{" in message for message in filled)
    one = next(n for n, request in enumerate(asked) if request.text == "Film {x} and then play {y}.")
    film, _, sound = filled[one].removeprefix("Film ").partition(" and then play ")
    assert any(concept.label in film for concept in icons.concepts)
    heard = [row.name for row in (*bank.instruments, *bank.percussion)] + [row.label for row in bank.effects]
    assert any(name in sound for name in (*heard, "drum kit"))


def test_a_model_is_asked_for_what_it_can_do() -> None:
    several = [request for request in media_requests("several") if routable(request, (), ("image", "video"))]
    assert several and all("audio" not in request.makes for request in several)
    assert not any(routable(request, ("image",), ("image",)) for request in media_requests("given", given="audio"))


def test_things_that_are_heard_make_different_sounds(linked: IconSet, bank: SoundBank) -> None:
    found = things(linked, bank)
    assert [thing.name for thing in found] == ["a flute", "an organ", "a dog face", "a violin", "a tuba"]
    labels = [thing.sound.label for thing in found if thing.sound]
    assert labels == ["flute", "organ", "a dog barking", "violin", "tuba"] and len(things(linked)) == 6


def test_sounds_asked_for_are_held_out_phrases_and_plain_effects(bank: SoundBank) -> None:
    cases = sound_cases(bank, 6, 3, seed=2)
    assert [is_held_out(case.sound) for case in cases] == [True] * 6 + [False] * 3
    assert {case.sound.label for case in cases[6:]} == {"a dog barking", "rain falling"}
    assert cases == sound_cases(bank, 6, 3, seed=2) != sound_cases(bank, 6, 3, seed=3)
    assert all(case.sound.label in case.request and "{" not in case.request for case in cases)


def test_a_phrase_says_all_of_the_sound() -> None:
    sound = Sound(kind="music", label="organ", phrase="rising", tempo="slow", pitch="high")
    words = {phrase_sound(sound, random.Random(seed)) for seed in range(20)}
    assert words == {
        "an organ playing a slow high rising melody",
        "a slow high rising melody on an organ",
        "a slow high rising melody played by an organ",
    }


def test_clips_asked_for_are_held_out_and_can_be_read(large_icons: IconSet) -> None:
    motions = ("moving left", "spinning")
    cases, ceilings = clip_cases(large_icons, 1, seed=0, motions=motions)
    assert [case.shot.motion for case in cases if is_held_out_clip(case.shot, case.concept)] == [
        motion for motion in motions if ceilings[motion][0]
    ]
    assert cases and all(found <= tried for found, tried in ceilings.values())
    assert all(large_icons.concepts[case.concept].label in case.request for case in cases)


# --- judging -------------------------------------------------------------------------------------------------


def test_true_sounds_are_hits_and_missing_ones_are_not(bank: SoundBank) -> None:
    cases = sound_cases(bank, 0, 2, seed=0)
    waves = list(SoundSource(bank, seed=4).make([case.sound for case in cases]).waveforms)
    heard = judge_sounds([*cases, cases[0]], [*waves, None], NearestSound(bank, takes=6))
    assert [one.hit for one in heard] == [True, True, False]
    assert [one.sounds_like for one in heard] == [case.sound.label for case in cases] + [""]
    assert heard[0].asked == canonical(cases[0].sound)


def test_true_clips_are_hits_and_missing_ones_are_not(large_icons: IconSet) -> None:
    cases, _ = clip_cases(large_icons, 1, seed=0, motions=TRACKED[:1] + ("staying still",))
    source = MotionSource(large_icons, seed=0)
    clips = [source.make([case.icon], [case.shot]).pixels[0] for case in cases]
    filmed = judge_clips([*cases, cases[0]], [*clips, None], NearestThing(large_icons))
    assert [one.hit for one in filmed] == [True] * len(cases) + [False] and filmed[-1].motion is None
    assert [one.motion for one in filmed[:-1]] == [one.wanted for one in filmed[:-1]]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("This is a dog barking.", {"a dog barking"}),
        ("I hear a bark.", {"a dog barking"}),
        ("A violin playing a rising melody.", {"violin"}),
        ("Rain, and an organ.", {"rain falling", "organ"}),
        ("nothing", set()),
    ],
)
def test_sounds_are_found_by_their_names(text: str, labels: set[str], bank: SoundBank) -> None:
    assert SoundNames(bank).named(text) == labels


def test_true_media_of_a_thing_are_judged_to_be_of_it(linked: IconSet, bank: SoundBank) -> None:
    judge = Judge(NearestIcon(linked), NearestThing(linked), NearestSound(bank, takes=6), bank)
    media = Media(linked, bank, 0)
    dog, rainbow = things(linked, bank)[2], things(linked)[4]
    (sound,), (clip,) = media.make("audio", [dog]), media.make("video", [dog])
    assert clip.shape == (16, 3, 32, 32)
    still = on_white(linked, [2]).expand(5, -1, -1, -1)
    assert judge.medium("video", still, dog) and not judge.medium("video", still, rainbow)
    assert judge.medium("image", still[0], dog)
    assert judge.medium("audio", sound, dog) and not judge.medium("audio", None, dog)
    assert judge.words("Here is the sound of a bark.", dog) and judge.words("a dog", dog)
    assert judge.words("a rainbow", rainbow) and not judge.words("a bark", rainbow)


@pytest.mark.parametrize("modality", ["image", "video"])
def test_a_thing_alone_stands_before_a_plain_colour(modality: str, linked: IconSet) -> None:
    media, thing = Media(linked, None, 0), things(linked)[2]
    for picture in media.make(modality, [thing] * 12, alone=True):
        frame = picture[0] if modality == "video" else picture
        corners = frame[:, :: frame.shape[1] - 1, :: frame.shape[2] - 1].flatten(1)
        torch.testing.assert_close(corners, corners[:, :1].expand_as(corners), rtol=0, atol=0.02)


# --- media ---------------------------------------------------------------------------------------------------


def test_media_are_tensors_and_back() -> None:
    torch.manual_seed(0)
    clip, sound = torch.rand(3, 3, 4, 4), torch.rand(SAMPLES) - 0.5
    film, noise = as_medium("video", clip), as_medium("audio", sound)
    assert isinstance(film, Video) and isinstance(noise, Audio) and noise.sampling_rate == 16_000
    torch.testing.assert_close(as_tensor(film), clip, rtol=0, atol=0.51 / 255)
    assert torch.equal(as_tensor(noise), sound)
    slow = Audio(torch.sin(torch.arange(8000) / 20).numpy(), 8000)
    assert as_tensor(slow).shape == (SAMPLES,) and as_tensor(slow)[16_100:].abs().max() == 0


def test_media_of_captions_do_not_depend_on_the_batch(generators: dict[str, Generator]) -> None:
    for generator in generators.values():
        together, alone = (by_caption(generator, ["a dog", "a flute"], [3, 4], size) for size in (2, 1))
        for one, other in zip(together, alone, strict=True):
            assert one is not None and other is not None
            torch.testing.assert_close(one, other, rtol=0, atol=0.02)


def test_restoring_a_sound_is_measured_without_and_with_the_vocoder(
    sounds: AudioLDM2Generator, bank: SoundBank
) -> None:
    found = restored_sounds(sounds, bank, 2, 0)
    assert list(found) == ["sound autoencoder", "sound autoencoder and vocoder"]
    assert all(0 < value < 50 for value in found.values()) and found == restored_sounds(sounds, bank, 2, 0)


# --- the whole -----------------------------------------------------------------------------------------------


def test_a_space_in_which_things_meet_retrieves_them(model: AnyGenModel, icons: IconSet) -> None:
    encoders = joint_encoders(model)
    assert set(encoders) == {"image", "video", "audio", "text"}
    rows = Rows(0)
    picked = {"image": encoders["image"], "video": encoders["video"]}
    still = Media(icons, None, 0)
    picture = still.make("image", still.choose(("image",), 3))
    frozen = {"image": picture, "video": [one.expand(4, -1, -1, -1) for one in picture]}
    still.make = lambda modality, chosen: frozen[modality][: len(chosen)]  # type: ignore[method-assign]
    retrieval(rows, picked, {0: still}, 3, 2)
    assert [(row.name, row.value) for row in rows.found] == [
        ("retrieval image -> video, R@1 of 3", 1.0),
        ("retrieval video -> image, R@1 of 3", 1.0),
    ]


def test_every_kind_of_message_is_asked(model: AnyGenModel, linked: IconSet, bank: SoundBank) -> None:
    asked = ask_for_media(model, linked, bank, 1, 0)
    assert [one.wanted for one in asked] == list(MEDIA_KINDS)
    assert not any("{" in one.message for one in asked)
    assert asked == ask_for_media(model, linked, bank, 1, 0, batch_size=1)


def test_the_suite_measures_every_row_of_a_model_of_all_media(
    model: AnyGenModel,
    generators: dict[str, Generator],
    heard_icons_dir: Path,
    sound_bank_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import anygen.training.evaluation_media as module

    monkeypatch.setattr(module, "clip_cases", lambda icons, most, seed: clip_cases(icons, 1, seed, TRACKED[-2:]))
    shutil.copytree(sound_bank_dir, heard_icons_dir.with_name("sounds"))  # where it is looked for
    result = evaluate(model, generators, heard_icons_dir, limit=1, report=tmp_path / "report", batch_size=8)
    names = [row.name for row in result.rows]
    for wanted in (
        "modality asked for: several",
        "text -> audio, LLM path: instrument family",
        "text -> audio, true sounds: slow or fast",
        "sound autoencoder and vocoder: spectral convergence (0 is best)",
        "text -> video, τ_X path: concept in the middle frame",
        "audio -> text: instrument family or effect class is named",
        "video -> text: the thing is named",
        "retrieval text -> image, R@1 of 1",
        "retrieval audio -> video, R@1 of 1",
        "any to any: image -> video",
    ):
        assert wanted in names
    assert len(names) == len(set(names)) and all(row.cases for row in result.rows if "text -> audio" not in row.name)
    assert all(cell.cases for cell in result.matrix)
    assert {(cell.given, cell.made) for cell in result.matrix} == {
        (given, made) for given in ("text", "image", "video", "audio") for made in ("text", "image", "video", "audio")
    }
    assert json.loads(json.dumps(result.to_dict()))["matrix"][0]["given"] == "text"
    text = (tmp_path / "report" / "README.md").read_text(encoding="utf-8")
    assert "## Any to any" in text and "| given | text | image | video | audio |" in text


def test_a_report_shows_strips_spectrograms_and_the_matrix(tmp_path: Path) -> None:
    clip = torch.zeros(4, 3, 16, 16)
    clip[2:, 0] = 1
    sound = torch.sin(torch.arange(SAMPLES) / 5)
    film = Filmed(
        asked="a", seed=1, clip=clip, answer="", wanted="moving up", motion="growing", looks_like="owl", hit=False
    )
    noise = Heard(
        asked="b",
        seed=2,
        waveform=sound,
        answer="Here.",
        sound=Sound(kind="music", label="tuba"),
        sounds_like="flute",
        direction="rising",
        tempo=None,
        hit=False,
    )
    cells = (Cell(given="text", made="text", value=1.0, cases=9), Cell(given="audio", made="image", value=0.5, cases=4))
    result = EvaluationResult(suite="mini", model="m", icons="c", device="cpu", rows=(), matrix=cells)
    write_report(result, tmp_path, filmed=[film], heard=[noise])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| 1 | a |  | owl | growing | 1 |" in text and "| 1 | b | Here. | flute | rising |  | 2 |" in text
    assert "| text | 1.00 (9) |  |" in text and "| audio |  | 0.50 (4) |" in text
    with PIL.open(tmp_path / "clips.png") as strips:
        assert strips.getpixel((8, 20)) == (0, 0, 0) and strips.getpixel((24, 20)) == (255, 0, 0)
    assert (tmp_path / "sounds.png").exists()


def test_plots_have_time_to_the_right_and_high_tones_on_top(tmp_path: Path) -> None:
    late_and_high = torch.zeros(SAMPLES)
    late_and_high[SAMPLES // 2 :] = torch.sin(torch.arange(SAMPLES - SAMPLES // 2) * 2.5)  # 6.4 kHz
    plot = mel_plot(late_and_high)
    assert plot.shape == (3, 128, 256) and plot[:, :32, 140:].mean() > 4 * plot[:, :32, :110].mean()
    assert plot[:, :32, 140:].mean() > plot[:, 96:, 140:].mean()
    assert film_strip(torch.rand(16, 3, 128, 128)).shape == (3, 64, 512)
    with PIL.open(mel_plots([late_and_high, None], tmp_path / "two.png")) as sheet:
        assert sheet.size == (2 * 262, 148) and sheet.getpixel((262 + 20, 40)) == (225, 225, 225)
