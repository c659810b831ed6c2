"""Axis legend and shape aliases; tests execute them (pytest --jaxtyping-packages=videogru,beartype.beartype).

B  batch          T  frames, slices or images of a clip     S  steps the recurrent part reads
C  channels       H, W  height and width in pixels          D  features of one step (encoder)
K  classes        h, w  height and width of feature maps    F  features of one step (after the recurrent part)

Frames are uint8 in 0..255 (video, stills) or float32 in 0..1 (volumes, after their intensity window).
"""

from jaxtyping import Float, Float32, Float64, Int64, UInt8
from torch import Tensor

ClipFrames = UInt8[Tensor, "T C H W"] | Float32[Tensor, "T C H W"]
# Of another size or other channels than the frames they were made from.
MadeFrames = UInt8[Tensor, "T C2 H2 W2"] | Float32[Tensor, "T C2 H2 W2"]
BatchFrames = UInt8[Tensor, "B T C H W"] | Float[Tensor, "B T C H W"]
StreamFrames = UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"]  # one of each stream
Positions = Float64[Tensor, " T"]
Gaps = Float32[Tensor, "B T"]
Lengths = Int64[Tensor, " B"]
Labels = Int64[Tensor, " B"]
FeatureMaps = Float[Tensor, "B T D h w"]
Steps = Float[Tensor, "B S D"]
Logits = Float[Tensor, "B K"]
