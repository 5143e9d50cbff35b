"""The rooms import one way: lora needs torch alone, models needs lora, data knows of neither, report reads them all."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"lora", "models", "data", "report", "hub", "errors", "durable"}
TITLES = {"tokenizers", "huggingface_hub"}
MAY_IMPORT = {
    "lora": {"torch"},
    "models": {"torch", "timm", "safetensors", "huggingface_hub", "lora", "hub", "errors", "durable"},
    "report": {"torch", "numpy", "PIL", "jinja2", "data", "models", "calibration", "metrics", "durable", "memory"},
    "data": {"torch", "numpy", "PIL", "tqdm", "datasets", "huggingface_hub", "pyarrow", "hub", "errors", "durable"}
    | TITLES,
}

ASKED_FOR = {"onnx_ir", "onnxscript"}  # by export.py, which says what to install where it is missing


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports, relative imports and the standard library left out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_one_way(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) <= MAY_IMPORT[room] | {room}, path.name


def test_sharing_a_job_needs_no_model():
    assert not imported(ROOT / "jobs.py") & {"torch", "models", "lora", "labeller"}


def test_what_the_product_imports_is_listed():
    listed = {line.split(">")[0].lower() for line in (ROOT / "requirements.txt").read_text().split()}
    package = {"PIL": "pillow"}
    files = [*ROOT.glob("*.py"), *(path for room in MAY_IMPORT for path in (ROOT / room).glob("*.py"))]
    own = OURS | {path.stem for path in ROOT.glob("*.py")}
    for path in files:
        missing = {package.get(name, name) for name in imported(path) - own} - listed - ASKED_FOR
        assert not missing, f"{path.name} imports {missing}"
