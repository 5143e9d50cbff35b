"""A model and the labelled pictures that it is trained or scored on: set up for a new run, or from a checkpoint."""

import argparse
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import distributed
from data.attributes import LabelMap, Scale, known_paths, never_answered, of_config, read_numbers
from data.batches import Rows, epoch_batches
from data.catalogue import Catalogue, digest, skipped_why
from data.preprocess import Preprocess
from data.schema import FASHION_FILE, Attribute, read_schema
from data.sources import load_source
from data.split import SPLITS
from data.store import ImageStore, common_size, open_store
from defaults import AMP
from errors import UserError
from lora import get_adapter_params, keep_base_in, parameter_summary, quantize_base
from models.backbone import create_backbone
from models.checkpoint import adapt, attach, load_checkpoint, read_config
from models.classifier import AttributeClassifier
from models.inherit import inherit, predecessor
from models.schema import contradiction, labels_of, learnt_from, learnt_on, misfit
from options import EXTRA, LORA_OPTIONS, SIZES
from targets import columns_of, encode, fit_targets, fit_text, named_vocabulary, read_titles
from teacher import Teacher, load_teacher

NAMED = 5  # labels, in a hint
ROUNDED_FOR = 64  # train pictures: twice as many take twice as long, for a twentieth less error


class Task(NamedTuple):
    """Attributes:
    config: what a checkpoint's `config.json` says: attributes and their labels, known paths, preprocessing.
    known: labels and numbers, a row for each picture of the store.
    teacher: another model that training learns from too, if any.
    """

    model: AttributeClassifier
    config: dict
    preprocess: Preprocess
    catalogue: Catalogue
    store: ImageStore
    known: Rows
    teacher: Teacher | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def labels(self) -> np.ndarray:
        """(N, A) class indices."""
        return self.known.labels

    @property
    def classes(self) -> dict[str, list[str]]:
        """Class attribute -> its labels, in the order of the label columns."""
        return labels_of(self.config)

    @property
    def names(self) -> list[str]:
        """All attributes, in the order of the model's outputs: classes, then numbers."""
        return [a["name"] for a in self.config["attributes"]]


def setup(args: argparse.Namespace, device: torch.device) -> Task:
    """Pictures, targets, and the model on its device, for a new run."""
    extra = [name for switch, names in EXTRA.items() if getattr(args, switch) for name in names]
    schema = read_schema(args.attributes or FASHION_FILE, extra)
    attributes, reads = schema.attributes, "title" in args.inputs
    if reads and schema.title is None:
        raise UserError(f'--inputs {args.inputs}: {args.attributes} names no column of titles; add title = "COLUMN"')
    needs = columns_of(attributes, schema.title if reads else None, schema.article)
    catalogue = load_source(args.data, args.cache_dir, args.limit, needs)
    if not args.resume:
        check_split(args, catalogue, schema.article)
    numbers = read_numbers(catalogue.columns, attributes)
    backbone, config = begin(args)
    vocab = named_vocabulary(args) if reads else None
    loaded = load_teacher(args.teacher, args.teacher_weights, config, args.weights) if args.teacher else None
    preprocess, store = open_pictures(args, catalogue, timm.data.resolve_model_data_config(backbone), schema.article)
    train_rows = store.rows("train")
    entries, known = fit_targets(catalogue, numbers, train_rows, attributes, args.min_brand_count)
    if not (known.labels[store.rows("val")] >= 0).any():
        raise UserError(f"{catalogue.name}: no row of the val split has a label of a class; label more of its rows")
    paths = known_paths(known.labels, train_rows, attributes)
    for name, lost in never_answered(paths, entries).items():
        several = f"{', '.join(lost[:NAMED])}{f' and {len(lost) - NAMED:,} more' if len(lost) > NAMED else ''}"
        print(f"hint: {name} will never be {several}: no train row that is so labelled has all labels of the hierarchy")
    config |= {
        "attributes": entries,
        "paths": paths,
        "title": schema.title,
        "article": schema.article,
        "text": None,
        "preprocess": asdict(preprocess),
        "data": {"name": catalogue.name, "rows": len(catalogue), "fingerprint": catalogue.fingerprint}
        | {"ids": digest(catalogue.ids)},
        "teacher": loaded and loaded[1]["sha256"]["adapter.safetensors"],
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "timm": timm.__version__},
    }
    if reads:
        config["text"] = fit_text(args, config, catalogue.columns[schema.title], train_rows, vocab)
        known = known._replace(tokens=read_titles(config, catalogue))
    config = as_saved(config)
    model = attach(backbone, config)
    model.drop_patches = args.drop_patches
    if args.base == "int8":  # before anything is inherited, which a resumed run does not do again
        shrink(model, args.seed, preprocess, store, device)
    if args.init_from and not args.resume:
        print(inherit(model, config, args.init_from))
        config["data"]["heads_fingerprint"] = " ".join(learnt_from(read_config(args.init_from)))
    place(model, args, device)
    teacher = loaded and Teacher(*loaded, config, device, AMP[args.amp] or torch.float32)
    if teacher:
        print(teacher)
    return Task(model, config, preprocess, catalogue, store, known, teacher)


