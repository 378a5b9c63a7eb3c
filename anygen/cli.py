"""The command `anygen`: its options, its exit codes, and how it reports errors. Nothing heavy is imported here.

Exit code 0: done; 2: bad use or bad input, told in one line on stderr; 130: Ctrl-C; 1: a fault of ours, with its
traceback.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from anygen import __version__
from anygen.errors import AnyGenError, LicenceWarning, MediaWarning

_SEEDS = 2**63


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        arguments: as after `anygen` on the command line; by default those of this process.
    """
    try:
        options = _parsed(arguments)
        module, function = options.run.split(":")
        _calm_libraries()
        code = getattr(import_module(module), function)(options)
        sys.stdout.flush()  # a reader that is gone is found out here, not on the interpreter's way out
        return code
    except AnyGenError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        code = _fail("interrupted", code=130)
        if arguments is None:  # a whole process: whoever presses twice shall not see threads being torn down
            os._exit(code)
        return code
    except BrokenPipeError:  # `anygen … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Takes `key=value` behind options as well, where argparse would have them before."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and hasattr(options, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _fail(message: str, *, code: int = 2) -> int:
    print(f"anygen: {' '.join(message.split())}", file=sys.stderr)
    return code


def _calm_libraries() -> None:
    """Keeps the libraries' own notes, warnings and bars off the terminal, and their threads from spinning."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when a process forks, as `data build` does
    if not sys.stderr.isatty():  # bars fill a log file with lines
        os.environ.setdefault("TQDM_DISABLE", "1")
    # OpenMP's threads wait by spinning, which on two cores that have anything else to do takes 3 to 30 times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.warnoptions:
        return
    warnings.simplefilter("ignore")
    for category in (MediaWarning, LicenceWarning):
        warnings.simplefilter("always", category)
    warnings.showwarning = lambda message, *_, **__: print(f"anygen: warning: {message}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """One line for bad use, in place of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="anygen",
        description="Any mix of text, images, video and audio in; an interleaved answer of all of them out.",
        epilog='Try: anygen generate "Draw a red apple"',
    )
    parser.add_argument("--version", action="version", version=f"anygen {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_chat(commands)
    _add_info(commands)
    _add_train(commands)
    _add_eval(commands)
    _add_data(commands)
    _add_convert(commands)
    return parser


def _add_generate(commands: Any) -> None:
    command = _command(commands, "generate", "one answer to one prompt", "anygen.cli_generate:generate")
    command.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to say; read from stdin if it is piped")
    for modality in ("image", "video", "audio"):
        command.add_argument(
            f"--{modality}",
            dest="media",
            metavar="FILE",
            action="append",
            type=lambda path, modality=modality: (modality, path),
            help=f"{'an' if modality[0] in 'aeiou' else 'a'} {modality} file to go with the prompt; may be repeated",
        )
    command.add_argument(
        "--media",
        metavar="MODALITY=FILE",
        action="append",
        type=_medium,
        help="a file of any modality that the model reads, such as a plugin's; may be repeated",
    )
    _add_answering(command)
    command.add_argument("--overwrite", action="store_true", help="number files from 01 and replace those that exist")
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _add_chat(commands: Any) -> None:
    command = _command(commands, "chat", "a conversation; /help lists what it understands", "anygen.cli_chat:chat")
    command.add_argument("--system", metavar="TEXT", help="instructions that come first")
    _add_answering(command)


def _add_answering(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("--out", metavar="DIR", default="anygen-out", help="where media go (default: %(default)s)")
    command.add_argument("--seed", metavar="N", type=_seed, help="repeats an answer; by default a new one each time")
    command.add_argument("--steps", metavar="N", type=_count, help="steps of the generator: fewer is faster")
    command.add_argument("--guidance", metavar="X", type=_number, help="how much media follow the words")
    command.add_argument("--seconds", metavar="X", type=_number, help="length of clips and sounds")
    command.add_argument("--max-new-tokens", metavar="N", type=_count, default=256, help="longest answer")
    command.add_argument("--temperature", metavar="X", type=_number, default=0.0, help="0 always says the likeliest")
    command.add_argument(
        "--max-seconds", metavar="X", type=_number, help="longest clip or sound to read (default: 600)"
    )
    command.add_argument(
        "--offload",
        choices=("auto", "resident", "after_use", "model_offload", "sequential"),
        help="which generators stay in memory: those that there is room for (default), all, or none; on a GPU also one "
        "model, or one layer, at a time",
    )
    command.add_argument("--quantization", choices=("8bit", "4bit"), help="the LLM in fewer bits")
    command.add_argument("--compile", action="store_true", help="slower to start the first time, faster from then on")


def _add_info(commands: Any) -> None:
    command = _command(
        commands,
        "info",
        "parts, sizes, licences and modalities of a model, or what anygen wrote into a file",
        "anygen.cli_info:info",
    )
    command.add_argument(
        "what", metavar="MODEL|PRESET|FILE", nargs="?", help="a model's name or directory, a preset, or a saved file"
    )
    command.add_argument("--plugins", action="store_true", help="list the installed plugins and all modalities")
    command.add_argument("--presets", action="store_true", help="list the presets, recipes for full-size models")
    command.add_argument("--memory", action="store_true", help="the memory that it needs, at each precision")
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _add_train(commands: Any) -> None:
    command = _command(commands, "train", "trains what a recipe says", "anygen.cli_train:train")
    command.add_argument("recipe", metavar="RECIPE.yaml")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="values in place of the recipe's")
    command.add_argument("--dry-run", action="store_true", help="check all of it and tell parameters, memory and time")


def _add_eval(commands: Any) -> None:
    command = _command(commands, "eval", "measures a model and prints one table", "anygen.cli_train:evaluate")
    command.add_argument("suite", metavar="SUITE", help="mini")
    _add_model(command)
    command.add_argument(
        "--dtype",
        metavar="NAME",
        default="float32",
        help="default: %(default)s; in bfloat16 words change with every rounding",
    )
    command.add_argument("--data", metavar="DIR", default="data/icons", help="the icon set (default: %(default)s)")
    command.add_argument(
        "--only",
        metavar="ROWS",
        action="append",
        help="some rows: image, modality, naming, talk, controls, audio, video, retrieval or matrix; may be repeated",
    )
    command.add_argument("--limit", metavar="N", type=_count, help="at most N cases a row, for a quick look")
    command.add_argument("--batch-size", metavar="N", type=_count, default=16, help="cases at once (default: 16)")
    command.add_argument("--seed", metavar="N", type=_seed, default=0, help="of the cases (default: 0)")
    command.add_argument("--report", metavar="DIR", help="also write the table and pictures to look at")
    command.add_argument(
        "--compare", metavar="FILE", help="what --json printed of another model: tells what fell and what rose since"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _add_data(commands: Any) -> None:
    command = commands.add_parser("data", help="builds a dataset", description="Builds a dataset from its packages.")
    actions = command.add_subparsers(metavar="ACTION", required=True)
    build = _command(actions, "build", "builds a dataset from its packages", "anygen.cli_train:build_data")
    build.add_argument("name", metavar="NAME", help="icons, animations or sounds")
    build.add_argument("--out", metavar="DIR", required=True, help="where it goes")


def _add_convert(commands: Any) -> None:
    what = "imports a published checkpoint"
    command = commands.add_parser("convert", help=what, description=f"{what[0].upper()}{what[1:]}.")
    kinds = command.add_subparsers(metavar="KIND", required=True)
    nextgpt = _command(kinds, "nextgpt", "NExT-GPT v1 or v2 -> a model", "anygen.cli_convert:nextgpt")
    nextgpt.add_argument("checkpoint", metavar="CKPT", help="pytorch_model.pt, or the directory of a checkpoint")
    nextgpt.add_argument("--llm", metavar="NAME_OR_DIR", help="the LLM that was tuned (default for v2: Vicuna 7B v1.5)")
    nextgpt.add_argument(
        "--encoder", metavar="NAME_OR_DIR", default="imagebind-huge", help="the ImageBind (default: %(default)s)"
    )
    nextgpt.add_argument("--lora-alpha", metavar="N", type=_count, default=32, help="of v1's LoRA (default: 32)")
    imagebind = _command(kinds, "imagebind", "ImageBind's release -> an encoder", "anygen.cli_convert:imagebind")
    imagebind.add_argument("checkpoint", metavar="CKPT", help="imagebind_huge.pth, or the directory that holds it")
    imagebind.add_argument("--vocabulary", metavar="FILE", help="bpe_simple_vocab_16e6.txt.gz, for texts")
    for kind in (nextgpt, imagebind):
        kind.add_argument("--out", metavar="DIR", required=True, help="where it goes")
        kind.add_argument("--overwrite", action="store_true", help="replaces what was converted there before")


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="NAME_OR_DIR", help="by default the embedded anygen-mini")
    command.add_argument("--device", metavar="NAME", help="cuda, mps or cpu; by default the first that is there")


def _command(commands: Any, name: str, what: str, run: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    command.set_defaults(run=run)
    return command


def _medium(text: str) -> tuple[str, str]:
    modality, equals, path = text.partition("=")
    if modality and equals and path:
        return modality, path
    raise argparse.ArgumentTypeError(f"'{text}' is not of the form MODALITY=FILE, such as pointcloud=chair.ply")


def _seed(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) < _SEEDS:
        return int(text)
    raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to 2^63 - 1")


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
