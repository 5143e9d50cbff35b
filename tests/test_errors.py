"""What ends a command with one line, whichever command it is."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data.schema import FASHION
from durable import replace_file
from errors import UserError, exits_cleanly
from options import parse_args
from output import table
from runs import options_text

ROOT = Path(__file__).parents[1]


@exits_cleanly
def raising(error: Exception):
    raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/home/a/x"), "/home/a/x: Permission denied; name another"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "cannot write x: No space left on device; make room"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory; "),
        (OSError(errno.ESTALE, "Stale file handle", "x"), "x: Stale file handle; start again"),
        (MemoryError(), "out of memory; "),
        (type("OfNumpy", (MemoryError,), {})(), "out of memory; "),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; "),
        (RuntimeError("CUDA error: out of memory"), "out of memory; "),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "out of memory; "),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory; "),
    ],
)
def test_what_the_machine_refuses_is_one_line(capsys, error, said):
    with pytest.raises(SystemExit) as ended:
        raising(error)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_a_strangers_name_in_a_message_starts_no_line_and_moves_no_cursor(capsys):
    with pytest.raises(SystemExit):
        raising(UserError("a\nerror: all good\x1b[2J.jpg is not whole"))
    assert capsys.readouterr().err == "error: a error: all good [2J.jpg is not whole\n"
    assert table({"image": "a\r\x9b2Jb.jpg", "error": "x\ny"}) == "a  2Jb.jpg: x y\n"


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
        ("infer.py", ["{here}/a.png", "--checkpoint", "{run}/best", "--out", "{long}/labels.csv"]),
        ("export.py", ["--checkpoint", "{run}/best", "--to", "timm", "--out", "{long}/x.safetensors"]),
        ("train.py", ["--data", "{here}/caf\udce9.parquet", "--out", "{here}/run"]),
        ("train.py", ["--data", "{here}/a.parquet", "--cache-dir", "{here}/caf\udce9", "--out", "{here}/run"]),
        ("pretrain_demo.py", ["--out", "{here}/gone/x.safetensors"]),
        ("pretrain_demo.py", ["--epochs", "0"]),
    ],
)
def test_a_path_that_cannot_even_be_asked_about(command, demo_run, tmp_path, script, words):
    (tmp_path / "a.png").touch()
    (tmp_path / "caf\udce9.parquet").touch()
    image = pa.array([{"bytes": b"no picture", "path": None}])
    columns = {name: ["1"] for name in ("id", "productDisplayName", *(a.column for a in FASHION))}
    pq.write_table(pa.table(columns | {"image": image}), tmp_path / "a.parquet")
    places = {"long": tmp_path / ("x" * 300), "here": tmp_path, "run": demo_run}
    done = command(script, *(word.format(**places) for word in words), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert "no run under" not in done.stderr, "it was about the path"
    assert not (tmp_path / "run").exists(), "no run is left of what never began"


def test_a_link_to_a_file_stays_one(tmp_path):
    (tmp_path / "there.json").write_text("of before")
    (tmp_path / "here.json").symlink_to(tmp_path / "there.json")
    replace_file(tmp_path / "here.json", b"new")
    assert (tmp_path / "here.json").is_symlink() and (tmp_path / "there.json").read_text() == "new"


def test_a_stream_that_the_shell_closed_is_no_error(command, demo_run, tmp_path):
    """`>&-` and `2>&-`: the answers are in the file, and nobody reads what is printed."""
    subprocess.run([sys.executable, "-m", "data.demo", "--out", tmp_path / "shop", "--rows", "2"], cwd=ROOT, check=True)
    words = f"{sys.executable} infer.py {tmp_path}/shop/images --checkpoint {demo_run}/best --out {tmp_path}/"
    done = subprocess.run(f"{words}labels.csv >&- 2>&-", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 3
    script = (
        "import sys; from errors import exits_cleanly; exits_cleanly(lambda: print(1) or print(1, file=sys.stderr))()"
    )
    for closed, said in ((">&-", "1\n"), ("2>&-", "1\n")):
        words = f"{sys.executable} -c '{script}' {closed}"
        done = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout + done.stderr) == (0, said)
