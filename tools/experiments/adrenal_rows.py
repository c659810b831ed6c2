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


# What the rows start from: one slice a step, all of them.
PLAIN = {"data.slab": "1", "data.augment.drop_steps": "0.0"}
ROWS = {
    "default": Row("our default"),
    "plain": Row("CNN per slice, biGRU along axial slices", PLAIN),
    "monai_resnet18": Row("3-D ResNet-18 (MONAI), trained here", peer="monai_resnet18"),
    "r3d_18": Row("3-D ResNet-18 (torchvision's r3d_18, one channel), trained here", peer="r3d_18"),
    "coronal": Row("coronal slices", {**PLAIN, "data.axis": "coronal"}),
    "sagittal": Row("sagittal slices", {**PLAIN, "data.axis": "sagittal"}),
    "none": Row("no GRU: mean over slices", {**PLAIN, "model.cell": "none"}),
    "convgru": Row("ConvGRU on the maps", {**PLAIN, "model.cell": "convgru"}),
    "raster": Row("3D-GRU, raster: every cell of every map a step", {**PLAIN, "model.seq": "grid"}),
    "slab": Row("slabs of 3 slices as channels", {**PLAIN, "data.slab": "3"}),
    "drop": Row("slices dropped in training, up to 60 %", {**PLAIN, "data.augment.drop_steps": "0.6"}),
    "gaps": Row(
        "slices dropped in training, and the gaps enter the GRU",
        {**PLAIN, "data.augment.drop_steps": "0.6", "model.use_gaps": "true"},
    ),
}
DEFAULT_IS = {28: "drop", 64: "slab"}  # by the validation AUC; that row is the default's
THINNED = ("default", "plain", "gaps")  # rows that are also tested on every second and third slice


def rows_of_size(size: int) -> dict[str, Row]:
    """The rows of a table, by name; the default's title says what it is."""
    own = ROWS[DEFAULT_IS[size]]
    title = f"our default: {own.title}"
    return {"default": Row(title)} | {n: row for n, row in ROWS.items() if n not in ("default", DEFAULT_IS[size])}


def run_folder(work: Path, size: int, row: str, seed: int) -> Path:
    """Where one training lies."""
    return work / f"{size}-{row}-seed{seed}"
