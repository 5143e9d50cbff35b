"""The frozen backbone: any timm ViT by name, its base weights, and the fingerprint that names those weights."""

import difflib
import hashlib
import re
from pathlib import Path

import huggingface_hub
import safetensors
import timm
import torch
from safetensors.torch import load_file
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer

import hub
from errors import UserError
from lora import Target

from .attention import use_packed_attention
from .schema import MOST_PATCHES

# What the recipe's target names mean in timm's `vision_transformer.py`: query, key and value are the three row blocks
# of the fused `attn.qkv`; dense is the attention output and both MLP layers, never the convolution `patch_embed.proj`.
VIT_TARGETS = {
    "query": Target("attn.qkv", block=0, of=3),
    "key": Target("attn.qkv", block=1, of=3),
    "value": Target("attn.qkv", block=2, of=3),
    "dense": (Target("attn.proj"), Target("mlp.fc1"), Target("mlp.fc2")),
}

# LoRA pair of a timm ViT: the same layer in Hugging Face's `ViTModel`, as named up to transformers 5.8 and since then.
HF_LAYERS = {
    "blocks.{}.attn.qkv.query": ("encoder.layer.{}.attention.attention.query", "layers.{}.attention.q_proj"),
    "blocks.{}.attn.qkv.key": ("encoder.layer.{}.attention.attention.key", "layers.{}.attention.k_proj"),
    "blocks.{}.attn.qkv.value": ("encoder.layer.{}.attention.attention.value", "layers.{}.attention.v_proj"),
    "blocks.{}.attn.proj": ("encoder.layer.{}.attention.output.dense", "layers.{}.attention.o_proj"),
    "blocks.{}.mlp.fc1": ("encoder.layer.{}.intermediate.dense", "layers.{}.mlp.fc1"),
    "blocks.{}.mlp.fc2": ("encoder.layer.{}.output.dense", "layers.{}.mlp.fc2"),
}

PLAIN = "vit_tiny_patch16_224"  # the model whose layers these are

# The demo's own backbone; `pretrain_demo.py` makes its weights file.
DEMO, DEMO_ARCHITECTURE = "demo", PLAIN
DEMO_BACKBONE = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}
DEMO_WEIGHTS = Path(__file__).with_name("demo_backbone.safetensors")


def create_backbone(
    name: str, weights: Path | None = None, img_size: int | None = None, patch_size: int | None = None
) -> tuple[VisionTransformer, str]:
    """A timm ViT without its classifier, and the fingerprint of its base weights.

    Args:
        name: a timm model name, or "demo".
        weights: a safetensors file with timm's tensor names; None takes the hub's (the demo's are in this repository).
        img_size: side of the square input in pixels; the position embedding is resampled to it.
        patch_size: side of a patch in pixels; the patch embedding is resampled to it, so that a patch that is resized
            to fewer pixels keeps its embedding (FlexiViT, Beyer et al. 2023, arXiv:2212.08013).

    Returns:
        the model, mapping images (B, 3, S, S) to embeddings (B, `num_features`), and the fingerprint.

    Raises:
        UserError: the name is unknown or not a ViT's, the sizes do not fit, or the weights are unavailable or misfit.
    """
    model = bare_backbone(name)
    load_weights(model, weights or find_weights(name, model), name)
    fingerprint = weights_fingerprint(model)
    if img_size or patch_size:
        embed = model.patch_embed
        if patch_size and not isinstance(embed, PatchEmbed):
            raise UserError(f"--patch-size {patch_size}: the patches of {name} are of a map that convolutions make")
        size, patch = img_size or embed.img_size[0], patch_size or embed.img_size[0] // embed.grid_size[0]
        if size < patch or size % patch or size > MOST_PATCHES * patch:
            number = f"more than {MOST_PATCHES}" if size > patch and not size % patch else "no whole number of"
            raise UserError(
                f"an image of {size} pixels a side has {number} patches of {patch}; "
                "give another --img-size or --patch-size"
            )
        model.set_input_size(img_size=size, patch_size=patch_size)
        note_size(model)
    return use_packed_attention(model), fingerprint


def check_hf(name: str) -> None:
    """Raise a `UserError` if a backbone is not a plain ViT, which is what Hugging Face's `ViTModel` implements."""
    with torch.device("meta"):
        own, plain = ({re.sub(r"\.\d+\.", ".N.", key) for key in bare_backbone(n).state_dict()} for n in (name, PLAIN))
    if odd := sorted(own ^ plain):
        verb = "has" if odd[0] in own else "lacks"
        raise UserError(f"{name} {verb} {odd[0]}, unlike Hugging Face's ViT, where PEFT would look for its layers")


