"""The walk through lora/ points at the lines it speaks of, and its example runs."""

import re
from pathlib import Path

ROOM = Path(__file__).parents[2] / "lora"


def test_its_example_trains_and_merges(capsys):
    (example,) = re.findall(r"```python\n(.+?)```", (ROOM / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(example, names)  # ends by loading the merged weights, strictly, into the plain model
    pairs = 12 * 2 * 16 * (192 + 192)
    assert capsys.readouterr().out.startswith(f"trainable {pairs:,} / total ")
    trained = {name for name, p in names["vit"].named_parameters() if p.grad is not None}
    assert len(trained) == 12 * 2 * 2 + 2 and {"head.weight", "head.bias"} <= trained


def test_every_link_shows_the_code_it_names():
    links = re.findall(r"\[`(.+?)`\]\((\w+\.py)#L(\d+)\)", (ROOM / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 20
    for code, name, line in links:
        lines = (ROOM / name).read_text(encoding="utf-8").splitlines()
        found = [number for number, text in enumerate(lines, 1) if code in text]
        assert int(line) in found, f"{code!r} is not on line {line} of {name}, but on {found}"
