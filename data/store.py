"""Decode every picture once, into a memory-mapped uint8 file that all later runs open immediately.

If a catalogue is too large for that, its pictures are decoded once for their hashes, which determine the split, and
again whenever a picture is asked for.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import platform
import shutil
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.catalogue import Catalogue, Skipped
from data.cells import inert
from data.images import ImageError, decode, native_size, pixel_hash, to_canvas
from data.sources import in_file_name
from data.split import in_split, keys_of_articles
from durable import claim, replace_csv
from errors import UserError, say_once

STORE_GB = 100.0  # decoded pictures that need more are not kept
# Raise it when decoding, hashing, the layout or which rows a source has changes: older stores are then built anew.
STORE_VERSION = 5
MUCH = 10**9  # bytes
SIZE_SAMPLE = 500  # pictures whose headers choose the canvas
CHUNK, CHUNKS = 64, 64  # rows that a thread decodes before it reports, at most; how many such are handed out at once


def default_cache_dir() -> Path:
    """The default folder for stores: `$XDG_CACHE_HOME/lora-vision`, by default `~/.cache/lora-vision`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-vision"


@dataclass(frozen=True)
class ImageStore:
    """The decoded catalogue; row i of every array is row i of the catalogue.

    Attributes:
        pixels: uint8 (N, H, W, 3), indexed by rows: read-only and memory-mapped, black where the picture could not be
            read; or `OnDemand` if decoded pictures are not kept.
        hashes: uint64 (N,), of the pixels at native size; 0 where the picture could not be read.
        ok: bool (N,), whether the picture could be read.
        skipped: all rows without a usable picture, with the reason: those the source left out, then those not `ok`.
        path: the folder.
        built: whether this call decoded, rather than found, the store.
        run: how many neighbouring rows are best read together; None if any row is quick to read.
        keys: uint64 (N,), by which rows are split.
    """

    pixels: "np.ndarray | OnDemand"
    hashes: np.ndarray
    ok: np.ndarray
    skipped: list[Skipped]
    path: Path
    built: bool
    run: int | None
    keys: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded pictures that are kept."""
        return self.pixels.nbytes

    def rows(self, split: str) -> np.ndarray:
        """The readable rows of a split, or of "all"; int64, ascending."""
        return np.flatnonzero(self.ok if split == "all" else self.ok & in_split(self.keys, split))

    def write_skipped(self, path: Path) -> None:
        """List the skipped rows in a CSV file."""
        replace_csv(path, [("id", "reason"), *((inert(row.id), inert(row.reason)) for row in self.skipped)])


def common_size(catalogue: Catalogue, cap: int) -> tuple[int, int]:
    """The most common native (height, width) in an evenly spaced sample, of which only headers are decoded. If fewer
    than half have it, the median of each side: placeholders may be the only pictures of the same size.

    Args:
        cap: the longest side that the model looks at, in pixels; both sides are limited to it.

    Raises:
        UserError: none of the sample can be read.
    """
    sizes = Counter()
    together = SIZE_SAMPLE // 4 if catalogue.run else 1  # neighbours, if one row costs as much as many
    last = max(0, len(catalogue) - together)
    starts = np.unique(np.linspace(0, last, SIZE_SAMPLE // together, dtype=int))
    for row in np.unique(starts[:, None] + np.arange(min(together, len(catalogue)))):
        try:
            sizes[native_size(catalogue.read(row))] += 1
        except ImageError:
            continue  # listed with its reason when decoding fails
    if not sizes:
        raise UserError(f"{catalogue.name}: none of its {len(catalogue)} rows has a readable image; is --data right?")
    (height, width), times = sizes.most_common(1)[0]
    if 2 * times < sizes.total():
        height, width = (int(np.median(side)) for side in zip(*sizes.elements(), strict=True))
    return min(height, cap), min(width, cap)


class OnDemand:
    """Stands in for an array of pictures that are not kept: threads decode them when they are asked for."""

    nbytes = 0

    def __init__(self, catalogue: Catalogue, canvas: tuple[int, int]):
        self.catalogue, self.canvas, self.pool = catalogue, canvas, ThreadPoolExecutor()
        self.shape = len(catalogue), *canvas, 3

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(n,) rows -> uint8 (n, H, W, 3)"""
        return np.stack(list(self.pool.map(self.picture, rows)))

    def picture(self, row: int) -> np.ndarray:
        try:
            return to_canvas(decode(self.catalogue.read(row)), self.canvas)
        except ImageError as error:
            which = f"{self.catalogue.name}, id {self.catalogue.ids[row]}"
            raise UserError(f"{which}: this picture could be read before, and not now: {error}") from None


