"""Hugging Face's ViT of the size of a timm ViT: the rival of `inference.py` and `infer_folder.py`."""

from pathlib import Path

import transformers
from PIL import Image
from torch import nn


def save_hf_vit(backbone: nn.Module, config: dict, folder: Path) -> None:
    """Hugging Face's ViT of the size of a timm ViT, and its image processor, as `pipeline` loads them."""
    labels = next(a["labels"] for a in config["attributes"] if a["name"] == "articleType")
    size, preprocess = backbone.patch_embed.img_size[0], config["preprocess"]
    vit = transformers.ViTConfig(
        hidden_size=backbone.embed_dim,
        num_hidden_layers=len(backbone.blocks),
        num_attention_heads=backbone.blocks[0].attn.num_heads,
        intermediate_size=backbone.blocks[0].mlp.fc1.out_features,
        image_size=size,
        patch_size=backbone.patch_embed.patch_size[0],
        id2label=dict(enumerate(labels)),
    )
    transformers.ViTForImageClassification(vit).save_pretrained(folder)
    transformers.ViTImageProcessor(
        size={"height": size, "width": size},
        resample=getattr(Image.Resampling, preprocess["interpolation"].upper()),
        image_mean=preprocess["mean"],
        image_std=preprocess["std"],
    ).save_pretrained(folder)
