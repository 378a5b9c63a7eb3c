"""A point cloud as a media value, and its file format, PLY.

Shapes: P points.
"""

import io
import json
from base64 import b64encode
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from anygen.errors import MediaError
from anygen.media import Media, MediaLimits, register_media
from anygen.media_base import to_array

_TYPES = {"char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4"}
_TYPES |= {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "uint8": "u1"}
_BEGINNING = [["ply"], ["format", "binary_little_endian"], ["element", "vertex"]]
_VIEW = np.array([[0.8, -0.25, 0.55], [0.0, 0.9, 0.43], [-0.6, -0.35, 0.72]])
_FIELDS = ("x", "y", "z", "red", "green", "blue")


@register_media
class PointCloud(Media):
    """Points in space, in metres with y upwards, each with a colour.

    Args:
        points: float[P, 3].
        colours: uint8[P, 3], sRGB; grey by default.

    Raises:
        MediaError: the points are no such array or not finite, or the colours are not as many.
    """

    modality, suffixes = "pointcloud", (".ply",)

    def __init__(self, points: NDArray[Any], colours: NDArray[Any] | None = None) -> None:
        self.points = np.asarray(points, np.float32)
        self.colours = np.full(self.points.shape, 128, np.uint8) if colours is None else np.asarray(colours, np.uint8)
        shape, other = self.points.shape, self.colours.shape
        if shape[1:] != (3,) or shape != other or not shape[0] or not np.isfinite(self.points).all():
            raise MediaError(f"a point cloud has finite points (P, 3) and as many colours, got {shape} and {other}")

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        return f"PointCloud({len(self)} points)"

    @classmethod
    def _convert(cls, value: object) -> "PointCloud":
        array = to_array(value)
        return cls(array) if array.shape[-1:] == (3,) else cls(array[:, :3], array[:, 3:])

    @classmethod
    def _decode(cls, data: bytes, name: str, limits: MediaLimits) -> "PointCloud":
        head, end, body = data.partition(b"end_header\n")
        lines = [line.split() for line in head.decode("ascii", "replace").splitlines() if line[:7] != "comment"]
        if not end or [line[:2] for line in lines[:3]] != _BEGINNING:
            raise MediaError(f"{name} is no point cloud in PLY, binary_little_endian, whose first element is vertex")
        properties = takewhile(lambda line: line[0] == "property", lines[3:])
        fields = np.dtype([(line[-1], _TYPES.get(line[1], "V0")) for line in properties])
        try:
            limits.check_length(seconds=0, name=name, decoded_bytes=int(lines[2][2]) * fields.itemsize)
            table = np.frombuffer(body, fields, int(lines[2][2]))
            coloured = set(_FIELDS) <= set(fields.names or ())
            points = np.stack([table[field] for field in _FIELDS[:3]], 1)
            return cls(points, np.stack([table[field] for field in _FIELDS[3:]], 1) if coloured else None)
        except (ValueError, KeyError, IndexError) as error:
            raise MediaError(f"{name} is damaged or lacks x, y or z ({error})") from None

    def _write(self, path: Any, suffix: str, metadata: Any) -> None:
        kind = [(field, "<f4" if field in "xyz" else "u1") for field in _FIELDS]
        rows = np.rec.fromarrays([*self.points.T, *self.colours.T], dtype=kind)
        kinds = [f"property {'float' if field in 'xyz' else 'uchar'} {field}" for field in _FIELDS]
        told = [f"comment anygen:{json.dumps(dict(metadata))}"] if metadata else []
        head = ["ply", "format binary_little_endian 1.0", *told, f"element vertex {len(self)}", *kinds, "end_header"]
        path.write_bytes("\n".join(head).encode() + b"\n" + rows.tobytes())

    def picture(self, size: int = 200) -> Pillow.Image:
        """Seen from the front, the right and above a little."""
        turned = (self.points - (self.points.max(0) + self.points.min(0)) / 2) @ _VIEW
        turned = turned[order := turned[:, 2].argsort()] / max(np.ptp(turned, 0).max(), 1e-9)
        canvas = np.full((size, size, 3), 255, np.uint8)
        column, row = ((size - 3) * (0.5 + turned[:, :2] * [0.95, -0.95]).clip(0, 1)).astype(int).T
        for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
            canvas[row + dy, column + dx] = self.colours[order]
        return Pillow.fromarray(canvas)

    def _repr_html_(self) -> str:
        self.picture().save(file := io.BytesIO(), "PNG")
        return f'<img src="data:image/png;base64,{b64encode(file.getvalue()).decode()}">'
