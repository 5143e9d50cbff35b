"""One job shared by any number of processes, on one machine or many, through the files of a folder alone.

    DIR/job.json              what the job is: another one on the same folder is refused
    DIR/labels/00012.parquet  the answers of shard 12, there only when whole and on the disk
    DIR/locks/00012           held by whoever works on shard 12, until it is done or its process ends, however it ends

A process walks over the shards and takes one that is neither done nor held. Once it holds the shard, it checks again,
as another may just have finished it; so nothing is done twice. To continue a killed job, start it again.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data.shards import Shard
from durable import claim, replace_file
from errors import UserError, first_line, make_folder, told
from output import Output

FORMAT = 1  # of a job's folder
PAUSE = 1.0  # seconds between looks at what others do


class Crew(NamedTuple):
    """Which of how many processes this is, over all machines."""

    rank: int
    size: int

    @classmethod
    def of_torchrun(cls) -> "Crew":
        """As torchrun says; without torchrun, the first and only process."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


class Tally(NamedTuple):
    rows: int
    errors: int


class Job:
    """Args:
        folder: the job's; made if it is not there.
        facts: all that answers depend on; must be the same in all processes on the folder.
        shards: the work; the same list in each process.
        attributes: the checkpoint's.

    Raises:
        UserError: the folder is another job's, or cannot be written.
    """

    def __init__(self, folder: Path, facts: dict, shards: list[Shard], attributes: list[dict], crew: Crew):
        self.folder, self.shards, self.attributes, self.crew = folder, shards, attributes, crew
        self.labels, self.locks = folder / "labels", folder / "locks"
        self.files = [f"{number:05}.parquet" for number in range(len(shards))]  # of results, one for each shard
        self.tallies: dict[str, Tally] = {}  # of the files that are there
        for place in (folder, self.labels, self.locks):
            make_folder(place, "--out")
        self._agree({"format": FORMAT} | facts)

    def _agree(self, facts: dict) -> None:
        path = self.folder / "job.json"
        # Another user's folder, above all, cannot be written; of several that start at once the first one writes it.
        with told(f"cannot write --out {self.folder}"), claim(self.locks / "job", wait=True):
            if not path.exists():
                if any(self.labels.glob("*.parquet")):  # of whichever checkpoint and inputs
                    raise UserError(f"{self.labels} holds answers, but {path} is gone; name another --out")
                replace_file(path, json.dumps(facts, indent=1).encode())
                return
        try:
            with told(f"cannot read {path}"):
                found = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name in facts | found if facts.get(name) != found.get(name)]
            hint = {
                ("inputs",): f"; for what is new since, also add --skip {self.folder}",
                ("inputs", "hub"): f", or go on with {' '.join(found['hub'])}" if found.get("hub") else "",
                ("amp",): f", or go on with --amp {found['amp']}" if found.get("amp") else ", or leave out --amp",
            }.get(tuple(differing), "")
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{path} is damaged; name another --out, or delete {self.folder}") from None
        if differing:
            verb = "differ" if len(differing) > 1 else "differs"
            raise UserError(
                f"--out {self.folder} holds another job (its {', '.join(differing)} {verb}); name another folder{hint}"
            )

    def run(self, answer: Callable[[Shard], Iterable[list[dict]]]) -> None:
        """Return when all shards are done, by whomever.

        Args:
            answer: a shard -> batches of answers.

        Raises:
            UserError: the disk is full, or the like.
        """
        first = self.crew.rank * len(self.shards) // self.crew.size  # starts far apart, so that processes rarely meet
        order = [*range(first, len(self.shards)), *range(first)]
        with tqdm(unit="img", smoothing=0, disable=self.crew.rank > 0) as bar:
            self._show(bar)
            bar.initial = bar.n  # done before: it says nothing about the speed
            while left := self._left(order):
                if not any(self._take(number, answer, bar) for number in left):
                    time.sleep(PAUSE)  # others hold the rest; if they die it is ours
                    self._show(bar)
            self._show(bar)
        for part in self.labels.glob(".*.part"):  # of processes that were killed
            part.unlink(missing_ok=True)

    def tally(self) -> Tally:
        """The rows of all shards that are done, and how many of them are errors."""
        self._count()
        return Tally(sum(t.rows for t in self.tallies.values()), sum(t.errors for t in self.tallies.values()))

    def _left(self, order: Iterable[int]) -> list[int]:
        done = set(os.listdir(self.labels))
        return [number for number in order if self.files[number] not in done]

    def _take(self, number: int, answer: Callable[[Shard], Iterable[list[dict]]], bar: tqdm) -> bool:
        """Do a shard, unless it is done, or held by another."""
        path, rows, looked = self.labels / self.files[number], 0, time.monotonic()
        if path.exists():
            return False
        # What fails is writing: inputs that cannot be read are answers.
        failing = told(f"cannot write --out {self.folder}", "; start the command again to go on")
        with failing, claim(self.locks / f"{number:05}") as ours:
            if not ours or path.exists():
                return False
            with Output(path, self.attributes) as output:
                for answers in answer(self.shards[number]):
                    output.write(answers)
                    rows += len(answers)
                    if time.monotonic() > looked + PAUSE:
                        self._show(bar, rows)
                        looked = time.monotonic()
        return True

    def _count(self) -> None:
        """Count the rows and errors of results that are new."""
        for name in set(os.listdir(self.labels)).intersection(self.files) - self.tallies.keys():
            path = self.labels / name
            try:
                errors = pq.read_table(path, columns=["error"])["error"]
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path} is damaged; delete it and start again ({first_line(error)})") from None
            self.tallies[name] = Tally(len(errors), len(errors) - errors.null_count)

    def _show(self, bar: tqdm, here: int = 0) -> None:
        """Set the bar to the rows that all processes have finished, plus the `here` rows of this one's shard.

        Where shards do not know their rows, the total is a guess from the ones that are done.
        """
        if bar.disable:
            return
        self._count()
        unknown = [name for name, shard in zip(self.files, self.shards, strict=True) if shard.rows is None]
        found = [self.tallies[name].rows for name in unknown if name in self.tallies]
        if found or not unknown:
            bar.total = sum(shard.rows or 0 for shard in self.shards)
            bar.total += round(len(unknown) * sum(found) / max(len(found), 1))
        bar.n = sum(tally.rows for tally in self.tallies.values()) + here
        bar.refresh()
