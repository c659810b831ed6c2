"""Digests of trained weights: one seeded epoch of three datasets. Equal digests before and after mean equal training.

python -m tools.experiments.weight_digests [--data SHARED/data] [--checkout DIR]

Trains `grid_digits`, `adrenalmnist3d` and 5,000 images of CIFAR-100 (where its data are present) for one epoch on one
thread. Prints the SHA-256 of all weights, by name and bit for bit, and the losses that each run logged. `--checkout`
runs the code of another checkout. Digests are comparable on one machine with one version of torch only.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

from tools.measuring import Parser

ROOT = Path(__file__).resolve().parents[2]
CIFAR_CLASSES, CIFAR_ROWS = 10, 500


def main() -> None:
    """Train each dataset and print its digest."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="Folder with cifar100/.")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="Checkout whose code trains.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = {
            "grid_digits": ["--dataset", "grid_digits"],
            "adrenalmnist3d": ["--dataset", "adrenalmnist3d"],
        }
        if (options.data / "cifar100" / "unpack.py").is_file():
            images = write_cifar_subset(options.data / "cifar100", work)
            rows["cifar100 subset"] = ["--dataset", str(images), "--seq", "rows", "--set", "data.frame_size=32"]
        for name, arguments in rows.items():
            run = work / name.replace(" ", "-")
            train(options.checkout, [*arguments, "--out", str(run)], work)
            print(f"{name}: {digest(run / 'model.safetensors')}")
            print("  " + (run / "metrics.csv").read_text(encoding="utf-8").replace("\n", "\n  ").rstrip())


def train(checkout: Path, arguments: list[str], work: Path) -> None:
    """One seeded epoch with the code of `checkout`."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    fixed = ["--epochs", "1", "--seed", "0", "--set", "train.num_workers=1"]
    command = [sys.executable, "-m", "videogru", "train", *arguments, *fixed]
    subprocess.run(command, cwd=work, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def digest(path: Path) -> str:
    """SHA-256 of all tensors of a model file, each with its name, type and shape."""
    found = hashlib.sha256()
    with safe_open(path, framework="np") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            found.update(np.ascontiguousarray(tensor).tobytes())
    return found.hexdigest()


def write_cifar_subset(packed: Path, work: Path) -> Path:
    """The first 500 training images of each of the first 10 classes as PNG files in class folders."""
    from torchvision.datasets import CIFAR100

    subprocess.run(
        [sys.executable, str(packed / "unpack.py"), str(work / "cifar")], check=True, stdout=subprocess.DEVNULL
    )
    images = CIFAR100(work / "cifar", train=True, download=False)
    targets = np.array(images.targets)
    for code in range(CIFAR_CLASSES):
        folder = work / "subset" / images.classes[code]
        folder.mkdir(parents=True)
        for row in np.flatnonzero(targets == code)[:CIFAR_ROWS].tolist():
            Image.fromarray(images.data[row]).save(folder / f"{row:05d}.png")
    return work / "subset"


if __name__ == "__main__":
    main()
