"""Clips and sounds as users' files have them: odd, damaged, too long; and clips as files that keep their frame rate."""

import io
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anygen.errors import MediaError, MediaWarning
from anygen.media import Audio, MediaLimits, Video

av: Any = pytest.importorskip("av", reason="MP4 needs PyAV")


def ramp(count: int, side: int = 32) -> np.ndarray:
    """Frames whose brightness tells their number: 10, 20, …"""
    shades = (10 * np.arange(1, count + 1)).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (count, side, side, 3))


def numbers(video: Video) -> list[int]:
    """Which frames of `ramp` these are."""
    return np.rint(video.frames.mean((1, 2, 3)) / 10).astype(int).tolist()


def mp4(frames: np.ndarray, pts: Sequence[int], *, rate: int = 10, options: dict[str, str] | None = None) -> bytes:
    """An MP4 whose frames are shown at `pts` / `rate` seconds."""
    with tempfile.TemporaryDirectory() as folder:  # faststart rewrites a file that has a name
        path = Path(folder) / "clip.mp4"
        _write(path, frames, pts, rate, options or {})
        return path.read_bytes()


def _write(path: Path, frames: np.ndarray, pts: Sequence[int], rate: int, options: dict[str, str]) -> None:
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "12", "preset": "ultrafast", "bf": "0"}
        stream.codec_context.time_base = Fraction(1, rate)
        for picture, when in zip(frames, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = when, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
@pytest.mark.parametrize("fps", [5, 8, 12, 24, 29.97])
def test_files_keep_the_frame_rate_and_the_order(suffix: str, fps: float, tmp_path: Path) -> None:
    video = Video(ramp(16), fps)
    read = Video.from_path(video.save(tmp_path / f"clip{suffix}"))
    # A GIF counts in hundredths of a second, a WebP in thousandths.
    assert read.fps == pytest.approx(fps, rel=0.012 if suffix == ".gif" else 1e-3)
    assert numbers(read) == list(range(1, 17))


def test_at_8_fps_all_formats_keep_the_rate_exactly(tmp_path: Path) -> None:
    for suffix in Video.suffixes:
        assert Video.from_path(Video(ramp(16), 8).save(tmp_path / f"clip{suffix}")).fps == 8


def test_a_varying_rate_is_made_constant_and_the_length_kept() -> None:
    video = Video.from_bytes(mp4(ramp(6), [0, 1, 2, 8, 9, 10]))  # a pause of 0.6 s
    assert video.seconds == pytest.approx(1.1, abs=0.12)
    shown = numbers(video)
    assert shown == sorted(shown) and {1, 3, 6} <= set(shown)
    share = shown.count(3) / len(shown)  # the frame before the pause lasts 0.6 of 1.1 s
    assert share == pytest.approx(6 / 11, abs=0.15)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_frames_of_different_length_in_an_animation_are_repeated(kind: str) -> None:
    buffer, pictures = io.BytesIO(), [Image.fromarray(frame) for frame in ramp(3)]
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:], duration=[100, 300, 100])
    video = Video.from_bytes(buffer.getvalue())
    assert video.fps == pytest.approx(10) and numbers(video) == [1, 2, 2, 2, 3]
    with pytest.raises(MediaError, match="has 5 frames, at most 4 are decoded"):
        Video.from_bytes(buffer.getvalue(), limits=MediaLimits(max_frames=4))


def test_one_frame_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    assert len(Video.from_bytes(mp4(ramp(1), [0])).frames) == 1
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    assert len(Video.from_bytes(buffer.getvalue()).frames) == 1
    for suffix in Video.suffixes:
        assert len(Video.from_path(Video(ramp(1), 8).save(tmp_path / f"one{suffix}")).frames) == 1


def test_a_clip_without_a_frame_is_refused() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()  # the header, and nothing after it
    with pytest.raises(MediaError, match="the data holds no frame"):
        Video.from_bytes(buffer.getvalue())


