"""Maps without a convolution: GRUs sweep over patches of pixels, across and then down, both ways."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, autocast, nn

from videogru.models.cells.cells import init_gates


class Sweep(nn.Module):
    """Maps (N C H W) -> (N D h w), D = 2 * hidden_size, h = H / patch: every cell has seen the whole map.

    The pixels of a patch are one step. A bidirectional GRU reads each row of patches, a second one each column of what
    the first gives; their normalized states are added. After ReNet (Visin et al. 2015, arXiv:1505.00393, section 2),
    which has neither the sum nor the LayerNorm. Edges that do not fill a patch are padded with zeros. Runs in float32
    at least, also under autocast.
    """

    def __init__(self, in_channels: int, hidden_size: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.across = _gru(in_channels * patch * patch, hidden_size)
        self.across_norm = nn.LayerNorm(2 * hidden_size)
        self.down = _gru(2 * hidden_size, hidden_size)
        self.down_norm = nn.LayerNorm(2 * hidden_size)

    def forward(self, maps: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D h w"]:
        """States of the cells, from all four sides."""
        size = self.patch
        device = "cpu" if maps.is_meta else maps.device.type  # autocast knows no meta device
        with autocast(device, enabled=False):
            maps = maps.to(next(self.parameters()).dtype)
            maps = nn.functional.pad(maps, (0, -maps.shape[-1] % size, 0, -maps.shape[-2] % size))
            cells = rearrange(maps, "n c (h p) (w q) -> n h w (c p q)", p=size, q=size)
            n, h, w = cells.shape[:3]
            rows = self.across_norm(self.across(cells.flatten(0, 1))[0])
            columns = rearrange(rows, "(n h) w d -> (n w) h d", n=n)
            columns = self.down_norm(self.down(columns)[0])
            rows = rearrange(rows, "(n h) w d -> n d h w", h=h)
            both: Tensor = rows + rearrange(columns, "(n w) h d -> n d h w", w=w)
            return both


def _gru(input_size: int, hidden_size: int) -> nn.GRU:
    layer = nn.GRU(input_size, hidden_size, batch_first=True, bidirectional=True)
    init_gates(layer, 3)
    return layer
