import base64
import io
import itertools
import pickle
import struct
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from anygen.errors import ConfigError, MediaError, MediaWarning, ModalityError, OutputError
from anygen.media import Audio, Image, MediaLimits, Video, media_type, modalities, read_metadata, register_media

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
PICTURE = Image.from_any(PIXELS)


def encode(picture: PIL.Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is large and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def animation(count: int = 3, kind: str = "WEBP") -> bytes:
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue", "white")[:count]]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, lossless=True)


# --- what an image may be made of ---------------------------------------------------------------------------


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    data = encode(PICTURE.pil)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    sources = [path, str(path), path.as_uri(), data, bytearray(data), uri, PICTURE.pil, PIXELS, tensor, PICTURE]
    sources += [PIXELS / 255, (tensor / 255).double(), PIXELS.astype(np.uint16) * 257]
    for source in sources:
        assert Image.from_any(source) == PICTURE, type(source)
    assert Image.from_path(path) == Image.from_bytes(data) == PICTURE
    np.testing.assert_array_equal(PICTURE.array, PIXELS)


def test_grey_arrays_become_rgb() -> None:
    grey = PIXELS[..., 0]
    for source in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        np.testing.assert_array_equal(Image.from_any(source).array, np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(Image.from_any(np.eye(2, dtype=bool)).array[..., 0], [[255, 0], [0, 255]])


def test_a_bfloat16_tensor_is_rounded_and_not_refused() -> None:
    image = Image.from_any(torch.full((3, 2, 2), 0.5, dtype=torch.bfloat16))
    assert set(image.array.ravel()) == {128}


def test_a_url_is_fetched_only_when_allowed() -> None:
    data = encode(PICTURE.pil)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/picture.png" else 404)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        with pytest.raises(MediaError, match=r"is a URL, and fetching is off; download the file, or pass allow_urls"):
            Image.from_any(f"{address}/picture.png")
        assert Image.from_any(f"{address}/picture.png", allow_urls=True) == PICTURE
        with pytest.raises(MediaError, match="cannot be fetched: .*404"):
            Image.from_any(f"{address}/none.png", allow_urls=True)
        with pytest.raises(MediaError, match="has 51 bytes, at most 50 are read"):
            Image.from_any(f"{address}/picture.png", allow_urls=True, limits=MediaLimits(max_bytes=50))
    finally:
        server.shutdown()
        server.server_close()


# --- modes ---------------------------------------------------------------------------------------------------


def test_transparency_is_composed_on_white() -> None:
    rgba = PIL.Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (255, 0, 0, 0))
    half = PIL.Image.new("LA", (1, 1), (0, 128))
    assert Image(rgba).array.tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert Image(half).array.tolist() == [[[127, 127, 127]]]
    assert Image.from_bytes(encode(rgba.convert("RGBA"), "WEBP", lossless=True)).array.tolist() == [
        [[255, 0, 0], [255, 255, 255]]
    ]


def test_a_palette_with_alpha_keeps_its_colours_and_loses_its_holes() -> None:
    palette = PIL.Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    data = encode(palette, transparency=0)
    assert PIL.Image.open(io.BytesIO(data)).mode == "P"
    assert Image.from_bytes(data).array.tolist() == [[[255, 255, 255], [200, 100, 50]]]
    assert Image.from_bytes(encode(palette)).array.tolist() == [[[10, 20, 30], [200, 100, 50]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = Image.from_bytes(encode(PIL.Image.fromarray(values), kind))
    assert image.array[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_sixteen_bits_in_pillows_32_bit_mode_are_scaled_too() -> None:
    assert Image(PIL.Image.new("I", (1, 1), 65535)).array.tolist() == [[[255, 255, 255]]]


def test_float_pictures_are_scaled_and_nan_is_refused() -> None:
    assert Image(PIL.Image.new("F", (1, 1), 1.0)).array.tolist() == [[[255] * 3]]
    assert Image(PIL.Image.new("F", (1, 1), 200.0)).array.tolist() == [[[200] * 3]]
    with pytest.raises(MediaError, match="the picture holds NaN or infinite pixels"):
        Image(PIL.Image.new("F", (1, 1), float("nan")))


def test_cmyk_becomes_the_same_colour_in_rgb() -> None:
    red = PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    colour = Image.from_bytes(encode(red, "JPEG", quality=100)).array[4, 4]
    np.testing.assert_allclose(colour, [255, 0, 0], atol=3)


def test_one_pixel_is_a_picture() -> None:
    assert Image.from_bytes(encode(PIL.Image.new("1", (1, 1), 1))).array.tolist() == [[[255, 255, 255]]]


def test_the_exif_orientation_is_applied() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn clockwise
    turned = Image.from_bytes(encode(PICTURE.pil, exif=exif))
    np.testing.assert_array_equal(turned.array, np.rot90(PIXELS, k=-1))


def test_the_value_does_not_follow_the_picture_that_it_was_made_of() -> None:
    picture = PICTURE.pil.copy()
    image = Image(picture)
    picture.putpixel((0, 0), (1, 2, 3))
    assert image == PICTURE
    with pytest.raises(AttributeError):
        image.pil = picture  # type: ignore[misc]


# --- bad input -----------------------------------------------------------------------------------------------


def test_a_text_file_named_png(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("Überraschung, I am text.\n")
    with pytest.raises(
        MediaError, match=r"notes.png is not a picture that can be read: its content is text, what.*PNG"
    ):
        Image.from_path(tmp_path / "notes.png")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<svg xmlns='x'/>", "an SVG drawing"),
        (b"%PDF-1.7", "a PDF document"),
        (b"RIFF....WAVEfmt ", "a WAV sound"),
        (b"\x00\x01\x02\xff\xfe", "of an unknown format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "text"),
    ],
)
def test_the_message_says_what_the_file_is(data: bytes, what: str) -> None:
    with pytest.raises(MediaError, match=f"the data is not a picture that can be read: its content is {what},"):
        Image.from_bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_truncation_is_an_error_and_none_a_crash(kind: str) -> None:
    noise = PIL.Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = encode(noise, kind)
    for share in (0.02, 0.1, 0.5, 0.9):
        with pytest.raises(MediaError, match="the data is (damaged|not a picture that can be read)"):
            Image.from_bytes(data[: int(len(data) * share)])


def test_a_truncated_png_says_so() -> None:
    noise = PIL.Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    with pytest.raises(MediaError, match=r"is damaged or cut short \(.+\); its header says PNG"):
        Image.from_bytes(encode(noise)[:2000])


def test_flipped_bytes_are_errors_or_pictures_and_never_a_crash() -> None:
    data = encode(PICTURE.pil)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        try:
            Image.from_bytes(bytes(damaged), limits=MediaLimits(max_pixels=10**6))
        except MediaError:
            pass


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(MediaError, match=r"refused before decoding: .*900000000 pixels.*at most 64,000,000 pixels"):
        Image.from_bytes(png_header(30_000, 30_000))
    with pytest.raises(MediaError, match=r"the data has 10,000 × 10,000 = 100,000,000 pixels, at most 64,000,000 are"):
        Image.from_bytes(png_header(10_000, 10_000))


def test_the_limit_is_configurable() -> None:
    data = encode(PICTURE.pil)
    assert Image.from_bytes(data, limits=MediaLimits(max_pixels=30)) == PICTURE
    with pytest.raises(MediaError, match="6 = 30 pixels, at most 29 are decoded"):
        Image.from_bytes(data, limits=MediaLimits(max_pixels=29))
    with pytest.raises(ConfigError, match="MediaLimits: max_pixels must be positive, got 0"):
        MediaLimits(max_pixels=0)


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_an_animation_given_as_an_image_is_its_first_frame_and_says_so(kind: str) -> None:
    with pytest.warns(MediaWarning, match=r"the data is animated \(3 frames\); only the first is used"):
        image = Image.from_bytes(animation(kind=kind))
    np.testing.assert_allclose(image.array[0, 0], [255, 0, 0], atol=2)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(MediaError, match=r"there is no file .*none\.png"):
        Image.from_path(tmp_path / "none.png")
    with pytest.raises(MediaError, match="is a directory; a file is wanted"):
        Image.from_any(str(tmp_path))
    with pytest.raises(MediaError, match=r"empty\.png is empty \(0 bytes\)"):
        Image.from_path(tmp_path / "empty.png")
    with pytest.raises(MediaError, match="/dev/null is not a regular file"):
        Image.from_path("/dev/null")
    with pytest.raises(MediaError, match="cannot be read: embedded null"):
        Image.from_any("a\0b.png")
    with pytest.raises(MediaError, match=r"cannot be read: .*base64 has to come as a data URI"):
        Image.from_any(base64.b64encode(bytes(3000)).decode())
    with pytest.raises(MediaError, match="at most 10 are read"):
        (tmp_path / "large.png").write_bytes(bytes(11))
        Image.from_path(tmp_path / "large.png", limits=MediaLimits(max_bytes=10))


def test_data_uris_that_are_none() -> None:
    with pytest.raises(MediaError, match="the data URI 'data:image/png;base64' has no comma"):
        Image.from_any("data:image/png;base64")
    with pytest.raises(MediaError, match="the data URI is not valid base64"):
        Image.from_any("data:image/png;base64,iVBOR!!!")
    with pytest.raises(MediaError, match="its content is text"):
        Image.from_any("data:,hello%20world")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "int is not supported as an image; wanted: a path, bytes"),
        (None, "NoneType is not supported as an image"),
        (
            np.zeros((2, 2, 5), np.uint8),
            r"a picture is \[H, W, 3\] with 1, 3 or 4 channels.*got an array \[2, 2, 5\]",
        ),
        (torch.zeros(2, 2, 3), r"a picture is \[3, H, W\] with .*; got a tensor \[2, 2, 3\]"),
        (np.full((2, 2), 7.5), r"a picture of floats has values in 0..1, got 7.5..7.5"),
        (np.full((2, 2), np.nan), "with NaN"),
        (np.zeros((2, 2), np.int64), "a picture is uint8, uint16, bool or float in 0..1, not int64"),
        (np.zeros((0, 2, 3), np.uint8), r"got an array \[0, 2, 3\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_unsupported_values_say_what_is_wanted(value: object, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        Image.from_any(value)


def test_the_constructor_wraps_pil_images_only() -> None:
    with pytest.raises(MediaError, match="Image wraps a PIL image, not str; Image.from_any takes other types"):
        Image("apple.png")  # type: ignore[arg-type]


# --- saving --------------------------------------------------------------------------------------------------

METADATA = {"prompt": 'Zeichne "Ä" 🍎\nzwei', "seed": 2**40, "steps": 10, "model": {"name": "anygen-mini"}}


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".jpeg", ".tiff", ".tif", ".gif", ".bmp"])
def test_saved_pictures_are_read_back(suffix: str, tmp_path: Path) -> None:
    plain = Image(PIL.Image.new("RGB", (16, 16), (200, 40, 90)))
    path = plain.save(tmp_path / f"plain{suffix}", metadata=METADATA)
    np.testing.assert_allclose(Image.from_path(path).array, plain.array, atol=4)
    assert read_metadata(path) == ({} if suffix == ".bmp" else METADATA)
    assert list(tmp_path.iterdir()) == [path]


def test_png_is_lossless_and_its_metadata_are_text_chunks(tmp_path: Path) -> None:
    path = PICTURE.save(tmp_path / "picture.PNG", metadata=METADATA)
    assert Image.from_path(path) == PICTURE
    with PIL.Image.open(path) as opened:
        assert opened.info["anygen:seed"] == str(2**40)
        assert "🍎" in opened.info["anygen:prompt"]


def test_a_strangers_picture_has_no_metadata(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(encode(PICTURE.pil, "GIF", comment="by me"))
    assert read_metadata(tmp_path / "a.gif") == {}
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(MediaError, match=r"a.txt is of no kind that anygen writes: its content is text"):
        read_metadata(tmp_path / "a.txt")
    with pytest.raises(MediaError, match="there is no file"):
        read_metadata(tmp_path / "b.txt")
    (tmp_path / "b.gif").write_bytes(encode(PICTURE.pil, "GIF", comment="anygen:{not json"))
    assert read_metadata(tmp_path / "b.gif") == {}


@pytest.mark.parametrize(
    ("name", "data", "package"),
    [("a.png", b"\x89PNG\r\n\x1a\n", "PIL"), ("a.wav", b"RIFF....WAVE", "soundfile"), ("a.mp4", b"....ftypisom", "av")],
)
def test_a_damaged_file_has_no_readable_metadata(name: str, data: bytes, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package, reason=f"{name} needs {package}")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MediaError, match=f"{name} is damaged"):
        read_metadata(tmp_path / name)


def test_a_saved_picture_does_not_carry_the_comment_of_the_one_it_was_read_from(tmp_path: Path) -> None:
    image = Image.from_bytes(encode(PICTURE.pil, "GIF", comment="private"))
    assert b"private" not in image.save(tmp_path / "a.gif").read_bytes()


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"picture.png exists already; .*replaced \(overwrite\)"):
        PICTURE.save(path)
    assert path.read_bytes() == b"precious"
    PICTURE.save(path, overwrite=True)
    assert Image.from_path(path) == PICTURE
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_suffixes_and_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"an image is not written as '\.mp3'; known: \.png, \.jpg"):
        PICTURE.save(tmp_path / "picture.mp3")
    with pytest.raises(OutputError, match=r"an image is not written as ''"):
        PICTURE.save(tmp_path / "picture")
    with pytest.raises(OutputError, match="there is no folder .*missing; create it first"):
        PICTURE.save(tmp_path / "missing" / "picture.png")


