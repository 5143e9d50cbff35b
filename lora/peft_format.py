"""The adapter format of Hugging Face PEFT: what its `adapter_config.json` and `adapter_model.safetensors` hold.

Layer names differ between models, so the caller says how to map them; the caller also reads and writes the files.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from .inject import Target, is_plain
from .layer import LoRAFusedLinear, LoRALayer, LoRALinear, LowRank
from .state import get_adapter_params, load_params, set_trainable_params

PREFIX = "base_model.model."
LEAVE_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")  # initialisations of PEFT's; all others change the base
FOREIGN = (  # features that are not read
    *("modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora"),
)
KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}


def to_peft(model: nn.Module, rename: Callable[[str], str], dropout: float = 0.0) -> tuple[dict, dict[str, Tensor]]:
    """The adapter in `model`, in PEFT's format.

    Args:
        rename: dotted name of a LoRA pair (`attn.qkv.query` in a fused layer) -> name of the layer in PEFT's model.
        dropout: `lora_dropout` for the configuration; the weights do not tell it.

    Returns:
        the configuration and the tensors. Every scaling is written as lora_alpha / r. A PiSSA adapter is written with
        twice the rank, as an update of the original base, so that PEFT needs no other base.

    Raises:
        ValueError: there is no LoRA in the model.
    """
    pairs = {rename(path): pair for path, pair in model.named_modules() if isinstance(pair, LowRank)}
    if not pairs:
        raise ValueError("the model has no LoRA layer")
    factors = {path: pair.factors() for path, pair in pairs.items()}
    ranks = {path: len(lora_A) for path, (lora_A, _) in factors.items()}
    alphas = {path: pair.scaling * ranks[path] for path, pair in pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(pairs),  # full names, so that each matches one layer only
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "use_dora": any(pair.lora_magnitude is not None for pair in pairs.values()),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for path, (lora_A, lora_B) in factors.items():
        found = {"lora_A": lora_A, "lora_B": lora_B, "lora_magnitude": pairs[path].lora_magnitude}
        tensors |= {
            f"{PREFIX}{path}.{KEYS[key]}": tensor.detach().cpu().contiguous()
            for key, tensor in found.items()
            if tensor is not None
        }
    return config, tensors


def from_peft(
    model: nn.Module,
    config: Mapping,
    tensors: Mapping[str, Tensor],
    rename: Callable[[str], str],
    table: Mapping[str, Target] | None = None,
) -> nn.Module:
    """Put an adapter that PEFT saved, or `to_peft` made, on `model`, in place; the inverse of `to_peft`.

    Args:
        rename: dotted name of a layer in PEFT's model -> name of the LoRA pair in `model`.
        table: as in `lora_layers`: the row block that the last part of a pair's name stands for, if it does.

    Raises:
        ValueError: it is not a LoRA adapter, uses an unsupported feature, or does not fit the model.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"the adapter is of PEFT type {config.get('peft_type')!r}, not LORA")
    foreign = [key for key in FOREIGN if config.get(key)]
    if foreign or config.get("bias", "none") != "none":
        raise ValueError(f"the adapter uses {', '.join(foreign) or 'bias'}, which is not supported")
    if isinstance(start := config.get("init_lora_weights"), str) and start not in LEAVE_THE_BASE:
        raise ValueError(
            f"the adapter was started with {start}, which changes the base too; have PEFT convert it "
            "(path_initial_model_for_weight_conversion)"
        )
    if "lora_alpha" not in config:
        raise ValueError("the adapter's configuration lacks lora_alpha")
    state, settings = {}, {}
    for name, tensor in tensors.items():
        key = next((key for key, end in KEYS.items() if name.endswith(f".{end}")), None)
        if key is None:
            raise ValueError(f"{name} is not a tensor of a LoRA layer")
        path = name.removeprefix(PREFIX).removesuffix(f".{KEYS[key]}")
        state[f"{rename(path)}.{key}"] = tensor
        if key == "lora_A":
            settings[rename(path)] = len(tensor), _pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    if not settings:
        raise ValueError("the adapter has no LoRA in it")
    variant = {"rslora": config.get("use_rslora", False), "dora": config.get("use_dora", False)}
    layers = _layers(model, settings, config.get("lora_dropout", 0.0), table or {}, variant)
    params = {f"{path}.{name}": p for path, layer in layers.items() for name, p in get_adapter_params(layer).items()}
    load_params(params, state)
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    set_trainable_params(model, get_adapter_params(model))
    return model


def _pattern(pattern: Mapping[str, float] | None, path: str, default: float) -> float:
    """PEFT's rule for `alpha_pattern`: the first key that, as a regular expression, matches the end of the name."""
    return next((value for key, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({key})", path)), default)


def _layers(model, settings: dict[str, tuple[int, float]], dropout: float, table, variant) -> dict[str, LoRALayer]:
    """LoRA layers for the pairs of `settings`, which maps each pair's name to its rank and alpha."""
    modules, made, fused = dict(model.named_modules()), {}, defaultdict(dict)
    for path, (rank, alpha) in settings.items():
        parent, _, name = path.rpartition(".")
        if isinstance(modules.get(path), nn.Linear):
            made[path] = LoRALinear(modules[path], rank, alpha, dropout, **variant)
        elif isinstance(modules.get(parent), nn.Linear) and isinstance(table.get(name), Target):
            fused[parent][name] = rank, alpha
        else:
            raise ValueError(f"the adapter has {path}, which the model has not")
        if not is_plain(modules.get(path) or modules[parent]):
            raise ValueError(f"the adapter has {path}, which here has a forward or hooks of its own")
    for path, pairs in fused.items():
        blocks = {name: table[name].block for name in pairs}
        ranks, alphas = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
        num_blocks = table[next(iter(pairs))].of
        made[path] = LoRAFusedLinear(modules[path], blocks, num_blocks, ranks, alphas, dropout, **variant)
    return made
