"""Fewer patches: a product photo is half background, and a ViT works as hard on an empty patch as on a full one."""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def forward_features(backbone: VisionTransformer, images: Tensor, keep: float = 1.0, drop: float = 0.0) -> Tensor:
    """timm's `forward_features`, computed only on the share `keep` of each picture's patches that has most contrast.

    A patch token carries its position, so the other patches can be left out, as in masked autoencoders (He et al. 2022,
    arXiv:2111.06377); where the empty patches are follows from where the kept ones are not.

    Args:
        images: (B, 3, S, S), normalised, in fp32 whatever the backbone computes in.
        drop: share of those patches to leave out by chance, for training: less work, and harder to learn by heart
            (PatchDropout, Liu et al. 2022, arXiv:2208.07220).

    Returns:
        (B, prefix + K, d) tokens after the last norm, with K = (1 - drop) · keep · number of patches, at least 1.
    """
    seen = images.to(next(backbone.patch_embed.parameters()).dtype)  # contrast is measured before rounding
    if keep == 1 and not drop:
        return backbone.forward_features(seen)
    tokens = backbone._pos_embed(backbone.patch_embed(seen))  # (B, prefix + patches, d)
    prefix, patches = tokens.tensor_split([backbone.num_prefix_tokens], dim=1)
    if keep < 1:
        chosen = by_contrast(images, backbone.patch_embed.grid_size)[:, : max(1, round(keep * patches.shape[1]))]
    else:
        chosen = torch.arange(patches.shape[1], device=images.device).expand(len(images), -1)
    if drop:
        order = torch.rand(chosen.shape, device=chosen.device).argsort(dim=1)
        chosen = chosen.gather(1, order[:, : max(1, round((1 - drop) * chosen.shape[1]))])
    patches = patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[-1]))
    return backbone.norm(backbone.blocks(backbone.norm_pre(torch.cat([prefix, patches], dim=1))))


def by_contrast(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, 3, S, S) -> (B, patches) patch indices, those with the greatest difference within one channel first."""
    side = [size // count for size, count in zip(images.shape[2:], grid, strict=True)]  # in a hybrid not the patch size
    highest, lowest = F.max_pool2d(images, side), -F.max_pool2d(-images, side)
    contrast = (highest - lowest).amax(1).flatten(1)  # (B, patches)
    return contrast.argsort(dim=1, descending=True, stable=True)
