"""The main job on real data, start to end: train, evaluate, infer one scan, and a report to open.

Uses the bundled AdrenalMNIST3D (28x28x28 adrenal glands from CT, normal or hyperplastic); about
three minutes on two cores.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np

from videogru.data.manifests.dataset_card import load_card


def run(*arguments: str) -> str:
    """Show a videogru command as one would type it, run it, and return what it printed."""
    print(f"\n$ videogru {shlex.join(arguments)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "videogru", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        printed = process.communicate()[0]
    except KeyboardInterrupt:
        # Ctrl-C reached it too: it saves what it has, and says how to go on.
        sys.exit(process.wait())
    print(printed, end="", flush=True)
    if process.returncode:
        sys.exit(process.returncode)
    return printed


def write_scan(row: int, path: Path) -> str:
    """Test volume `row` as a NIfTI file of 1 mm voxels in RAS; returns its true class."""
    card = load_card("adrenalmnist3d")
    with np.load(card.home / "adrenalmnist3d.npz", allow_pickle=False) as arrays:
        volume, label = arrays["test_images"][row], int(arrays["test_labels"][row, 0])
    nibabel.Nifti1Image(volume, np.eye(4)).to_filename(path)
    return card.classes[label]


def main() -> None:
    """Run the demo in the current folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--epochs", type=int, help="fewer than the recipe's, for a quick look")
    parser.add_argument("--scan", type=Path, default=Path("scan.nii.gz"), help="where the example volume is written")
    options = parser.parse_args()
    started = time.monotonic()
    number = 1
    while (out := Path("runs") / f"demo-{number:04}").exists():
        number += 1
    epochs = ["--epochs", str(options.epochs)] if options.epochs else []
    run("train", "--dataset", "adrenalmnist3d", "--out", str(out), *epochs)
    run("eval", str(out), "--split", "test")
    truth = write_scan(3, options.scan)
    print(f"\nwrote test volume 3 ({truth}) as {options.scan}")
    run("infer", str(options.scan), "--top-k", "2")
    auroc = json.loads((out / "evaluation-test.json").read_text(encoding="utf-8"))["metrics"]["auroc"]["value"]
    print(f"\ntest AUROC {auroc:.3f}, {time.monotonic() - started:.0f} s in all")
    print(f"open the report: {(out / 'report.html').resolve()}")


if __name__ == "__main__":
    main()
