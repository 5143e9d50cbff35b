"""A trained run in other formats.

python export.py --to timm --out backbone.safetensors    merged weights, for timm.create_model
python export.py --to peft --out adapter/                LoRA alone, for PEFT on Hugging Face's ViT
python export.py --to onnx --out model.onnx              merged backbone, heads and neighbours, for onnxruntime
"""

import startup  # noqa: F401

# isort: split
import contextlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save as tensor_bytes
from torch import nn

from arguments import add_checkpoint_options
from durable import replace_file, sync_file, sync_folder
from errors import Parser, UserError, check_writable, exits_cleanly
from lora import merge_lora, to_peft
from models.backbone import DEMO, DEMO_ARCHITECTURE, DEMO_BACKBONE, DEMO_WEIGHTS, check_hf, hf_name
from models.checkpoint import find_checkpoint, load_checkpoint, remembered_weights
from models.schema import labels_of

KINDS = {"timm": ".safetensors", "peft": "", "onnx": ".onnx"}


def export_timm(model: nn.Module, config: dict, out: Path) -> None:
    """The backbone with LoRA merged in, in timm's names; the heads stay behind."""
    replace_file(out, tensor_bytes(merge_lora(model.backbone).state_dict(), metadata={"format": "pt"}))
    base = config["backbone"]
    name, changed = base["name"], {key: base[key] for key in ("img_size", "patch_size") if base[key]}
    options = {"num_classes": 0} | (DEMO_BACKBONE if name == DEMO else {}) | changed
    create = ", ".join([repr(DEMO_ARCHITECTURE if name == DEMO else name), *(f"{k}={v}" for k, v in options.items())])
    if base["keep_patches"] < 1:
        print(f"trained on the fullest {base['keep_patches']:.0%} of each picture's patches; timm's model takes all")
    print(f"load it: timm.create_model({create}).load_state_dict(safetensors.torch.load_file({str(out)!r}))")


def export_peft(model: nn.Module, config: dict, out: Path, old: bool) -> None:
    """PEFT's two files; the heads stay behind, as PEFT has no place for them."""
    base, embed = config["backbone"], model.backbone.patch_embed
    check_hf(base["name"])
    adapter, tensors = to_peft(model.backbone, lambda name: hf_name(name, old), config["lora"]["dropout"])
    out.mkdir(parents=True, exist_ok=True)
    with put_together(out) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=1) + "\n", encoding="utf-8")
        (folder / "adapter_model.safetensors").write_bytes(tensor_bytes(tensors, metadata={"format": "pt"}))
    if base["img_size"] or base["patch_size"]:
        sizes = f"image_size={embed.img_size[0]}, patch_size={embed.patch_size[0]}"
        print(f"ViTModel needs {sizes}, and the embeddings of patches and positions that --to timm writes")
    if base["keep_patches"] < 1:
        print(f"trained on the fullest {base['keep_patches']:.0%} of each picture's patches; ViTModel takes all")
    since = "up to 5.8" if old else "from 5.9 on"
    print(f"load it, transformers {since}: PeftModel.from_pretrained(ViTModel(...), {str(out)!r})")


@contextlib.contextmanager
def put_together(place: Path) -> Iterator[Path]:
    """A folder whose files are moved to `place` once the disk has all of them; if it is full, all the old ones stay."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)
        files = sorted(Path(folder).iterdir(), reverse=True)  # a .json, which says what the others are, comes last
        for file in files:
            sync_file(file)
        for file in files:
            os.replace(file, place / file.name)
        sync_folder(place)


class Logits(nn.Module):
    """The model with its outputs in a tuple, in the order of the attributes, as ONNX wants them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.model(images).values())


def export_onnx(model: nn.Module, config: dict, out: Path) -> None:
    """`images` (batch, 3, S, S), resized and normalised as the file beside it says, -> the logits of each attribute.

    That file also holds what turns logits into answers: temperatures and thresholds, and the paths that labels may
    form.
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise UserError(f"--to onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from onnx_ir.passes.common import NameFixPass
    from onnxscript import opset18

    def stable_sort(x, stable: bool, dim: int, descending: bool):  # of `models.patches`; torch has no translation of it
        length = opset18.Gather(opset18.Shape(x), [dim])
        return opset18.TopK(x, length, axis=dim, largest=int(descending))  # of equals, the first come first

    images = torch.zeros(2, 3, *config["preprocess"]["size"])
    numbers = {a["name"]: {"mean": a["mean"], "std": a["std"]} for a in config["attributes"] if a["kind"] == "number"}
    about = {"preprocess": config["preprocess"], "labels": labels_of(config)}
    about |= ({"numbers": numbers} if numbers else {}) | {"paths": config["paths"]}
    about["calibration"] = config.get("calibration")
    beside = out.with_suffix(".json")
    with put_together(out.parent) as folder:
        program = torch.onnx.export(
            Logits(merge_lora(model)).eval(),
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=[attribute["name"] for attribute in config["attributes"]],
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
        NameFixPass()(program.model)  # an attribute may be called as a value within the graph is, such as cat
        program.save(folder / out.name, external_data=False)  # above 2 GB the numbers are in a file of their own
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        (folder / beside.name).write_text(text, encoding="utf-8")
    print(f"what its inputs and outputs mean: {beside}")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Write a trained run in another format.")
    add_checkpoint_options(parser)
    parser.add_argument("--to", choices=KINDS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="FILE.safetensors, FOLDER or FILE.onnx")
    parser.add_argument("--old-names", action="store_true", help="peft: for transformers up to 5.8")
    args = parser.parse_args(argv)
    if args.old_names and args.to != "peft":
        raise UserError(f"--old-names goes with --to peft; --to {args.to} has no others")
    if args.out.suffix.lower() != KINDS[args.to]:
        raise UserError(f"--out {args.out}: --to {args.to} makes a {KINDS[args.to] or 'folder, without a suffix'}")
    if args.to == "peft" and args.out.is_file():
        raise UserError(f"--out {args.out}: it is a file, and --to peft makes a folder")
    folder = find_checkpoint(args.checkpoint)
    read = [args.weights or remembered_weights(folder), DEMO_WEIGHTS, *folder.glob("*")]
    inside = args.to == "peft" and args.out.is_dir()
    check_writable(args.out / "adapter_config.json" if inside else args.out, "--out", read)
    if args.to == "onnx" and args.out.with_suffix(".json").exists() and not args.out.exists():
        raise UserError(f"--out {args.out}: {args.out.with_suffix('.json')} is there already, and would be replaced")
    model, config = load_checkpoint(folder, args.weights)
    if config["inputs"] != "image":
        raise UserError(f"{folder} reads titles, which none of these formats has a place for")
    print(f"checkpoint {folder}")
    if model.neighbours is not None:
        place = "in the file too" if args.to == "onnx" else "left out, as the heads are"
        print(f"the {len(model.neighbours.bank):,} train pictures that it looks at are {place}")
    if args.to == "timm":
        export_timm(model, config, args.out)
    elif args.to == "peft":
        export_peft(model, config, args.out, args.old_names)
    else:
        export_onnx(model, config, args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    main()
