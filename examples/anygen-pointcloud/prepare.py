"""Builds the furniture set: 820 models of Debian's `sweethome3d-furniture` as point clouds with names.

    python prepare.py ../../data/furniture

Writes a PLY file of 2,048 points a model, in metres, and `train.jsonl` and `held_out.jsonl` beside them: a quarter of
each category's models is held out. What belongs to no category keeps its own name and is trained on.
"""

import json
import random
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from anygen_pointcloud import PointCloud

from anygen.environment import home
from anygen.training.sound_packages import RegistryPackage, fetch_package

FURNITURE = RegistryPackage(
    "debian",
    "sweethome3d-furniture",
    "1.8-1",
    "sweethome3d-furniture_1.8-1_all.deb",
    "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
    "CC0-1.0 and CC-BY-3.0",
)
POINTS = 2048
CATEGORIES = {
    "plug": r"plug$|socket$",
    "light switch": r"switch$",
    "window": r"window$|window ",
    "door": r"door$|door with",
    "bed": r"\bbed$|futon$|crib",
    "armchair": r"armchair",
    "sofa": r"sofa|couch",
    "stool": r"stool",
    "chair": r"chair|seat$",
    "desk": r"desk$|desk table",
    "table": r"table$|table on|table with|workbench",
    "lamp": r"lamp|light$|lantern|spotlight|lights$",
    "cabinet": r"cabinet|vanity|dresser|chest$|cupboard",
    "wardrobe": r"wardrobe",
    "bookcase": r"bookcase|shelves",
    "bench": r"bench$",
    "bottle": r"bottle",
    "tree": r"tree|pine|maple|beech|cypress|acacia|poplar|palm",
    "plant": r"plant|ficus|yucca|cactus|flowers|tulips|lily|orchid|bamboo|spathi|bush",
    "person": r"male$|boy$|girl$|female$",
    "radiator": r"radiator|heater",
    "railing": r"railing|fence",
    "washbasin": r"washbasin|sink$|lavatory|basin",
    "glass": r"glass$",
    "vase": r"vase|pottery|jar",
    "box": r"box$",
    "car": r"sedan|suv|car$|ford|peugeot|renault|beetle|chevrolet|seat leon|van$",
    "cup": r"cup$|mug",
    "television": r"tv|screen$",
    "bin": r"trash ?can|bin$",
    "stove": r"stove|oven|cooker|cooktop|hood",
    "fridge": r"fridge|refrig|freezer",
    "bath": r"bath$|bathtub|jacuzzi",
    "carpet": r"carpet|rug|mat$",
}
"""Category -> what a model's name has in it; the first that fits counts."""


def catalogue(archive: zipfile.ZipFile) -> list[dict[str, str]]:
    """The models of one library: name, model, width, depth, height, modelRotation, …"""
    models: dict[int, dict[str, str]] = defaultdict(dict)
    for line in archive.read("PluginFurnitureCatalog.properties").decode("latin-1").splitlines():
        if found := re.match(r"(\w+)#(\d+)=(.*)", line.strip()):
            models[int(found[2])][found[1]] = found[3].encode("latin-1").decode("unicode_escape")
    return [models[number] for number in sorted(models)]


def read_obj(archive: zipfile.ZipFile, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Triangles float64[T, 3, 3] of an OBJ file and their materials' colours uint8[T, 3]."""
    vertices, corners, owners, colours, material = [], [], [], {}, ""
    for line in archive.read(path).decode("latin-1").splitlines():
        word, *rest = line.split() or [""]
        if word == "v":
            vertices.append([float(x) for x in rest[:3]])
        elif word == "mtllib":
            colours |= read_materials(archive, f"{path.rpartition('/')[0]}/{' '.join(rest)}")
        elif word == "usemtl":
            material = " ".join(rest)
        elif word == "f":
            numbers = [int(corner.split("/")[0]) for corner in rest]
            numbers = [n - 1 if n > 0 else len(vertices) + n for n in numbers]
            corners += [[numbers[0], b, c] for b, c in zip(numbers[1:], numbers[2:], strict=False)]
            owners += [material] * (len(numbers) - 2)
    shades = np.array([colours.get(owner, (0.5, 0.5, 0.5)) for owner in owners])
    return np.array(vertices)[np.array(corners)], (shades.clip(0, 1) * 255).astype(np.uint8)


def read_materials(archive: zipfile.ZipFile, path: str) -> dict[str, tuple[float, ...]]:
    """Material -> its diffuse colour."""
    if path not in archive.namelist():
        return {}
    colours, name = {}, ""
    for line in archive.read(path).decode("latin-1").splitlines():
        word, *rest = line.split() or [""]
        if word == "newmtl":
            name = " ".join(rest)
        elif word == "Kd":
            colours[name] = tuple(float(x) for x in rest[:3])
    return colours


def sample(triangles: np.ndarray, colours: np.ndarray, random_: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points on the surface, as dense everywhere."""
    a, b, c = triangles.transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) + 1e-12
    picked = random_.choice(len(area), POINTS, p=area / area.sum())
    u, v = np.sqrt(random_.random(POINTS)), random_.random(POINTS)
    weights = np.stack([1 - u, u * (1 - v), u * v], 1)
    return (triangles[picked] * weights[..., None]).sum(1), colours[picked]


def in_metres(points: np.ndarray, model: dict[str, str]) -> np.ndarray:
    """Turned and scaled as the catalogue says, which measures in centimetres."""
    turn = model.get("modelRotation", "1 0 0 0 1 0 0 0 1").split()
    points = points @ np.array([float(x) for x in turn]).reshape(3, 3).T
    low, high = points.min(0), points.max(0)
    size = np.array([float(model[side]) for side in ("width", "height", "depth")]) / 100
    return (points - (low + high) / 2) / np.maximum(high - low, 1e-9) * size


def category(name: str) -> str | None:
    """The category of a model's name."""
    return next((kind for kind, pattern in CATEGORIES.items() if re.search(pattern, name.lower())), None)


def split(rows: list[dict[str, str]], seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Train and held out: a quarter of each category, at least one."""
    held, by_category = set(), defaultdict(list)
    for place, row in enumerate(rows):
        if row["category"]:
            by_category[row["category"]].append(place)
    for kind, places in sorted(by_category.items()):
        random.Random(f"{seed}/{kind}").shuffle(places)
        held |= set(places[: max(1, round(len(places) / 4))])
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def main(out: Path) -> None:
    """Builds the set."""
    out.mkdir(parents=True, exist_ok=True)
    package = fetch_package(FURNITURE, home() / "furniture")
    subprocess.run(["dpkg", "-x", str(package), str(out / "package")], check=True)
    rows, chance = [], np.random.default_rng(0)
    for library in sorted((out / "package/usr/share/sweethome3d/furniture").glob("*.sh3f")):
        with zipfile.ZipFile(library) as archive:
            for model in catalogue(archive):
                points, colours = sample(*read_obj(archive, model["model"].lstrip("/")), chance)
                name = re.sub(r"[^a-z0-9' -]", "", model["name"].lower()).strip()
                kind = category(model["name"])
                file = f"{len(rows):03}.ply"
                PointCloud(in_metres(points, model), colours).save(out / file, overwrite=True)
                caption = f"{'an' if (kind or name)[0] in 'aeiou' else 'a'} {kind or name}"
                rows.append({"pointcloud": file, "caption": caption, "name": name, "category": kind or ""})
    for part, chosen in zip(("train", "held_out"), split(rows), strict=True):
        (out / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    print(f"{len(rows)} models, {len({r['category'] for r in rows} - {''})} categories")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
