"""What a stage needs of encoders and generators, computed once into caches, so that neither is in memory in training.

Encoders and generators are loaded one at a time, for what the cache lacks; a cache that is full loads nothing.

Shapes: M media, T feature tokens, C feature width.
"""

import gc
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anygen.errors import AnyGenError, ConfigError, OutputError
from anygen.loading import find_generator, load_generator
from anygen.model_config import AnyGenConfig, SourceConfig
from anygen.model_parts import load_encoder, resolve_by_hub
from anygen.training.caches import Compute, TensorCache, fingerprint
from anygen.training.chat_rows import Shown
from anygen.training.data_rows import RowFault

logger = logging.getLogger("anygen.training")


def found(directory: Path, source: SourceConfig) -> Path:
    """Where a part of the model in `directory` lies.

    Raises:
        HubError: it is the hub's and cannot be found there.
    """
    if source.path is not None:
        return directory / source.path
    return resolve_by_hub(f"{source.repo}@{source.revision}" if source.revision else str(source.repo))


def feature_cache(
    directory: Path,
    config: AnyGenConfig,
    modality: str,
    media: Iterable[Shown],
    folder: Path,
    *,
    device: torch.device,
    image_size: int | None = None,
    batch_size: int = 32,
    verify: bool = True,
) -> tuple[TensorCache, dict[str, str]]:
    """The features of media of one input modality.

    Args:
        directory: the model's.
        config: the model's.
        modality: which.
        media: all that will be asked for.
        folder: of all caches.
        device: where the encoder works.
        image_size: side in pixels that the encoder reads pictures in; None takes its own.
        batch_size: media encoded together.
        verify: whether to check the files of a cache that is there.

    Returns:
        The cache, `values` float[M, T, C] and `mask` bool[M, T]; and for media that cannot be read, key -> why.

    Raises:
        ConfigError: the encoder cannot read that size, or media have different numbers of tokens.
        OutputError: the folder cannot be written.
    """
    part = config.inputs[modality].encoder
    where = found(directory, part.source)
    identity = {"encoder": part.name, "options": part.options, "weights": fingerprint(where), "size": image_size}
    by_key = {medium.key: medium for medium in media}
    unread: dict[str, str] = {}
    with _alone(folder):
        cache = TensorCache(folder / f"features-{modality}-{_short(identity)}", identity, verify=verify)
        if all(key in cache for key in by_key):
            return cache, unread
        encoder: Any = load_encoder(part, lambda source: found(directory, source)).to(device).eval()
        if image_size is not None:
            set_image_size(encoder, modality, image_size)
        compute = _encoding(encoder, by_key, unread, device)
        cache.fill(by_key, compute, batch_size=batch_size, what=f"features of {modality}")
    _forget()
    return cache, unread


def _encoding(encoder: Any, by_key: Mapping[str, Shown], unread: dict[str, str], device: torch.device) -> Compute:
    """What encodes media by their keys; those that cannot be read are told in `unread` and left out."""

    @torch.no_grad()
    def compute(keys: Sequence[str]) -> tuple[Sequence[str], Mapping[str, Tensor]]:
        kept, values = [], []
        for key in keys:
            try:
                values.append(by_key[key].load(encoder.modality))
                kept.append(key)
            except (AnyGenError, RowFault) as error:
                unread[key] = str(error)
        if not kept:
            return kept, {}
        tensors = {name: value.to(device) for name, value in encoder.preprocess(values).items()}
        features = encoder(**tensors)
        return kept, {"values": features.values, "mask": features.mask}

    return compute


def condition_cache(
    directory: Path,
    config: AnyGenConfig,
    modality: str,
    captions: Iterable[str],
    folder: Path,
    *,
    device: torch.device,
    batch_size: int = 64,
    verify: bool = True,
) -> TensorCache:
    """The generator's own conditions of captions, by the condition's names.

    Arguments as of `feature_cache`.

    Raises:
        CheckpointError, HubError: the generator is not there.
        OutputError: the folder cannot be written.
    """
    making = config.outputs[modality]
    where = find_generator(directory, making.generator.source)
    assert where is not None
    identity = {"generator": making.generator.name, "weights": fingerprint(where)}
    wanted = list(dict.fromkeys(captions))
    with _alone(folder):
        cache = TensorCache(folder / f"conditions-{modality}-{_short(identity)}", identity, verify=verify)
        if all(caption in cache for caption in wanted):
            return cache
        generator = load_generator(directory, making, device, torch.float32)

        def compute(keys: Sequence[str]) -> tuple[Sequence[str], Mapping[str, Tensor]]:
            return keys, generator.encode_text(keys).tensors

        cache.fill(wanted, compute, batch_size=batch_size, what=f"conditions of {modality}")
    _forget()
    return cache


def set_image_size(encoder: Any, modality: str, size: int) -> None:
    """Lets an encoder read pictures of another size, where it can: staged resolution, Idefics2 (arXiv:2405.02246).

    Raises:
        ConfigError: it cannot.
    """
    change = getattr(encoder, "set_image_size", None)
    if change is None:
        raise ConfigError(f"image_size: the encoder of {modality} ({type(encoder).__name__}) reads one size alone")
    change(size)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process fills a cache; the others of a run wait for it, and find it full."""
    from filelock import FileLock

    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
        raise OutputError(f"cache: the folder {folder} cannot be written: {why}") from error
    try:
        yield
    finally:
        lock.release()


def _short(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
