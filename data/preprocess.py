"""Turn stored pixels into the backbone's input, in the same way in training, evaluation and inference."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data.images import to_canvas

CHANCES = 6  # random numbers per picture: whether it is mirrored, and the arguments of `affine_maps`


@functools.cache
def _affine(mean: tuple, std: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and shift (3, 1, 1) with `(x / 255 - mean) / std == x * scale + shift`; cached: copies to a GPU wait."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


@dataclass(frozen=True)
class Preprocess:
    """uint8 pixels -> normalised input of the backbone, whole batches at a time on the device they are on.

    The aspect ratio is not kept: articles fill catalogue pictures, so a centre crop would cut them off.

    Args:
        canvas: (height, width) the pictures are stored at.
        size: (height, width) the backbone reads.
        interpolation: "bicubic" or "bilinear", the backbone's own.
        mean, std: per channel, of pixels in 0..1.
    """

    canvas: tuple[int, int]
    size: tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self):
        for name in ("canvas", "size", "mean", "std"):  # JSON gives lists; tuples compare and hash
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_canvas(self, image: Image.Image) -> np.ndarray:
        """RGB image -> uint8 (H, W, 3), exactly as the store keeps it."""
        return to_canvas(image, self.canvas)

    def __call__(self, pixels: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
        """pixels uint8 (B, H, W, 3), flip bool (B,), which pictures to mirror -> float32 (B, 3, *size)."""
        x = pixels.permute(0, 3, 1, 2)  # (B, 3, H, W), a channels-last view
        if flip is not None:  # before the resize, where the pixels are fewest
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        if x.shape[-2:] != self.size:
            resize = functools.partial(F.interpolate, size=self.size, mode=self.interpolation, antialias=True)
            # Antialiasing uint8 is a fast path of the CPU only; elsewhere floats are resized and rounded to the same.
            x = resize(x) if x.device.type == "cpu" else resize(x.float()).round_().clamp_(0, 255)
        scale, shift = _affine(self.mean, self.std, x.device)
        return torch.addcmul(shift, x.float(), scale)

    def augmented(self, pixels: torch.Tensor, chance: torch.Tensor, warp: float = 0.0) -> torch.Tensor:
        """pixels uint8 (B, H, W, 3) -> float32 (B, 3, *size) to train on: half of them mirrored, and all warped.

        Colours are not changed, since colour is a label.

        Args:
            chance: (`CHANCES`, B), drawn uniformly from [0, 1), which decides the changes of each picture.
            warp: the most by which a picture's sides are stretched (as a share), and it is turned (in radians) and
                shifted (as a share of half its side).
        """
        flip, *changes = chance
        images = self(pixels, flip=flip < 0.5)
        if not warp:
            return images
        maps = affine_maps(*(warp * (2 * change - 1) for change in changes))
        grid = F.affine_grid(maps, images.shape, align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def affine_maps(
    across: torch.Tensor, down: torch.Tensor, turn: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Stretch of both sides, turn and shift, (B,) each, -> (B, 2, 3) maps as `F.affine_grid` takes them."""
    cos, sin = turn.cos(), turn.sin()
    rows = [(1 + across) * cos, -(1 + down) * sin, x], [(1 + across) * sin, (1 + down) * cos, y]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
