"""Another model as a teacher: what it says of a picture counts beside the label (Hinton et al. 2015, arXiv:1503.02531).

It sees each picture as training has just moved and mirrored it, since its answers help most where they are about what
the pupil sees (Beyer et al. 2022, arXiv:2106.05237); but with none of its patches dropped by chance. Labels that are
wrong, or could as well be others, then pull less.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from lora import keep_base_in, merge_lora
from models.checkpoint import load_checkpoint, read_config
from models.classifier import AttributeClassifier
from models.schema import labels_of


def load_teacher(
    folder: Path, weights: Path | None, pupil: dict, pupils_weights: Path | None
) -> tuple[AttributeClassifier, dict]:
    """A checkpoint that can teach: its model, without neighbours, and its config.

    Args:
        weights: its base weights; None takes the pupil's where they are the same, else what its run used, or the hub's.
        pupil: the config of the run that learns from it; only its `backbone` is read.

    Raises:
        UserError: there is no such checkpoint or no such weights, or it reads titles.
    """
    config = read_config(folder)
    if (inputs := config["inputs"]) != "image":
        raise UserError(f"--teacher {folder} reads titles (--inputs {inputs}); name one that looks at pictures")
    if config["backbone"]["fingerprint"] == pupil["backbone"]["fingerprint"]:
        weights = weights or pupils_weights
    try:
        model, config = load_checkpoint(folder, weights)
    except UserError as error:  # the pupil's own file is not what it asks for
        raise UserError(str(error).replace("--weights", "--teacher-weights")) from None
    model.neighbours = None  # of a picture that was just moved they would give its own label, which is given anyway
    return model, config


class Teacher:
    """Images of a run -> what a model says of them. It teaches the classes that have the same labels in both.

    Args:
        model, config: from `load_teacher`; of any backbone. Pictures come in the run's size and are brought to its own.
        pupil: the config of the run that learns from it.
        dtype: to compute in.

    Raises:
        UserError: it has the labels of none of the run's classes.
    """

    def __init__(self, model: AttributeClassifier, config: dict, pupil: dict, device: torch.device, dtype: torch.dtype):
        labels = labels_of(config)
        self.taught = {name: labels.get(name) == own for name, own in labels_of(pupil).items()}
        if not any(self.taught.values()):
            raise UserError("--teacher: it has the labels of none of this run's classes")
        self.model = merge_lora(model).to(device, dtype)
        keep_base_in(self.model, dtype)
        self.size = config["preprocess"]["size"]

        def norm(of: dict, name: str) -> Tensor:
            return torch.tensor(of["preprocess"][name], device=device)[:, None, None]  # (3, 1, 1)

        self.scale = norm(pupil, "std") / norm(config, "std")
        self.shift = (norm(pupil, "mean") - norm(config, "mean")) / norm(config, "std")

    def __str__(self) -> str:
        apart = [name for name, taught in self.taught.items() if not taught]
        return "learning from a teacher too" + (f", but not {', '.join(apart)}: it has other labels" if apart else "")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor | None]:
        """images (B, 3, S, S), normalised for the run -> for each of the run's classes the probabilities (B, classes)
        in fp32, or None where it is not taught."""
        if list(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        logits = self.model(torch.addcmul(self.shift, images, self.scale))
        return [logits[name].float().softmax(dim=-1) if taught else None for name, taught in self.taught.items()]
