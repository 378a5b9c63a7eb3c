"""`anygen generate`: one prompt, one answer; its media go into a directory."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anygen.errors import MessageError, ModalityError, OutputError
from anygen.progress import progress_bars

if TYPE_CHECKING:
    from anygen.media import MediaLimits
    from anygen.messages import Message
    from anygen.pipeline import AnyGenPipeline
    from anygen.reply import Reply

_FASTEST = 60
"""Frames a second of a clip that `--max-seconds` lets pass."""


def generate(options: argparse.Namespace) -> int:
    """Runs the command."""
    out = Path(options.out)
    check_out(out)
    with redirect_stdout(sys.stderr):  # whatever a library prints is not part of the answer
        shown = sys.stderr.isatty() and not options.json
        message = _message(options)
        pipe = load(options, shown=shown)
        reply = _answer(pipe, message, options, shown=shown)
        paths = reply.save(out, overwrite=options.overwrite)
    if options.json:
        print(json.dumps(as_json(reply, paths)))
    else:
        show(reply, paths)
        if shown:
            print(f"seed {reply.seed}, {sum(reply.timings.values()):.1f} s", file=sys.stderr)
    return 0


def load(options: argparse.Namespace, *, shown: bool) -> "AnyGenPipeline":
    """The pipeline that the options ask for, under a spinner."""
    with spinner(f"Loading {options.model or 'anygen-mini'}", shown=shown):
        from anygen.pipeline import AnyGenPipeline

        pipe = AnyGenPipeline.from_pretrained(
            options.model,
            device=options.device,
            offload=options.offload,
            quantization=options.quantization,
            compile=options.compile,
        )
    pipe.limits = limits(options)
    return pipe


def limits(options: argparse.Namespace) -> "MediaLimits":
    """Which media to refuse: with `--max-seconds` clips and sounds of that length are read, memory allowing.

    Raises:
        ConfigError: the length is not positive.
    """
    from anygen.errors import ConfigError
    from anygen.media import MediaLimits

    seconds = options.max_seconds
    if seconds is None:
        return MediaLimits()
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--max-seconds is a positive number, got {seconds:g}")
    frames = max(MediaLimits().max_frames, math.ceil(_FASTEST * seconds))
    return MediaLimits(max_seconds=seconds, max_frames=frames)


def answering(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `_add_answering` as the pipeline's."""
    return {
        "seed": options.seed,
        "steps": options.steps,
        "guidance_scale": options.guidance,
        "seconds": options.seconds,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
    }


def check_out(out: Path) -> None:
    """Refuses what cannot be written to before any work is done.

    Raises:
        OutputError: a file is in the way.
    """
    inside = next(path for path in (out, *out.parents) if path.exists())
    if not inside.is_dir():
        raise OutputError(f"--out {out} cannot be a directory: {inside} is a file")


def check_readable(modalities: "set[str]", model: str | None) -> None:
    """Refuses media that the model cannot read before they are decoded and before anything heavy is loaded.

    Raises:
        HubError: there is no such model.
        ModalityError: says what the model reads.
    """
    from anygen import hub
    from anygen.model_config import AnyGenConfig

    config = hub.resolve(model) / "anygen.json"
    if not config.is_file():
        return  # loading says so
    reads = ["text", *AnyGenConfig.load(config).inputs]
    for modality in sorted(modalities.difference(reads)):
        raise ModalityError(f"the model cannot read {modality}; it reads {', '.join(reads)}")


def as_json(reply: "Reply", paths: list[Path]) -> dict[str, Any]:
    """What `--json` prints."""
    from anygen.reply import MadePart

    left, content = iter(paths), []
    for part in reply.content:
        if isinstance(part, MadePart):
            content.append({"type": part.modality, "path": str(next(left)), "seed": part.seed, "caption": part.caption})
        else:
            content.append(part.to_dict())  # type: ignore[union-attr]
    timings = {stage: round(seconds, 3) for stage, seconds in reply.timings.items()}
    return {"text": reply.text, "content": content, "seed": reply.seed, "timings": timings}


def show(reply: "Reply", paths: list[Path]) -> None:
    """Prints text and paths in their order."""
    from anygen.reply import TextPart

    left = iter(paths)
    for part in reply.content:
        line = part.text.strip() if isinstance(part, TextPart) else str(next(left))
        if line:
            print(line)


@contextmanager
def spinner(what: str, *, shown: bool) -> Iterator[None]:
    """Says on stderr what is being done."""
    with progress_bars(shown=shown) as bars:
        bars.add_task(what, total=None)
        yield


def _message(options: argparse.Namespace) -> "list[Message]":
    """The prompt and its media, read and decoded: what cannot be read is told at once."""
    prompt = options.prompt
    if prompt is None and sys.stdin is not None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    media: list[tuple[str, str]] = options.media or []
    if not prompt and not media:
        raise MessageError('the prompt is empty; say something: anygen generate "Draw a red apple"')
    from anygen.messages import parse_one

    if media:
        check_readable({modality for modality, _ in media}, options.model)
    parts = [{"type": modality, "path": path} for modality, path in media]
    return parse_one([*([prompt] if prompt else []), *parts], limits=limits(options))


def _answer(pipe: "AnyGenPipeline", message: "list[Message]", options: argparse.Namespace, *, shown: bool) -> "Reply":
    from anygen.streaming import Finished, MediaStarted, MediaStep

    reply = None
    with progress_bars(shown=shown) as bars:
        bar = bars.add_task("Thinking", total=None)
        for event in pipe.stream(message, **answering(options)):
            match event:
                case MediaStarted(modality=modality, index=index):
                    bars.update(bar, description=f"{modality} {index + 1}", completed=0, total=None)
                case MediaStep(done=done, total=total):
                    bars.update(bar, completed=done, total=total)
                case Finished(reply=reply):
                    pass
    assert reply is not None
    return reply
