"""`anygen chat`: a conversation in the terminal, or through a pipe."""

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from anygen.cli_generate import answering, check_out, load
from anygen.errors import AnyGenError, MessageError
from anygen.progress import progress_bars

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from anygen.chat import Chat
    from anygen.media import Media

HELP = """\
/image FILE   shows a picture together with what is said next; also /video FILE and /audio FILE, several of each
/seed N       repeats noise and draws from now on; /seed alone: a new one for each answer
/save [FILE]  writes the conversation as Markdown, with links to its media
/reset        forgets what was said
/quit         ends, as does Ctrl-D; Ctrl-C stops an answer
Media are written as they come; everything else is said to the model."""
MAKING = ("steps", "guidance_scale", "seconds")
"""Options of an answer that are told in its files."""


def chat(options: argparse.Namespace) -> int:
    """Runs the command. Bad input is told and the conversation goes on; through a pipe the exit code tells it, too."""
    check_out(Path(options.out))
    interactive = sys.stdin.isatty()
    session = _Session(options, shown=sys.stderr.isatty())
    if interactive:
        import readline  # noqa: F401  # input() then knows arrow keys and earlier lines

        print(f"{session.chat.pipeline.name} listens; /help lists commands, /quit ends.", file=sys.stderr)
    failed = False
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt) as end:
            if interactive:
                print()  # the terminal's cursor stands behind the prompt
            if isinstance(end, KeyboardInterrupt):
                raise
            break
        try:
            if not session.take(line.strip()):
                break
        except AnyGenError as error:
            failed = True
            print(f"anygen: {' '.join(str(error).split())}", file=sys.stderr)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\nstopped; the conversation is as it was before", file=sys.stderr)
    return 2 if failed and not interactive else 0


class _Session:
    """The conversation and what waits to be said with the next message."""

    def __init__(self, options: argparse.Namespace, *, shown: bool) -> None:
        self.out, self.shown = Path(options.out), shown
        pipe = load(options, shown=shown)
        self.chat: Chat = pipe.chat(system=options.system, **answering(options))
        self.waiting: list[tuple[Media, Path]] = []
        self.paths: dict[int, list[Path]] = {}
        """Place in the history -> the files of that turn's media."""

    def take(self, line: str) -> bool:
        """Does what a line says; False at the end."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "":
                pass
            case "/quit" | "/exit":
                return False
            case "/help":
                print(HELP)
            case "/image" | "/video" | "/audio":
                self._attach(command[1:], rest)
            case "/seed":
                self._seed(rest)
            case "/save":
                print(self._save(rest))
            case "/reset":
                self.chat.reset()
                self.waiting, self.paths = [], {}
            case _ if command[0] == "/" and command[1:] in self.chat.pipeline.model.settings.inputs:
                self._attach(command[1:], rest)  # a plugin's modality
            case _ if command.startswith("/") and "/" not in command[1:]:
                raise MessageError(f"there is no command {command}; /help lists them")
            case _:
                self._say(line)
        return True

    def _attach(self, modality: str, path: str) -> None:
        from anygen.errors import ModalityError
        from anygen.media import media_type

        reads = ["text", *self.chat.pipeline.model.settings.inputs]
        if modality not in reads:
            raise ModalityError(f"the model cannot read {modality}; it reads {', '.join(reads)}")
        if not path:
            example = {"image": "picture.png", "video": "clip.mp4", "audio": "sound.wav"}.get(modality, "FILE")
            raise MessageError(f"/{modality} wants a file: /{modality} {example}")
        file = _file(path)
        self.waiting.append((media_type(modality).from_path(file, limits=self.chat.pipeline.limits), file))
        print(f"[{modality} with the next message: {path}]", file=sys.stderr)

    def _seed(self, text: str) -> None:
        if text and not (text.isascii() and text.isdigit() and int(text) < 2**63):
            raise MessageError(f"/seed wants a whole number from 0 to 2^63 - 1, got '{text}'")
        self.chat.options["seed"] = int(text) if text else None

    def _say(self, line: str) -> None:
        from anygen.planning import asked_for
        from anygen.reply import Reply
        from anygen.streaming import Finished, MediaDone, MediaStarted, MediaStep, TextDelta

        said, files = [*(medium for medium, _ in self.waiting), line], [file for _, file in self.waiting]
        place = len(self.chat.history)
        options = asked_for(**{name: self.chat.options.get(name) for name in MAKING})
        made = Reply(content=(), prompt=line, model=self.chat.pipeline.name, options=options)
        paths: list[Path] = []
        bars: Progress | None = None
        bar: TaskID | None = None
        fresh = True  # whether stdout stands at the start of a line
        try:
            for event in self.chat.stream(said):
                match event:
                    case TextDelta(text=text):
                        text = text.lstrip() if fresh else text
                        print(text, end="", flush=True)
                        fresh = (fresh and not text) or text.endswith("\n")
                    case MediaStarted(modality=modality):
                        if not fresh:
                            print(flush=True)
                        fresh = True
                        bars = progress_bars(shown=self.shown)
                        bars.start()
                        bar = bars.add_task(modality, total=None)
                    case MediaStep(done=done, total=total) if bars is not None and bar is not None:
                        bars.update(bar, completed=done, total=total)
                        if done == total:
                            bars.stop()
                    case MediaDone(index=index, part=part):
                        if bars is not None:
                            bars.stop()
                        made = replace(made, content=(*made.content, part), seed=part.seed - index)
                        paths.append(made.save_medium(index, self.out))
                        print(paths[-1], flush=True)
                    case Finished():
                        if not fresh:
                            print()
                        self.waiting = []
                        self.paths |= {place: files, place + 1: paths}
        finally:
            if bars is not None:
                bars.stop()

    def _save(self, name: str) -> Path:
        from anygen.files import writing
        from anygen.messages import TextPart
        from anygen.reply import make_directory, next_number

        if not self.chat.history:
            raise MessageError("nothing was said yet, so there is nothing to save")
        path = Path(name).expanduser() if name else self.out
        make_directory(path.parent if name else path)
        path = path if name else path / f"{next_number(path):02}-chat.md"
        lines = [f"# A conversation with {self.chat.pipeline.name}"]
        for place, message in enumerate(self.chat.history):
            left = iter(self.paths.get(place, []))
            lines.append(f"**{message.role}:**")
            for part in message.parts:
                if isinstance(part, TextPart):
                    lines.append(part.text.strip())
                elif (file := next(left, None)) is not None:
                    shown = "!" if part.modality == "image" else ""  # Markdown shows pictures alone
                    lines.append(f"{shown}[{part.modality}](<{os.path.relpath(file, path.parent)}>)")
                else:
                    lines.append(f"*[{part.modality}]*")
        with writing(path) as temporary:
            temporary.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
        return path


def _file(text: str) -> Path:
    """The file that a user names; a terminal into which one is dropped quotes what is special in its name."""
    path = Path(text).expanduser()
    if path.exists():
        return path
    try:
        words = shlex.split(text)
    except ValueError:  # a lone quote
        return path
    return Path(words[0]).expanduser() if len(words) == 1 else path
