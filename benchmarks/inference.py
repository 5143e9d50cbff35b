"""Speed of a trained checkpoint: merged or not, other precisions and runtimes, beside plain timm and Hugging Face.

    pip install -r benchmarks/requirements.txt
    python benchmarks/inference.py --weights FILE --data FOLDER [--checkpoint FOLDER] [--rounds 15] [--compile]

*Model*: normalised images in memory to logits. Plain timm is `timm.create_model` with the exported weights, and copies
of this project's heads on top, so that both do the same work; the script checks that their outputs agree. Hugging
Face's ViT is of equal size, with random weights (speed does not depend on them) and one linear layer for `articleType`
alone. *Pictures*: decoded pictures in memory to labels with their confidence, beside `transformers.pipeline`.
`infer_folder.py` measures a folder of files, start-up included. bf16 is left out where the machine has none. Ways take
turns, and ratios are within rounds.
"""

import contextlib
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import safetensors.torch
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import in_turn, machine, markdown, ratios, spread
from hf_vit import save_hf_vit

import export
from arguments import add_checkpoint_options
from data.images import ImageError, decode
from data.preprocess import Preprocess
from data.sources import load_source
from data.store import default_cache_dir
from defaults import choose_amp
from errors import Parser, UserError, exits_cleanly, positive_int
from lora import keep_base_in, merge_lora, quantize_base
from models.backbone import bare_backbone
from models.checkpoint import find_checkpoint, load_checkpoint
from models.classifier import AttributeClassifier
from models.decode import Decoder

BATCHES = {1: 20, 64: 2}  # pictures at a time, and how many times in a turn
TIMM, FIRST = "plain timm", "HF pipeline, fp32"
CPU = torch.device("cpu")


def plain_timm(model: AttributeClassifier, config: dict, folder: Path) -> nn.Module:
    """timm's own model with the weights that `export.py --to timm` writes, and copies of the heads."""
    export.export_timm(model, config, folder / "timm.safetensors")
    base, backbone = config["backbone"], bare_backbone(config["backbone"]["name"])
    backbone.set_input_size(base["img_size"], base["patch_size"])
    backbone.load_state_dict(safetensors.torch.load_file(folder / "timm.safetensors"))
    return AttributeClassifier(backbone, copy.deepcopy(model.heads), model.keep_patches).eval()


