"""Caption-only alignment: how much faster and smaller anygen's step is than the plain one, in one run, gradients equal.

    python benchmarks/caption_alignment.py                    # a 7B-shaped Llama in bf16, on a GPU
    python benchmarks/caption_alignment.py --json
    python benchmarks/caption_alignment.py --only trained     # gradients of anygen-mini, which is not random
    python benchmarks/caption_alignment.py --tiny             # the same code on a CPU, in seconds

One step trains the signal rows and the output projectors of image, video and audio (4, 24 and 8 signal tokens) on a
batch of captions; a pair is one caption with one modality. The plain way puts each pair into a sequence of its own,
pads the batch to its longest, and goes back through all of it. The other way (`anygen.training.prefix`) takes measures
that leave the gradient as it is; the table adds them to the plain way one by one, and takes each away from the whole.

Weights, captions and targets are random. Captions are 32 tokens of a chat template and a log-normal rest (median 24
tokens, sigma 0.5, at most 96), since captions differ in length; `--even` gives all of them 64 tokens.
"""

import argparse
import gc
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from full_size_model import FULL, SIGNALS, TINY, Size, configuration, language_model, made_on
from measuring import Row, machine, show
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anygen.loading import choose_device
from anygen.model import AnyGenModel
from anygen.prompts import pad
from anygen.training.prefix import fastest_way, length_batches, prefix_alignment

GIB = 2**30
PARTS = ("speed", "large", "gradients", "lora", "trained")


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step goes; all measures taken is the fast way."""

    cached: bool = True
    """Targets were computed before, not in the step."""
    logits: bool = False
    """The head reads all states, as in a causal LM's forward pass."""
    buckets: bool = True
    """Batches are of like length."""
    constant: bool = True
    """The caption is read without autograd."""
    shared: bool = True
    """A caption is read once for all modalities."""


