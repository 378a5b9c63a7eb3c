"""Point clouds as a sense of anygen."""

from pathlib import Path

import numpy as np

from anygen.extension import InputModality, register_input
from anygen_pointcloud.cloud import PointCloud
from anygen_pointcloud.encoder import PointBert, PointBertConfig

__all__ = ["POINTCLOUD", "PointBert", "PointBertConfig", "PointCloud"]

POINTCLOUD = register_input(
    InputModality(
        media=PointCloud,
        encoder=PointBert,
        name="pointbert",
        features=(1, 256),
        example=lambda: PointCloud(np.eye(3)),
        weights=Path(__file__).parent / "weights",
    )
)
