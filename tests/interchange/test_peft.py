"""Against PEFT on Hugging Face's ViT: the same weights in, the same outputs, gradients and merged weights out."""

import copy
import json
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file

from errors import UserError
from export import export_peft
from lora import apply_lora, from_peft, get_adapter_params, merge_lora, to_peft
from models.backbone import VIT_TARGETS, hf_name, timm_name
from step import WEIGHT_DECAY, parameter_groups

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install -r benchmarks/requirements.txt")
transformers = pytest.importorskip("transformers", reason="transformers is not installed, as for PEFT")

from peft.optimizers import create_loraplus_optimizer  # noqa: E402

ADAPTER = "adapter_model.safetensors"
PAIRS = ("attn.qkv.query", "attn.qkv.key", "attn.qkv.value", "attn.proj", "mlp.fc1", "mlp.fc2")
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
VARIANTS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "rslora and dora": {"rslora": True, "dora": True},
    "pissa": {"pissa": True},
    "some blocks": {"layers": [1]},
    "each target's own": {
        "rank": {"query": 2, "key": 3, "value": 4, "dense": 5},
        "alpha": {"query": 8, "key": 6, "value": 4, "dense": 2},
    },
}


@pytest.fixture(scope="module")
def vits():
    """The same tiny ViT twice: timm's and Hugging Face's, in fp64."""
    torch.manual_seed(0)
    size = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}
    ours = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size).double().eval()
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.ViTConfig(**options, image_size=32, layer_norm_eps=1e-6)
    theirs = transformers.ViTModel(config, add_pooling_layer=False).double().eval()
    theirs.load_state_dict(hf_state(ours.state_dict(), theirs.state_dict()), strict=True)
    torch.testing.assert_close(theirs(IMAGES).last_hidden_state[:, 0], ours(IMAGES))
    return ours, theirs


def is_old(vit) -> bool:
    return any(name.startswith("encoder.") for name, _ in vit.named_modules())


def hf_state(state, like) -> dict:
    """timm's tensors under Hugging Face's names."""
    old = any(name.startswith("encoder.") for name in like)
    around = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    block = "encoder.layer.{}." if old else "layers.{}."
    renamed = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if name in around or layer in around:
            renamed[around[name] if name in around else f"{around[layer]}.{kind}"] = tensor
        elif layer.endswith("attn.qkv"):
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{hf_name(f'{layer}.{part}', old)}.{kind}"] = rows
        elif ".norm" in layer:
            where = "layernorm_before" if layer.endswith("norm1") else "layernorm_after"
            renamed[block.format(layer.split(".")[1]) + f"{where}.{kind}"] = tensor
        else:
            renamed[f"{hf_name(layer, old)}.{kind}"] = tensor
    return renamed


def adapted(ours, rank=4, alpha=8, **options):
    model = apply_lora(copy.deepcopy(ours), VIT_TARGETS, rank, alpha, table=VIT_TARGETS, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in get_adapter_params(model).values():
            p += 0.1 * torch.randn_like(p)
    return model


def saved(model, folder, old):
    """As `export.py --to peft` writes it."""
    base = {"name": "vit_tiny_patch16_224", "img_size": None, "patch_size": None, "keep_patches": 1.0}
    config = {"lora": {"dropout": 0.0}, "backbone": base}
    export_peft(SimpleNamespace(backbone=model), config, folder, old)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_is_the_same_model_in_peft(vits, tmp_path, variant):
    ours, theirs = vits
    model = adapted(ours, **VARIANTS[variant])
    folder = saved(model, tmp_path / "adapter", is_old(theirs))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), folder).eval()
    expected = model(IMAGES)
    assert (expected - ours(IMAGES)).abs().max() > 1e-2
    torch.testing.assert_close(loaded(IMAGES).last_hidden_state[:, 0], expected, rtol=1e-5, atol=1e-5)
    merged = hf_state(merge_lora(model).state_dict(), theirs.state_dict())
    unloaded = loaded.merge_and_unload().state_dict()
    assert merged.keys() == unloaded.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(unloaded[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_an_export_of_other_sizes_is_the_same_over_the_embeddings_that_timm_resampled(vits, tmp_path):
    ours, theirs = vits
    resized = copy.deepcopy(ours)
    resized.set_input_size(img_size=48, patch_size=8)
    model = adapted(resized)
    folder = saved(model, tmp_path / "adapter", is_old(theirs))
    theirs = transformers.ViTModel(
        transformers.ViTConfig(**theirs.config.to_dict() | {"image_size": 48, "patch_size": 8}), add_pooling_layer=False
    ).double()
    theirs.load_state_dict(hf_state(resized.state_dict(), theirs.state_dict()), strict=True)
    loaded = peft.PeftModel.from_pretrained(theirs, folder).eval()
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(loaded(images).last_hidden_state[:, 0], model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "pissa"])
def test_gradients_are_pefts(vits, tmp_path, variant):
    ours, theirs = vits
    model = adapted(ours, **VARIANTS[variant]).train()
    folder = saved(model, tmp_path / "adapter", is_old(theirs))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), folder, is_trainable=True)
    # PEFT loads adapters in fp32; gradients are compared in fp64
    loaded.double()
    model(IMAGES).pow(3).sum().backward()
    loaded(IMAGES).last_hidden_state[:, 0].pow(3).sum().backward()
    theirs_grad = {name: p.grad for name, p in loaded.named_parameters() if p.grad is not None}
    # a saved scaling of alpha / r is the same whether rsLoRA made it or not
    old, checked = is_old(theirs), 0
    for name, p in get_adapter_params(model).items():
        pair, _, kind = name.rpartition(".")
        end = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}.get(
            kind, "lora_magnitude_vector.default.weight"
        )
        torch.testing.assert_close(
            theirs_grad[f"base_model.model.{hf_name(pair, old)}.{end}"], p.grad, rtol=1e-4, atol=1e-6, msg=name
        )
        checked += 1
    assert checked == len(theirs_grad) == {"dora": 36, "rslora and dora": 36, "some blocks": 12}.get(variant, 24)


