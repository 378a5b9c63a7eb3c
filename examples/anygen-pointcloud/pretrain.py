"""Trains the encoder: clouds and their names meet in one space, as in ULIP-2.

    python pretrain.py ../../data/furniture anygen_pointcloud
    python pretrain.py ../../data/furniture                     # measures on a quarter of the training models instead

A cloud's feature is to be nearest to the text feature of its own category, and of its own name, among all. The text
tower is the mean of the LLM's own embeddings of the words, frozen, under a learned linear map; ULIP has CLIP's.
About 11 minutes on one core. Afterwards what has a category is encoded, for `anygen train` and the notebook. Settings
are to be chosen by the second command, which never reads the held-out models and writes nothing.
"""

import json
import sys
from pathlib import Path

import torch
from anygen_pointcloud import PointBert, PointBertConfig, PointCloud
from prepare import split
from torch import Tensor, nn
from torch.nn import functional as F

from anygen import hub
from anygen.llm import LLM
from anygen.training.adapters import Pairs, read_pairs

STEPS, BATCH, RATE, SEED = 2000, 32, 1e-3, 0


def read(folder: Path, part: str) -> tuple[Tensor, Tensor, list[dict[str, str]]]:
    """Points float32[M, P, 3], colours float32[M, P, 3] in [-1, 1], and the rows of a split."""
    rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
    clouds = [PointCloud.from_path(folder / row["pointcloud"]) for row in rows]
    points = torch.stack([torch.from_numpy(cloud.points) for cloud in clouds])
    return points, torch.stack([torch.from_numpy(cloud.colours) for cloud in clouds]).float() / 127.5 - 1, rows


def augment(points: Tensor, colours: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Other points of the same things, turned, mirrored, stretched, shaken, and sometimes without colour."""
    batch = len(points)
    picked = torch.rand(points.shape[:2]).argsort(1)[:, :count, None].expand(-1, -1, 3)
    points, colours = points.gather(1, picked), colours.gather(1, picked)
    free = torch.rand(batch) < 0.25  # furniture mostly stands with its back to the wall
    angle = torch.where(free, 2 * torch.pi * torch.rand(batch), 0.1 * torch.randn(batch))
    turn = torch.zeros(batch, 3, 3)
    turn[:, 0, 0] = turn[:, 2, 2] = angle.cos()
    turn[:, 0, 2], turn[:, 2, 0] = angle.sin(), -angle.sin()
    turn[:, 1, 1] = 1
    stretch = (0.12 * torch.randn(batch, 1, 3)).exp() * (0.1 * torch.randn(batch, 1, 1)).exp()
    mirror = torch.ones(batch, 1, 3)
    mirror[:, 0, 0] -= 2 * (torch.rand(batch) < 0.5)
    points = (points * stretch * mirror) @ turn
    span = (points.amax(1) - points.amin(1)).amax(1)[:, None, None]
    points = points + 0.006 * torch.rand(batch, 1, 1) * span * torch.randn_like(points)
    keep = (torch.rand(batch, 1, 1) > 0.3).float()
    tint = 1 + 0.2 * torch.randn(batch, 1, 3)
    return points, (keep * (colours * tint + 0.2 * torch.randn(batch, 1, 3))).clamp(-1, 1)


@torch.no_grad()
def text_features(names: list[str]) -> Tensor:
    """float32[K, D]: the mean of the LLM's embeddings of each name's words, centred, of length 1."""
    llm = LLM.from_pretrained(hub.resolve("smollm2-135m-instruct"), dtype=torch.float32)
    ids = [llm.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
    means = torch.stack([llm.embedding(torch.tensor(row)).mean(0) for row in ids])
    return F.normalize(means - means.mean(0), dim=-1)


@torch.no_grad()
def features(encoder: PointBert, points: Tensor, colours: Tensor) -> Tensor:
    """float[M, C] of whole clouds."""
    count = encoder.config.points
    rows = zip(points[:, :count].split(32), colours[:, :count].split(32), strict=True)
    return torch.cat([encoder(points=p, colours=c).values[:, 0] for p, c in rows])


def main(folder: Path, out: Path | None) -> None:
    """Trains, measures the nearest category of models that were not seen, once, at the end; with `out` given it writes
    the encoder (float16) and what it sees."""
    torch.manual_seed(SEED)
    points, colours, rows = read(folder, "train")
    if out is None:
        held_rows = split(rows, seed=1)[1]
        held = torch.tensor([row in held_rows for row in rows])
        held_points, held_colours = points[held], colours[held]
        points, colours, rows = points[~held], colours[~held], [row for row in rows if row not in held_rows]
    else:
        held_points, held_colours, held_rows = read(folder, "held_out")
    kinds = [row["category"] or row["name"] for row in rows]
    names = sorted({*kinds, *(row["name"] for row in rows)})
    number = {name: place for place, name in enumerate(names)}
    labels = torch.tensor([[number[kind], number[row["name"]]] for kind, row in zip(kinds, rows, strict=True)])
    common = torch.tensor([number[kind] for kind in sorted({row["category"] for row in held_rows})])
    truth = torch.tensor([number[row["category"]] for row in held_rows])
    texts = text_features(names)
    encoder = PointBert(PointBertConfig()).train()
    head, tower = nn.Linear(encoder.feature_dim, 128), nn.Linear(texts.shape[1], 128)
    scale = nn.Parameter(torch.tensor(2.66))  # ln(1 / 0.07)
    parts = nn.ModuleList([encoder, head, tower])
    optimizer = torch.optim.AdamW([*parts.parameters(), scale], lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    # Half-way to as many of each category; a thing that is the only one of its kind teaches little.
    weights = [kinds.count(kind) ** -0.5 if row["category"] else 0.1 for kind, row in zip(kinds, rows, strict=True)]
    share = torch.tensor(weights)
    for step in range(1, STEPS + 1):
        picked = torch.multinomial(share, BATCH, replacement=True)
        moved = augment(points[picked], colours[picked], encoder.config.points)
        seen = F.normalize(head(F.dropout(encoder(points=moved[0], colours=moved[1]).values[:, 0], 0.1)), dim=-1)
        likeness = scale.exp().clamp(max=50) * seen @ F.normalize(tower(texts), dim=-1).T
        by_kind, by_name = (F.cross_entropy(likeness, labels[picked, k], label_smoothing=0.1) for k in (0, 1))
        loss = by_kind + 0.3 * by_name
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"{step}: loss {loss:.3f}", flush=True)
    with torch.no_grad():
        seen = F.normalize(head(features(encoder.eval(), held_points, held_colours)), dim=-1)
        nearest = common[(seen @ F.normalize(tower(texts[common]), dim=-1).T).argmax(1)]
    print(f"named {(nearest == truth).float().mean():.3f} of {len(truth)}, {len(common)} kinds")
    if out is None:
        return
    encoder.half().save_pretrained(out / "weights")
    encoder = PointBert.from_pretrained(out / "weights")
    (out / "features").mkdir(exist_ok=True)
    for part, told in (("train", rows), ("held_out", held_rows)):
        pairs = read_pairs(folder / f"{part}.jsonl", encoder)
        kept = [place for place, row in enumerate(told) if row["category"]]
        pairs = Pairs(pairs.features[kept], [pairs.captions[place] for place in kept])
        pairs.save(out / f"features/{part}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
