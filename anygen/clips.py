"""Clips and sounds.

PyAV and soundfile, which read and write their files, are imported at use.

Shapes: F frames, H height, W width, C channels, N samples.
"""

import base64
import io
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from anygen.errors import MediaError, MediaWarning
from anygen.image import DECODING_ERRORS, to_rgb
from anygen.media_base import Media, Metadata, optional_module, register_media, to_array
from anygen.metadata import exif_of, pack
from anygen.sources import MediaLimits, sniff


@register_media
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Video(Media):
    """A clip without sound.

    What is read with a varying frame rate is brought to a constant one, its length kept: frames are repeated or left
    out. A file that ends early gives the frames it holds, with a warning.

    >>> clip = Video(np.zeros((12, 32, 32, 3), np.uint8), fps=8)
    >>> clip
    Video(12 frames, 32×32, 8 fps)
    >>> Video.from_path(clip.save("black.gif")).seconds
    1.5
    """

    modality = "video"
    suffixes = (".mp4", ".gif", ".webp")

    frames: NDArray[np.uint8]
    """uint8[F, H, W, 3], not writable."""
    fps: float
    """Frames a second."""

    def __post_init__(self) -> None:
        frames = np.ascontiguousarray(to_array(self.frames))
        if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape or frames.dtype != np.uint8:
            raise MediaError(f"a video is uint8 [frames, height, width, 3], not {frames.dtype} {list(frames.shape)}")
        if not (np.isfinite(self.fps) and self.fps > 0):
            raise MediaError(f"a video's fps must be positive, got {self.fps}")
        object.__setattr__(self, "frames", _frozen(frames))
        object.__setattr__(self, "fps", float(self.fps))

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.frames) / self.fps

    @classmethod
    def _decode(cls, data: bytes, name: str, limits: MediaLimits) -> Self:
        if sniff(data) in ("a GIF picture", "a WebP picture", "a PNG picture"):
            return cls._decode_animation(data, name, limits)
        av = optional_module("av", "reading a video file")
        try:
            with av.open(io.BytesIO(data)) as container:
                if not container.streams.video:
                    hint = "; it holds sound: pass it as audio" if container.streams.audio else ""
                    raise MediaError(f"{name} holds no video track ({sniff(data)}){hint}")
                stream = container.streams.video[0]
                fps = float(stream.average_rate or stream.guessed_rate or 0)
                seconds = float(container.duration or 0) / av.time_base
                count = stream.frames or round(seconds * fps)
                decoded = count * stream.width * stream.height * 3
                limits.check_pixels(stream.width, stream.height, name)
                limits.check_length(seconds=seconds, frames=count, decoded_bytes=decoded, name=name)
                frames: list[NDArray[np.uint8]] = []
                times: list[float] = []
                decoding = container.decode(stream)
                while (frame := _next_intact(decoding, frames, av.FFmpegError)) is not None:
                    frames.append(frame.to_ndarray(format="rgb24"))
                    times.append(frame.time if frame.time is not None else len(times) / (fps or 25.0))
                    # A header may understate what follows.
                    limits.check_length(
                        seconds=0, frames=len(frames), decoded_bytes=len(frames) * frames[0].nbytes, name=name
                    )
        except av.error.EOFError:
            raise MediaError(f"{name} holds no frame, or is cut short before its first one") from None
        except av.FFmpegError as error:
            raise MediaError(
                f"{name} is not a video that can be read ({error.strerror}): its content is {sniff(data)}; "
                "wanted: MP4, WebM, MOV, GIF or WebP"
            ) from None
        if not frames:
            raise MediaError(f"{name} holds no frame")
        if len(frames) < count:
            warnings.warn(
                f"{name} is cut short: its header promises {count} frames, {len(frames)} could be read",
                MediaWarning,
                stacklevel=2,
            )
        rate = fps or 25.0
        order = _evenly([*times, times[-1] + 1 / rate], rate)
        limits.check_length(seconds=0, frames=len(order), decoded_bytes=len(order) * frames[0].nbytes, name=name)
        return cls(np.stack([frames[index] for index in order]), rate)

    @classmethod
    def _decode_animation(cls, data: bytes, name: str, limits: MediaLimits) -> Self:
        try:
            opened = PIL.Image.open(io.BytesIO(data), formats=("GIF", "WEBP", "PNG"))
            count = getattr(opened, "n_frames", 1)
            limits.check_pixels(*opened.size, name)
            decoded = count * opened.width * opened.height * 3
            limits.check_length(seconds=0, frames=count, decoded_bytes=decoded, name=name)
            frames, ends = [], [0.0]  # milliseconds
            for index in range(count):
                opened.seek(index)
                opened.load()
                frames.append(np.asarray(to_rgb(opened)))
                ends.append(ends[-1] + float(opened.info.get("duration", 0)))
        except MediaError:
            raise
        except (PIL.Image.DecompressionBombError, *DECODING_ERRORS) as error:
            raise MediaError(f"{name} is damaged or cut short ({error})") from None
        if not ends[-1]:
            ends = [100.0 * index for index in range(count + 1)]
        rate = 1000 * count / ends[-1]
        if (spans := np.diff(ends)).max() > 1.5 * (shortest := spans[spans > 0].min()):
            # Writers join frames that are alike: the shortest tells the pace.
            rate = 1000 * round(ends[-1] / shortest) / ends[-1]
        order = _evenly([end / 1000 for end in ends], rate)
        limits.check_length(seconds=0, frames=len(order), decoded_bytes=len(order) * frames[0].nbytes, name=name)
        return cls(np.stack([frames[index] for index in order]), rate)

    @classmethod
    def _convert(cls, value: object) -> Self:
        raise MediaError(
            f"{type(value).__name__} is not supported as a video; wanted: a path, bytes, a data URI, or "
            "Video(frames, fps) with frames uint8 [frames, height, width, 3]"
        )

    def _write(self, path: Path, suffix: str, metadata: Metadata) -> None:
        if suffix == ".mp4":
            self._write_mp4(path, metadata)
            return
        pictures = [PIL.Image.fromarray(frame) for frame in self.frames]
        options: dict[str, Any] = {"save_all": True, "append_images": pictures[1:], "loop": 0}
        if metadata and suffix == ".webp":
            options["exif"] = exif_of(metadata)
        elif metadata:
            options["comment"] = pack(metadata)
        # Each end is rounded to what the format counts in, so that the whole keeps its length: 8 fps is 12.5 ticks.
        tick = 10 if suffix == ".gif" else 1
        ends = [tick * round(1000 * index / self.fps / tick) for index in range(len(pictures) + 1)]
        lengths = [end - begin for begin, end in zip(ends[:-1], ends[1:], strict=True)]
        pictures[0].save(path, format=suffix[1:].upper(), duration=lengths, **options)

    def _write_mp4(self, path: Path, metadata: Metadata) -> None:
        av = optional_module("av", "writing an MP4 file")
        _, height, width, _ = self.frames.shape
        with av.open(str(path), "w", format="mp4") as container:
            if metadata:
                container.metadata["comment"] = pack(metadata)
            stream = container.add_stream("libx264", rate=Fraction(self.fps).limit_denominator(1001))
            # H.264 in its common 4:2:0 form has even sides only: the last row and column are doubled.
            stream.width, stream.height = width + width % 2, height + height % 2
            stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
            for frame in np.pad(self.frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge"):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())

    def _repr_html_(self) -> str:
        suffix = ".mp4" if find_spec("av") else ".webp"
        uri = _data_uri(self, suffix)
        if suffix == ".mp4":
            return f'<video controls loop autoplay muted src="{uri}"></video>'
        return f'<img src="{uri}">'

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Video):
            return NotImplemented
        return self.fps == other.fps and np.array_equal(self.frames, other.frames)

    def __hash__(self) -> int:
        return hash((self.fps, self.frames.shape, self.frames.tobytes()))

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        return f"Video({count} frames, {width}×{height}, {self.fps:g} fps)"


