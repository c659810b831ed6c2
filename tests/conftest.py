"""Shared by all tests: one thread, and where the real data lie."""

import gc
import importlib.util
import os
from pathlib import Path

# A prompt torch import and no GPU surprises; before anything imports torch or Matplotlib.
os.environ.setdefault("MPLBACKEND", "Agg")
# Child processes run this checkout too, wherever they start.
ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

import pytest  # noqa: E402
import torch  # noqa: E402

# jaxtyping's hook has its own bytecode files, also of what a module of videogru is first to import: compiled anew for
# every run, unless it is there already.
for library in (
    "torchvision",
    "pytorch_lightning",
    "sklearn.metrics",
    "matplotlib.pyplot",
    "onnxruntime",
    "onnxscript",
    "beartype.door",
    "pydantic",
    "typer",
):
    if importlib.util.find_spec(library.split(".")[0]):  # what is optional skips its tests by itself
        importlib.import_module(library)

from tests.support.command_line import KINDS, QUICK, videogru  # noqa: E402

torch.set_num_threads(1)
# Millions of objects of libraries and tests, which live as long as the process: not searched for garbage, as they come
# or ever after.
gc.disable()
# The first gradient starts autograd's threads, one per device; an export registers devices that are none, and with
# their threads running a forked child can take no gradient. So the first one is now.
torch.ones(1, requires_grad=True).sum().backward()

SHARED = ROOT.parent / "shared" / "data"


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data beside the checkout; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three class folders of small sources, and a trained run of each kind."""
    place = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for kind, (suffix, write) in KINDS.items():
            for label, flag in (("a", True), ("b", False)):
                folder = place / f"{kind}s" / label
                folder.mkdir(parents=True)
                for number in range(10):
                    write(folder / f"{number}{suffix}", flag, number + 100 * flag)
            steps = () if kind == "image" else ("--set", "data.num_frames=6")
            size = ("--set", "data.frame_size=32", *steps, "--batch-size", "6")
            done = videogru("train", "--dataset", f"{kind}s", *QUICK, *size)
            assert done.code == 0, done.err
    return place


@pytest.fixture
def there(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workshop)
    return workshop
