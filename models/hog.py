"""Where the edges of a picture lie and which way they run, whatever its colours.

Histograms of oriented gradients (Dalal and Triggs 2005, https://inria.hal.science/inria-00548512), first of the whole
picture, then of the article alone, which is cropped and stretched to the same size so that margins do not matter.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 56  # pixels of a view, across and down
CELL = 8  # pixels, across and down, whose edges are counted together
DIRECTIONS = 8  # over half a turn; an edge is divided between the two nearest, by its distance to each
PLAIN = 0.15  # difference in normalised pixels (19 of 255 for a std of 0.5) below which a pixel is background
FAINT = 0.01  # added to what histograms are divided by, so that faint edges are not amplified
WIDTH = 2 * DIRECTIONS * (SIDE // CELL) ** 2


def hog(images: Tensor) -> Tensor:
    """images (B, 3, H, W), normalised -> (B, WIDTH), fp32; each half is scaled to a mean square of 1, so contrast does
    not count. If H and W are multiples of 112, no pixel is ignored."""
    grey = images.float().mean(1, keepdim=True)
    grey = F.avg_pool2d(grey, [max(1, round(side / (2 * SIDE))) for side in grey.shape[2:]])
    box = article(grey)
    whole = torch.stack([torch.zeros_like(box[..., 0]), torch.ones_like(box[..., 1])], dim=-1)
    return torch.cat([histograms(sample(grey, boxes)) for boxes in (whole, box)], dim=1)


def article(grey: Tensor) -> Tensor:
    """(B, 1, H, W) -> (B, 2, 2), the box around all that is not background: (down, across) by (begin, end), as shares.
    Pixels about as bright as the median of the picture's border are background."""
    x = grey[:, 0]
    border = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], dim=1).sort(1).values
    median = border[:, border.shape[1] // 2]  # ONNX has no median
    differs = (x - median[:, None, None]).abs() > PLAIN
    return torch.stack([extent(differs.any(2)), extent(differs.any(1))], dim=1)


def extent(there: Tensor) -> Tensor:
    """(B, n) whether something is there -> (B, 2), where it begins and ends, as shares; (0, 1) where nothing is."""
    n = there.shape[1]
    at = torch.arange(n, device=there.device)
    begin, end = at.where(there, n).amin(1), at.where(there, -1).amax(1) + 1
    nothing = begin > end
    return torch.stack([begin.masked_fill(nothing, 0), end.masked_fill(nothing, n)], dim=1) / n


def sample(grey: Tensor, boxes: Tensor) -> Tensor:
    """Resample the boxes (B, 2, 2) of pictures (B, 1, H, W) to (B, 1, SIDE, SIDE)."""
    middles = (torch.arange(SIDE, device=grey.device) + 0.5) / SIDE
    y, x = torch.lerp(boxes[..., :1], boxes[..., 1:], middles).mul(2).sub(1).unbind(1)  # (B, SIDE), from -1 to 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(grey, grid, padding_mode="border", align_corners=False)


def histograms(view: Tensor) -> Tensor:
    """(B, 1, SIDE, SIDE) -> (B, DIRECTIONS * cells): the mean edge strength of each direction in each cell. Its square
    root is taken so that no single value dominates."""
    # At the outermost pixels only the change along the border counts.
    across, down = F.pad(view[..., 2:] - view[..., :-2], (1, 1)), F.pad(view[:, :, 2:] - view[:, :, :-2], (0, 0, 1, 1))
    strength = (across.square() + down.square()).sqrt()  # ONNX has no hypot
    turned = torch.atan2(down, across).remainder(math.pi) * (DIRECTIONS / math.pi)  # may round to DIRECTIONS itself
    before, beyond = turned.long() % DIRECTIONS, turned.frac()  # (B, 1, SIDE, SIDE)
    none = torch.zeros_like(view).repeat(1, DIRECTIONS, 1, 1)
    by_direction = none.scatter(1, before, (1 - beyond) * strength)
    by_direction = by_direction.scatter(1, (before + 1) % DIRECTIONS, beyond * strength)
    found = F.avg_pool2d(by_direction, CELL).flatten(1).sqrt()
    return found / (found.square().mean(1, keepdim=True).sqrt() + FAINT)
