"""What ends a command with one line, whichever command it is."""

import errno
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data.schema import FASHION
from errors import exits_cleanly
from options import parse_args
from runs import options_text


@exits_cleanly
def raising(error: Exception):
    raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/home/a/x"), "/home/a/x: Permission denied; name another"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "cannot write x: No space left on device; make room"),
        (MemoryError(), "out of memory; "),
        (type("OfNumpy", (MemoryError,), {})(), "out of memory; "),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; "),
        (RuntimeError("CUDA error: out of memory"), "out of memory; "),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory; "),
    ],
)
def test_what_the_machine_refuses_is_one_line(capsys, error, said):
    with pytest.raises(SystemExit) as ended:
        raising(error)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), FileNotFoundError(errno.ENOENT, "no", "x")])
def test_what_is_a_mistake_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        raising(error)


def test_a_run_keeps_the_names_of_paths_that_are_no_utf_8():
    args = parse_args(["--data", "caf\udce9", "--weights", "/tmp/caf\udce9"])
    assert json.loads(options_text(args).encode().decode())["weights"] == "/tmp/caf\udce9"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train.py", ["--data", "{long}"]),
        ("train.py", ["--data", "demo", "--out", "{long}"]),
        ("train.py", ["--data", "demo", "--weights", "{long}", "--out", "{here}/run"]),
        ("train.py", ["--data", "demo", "--out", "{here}/caf\udce9"]),
        ("evaluate.py", ["--data", "demo", "--checkpoint", "{long}"]),
        ("infer.py", ["{here}/a.png", "--checkpoint", "{long}"]),
        ("infer.py", ["{here}/a.png", "--out", "{long}/labels.csv"]),
        ("export.py", ["--to", "timm", "--out", "{long}/x.safetensors"]),
        ("train.py", ["--data", "{here}/caf\udce9.parquet", "--out", "{here}/run"]),
        ("train.py", ["--data", "{here}/a.parquet", "--cache-dir", "{here}/caf\udce9", "--out", "{here}/run"]),
        ("pretrain_demo.py", ["--out", "{here}/gone/x.safetensors"]),
        ("pretrain_demo.py", ["--epochs", "0"]),
    ],
)
def test_a_path_that_cannot_even_be_asked_about(command, tmp_path, script, words):
    (tmp_path / "a.png").touch()
    (tmp_path / "caf\udce9.parquet").touch()
    image = pa.array([{"bytes": b"no picture", "path": None}])
    columns = {name: ["1"] for name in ("id", "productDisplayName", *(a.column for a in FASHION))}
    pq.write_table(pa.table(columns | {"image": image}), tmp_path / "a.parquet")
    done = command(script, *(word.format(long=tmp_path / ("x" * 300), here=tmp_path) for word in words), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "no run is left of what never began"