@pytest.mark.parametrize(
    ("variant", "option"),
    [({"rslora": True}, {"use_rslora": True}), ({"pissa": True}, {"init_lora_weights": "pissa"})],
)
def test_what_peft_makes_itself_has_the_same_outputs_gradients_and_merged_weights(vits, variant, option):
    """An export says alpha / r, and is plain LoRA there: here PEFT scales and starts by itself, in fp32."""
    ours, theirs = vits
    layers = {f"blocks.{i}.{end}": hf_name(f"blocks.{i}.{end}", is_old(theirs)) for i in range(2) for end in PAIRS}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(layers.values()), **option)
    wrapped = peft.get_peft_model(copy.deepcopy(theirs).float(), config).double()
    model = apply_lora(copy.deepcopy(ours), VIT_TARGETS, 4, 8, table=VIT_TARGETS, **variant)
    named, pairs = dict(wrapped.named_parameters()), {}
    torch.manual_seed(2)
    for name, p in get_adapter_params(model).items():
        pair, _, kind = name.rpartition(".")
        pairs[name] = p, named[f"base_model.model.{layers[pair]}.{kind}.default.weight"]
        with torch.no_grad():
            pairs[name][1].add_(0.1 * torch.randn_like(p))
            p.copy_(pairs[name][1])
    found, expected = model(IMAGES), wrapped(IMAGES).last_hidden_state[:, 0]
    assert len(pairs) == 24 and (expected - ours(IMAGES)).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    for name, (p, other) in pairs.items():
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)
    merged = hf_state(merge_lora(model).state_dict(), theirs.state_dict())
    for name, tensor in wrapped.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica"])
def test_adapters_that_leave_the_base_as_it_is_are_read_however_they_start(vits, tmp_path, start):
    ours, theirs = vits
    layers = [hf_name(f"blocks.{i}.{end}", is_old(theirs)) for i in range(2) for end in PAIRS]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=start)
    wrapped = peft.get_peft_model(copy.deepcopy(theirs).float(), config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p += 0.1 * torch.randn_like(p)
    wrapped.save_pretrained(tmp_path)
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / ADAPTER)
    model = from_peft(copy.deepcopy(ours).float(), config, tensors, timm_name, VIT_TARGETS).eval()
    expected = wrapped.eval()(IMAGES.float()).last_hidden_state[:, 0]
    torch.testing.assert_close(model(IMAGES.float()), expected, rtol=1e-4, atol=1e-4)


def test_pissa_starts_as_pefts(vits):
    ours, theirs = vits
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=["fc1", "intermediate.dense"])
    wrapped = peft.get_peft_model(copy.deepcopy(theirs).float(), config)
    layers = [m for m in wrapped.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    assert len(layers) == 2
    for block, layer in zip(ours.blocks, layers, strict=True):
        model = apply_lora(copy.deepcopy(block.mlp).float(), ["fc1"], 4, 8, pissa=True)
        torch.testing.assert_close(model.fc1.delta_weight(), layer.get_delta_weight("default"), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.fc1.base_layer.weight, layer.base_layer.weight, rtol=1e-3, atol=1e-4)


def test_lora_plus_goes_the_way_of_pefts(vits, tmp_path):
    ours, theirs = vits
    model = adapted(ours).train()
    folder = saved(model, tmp_path / "adapter", is_old(theirs))
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), folder, is_trainable=True).double()
    params = get_adapter_params(model)
    start = {name: p.detach().clone() for name, p in params.items()}
    optimizers = [
        torch.optim.AdamW(parameter_groups(params, lora_plus=16)),
        create_loraplus_optimizer(
            wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=WEIGHT_DECAY
        ),
    ]
    for group in optimizers[0].param_groups:
        group["lr"] = 1e-3 * group["lr_ratio"]
    for _ in range(5):
        model(IMAGES).pow(3).sum().backward()
        wrapped(IMAGES).last_hidden_state[:, 0].pow(3).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    trained = dict(wrapped.named_parameters())
    for name, p in params.items():
        pair, _, kind = name.rpartition(".")
        other = trained[f"base_model.model.{hf_name(pair, is_old(theirs))}.{kind}.default.weight"]
        moved = (other - start[name]).abs().max()
        assert (1e-3, 1e-2)[kind == "lora_B"] < moved < (6e-3, 9e-2)[kind == "lora_B"]
        torch.testing.assert_close(p, other, rtol=0, atol=1e-12, msg=name)