def onnx_runtime(model: AttributeClassifier, config: dict, folder: Path) -> Callable[[Tensor], list[np.ndarray]]:
    """The file that `export.py --to onnx` writes, on as many threads as torch has."""
    export.export_onnx(model, config, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def in_bf16(model: nn.Module, compiled: bool = False) -> Callable[[Tensor], object]:
    """The model with its weights in bf16, for fp32 images: as `infer.py --amp bf16` runs it, once merged."""
    narrow = copy.deepcopy(model).bfloat16()
    keep_base_in(narrow, torch.bfloat16)
    narrow = torch.compile(narrow, dynamic=False) if compiled else narrow
    ours = isinstance(model, AttributeClassifier)  # which looks at the pictures before they are rounded
    return lambda images: narrow(images if ours else images.bfloat16())


def in_autocast(model: nn.Module, device: torch.device) -> Callable[[Tensor], object]:
    """Products in bf16, the tokens between layers in fp32: as `train.py --amp bf16` runs it."""
    narrow = copy.deepcopy(model)
    keep_base_in(narrow, torch.bfloat16)

    def run(images):
        with torch.autocast(device.type, torch.bfloat16):
            return narrow(images)

    return run


def model_ways(
    model: AttributeClassifier, config: dict, device: torch.device, folder: Path, compiled: bool, narrow: bool
) -> dict[str, Callable[[Tensor], object]]:
    """Images (B, 3, S, S) -> logits, each way; where `narrow`, in bf16 too."""
    merged, vanilla = merge_lora(model).requires_grad_(False), plain_timm(model, config, folder)
    hf = transformers.ViTForImageClassification.from_pretrained(folder / "hf").eval()
    onnx = onnx_runtime(model, config, folder) if device == CPU else None
    for module in (model, merged, vanilla, hf):
        module.to(device)
    keep_base_in(merged, torch.float32)
    ways = {f"{TIMM}, fp32": vanilla, "LoRA in place, fp32": model, "merged, fp32": merged, "HF ViT, fp32": hf}
    ways["merged, int8 weights, fp32"] = quantize_base(copy.deepcopy(merged))
    if onnx:
        ways["ONNX Runtime, fp32"] = onnx
    if compiled:
        ways["merged, compiled, fp32"] = torch.compile(merged, dynamic=False)
    if narrow:
        ways[f"{TIMM}, bf16"] = in_bf16(vanilla)
        ways["LoRA in place, bf16 by autocast"] = in_autocast(model, device)
        ways |= {"merged, bf16": in_bf16(merged), "merged, bf16 by autocast": in_autocast(merged, device)}
        ways["HF ViT, bf16"] = in_bf16(hf)
        if compiled:
            ways["merged, compiled, bf16"] = in_bf16(merged, compiled=True)
    return ways


def check_same(ways: dict[str, Callable], images: Tensor) -> None:
    """Check that plain timm, ONNX Runtime and the LoRA layers in place answer as the merged model does."""
    wanted = ways["merged, fp32"](images)
    for name in ways.keys() & {f"{TIMM}, fp32", "LoRA in place, fp32", "ONNX Runtime, fp32"}:
        found = ways[name](images)
        found = dict(zip(wanted, map(torch.from_numpy, found), strict=True)) if isinstance(found, list) else found
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def label_ways(
    model: AttributeClassifier, config: dict, device: torch.device, folder: Path, narrow: bool
) -> dict[str, Callable[[list[Image.Image]], object]]:
    """Decoded pictures -> labels with their confidence, each way."""
    merged, preprocess, decoder = merge_lora(model).to(device), Preprocess(**config["preprocess"]), Decoder(config)
    keep_base_in(merged, torch.float32)

    def label(pictures: list[Image.Image], run: Callable[[Tensor], dict[str, Tensor]]) -> list[list[tuple[str, float]]]:
        pixels = torch.from_numpy(np.stack([preprocess.to_canvas(picture) for picture in pictures])).to(device)
        found = decoder(run(preprocess(pixels)))
        return [
            [(a["labels"][c], p) for a, c, p in zip(config["attributes"], *said, strict=True)]
            for said in zip(found.labels.tolist(), found.confidence.tolist(), strict=True)
        ]

    pipeline = partial(transformers.pipeline, "image-classification", str(folder / "hf"), device=device, batch_size=64)
    ways = {FIRST: pipeline(dtype=torch.float32), "this project, fp32": partial(label, run=merged)}
    if narrow:
        ways["HF pipeline, bf16"] = pipeline(dtype=torch.bfloat16)
        ways["this project, bf16"] = partial(label, run=in_bf16(merged))
    return ways


def times(ways: dict[str, Callable], inputs, device: torch.device, rounds: int) -> dict[int, dict[str, list[float]]]:
    """Seconds that a call of each way takes, for each size in `BATCHES` with that many of the inputs."""

    def repeat(way: Callable, some, calls: int) -> None:
        for _ in range(calls):
            way(some)

    found = {}
    for size, calls in BATCHES.items():
        turns = {name: partial(repeat, way, inputs[:size], calls) for name, way in ways.items()}
        seconds = in_turn(turns, rounds, device)
        found[size] = {name: [s / calls for s in taken] for name, taken in seconds.items()}
    return found


def batch_table(found: dict[int, dict[str, list[float]]], first: str) -> str:
    """Markdown: milliseconds a call, pictures a second, and both as multiples of the first way's speed."""
    head, names = [""], list(next(iter(found.values())))
    for size in found:
        head += [f"batch {size}: ms", "images/s", f"times {first}"]
    rows = []
    for name in names:
        row = [name]
        for size, seconds in found.items():
            middle = statistics.median(seconds[name])
            row += [f"{1e3 * middle:.2f}", f"{size / middle:,.0f}", spread(ratios(seconds[first], seconds[name]))]
        rows.append(row)
    return markdown(head, rows)


def some_pictures(data: str, count: int) -> list[Image.Image]:
    """The first so many of a catalogue, decoded."""
    catalogue, pictures = load_source(data, default_cache_dir(), 2 * count), []
    for row in range(len(catalogue.ids)):
        with contextlib.suppress(ImageError):
            pictures.append(decode(catalogue.read(row)))
        if len(pictures) == count:
            return pictures
    raise UserError(f"{data} has {len(pictures)} readable pictures; {count} are needed")


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add_checkpoint_options(parser)
    parser.add_argument("--data", required=True, help="catalogue whose pictures are labelled")
    parser.add_argument("--rounds", type=positive_int, default=15, help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile the merged model")
    args = parser.parse_args()
    checkpoint = find_checkpoint(args.checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    narrow = choose_amp(device) == "bf16"
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, config = load_checkpoint(checkpoint, args.weights)
        pictures = some_pictures(args.data, max(BATCHES))
        save_hf_vit(merge_lora(model.backbone), config, folder / "hf")
        preprocess = Preprocess(**config["preprocess"])
        images = preprocess(torch.from_numpy(np.stack([preprocess.to_canvas(p) for p in pictures]))).to(device)
        ways = model_ways(model, config, device, folder, args.compile, narrow)
        with torch.inference_mode():
            check_same(ways, images[:8])
            models = times(ways, images, device, args.rounds)
            labels = times(label_ways(model, config, device, folder, narrow), pictures, device, args.rounds)
    print(machine(device, timm, transformers, onnxruntime))
    print(f"{config['backbone']['name']}, {preprocess.size[0]} px, {args.rounds} rounds\n")
    print(batch_table(models, f"{TIMM}, fp32"))
    for precision in ("fp32", "bf16")[: 1 + narrow]:
        sides = (f"{TIMM}, {precision}", f"merged, {precision}")
        said = (f"batch {size} {spread(ratios(*map(seconds.get, sides)))}" for size, seconds in models.items())
        print(f"merged, times plain timm in {precision}: {', '.join(said)}")
    print(f"\n{batch_table(labels, FIRST)}")


if __name__ == "__main__":
    main()
