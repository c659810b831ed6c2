"""Load a program of torch.export without running what a file may hide in it."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from videogru.errors import ConfigError, ModelFileError
from videogru.runtime.export_folder import EXPORT_AGAIN


def load_program(path: Path, device: str) -> Callable[..., Any]:
    """The program as a function of tensors on `device`.

    Raises ModelFileError where it is damaged or would have a pickle run code, ConfigError for a device that is not
    there.
    """
    try:
        _check_pickles(path)
        program = torch.export.load(path)
        if device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        return program.module(check_guards=False)
    except (AssertionError, RuntimeError) as error:
        if device != "cpu":
            first = str(error).splitlines()[0]
            raise ConfigError(f"the device {device!r} cannot be used: {first}", hint="Use --device cpu.") from error
        raise _damaged(path, error) from error
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError) as error:
        raise _damaged(path, error) from error


def _check_pickles(path: Path) -> None:
    """Refuse pickles of anything but tensors: torch.export.load would run them."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("_config.json"):
                config = json.loads(archive.read(name))
                pickled = [entry["path_name"] for entry in config["config"].values() if entry["use_pickle"]]
                if pickled:
                    raise ModelFileError(f"holds a pickle ({pickled[0]}), which can run code", where=path)
            elif name.endswith(".pt") and archive.getinfo(name).file_size:
                try:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                except pickle.UnpicklingError as error:
                    raise ModelFileError(f"holds a pickle ({name}), which can run code", where=path) from error


def _damaged(path: Path, error: Exception) -> ModelFileError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelFileError(f"the program cannot be loaded: {lines[0]}", where=path, hint=EXPORT_AGAIN)