@register_media
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Audio(Media):
    """A sound.

    What is read keeps its rate (8 or 96 kHz alike), its channels (one, stereo, 7.1) and its silence; 24 bits are read
    exactly. Encoders resample it and take the mean of the channels. An MP4 or WebM file gives its first sound track.

    >>> tone = Audio(0.5 * np.sin(np.linspace(0, 440 * 2 * np.pi, 16000)), 16000)
    >>> tone
    Audio(1.00 s, 1 × 16,000 Hz)
    >>> tone.samples.shape, tone.samples.dtype
    ((1, 16000), dtype('float32'))
    """

    modality = "audio"
    suffixes = (".wav", ".flac", ".ogg")

    samples: NDArray[np.float32]
    """float32[C, N] in [-1, 1], not writable; one channel may be given as [N]."""
    sampling_rate: int
    """Samples a second."""

    def __post_init__(self) -> None:
        samples = np.ascontiguousarray(to_array(self.samples))
        if samples.ndim == 1:
            samples = samples[None]
        if samples.ndim != 2 or 0 in samples.shape or not np.issubdtype(samples.dtype, np.floating):
            raise MediaError(f"a sound is float [channels, samples], not {samples.dtype} {list(samples.shape)}")
        if not np.isfinite(samples).all():
            raise MediaError("a sound's samples must be finite, these hold NaN or infinity")
        if self.sampling_rate <= 0:
            raise MediaError(f"a sound's sampling rate must be positive, got {self.sampling_rate}")
        object.__setattr__(self, "samples", _frozen(samples.astype(np.float32)))
        object.__setattr__(self, "sampling_rate", int(self.sampling_rate))

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.samples.shape[1] / self.sampling_rate

    @property
    def mono(self) -> NDArray[np.float32]:
        """float32[N], the mean of the channels."""
        return self.samples.mean(axis=0)

    @classmethod
    def _decode(cls, data: bytes, name: str, limits: MediaLimits) -> Self:
        if sniff(data) in _CONTAINERS:
            return cls._decode_track(data, name, limits)
        soundfile = optional_module("soundfile", "reading a sound file")
        try:
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                limits.check_length(
                    seconds=file.frames / file.samplerate, decoded_bytes=4 * file.frames * file.channels, name=name
                )
                samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate
        except soundfile.LibsndfileError as error:
            raise MediaError(
                f"{name} is not a sound that can be read ({error.error_string}): its content is {sniff(data)}; "
                "wanted: WAV, FLAC, Ogg, MP3, or an MP4 or WebM file with sound"
            ) from None
        return cls._of_file(samples.T, rate, name)

    @classmethod
    def _decode_track(cls, data: bytes, name: str, limits: MediaLimits) -> Self:
        av = optional_module("av", "reading the sound of an MP4 or WebM file")
        blocks: list[NDArray[np.float32]] = []
        try:
            with av.open(io.BytesIO(data)) as container:
                if not container.streams.audio:
                    hint = "; it holds pictures: pass it as a video" if container.streams.video else ""
                    raise MediaError(f"{name} holds no sound track ({sniff(data)}){hint}")
                stream = container.streams.audio[0]
                sample = 4 * stream.channels  # bytes
                seconds = float(container.duration or 0) / av.time_base
                limits.check_length(seconds=seconds, decoded_bytes=round(seconds * stream.rate) * sample, name=name)
                planar = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
                decoding, count = container.decode(stream), 0
                while (frame := _next_intact(decoding, blocks, av.FFmpegError)) is not None:
                    blocks += [block.to_ndarray() for block in planar.resample(frame)]
                    count += frame.samples  # a header may understate what follows
                    limits.check_length(seconds=count / stream.rate, decoded_bytes=count * sample, name=name)
        except av.FFmpegError as error:
            raise MediaError(f"the sound of {name} cannot be read ({error.strerror}): it is {sniff(data)}") from None
        return cls._of_file(np.concatenate(blocks, axis=1) if blocks else np.zeros((1, 0)), stream.rate, name)

    @classmethod
    def _of_file(cls, samples: NDArray[Any], rate: int, name: str) -> Self:
        if not samples.size:
            raise MediaError(f"{name} holds no sample")
        if not np.isfinite(samples).all():
            raise MediaError(f"{name} holds samples that are NaN or infinite; it was not written as it should be")
        return cls(samples, rate)

    @classmethod
    def _convert(cls, value: object) -> Self:
        raise MediaError(
            f"{type(value).__name__} is not supported as a sound; wanted: a path, bytes, a data URI, or "
            "Audio(samples, sampling_rate) with samples float [channels, samples]"
        )

    def _write(self, path: Path, suffix: str, metadata: Metadata) -> None:
        soundfile = optional_module("soundfile", f"writing a {suffix[1:].upper()} file")
        channels = len(self.samples)
        with soundfile.SoundFile(path, "w", self.sampling_rate, channels, format=suffix[1:].upper()) as file:
            if metadata:
                file.comment = pack(metadata)
            file.write(self.samples.T.clip(-1, 1))

    def _repr_html_(self) -> str:
        return f'<audio controls src="{_data_uri(self, ".wav")}"></audio>'

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Audio):
            return NotImplemented
        return self.sampling_rate == other.sampling_rate and np.array_equal(self.samples, other.samples)

    def __hash__(self) -> int:
        return hash((self.sampling_rate, self.samples.shape, self.samples.tobytes()))

    def __repr__(self) -> str:
        return f"Audio({self.seconds:.2f} s, {len(self.samples)} × {self.sampling_rate:,} Hz)"