def test_a_layer_that_timm_has_not_is_named(vits):
    ours, _ = vits
    for layer in ("pooler.dense", "encoder.layer.0.attention.attention.nothing"):
        with pytest.raises(UserError, match=f"{layer} has no counterpart in timm's ViT"):
            timm_name(layer)
    assert timm_name("vit.layers.3.mlp.fc1") == timm_name("layers.3.mlp.fc1") == "blocks.3.mlp.fc1"
    with pytest.raises(ValueError, match="the adapter has no LoRA in it"):
        from_peft(copy.deepcopy(ours), {"peft_type": "LORA", "lora_alpha": 8}, {}, timm_name, VIT_TARGETS)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_what_peft_saved_is_read(vits, tmp_path, options):
    """With the ranks and alphas of single layers, which PEFT writes as patterns."""
    ours, theirs = vits
    names = ["query", "intermediate.dense"] if is_old(theirs) else ["q_proj", "fc1"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=names, rank_pattern={names[1]: 2}, alpha_pattern={names[1]: 3}, **options
    )
    wrapped = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p += 0.2 * torch.randn_like(p)
    wrapped.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    model = from_peft(copy.deepcopy(ours), found, tensors, timm_name, VIT_TARGETS)
    expected = wrapped(IMAGES).last_hidden_state[:, 0]
    assert (expected - ours(IMAGES)).abs().max() > 1e-2
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_blocks_chosen_by_index_are_those_of_peft(vits, tmp_path):
    """In a model around the ViT, as PEFT finds no number in a name that begins with `layers.`."""
    ours, theirs = copy.deepcopy(vits)
    names = [layer.rpartition(".")[2] for layer in (hf_name(f"blocks.0.{end}", is_old(theirs)) for end in PAIRS)]
    around = torch.nn.ModuleDict({"vit": theirs})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, layers_to_transform=[1])
    wrapped = peft.get_peft_model(around, config)
    expected = apply_lora(copy.deepcopy(ours), VIT_TARGETS, 4, 8, table=VIT_TARGETS, layers=[1])
    found = {name.split(".vit.")[1].rsplit(".lora_A")[0] for name, _ in wrapped.named_parameters() if "lora_A" in name}
    pairs = {name.rpartition(".")[0] for name in get_adapter_params(expected)}
    assert {timm_name(layer) for layer in found if not layer.startswith("pooler")} == pairs
    assert len(pairs) == 6


@pytest.mark.parametrize("old", [False, True])
def test_our_own_export_is_read_back(vits, old):
    ours, _ = vits
    model = adapted(ours, dora=True)
    config, tensors = to_peft(model, lambda name: hf_name(name, old))
    back = from_peft(copy.deepcopy(ours), config, tensors, timm_name, VIT_TARGETS)
    assert torch.equal(back(IMAGES), model(IMAGES))
    assert get_adapter_params(back).keys() == get_adapter_params(model).keys()


def test_an_adapter_that_does_not_fit_leaves_no_trace(vits):
    ours = copy.deepcopy(vits[0])
    config, tensors = to_peft(adapted(vits[0]), hf_name)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    tensors[name] = tensors[name][:-1]
    with pytest.raises(ValueError, match="misshaped"):
        from_peft(ours, config, tensors, timm_name, VIT_TARGETS)
    assert not get_adapter_params(ours)


def test_what_cannot_be_read_is_said(vits):
    ours, _ = vits
    with pytest.raises(ValueError, match="no LoRA layer"):
        to_peft(ours, hf_name)
    config, tensors = to_peft(adapted(ours), hf_name)
    hooked = copy.deepcopy(ours)
    hooked.blocks[1].attn.qkv.register_forward_hook(lambda layer, inputs, y: 2 * y)
    with pytest.raises(ValueError, match=r"blocks.1.attn.qkv.query, which here has a forward or hooks of its own"):
        from_peft(hooked, config, tensors, timm_name, VIT_TARGETS)
    for config, message in (
        ({"peft_type": "IA3"}, "PEFT type 'IA3', not LORA"),
        ({"peft_type": "LORA", "modules_to_save": ["classifier"]}, "modules_to_save, which is not supported"),
        ({"peft_type": "LORA", "alora_invocation_tokens": [3]}, "alora_invocation_tokens, which is not supported"),
        ({"peft_type": "LORA", "bias": "all"}, "bias, which is not supported"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "started with pissa_niter_4, which changes"),
        ({"peft_type": "LORA"}, "lacks lora_alpha"),
    ):
        with pytest.raises(ValueError, match=message):
            from_peft(copy.deepcopy(ours), config, {}, timm_name, VIT_TARGETS)
