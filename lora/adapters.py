"""Several adapters over one frozen model in one process."""

from torch import nn

from .inject import lora_layers
from .state import get_adapter_params


class Adapters:
    """Adapters by name, over one base; at most one is in use at a time.

    The base layers are never changed. To use an adapter is to put its layers in their places, to merge it is to put
    merged copies there, and to stop using it is to put the very same base layers back, so that nothing is subtracted
    and no bit is lost.

    Args:
        model: any module without LoRA, on the device it is to be on; changed in place.
    """

    def __init__(self, model: nn.Module):
        self.model = model.requires_grad_(False)
        self.base: dict[str, nn.Module] = {}  # what was at each place before any adapter
        self.layers: dict[str, dict[str, nn.Module]] = {}

    def add(self, name: str, *settings, **options) -> dict[str, nn.Parameter]:
        """Make an adapter, with the settings of `lora_layers`; nothing is in use afterwards.

        Returns:
            its parameters, to train or, with `load_params`, to fill: names as `get_adapter_params` gives them.

        Raises:
            ValueError: there is an adapter of this name, or as `lora_layers` does.
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
        """The model with this adapter in place, or merged into plain layers, or with none; returns the model.

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
        """In its place, in the mode of what was there: `model.eval()` reached that alone."""
        self.model.set_submodule(path, layer.train(self.model.get_submodule(path).training))