FAST = Way()
PLAIN = Way(buckets=False, constant=False, shared=False)
LADDER = {
    "plain, with logits, targets made in the step": replace(PLAIN, logits=True, cached=False),
    "plain, with logits": replace(PLAIN, logits=True),
    "plain": PLAIN,
    "+ batches of like length": replace(PLAIN, buckets=True),
    "+ caption without autograd": replace(FAST, shared=False),
    "+ one caption for all modalities: the fast way": FAST,
}
"""Each row takes one measure more."""
WITHOUT = {
    "the fast way, targets made in the step": replace(FAST, cached=False),
    "the fast way, with logits": replace(FAST, logits=True),
    "the fast way, batches as they come": replace(FAST, buckets=False),
    "the fast way, caption with autograd": replace(FAST, constant=False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="PART,…", default=",".join(PARTS[:-1]), help="parts of the table")
    parser.add_argument("--captions", type=int, metavar="N", help="of a step (default: 24; tiny: 8)")
    parser.add_argument("--batches", type=int, metavar="N", default=6, help="of a pass (default: %(default)s)")
    parser.add_argument("--even", action="store_true", help="all captions have 64 tokens")
    parser.add_argument("--tiny", action="store_true", help="the same classes, small, on the CPU")
    parser.add_argument("--device", help="default: CUDA where it is; with --tiny the CPU")
    parser.add_argument("--budget", type=float, default=200, metavar="S", help="begin nothing later")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    only = options.only.split(",")
    if unknown := [part for part in only if part not in PARTS]:
        parser.error(f"--only is of {', '.join(PARTS)}; got '{unknown[0]}'")
    if options.batches < 1 or (options.captions is not None and options.captions < 2):
        parser.error("--batches is at least 1, --captions at least 2")
    device = choose_device("cpu" if options.tiny and options.device is None else options.device)
    if device.type == "cpu" and not options.tiny:
        parser.error("a 7B-shaped LLM needs a GPU; --tiny runs on a CPU")
    bench = Bench(
        TINY if options.tiny else FULL,
        device,
        captions=options.captions or (8 if options.tiny else 24),
        batches=options.batches,
        even=options.even,
    )
    rows: list[Row] = []
    for row in bench.rows(only, options.budget):
        rows.append(row)
        value = "-" if row.value is None else f"{row.value:.4g} {row.unit}"
        print(f"{row.what}: {value} {row.note}", file=sys.stderr, flush=True)
    told = machine() | ({"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})
    title = "tiny Llama" if options.tiny else "7B-shaped Llama, bf16"
    if options.json:
        table = [asdict(row) | {"met": row.met} for row in rows]
        print(json.dumps({"model": title, "captions": bench.captions, "machine": told, "rows": table}))
    else:
        show(rows, f"{title}, {bench.captions} captions a step", told)
    return 0


class Bench:
    """The model, a pool of captions with targets, and what is measured on them.

    Args:
        size: of the LLM and the conditions.
        device: where to.
        captions: of a step.
        batches: of a pass over the pool.
        even: whether all captions have 64 tokens.
    """

    def __init__(self, size: Size, device: torch.device, *, captions: int, batches: int, even: bool) -> None:
        self.size, self.device, self.captions, self.batches = size, device, captions, batches
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        begin = time.perf_counter()
        self.model = self.build(size, self.dtype)
        self.built = time.perf_counter() - begin
        rng, vocabulary = random.Random(0), size.llm["vocab_size"]
        lengths = [64 if even else 32 + min(96, round(24 * math.exp(rng.gauss(0, 0.5)))) for _ in range(4096)]
        self.prefixes = [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]
        self.encoders: TextEncoders | None = None
        self.speeds: dict[str, tuple[float, float]] = {}
        """Way -> pairs a second, GiB."""

    def build(self, size: Size, dtype: torch.dtype) -> AnyGenModel:
        """Frozen but for signal rows and output projectors, which are float32 unless the LLM is float64."""
        torch.manual_seed(0)
        llm = language_model(size, self.device, dtype)
        with made_on(torch.device("cpu"), torch.float64 if dtype == torch.float64 else torch.float32):
            model = AnyGenModel(configuration(size, reads=False), llm).initialize(seed=0)
        return model.to(self.device).eval()

    def rows(self, only: Sequence[str], budget: float) -> Iterator[Row]:
        """The table, part by part; what would begin after the budget is said and left out."""
        begin = time.perf_counter()
        yield Row("model made", self.built, "s", note="not a part of anything below")
        parts: dict[str, Callable[[], Iterator[Row]]] = {
            "speed": self.speed,
            "large": self.large,
            "gradients": self.gradients,
            "lora": self.lora,
            "trained": self.trained,
        }
        for part in PARTS:
            if part in only:
                if time.perf_counter() - begin > budget:
                    yield Row(part, None, "", note=f"left out: the budget of {budget:g} s is spent")
                else:
                    yield from parts[part]()
                self.forget()

    def speed(self) -> Iterator[Row]:
        """All ways; with fewer captions a step where memory does not suffice for the plain one."""
        while True:
            try:
                self.measure(LADDER["plain, with logits, targets made in the step"], passes=1)
                break
            except torch.OutOfMemoryError:
                self.captions //= 2
                self.forget()
        mean = sum(map(len, self.prefixes[: self.captions * self.batches])) / (self.captions * self.batches)
        told = f"{self.captions} captions of {mean:.0f} tokens on average, {3 * self.captions} pairs a step"
        for name, way in (LADDER | WITHOUT).items():
            pace, memory = self.speeds[name] = self.measure(way)
            yield Row(name, pace, "pairs/s", note=f"{memory:.3g} GiB of activations; {told}")
        self.encoders = None
        plain, fast = self.speeds["plain"], self.speeds[[*LADDER][-1]]
        how = f"runs are read the {fastest_way(self.model.llm, 1)} way"
        yield Row("faster than plain", fast[0] / plain[0], "times", least=3.0, note=how)
        yield Row("activation memory, of plain's", fast[1] / plain[1], "", bar=1 / 3, note=self.what_memory())
        full = self.speeds[[*LADDER][0]]
        yield Row("faster than plain with logits and targets made in the step", fast[0] / full[0], "times")
        steps = list(LADDER)
        for before, after in zip(steps, steps[1:], strict=False):
            a, b = self.speeds[before], self.speeds[after]
            yield Row(f"{before} -> {after}", b[0] / a[0], "times", note=f"memory {b[1] / a[1]:.2f} times")
        for name in WITHOUT:
            a, b = self.speeds[name], fast
            yield Row(f"{name} -> all measures", b[0] / a[0], "times", note=f"memory {b[1] / a[1]:.2f} times")

    def large(self) -> Iterator[Row]:
        """The fast way with the batch that its smaller memory allows."""
        plain = self.speeds.get("plain")
        fits = [(*self.speeds[[*LADDER][-1]], self.captions)] if plain else []
        for factor in (2, 4):
            name = f"the fast way, {factor * self.captions} captions a step"
            try:
                pace, memory = self.measure(FAST, captions=factor * self.captions)
            except torch.OutOfMemoryError:
                yield Row(name, None, "pairs/s", note="memory does not suffice")
                self.forget()
                continue
            if plain and memory <= plain[1]:
                fits.append((pace, memory, factor * self.captions))
            ratio = f", {pace / plain[0]:.2f} times plain's pace" if plain else ""
            yield Row(name, pace, "pairs/s", note=f"{memory:.3g} GiB of activations{ratio}")
        if plain:
            pace, memory, captions = max(fits)
            told = f"{captions} captions a step, {memory / plain[1]:.2f} of plain's activations"
            yield Row("faster than plain, in no more memory", pace / plain[0], "times", least=3.0, note=told)

    def gradients(self) -> Iterator[Row]:
        """The fast way's gradient, in batches of like length, against the plain way's in one padded batch."""
        rows = [*range(8 if self.device.type == "cpu" else 4)]
        own = {name: self.gradient(self.model, way, rows) for name, way in (("plain", PLAIN), ("fast", FAST))}
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        with sdpa_kernel(SDPBackend.MATH):
            for parameter in self.model.llm.parameters():  # the buffers are float32 already
                parameter.data = parameter.data.float()
            wanted = self.gradient(self.model, PLAIN, rows)
            error = difference(self.gradient(self.model, FAST, rows), wanted)
            floor = difference(self.gradient(self.model, replace(PLAIN, buckets=True), rows), wanted)
            told = f"the plain way in two batches differs by {floor:.2g}"
            yield Row("gradient, float32, fast against plain", error, "relative", bar=1e-4, note=told)
            if self.dtype != torch.float32:
                for name, gradient in own.items():
                    yield Row(f"gradient, bf16, {name} against float32", difference(gradient, wanted), "relative")
            for parameter in self.model.llm.parameters():
                parameter.data = parameter.data.to(self.dtype)
            del own, wanted
            self.forget()
            small = replace(self.size, llm=self.size.llm | {"num_hidden_layers": 2})
            model = self.build(small, torch.float64)
            wanted = self.gradient(model, PLAIN, rows)
            error = difference(self.gradient(model, FAST, rows), wanted)
            yield Row("gradient, float64, 2 layers, fast against plain", error, "relative", bar=1e-6)
        torch.set_float32_matmul_precision(precision)

    def lora(self) -> Iterator[Row]:
        """With a LoRA that trains, captions carry gradients: what is left is to read each once, and its like length."""
        from peft import LoraConfig

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        self.model.llm.add_adapter(LoraConfig(r=8, target_modules=names))
        for parameter in self.model.llm.parameters():
            parameter.data = parameter.data.to(self.dtype)
        captions = max(2, self.captions // 2)
        try:
            plain = self.measure(PLAIN, captions=captions)
            fast = self.measure(replace(FAST, constant=False), captions=captions)
        except torch.OutOfMemoryError:
            yield Row("trained LoRA", None, "pairs/s", note="memory does not suffice")
            return
        for name, (pace, memory) in (("plain", plain), ("the fast way", fast)):
            yield Row(
                f"LoRA that trains, {name}", pace, "pairs/s", note=f"{memory:.3g} GiB; {captions} captions a step"
            )
        ratio = f"{fast[1] / plain[1]:.2f} of the activation memory"
        yield Row("trained LoRA, faster than plain", fast[0] / plain[0], "times", note=ratio)

    def trained(self) -> Iterator[Row]:
        """Gradients in float32 of anygen-mini, whose LLM is trained: depth does not amplify its rounding errors."""
        from anygen import AnyGenPipeline

        pipe = AnyGenPipeline.from_pretrained(generators=False, device=self.device, dtype="float32", graphs=False)
        model = pipe.model.requires_grad_(False)
        model.output_projectors.requires_grad_(True)
        model.signal_tokens.requires_grad_(True)
        rows = [*range(8)]
        wanted = self.gradient(model, PLAIN, rows)
        error = difference(self.gradient(model, FAST, rows), wanted)
        floor = difference(self.gradient(model, replace(PLAIN, buckets=True), rows), wanted)
        told = f"{model.settings.name}; the plain way in two batches differs by {floor:.2g}"
        yield Row("gradient, float32, a trained LLM, fast against plain", error, "relative", bar=1e-4, note=told)

    def measure(self, way: Way, *, captions: int | None = None, passes: int = 2) -> tuple[float, float]:
        """Pairs a second of the fastest pass over the pool, after one that warms up, and the GiB of activations."""
        captions = captions or self.captions
        count = captions * self.batches
        lengths = [len(prefix) for prefix in self.prefixes[:count]]
        batches = length_batches(lengths, captions, seed=0, window=self.batches if way.buckets else 1)
        targets = self.targets(count)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=self.device.type == "cuda")
        torch.set_float32_matmul_precision("high")
        memory, spent = 0.0, []
        for number in range(passes + 1):
            if sum(spent[1:]) > 3:
                break
            self.synchronise()
            begin = time.perf_counter()
            for rows in batches:
                aims = {m: {n: v[rows] for n, v in tensors.items()} for m, tensors in targets.items()}
                meter = Meter(self.device, [*self.model.parameters()]) if number == 0 else nullcontext()
                with meter:
                    self.loss(self.model, way, rows, aims).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
                if isinstance(meter, Meter):
                    memory = max(memory, meter.bytes / GIB)
            self.synchronise()
            spent.append(time.perf_counter() - begin)
        for parameter in trained:
            parameter.grad = None
        return len(SIGNALS) * count / min(spent[1:]), memory

    def loss(self, model: AnyGenModel, way: Way, rows: Sequence[int], targets: dict[str, Any]) -> Tensor:
        """Of one step."""
        prefixes = [self.prefixes[row] for row in rows]
        if not way.cached:
            self.encoders = self.encoders or TextEncoders(self.size, self.device, self.dtype)
            targets = self.encoders(len(rows), targets)
        aims = {m: {n: v.to(self.device, non_blocking=True) for n, v in t.items()} for m, t in targets.items()}
        if way.constant or way.shared:
            ids, mask = (part.to(self.device) for part in pad(prefixes, 0, multiple=8))
            groups = [aims] if way.shared else [{name: aim} for name, aim in aims.items()]
            losses = []
            for group in groups:
                loss, _ = prefix_alignment(model, ids, mask, group, constant=way.constant)
                if way.logits:
                    states = model.embed(ids)  # of as many tokens; what the head makes of them is of no concern
                    model.llm.logits(states)
                losses.append(loss)
            return torch.stack(losses).mean()
        sequences = [prefix + list(model.signal_tokens.runs[name]) for name in aims for prefix in prefixes]
        ids, mask = (part.to(self.device) for part in pad(sequences, 0, multiple=8))
        output = model(ids, mask, conditions=aims)
        if way.logits:
            model.llm.logits(output.hidden_states)
        return output.alignment_loss

    def gradient(self, model: AnyGenModel, way: Way, rows: Sequence[int]) -> Tensor:
        """float64[parameters] on the CPU; the fast way's of two batches of like length, the plain way's of one."""
        targets = self.targets(len(rows), {m: output.condition for m, output in model.settings.outputs.items()})
        lengths = [len(self.prefixes[row]) for row in rows]
        batches = length_batches(lengths, len(rows) // 2 if way.buckets else len(rows), seed=0)
        model.zero_grad(set_to_none=True)
        for batch in batches:
            aims = {m: {n: v[batch] for n, v in tensors.items()} for m, tensors in targets.items()}
            (self.loss(model, way, batch, aims) / len(batches)).backward()
        found = [p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return torch.cat(found)

    def targets(self, count: int, conditions: Any = None) -> dict[str, dict[str, Tensor]]:
        """modality -> name -> float16[count, L, C] on the device, few different ones."""
        generator = torch.Generator().manual_seed(0)
        made = {}
        for modality, shapes in (conditions or self.size.conditions).items():
            few = {name: torch.randn(8, *shape, generator=generator).half() for name, shape in shapes.items()}
            made[modality] = {name: value.repeat(-(-count // 8), 1, 1)[:count] for name, value in few.items()}
        return {m: {n: v.to(self.device) for n, v in tensors.items()} for m, tensors in made.items()}

    def what_memory(self) -> str:
        """What is counted."""
        if self.device.type == "cuda":
            return "peak of a step's allocations beyond weights, gradients and optimizer"
        return "bytes that autograd keeps for the backward pass"

    def synchronise(self) -> None:
        """Waits for a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Gives cached memory back."""
        for parameter in self.model.parameters():
            parameter.grad = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Meter:
    """The memory of what runs inside: a GPU's peak beyond what there was, elsewhere what autograd keeps."""

    def __init__(self, device: torch.device, weights: Sequence[Tensor]) -> None:
        self.device, self.bytes = device, 0
        self.known = {weight.untyped_storage().data_ptr() for weight in weights}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts each storage once."""
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> "Meter":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            self.hooks.__exit__(*error)


class TextEncoders:
    """What makes targets in the step: CLIP's text encoders for image and video, T5 for audio (its GPT-2 is left out).

    Args:
        size: whose conditions' widths they have.
        device: where to.
        dtype: of the weights.
    """

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        large = size.name != TINY.name
        self.encoders: dict[str, Any] = {}
        self.device = device
        with made_on(device, dtype):
            for modality, shapes in size.conditions.items():
                length, width = shapes["prompt_embeds"]
                heads = width // 64 if large else 2
                if modality == "audio":
                    config = T5Config(
                        d_model=width, d_kv=64 if large else 8, d_ff=2816 if large else 16, num_heads=heads
                    )
                    config.num_layers = 24 if large else 1
                    config.is_gated_act, config.dense_act_fn = True, "gelu_new"
                    encoder: Any = T5EncoderModel(config)
                else:
                    encoder = CLIPTextModel(
                        CLIPTextConfig(
                            hidden_size=width,
                            intermediate_size=4 * width,
                            num_hidden_layers=23 if large else 1,
                            num_attention_heads=heads,
                            max_position_embeddings=length,
                        )
                    )
                self.encoders[modality] = encoder.eval(), length

    @torch.no_grad()
    def __call__(self, count: int, like: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Conditions of `count` captions; tensors but `prompt_embeds` are those of `like`."""
        made = {}
        for modality, (encoder, length) in self.encoders.items():
            ids = torch.randint(1000, (count, length), device=self.device)
            made[modality] = like[modality] | {"prompt_embeds": encoder(input_ids=ids).last_hidden_state}
        return made


def difference(made: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, in the wanted one's norm."""
    return float((made - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    raise SystemExit(main())
