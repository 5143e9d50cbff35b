"""The options of a training run."""

import argparse
import math
from collections.abc import Collection
from pathlib import Path

from arguments import MIXED, SOURCES, add_row_options
from defaults import HUB_BACKBONE, HUB_DATA
from errors import Parser, UserError, named, positive_int
from models.backbone import DEMO
from models.checkpoint import read_config, remembered_weights
from models.schema import CONFIG, RANK, misfit

# Options that may change when a run is resumed.
MOVABLE = ("data", "weights", "attributes", "teacher", "teacher_weights", "cache_dir", "compile")
# Options that are files or folders.
PATHS = ("weights", "cache_dir", "attributes", "init_from", "teacher", "teacher_weights", "vocab")
EXTRA = {"with_price": ("price_in_vnd",), "with_season_year": ("season", "year")}  # switches and what they add
OF_TITLES = ("vocab", "title_length", "mask_title_leaks")
SIZES = ("img_size", "patch_size", "keep_patches")
LORA_OPTIONS = ("targets", "rank", "alpha", "dropout", "layers", "rslora", "dora", "pissa")  # as `lora_layers` has them
OF_PICTURES = (*LORA_OPTIONS, "lora_plus", "base", "patch_size", "keep_patches", "drop_patches", "warp", "compile")
# Options that are taken from the checkpoint of `--init-from` where they are not given.
INHERITED = ("backbone", "weights", *SIZES, *LORA_OPTIONS, "inputs", "title_length", "mask_title_leaks")


def rank(text: str) -> int:
    """An option's type: a whole number within `RANK`."""
    if (value := positive_int(text)) not in RANK:
        raise argparse.ArgumentTypeError(f"{text} is more than {RANK[-1]}")
    return value


def per_target(number):
    """An option's type: a `number` for all targets, or one for each target named, such as query=8,dense=4."""

    def parse(text: str):
        if "=" not in text:
            return number(text)
        return {name: number(value) for name, _, value in (part.partition("=") for part in text.split(","))}

    parse.__name__ = number.__name__
    return parse


def add_data_options(p: Parser) -> None:
    group = p.add_argument_group("the catalogue")
    group.add_argument("--data", type=named, help=f"{SOURCES} (default: {HUB_DATA})")
    add_row_options(group)
    group.add_argument(
        "--min-brand-count", type=positive_int, default=10, help="rarer brands become Other (default: %(default)s)"
    )


def add_prediction_options(p: Parser) -> None:
    group = p.add_argument_group("what is predicted, and from what")
    group.add_argument(
        "--attributes", type=Path, metavar="FILE.toml", help="what to predict (default: data/fashion.toml)"
    )
    for switch, names in EXTRA.items():
        group.add_argument(
            f"--{switch.replace('_', '-')}", action="store_true", help=f"also predict {' and '.join(names)}"
        )
    group.add_argument("--inputs", choices=["image", "title", "image+title"], default="image", help="(default: image)")
    group.add_argument(
        "--vocab", type=Path, help="titles: a WordPiece vocabulary (default: the hub's BERT, else fitted)"
    )
    group.add_argument(
        "--title-length", type=positive_int, default=13, help="titles: cut at so many tokens (default: %(default)s)"
    )
    group.add_argument(
        "--mask-title-leaks",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="titles: take out words that labels were made from (default: yes)",
    )


def add_model_options(p: Parser) -> None:
    group = p.add_argument_group("the backbone")
    group.add_argument(
        "--backbone", type=named, help=f"timm ViT by name, or demo (default: {HUB_BACKBONE}; for the demo, its own)"
    )
    group.add_argument(
        "--weights", type=Path, help="the backbone's base weights, a safetensors file (default: the hub's)"
    )
    group.add_argument(
        "--img-size", type=positive_int, help="side of the model's input in pixels (default: the backbone's own)"
    )
    group.add_argument(
        "--patch-size", type=positive_int, help="side of a patch in pixels (default: the backbone's own)"
    )
    group.add_argument(
        "--keep-patches",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="leave out the emptiest patches of each picture: 0.5 keeps half of them (above 0; default: 1, all)",
    )
    group.add_argument(
        "--base", choices=["float", "int8"], default="float", help="how frozen weights are kept while training"
    )


def add_lora_options(p: Parser) -> None:
    group = p.add_argument_group("LoRA")
    group.add_argument(
        "--rank",
        type=per_target(rank),
        default=16,
        help="LoRA rank, PEFT's r; of single targets: query=8,dense=4 (default: %(default)s)",
    )
    group.add_argument(
        "--alpha",
        type=per_target(float),
        default=32,
        help="updates scale by alpha/rank, PEFT's lora_alpha; of single targets as --rank (default: %(default)s)",
    )
    group.add_argument(
        "--dropout", type=float, default=0.05, help="before A, PEFT's lora_dropout (default: 0.05, with --pissa 0)"
    )
    group.add_argument(
        "--targets", nargs="+", default=["query", "key", "value", "dense"], help="layers (default: all four)"
    )
    group.add_argument("--layers", nargs="+", type=int, help="only these blocks, counted from 0 (default: all)")
    group.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(rank) instead")
    group.add_argument("--dora", action="store_true", help="learn the length of each row of the weights too")
    group.add_argument("--pissa", action="store_true", help="start at the principal part of each weight")
    group.add_argument(
        "--lora-plus",
        type=float,
        default=1,
        metavar="RATIO",
        help="B learns at RATIO times --lr, such as 16 (default: 1)",
    )


