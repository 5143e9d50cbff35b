"""What a training run is asked for, and what it takes where nothing was said: source, backbone, precision."""

import argparse
import math
import sys
import time
from pathlib import Path

import torch

import hub
from data.store import STORE_GB, default_cache_dir
from errors import Parser, UserError, named, positive_int
from models.backbone import DEMO, bare_backbone
from models.schema import RANK

HUB_DATA, HUB_BACKBONE = "ashraq/fashion-product-images-small", "vit_base_patch16_224"
# What may be otherwise when a run is resumed.
MOVABLE = ("data", "weights", "attributes", "teacher", "teacher_weights", "cache_dir", "compile")
# Options that are files or folders.
PATHS = ("weights", "cache_dir", "attributes", "init_from", "teacher", "teacher_weights", "vocab")
EXTRA = {"with_price": ("price_in_vnd",), "with_season_year": ("season", "year")}  # switches and what they add
AMP = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
MIXED = {"nargs": "?", "const": "auto", "choices": ["auto", "bf16", "fp16"]}  # of --amp
LARGE = 40e6  # parameters from which training on a CPU takes days


def rank(text: str) -> int:
    """An option's type."""
    if (value := positive_int(text)) not in RANK:
        raise argparse.ArgumentTypeError(f"{text} is more than {RANK[-1]}")
    return value


def per_target(number):
    """An option's type: a number for all targets, or such as query=8,dense=4 for each."""

    def parse(text: str):
        if "=" not in text:
            return number(text)
        return {name: number(value) for name, _, value in (part.partition("=") for part in text.split(","))}

    parse.__name__ = number.__name__
    return parse


def add_checkpoint_options(p: Parser) -> None:
    """Of every command that reads what training made."""
    p.add_argument("--checkpoint", type=Path, help="checkpoint folder (default: the newest run's best)")
    p.add_argument("--weights", type=Path, help="the backbone's base weights, a safetensors file")


def add_catalogue_options(p: Parser) -> None:
    """Of every command that looks at a labelled catalogue with what training made."""
    p.add_argument(
        "--data",
        type=named,
        required=True,
        help="hub id (hub:OWNER/NAME: not downloaded), folder of parquet, tar, or CSV and images/, or demo",
    )
    p.add_argument("--limit", type=positive_int, help="use only this many rows of the catalogue")
    p.add_argument("--batch-size", type=positive_int, default=64)
    p.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where decoded images are kept")
    add_store_options(p)


def add_store_options(p: Parser) -> None:
    p.add_argument(
        "--store-gb",
        type=gigabytes,
        default=STORE_GB,
        metavar="GB",
        help="keep decoded pictures where they need no more than this (default: %(default)s)",
    )
    p.add_argument(
        "--no-store", action="store_const", const=0.0, dest="store_gb", help="keep none: decode at every use"
    )


