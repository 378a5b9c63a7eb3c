"""Point clouds: files, the encoder against a plain reading of Point-BERT, and the sense grafted onto anygen-mini."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anygen_pointcloud import POINTCLOUD, PointBert, PointBertConfig, PointCloud
from anygen_pointcloud.encoder import CELLS, farthest, filled
from prepare import category, sample, split

from anygen.errors import MediaError
from anygen.messages import parse_one
from anygen.registry import lookup

HERE = Path(__file__).resolve().parent.parent
SMALL = PointBertConfig(points=64, groups=8, neighbours=6, width=16, blocks=2, heads=2)


def cloud(count: int = 50, seed: int = 0) -> PointCloud:
    chance = np.random.default_rng(seed)
    return PointCloud(chance.normal(size=(count, 3)), chance.integers(0, 256, (count, 3), dtype=np.uint8))


def test_a_cloud_comes_back_from_a_ply_file_as_it_was(tmp_path: Path) -> None:
    one = cloud()
    again = PointCloud.from_path(one.save(tmp_path / "c.ply", metadata={"prompt": "a chair"}))
    np.testing.assert_array_equal(again.points, one.points)
    np.testing.assert_array_equal(again.colours, one.colours)


HEAD = "ply\nformat binary_little_endian 1.0\nelement vertex {}\nproperty double x\nproperty float y\n"


def test_ply_files_of_others_are_read() -> None:
    head = (
        HEAD.format(2).replace("element", "comment made by hand\nelement") + "property float z\nproperty uchar alpha\n"
    )
    head += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    rows = np.array([(0, 1, 2, 9), (3, 4, 5, 9)], [("x", "<f8"), ("y", "<f4"), ("z", "<f4"), ("a", "u1")])
    one = PointCloud.from_bytes(head.encode() + rows.tobytes() + b"\x03\0\0\0\0")
    np.testing.assert_array_equal(one.points, [[0, 1, 2], [3, 4, 5]])
    assert (one.colours == 128).all()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("solid chair", "the data is no point cloud in PLY"),
        ("ply\nformat ascii 1.0\nelement vertex 1\nend_header\n", "is no point cloud in PLY, binary_little_endian"),
        (HEAD.format(1) + "end_header\n123456789012", "is damaged or lacks x, y or z"),
        (HEAD.format(9) + "property float z\nend_header\n1234", "is damaged"),
        (HEAD.format("many") + "property float z\nend_header\n1234", "is damaged"),
        (HEAD.format(10**12) + "property float z\nend_header\n1234", "bytes once decoded, at most"),
    ],
)
def test_damaged_and_foreign_files_are_told(text: str, told: str) -> None:
    with pytest.raises(MediaError, match=told):
        PointCloud.from_bytes(text.encode())


def test_arrays_are_clouds_and_other_shapes_are_not() -> None:
    assert len(PointCloud.from_any(np.zeros((4, 6)))) == 4
    with pytest.raises(MediaError, match=r"finite points \(P, 3\) and as many colours, got \(3,\) and \(3,\)"):
        PointCloud(np.zeros(3))
    with pytest.raises(MediaError, match="finite points"):
        PointCloud(np.array([[0, 0, np.nan]]))
    with pytest.raises(MediaError, match=r"got \(2, 3\) and \(1, 3\)"):
        PointCloud(np.zeros((2, 3)), np.zeros((1, 3)))


def test_a_cloud_stands_in_a_message_and_shows_itself(tmp_path: Path) -> None:
    path = cloud().save(tmp_path / "c.ply")
    (message,) = parse_one([{"role": "user", "content": [{"type": "pointcloud", "path": path}]}])
    (again,) = parse_one(["What is this?", path])[0].media
    assert isinstance(message.media[0], PointCloud) and isinstance(again, PointCloud)
    assert again._repr_html_().startswith('<img src="data:image/png;base64,')


def test_each_centre_is_the_point_farthest_from_those_before() -> None:
    points = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    chosen = farthest(points, 7)
    for row in range(2):
        taken = [points[row, 0]]
        for _ in range(6):
            gaps = torch.stack([(points[row] - one).norm(dim=1) for one in taken]).amin(0)
            taken.append(points[row, gaps.argmax()])
        torch.testing.assert_close(chosen[row], torch.stack(taken))


def test_cells_tell_the_share_of_points_in_them_and_left_is_as_right() -> None:
    points = torch.rand(2, 300, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    points[0, :150] = 0.5  # on the very edge, which is inside
    told = filled(points).view(2, CELLS, CELLS, CELLS)
    for row, cells in zip(points.numpy(), told, strict=True):
        shares = np.sqrt(np.histogramdd(row, CELLS, [(-0.5, 0.5)] * 3)[0] / 300)
        np.testing.assert_allclose(cells, 2 * (shares + shares[::-1]), rtol=1e-5)
    torch.testing.assert_close(filled(points * torch.tensor([-1.0, 1, 1])), told.flatten(1))


def test_the_feature_does_not_depend_on_place_batch_or_the_order_of_points() -> None:
    torch.manual_seed(0)
    encoder = PointBert(SMALL).eval()
    points, colours = torch.randn(3, 64, 3), torch.rand(3, 64, 3)
    with torch.no_grad():
        values = encoder(points=points, colours=colours).values
        alone = encoder(points=points[1:2], colours=colours[1:2]).values
        moved = encoder(points=points + torch.tensor([5.0, -2.0, 1.0]), colours=colours).values
        order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(63)])  # the first is the first centre
        shuffled = encoder(points=points[:, order], colours=colours[:, order]).values
        larger = encoder(points=2 * points, colours=colours).values
    assert values.shape == (3, 1, 32)
    for same in (moved, shuffled):
        torch.testing.assert_close(same, values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, values[1:2], atol=1e-5, rtol=1e-5)
    assert (larger - values).abs().max() > 1e-3, "a plug is not a wardrobe"


def test_large_and_small_clouds_are_brought_to_one_size() -> None:
    tensors = PointBert(SMALL).preprocess([cloud(500), cloud(5)])
    assert tensors["points"].shape == tensors["colours"].shape == (2, 64, 3)
    assert len(tensors["points"][1].unique(dim=0)) == 5
    assert tensors["colours"].abs().max() <= 1


def test_samples_lie_on_the_surface_as_dense_everywhere() -> None:
    triangles = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 0, 5], [3, 0, 5], [0, 3, 5]]], float)
    points, colours = sample(triangles, np.array([[255, 0, 0], [0, 0, 255]], np.uint8), np.random.default_rng(0))
    large = points[:, 2] > 4.9
    assert large.mean() == pytest.approx(0.9, abs=0.02) and (colours[large] == [0, 0, 255]).all()
    assert (points[~large, :2].sum(1) <= 1 + 1e-9).all() and (points >= -1e-9).all()


def test_held_out_models_are_a_quarter_of_each_category_and_none_is_in_both() -> None:
    assert category("Oak chair") == "chair" and category("Rounded type A plug") == "plug" and category("Saw") is None
    rows = [{"category": kind, "name": f"{kind} {n}"} for kind in ("chair", "lamp", "") for n in range(12)]
    train, held = split(rows)
    assert len(held) == 6 and {row["category"] for row in held} == {"chair", "lamp"}
    assert {row["name"] for row in train}.isdisjoint(row["name"] for row in held)
    assert split(rows) == (train, held)


def test_the_package_is_found_by_its_entry_point_and_is_small(counted: Callable[[Path], int]) -> None:
    assert lookup("encoder", "pointbert").__name__ == "PointBert"
    assert counted(HERE / "anygen_pointcloud") <= 150
    assert POINTCLOUD.weights is not None and (POINTCLOUD.weights / "model.safetensors").stat().st_size < 2e6


def test_the_shipped_features_are_those_of_the_furniture_set() -> None:
    """What the notebook learns from: encoded clouds with their captions, and held-out ones beside them."""
    from anygen.training.adapters import read_pairs

    assert POINTCLOUD.weights is not None
    encoder = PointBert.from_pretrained(POINTCLOUD.weights)
    train, held = (
        read_pairs(HERE / f"anygen_pointcloud/features/{part}.safetensors", encoder) for part in ("train", "held_out")
    )
    assert (len(train.captions), len(held.captions)) == (365, 120) and len(set(held.captions)) == 34
    assert train.features.shape == (365, 1, 256)
    # The nearest mean of a category's features names most held-out models, with no LLM in it; chance is 0.03.
    known = sorted(set(held.captions))
    means = torch.stack([train.features[[c == name for c in train.captions], 0].mean(0) for name in known])
    spread = train.features[:, 0].std(0)
    nearest = torch.cdist(held.features[:, 0] / spread, means / spread).argmin(1)
    right = sum(known[n] == caption for n, caption in zip(nearest.tolist(), held.captions, strict=True))
    assert right / 120 >= 0.6


def test_anygen_mini_learns_to_read_clouds(mini: Path, tmp_path: Path) -> None:
    """One step through the LLM: that it runs on the real model, and that the model that comes out is asked."""
    from anygen import AnyGenPipeline
    from anygen.training.recipes import run

    for number in range(4):
        cloud(seed=number).save(tmp_path / f"{number}.ply")
    rows = [{"pointcloud": f"{n}.ply", "caption": ("a chair", "a lamp")[n % 2]} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"kind: new_input\nout: {tmp_path}/run\nmodality: pointcloud\ndata: {tmp_path}/rows.jsonl\n"
        "feature_noise: 0\nname_steps: 150\nsteps: 1\nbatch_size: 2\n"
    )
    assert run(tmp_path / "recipe.yaml")["nearest"] == 1.0
    pipe = AnyGenPipeline.from_pretrained(tmp_path / "run/model", device="cpu")
    assert pipe.model.settings.plugins == {"anygen-pointcloud": ("encoder pointbert",)}
    said = [pipe(["What is this?", tmp_path / f"{n}.ply"]).text for n in range(4)]
    assert said == ["This is a chair.", "This is a lamp."] * 2
