"""One step of training: the gradient of a window of micro-batches, clipped, and AdamW's update.

A *micro-batch* is one forward and backward, shared by all processes; a *window* is `--accum` of them; a *step* is the
optimizer update that ends a window.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn

import distributed
from data.batches import Batch
from models.classifier import attribute_losses, known_targets
from runs import StopRequest

T = TypeVar("T")
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
WARMUP = 0.05  # share of all steps


def parameter_groups(params: Mapping[str, nn.Parameter], lora_plus: float = 1.0, decay_lora: bool = True) -> list[dict]:
    """Parameters in groups: weight decay on matrices, none on biases, norms and DoRA's lengths.

    Args:
        lora_plus: ratio of B's learning rate to that of all others: LoRA+ (Hayou et al. 2024, arXiv:2402.12354).
        decay_lora: False where A and B start as a part of the pretrained weight (PiSSA), which decay would shrink.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in params.items():
        decayed = p.ndim > 1 and (decay_lora or not name.endswith(("lora_A", "lora_B")))
        decay, ratio = WEIGHT_DECAY if decayed else 0.0, lora_plus if name.endswith("lora_B") else 1.0
        groups.setdefault((decay, ratio), []).append(p)
    return [{"params": some, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), some in groups.items()]


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up, then a cosine to zero: a function of the step alone."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def windows(batches: Iterable[T], accum: int) -> Iterator[list[T]]:
    """Micro-batches, or their rows, in groups of `accum`; the last group of an epoch may be shorter."""
    batches = iter(batches)
    while window := list(islice(batches, accum)):
        yield window


def train_step(
    model,
    window: list[Batch],
    optimizer,
    scaler,
    lr: float,
    amp: torch.dtype | None,
    prepare: Callable[[Tensor], Tensor],
    *,
    smoothing: float = 0.0,
    stop: StopRequest | None = None,
    weights: Tensor | None = None,
    teacher: Callable[[Tensor], Sequence[Tensor | None]] | None = None,
) -> Tensor | None:
    """One optimizer update over a window of micro-batches, of which each process has its share.

    Args:
        model: the classifier, or what `in_step` made of it.
        prepare: pixels -> images (B, 3, S, S), augmented, on the device.
        smoothing: label smoothing, see `attribute_losses`.
        weights: (A,) weight of each attribute's loss; default: all 1.
        teacher: images -> further targets for each class, see `attribute_losses`.

    Returns:
        the window's loss of each attribute and, last, the gradient norm before clipping, (A + 1,), still on the device;
        where one of them is not finite, the update was not made. None where a stop was asked for within the window.
    """
    device = next(model.parameters()).device
    # The mean is over the labels present in the whole window: gradients equal those of one big batch.
    window = [batch.to(device) for batch in window]
    known = distributed.total(sum(known_targets(batch.labels, batch.numbers) for batch in window))  # (A,)
    losses = torch.zeros(len(known), device=device)
    for number, batch in enumerate(window, 1):
        images = prepare(batch.pixels)  # not under autocast, which would place warped pixels in bf16
        taught = teacher(images) if teacher else ()
        with distributed.exchange(model, now=number == len(window)):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                outputs = model(images, batch.tokens)
            micro = attribute_losses(outputs, batch.labels, known, smoothing, batch.numbers, taught)
            loss = (micro if weights is None else micro * weights).sum()
            # The exchange gives the mean over processes, and the window's gradient is their sum.
            scaler.scale(loss * distributed.world()).backward()
        losses += micro.detach()
        if stop and number < len(window) and distributed.any_of(stop.made):  # resuming takes the whole window again
            return None
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
    scaler.unscale_(optimizer)  # before clipping: the norm is the true gradient's
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], MAX_GRAD_NORM)
    figures = torch.cat([distributed.total(losses), norm[None]])
    # Fused AdamW reads this on the device and leaves weights and state alone where it is 1: no wait to look at a loss.
    optimizer.found_inf = (~figures.isfinite().all()).float()
    optimizer.step()  # not by the scaler, which would put its own `found_inf` there: that of gradients alone
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return figures
