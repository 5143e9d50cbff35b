"""export.py: the merged backbone in timm, PEFT's files, and its errors. PEFT and onnxruntime: tests/interchange."""

import errno
import json
import os
import re
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

from models.backbone import DEMO_WEIGHTS
from models.checkpoint import load_checkpoint


def test_timm_takes_the_merged_weights_strictly(command, demo_run, tmp_path):
    done = command(
        "export.py", "--checkpoint", demo_run / "best", "--to", "timm", "--out", "b.safetensors", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    printed = re.search(r"timm\.create_model\('(\w+)', (.+?)\)\.load", done.stdout)
    options = {key: int(value) for key, value in (word.split("=") for word in printed[2].split(", "))}
    plain = timm.create_model(printed[1], **options).eval()  # as the command says
    plain.load_state_dict(load_file(tmp_path / "b.safetensors"), strict=True)
    model, _ = load_checkpoint(demo_run / "best")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(plain(images), model.backbone(images), rtol=1e-4, atol=1e-4)


def test_peft_gets_its_two_files(command, demo_run, tmp_path):
    for words, name in (([], "layers.3.mlp.fc2"), (["--old-names"], "encoder.layer.3.output.dense")):
        done = command(
            "export.py", "--checkpoint", demo_run / "best", "--to", "peft", "--out", "adapter", *words, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
        assert len(config["target_modules"]) == 4 * 6
        assert name in config["target_modules"]
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert tensors[f"base_model.model.{name}.lora_B.weight"].shape == (128, 16)


def test_on_a_full_disk_both_files_of_an_earlier_export_stay(command, demo_run, tmp_path, monkeypatch):
    words = ("export.py", "--checkpoint", demo_run / "best", "--to", "peft", "--out", tmp_path / "adapter")
    assert command(*words).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def full(tensors, metadata):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("export.tensor_bytes", full)
    done = command(*words, "--old-names")
    assert (done.returncode, "No space left on device" in done.stderr.splitlines()[-1]) == (2, True), done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "timm", "--out", "model.bin"], "--out model.bin: --to timm makes a .safetensors"),
        (["--to", "peft", "--out", "a.onnx"], "--out a.onnx: --to peft makes a folder, without a suffix"),
        (["--to", "timm", "--out", "no/such/b.safetensors"], "cannot write --out no/such/b.safetensors"),
        (["--to", "tflite", "--out", "x"], "invalid choice: 'tflite'"),
        (["--to", "peft", "--out", "taken"], "--out taken: it is a file, and --to peft makes a folder"),
        (["--to", "timm", "--out", "base.safetensors"], "--out base.safetensors would replace what is read"),
        (["--to", "timm", "--out", "{run}/best/adapter.safetensors"], "adapter.safetensors would replace what is read"),
        (
            ["--to", "onnx", "--out", "table.onnx"],
            "--out table.onnx: table.json is there already",
        ),
        (
            ["--to", "timm", "--out", "folder.safetensors"],
            "cannot write --out folder.safetensors: it is a folder",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_2(command, demo_run, tmp_path, words, message):
    (tmp_path / "taken").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "table.json").touch()
    shutil.copy(DEMO_WEIGHTS, tmp_path / "base.safetensors")
    words = ["--weights", "base.safetensors", *(word.format(run=demo_run) for word in words)]
    done = command("export.py", "--checkpoint", demo_run / "best", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
