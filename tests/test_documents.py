"""What the documents name is there: files, headings, options."""

import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("lora", "models", "data", "report", "benchmarks", "tests", "docs", "adapters")
FILES = [*ROOT.glob("*.*"), *itertools.chain.from_iterable((ROOT / room).rglob("*.*") for room in ROOMS)]
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in sorted(FILES) if path.suffix == ".md"}
OTHERS = {  # options of torchrun, pip, tensorboard and argparse itself
    *("standalone", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "max-restarts"),
    *("force-reinstall", "logdir", "help"),
}


@pytest.fixture(params=DOCUMENTS)
def document(request) -> Path:
    return DOCUMENTS[request.param]


def anchors(text: str) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(document):
    for path, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", document.read_text(encoding="utf-8")):
        target = document.parent / path if path else document
        assert target.exists(), path
        if target.suffix == ".md" and anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def test_options_exist(document):
    scripts = [path for path in FILES if path.suffix == ".py" and ROOT / "tests" not in path.parents]
    options = set(re.findall(r'"--([a-z0-9-]+)"', "".join(path.read_text(encoding="utf-8") for path in scripts)))
    said = re.findall(r"--(?:\[no-\]|no-)?([a-z0-9][a-z0-9-]+)", document.read_text(encoding="utf-8"))
    assert {name for name in said if not {name, f"no-{name}"} & options} <= OTHERS


def test_files_exist(document):
    said = set(re.findall(r"[\w./]*\b\w+\.(?:py|toml)\b", document.read_text(encoding="utf-8"))) - {"FILE.toml"}
    places = (document.parent, ROOT, ROOT / "tests" / "faults")  # the last of README's table of faults
    for name in said:
        alone = "/" not in name and any(path.name == name for path in FILES)
        assert alone or any((place / name).exists() for place in places), name