def open_store(
    catalogue: Catalogue,
    canvas: tuple[int, int],
    cache_dir: Path,
    most: float = math.inf,
    articles: Sequence[str | None] | None = None,
) -> ImageStore:
    """Open the catalogue's store under `cache_dir`; decode the pictures first if this was not done before.

    Args:
        canvas: (height, width) to store pictures at: `common_size` for training, the checkpoint's for evaluating.
        most: bytes that decoded pictures may take; where they would take more, they are not kept.
        articles: which article each row shows, where that is known; see `keys_of_articles`.

    Raises:
        UserError: no picture can be decoded, a picture's file fails, the store is damaged or cannot be read, or the
            folder cannot be written or has too little room.
    """
    canvas = tuple(canvas)
    keep = len(catalogue) * math.prod(canvas) * 3 <= most
    facts = (catalogue.fingerprint, canvas if keep else None, STORE_VERSION)
    key = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
    size = f"{canvas[0]}x{canvas[1]}" if keep else "hashes"
    path = Path(cache_dir) / f"{in_file_name(catalogue.name)}-{size}-{key}"
    built = not path.exists() and _build(catalogue, canvas if keep else (0, 0), path)
    try:
        failures = {int(row): reason for row, reason in json.loads((path / "skipped.json").read_text()).items()}
        pixels = np.load(path / "pixels.npy", mmap_mode="r") if keep else OnDemand(catalogue, canvas)
        hashes = np.load(path / "hashes.npy", mmap_mode="r")
    except PermissionError as error:
        raise UserError(
            f"cannot read the decoded images in {path} ({error.strerror}); name another folder with --cache-dir"
        ) from None
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise UserError(f"the decoded images in {path} are damaged ({error}); delete that folder") from None
    if built:
        _tell_of_earlier(path)
    ok = np.ones(len(catalogue), dtype=bool)
    ok[list(failures)] = False
    keys = hashes
    if articles is not None:
        keys = np.zeros(len(catalogue), np.uint64)
        keys[ok] = keys_of_articles(hashes[ok], compress(articles, ok))
    return ImageStore(
        pixels=pixels,
        hashes=hashes,
        ok=ok,
        skipped=catalogue.skipped
        + [Skipped(catalogue.ids[row] or f"row {row}", reason) for row, reason in failures.items()],
        path=path,
        built=built,
        run=None if keep else catalogue.run,
        keys=keys,
    )


def _build(catalogue: Catalogue, canvas: tuple[int, int], path: Path) -> bool:
    """Decode into a folder beside `path`, then rename it, so that `path` is a complete store or does not exist.

    One process builds while others wait; returns whether this one did. Partial folders that killed processes of this
    machine have left, each as large as the store, are deleted. If the lock belongs to another user, or does not reach
    another machine, each process builds its own store.
    """
    shape = (len(catalogue), *canvas, 3)  # (N, 0, 0, 3) where pictures are not kept
    need = f"decoded pictures need {np.prod(shape) / 1e6:,.0f} MB there; name another folder with --cache-dir"
    own, lock = f".{path.name}.{in_file_name(platform.node())}", path.parent / f".{path.name}.lock"
    part = path.parent / f"{own}.{uuid.uuid4().hex[:8]}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            with contextlib.suppress(PermissionError):
                if not held.enter_context(claim(lock)):
                    print(f"another process decodes these pictures into {path.parent}; waiting for it", flush=True)
                    held.enter_context(claim(lock, wait=True))
                for left in path.parent.glob(f"{glob.escape(own)}.*.part"):
                    shutil.rmtree(left, ignore_errors=True)
            if path.exists():
                return False
            part.mkdir()
            held.callback(shutil.rmtree, part, ignore_errors=True)
            free = shutil.disk_usage(part).free
            if free < np.prod(shape):
                raise UserError(f"only {free / 1e6:,.0f} MB free in {path.parent}: {need}")
            _decode_all(catalogue, shape, part)
            try:
                part.rename(path)
            except OSError:  # somebody else built the same store meanwhile; theirs is as good
                if not path.exists():
                    raise
                return False
            return True
    except OSError as error:
        raise UserError(f"cannot write to {path.parent} ({error.strerror}): {need}") from error


