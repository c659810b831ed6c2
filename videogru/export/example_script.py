"""The example beside an exported model: a script that needs the runtime and numpy, and nothing of videogru."""

from videogru.runtime.export_folder import ExportCard

_HEAD = '''"""Class of a clip: python example.py FRAMES.npy{more}

FRAMES.npy holds raw frames {axes}, {values}; normalization is part of the model.
Needs: {needs}.
"""

import json
import sys
from pathlib import Path

import numpy as np
{imports}
if len(sys.argv) != {arguments}:
    sys.exit(__doc__)
folder = Path(__file__).parent
labels = json.loads((folder / "card.json").read_text(encoding="utf-8"))["labels"]
frames = np.load(sys.argv[1])
'''
_CLIP = """given = {"frames": frames[None], "lengths": np.array([len(frames)])}
"""
_GAPS = """given["gaps"] = np.load(sys.argv[2]).astype(np.float32)[None]  # (length): seconds or mm to the step before
"""
_SESSION = """{options}session = onnxruntime.InferenceSession(
    folder / "model.onnx"{given}, providers=["CPUExecutionProvider"]
)
"""
_RUN = {
    "onnx": _SESSION
    + """(probabilities,) = session.run(None, given)
""",
    "openvino": """model = openvino.Core().compile_model(folder / "model.xml", "CPU"{settings})
probabilities = model(given)[0]
""",
    "pt2": """program = torch.export.load(folder / "model.pt2").module(check_guards=False)
probabilities = program(*(torch.from_numpy(array) for array in given.values())).detach().numpy()
""",
    "tensorrt": """engine = load_engine(folder / "model.engine")
probabilities = engine(given)["probabilities"]
""",
}
# Without VNNI, products of uint8 and int8 are added in 16 bits, which overflow; with uint8 weights they do not.
_WIDE = """options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # right on processors without VNNI too
"""
_STEPS = {
    "onnx": _SESSION
    + """names = [output.name for output in session.get_outputs()]
read = lambda given: dict(zip(names, session.run(None, given)))
""",
    "openvino": """model = openvino.Core().compile_model(folder / "model.xml", "CPU"{settings})
names = [output.get_any_name() for output in model.outputs]
read = lambda given: {{name: np.array(model(given)[name]) for name in names}}
""",
}
_STREAM = """states = json.loads((folder / "card.json").read_text(encoding="utf-8"))["states"]
state = {name: np.full((1, *s["shape"]), s["fill"], dtype=s["type"]) for name, s in states.items()}
for place in range(len(frames)):
    said = read({"frame": frames[[place]], **state@GAP@})
    probabilities = said["probabilities"]
    state = {name: said[f"{name}.next"] for name in state}
"""
_STREAM_GAPS = """gaps = np.load(sys.argv[2]).astype(np.float32)  # (length): seconds or mm to the step before
"""
_TAIL = """best = int(probabilities[0].argmax())
print(f"{labels[best]} {probabilities[0, best]:.3f}")
"""
_IMPORTS = {
    "onnx": "import onnxruntime\n",
    "openvino": "import openvino\n",
    "pt2": "import torch\n",
    "tensorrt": "from videogru.runtime.tensorrt import load_engine\n",
}
_NEEDS = {
    "onnx": "pip install numpy onnxruntime",
    "openvino": "pip install numpy openvino",
    "pt2": "pip install numpy torch",
    "tensorrt": "pip install numpy tensorrt videogru",
}


def example_for(card: ExportCard) -> str:
    """The script for an exported model."""
    c, h, w = card.frame_shape
    values = "uint8 in 0..255" if card.frame_type == "uint8" else "float32 in 0..1"
    needs_gaps = bool({"gap", "gaps"} & set(card.inputs))
    head = _HEAD.format(
        more=" GAPS.npy" if needs_gaps else "",
        arguments=3 if needs_gaps else 2,
        axes=f"(length, {c}, {h}, {w})",
        values=values,
        needs=_NEEDS[card.format],
        imports=_IMPORTS[card.format],
    )
    settings = ', {"INFERENCE_PRECISION_HINT": "f32"}' if card.precision == "fp32" else ""
    options, given = (_WIDE, ", options") if (card.format, card.precision) == ("onnx", "int8") else ("", "")
    body = (_STEPS if card.step else _RUN)[card.format]
    body = body.format(settings=settings, options=options, given=given)
    if card.step:
        stream = _STREAM.replace("@GAP@", ', "gap": gaps[[place]]' if needs_gaps else "")
        return head + body + (_STREAM_GAPS if needs_gaps else "") + stream + _TAIL
    return head + _CLIP + (_GAPS if needs_gaps else "") + body + _TAIL
