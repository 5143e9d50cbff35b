"""The whole model, backbone -> embedding -> heads, and its loss over labels that are present."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads import HierarchicalHeads
from models.patches import forward_features


class AttributeClassifier(nn.Module):
    """A (LoRA-adapted) backbone and hierarchical heads: images (B, 3, S, S) -> {attribute: logits (B, classes)}.

    The embedding is the backbone's own (of most ViTs the CLS token) beside the mean of its patch tokens, (B, 2 d): the
    mean has seen all of the picture where CLS chose, and few epochs get more from both than from CLS alone.

    Args:
        backbone: a timm `VisionTransformer` with `num_classes=0`.
        heads: for embeddings of twice the backbone's `num_features`.
        keep_patches: share of the patches that the backbone sees, those with most in them (see `models.patches`).
    """

    def __init__(self, backbone: nn.Module, heads: HierarchicalHeads, keep_patches: float = 1.0):
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.keep_patches = keep_patches

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = forward_features(self.backbone, images, self.keep_patches)  # (B, prefix + patches, d)
        patches = self.backbone.fc_norm(tokens[:, self.backbone.num_prefix_tokens :].mean(1))  # (B, d)
        return self.heads(torch.cat([self.backbone.forward_head(tokens), patches], dim=-1))


def attribute_losses(
    logits: dict[str, Tensor], labels: Tensor, known: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each attribute over the rows whose label is present.

    Args:
        logits: {attribute: (B, classes)}, in the order of the label columns.
        labels: (B, A) class indices; negative where the label is missing.
        known: (A,) how many labels are present in the batch that the optimizer step covers; default: in this one.
            Dividing by the step's own count makes micro-batches add up to the gradient of one big batch.
        smoothing: probability that is taken from the label and spread over all classes (Szegedy et al. 2016,
            arXiv:1512.00567): catalogues have wrong labels, and a model that is never sure learns fewer by heart.

    Returns:
        (A,) fp32 losses; their sum is what training minimises. An attribute without a label gives 0, not NaN.
    """
    if known is None:
        known = (labels >= 0).sum(0)
    targets = labels.clamp(min=-1).unbind(1)
    sums = [
        F.cross_entropy(scores.float(), target, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
        for scores, target in zip(logits.values(), targets, strict=True)
    ]
    return torch.stack(sums) / known.clamp(min=1)
