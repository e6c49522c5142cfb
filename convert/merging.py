"""Merge adapters into a model's kernels, layer by layer."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert.errors import ConvertError
from convert.model_readers import OpenModel, open_model
from glm_jax import files
from glm_jax.checkpoints import parameter_files
from glm_jax.checkpoints.adapter_folder import identity_of, load_adapter
from glm_jax.checkpoints.model_folder import describe_model
from glm_jax.model.adapters import merged_kernel
from glm_jax.model.params import LayerNormParams, LayerParams, LinearParams, map_layer_linears
from glm_jax.progress import progress_bar
from glm_jax.quantization import WeightFormat
from glm_jax.tokenizer import MODEL_FILE, Tokenizer


class MergedModel:
    """An `OpenModel` whose kernels have adapters in them."""

    def __init__(self, model: OpenModel, adapter: Path):
        """Read the adapters' settings.

        Raises:
          ConvertError: the model is quantised.
          CheckpointError: there are no adapters, or they belong to another model.
        """
        if model.bits is not None:
            raise ConvertError(
                f"adapters cannot be merged into int{model.bits} weights: merge them into the "
                "float model, and quantise that; or keep them beside the weights"
            )
        self._model, self._folder = model, adapter
        self.config = model.config
        self.bits: int | None = None
        self.kind = f"{model.kind}, with the adapters of {adapter}"
        identity = identity_of(self.config, model.final_layernorm())
        self._adapter, self._pairs = load_adapter(adapter, self.config, identity, None)
        self._merge = jax.jit(merged_kernel, static_argnames="scale")

    def embedding(self) -> np.ndarray:
        return self._model.embedding()

    def final_layernorm(self) -> LayerNormParams:
        return self._model.final_layernorm()

    def layers(self) -> Iterator[LayerParams]:
        for index, layer in enumerate(self._model.layers()):
            yield self._merged(layer, index)

    def _merged(self, layer: LayerParams, index: int) -> LayerParams:
        def change(name: str, linear: LinearParams) -> LinearParams:
            pair = self._pairs.pairs.get(name)
            if pair is None:
                return linear
            own = jax.tree.map(lambda x: x[index], pair)
            kernel = self._merge(jnp.asarray(linear.kernel), own, scale=self._adapter.scale)
            if not bool(jnp.all(jnp.isfinite(kernel))):
                raise ConvertError(
                    f"layer {index}, {name}: with the adapters of {self._folder} it holds numbers "
                    f"beyond {self.config.param_dtype}: convert the model with --dtype=bfloat16 "
                    "or float32 first"
                )
            return LinearParams(np.asarray(kernel), linear.bias)

        return map_layer_linears(change, layer)


def write_merged(source: Path, adapter: Path, output: Path) -> None:
    """Write a model folder, a layer at a time, under a temporary name until it is whole.

    Raises:
      ConvertError, CheckpointError: see `MergedModel`.
      OutputError: the output is not empty, or cannot be written.
    """
    with files.whole_folder(output) as partial:
        model = MergedModel(open_model(source), adapter)
        folder = partial / parameter_files.PARAMS_FOLDER
        tree = {
            "word_embeddings": model.embedding(),
            "final_layernorm": model.final_layernorm(),
        }
        parameter_files.write_part(folder, parameter_files.EMBEDDING, tree)
        count = model.config.num_layers
        layers = progress_bar(model.layers(), desc="merging", total=count, unit="layer")
        for index, layer in enumerate(layers):
            stacked = jax.tree.map(lambda x: np.asarray(x)[None], layer)
            parameter_files.write_part(
                folder, parameter_files.layers_part(index, index + 1), stacked
            )
        describe_model(
            partial, model.config, WeightFormat(model.config.param_dtype), _tokenizer_files(source)
        )
    print(f"wrote {output}")


def _tokenizer_files(source: Path) -> tuple[Path, ...]:
    """Return a model folder's tokenizer files, if it has any."""
    return Tokenizer(source).files if (source / MODEL_FILE).exists() else ()
