"""What anygen-mini costs on this machine: starting, words, pictures, memory.

    python benchmarks/first_light.py             # one table
    python benchmarks/first_light.py --quick     # fewer repeats
    python benchmarks/first_light.py --json

Two ways of doing the same take turns, and medians are compared. What is compared also has to come out the same, else
the script stops: our words and those of `transformers.generate`, our picture and that of diffusers.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from measuring import GB, Row, machine, python, run, seconds, show

if TYPE_CHECKING:
    from anygen.pipeline import AnyGenPipeline

DRAW = "Draw a red apple"
TALK = "Explain in a few sentences why the sky is blue."


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    few, many = (1, 3) if options.quick else (3, 7)
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    rows: list[Row] = []
    for part in (starting(many), whole_process(few), loading(few), resident(many)):
        for row in part:
            rows.append(row)
            if sys.stderr.isatty() and not options.json:
                print(f"{row.what}: {row.value:.3g} {row.unit}", file=sys.stderr)
    if options.json:
        print(json.dumps({"machine": machine(), "rows": [asdict(row) | {"met": row.met} for row in rows]}))
    else:
        show(rows)
    return 0


def starting(repeats: int) -> Iterator[Row]:
    """Import and help, each in a fresh process."""
    imports = [float(python("import time; t = time.perf_counter(); import anygen; print(time.perf_counter() - t)"))
               for _ in range(repeats)]  # fmt: skip
    yield Row("import anygen", median(imports), "s")
    helps = [seconds(lambda: run(["--help"]))[0] for _ in range(repeats)]
    yield Row("anygen --help, whole process", median(helps), "s", 0.5)


def whole_process(repeats: int) -> Iterator[Row]:
    """MINI's bars: the first answer with one picture. torch is not imported here yet: a child's peak counts its own."""
    with tempfile.TemporaryDirectory() as folder:
        python("from anygen import hub; hub.resolve('smollm2-135m-instruct')")  # fetched and converted once, not timed
        times, peaks = [], []
        for number in range(repeats):
            out = Path(folder) / str(number)
            command = ["generate", DRAW, "--device", "cpu", "--out", str(out)]
            spent, peak = seconds(lambda command=command: run(command))
            if len(list(out.glob("*.png"))) != 1:
                raise SystemExit(f"anygen {' '.join(command)} did not draw one picture")
            times.append(spent)
            peaks.append(peak)
    yield Row(f'anygen generate "{DRAW}", whole process', median(times), "s", 20.0)
    yield Row("its peak memory (RSS)", max(peaks) / GB, "GB", 4.0)


def loading(repeats: int) -> Iterator[Row]:
    """From nothing to ready, generator included: in a fresh process (files in the page cache), and once more there."""
    code = (
        "import time; start = time.perf_counter()\n"
        "from anygen import AnyGenPipeline\n"
        "def load():\n    AnyGenPipeline.from_pretrained(device='cpu').generator('image')\n"
        "load(); cold = time.perf_counter(); load(); print(cold - start, time.perf_counter() - cold)"
    )
    both = [tuple(map(float, python(code).split())) for _ in range(repeats)]
    yield Row(
        "load, fresh process", median(cold for cold, _ in both), "s", note="imports of torch and diffusers included"
    )
    yield Row("load again in that process", median(warm for _, warm in both), "s")


def resident(repeats: int) -> Iterator[Row]:
    """What a loaded pipeline does."""
    from anygen import AnyGenPipeline

    pipe = AnyGenPipeline.from_pretrained(device="cpu")
    yield from words(pipe, repeats)
    yield from pictures(pipe, repeats)
    yield from runs(pipe)


def words(pipe: "AnyGenPipeline", repeats: int, count: int = 64) -> Iterator[Row]:
    """Tokens a second: our decoder, route and all, and `generate` of the same LLM without adapter."""
    import torch

    from anygen import hub
    from anygen.decoding import DecodingConfig, collect, decode
    from anygen.llm import LLM
    from anygen.messages import parse_one

    alone = LLM.from_pretrained(hub.resolve("smollm2-135m-instruct"), dtype=pipe.model.llm.dtype)
    prompt = pipe.model.prompts.prompt(parse_one(TALK))
    ids = torch.tensor([prompt.base_ids])

    def ours() -> list[int]:
        (answer,) = collect(decode(pipe.model, [prompt], config=DecodingConfig(max_new_tokens=count)), 1)
        return list(answer.ids)

    @torch.inference_mode()
    def theirs() -> list[int]:
        generated: Any = alone.base
        mask = torch.ones_like(ids)
        settings = {"max_new_tokens": count, "do_sample": False}
        return generated.generate(ids, attention_mask=mask, **settings)[0, ids.shape[1] :].tolist()

    spent, (said, theirs_said) = take_turns(ours, theirs, repeats=repeats)
    if said != theirs_said:
        raise SystemExit("our words are not those of transformers.generate")
    yield Row(
        f"words, {len(said)} tokens, anygen", len(said) / spent[0], "tokens/s", note="choice of the route included"
    )
    yield Row("words, transformers.generate alone", len(said) / spent[1], "tokens/s")


def pictures(pipe: "AnyGenPipeline", repeats: int) -> Iterator[Row]:
    """One picture: the pipeline's rendering against the bare diffusers call; then a whole further answer."""
    import numpy as np
    import torch
    from diffusers import StableDiffusionPipeline

    from anygen.generators.stable_diffusion import EMBEDS
    from anygen.progress import quiet_libraries
    from anygen.reply import PlannedPart

    generator: Any = pipe.generator("image")
    plan = pipe.plan(DRAW, seed=7)
    (embeds,) = [part.condition.tensors[EMBEDS] for part in plan.content if isinstance(part, PlannedPart)]
    steps, guidance = generator.defaults.steps, generator.defaults.guidance_scale
    with quiet_libraries(diffusers=True):
        bare: Any = StableDiffusionPipeline(
            vae=generator.vae,
            unet=generator.unet,
            scheduler=generator.scheduler,
            requires_safety_checker=False,
            **dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"]),  # type: ignore[arg-type]
        )
    bare.set_progress_bar_config(disable=True)

    def ours() -> Any:
        return pipe.render(plan, progress=False).images[0].array

    def theirs() -> Any:
        drawn = bare(
            prompt_embeds=embeds,
            negative_prompt_embeds=generator.unconditional[None],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(7),
        )
        return np.asarray(drawn.images[0])

    spent, (picture, their_picture) = take_turns(ours, theirs, repeats=repeats)
    if (difference := np.abs(picture.astype(int) - their_picture).max()) > 1:
        raise SystemExit(f"our picture is not that of diffusers: pixels differ by {difference} of 255")
    yield Row(f"one picture, {steps} steps, pipe.render", spent[0], "s")
    yield Row("one picture, bare diffusers", spent[1], "s", note="same parts, steps, guidance, prompt_embeds")
    yield Row("overhead of the pipeline", 100 * (spent[0] / spent[1] - 1), "%", 10.0)
    whole = [seconds(lambda seed=seed: pipe(DRAW, seed=seed, progress=False))[0] for seed in range(repeats)]
    yield Row("one more answer with a picture", median(whole), "s", 4.0)