def _tell_of_earlier(path: Path) -> None:
    """Say how much other stores of this catalogue name take, if it is much: each change of pictures makes a new one."""
    name, sizes = path.name.rsplit("-", 2)[0], []
    with contextlib.suppress(OSError):  # somebody may be deleting them
        for other in path.parent.glob(f"{glob.escape(name)}-*/"):
            if other != path and other.name.rsplit("-", 2)[0] == name:
                sizes.append(sum(file.stat().st_size for file in other.iterdir()))
    if sum(sizes) > MUCH:
        more = f"{len(sizes)} more store{'s' * (len(sizes) > 1)} of {name}, {sum(sizes) / 1e9:,.1f} GB"
        say_once(f"{path.parent} has {more}; delete what no run needs")


def _pixels(path: Path, shape: tuple[int, int, int, int]) -> np.ndarray:
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # else a disk that fills up later would kill us by SIGBUS, silently
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return pixels


def _read(catalogue: Catalogue, row: int) -> bytes:
    """A picture's bytes. A file that fails raises `UserError`: a store that lists it would outlive the failure. A row
    without an id counts as unreadable, as no list could tell it from others."""
    if catalogue.ids[row] is None:
        raise ImageError("no id")
    try:
        return catalogue.read(row)
    except ImageError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        which = f"{catalogue.name}, id {catalogue.ids[row]}"
        raise UserError(f"{which}: its file cannot be read: {error.__cause__}; mend that, and start again") from error


def _decode_all(catalogue: Catalogue, shape: tuple[int, int, int, int], folder: Path) -> None:
    """Write pixels.npy, unless it would be empty, hashes.npy and skipped.json ({row: reason}) into `folder`."""
    pixels = _pixels(folder / "pixels.npy", shape) if math.prod(shape) else None
    hashes = np.zeros(len(catalogue), dtype=np.uint64)

    def decode_rows(rows: range) -> dict[int, str]:
        failures = {}
        for row in rows:
            try:
                image = decode(_read(catalogue, row))
            except ImageError as error:
                failures[row] = str(error)
                continue
            hashes[row] = pixel_hash(image)
            if pixels is not None:
                pixels[row] = to_canvas(image, shape[1:3])
        return failures

    failures: dict[int, str] = {}
    # Threads suffice, as decoders release the GIL. They write their rows themselves, so nothing piles up in memory.
    with ThreadPoolExecutor() as pool, tqdm(total=len(catalogue), desc="decoding images", unit="img") as bar:
        try:
            # If rows are read in runs, of which few are kept, threads must work on rows close to each other.
            chunk = min(CHUNK, max(1, catalogue.run // CHUNK)) if catalogue.run else CHUNK
            for begin in range(0, len(catalogue), CHUNKS * CHUNK):
                end = min(begin + CHUNKS * CHUNK, len(catalogue))
                chunks = [range(start, min(start + chunk, end)) for start in range(begin, end, chunk)]
                for rows, failed in zip(chunks, pool.map(decode_rows, chunks), strict=True):
                    failures |= failed
                    bar.update(len(rows))
        except BaseException:  # Ctrl-C too: do not decode the rest first
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if len(failures) == len(catalogue):
        reasons = Counter(failures.values()).most_common(1)[0][0]
        raise UserError(f"{catalogue.name}: none of its {len(catalogue)} images can be read ({reasons})")
    if pixels is not None:
        pixels.flush()
    np.save(folder / "hashes.npy", hashes)
    (folder / "skipped.json").write_text(json.dumps(failures))
