"""What a run takes where nothing was said."""

import itertools
from types import SimpleNamespace

import pytest
import torch

import defaults
from defaults import choose_amp


@pytest.mark.parametrize(("bf16", "fp32", "wanted"), [(1, 2, "bf16"), (2, 1, None)])
def test_amp_alone_is_what_the_cpu_is_fast_at(monkeypatch, capsys, bf16, fp32, wanted):
    ticks = itertools.accumulate([0, bf16] * 8 + [0, fp32] * 8)
    monkeypatch.setattr(defaults, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert choose_amp(torch.device("cpu")) == wanted
    assert ("no fast bf16" in capsys.readouterr().err) == (wanted is None)


@pytest.mark.parametrize(("has_bf16", "wanted"), [(True, "bf16"), (False, "fp16")])
def test_amp_alone_is_what_the_gpu_has(monkeypatch, has_bf16, wanted):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_amp(torch.device("cuda")) == wanted