def runs(pipe: "AnyGenPipeline") -> Iterator[Row]:
    """Forward passes of the LLM for a run of S signal tokens."""
    from anygen.decoding import DecodingStats, collect, decode
    from anygen.messages import parse_one

    stats = DecodingStats()
    (answer,) = collect(decode(pipe.model, [pipe.model.prompts.prompt(parse_one(DRAW))], stats=stats), 1)
    tokens = len(pipe.model.signal_tokens.runs["image"])
    # the route and every word but the end are fed one by one; what is left are the runs
    passes = (stats.passes - 1 - (stats.text_tokens - (answer.reason == "stop"))) / stats.runs
    yield Row(f"forward passes of a run of {tokens} signal tokens", passes, f"in place of {tokens}", 1.0)


def take_turns(*ways: Callable[[], Any], repeats: int) -> tuple[list[float], list[Any]]:
    """Runs the ways in turn, once unmeasured; the order flips each time -> their median seconds, their results."""
    results = [way() for way in ways]
    spent: list[list[float]] = [[] for _ in ways]
    for number in range(repeats):
        for place in sorted(range(len(ways)), reverse=number % 2 == 1):
            spent[place].append(seconds(ways[place])[0])
    return [median(times) for times in spent], results


if __name__ == "__main__":
    sys.exit(main())
