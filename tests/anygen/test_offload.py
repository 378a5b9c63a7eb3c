"""Generators that make room for each other."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen import AnyGenPipeline
from anygen.errors import ConfigError, OutOfMemoryError
from anygen.features import Condition, ConditionSpec
from anygen.generators.base import Generator
from anygen.model_config import AnyGenConfig
from anygen.offload import Generators, GeneratorSource, container_memory, free_memory, weight_bytes
from anygen.reply import Reply

GIB = 2**30


class Placed(Generator):
    """A generator that knows where it is, and nothing else."""

    modality = "image"
    condition_spec = ConditionSpec(shapes={})

    def __init__(self, device: str = "cuda") -> None:
        self.at = torch.device(device)

    @classmethod
    def from_pretrained(cls, directory: Any, *, device: Any = "cpu", dtype: Any = torch.float32) -> "Placed":
        return cls(device)

    def to(self, device: torch.device | str) -> "Placed":
        self.at = torch.device(device)
        return self

    def save_pretrained(self, directory: Any) -> None:
        raise NotImplementedError

    def encode_text(self, captions: Any) -> Condition:
        raise NotImplementedError

    def generate(self, condition: Condition, **options: Any) -> list[Any]:
        raise NotImplementedError

    def denoising_loss(self, condition: Condition, media: Any, *, generator: Any = None) -> torch.Tensor:
        raise NotImplementedError


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what is free on an accelerator and on the CPU, in GiB."""

    def free(*, device: float = 100, cpu: float = 100) -> None:
        monkeypatch.setattr(
            "anygen.offload.free_memory", lambda where: int((cpu if where.type == "cpu" else device) * GIB)
        )

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return free


def three(
    loads: list[str], *, device: str, offload: str, weights: float = 2.0
) -> tuple[Generators, Callable[[], dict[str, str]]]:
    """Generators of three modalities, and a function that tells where those in memory are."""

    def source(modality: str) -> GeneratorSource:
        def load() -> Generator:
            loads.append(modality)
            return Placed(device)

        return GeneratorSource(load, lambda: int(weights * GIB))

    generators = Generators(
        {modality: source(modality) for modality in ("image", "video", "audio")}, offload=offload, device=device
    )
    return generators, lambda: {m: g.at.type for m, g in generators.loaded().items() if isinstance(g, Placed)}


def test_generators_are_a_mapping_that_loads_on_demand() -> None:
    image, loads = Placed("cpu"), list[str]()

    def load() -> Generator:
        loads.append("image")
        return image

    generators = Generators({"image": load})
    assert list(generators) == ["image"] and len(generators) == 1 and "audio" not in generators
    assert generators.get("audio") is None and generators.loaded() == {} and loads == []
    assert generators["image"] is generators["image"] is image
    assert loads == ["image"] and generators.loaded() == {"image": image}


def test_with_room_for_all_everything_stays(memory: Callable[..., None]) -> None:
    for offload in ("auto", "resident"):
        memory(device=100)
        loads: list[str] = []
        generators, places = three(loads, device="cuda", offload=offload)
        for modality in ("image", "video", "image", "audio"):
            with generators.using(modality):
                pass
        assert loads == ["image", "video", "audio"] and places() == dict.fromkeys(loads, "cuda")


def test_when_memory_is_short_the_one_used_longest_ago_moves_off_the_accelerator(memory: Callable[..., None]) -> None:
    memory(device=100)
    loads: list[str] = []
    generators, places = three(loads, device="cuda", offload="auto")
    for modality in ("image", "video", "image"):
        generators[modality]
    memory(device=3)  # 2 of weights and 2 of activations are wanted
    generators["audio"]
    assert places() == {"image": "cuda", "video": "cpu", "audio": "cuda"}
    memory(device=100)
    generators["video"]
    assert places() == dict.fromkeys(["image", "video", "audio"], "cuda")
    assert loads == ["image", "video", "audio"]  # none was read twice


def test_on_the_cpu_it_is_freed_and_read_again(memory: Callable[..., None]) -> None:
    memory(cpu=100)
    loads: list[str] = []
    generators, places = three(loads, device="cpu", offload="auto")
    generators["image"]
    memory(cpu=1)
    generators["audio"]
    assert places() == {"audio": "cpu"}
    generators["image"]
    assert places() == {"image": "cpu"} and loads == ["image", "audio", "image"]