def hf_name(pair: str, old: bool = False) -> str:
    """Name of a LoRA pair of a timm ViT -> name of its layer in `ViTModel`; `old`: as in transformers up to 5.8.

    Raises:
        UserError: there is none, as for a fused `qkv` that LoRA adapts as a whole.
    """
    number = pair.split(".")[1]
    names = HF_LAYERS.get(pair.replace(f".{number}.", ".{}.", 1))
    if names is None:
        raise UserError(f"{pair} has no counterpart in Hugging Face's ViT; train with --targets query key value dense")
    return names[0 if old else 1].format(number)


def timm_name(layer: str) -> str:
    """The inverse of `hf_name` for both spellings, and also for a Hugging Face ViT with a head (`vit.` before names).

    Raises:
        UserError: timm's ViT has no such layer.
    """
    number = next((part for part in layer.split(".") if part.isdecimal()), "")
    numbered = {name.format(number): pair.format(number) for pair, names in HF_LAYERS.items() for name in names}
    if (pair := numbered.get(layer.removeprefix("vit."))) is None:
        raise UserError(f"{layer} has no counterpart in timm's ViT")
    return pair


def bare_backbone(name: str) -> VisionTransformer:
    """The architecture with timm's random initialisation and no classifier.

    Under `torch.device("meta")` this costs nothing and is enough to check a name or count the parameters.
    """
    if name == DEMO:
        model = timm.create_model(DEMO_ARCHITECTURE, num_classes=0, **DEMO_BACKBONE)
        note_size(model)
        return model
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("*vit*"), n=3)
        hint = f"near it: {', '.join(near)}" if near else "timm.list_models('vit_*') names them"
        raise UserError(f"unknown backbone {name!r}; {hint}")
    architecture, _, tag = name.partition(".")
    if tag and name not in (tags := timm.list_pretrained(f"{architecture}.*")):
        raise UserError(f"unknown pretrained tag in {name!r}; there are {', '.join(tags) or 'none'}")
    model = timm.create_model(name, num_classes=0)
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"backbone {name!r} is a {type(model).__name__}, not a timm VisionTransformer (try vit_base_patch16_224)"
        )
    return model


def note_size(model: VisionTransformer) -> None:
    """Store the input size where timm's data config, and so our preprocessing, reads it; timm does not store it."""
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, *model.patch_embed.img_size)}


def find_weights(name: str, model: VisionTransformer) -> Path:
    """The published safetensors file of a backbone: in the repo for the demo, else from the hub or its local cache."""
    if name == DEMO:
        return DEMO_WEIGHTS
    repo = model.pretrained_cfg.get("hf_hub_id")
    if not repo:
        raise UserError(f"timm publishes no weights for {name!r}; give --weights FILE.safetensors")
    hub.reachable()  # if it is not, the next call uses the local cache at once instead of retrying for a minute
    try:
        return Path(huggingface_hub.hf_hub_download(repo, "model.safetensors"))
    except Exception as error:  # several libraries raise here; any error means no weights
        raise UserError(
            f"cannot get the weights of {name!r} from the hub ({type(error).__name__}); "
            f"give --weights FILE.safetensors ({repo} there)"
        ) from None


def load_weights(model: VisionTransformer, path: Path, name: str) -> None:
    """Load a safetensors file with timm's tensor names. A classifier is left out; all else must fit exactly."""
    if not path.is_file():
        raise UserError(f"no weights file at {path}; give its place with --weights FILE.safetensors")
    state = read_tensors(path)
    classifier = tuple(f"{prefix}." for prefix in ("head", "head_dist"))
    state = {key: tensor for key, tensor in state.items() if not key.startswith(classifier)}
    want = model.state_dict()
    wrong = sorted(want.keys() ^ state.keys())
    wrong += [key for key in want.keys() & state.keys() if want[key].shape != state[key].shape]
    if wrong:
        raise UserError(
            f"{path} does not hold the weights of {name}: {len(wrong)} tensors differ, the first {wrong[0]!r}"
        )
    model.load_state_dict(state)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file; no other format is read, above all no pickle.

    Raises:
        UserError: the file cannot be read or is not safetensors; the message says so if it is a pickle.
    """
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        reason = f"{error}; give timm's model.safetensors"
        if path.is_file() and path.open("rb").read(4).startswith((b"\x80", b"PK")):
            reason = "a pickle, by its first bytes, and reading one can run any code; nothing of it was read"
        raise UserError(f"{path} is not a safetensors file ({reason})") from None


def weights_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over tensor names, shapes and bytes, so the hub's copy and a local file of the same weights agree."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
