"""Every picture decoded once, into one memory-mapped uint8 file that all later runs open at once."""

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.cells import inert
from data.images import ImageError, decode, native_size, pixel_hash, to_canvas
from data.sources import Catalogue, Skipped
from data.split import assign_splits
from errors import UserError

STORE_VERSION = 1  # raise it when decoding, hashing or the layout changes: older stores are then built anew
SIZE_SAMPLE = 500  # pictures whose headers choose the canvas
CHUNK = 64  # rows a thread decodes before it reports


def default_cache_dir() -> Path:
    """Where stores lie unless told otherwise: `$XDG_CACHE_HOME/lora-vision`, by default `~/.cache/lora-vision`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-vision"


@dataclass(frozen=True)
class ImageStore:
    """The decoded catalogue; row i of every array is row i of the catalogue.

    Attributes:
        ids: the product id of each row.
        pixels: uint8 (N, H, W, 3), read-only and memory-mapped; black where the picture could not be read.
        hashes: uint64 (N,), of the pixels at native size; 0 where there are none.
        ok: bool (N,), whether the picture could be read.
        skipped: all rows without a usable picture, with the reason: those the source left out, then those not `ok`.
        path: the folder.
        built: whether this call decoded, rather than found, the store.
    """

    ids: list[str]
    pixels: np.ndarray
    hashes: np.ndarray
    ok: np.ndarray
    skipped: list[Skipped]
    path: Path
    built: bool

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    def rows(self, split: str) -> np.ndarray:
        """The readable rows of a split, or of "all"; int64, ascending."""
        chosen = self.ok if split == "all" else self.ok & (assign_splits(self.hashes) == split)
        return np.flatnonzero(chosen)

    def write_skipped(self, path: Path) -> None:
        """List the skipped rows in a CSV file."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "reason"))
            writer.writerows((inert(row.id), inert(row.reason)) for row in self.skipped)


def common_size(catalogue: Catalogue, cap: int) -> tuple[int, int]:
    """The most common native (height, width) of an even sample, read from headers alone.

    Args:
        cap: the longest side the model looks at, in pixels; no side is made longer, as nobody would see it.

    Raises:
        UserError: none of the sample can be read.
    """
    sizes = Counter()
    for row in np.linspace(0, len(catalogue) - 1, min(len(catalogue), SIZE_SAMPLE), dtype=int):
        try:
            sizes[native_size(catalogue.read(row))] += 1
        except ImageError:
            continue  # listed, with its reason, when it is to be decoded
    if not sizes:
        raise UserError(f"{catalogue.name}: none of its {len(catalogue)} rows has a readable image; is --data right?")
    height, width = sizes.most_common(1)[0][0]
    return min(height, cap), min(width, cap)


def open_store(catalogue: Catalogue, canvas: tuple[int, int], cache_dir: Path) -> ImageStore:
    """Open the catalogue's store under `cache_dir`; decode the pictures first if this was not done before.

    Args:
        canvas: (height, width) to store pictures at: `common_size` for training, the checkpoint's for evaluating.

    Raises:
        UserError: no picture can be read, or the folder cannot be written or has too little room.
    """
    canvas = tuple(canvas)
    key = hashlib.blake2b(repr((catalogue.fingerprint, canvas, STORE_VERSION)).encode(), digest_size=8).hexdigest()
    path = Path(cache_dir) / f"{catalogue.name.replace('/', '--')}-{canvas[0]}x{canvas[1]}-{key}"
    if built := not path.exists():
        _build(catalogue, canvas, path)
    try:
        failures = {int(row): reason for row, reason in json.loads((path / "skipped.json").read_text()).items()}
        pixels, hashes = np.load(path / "pixels.npy", mmap_mode="r"), np.load(path / "hashes.npy")
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise UserError(f"the decoded images in {path} are damaged ({error}); delete that folder") from None
    ok = np.ones(len(catalogue), dtype=bool)
    ok[list(failures)] = False
    return ImageStore(
        ids=catalogue.ids,
        pixels=pixels,
        hashes=hashes,
        ok=ok,
        skipped=catalogue.skipped + [Skipped(catalogue.ids[row], reason) for row, reason in failures.items()],
        path=path,
        built=built,
    )


def _build(catalogue: Catalogue, canvas: tuple[int, int], path: Path) -> None:
    """Decode into a folder of its own, then rename it: whoever looks at `path` sees a whole store or none."""
    shape = (len(catalogue), *canvas, 3)
    need = f"decoded pictures need {np.prod(shape) / 1e6:,.0f} MB there; name another folder with --cache-dir"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=path.parent))
    except OSError as error:
        raise UserError(f"cannot write to {path.parent} ({error.strerror}): {need}") from error
    try:
        free = shutil.disk_usage(temporary).free
        if free < np.prod(shape):
            raise UserError(f"only {free / 1e6:,.0f} MB free in {path.parent}: {need}")
        try:
            _decode_all(catalogue, shape, temporary)
        except OSError as error:
            raise UserError(f"cannot write to {path.parent} ({error.strerror}): {need}") from error
        try:
            temporary.rename(path)
        except OSError:  # somebody else built the same store meanwhile; theirs is as good
            if not path.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _decode_all(catalogue: Catalogue, shape: tuple[int, int, int, int], folder: Path) -> None:
    """Write pixels.npy, hashes.npy and skipped.json ({row: reason}) into `folder`."""
    pixels = np.lib.format.open_memmap(folder / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # or a disk that fills up later would end us by SIGBUS, without a word
        with open(folder / "pixels.npy", "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    hashes = np.zeros(len(catalogue), dtype=np.uint64)

    def decode_rows(rows: range) -> dict[int, str]:
        failures = {}
        for row in rows:
            try:
                image = decode(catalogue.read(row))
            except ImageError as error:
                failures[row] = str(error)
                continue
            pixels[row], hashes[row] = to_canvas(image, shape[1:3]), pixel_hash(image)
        return failures

    chunks = [range(start, min(start + CHUNK, len(catalogue))) for start in range(0, len(catalogue), CHUNK)]
    failures: dict[int, str] = {}
    # Threads do: decoders release the GIL. They write their rows themselves, so nothing piles up.
    with ThreadPoolExecutor() as pool, tqdm(total=len(catalogue), desc="decoding images", unit="img") as bar:
        try:
            for chunk, failed in zip(chunks, pool.map(decode_rows, chunks), strict=True):
                failures |= failed
                bar.update(len(chunk))
        except BaseException:  # Ctrl-C too: do not decode the rest first
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if len(failures) == len(catalogue):
        reasons = Counter(failures.values()).most_common(1)[0][0]
        raise UserError(f"{catalogue.name}: none of its {len(catalogue)} images can be read ({reasons})")
    pixels.flush()
    np.save(folder / "hashes.npy", hashes)
    (folder / "skipped.json").write_text(json.dumps(failures))