def test_a_file_cut_in_its_middle_gives_what_it_holds_with_a_warning() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    data = mp4(noise, list(range(12)), options={"movflags": "faststart"})  # the table of contents comes first
    with pytest.warns(MediaWarning, match=r"is cut short: its header promises 12 frames, \d could be read"):
        video = Video.from_bytes(data[: len(data) // 2])
    assert 0 < len(video.frames) < 12


def test_a_file_cut_before_its_table_of_contents_is_refused() -> None:
    data = mp4(ramp(12), list(range(12)))
    with pytest.raises(MediaError, match=r"is not a video that can be read \(.*\): its content is an MP4"):
        Video.from_bytes(data[: len(data) // 2])


def test_a_cut_animation_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    data = Video(noise, 8).save(tmp_path / "clip.webp").read_bytes()
    with pytest.raises(MediaError, match="is damaged or cut short"):
        Video.from_bytes(data[: len(data) // 2])


def test_ten_hours_are_refused_before_decoding() -> None:
    data = mp4(ramp(2), [0, 10 * 3600 * 10])
    with pytest.raises(MediaError, match=r"has 36,000.* seconds, at most 600 are decoded \(max_seconds\)"):
        Video.from_bytes(data)


def test_the_limit_of_length_can_be_raised() -> None:
    data = mp4(ramp(3), [0, 4000, 8000])
    with pytest.raises(MediaError, match=r"at most 600 are decoded \(max_seconds\)"):
        Video.from_bytes(data)
    generous = MediaLimits(max_seconds=2000, max_frames=20_000)
    assert Video.from_bytes(data, limits=generous).seconds == pytest.approx(800, rel=0.5)


def test_4k_is_read_while_it_is_short_and_refused_by_its_memory_when_it_is_not() -> None:
    data = mp4(np.zeros((2, 2160, 3840, 3), np.uint8), [0, 1])
    assert Video.from_bytes(data).frames.shape == (2, 2160, 3840, 3)
    with pytest.raises(MediaError, match=r"has 49,766,400 bytes once decoded, at most 40,000,000 .*max_decoded_bytes"):
        Video.from_bytes(data, limits=MediaLimits(max_decoded_bytes=40_000_000))
    with pytest.raises(MediaError, match=r"3,840 × 2,160 = 8,294,400 pixels, at most 2,000,000"):
        Video.from_bytes(data, limits=MediaLimits(max_pixels=2_000_000))


def test_an_mp4_with_sound_alone_is_told_from_a_video() -> None:
    told = r"the data holds no video track \(an MP4 or HEIF file\); it holds sound: pass it as audio"
    with pytest.raises(MediaError, match=told):
        Video.from_bytes(track(np.zeros(1024), 16_000))


# --- sounds --------------------------------------------------------------------------------------------------


def write_sound(path: Path, samples: np.ndarray, rate: int, **options: Any) -> Path:
    """Samples [N] or [N, channels] as a file of soundfile's."""
    soundfile = pytest.importorskip("soundfile", reason="sound files need soundfile")
    soundfile.write(path, samples, rate, **options)
    return path


def sine(rate: int, seconds: float = 0.25) -> np.ndarray:
    return 0.5 * np.sin(np.arange(round(rate * seconds)) * 2 * np.pi * 440 / rate)


def track(samples: np.ndarray, rate: int, *, kind: str = "mp4", codec: str = "aac") -> bytes:
    """A file with one sound track of one channel."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_an_empty_sound_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nothing.wav").touch()
    with pytest.raises(MediaError, match=r"nothing\.wav is empty \(0 bytes\)"):
        Audio.from_path(tmp_path / "nothing.wav")
    with pytest.raises(MediaError, match=r"header\.wav holds no sample"):
        Audio.from_path(write_sound(tmp_path / "header.wav", np.zeros(0), 16_000))


def test_a_silent_sound_is_read_as_it_is(tmp_path: Path) -> None:
    silent = Audio.from_path(write_sound(tmp_path / "silent.wav", np.zeros(800), 16_000))
    assert silent.samples.shape == (1, 800) and not silent.samples.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused_by_the_files_name(value: float, tmp_path: Path) -> None:
    samples = sine(8000)
    samples[7] = value
    path = write_sound(tmp_path / "broken.wav", samples, 8000, subtype="FLOAT")
    with pytest.raises(MediaError, match=r"broken\.wav holds samples that are NaN or infinite"):
        Audio.from_path(path)


@pytest.mark.parametrize("rate", [8000, 44_100, 96_000])
def test_every_rate_is_kept(rate: int, tmp_path: Path) -> None:
    sound = Audio.from_path(write_sound(tmp_path / "tone.wav", sine(rate), rate))
    assert sound.sampling_rate == rate and sound.seconds == pytest.approx(0.25)
    np.testing.assert_allclose(sound.mono, sine(rate), atol=1e-4)


def test_24_bits_are_read_exactly(tmp_path: Path) -> None:
    levels = np.array([0, 1, -1, 2**22 + 1, 2**23 - 1, -(2**23)]) / 2**23
    sound = Audio.from_path(write_sound(tmp_path / "fine.wav", levels, 48_000, subtype="PCM_24"))
    assert sound.samples[0].tolist() == levels.tolist()


def test_7_1_channels_are_kept_and_their_mean_is_the_mono_sound(tmp_path: Path) -> None:
    channels = np.stack([(place + 1) / 10 * sine(16_000) for place in range(8)], axis=1)
    sound = Audio.from_path(write_sound(tmp_path / "surround.wav", channels, 16_000))
    assert sound.samples.shape == (8, 4000)
    np.testing.assert_allclose(sound.mono, channels.mean(1), atol=1e-4)
    assert Audio.from_path(sound.save(tmp_path / "copy.flac")).samples.shape == (8, 4000)


def test_an_hour_is_refused_before_decoding_and_read_if_the_limit_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile = pytest.importorskip("soundfile", reason="sound files need soundfile")
    path = write_sound(tmp_path / "long.wav", np.zeros(3600 * 100), 100)
    with monkeypatch.context() as patch:
        patch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
        with pytest.raises(MediaError, match=r"long\.wav has 3,600 seconds, at most 600 are decoded \(max_seconds\)"):
            Audio.from_path(path)
        with pytest.raises(MediaError, match=r"1,440,000 bytes once decoded, at most 1,000 .*max_decoded_bytes"):
            Audio.from_path(path, limits=MediaLimits(max_seconds=3600, max_decoded_bytes=1000))
    assert Audio.from_path(path, limits=MediaLimits(max_seconds=3600)).seconds == 3600


def test_a_text_file_named_wav_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_text("I am text, whatever my name says.\n")
    with pytest.raises(MediaError, match=r"notes\.wav is not a sound that can be read \(.*\): its content is text;"):
        Audio.from_path(tmp_path / "notes.wav")


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "aac"), ("matroska", "pcm_s16le")])
def test_the_sound_of_an_mp4_or_matroska_file_is_read(kind: str, codec: str) -> None:
    data = track(sine(16_000, 0.5), 16_000, kind=kind, codec=codec)
    sound = Audio.from_bytes(data)
    assert sound.sampling_rate == 16_000 and sound.seconds == pytest.approx(0.5, abs=0.15)
    spectrum = np.abs(np.fft.rfft(sound.mono[2000:6000]))
    assert spectrum.argmax() * 16_000 / 4000 == pytest.approx(440, abs=4)
    with pytest.raises(MediaError, match=r"seconds, at most 0.1 are decoded \(max_seconds\)"):
        Audio.from_bytes(data, limits=MediaLimits(max_seconds=0.1))


def test_a_video_without_sound_given_as_a_sound_is_told() -> None:
    with pytest.raises(MediaError, match=r"the data holds no sound track \(an MP4 .*\); it holds pictures: pass it as"):
        Audio.from_bytes(mp4(ramp(2), [0, 1]))


def test_a_damaged_mp4_given_as_a_sound_is_told() -> None:
    data = track(sine(16_000), 16_000)
    with pytest.raises(MediaError, match=r"the sound of the data cannot be read \(.*\): it is an MP4 or HEIF file"):
        Audio.from_bytes(data[: len(data) // 2])