def add_training_options(p: Parser) -> None:
    group = p.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=5, help="(default: %(default)s)")
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=16,
        help="images in a micro-batch of each process (default: %(default)s)",
    )
    group.add_argument(
        "--accum", type=positive_int, default=1, help="micro-batches in an optimizer step (default: %(default)s)"
    )
    group.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    group.add_argument("--amp", **MIXED, help="mixed precision (default: off)")
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile each block: for GPUs, 1.7 times as fast on an H200 (default: no)",
    )
    group.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    group.add_argument(
        "--warp",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="stretch, turn and move training pictures by up to this, such as 0.2 (default: %(default)s)",
    )
    group.add_argument(
        "--drop-patches",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave this share of the patches out of each training picture by chance, such as 0.3 (default: none)",
    )
    group.add_argument(
        "--label-smoothing", type=float, default=0.0, metavar="SHARE", help="such as 0.1 (default: %(default)s)"
    )
    group.add_argument(
        "--init-from",
        type=Path,
        metavar="CHECKPOINT",
        help="start with the adapters and heads of an earlier run's best; backbone, weights, sizes, LoRA layers, "
        "inputs and how titles are read are as there where not given",
    )
    group.add_argument(
        "--teacher",
        type=Path,
        metavar="CHECKPOINT",
        help="learn half from the labels and half from what this model says of each picture",
    )
    group.add_argument(
        "--teacher-weights",
        type=Path,
        metavar="FILE",
        help="the teacher's base weights, where they are not this run's and its own run does not name them",
    )


def add_run_options(p: Parser) -> None:
    group = p.add_argument_group("the run")
    group.add_argument("--out", type=Path, help="folder of the run (default: runs/BACKBONE-DATE)")
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out (default: the newest) with its own options; name anew only what has moved",
    )
    group.add_argument(
        "--save-every",
        type=positive_int,
        default=500,
        metavar="STEPS",
        help="save the whole state this often, and at each epoch's end (default: %(default)s)",
    )
    group.add_argument(
        "--no-test", action="store_true", help="leave the test rows alone: for runs that are yet to be chosen among"
    )


def check_ranges(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a number that is out of its range."""
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr {args.lr} is not a positive number")
    if not 0 < args.lora_plus < math.inf:
        raise UserError(f"--lora-plus {args.lora_plus} is not a positive number")
    if not 3 <= args.title_length <= 512:
        raise UserError(f"--title-length {args.title_length} is not between 3 and 512")
    for part, names in (("backbone", SIZES), ("lora", LORA_OPTIONS)):
        for name in names:
            value, shape = getattr(args, name), CONFIG[part].get(name) or CONFIG[part][f"{name}?"]
            if misfit(value, shape, name):
                raise UserError(f"--{name.replace('_', '-')} {value} is out of its range")
    for name in ("warp", "drop_patches", "label_smoothing"):
        if not 0 <= (value := getattr(args, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is not a number from 0 to below 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed} is not between 0 and {2**32 - 1}")


def check_read(args: argparse.Namespace, given: Collection[str]) -> None:
    """Raise a `UserError` if an option among those `given` is about an input that the model does not read."""
    for what, names in (("title", OF_TITLES), ("image", OF_PICTURES)):
        if what not in args.inputs and (idle := [name for name in given if name in names]):
            raise UserError(f"--{idle[0].replace('_', '-')} is of {what}s, which --inputs {args.inputs} does not read")


def parse_args(argv: list[str] | None, restarted: bool = False) -> argparse.Namespace:
    """Parse the options of `train.py` and check them; with `--resume`, those in `MOVABLE` are None where not given.

    Args:
        restarted: the options were checked before, when the run began; what it inherits from may be gone by now.

    Raises:
        UserError: an option is out of its range, or contradicts another.
    """
    p = Parser(description="Train LoRA adapters and hierarchical heads on a frozen timm ViT.")
    for add_options in (
        add_data_options,
        add_prediction_options,
        add_model_options,
        add_lora_options,
        add_training_options,
        add_run_options,
    ):
        add_options(p)
    p.set_defaults(processes=1)  # how many the run was started with
    args = p.parse_args(argv)
    check_ranges(args)
    unset = object()
    said = vars(p.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    given = [name for name, value in said.items() if value is not unset]  # a default's value counts too
    if args.resume and (others := [name for name in given if name not in ("out", "resume", *MOVABLE)]):
        raise UserError(f"--resume goes on with the run's own options; leave out --{others[0].replace('_', '-')}")
    if args.resume:
        vars(args).update({name: None for name in MOVABLE if name not in given})  # the run knows
    if args.pissa and "dropout" not in given:
        args.dropout = 0.0  # else parts of the pretrained weight would be dropped, not of what is added to it
    if not restarted:
        if args.init_from:
            take_over(args, given)
        check_read(args, given)
    if args.teacher_weights and not args.teacher and not args.resume:
        raise UserError(f"--teacher-weights {args.teacher_weights} goes with --teacher CHECKPOINT")
    for name in PATHS:  # a run may be resumed from another folder
        if path := getattr(args, name):
            setattr(args, name, path.absolute())
    if args.data and args.data != DEMO and Path(args.data).exists():
        args.data = str(Path(args.data).absolute())
    return args


def take_over(args: argparse.Namespace, given: Collection[str]) -> None:
    """Take what makes the model from the checkpoint of `--init-from`, except for the options `given`."""
    config = read_config(args.init_from)
    backbone = config["backbone"]
    made = config["lora"] | {name: backbone[name] for name in SIZES}
    made["inputs"] = config["inputs"]
    if text := config["text"]:
        made |= {"title_length": text["length"], "mask_title_leaks": text["mask"]}
    if args.backbone in (None, backbone["name"]):
        made |= {"backbone": backbone["name"], "weights": remembered_weights(args.init_from)}
    vars(args).update({name: value for name, value in made.items() if name not in given})
