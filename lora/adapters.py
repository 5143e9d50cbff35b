"""Several adapters over one frozen model in one process."""

from torch import nn

from .inject import lora_layers
from .state import get_adapter_params


class Adapters:
    """Named adapters over one base model; at most one is in use at a time.

    The base layers are never changed. Using an adapter puts its layers in their places, merging it puts merged copies
    there, and disabling it puts the original layer objects back. Nothing is ever subtracted from a weight, so the base
    stays bit-identical.

    Args:
        model: any module without LoRA, already on its final device; it is changed in place.
    """

    def __init__(self, model: nn.Module):
        self.model = model.requires_grad_(False)
        self.base: dict[str, nn.Module] = {}  # the layer at each path before any adapter
        self.layers: dict[str, dict[str, nn.Module]] = {}

    def add(self, name: str, *settings, **options) -> dict[str, nn.Parameter]:
        """Make an adapter with the settings that `lora_layers` takes; afterwards no adapter is in use.

        Returns:
            the adapter's parameters by name, as `get_adapter_params` gives them, to train or to fill by `load_params`.

        Raises:
            ValueError: an adapter of this name exists already, or `lora_layers` raises it.
        """
        if name in self.layers:
            raise ValueError(f"there is an adapter {name!r} already")
        self.use(None)
        self.layers[name] = lora_layers(self.model, *settings, **options)
        self.base |= {path: self.model.get_submodule(path) for path in self.layers[name]}
        params = get_adapter_params(self.use(name))
        self.use(None)
        return params

    def use(self, name: str | None, merged: bool = False) -> nn.Module:
        """Put an adapter in place, as plain merged layers if `merged`; None puts the base back. Returns the model.

        Raises:
            ValueError: there is no adapter of this name.
        """
        if name is not None and name not in self.layers:
            raise ValueError(f"no adapter {name!r}; there are {', '.join(self.layers) or 'none'}")
        for path, layer in self.base.items():
            self._put(path, layer)
        for path, layer in self.layers.get(name, {}).items():
            self._put(path, layer.merge() if merged else layer)
        return self.model

    def _put(self, path: str, layer: nn.Module) -> None:
        """Put `layer` at `path` in the train or eval mode of the layer there, the only one `model.eval()` reached."""
        self.model.set_submodule(path, layer.train(self.model.get_submodule(path).training))