def test_metadata_that_is_not_json_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        PICTURE.save(tmp_path / "picture.png", metadata={"model": object()})
    assert not list(tmp_path.iterdir())


# --- values --------------------------------------------------------------------------------------------------


def values() -> list[Image | Video | Audio]:
    frames = RNG.integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    return [PICTURE, Video(frames, 8), Audio(RNG.uniform(-0.5, 0.5, (2, 800)).astype(np.float32), 16_000)]


def test_equality_hash_and_pickle_agree() -> None:
    for value, other in itertools.product(values(), values()):
        same = type(value) is type(other) and repr(value) == repr(other) and isinstance(value, Image)
        assert (value == other) is same
    for value in values():
        assert pickle.loads(pickle.dumps(value)) == value
        assert hash(pickle.loads(pickle.dumps(value))) == hash(value)
    assert PICTURE != Image(PICTURE.pil.rotate(90, expand=True))


def test_representations() -> None:
    picture, video, audio = values()
    assert repr(picture) == "Image(5×6)"
    assert repr(video) == "Video(4 frames, 8×6, 8 fps)"
    assert repr(audio) == "Audio(0.05 s, 2 × 16,000 Hz)"
    assert isinstance(picture, Image) and Image.from_bytes(picture._repr_png_()) == picture


