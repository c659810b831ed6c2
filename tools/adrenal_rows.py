"""What the AdrenalMNIST3D benchmark trains: our recipe, the other ways round, and 3-D ResNets on the same data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Test AUC of Table 6 of MedMNIST v2 (Yang et al. 2023, Scientific Data 10:41), 28x28x28, from memory.
PUBLISHED = {
    "ResNet-18 + 3D": 0.827,
    "ResNet-18 + ACS": 0.839,
    "ResNet-50 + 3D": 0.828,
    "auto-sklearn": 0.828,
}
RECIPES = {28: "adrenalmnist3d", 64: "adrenalmnist3d-64"}
SHIFTS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # rows and columns, of test-time augmentation


@dataclass(frozen=True)
class Row:
    """One line of the table: what it is called, and what it sets over the recipe; peer: the net of train_r3d.py."""

    title: str
    settings: Mapping[str, str] = field(default_factory=dict)
    peer: str = ""


# What the rows below the default change first: its slabs are left out.
ONE_BY_ONE = {"data.slab": "1"}
ROWS = {
    "default": Row("our default: CNN per slab of 3 slices, biGRU along axial slabs"),
    "single": Row("slices one by one, without slabs; so are all below", ONE_BY_ONE),
    "monai_resnet18": Row("3-D ResNet-18 (MONAI), trained here", peer="monai_resnet18"),
    "r3d_18": Row("3-D ResNet-18 (torchvision's r3d_18, one channel), trained here", peer="r3d_18"),
    "coronal": Row("coronal slices", {**ONE_BY_ONE, "data.axis": "coronal"}),
    "sagittal": Row("sagittal slices", {**ONE_BY_ONE, "data.axis": "sagittal"}),
    "none": Row("no GRU: mean over slices", {**ONE_BY_ONE, "model.cell": "none"}),
    "convgru": Row("ConvGRU on the maps", {**ONE_BY_ONE, "model.cell": "convgru"}),
    "raster": Row("3D-GRU, raster: every cell of every map a step", {**ONE_BY_ONE, "model.seq": "grid"}),
    "drop": Row("slices dropped in training, up to 60 %", {**ONE_BY_ONE, "data.augment.drop_steps": "0.6"}),
    "gaps": Row(
        "the same, and the gaps enter the GRU",
        {**ONE_BY_ONE, "data.augment.drop_steps": "0.6", "model.use_gaps": "true"},
    ),
}
THINNED = ("default", "single", "drop", "gaps")  # rows that are also tested on every second and third slice


def run_folder(work: Path, size: int, row: str, seed: int) -> Path:
    """Where one training lies."""
    return work / f"{size}-{row}-seed{seed}"
