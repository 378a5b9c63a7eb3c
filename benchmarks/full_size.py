"""What a full-size model costs on one GPU, and how much faster anygen's way is than the plain one, in one run.

    python benchmarks/full_size.py                           # everything with CUDA graphs, the default of a GPU
    python benchmarks/full_size.py --compile blocks          # and compiled; --compile whole is slower to start
    python benchmarks/full_size.py --only llm --json
    python benchmarks/full_size.py --only small              # 4 bits and offload, which has to stay under 16 GB
    python benchmarks/full_size.py --tiny --device cpu       # the same code in seconds

Weights are random and shapes are published ones (`full_size_model.py`), so no network is needed: 14 GB of memory for
the LLM, 6 GB for the generators, and 6 GB of disk. The fast side is the pipeline as it ships; since random weights do
not ask for media by themselves, its choice of tokens is scripted after it was made. The plain side is
`full_size_plain.py`. Parts of `--only`: ceilings, llm, image, video, audio, request, plain; and small, which is not
among them unasked, as it writes the LLM too (14 GB).
"""

import argparse
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import full_size_plain as plain
import numpy as np
import torch
from full_size_model import FULL, GENERATORS, SIGNALS, TINY, Size, build, made_on
from full_size_plain import synchronise
from measuring import GB, Row, machine, show

from anygen import AnyGenPipeline, compiling, decoding
from anygen.decoding import DecodingConfig, decode
from anygen.errors import ConfigError
from anygen.features import Condition
from anygen.loading import choose_device, choose_dtype
from anygen.media import Image
from anygen.memory_need import model_need
from anygen.offload import Generators
from anygen.presets import get
from anygen.prompts import Prompt
from anygen.reply import PlannedPart, Reply
from anygen.speed import Speed
from anygen.static_rows import StaticMemories

PARTS = ("ceilings", "llm", "image", "video", "audio", "request", "plain", "small")
TEXT = 64
"""Tokens of text in the request."""
FEW, MANY = 20, 40
"""Steps of the fast way, and of the plain one."""
LEAST = {"llm": 0.80, "image": 0.50, "video": 0.42}
"""Shares of the bandwidth or of the peak that are wanted."""
NOUNS = {"image": "picture", "video": "clip", "audio": "sound"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="PART,…", default=",".join(PARTS[:-1]), help="parts of the table")
    parser.add_argument("--compile", choices=("off", "blocks", "whole"), default="off", help="default: %(default)s")
    parser.add_argument("--untuned", action="store_true", help="compiles the LLM's layers without tuning products")
    parser.add_argument("--tune-blocks", action="store_true", help="tunes products of generators; takes minutes")
    for what in ("layer", "block"):
        parser.add_argument(
            f"--{what}-options", type=json.loads, metavar="JSON", help=f"more of inductor's options for a {what}"
        )
    parser.add_argument("--cudnn-benchmark", action="store_true", help="lets cuDNN try its convolutions")
    parser.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    parser.add_argument("--apart", action="store_true", help="generators one after the other, on one stream")
    parser.add_argument("--tiny", action="store_true", help="the same classes, small")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--encoder", action="store_true", help="with ImageBind-Huge; the request holds a picture")
    parser.add_argument("--device", help="default: CUDA where it is")
    parser.add_argument(
        "--budget", type=float, default=540, metavar="S", help="begin nothing later (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    only = options.only.split(",")
    if unknown := [part for part in only if part not in PARTS]:
        parser.error(f"--only is of {', '.join(PARTS)}; got '{unknown[0]}'")
    if options.untuned:
        compiling.LAYER_OPTIONS = {}
    if options.tune_blocks:
        compiling.BLOCK_OPTIONS = {"max_autotune_gemm": True, "coordinate_descent_tuning": True}
    compiling.LAYER_OPTIONS = compiling.LAYER_OPTIONS | (options.layer_options or {})
    compiling.BLOCK_OPTIONS = compiling.BLOCK_OPTIONS | (options.block_options or {})
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            TINY if options.tiny else FULL,
            Path(folder),
            device,
            Speed(graphs=device.type == "cuda" and not options.no_graphs, compile=_compile(options.compile)),
            repeats=1 if options.quick else 3,
            reads=options.encoder,
            together=not options.apart,
        )
        rows: list[Row] = []
        for row in bench.rows(only, options.budget):
            rows.append(row)
            if not options.json:
                value = "-" if row.value is None else f"{row.value:.4g} {row.unit}"
                print(f"{row.what}: {value} {row.note}", file=sys.stderr, flush=True)
    title = f"{bench.size.name}; {'compiled ' + options.compile if options.compile != 'off' else 'not compiled'}"
    if options.json:
        told = [asdict(row) | {"met": row.met} for row in rows]
        print(json.dumps({"model": title, "speed": asdict(bench.speed), "machine": told_machine(device), "rows": told}))
    else:
        show(rows, title, told_machine(device))
    return 0


