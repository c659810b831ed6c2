"""Run an exported model with the runtime of its format, numpy in and out; only that runtime is imported."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from numpy.typing import NDArray

from videogru.errors import ConfigError, ModelFileError
from videogru.runtime.export_folder import (
    EXPORT_AGAIN,
    MODEL_FILES,
    NEXT,
    PACKAGES,
    ExportCard,
    file_sum,
    read_export_card,
)

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "torch", "tensorrt": "tensorrt"}

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Mapping[str, NDArray[Any]]], Arrays]
FrameArray = UInt8[np.ndarray, "B T C H W"] | Float32[np.ndarray, "B T C H W"]


class Exported:
    """A loaded export. threads: of the runtime, None for its default; device: auto, cpu, or cuda where it can."""

    def __init__(self, card: ExportCard, run: Run) -> None:
        self.card, self._run = card, run

    def probabilities(
        self, frames: FrameArray, lengths: Int64[np.ndarray, " B"], gaps: Float32[np.ndarray, "B T"] | None = None
    ) -> Float32[np.ndarray, "B K"]:
        """Of each class, for clips as the readers give them, padded at the end to the longest.

        A step graph reads their frames one by one.
        """
        given: Arrays = {"frames": frames, "lengths": lengths}
        if "gaps" in self.card.inputs or "gap" in self.card.inputs:
            if gaps is None:
                raise ValueError("this model reads the gaps between steps (model.use_gaps): give them")
            given["gaps"] = gaps
        said = self._frame_by_frame(given) if self.card.step else self._ran(given)["probabilities"]
        return self._of_the_labels(said)

    def _ran(self, given: Mapping[str, NDArray[Any]]) -> Arrays:
        """What the runtime says. Raises ModelFileError where it refuses: the card is of another model then."""
        try:
            return self._run(given)
        except MemoryError:
            raise
        except Exception as error:  # runtimes have many kinds, without a common parent
            lines = str(error).strip().splitlines() or [type(error).__name__]
            what = f"the model does not take what its card says: {lines[0]}"
            raise ModelFileError(what, where=self.card.folder, hint=EXPORT_AGAIN) from error

    def _of_the_labels(self, said: NDArray[Any]) -> Float32[np.ndarray, "B K"]:
        if said.shape[-1] != len(self.card.labels):
            what = f"the model gives {said.shape[-1]} probabilities, its card has {len(self.card.labels)} labels"
            raise ModelFileError(what, where=self.card.folder, hint=EXPORT_AGAIN)
        return np.asarray(said, dtype=np.float32)

    def _frame_by_frame(self, given: Arrays) -> NDArray[Any]:
        frames, lengths = given["frames"], given["lengths"]
        state = self.fresh_states(len(frames))
        answers = np.empty((len(frames), len(self.card.labels)), np.float32)
        for place in range(int(lengths.max())):
            gap = given["gaps"][:, place] if "gaps" in given else None
            said, state = self.step_on(frames[:, place], state, gap)
            ends = lengths == place + 1
            answers[ends] = said[ends]
        return answers

    def step_on(
        self,
        frame: UInt8[np.ndarray, "B C H W"] | Float32[np.ndarray, "B C H W"],
        state: Mapping[str, NDArray[Any]],
        gap: Float32[np.ndarray, " B"] | None,
    ) -> tuple[Float32[np.ndarray, "B K"], Arrays]:
        """Probabilities of streams after one more frame of each, and their states after it. gap: left out if unread."""
        given = {"frame": frame, **state}
        if "gap" in self.card.inputs:
            assert gap is not None
            given["gap"] = gap
        said = self.step(given)
        return self._of_the_labels(said["probabilities"]), {name: said[name + NEXT] for name in state}

    def step(self, given: Mapping[str, NDArray[Any]]) -> Arrays:
        """One frame of each stream and the states, by name, to probabilities and the states after it."""
        self._check_step()
        return self._ran({name: np.ascontiguousarray(array) for name, array in given.items()})

    def fresh_states(self, batch: int) -> Arrays:
        """The states of `batch` streams before their first frames. Raises ConfigError where it takes whole clips."""
        self._check_step()
        return {
            name: np.full((batch, *state["shape"]), state["fill"], dtype=state["type"])
            for name, state in self.card.states.items()
        }

    def _check_step(self) -> None:
        if not self.card.step:
            raise ConfigError(
                "this export takes whole clips", where=self.card.folder, hint="Export with --step for single frames."
            )


def open_exported(folder: Path, *, threads: int | None = None, device: str = "auto") -> Exported:
    """A loaded export, its files compared with the sums in its card.

    Raises ModelFileError where the folder is damaged, ConfigError where its runtime is missing or has no such device.
    """
    card = read_export_card(folder)
    if device not in ("auto", "cpu") and card.format != "pt2":
        raise ConfigError(f"exports to {card.format} do not run on {device!r}", hint="Use --device auto or cpu.")
    for name, wanted in card.files.items():
        try:
            if (folder / name).exists() and not (folder / name).is_file():
                raise ModelFileError("is no regular file", where=folder / name, hint=EXPORT_AGAIN)
            found = file_sum(folder / name)
        except OSError as error:
            raise ModelFileError(f"cannot be read: {error.strerror}", where=folder / name, hint=EXPORT_AGAIN) from error
        if found != wanted:
            raise ModelFileError("damaged: not the bytes that were exported", where=folder / name, hint=EXPORT_AGAIN)
    check_runtime(card)
    opened = {"onnx": _open_onnx, "openvino": _open_openvino, "pt2": _open_pt2, "tensorrt": _open_tensorrt}
    return Exported(card, opened[card.format](card, threads, device))


def check_runtime(card: ExportCard) -> None:
    """Raises ConfigError, with the line that installs it, where the package is missing that runs an export."""
    module = RUNTIMES[card.format]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"running this export needs the package {module}, which is not installed",
            where=card.folder,
            hint=PACKAGES[card.format][1],
        )


def _open_onnx(card: ExportCard, threads: int | None, device: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; a float node between quantized ones is no news
    # Without VNNI, products of uint8 and int8 are added in 16 bits, which overflow; with uint8 weights they do not.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    path = str(card.folder / MODEL_FILES["onnx"][0])
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has many kinds, without a common parent
        raise _not_loaded(card, error) from error
    names = [output.name for output in session.get_outputs()]
    return lambda given: dict(zip(names, session.run(None, dict(given)), strict=True))


def _open_openvino(card: ExportCard, threads: int | None, device: str) -> Run:
    import openvino

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    if card.precision == "fp32":
        # Else it computes in bfloat16 where the hardware has it.
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    try:
        model = openvino.Core().compile_model(card.folder / MODEL_FILES["openvino"][0], "CPU", settings)
    except Exception as error:
        raise _not_loaded(card, error) from error
    names = [output.get_any_name() for output in model.outputs]

    def run(given: Mapping[str, NDArray[Any]]) -> Arrays:
        # Copies: its buffers are overwritten by the next call.
        said = model(dict(given))
        return {name: np.array(said[place]) for place, name in enumerate(names)}

    return run


def _open_pt2(card: ExportCard, threads: int | None, device: str) -> Run:
    import torch

    from videogru.runtime.pt2 import load_program

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    program = load_program(card.folder / MODEL_FILES["pt2"][0], chosen)

    def run(given: Mapping[str, NDArray[Any]]) -> Arrays:
        tensors = [torch.from_numpy(np.ascontiguousarray(given[name])).to(chosen) for name in card.inputs]
        with torch.inference_mode():
            said = program(*tensors)
        said = said if isinstance(said, tuple | list) else (said,)
        return {name: tensor.float().cpu().numpy() for name, tensor in zip(card.outputs, said, strict=True)}

    return run


def _open_tensorrt(card: ExportCard, threads: int | None, device: str) -> Run:
    from videogru.runtime.tensorrt import load_engine

    return load_engine(card.folder / MODEL_FILES["tensorrt"][0])


def _not_loaded(card: ExportCard, error: Exception) -> ModelFileError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelFileError(f"the model cannot be loaded: {lines[0]}", where=card.folder, hint=EXPORT_AGAIN)