def test_where_the_machines_memory_is_short_too_it_is_freed(memory: Callable[..., None]) -> None:
    memory()
    loads: list[str] = []
    generators, places = three(loads, device="cuda", offload="auto")
    generators["image"]
    memory(device=1, cpu=1)
    generators["audio"]
    assert places() == {"audio": "cuda"}


def test_resident_moves_nothing_however_short_the_memory(memory: Callable[..., None]) -> None:
    memory(device=0, cpu=0)
    loads: list[str] = []
    generators, places = three(loads, device="cuda", offload="resident")
    for modality in ("image", "video", "audio", "image"):
        generators[modality]
    assert places() == dict.fromkeys(loads, "cuda") and len(loads) == 3


@pytest.mark.parametrize(("device", "left"), [("cpu", {}), ("cuda", {"image": "cpu"})])
def test_after_use_it_goes_at_once(memory: Callable[..., None], device: str, left: dict[str, str]) -> None:
    memory()
    generators, places = three([], device=device, offload="after_use")
    with generators.using("image"):
        with generators.using("image"):
            pass
        assert places() == {"image": device}  # somebody still uses it
    assert places() == left
    with pytest.raises(ZeroDivisionError), generators.using("image"):
        raise ZeroDivisionError
    assert places() == left


def test_one_that_is_in_use_is_not_moved(memory: Callable[..., None]) -> None:
    memory()
    generators, places = three([], device="cuda", offload="auto")
    with generators.using("image"):
        memory(device=0)
        generators["audio"]
        assert places() == {"image": "cuda", "audio": "cuda"}


def test_one_that_was_given_is_moved_but_never_freed(memory: Callable[..., None]) -> None:
    memory(device=0, cpu=0)
    for device, place in (("cpu", "cpu"), ("cuda", "cpu")):
        image, audio = Placed(device), Placed(device)
        generators = Generators({"image": image, "audio": audio}, offload="auto", device=device)
        generators["image"]
        assert generators.loaded() == {"image": image, "audio": audio}
        assert (image.at.type, audio.at.type) == (device, place)


def test_loading_that_runs_out_of_memory_is_tried_again_alone(memory: Callable[..., None]) -> None:
    memory()
    tries: list[int] = []

    def load() -> Generator:
        tries.append(len(generators.loaded()))
        if len(tries) == 1:
            raise OutOfMemoryError("not enough memory")
        return Placed("cpu")

    def too_large() -> Generator:
        raise OutOfMemoryError("not enough memory")

    sources = {"image": lambda: Placed("cpu"), "video": load, "audio": too_large}
    generators = Generators(sources, offload="auto")
    generators["image"]
    generators["video"]
    assert tries == [1, 0] and list(generators.loaded()) == ["video"]
    with pytest.raises(OutOfMemoryError, match="not enough memory"):
        generators["audio"]


@pytest.mark.parametrize("offload", ["model_offload", "sequential"])
def test_under_a_placement_generators_wait_in_the_machines_memory(
    tiny_directory: Path, memory: Callable[..., None], monkeypatch: pytest.MonkeyPatch, offload: str
) -> None:
    memory(device=0)
    told: list[Any] = []

    def load(directory: Any, output: Any, device: torch.device, dtype: Any) -> Generator:
        made = Placed(str(device))
        start = str(device)
        made.place = lambda where, how: told.append((start, str(where), how)) or made  # type: ignore
        made.release = lambda: told.append("released")  # type: ignore[method-assign]
        return made

    monkeypatch.setattr("anygen.offload.load_generator", load)
    config = AnyGenConfig.load(tiny_directory / "anygen.json")
    generators = Generators.of(
        tiny_directory, config, ["image", "audio"], torch.device("cuda"), torch.bfloat16, offload=offload
    )
    with generators.using("image"):
        assert told == [("cpu", "cuda", offload)]
    with generators.using("audio"):
        pass
    assert told[1:] == ["released", ("cpu", "cuda", offload), "released"] and list(generators.loaded()) == [
        "image",
        "audio",
    ]


