"""The whole model, backbone -> embedding -> heads (and neighbours), and its loss over labels that are present."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads import HierarchicalHeads
from models.hog import hog
from models.neighbours import Alike
from models.patches import forward_features

TAUGHT = 0.5  # share of the loss that is the cross-entropy with a teacher's probabilities


class AttributeClassifier(nn.Module):
    """A (LoRA-adapted) backbone and hierarchical heads: images (B, 3, S, S) -> {attribute: logits (B, classes)}.

    The embedding (B, 2 d) joins the backbone's own (the CLS token in most ViTs) and the mean of its patch tokens: CLS
    attends selectively, the mean covers the whole picture, and in few epochs both train better than CLS alone.

    A model that reads titles appends its text encoder's output to this embedding, or uses only that output.

    Args:
        backbone: a timm `VisionTransformer` with `num_classes=0`.
        heads: they read twice the backbone's `num_features` (none if `blind`), plus the text encoder's width.
        keep_patches: share of the patches that the backbone sees, those with most contrast (see `models.patches`).
        text: encoder of the tokens (B, T) of titles.
        blind: ignore the pictures.

    Attributes:
        drop_patches: share of those patches that training drops at random; the training code sets it.
        neighbours: train pictures (see `models.neighbours`) or None; set when a checkpoint that has them is loaded.
            With them, class outputs are log-probabilities of the mixture, and numbers are mixed too.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: HierarchicalHeads,
        keep_patches: float = 1.0,
        text: nn.Module | None = None,
        blind: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.keep_patches = keep_patches
        self.drop_patches = 0.0
        self.text = text
        self.blind = blind
        self.neighbours = None

    def train(self, mode: bool = True) -> "AttributeClassifier":
        """As in any module, but `BatchNorm2d` layers, which a backbone with convolutions before its patches may have,
        stay in eval mode: their statistics belong to the frozen backbone and are not saved."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images: Tensor, tokens: Tensor | None = None) -> dict[str, Tensor]:
        return self.explained(images, tokens)[0]

    def explained(self, images: Tensor, tokens: Tensor | None = None) -> tuple[dict[str, Tensor], Alike | None]:
        """The outputs, and the neighbours that contributed to them if the model has neighbours."""
        embedding = self.embedding(images, tokens)
        logits = self.heads(embedding)
        if self.neighbours is None:
            return logits, None
        alike = self.neighbours.nearest(hog(images), embedding)
        return self.neighbours(alike, logits), alike

    def embedding(self, images: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The heads' input (B, D), made from pictures, titles or both."""
        parts = [] if self.blind else [*self.embed(images)]
        if self.text is not None:
            parts.append(self.text(tokens))
        return torch.cat(parts, dim=-1)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) -> the backbone's own embedding and the mean of its patches, (B, d) each."""
        drop = self.drop_patches if self.training else 0.0
        tokens = forward_features(self.backbone, images, self.keep_patches, drop)  # (B, prefix + patches, d)
        patches = self.backbone.fc_norm(tokens[:, self.backbone.num_prefix_tokens :].mean(1))  # (B, d)
        return self.backbone.forward_head(tokens), patches


def known_targets(labels: Tensor, numbers: Tensor) -> Tensor:
    """The number of labels (B, A) and numbers (B, M) that are present, for each attribute: (A + M,)."""
    return torch.cat([(labels >= 0).sum(0), numbers.isfinite().sum(0)])


def attribute_losses(
    outputs: dict[str, Tensor],
    labels: Tensor,
    known: Tensor | None = None,
    smoothing: float = 0.0,
    numbers: Tensor | None = None,
    taught: Sequence[Tensor | None] = (),
) -> Tensor:
    """The loss of each attribute over the rows whose value is present: cross-entropy for a class, Huber loss for a
    number (quadratic up to one standard deviation, then linear, so that a few extreme prices do not dominate).

    Args:
        outputs: {attribute: logits (B, classes), or (B, 1) of a number}, in the order of the columns of the targets.
        labels: (B, A) class indices; negative where the label is missing.
        known: (A + M,) how many values are present in the whole batch of the optimizer step; default: in this batch.
            Dividing by the count of the step makes micro-batches add up to the gradient of one big batch.
        smoothing: probability that is taken from the label and spread over all classes (Szegedy et al. 2016,
            arXiv:1512.00567): catalogues have wrong labels, and a model that is never sure memorises fewer.
        numbers: (B, M) in standard deviations, NaN where the number is missing; default: there are none.
        taught: for each class attribute, a teacher's probabilities (B, classes) or None. The cross-entropy with them
            has the weight `TAUGHT`, that with the label the rest. Rows without a label do not count in either.

    Returns:
        (A + M,) losses, in fp32, or in fp64 where the outputs are; their weighted sum is what training minimises. An
        attribute without a label gives 0, not NaN.
    """
    if numbers is None:
        numbers = torch.empty(len(labels), 0, device=labels.device)
    if known is None:
        known = known_targets(labels, numbers)
    classes = labels.shape[1]
    logits, guesses = list(outputs.values())[:classes], list(outputs.values())[classes:]
    sums = []
    for scores, target, said in zip(logits, labels.clamp(min=-1).unbind(1), taught or [None] * classes, strict=True):
        scores = at_least_float(scores)
        loss = F.cross_entropy(scores, target, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
        if said is not None:
            beside = F.cross_entropy(scores, said.to(scores.dtype), reduction="none")  # (B,)
            loss = loss.lerp((beside * (target >= 0)).sum(), TAUGHT)
        sums.append(loss)
    for guess, target in zip(guesses, numbers.unbind(1), strict=True):
        guess = at_least_float(guess.squeeze(1))
        sums.append(F.huber_loss(guess, target.where(target.isfinite(), guess.detach()), reduction="sum"))
    return torch.stack(sums) / known.clamp(min=1)


def at_least_float(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it already is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