def agree_on(task: Task) -> None:
    """Raise a `UserError` unless all processes have the first one's weights, teacher and catalogue, whose rows they
    share by number."""
    for part in ("backbone", "teacher"):
        distributed.agree(task.config.get(part), part)
    seen = hashlib.blake2b(digest(task.catalogue.ids).encode(), digest_size=16)
    seen.update(json.dumps([task.config[part] for part in ("attributes", "preprocess", "text")]).encode())
    for facts in (*map(task.store.rows, SPLITS), *task.known):
        seen.update(np.ascontiguousarray(facts))
    distributed.agree(seen.hexdigest(), "catalogue")


def begin(args: argparse.Namespace) -> tuple[VisionTransformer, dict]:
    """The frozen backbone with its LoRA layers, and what a checkpoint's config says of both.

    This comes before pictures are decoded, so that mistakes in these options, or in the checkpoint to inherit from, are
    told at once.
    """
    own, lora = ({name: getattr(args, name) for name in names} for names in (SIZES, LORA_OPTIONS))
    backbone, fingerprint = create_backbone(args.backbone, args.weights, args.img_size, args.patch_size)
    config = {
        "backbone": {"name": args.backbone} | own | {"fingerprint": fingerprint},
        "lora": lora,
        "inputs": args.inputs,
    }
    adapt(backbone, config)
    if args.init_from and not args.resume:
        predecessor(config, args.init_from)
    return backbone, config


def check_split(args: argparse.Namespace, catalogue: Catalogue, article: str | None) -> None:
    """Raise a `UserError` if a checkpoint that a new run learns from split this catalogue's rows otherwise: it may have
    been trained on what are validation and test rows now."""
    for option, folder in (("--init-from", args.init_from), ("--teacher", args.teacher)):
        if folder is None:
            continue
        config = read_config(folder)
        same = learnt_on(config, catalogue.fingerprint, args.limit) or config["data"].get("name") == catalogue.name
        if (theirs := config.get("article")) != article and same:
            said = f'article = "{theirs}"' if theirs else "no article"
            raise UserError(f"{option} {folder} was trained with {said} in its file: have the same, or start anew")


def open_pictures(
    args: argparse.Namespace, catalogue: Catalogue, wants: dict, article: str | None
) -> tuple[Preprocess, ImageStore]:
    """The catalogue's decoded pictures, split by their column `article` if there is one, and how they become what the
    backbone `wants`: timm's data config of it."""
    size = wants["input_size"][1:]
    preprocess = Preprocess(
        common_size(catalogue, max(size)), size, wants["interpolation"], wants["mean"], wants["std"]
    )
    articles = catalogue.columns[article] if article else None
    store = open_store(catalogue, preprocess.canvas, args.cache_dir, args.store_gb * 1e9, articles)
    if distributed.first() and not args.resume:
        store.write_skipped(args.out / "skipped.csv")
    counts = {split: len(store.rows(split)) for split in SPLITS}
    if not all(counts.values()):
        raise UserError(f"{catalogue.name} is too small: {counts} rows; every split needs some")
    sizes = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    print(f"{catalogue.name}: {sizes} rows; {skipped_why(store.skipped)}")
    kept = f"decoded images: {store.path} ({store.nbytes / 1e6:,.0f} MB, " if store.nbytes else "images are not kept ("
    print(f"{kept}{'new' if store.built else 'reused'})")
    return preprocess, store


