import pytest
import timm
import torch
from torch import nn

from lora import LoRAFusedLinear, LoRALinear, Target, apply_lora, get_adapter_params, parameter_summary


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def pairs(*layers):
    return {f"blocks.{i}.{layer}.lora_{m}" for i in range(2) for layer in layers for m in "AB"}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["query", "value"], ["attn.qkv.query", "attn.qkv.value"]),
        (["dense"], ["attn.proj", "mlp.fc1", "mlp.fc2"]),
        (["key", "fc1"], ["attn.qkv.key", "mlp.fc1"]),
        (["qkv"], ["attn.qkv"]),
        (["mlp.fc2", "dense", "dense"], ["attn.proj", "mlp.fc1", "mlp.fc2"]),
        (["proj"], ["attn.proj"]),  # and not the convolution patch_embed.proj
    ],
)
def test_what_is_trainable(make_vit, table, targets, layers):
    model = make_vit()
    assert apply_lora(model, targets, 4, 8, 0.1, table) is model
    assert trainable(model) == pairs(*layers) == set(get_adapter_params(model))


def test_layers_get_the_options(make_vit, table):
    model = apply_lora(make_vit(), ["query", "fc1"], 4, 6, 0.1, table)
    qkv, fc1 = model.blocks[1].attn.qkv, model.blocks[1].mlp.fc1
    assert isinstance(qkv, LoRAFusedLinear)
    assert isinstance(fc1, LoRALinear)
    assert qkv.dropout == fc1.dropout == 0.1
    assert qkv.query.scaling == fc1.scaling == 1.5
    assert qkv.query.lora_A.shape == (4, 32)
    assert qkv.query.lora_B.shape == (32, 4)
    assert fc1.lora_B.shape == (128, 4)


def test_names_match_on_dotted_boundaries():
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "out_proj": nn.Linear(2, 2)})
    apply_lora(model, ["proj"], 1, 1)
    assert isinstance(model["proj"], LoRALinear)
    assert type(model["out_proj"]) is nn.Linear


def test_vit_base_has_the_published_number_of_parameters(table):
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
        apply_lora(model, ["query", "key", "value", "dense"], 16, 32, 0.05, table)
    assert len(get_adapter_params(model)) == 72 * 2
    assert sum(p.numel() for p in get_adapter_params(model).values()) == 2_654_208
    assert parameter_summary(model) == "trainable 2,654,208 / total 88,452,864 (3.00%)"


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ([], {}, "target_modules is empty"),
        (["query", "quarry"], {}, "target 'quarry' matches no linear layer; .*fc1.*query"),
        (["patch_embed.proj"], {}, "target 'patch_embed.proj' matches no linear layer"),
        (["query"], {"rank": 0}, "rank must be at least 1, got 0"),
        (["query"], {"alpha": 0}, "alpha must be positive, got 0"),
        (["query"], {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (["query"], {"rank": {"query": 4, "quary": 8}}, "rank of 'quary', which is no target; there are query"),
        (
            ["fc1", "mlp.fc1"],
            {"rank": {"fc1": 2, "mlp.fc1": 4}},
            "fc1, mlp.fc1 are one layer, of different",
        ),
        (["query", "qkv"], {}, "targets query, qkv split blocks.0.attn.qkv in different ways"),
        (
            ["two"],
            {"table": {"two": [Target("attn.qkv", 0, 3), Target("attn.qkv", 1, 3)]}},
            "target 'two' means several parts of blocks.0.attn.qkv; give each a name of its own",
        ),
        (
            ["a", "b"],
            {"table": dict.fromkeys("ab", Target("attn.qkv", 1, 3))},
            "blocks must name each block once, got {'a': 1, 'b': 1}",
        ),
    ],
)
def test_mistakes_leave_the_model_unchanged(make_vit, table, targets, options, message):
    model = make_vit()
    names, training = list(model.state_dict()), trainable(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, targets, **{"rank": 4, "alpha": 8, "table": table, **options})
    assert list(model.state_dict()) == names
    assert trainable(model) == training


def test_a_layer_is_adapted_only_once(make_adapted, table):
    model = make_adapted(["query", "fc1"])
    before = trainable(model)
    with pytest.raises(ValueError, match=r"target 'fc1' matches blocks.0.mlp.fc1, which has LoRA already"):
        apply_lora(model, ["fc2", "fc1"], 4, 8)
    assert trainable(model) == before
    apply_lora(model, ["fc2"], 4, 8)
    assert trainable(model) == before | pairs("mlp.fc2"), "LoRA from an earlier call stays trainable"


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_does_more_than_its_product_is_refused():
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda layer, inputs, y: y.clamp(max=1))
    offloaded = nn.Linear(3, 3)
    offloaded.forward = lambda x: 2 * nn.functional.linear(x, offloaded.weight)  # as accelerate replaces it
    for layer in (Twice(3, 3), hooked, offloaded):
        model = nn.Sequential(layer)
        with pytest.raises(ValueError, match="target '0' matches 0, which has a forward or hooks of its own"):
            apply_lora(model, ["0"], 1, 1)
        assert model[0] is layer


def test_one_target_in_a_table(make_vit):
    apply_lora(model := make_vit(), ["up"], 4, 8, table={"up": Target("fc1")})
    assert trainable(model) == pairs("mlp.fc1")
