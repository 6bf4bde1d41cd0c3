"""The adapters of a pipeline: merged into its kernels, with weights that can be changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from pixart_jax.denoiser import abstract_model
from pixart_jax.errors import UserError, did_you_mean, finite, short
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.models.quantization import SCALE, kernels, quantize_parameters
from pixart_jax.pipeline.generation import Generator
from pixart_jax.weights.adapters import Adapter, changed, check_fits, merged_kernels
from pixart_jax.weights.backbones import backbone_table
from pixart_jax.weights.tables import Path


class Adapters:
    """Adapters of a network, see `weights.adapters.merge`.

    The kernels without adapters are kept on the host, so that any weights can be set later, and weights of 0
    restore the same bits.

    Attributes:
      weights: the weight of each adapter, by the path it was read from.
    """

    def __init__(
        self,
        generator: Generator,
        config: PixArtConfig,
        adapters: Sequence[tuple[Adapter, float]],
        params: Mapping[str, Any] | None = None,
    ):
        """Merges adapters into the parameters of `generator`, whose network `config` describes.

        Args:
          generator: keeps the network on the devices, in float32 or with kernels in int8.
          config: of the network.
          adapters: each with its weight.
          params: float32 parameters of the network; needed if its kernels are in int8. Adapters are merged
            before the kernels are quantized.

        Raises:
          UserError: an adapter does not fit the network, or two have the same name.
        """
        self._generator, self._config = generator, config
        self._adapters = {adapter.name: adapter for adapter, _ in adapters}
        if len(self._adapters) < len(adapters):
            raise UserError("two adapters have the same name: give each another one (Adapter.name).")
        self.weights: dict[str, float] = dict.fromkeys(self._adapters, 0.0)
        for adapter in self._adapters.values():
            check_fits(adapter, config)
        flat = dict(nnx.to_flat_state(generator.params))
        paths = changed(backbone_table("diffusers", config), list(self._adapters.values()))
        # Without `scan_layers`, each block has its own arrays, see `Blocks.unstack`.
        self._places = {path: [path] if path in flat else _unstacked(path, config.depth) for path in paths}
        self._base: dict[Path, np.ndarray] = {}
        # The input axes of the kernels that the generator has in int8.
        self._inputs: dict[Path, tuple[int, ...]] = {}
        if any(path[-1] == f"kernel{SCALE}" for path in flat):
            self._inputs = kernels(nnx.merge(*abstract_model(config)))
        given = nnx.traversals.flatten_mapping(dict(params or {}))
        for path, places in self._places.items():
            if path in self._inputs:
                self._base[path] = np.asarray(given[path], np.float32)
                continue
            arrays = [np.asarray(flat[place][...].addressable_data(0)) for place in places]
            self._base[path] = arrays[0] if places == [path] else np.stack(arrays)
        self.set({adapter.name: weight for adapter, weight in adapters})

    def set(self, weights: Mapping[str, float]) -> None:
        """Changes weights, and the merged kernels. Adapters that are not named keep their weights.

        Raises:
          UserError: an unknown adapter; a weight that is not a finite number; or a merged kernel that is not
            finite. Nothing has changed then.
        """
        for name, weight in weights.items():
            if name not in self.weights:
                listed = ", ".join(f"'{known}'" for known in self.weights) or "none"
                raise UserError(
                    f"this pipeline has no adapter '{name}', only {listed}.{did_you_mean(name, self.weights)}"
                )
            if isinstance(weight, bool) or not isinstance(weight, int | float | np.number):
                raise UserError(
                    f"the weight of adapter '{name}' is {short(weight, quote=True)}: give a number."
                )
            finite(f"the weight of adapter '{name}'", weight)
        new = {**self.weights, **{name: float(weight) for name, weight in weights.items()}}
        if new != self.weights:
            self._generator.replace(self._arrays(new))
            self.weights = new

    def _arrays(self, weights: Mapping[str, float]) -> Iterator[tuple[Path, np.ndarray]]:
        """Path and value of each parameter of the generator that an adapter can change."""
        adapters = [(self._adapters[name], weight) for name, weight in weights.items()]
        unchanged = dict(self._base)
        for path, kernel in merged_kernels(self._base, self._config, adapters):
            del unchanged[path]
            yield from self._placed(path, kernel)
        for path, kernel in unchanged.items():
            yield from self._placed(path, kernel)

    def _placed(self, path: Path, kernel: np.ndarray) -> Iterator[tuple[Path, np.ndarray]]:
        places = self._places[path]
        for name, array in quantize_parameters([(path, kernel)], self._inputs):
            own = [(*place[:-1], name[-1]) for place in places]
            yield from [(name, array)] if places == [path] else zip(own, array)

    def record(self) -> list[dict[str, Any]]:
        """Path, SHA-256 and weight of each adapter, for the record of an image."""
        return [
            {"path": name, "sha256": self._adapters[name].digest, "weight": weight}
            for name, weight in self.weights.items()
        ]

    @property
    def kernel_bytes(self) -> int:
        """Bytes of the kernels that adapters change. While weights change, a device has them twice."""
        return sum(kernel.nbytes for kernel in self._base.values())

    @property
    def host_bytes(self) -> int:
        """Bytes on the host: the kernels without adapters, and the factors."""
        factors = [each for adapter in self._adapters.values() for each in adapter.modules.values()]
        return self.kernel_bytes + sum(each.down.nbytes + each.up.nbytes for each in factors)


def _unstacked(path: Path, depth: int) -> list[Path]:
    return [(*path[:2], layer, *path[2:]) for layer in range(depth)]
