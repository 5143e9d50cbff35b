"""The options that several commands share."""

import argparse
from pathlib import Path

from data.store import STORE_GB, default_cache_dir
from errors import Parser, gigabytes, named, positive_int

SOURCES = "hub id (hub:OWNER/NAME: not downloaded), folder of parquet, tar, or CSV and images/, or demo"
PRECISIONS = ("bf16", "fp16", "auto")


def precision(text: str) -> str:
    """An option's type: one of `PRECISIONS`."""
    if text not in PRECISIONS:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(PRECISIONS)}; it may stand before --amp")
    return text


MIXED = {"nargs": "?", "const": "auto", "type": precision, "metavar": "|".join(PRECISIONS[:2])}  # of --amp


def add_checkpoint_options(p: Parser) -> None:
    """Add the options of every command that reads a checkpoint."""
    p.add_argument("--checkpoint", type=Path, help="checkpoint folder (default: the newest run's best)")
    p.add_argument("--weights", type=Path, help="the backbone's base weights, a safetensors file")


def add_catalogue_options(p: Parser) -> None:
    """Add the options of every command that applies a checkpoint to a labelled catalogue."""
    p.add_argument("--data", type=named, required=True, help=SOURCES)
    p.add_argument("--batch-size", type=positive_int, default=64, help="pictures at a time (default: %(default)s)")
    add_row_options(p)


def add_row_options(p: Parser) -> None:
    """Add the options of every command that decodes a catalogue: which rows to use, and where to keep them."""
    p.add_argument("--limit", type=positive_int, help="use only this many rows of the catalogue")
    p.add_argument(
        "--cache-dir", type=Path, default=default_cache_dir(), help="for decoded images (default: %(default)s)"
    )
    p.add_argument(
        "--store-gb",
        type=gigabytes,
        default=STORE_GB,
        metavar="GB",
        help="keep decoded pictures on disk if they need no more than this (default: %(default)s)",
    )
    p.add_argument(
        "--no-store", action="store_const", const=0.0, dest="store_gb", help="keep none: decode at every use"
    )