def test_videos_and_sounds_hold_what_they_say() -> None:
    _, video, audio = values()
    assert isinstance(video, Video) and isinstance(audio, Audio)
    assert video.seconds == 0.5 and audio.seconds == 0.05
    mono = Audio(torch.tensor([0.5, -0.5]), 2)  # type: ignore[arg-type]
    np.testing.assert_array_equal(mono.samples, [[0.5, -0.5]])
    np.testing.assert_allclose(audio.mono, audio.samples.mean(axis=0))
    with pytest.raises(ValueError, match="read-only"):
        video.frames[0] = 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Video(np.zeros((2, 4, 4), np.uint8), 8), r"a video is uint8 \[frames, .* not uint8 \[2, 4, 4\]"),
        (lambda: Video(np.zeros((2, 4, 4, 3)), 8), "not float64"),  # type: ignore[arg-type]
        (lambda: Video(np.zeros((0, 4, 4, 3), np.uint8), 8), r"not uint8 \[0, 4, 4, 3\]"),
        (lambda: Video(np.zeros((2, 4, 4, 3), np.uint8), 0), "a video's fps must be positive, got 0"),
        (lambda: Audio(np.zeros(3, np.int16), 8000), "a sound is float .* not int16"),  # type: ignore[arg-type]
        (lambda: Audio(np.zeros(0, np.float32), 8000), r"not float32 \[1, 0\]"),
        (lambda: Audio(np.full(3, np.nan, np.float32), 8000), "finite, these hold NaN or infinity"),
        (lambda: Audio(np.zeros(3, np.float32), 0), "sampling rate must be positive, got 0"),
        (lambda: Video.from_any(3), "int is not supported as a video; wanted: .*Video"),
        (lambda: Audio.from_any(3), "int is not supported as a sound; wanted: .*Audio"),
        (lambda: Audio.from_any(PICTURE), "an audio is wanted, this is an image"),
    ],
)
def test_bad_videos_and_sounds_are_told(make: object, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_are_read_back_as_videos(suffix: str, tmp_path: Path) -> None:
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    frames[0, ..., 0] = frames[1, ..., 1] = frames[2, ..., 2] = 255
    path = Video(frames, 10).save(tmp_path / f"clip{suffix}", metadata=METADATA)
    video = Video.from_path(path)
    assert video.fps == 10 and read_metadata(path) == METADATA
    np.testing.assert_allclose(video.frames.astype(int), frames, atol=8)
    with pytest.raises(MediaError, match=r"has 3 frames, at most 2 are decoded \(max_frames\)"):
        Video.from_path(path, limits=MediaLimits(max_frames=2))
    with pytest.raises(MediaError, match=r"has 576 bytes once decoded, at most 500 are decoded"):
        Video.from_path(path, limits=MediaLimits(max_decoded_bytes=500))


def test_mp4_is_read_back(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="MP4 needs PyAV")
    ramp = np.linspace(0, 255, 6).astype(np.uint8)
    frames = np.broadcast_to(ramp[:, None, None, None], (6, 31, 17, 3))  # odd sides
    path = Video(frames, 12).save(tmp_path / "clip.mp4", metadata=METADATA)
    video = Video.from_path(path)
    assert (video.frames.shape, video.fps) == ((6, 32, 18, 3), 12) and read_metadata(path) == METADATA
    np.testing.assert_allclose(video.frames[:, :31, :17].astype(int), frames, atol=6)
    assert video._repr_html_().startswith('<video controls loop autoplay muted src="data:video/mp4;base64,')
    with pytest.raises(MediaError, match="at most 3 are decoded"):
        Video.from_path(path, limits=MediaLimits(max_frames=3))
    with pytest.raises(MediaError, match=r"is not a video that can be read .*its content is text"):
        Video.from_bytes(b"I am text")


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_sounds_are_read_back(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="sound files need soundfile")
    time = np.arange(4000) / 8000
    sound = Audio(np.stack([np.sin(440 * time), 0.5 * np.cos(330 * time)]).astype(np.float32), 8000)
    path = sound.save(tmp_path / f"sound{suffix}", metadata=METADATA)
    read = Audio.from_path(path)
    assert (read.samples.shape, read.sampling_rate) == ((2, 4000), 8000) and read_metadata(path) == METADATA
    np.testing.assert_allclose(read.samples, sound.samples, atol=0.1 if suffix == ".ogg" else 1e-4)
    assert sound._repr_html_().startswith('<audio controls src="data:audio/wav;base64,')
    with pytest.raises(MediaError, match=r"has 0.5 seconds, at most 0.1 are decoded \(max_seconds\)"):
        Audio.from_path(path, limits=MediaLimits(max_seconds=0.1))
    with pytest.raises(MediaError, match=r"is not a sound that can be read .*its content is text"):
        Audio.from_bytes(b"I am text")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, video, audio = values()
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MediaError, match="writing an MP4 file needs the package 'av': pip install av"):
        video.save(tmp_path / "clip.mp4")
    with pytest.raises(MediaError, match="writing a WAV file needs the package 'soundfile'"):
        audio.save(tmp_path / "sound.wav")
    assert not list(tmp_path.iterdir())


# --- modalities ----------------------------------------------------------------------------------------------


def test_modalities_are_a_table_that_plugins_extend() -> None:
    assert modalities()[:3] == ["image", "video", "audio"]
    assert media_type("image") is Image and media_type("audio") is Audio
    with pytest.raises(ModalityError, match="there is no modality 'smell'; known: .*image"):
        media_type("smell")
    with pytest.raises(ConfigError, match=r"the modality 'image' is taken by anygen\.image\.Image"):

        @register_media
        class Painting(Video):
            modality = "image"