def test_no_other_policy_is_known() -> None:
    with pytest.raises(
        ConfigError, match="one of auto, resident, after_use, model_offload, sequential; got 'sometimes'"
    ):
        Generators({}, offload="sometimes")


def test_a_freed_generator_leaves_no_trace_and_its_media_are_the_same(
    tiny_directory: Path, pipe: AnyGenPipeline, memory: Callable[..., None]
) -> None:
    own = AnyGenPipeline.from_pretrained(tiny_directory, device="cpu", offload="after_use")
    unet = weakref.ref(own.generator("image").unet)  # type: ignore[attr-defined]
    options: Any = {"seed": 3, "max_new_tokens": 5}
    wanted = pipe("Draw and play", **options)
    assert own("Draw and play", **options) == wanted and own.generators["audio"]  # type: ignore[truthy-bool]
    assert own("Play", **options) == pipe("Play", **options) and own.generators.loaded() == {}
    gc.collect()
    assert unet() is None
    events = list(own.stream("Draw and play", **options))
    assert isinstance(reply := getattr(events[-1], "reply", None), Reply) and reply.content == wanted.content
    assert own.generators.loaded() == {}


def test_auto_is_the_default_and_frees_on_a_machine_with_little_memory(
    tiny_directory: Path, pipe: AnyGenPipeline, memory: Callable[..., None]
) -> None:
    own = AnyGenPipeline.from_pretrained(tiny_directory, device="cpu")
    memory(cpu=0.5)
    assert own("Draw and play", seed=3, max_new_tokens=5) == pipe("Draw and play", seed=3, max_new_tokens=5)
    assert list(own.generators.loaded()) == ["audio"]
    memory(cpu=100)
    own("Draw and play", seed=3, max_new_tokens=5)
    assert list(own.generators.loaded()) == ["image", "audio"]


def test_a_stream_that_is_left_puts_its_generator_away(tiny_directory: Path, memory: Callable[..., None]) -> None:
    from anygen.streaming import MediaStep

    memory()
    own = AnyGenPipeline.from_pretrained(tiny_directory, device="cpu", offload="after_use")
    events: Any = own.stream("Draw", seed=3, steps=50)
    assert any(isinstance(event, MediaStep) for event in events) and list(own.generators.loaded()) == ["image"]
    events.close()
    assert own.generators.loaded() == {}


def test_weights_are_counted_in_the_type_that_they_are_loaded_in(
    tiny_directory: Path, pipe: AnyGenPipeline, tmp_path: Path
) -> None:
    generator: Any = pipe.generator("image")
    parts = (generator.vae, generator.unet, generator.text.encoder)
    numbers = sum(tensor.numel() for part in parts for tensor in part.state_dict().values())
    numbers += generator.unconditional.numel()
    folder = tiny_directory / "generators/image"
    assert weight_bytes(folder, torch.bfloat16) == 2 * numbers
    assert weight_bytes(folder, torch.float32) == 4 * numbers
    sharing = tmp_path / "video"
    sharing.mkdir()
    (sharing / "shared.json").write_text(f'{{"vae": "{Path("../image/vae").as_posix()}"}}')
    (tmp_path / "image").symlink_to(folder)
    assert weight_bytes(sharing, torch.float32) == 4 * sum(t.numel() for t in generator.vae.state_dict().values())
    (sharing / "broken.safetensors").write_bytes(b"not safetensors")
    assert weight_bytes(sharing, torch.float32) > 0


def test_free_memory_is_what_the_machine_and_its_container_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr("anygen.offload.container_memory", lambda: None)
    assert 0 < free_memory(torch.device("cpu")) <= psutil.virtual_memory().total
    monkeypatch.setattr("anygen.offload.container_memory", lambda: 5)
    assert free_memory(torch.device("cpu")) == 5
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3)
    assert free_memory(torch.device("cuda")) == 14


def test_the_limit_of_a_container_is_read_in_both_versions(tmp_path: Path) -> None:
    assert container_memory(tmp_path / "none") is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 50\n")
    assert container_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_memory(tmp_path) == 650
    old = tmp_path / "old/memory"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("1000\n")
    (old / "memory.usage_in_bytes").write_text("1200\n")
    (old / "memory.stat").write_text("total_inactive_file 100\n")
    assert container_memory(old.parent) == 0
