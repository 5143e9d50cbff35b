"""The walk through lora/ points at the lines it speaks of."""

import re
from pathlib import Path

ROOM = Path(__file__).parents[2] / "lora"


def test_every_link_shows_the_code_it_names():
    links = re.findall(r"\[`(.+?)`\]\((\w+\.py)#L(\d+)\)", (ROOM / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 20
    for code, name, line in links:
        lines = (ROOM / name).read_text(encoding="utf-8").splitlines()
        found = [number for number, text in enumerate(lines, 1) if code in text]
        assert int(line) in found, f"{code!r} is not on line {line} of {name}, but on {found}"
