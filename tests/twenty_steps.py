"""What each process of `test_distributed.py` runs: 20 steps of `train_step` in fp64 on its share of every micro-batch.

Argument: where the first process writes what trains after each step.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

sys.path.insert(0, str(Path(__file__).parents[1]))

import distributed
from models.checkpoint import trained_params
from step import parameter_groups, train_step
from tests.test_step import batch, in_double, tiny_model


def main(out: str) -> None:
    with distributed.joined():
        model, after = tiny_model(), {}
        model.register_buffer("theirs", torch.tensor(distributed.rank()))
        parallel = distributed.in_step(model)
        assert model.theirs == 0, "a base in 8 bits would be the first process's in all of them"
        exchanged = []  # the model's gradients fit one bucket

        def noted(group, bucket):
            exchanged.append(step)
            return allreduce_hook(group, bucket)

        if distributed.world() > 1:
            parallel.register_comm_hook(None, noted)
        params = trained_params(model)
        optimizer = torch.optim.AdamW(parameter_groups(params), fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for step in range(20):
            whole = [batch(rows, 2 * step + number) for number, rows in enumerate((6, 1))]
            shares = [type(micro)(*map(distributed.share, micro)) for micro in whole]
            window = [mine if len(mine.labels) else all.unlabelled() for mine, all in zip(shares, whole, strict=True)]
            train_step(parallel, window, optimizer, scaler, 1e-3, None, in_double)
            after |= {f"{step}/{name}": p.detach().clone() for name, p in params.items()}
        assert exchanged == (list(range(20)) if distributed.world() > 1 else []), "once in a window of two"
        if distributed.first():
            save_file(after, out)


if __name__ == "__main__":
    main(sys.argv[1])