def as_saved(config: dict) -> dict:
    """A config as a checkpoint gives it back. Raises a `UserError` now if none could, rather than when it is read."""
    config = json.loads(json.dumps(config))
    where = misfit(config)
    if what := f"its {where} is not what it should be" if where else contradiction(config):
        raise UserError(f"no checkpoint of this run could be read: {what}")
    return config


def shrink(
    model: AttributeClassifier, seed: int, preprocess: Preprocess, store: ImageStore, device: torch.device
) -> None:
    """Quantise the frozen weights, on the device, for a choice of train pictures that depends on the seed alone.

    So a resumed run has the same base to the bit, given as many threads as before. If there are several processes, all
    take the first one's: see `distributed.in_step`.
    """
    rows = epoch_batches(store.rows("train"), ROUNDED_FOR, seed, run=store.run)[0]
    print(f"frozen weights in 8 bits, rounded for {len(rows)} train pictures", flush=True)
    pixels = torch.from_numpy(np.asarray(store.pixels[rows]))
    model.eval()
    model.backbone.to(device)
    quantize_base(model.backbone, lambda: model.embed(preprocess(pixels.to(device))))


def place(model: AttributeClassifier, args: argparse.Namespace, device: torch.device) -> None:
    """Put the model on its device, its frozen weights ready to compute with too; and say how large it is."""
    model.to(device)
    if args.compile:
        # Each by itself: most are alike, and what is made for one serves all of those. Kinds (adapted or not; the first
        # has no gradient to pass on) times shapes (whole or last batch) can be more than torch's 8. What is scored is a
        # merged copy, which is not compiled.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.optimize_ddp = False  # which would cut blocks of many adapters in two
        for block in model.backbone.blocks:
            block.compile(dynamic=False)  # else a graph for all shapes would serve whole batches too, from the second
    else:
        keep_base_in(model, AMP[args.amp] or torch.float32)
    text = sum(p.numel() for p in model.text.parameters()) if model.text else 0
    heads = sum(p.numel() for p in model.heads.parameters())
    adapters = sum(p.numel() for p in get_adapter_params(model).values())
    print(f"LoRA {adapters:,}{f', text {text:,}' if text else ''} and heads {heads:,}: {parameter_summary(model)}")


def load_task(
    folder: Path,
    weights: Path | None,
    data: str,
    cache_dir: Path,
    limit: int | None,
    device: torch.device,
    store_gb: float,
) -> Task:
    """A checkpoint's model on its device, and a catalogue labelled in the classes it knows."""
    model, config = load_checkpoint(folder, weights)
    attributes, maps, scales = (of_config(kind, config["attributes"]) for kind in (Attribute, LabelMap, Scale))
    preprocess = Preprocess(**config["preprocess"])
    title = config["title"] if config["text"] else None
    catalogue = load_source(data, cache_dir, limit, columns_of(attributes.values(), title))
    articles = catalogue.columns.get(article) if (article := config.get("article")) else None
    if article and articles is None and learnt_on(config, catalogue.fingerprint, limit):
        raise UserError(f"{catalogue.name} lacks the column {article}, by which {folder} was trained to split its rows")
    if article and articles is None:
        print(f"{catalogue.name} lacks the column {article}: pictures of one article may be in several splits")
    store = open_store(catalogue, preprocess.canvas, cache_dir, store_gb * 1e9, articles)
    numbers = read_numbers(catalogue.columns, list(attributes.values()))
    known = encode(catalogue, numbers, list(attributes.values()), maps, scales)
    if title:
        known = known._replace(tokens=read_titles(config, catalogue))
    return Task(model.to(device), config, preprocess, catalogue, store, known)
