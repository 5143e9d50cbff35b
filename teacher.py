"""An earlier model as a teacher: what it says of a picture counts beside the label (Hinton et al. 2015,
arXiv:1503.02531).

It sees each picture as training has just moved and mirrored it, since its answers help most where they are about what
the pupil sees (Beyer et al. 2022, arXiv:2106.05237); but all of its patches. Labels that are wrong, or could as well be
others, then pull less.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from lora import keep_base_in, merge_lora
from models.checkpoint import load_checkpoint, read_config


class Teacher:
    """Images of a run -> what a checkpoint's model says of them.

    Args:
        folder: the checkpoint's; of any backbone, and for any size of pictures.
        config: of the run that learns from it.
        weights: the run's own base weights, which a teacher on the same base shares.
        dtype: to compute in.

    Raises:
        UserError: there is no such checkpoint, it reads titles, or no class of it has the run's labels.
    """

    def __init__(self, folder: Path, config: dict, weights: Path | None, device: torch.device, dtype: torch.dtype):
        theirs = check_teacher(folder)
        same = theirs["backbone"]["fingerprint"] == config["backbone"]["fingerprint"]
        model, theirs = load_checkpoint(folder, weights if same else None)
        labels = {a["name"]: a["labels"] for a in theirs["attributes"] if a["kind"] == "class"}
        classes = {a["name"]: a["labels"] for a in config["attributes"] if a["kind"] == "class"}
        self.taught = {name: labels.get(name) == own for name, own in classes.items()}
        if not any(self.taught.values()):
            raise UserError(f"--teacher {folder}: none of its classes has the labels of this run")
        apart = [name for name, taught in self.taught.items() if not taught]
        print(f"learning from {folder} too" + (f", but not {', '.join(apart)}: its labels are others" if apart else ""))
        self.model, self.dtype = merge_lora(model).to(device, dtype), dtype
        keep_base_in(self.model, dtype)
        self.size = theirs["preprocess"]["size"]
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(of["preprocess"][name], device=device)[:, None, None] for name in ("mean", "std")]
            for of in (theirs, config)
        )
        self.scale, self.shift = own_std / std, (own_mean - mean) / std  # (3, 1, 1), from the run's norm to its own

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor | None]:
        """images (B, 3, S, S), normalised for the run -> of each of the run's classes the probabilities (B, classes) in
        fp32, or None where the teacher has other labels."""
        if list(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        logits = self.model(torch.addcmul(self.shift, images, self.scale).to(self.dtype))
        return [logits[name].float().softmax(dim=-1) if taught else None for name, taught in self.taught.items()]


def check_teacher(folder: Path) -> dict:
    """The config of a checkpoint that can teach; before pictures are decoded, so that a mistake is told at once."""
    config = read_config(folder)
    if (inputs := config["inputs"]) != "image":
        raise UserError(f"--teacher {folder} reads titles (--inputs {inputs}); name one that looks at pictures")
    return config