def gigabytes(text: str) -> float:
    """An option's type."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(description="Train LoRA adapters and hierarchical heads on a frozen timm ViT.")
    p.add_argument(
        "--data",
        type=named,
        help="hub id (hub:OWNER/NAME: not downloaded), folder of parquet, tar, or CSV and images/, or demo "
        f"(default: {HUB_DATA})",
    )
    p.add_argument("--backbone", type=named, help=f"timm ViT by name, or demo (default: {HUB_BACKBONE})")
    p.add_argument("--weights", type=Path, help="the backbone's base weights, a safetensors file (default: the hub's)")
    p.add_argument(
        "--img-size", type=positive_int, help="side of the model's input in pixels (default: the backbone's own)"
    )
    p.add_argument("--patch-size", type=positive_int, help="side of a patch in pixels (default: the backbone's own)")
    p.add_argument(
        "--keep-patches",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="leave out the emptiest patches of each picture: 0.5 keeps half of them (default: all)",
    )
    p.add_argument(
        "--rank",
        type=per_target(rank),
        default=16,
        help="LoRA rank, PEFT's r; of single targets: query=8,dense=4 (default: %(default)s)",
    )
    p.add_argument(
        "--alpha",
        type=per_target(float),
        default=32,
        help="updates scale by alpha/rank, PEFT's lora_alpha; of single targets as --rank (default: %(default)s)",
    )
    p.add_argument("--dropout", type=float, default=0.05, help="before A, PEFT's lora_dropout (default: %(default)s)")
    p.add_argument(
        "--targets", nargs="+", default=["query", "key", "value", "dense"], help="layers (default: all four)"
    )
    p.add_argument("--layers", nargs="+", type=int, help="only these blocks, counted from 0 (default: all)")
    p.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(rank) instead")
    p.add_argument("--dora", action="store_true", help="learn the length of each row of the weights too")
    p.add_argument("--pissa", action="store_true", help="start at the principal part of each weight")
    p.add_argument(
        "--lora-plus",
        type=float,
        default=1,
        metavar="RATIO",
        help="B learns at RATIO times --lr, such as 16 (default: 1)",
    )
    p.add_argument(
        "--base", choices=["float", "int8"], default="float", help="how frozen weights are kept while training"
    )
    p.add_argument(
        "--init-from",
        type=Path,
        metavar="CHECKPOINT",
        help="start with the adapters and heads of an earlier run's best",
    )
    p.add_argument(
        "--teacher",
        type=Path,
        metavar="CHECKPOINT",
        help="learn half from the labels and half from what this model says of each picture",
    )
    p.add_argument(
        "--teacher-weights",
        type=Path,
        metavar="FILE",
        help="its base weights, where they are others and its run does not know them",
    )
    p.add_argument("--epochs", type=positive_int, default=5, help="(default: %(default)s)")
    p.add_argument(
        "--batch-size",
        type=positive_int,
        default=16,
        help="images in a micro-batch of each process (default: %(default)s)",
    )
    p.add_argument(
        "--accum", type=positive_int, default=1, help="micro-batches in an optimizer step (default: %(default)s)"
    )
    p.add_argument(
        "--warp",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="stretch, turn and move training pictures by up to this, such as 0.2 (default: %(default)s)",
    )
    p.add_argument(
        "--drop-patches",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave this share of the patches out of each training picture by chance, such as 0.3 (default: none)",
    )
    p.add_argument(
        "--label-smoothing", type=float, default=0.0, metavar="SHARE", help="such as 0.1 (default: %(default)s)"
    )
    p.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    p.add_argument("--amp", **MIXED, help="mixed precision (default: off)")
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile each block: for GPUs, 1.6 times as fast on an H200 (default: no)",
    )
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    p.add_argument("--attributes", type=Path, metavar="FILE.toml", help="what to predict (default: data/fashion.toml)")
    p.add_argument("--inputs", choices=["image", "title", "image+title"], default="image", help="(default: image)")
    p.add_argument("--vocab", type=Path, help="titles: a WordPiece vocabulary (default: the hub's BERT, else fitted)")
    p.add_argument(
        "--title-length", type=positive_int, default=13, help="titles: cut at so many tokens (default: %(default)s)"
    )
    p.add_argument(
        "--mask-title-leaks",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="titles: take out words that labels were made from (default: yes)",
    )
    for switch, names in EXTRA.items():
        p.add_argument(f"--{switch.replace('_', '-')}", action="store_true", help=f"also predict {' and '.join(names)}")
    add_store_options(p)
    p.add_argument("--limit", type=positive_int, help="use only this many rows of the catalogue")
    p.add_argument(
        "--min-brand-count", type=positive_int, default=10, help="rarer brands become Other (default: %(default)s)"
    )
    p.add_argument(
        "--no-test", action="store_true", help="leave the test rows alone: for runs that are yet to be chosen among"
    )
    p.add_argument("--out", type=Path, help="folder of the run (default: runs/BACKBONE-DATE)")
    p.add_argument(
        "--save-every",
        type=positive_int,
        default=500,
        metavar="STEPS",
        help="save the whole state this often, and at each epoch's end (default: %(default)s)",
    )
    p.set_defaults(processes=1)  # how many the run was started with
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on with --out (default: the newest run), with its options; what has moved is named anew",
    )
    p.add_argument(
        "--cache-dir", type=Path, default=default_cache_dir(), help="for decoded images (default: %(default)s)"
    )
    args = p.parse_args(argv)
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr {args.lr} is not a positive number")
    if not 0 < args.lora_plus < math.inf:
        raise UserError(f"--lora-plus {args.lora_plus} is not a positive number")
    if not 3 <= args.title_length <= 512:
        raise UserError(f"--title-length {args.title_length} is not between 3 and 512")
    if not 0 < args.keep_patches <= 1:
        raise UserError(f"--keep-patches {args.keep_patches} is not a share of the patches, above 0 and at most 1")
    for name in ("warp", "drop_patches", "label_smoothing"):
        if not 0 <= (value := getattr(args, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is not a number from 0 to below 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed} is not between 0 and {2**32 - 1}")
    unset = object()
    said = vars(p.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    given = [name for name, value in said.items() if value is not unset]  # a default's value counts too
    if args.resume and (others := [name for name in given if name not in ("out", "resume", *MOVABLE)]):
        raise UserError(f"--resume goes on with the run's own options; leave out --{others[0].replace('_', '-')}")
    if args.resume:
        vars(args).update({name: None for name in MOVABLE if name not in given})  # the run knows
    idle = [name for name in given if name in ("vocab", "title_length", "mask_title_leaks")]
    if idle and "title" not in args.inputs:
        raise UserError(f"--{idle[0].replace('_', '-')} is of titles, which --inputs {args.inputs} does not read")
    if args.teacher_weights and not args.teacher and not args.resume:
        raise UserError(f"--teacher-weights {args.teacher_weights} goes with --teacher CHECKPOINT")
    if args.compile and args.inputs == "title":
        raise UserError("--compile is of the backbone, which --inputs title does not use; leave it out")
    for name in PATHS:  # a run may be resumed from another folder
        if path := getattr(args, name):
            setattr(args, name, path.absolute())
    if args.data and args.data != DEMO and Path(args.data).exists():
        args.data = str(Path(args.data).absolute())
    return args


def choose_source(args: argparse.Namespace) -> None:
    """The hub's catalogue and ViT-B/16; the embedded demo where the hub is out of reach and nothing else was named."""
    if not (args.data or args.backbone or args.weights) and not hub.reachable():
        print(f"The hub ({hub.ENDPOINT}) cannot be reached: training on the embedded demo instead of {HUB_DATA}.")
        print("For files of your own: --data FOLDER --backbone NAME --weights FILE")
        args.data = DEMO
    args.backbone = args.backbone or (DEMO if args.data == DEMO else HUB_BACKBONE)
    args.data = hub.pinned(args.data or HUB_DATA)


def choose_amp(device: torch.device) -> str | None:
    """What `--amp` alone means: bf16 where the device has it, else fp16.

    A CPU without bf16 instructions is a hundred times slower in either than in fp32, so there it means fp32, None.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"

    def seconds(dtype: torch.dtype) -> float:  # of a matrix product: no list of CPU flags is as sure
        square, times = torch.ones(256, 256, dtype=dtype), []
        for _ in range(8):  # the others of several processes start meanwhile
            start = time.perf_counter()
            square @ square
            times.append(time.perf_counter() - start)
        return min(times)

    if seconds(torch.bfloat16) <= seconds(torch.float32):
        return "bf16"
    print("--amp: this CPU has no fast bf16, so all stays in fp32 (--amp bf16 forces it)", file=sys.stderr)
    return None


def warn_if_slow(backbone: str, device: torch.device) -> None:
    """Say so before anything is downloaded or decoded."""
    with torch.device("meta"):
        size = sum(p.numel() for p in bare_backbone(backbone).parameters())
    if device.type == "cpu" and size > LARGE:
        print(f"hint: no GPU here, and {backbone} has {size / 1e6:.0f} M parameters: training may take days.")
        print("      --backbone vit_tiny_patch16_224 --img-size 112 suits a CPU.")