_CONTAINERS = ("an MP4 or HEIF file", "a Matroska or WebM video")
"""What `sniff` calls files whose sound PyAV reads."""


def _next_intact(decoding: Iterator[Any], before: list[Any], damage: type[Exception]) -> Any:
    """The next frame; None at the end, or at damage that follows frames that could be read."""
    try:
        return next(decoding, None)
    except damage:
        if not before:
            raise
        return None


def _evenly(times: list[float], rate: float) -> list[int]:
    """Which frame is shown at each tick of a constant rate: times of F frames and of the end, in seconds -> indices.

    Frames that come evenly already are kept as they are, each once.
    """
    count = len(times) - 1
    ideal = times[0] + np.arange(count) / rate
    if count < 2 or np.abs(np.array(times[:-1]) - ideal).max() < 0.75 / rate:
        return list(range(count))
    ticks = times[0] + (np.arange(max(1, round((times[-1] - times[0]) * rate))) + 0.5) / rate
    return np.clip(np.searchsorted(times[:-1], ticks, side="right") - 1, 0, count - 1).tolist()


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def _data_uri(media: Media, suffix: str) -> str:
    kind = {".mp4": "video/mp4", ".webp": "image/webp", ".wav": "audio/wav"}[suffix]
    with tempfile.TemporaryDirectory() as folder:
        data = media.save(Path(folder) / f"media{suffix}").read_bytes()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
