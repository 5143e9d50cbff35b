import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.processes import finish, start


def outcome(run) -> dict:
    """All that a run leaves: every tensor, the metrics, and each scalar event but the speed, in the order written."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    return {
        "tensors": {name: load_file(run / name / "adapter.safetensors") for name in ("best", "last")}
        | {"optimizer": load_file(run / "last" / "optimizer.safetensors")},
        "metrics": (run / "metrics.json").read_text(),
        "events": {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if tag != "train/images_per_second"
        },
    }


def assert_same(run, whole) -> None:
    """Bit for bit."""
    a, b = outcome(run), outcome(whole)
    assert a["metrics"] == b["metrics"]
    assert a["events"] == b["events"]
    for name, tensors in b["tensors"].items():
        assert a["tensors"][name].keys() == tensors.keys()
        assert all(torch.equal(a["tensors"][name][key], tensor) for key, tensor in tensors.items()), name


@pytest.fixture(scope="session")
def options(cache_dir):
    """A run of 42 steps on drawings, saved every second step."""
    words = ("--data", "demo", "--limit", 400, "--epochs", 2, "--save-every", 2, "--batch-size", 16)
    return (*words, "--cache-dir", cache_dir)


@pytest.fixture(scope="session")
def whole(options, tmp_path_factory):
    """The folder of such a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    process = start("train", *options, "--out", folder / "run", log=folder / "log")
    assert finish(process) == 0, (folder / "log").read_text()
    return folder / "run"
