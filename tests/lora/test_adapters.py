"""Several adapters over one base: each as if it were alone, and the base always as it was."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora import Adapters, LoRALayer, apply_lora, get_adapter_params, load_params


@pytest.fixture
def made(make_vit, table, tmp_path):
    """A model with two adapters that differ in everything, read from files, and what each does alone."""
    model = make_vit().eval()
    settings = {"men": (["query", "dense"], 4, 8), "shoes": (["value"], 2, 2)}
    adapters, alone = Adapters(model), {}
    for name, (targets, rank, alpha) in settings.items():
        single = apply_lora(copy.deepcopy(model), targets, rank, alpha, table=table)
        params = adapters.add(name, targets, rank, alpha, table=table)
        with torch.no_grad():
            for p in get_adapter_params(single).values():
                p.copy_(torch.randn_like(p))
        save_file(get_adapter_params(single), tmp_path / name)
        load_params(params, load_file(tmp_path / name))
        alone[name] = single
    return adapters, alone


def test_each_is_what_it_is_alone(made):
    adapters, alone = made
    x = torch.randn(2, 3, 32, 32)
    base = adapters.use(None)(x)
    for name in ("men", "shoes", "men"):
        y = adapters.use(name)(x)
        assert torch.equal(y, alone[name](x))
        torch.testing.assert_close(adapters.use(name, merged=True)(x), y, rtol=1e-4, atol=1e-4)
        assert not [module for module in adapters.model.modules() if isinstance(module, LoRALayer)]
        assert torch.equal(adapters.use(None)(x), base)


def test_all_layers_are_in_the_mode_of_the_model(made):
    adapters, _ = made
    for training in (True, False):
        adapters.model.train(training)
        for name in ("men", None, "shoes"):
            assert {module.training for module in adapters.use(name).modules()} == {training}


def test_the_base_comes_back_bit_for_bit_and_is_shared(made):
    adapters, _ = made
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in adapters.use(None).state_dict().items()}
    for name in ("men", "shoes"):
        adapters.use(name, merged=True)
        adapters.use(name)
    after = adapters.use(None).state_dict()
    assert before.keys() == after.keys()
    assert all(after[key].data_ptr() == place and torch.equal(after[key], old) for key, (place, old) in before.items())


def test_pissa_keeps_the_shared_base_too(make_vit, table):
    model, x = make_vit().eval(), torch.randn(2, 3, 32, 32)
    before, adapters = model(x), Adapters(model)
    adapters.add("principal", ["query"], 2, 2, table=table, pissa=True)
    torch.testing.assert_close(adapters.use("principal")(x), before)
    assert torch.equal(adapters.use(None)(x), before)


def test_errors_name_the_adapter(made, table):
    adapters, _ = made
    with pytest.raises(ValueError, match="no adapter 'hats'; there are men, shoes"):
        adapters.use("hats")
    with pytest.raises(ValueError, match="there is an adapter 'men' already"):
        adapters.add("men", ["query"], 1, 1, table=table)