def _compile(chosen: str) -> bool | str:
    return False if chosen == "off" else chosen


def told_machine(device: torch.device) -> dict[str, Any]:
    """`machine()`, and the accelerator."""
    found = machine()
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


class Bench:
    """The model, and what is measured on it.

    Args:
        size: of everything.
        folder: for the generators.
        device: where to.
        speed: the fast side's way.
        repeats: of each measurement; the median counts.
        reads: whether a picture is read, by ImageBind-Huge.
        together: whether generators take turns.
    """

    def __init__(
        self,
        size: Size,
        folder: Path,
        device: torch.device,
        speed: Speed,
        *,
        repeats: int,
        reads: bool = False,
        together: bool = True,
    ) -> None:
        self.size, self.folder, self.device, self.speed, self.repeats = size, folder, device, speed, repeats
        self.together = together
        self.dtype = choose_dtype(None, device)
        begin = time.perf_counter()
        self.model = build(size, folder, device, self.dtype, reads=reads)
        self.built = time.perf_counter() - begin
        self.letter: int = self.model.llm.tokenizer("a")["input_ids"][0]  # type: ignore[index]
        self.pipe = self.pipeline()
        self.flops = self.sustained = self.bandwidth = 0.0
        """Of the device; measured by `ceilings`."""
        self.seconds: dict[tuple[str, int], float] = {}
        """(what, steps) -> seconds of a request."""

    def pipeline(self) -> AnyGenPipeline:
        """As `AnyGenPipeline.from_pretrained` puts it together."""
        self.speed.apply_to_llm(self.model)
        if self.device.type != "cuda":  # so that the same code runs
            self.model.memories = StaticMemories(
                self.model, capture=None, region=self.model.memories.region if self.model.memories else None
            )
        generators = Generators.of(
            self.folder,
            self.model.settings,
            [*GENERATORS],
            self.device,
            self.dtype,
            offload="resident",
            prepare=self.speed.apply,
        )
        pipe = AnyGenPipeline(self.model, generators)
        pipe.together = self.together
        return pipe

    def rows(self, only: Sequence[str], budget: float) -> Iterator[Row]:
        """The table, part by part; what would begin after the budget is said and left out."""
        begin = time.perf_counter()
        yield Row("models made, generators written", self.built, "s", note="not a part of anything below")
        parts: dict[str, Callable[[], Iterator[Row]]] = {
            "ceilings": self.ceilings,
            "llm": self.llm,
            **{m: lambda m=m: self.generator(m) for m in GENERATORS},
            "request": self.request,
            "plain": self.plain,
            "small": self.small,
        }
        if "ceilings" not in only:
            list(self.ceilings())  # the others are told as shares of them
        for part in PARTS:
            if part not in only:
                continue
            if part == "small":
                yield from self.closing()
            if time.perf_counter() - begin > budget:
                yield Row(part, None, "", note=f"left out: the budget of {budget:g} s is spent")
                continue
            yield from parts[part]()
        if "small" not in only:
            yield from self.closing()

    def closing(self) -> Iterator[Row]:
        """What the parts come to together."""
        yield from self.ratios()
        predicted = self.predicted() / GB
        yield Row("memory that `anygen info nextgpt-7b --memory` tells, of what is here", predicted, "GB")
        if self.device.type == "cuda":
            yield Row(
                "peak memory, allocated", torch.cuda.max_memory_allocated() / GB, "GB", note="everything resident"
            )
            yield Row("peak memory, reserved", torch.cuda.max_memory_reserved() / GB, "GB")

    def ceilings(self) -> Iterator[Row]:
        """What the device can."""
        self._find_ceilings()
        if self.device.type == "cuda":  # what it took is no part of the peak
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        size = self.size
        yield Row("matrix product", self.flops / 1e12, "TFLOP/s", note=f"{size.matmul} cubed, {self.dtype}")
        told = f"the same one for {size.sustained:g} s, as long as several media take"
        yield Row("matrix product, sustained", self.sustained / 1e12, "TFLOP/s", note=told)
        yield Row("memory", self.bandwidth / 1e12, "TB/s", note=f"{size.read * self.dtype.itemsize / GB:.2f} GB")

    @torch.inference_mode()
    def _find_ceilings(self) -> None:
        with made_on(self.device, self.dtype):
            side = torch.randn(self.size.matmul, self.size.matmul)
            values = torch.zeros(self.size.read)
        spent = self.best(lambda: side @ side)
        self.flops = 2 * self.size.matmul**3 / spent
        count = 1 + int(self.size.sustained / spent)
        self.sustained = self.flops * spent * count / self.timed(lambda: deque((side @ side for _ in range(count)), 0))
        rows, copy = values.view(-1, 2**14), torch.empty_like(values)
        reading = values.nbytes / min(self.best(lambda: rows.amax(1)), self.best(lambda: rows.sum(1)))
        self.bandwidth = max(reading, 2 * values.nbytes / self.best(lambda: copy.copy_(values)))

    def llm(self) -> Iterator[Row]:
        """Prefill and decoding of one prompt."""
        few, many = 16, 144
        first = self.timed(lambda: self.say(self.size.prompt, few))
        self.say(self.size.prompt, few)
        prefill = self.median(lambda: self.say(self.size.prompt, 1))
        yield Row("LLM, first answer", first, "s", note="compilation, capture and warm-up in it")
        yield Row(f"LLM, prefill of {self.size.prompt} tokens", 1000 * prefill, "ms", note="and one token")
        self.say(TEXT, many)
        short, long = (self.median(partial(self.say, TEXT, count)) for count in (few, many))
        rate = (many - few) / (long - short)
        yield Row("LLM, decoding", rate, "tokens/s", note=f"batch 1, {TEXT} tokens before, {many - few} measured")
        base: Any = self.model.llm.base
        embedding: Any = self.model.llm.embedding
        read = sum(p.nbytes for p in base.parameters()) - embedding.weight.nbytes
        share = rate * read / self.bandwidth
        yield Row(
            "of the bandwidth's floor", 100 * share, "%", least=100 * LEAST["llm"], note=f"{read / GB:.2f} GB a token"
        )

    def generator(self, modality: str) -> Iterator[Row]:
        """One medium, and several at once."""
        noun = NOUNS[modality]
        first = self.timed(lambda: self.make(modality, 1, 2))
        self.make(modality, 1, 2)
        yield Row(f"{noun}, first", first, "s", note="2 steps; reading, compilation, capture and warm-up in it")
        for batch in (1, 4) if modality == "image" else (1,):
            self.make(modality, batch, 2)
            self.make(modality, batch, 2)
            few, some = 4, 12
            short, long, whole = (self.median(partial(self.make, modality, batch, n)) for n in (few, some, FEW))
            step = (long - short) / (some - few)
            yield Row(f"{noun}, batch {batch}", whole / batch, f"s a {noun}", note=f"{FEW} steps of DPM-Solver++")
            work = self.work(modality, batch)
            share = work / step / self.flops
            least = 100 * LEAST[modality] if modality in LEAST and batch == (4 if modality == "image" else 1) else None
            note = f"{work / 1e12:.3g} TFLOP a guided step of {1000 * step:.2f} ms; "
            note += f"{100 * work / step / self.sustained:.1f} % of what is sustained"
            yield Row(f"{noun}, UNet, share of the peak", 100 * share, "%", least=least, note=note)
            yield Row(
                f"{noun}, all but the UNet", 1000 * (whole - FEW * step), "ms", note="decoding, and what surrounds it"
            )

    def request(self) -> Iterator[Row]:
        """One request for all three, end to end, the fast way."""
        first = self.timed(lambda: self.answer(FEW))
        yield Row("request, first", first, "s", note="what was not warm yet in it")
        self.answer(FEW)
        for steps in (FEW, MANY):
            replies: list[Reply] = []
            spent = self.median(lambda steps=steps, replies=replies: replies.append(self.answer(steps)))
            self.seconds["fast", steps] = spent
            told = ", ".join(f"{name} {value:.3g} s" for name, value in replies[-1].timings.items())
            yield Row(f"request, {steps} steps", spent, "s", note=told)

    def plain(self) -> Iterator[Row]:
        """The same request the plain way."""
        ids = self.model.llm.tokenizer("a" * 40)["input_ids"]
        memories, self.model.memories = self.model.memories, None
        try:
            laps: list[dict[str, float]] = []

            def once() -> None:
                laps.append(
                    plain.request(self.model, self.folder, self.size, ids, text=TEXT, steps=MANY, dtype=self.dtype)
                )

            once()  # files are in the system's cache from now on, and kernels are loaded
            spent = self.median(once)
        finally:
            self.model.memories = memories
        self.seconds["plain", MANY] = spent
        note = ", ".join(f"{name} {value:.3g} s" for name, value in laps[-1].items())
        yield Row(f"request, plain, {MANY} steps", spent, "s", note=note)

    def small(self) -> Iterator[Row]:
        """The LLM in 4 bits, generators offloaded, read from disk as any model is: what it takes, and how long."""
        self.model.memories = None
        self.model.save_pretrained(self.folder)
        del self.pipe, self.model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            begin = time.perf_counter()
            self.pipe = AnyGenPipeline.from_pretrained(
                self.folder, device=self.device, dtype=self.dtype, quantization="4bit", offload="model_offload"
            )
        except ConfigError as error:
            yield Row("4 bits and offload", None, "GB", 16.0, str(error))
            return
        self.model = self.pipe.model
        yield Row("4 bits and offload, reading", time.perf_counter() - begin, "s")
        yield Row("4 bits and offload, first request", self.timed(lambda: self.answer(FEW)), "s", note=f"{FEW} steps")
        yield Row("4 bits and offload, request", self.median(lambda: self.answer(FEW)), "s", note=f"{FEW} steps")
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved() / GB
            yield Row("4 bits and offload, peak memory, reserved", peak, "GB", 16.0)
        told = model_need(self.folder).total("4-bit", "model_offload") / GB
        yield Row("4 bits and offload, memory predicted", told, "GB")

    def predicted(self) -> int:
        """Bytes that the preset tells for what this model has of it."""
        needs = {need.role: need.bytes["bf16"] or 0 for need in get("nextgpt-7b").needs() if need.answering}
        return sum(size for role, size in needs.items() if role != "encoders" or self.model.encoders)

    def ratios(self) -> Iterator[Row]:
        """How much faster, where both were measured."""
        if (slow := self.seconds.get(("plain", MANY))) is None:
            return
        for steps, least in ((FEW, 6.0), (MANY, 3.0)):
            if (fast := self.seconds.get(("fast", steps))) is not None:
                yield Row(f"faster, {steps} steps against {MANY}", slow / fast, "times", least=least)

    def say(self, prompt: int, count: int) -> None:
        """One prompt of so many tokens, so many tokens of text."""
        config = DecodingConfig(max_new_tokens=count, max_runs=0, route="media")
        ids = [1 + place % 200 for place in range(prompt)]
        with scripted(self.letter, {}):
            for _ in decode(self.model, [Prompt(ids, ids, [], False)], config=config):
                pass

    def make(self, modality: str, batch: int, steps: int) -> None:
        """So many media."""
        shapes = self.size.conditions[modality]
        draw = torch.Generator().manual_seed(0)
        parts = [
            PlannedPart(
                modality, Condition({n: torch.randn(1, *shape, generator=draw) for n, shape in shapes.items()}), ""
            )
            for _ in range(batch)
        ]
        self.pipe.render(
            Reply(content=tuple(parts), prompt="", model="", seed=0), steps=steps, progress=False, batch_size=batch
        )

    def answer(self, steps: int) -> Reply:
        """The request: words, a picture, a clip and a sound."""
        start = self.model.signal_tokens.runs
        script = {TEXT: start["image"].start}
        script[TEXT + SIGNALS["image"]] = start["video"].start
        script[TEXT + SIGNALS["image"] + SIGNALS["video"]] = start["audio"].start
        with scripted(self.letter, script):
            prompt: Any = "a" * 40
            if self.model.encoders:
                prompt = [prompt, Image.from_any(np.zeros((224, 224, 3), np.uint8))]
            reply = self.pipe(prompt, seed=0, steps=steps, max_new_tokens=TEXT + sum(SIGNALS.values()), progress=False)
        if [medium.modality for medium in reply.media] != [*GENERATORS]:
            raise SystemExit(f"the request was answered by {[m.modality for m in reply.media]}")
        return reply

    def work(self, modality: str, batch: int) -> float:
        """FLOP of one guided step of the UNet, counted on a model without memory."""
        from torch.utils.flop_counter import FlopCounterMode

        unet: Any = getattr(self.pipe.generator(modality), "unet")  # noqa: B009
        shapes = self.size.conditions[modality]
        generator: Any = self.pipe.generator(modality)
        with torch.device("meta"):
            twin = type(unet).from_config(unet.config).eval()
            if modality == "image":
                sides: tuple[int, ...] = (unet.config.sample_size,) * 2
            elif modality == "video":
                sides = (self.size.frames, *unet.config.sample_size)
            else:
                sides = generator._latent_shape(self.size.seconds)[1:]
            latents = torch.empty(2 * batch, unet.config.in_channels, *sides)
            given = {name: torch.empty(2 * batch, *shape) for name, shape in shapes.items()}
            told = {"encoder_hidden_states": given["prompt_embeds"]}
            if modality == "audio":
                told = {
                    "encoder_hidden_states": given["generated_prompt_embeds"],
                    "encoder_hidden_states_1": given["prompt_embeds"],
                }
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                twin(latents, torch.ones((), dtype=torch.long), **told)
        return counter.get_total_flops()

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds, the device's work in them."""
        synchronise(self.device)
        begin = time.perf_counter()
        work()
        synchronise(self.device)
        return time.perf_counter() - begin

    def median(self, work: Callable[[], Any]) -> float:
        """The median of several."""
        return median(self.timed(work) for _ in range(self.repeats))

    def best(self, work: Callable[[], Any]) -> float:
        """The shortest of several, ten in a row to hide their launch."""
        return min(self.timed(lambda: [work() for _ in range(10)]) for _ in range(3)) / 10


@contextmanager
def scripted(letter: int, script: dict[int, int]) -> Iterator[None]:
    """Inside, the decoder chooses as ever, but says at the places of `script` its token, and otherwise `letter`.

    Random weights never ask for a medium, and might end an answer at any time.
    """
    choose = decoding._Batch.choose

    def chosen(batch: Any, speakers: Any) -> list[int]:
        choose(batch, speakers)
        return [script.get(len(speaker.said), letter) for speaker in speakers]

    decoding._Batch.choose = chosen  # type: ignore[method-assign]
    try:
        yield
    finally:
        decoding._Batch.choose = choose  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
