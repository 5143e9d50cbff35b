"""Scripts of the project in several processes, started by torchrun as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1")


def torchrun(processes: int, *words, restarts: int = 0) -> subprocess.Popen:
    """Start a script of the project in so many processes, whose output comes together."""
    command = (*TORCHRUN, "--nproc-per-node", processes, "--max-restarts", restarts, *words)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # of which there may be too few
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its own
        raise
    return process.returncode, said


def run(processes: int, *words, **how) -> str:
    code, said = finish(torchrun(processes, *words, **how))
    assert code == 0, said
    assert "FutureWarning" not in said, "nothing that a user can do about it"
    return said
