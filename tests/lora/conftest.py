import pytest
import timm
import torch

from lora import Target, apply_lora, get_adapter_params

TABLE = {
    "query": Target("attn.qkv", block=0, of=3),
    "key": Target("attn.qkv", block=1, of=3),
    "value": Target("attn.qkv", block=2, of=3),
    "dense": (Target("attn.proj"), Target("mlp.fc1"), Target("mlp.fc2")),
}


@pytest.fixture
def table():
    return TABLE


@pytest.fixture
def make_vit():
    """A tiny real ViT, the same each time."""

    def make(**options):
        torch.manual_seed(0)
        size = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}
        return timm.create_model("vit_tiny_patch16_224", num_classes=0, **size, **options)

    return make


@pytest.fixture
def make_adapted(make_vit):
    """The tiny ViT with LoRA whose B is random: at B = 0 nothing LoRA does would show."""

    def make(targets=tuple(TABLE), rank=4, alpha=8, dropout=0.0, dtype=torch.float32):
        model = apply_lora(make_vit().to(dtype), targets, rank, alpha, dropout, TABLE)
        for name, parameter in get_adapter_params(model).items():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    return make
