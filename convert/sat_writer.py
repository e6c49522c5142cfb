"""Splits a model into the released layout's shards and writes them."""

from pathlib import Path

import jax
import numpy as np

from convert import sat_layout
from convert.errors import ConvertError
from convert.torch_file import write_torch_file
from glm_jax.config import GLMConfig
from glm_jax.model.checkpoint import refuse_non_empty, restore
from glm_jax.model.layers import rotary_tables
from glm_jax.model.params import LINEAR_NAMES, GLMParams
from glm_jax.quantization import QuantizedArray


def write_shards(source: Path, output: Path, shards: int, iteration: str = "49300") -> None:
    """Writes `latest` and ITERATION/mp_rank_RR_model_states.pt, in float16.

    `latest` comes last: without it the folder is no checkpoint.

    Raises:
      ConvertError: a quantised model, or sizes that do not divide into the shards.
      CheckpointError: no model at `source`, or the output folder is not empty.
    """
    refuse_non_empty(output)
    if shards < 1:
        raise ConvertError(f"--shards={shards}: at least 1")
    config, params = restore(source)
    if isinstance(params.layers.dense.kernel, QuantizedArray):  # type: ignore[union-attr]
        raise ConvertError(f"{source} is quantised: export the float model that it came from")
    params = jax.tree.map(lambda x: np.asarray(x, np.float16), params)
    modules = split(config, params, shards)
    folder = output / iteration
    folder.mkdir(parents=True)
    for rank, module in enumerate(modules):
        write_torch_file(folder / f"mp_rank_{rank:02d}_model_states.pt", module)
    (output / "latest").write_text(iteration, encoding="utf-8")
    print(f"wrote {output}: {shards} shards of {len(modules[0])} tensors")


def split(config: GLMConfig, params: GLMParams, shards: int) -> list[dict[str, np.ndarray]]:
    """The released name -> tensor dictionary of each shard, from numpy parameters."""
    modules: list[dict[str, np.ndarray]] = [{} for _ in range(shards)]
    if config.vocab_size % shards or config.num_heads % shards:
        raise ConvertError(
            f"vocabulary {config.vocab_size} and {config.num_heads} heads do not divide "
            f"into {shards} shards"
        )

    def put_all(name: str, parts: list[np.ndarray]) -> None:
        for module, part in zip(modules, parts, strict=True):
            module[name] = part

    layers, last = params.layers, params.final_layernorm
    put_all(sat_layout.EMBEDDING, np.split(params.word_embeddings, shards))
    for i in range(config.num_layers):
        for name in sat_layout.LAYERNORMS:
            norm, prefix = getattr(layers, name), sat_layout.layernorm_name(i, name)
            put_all(f"{prefix}.weight", [norm.scale[i]] * shards)
            put_all(f"{prefix}.bias", [norm.bias[i]] * shards)
        for name in LINEAR_NAMES:
            linear, prefix = getattr(layers, name), sat_layout.linear_name(i, name)
            parts = sat_layout.split_linear(name, linear.kernel[i], linear.bias[i], shards)
            put_all(f"{prefix}.weight", [weight for weight, _ in parts])
            put_all(f"{prefix}.bias", [bias for _, bias in parts])
    put_all(f"{sat_layout.FINAL_LAYERNORM}.weight", [last.scale] * shards)
    put_all(f"{sat_layout.FINAL_LAYERNORM}.bias", [last.bias] * shards)
    inv_freq = rotary_tables(config)[0].astype(np.float16)
    for i in range(config.num_layers):
        put_all(f"transformer.layers.{i}.attention.rotary_emb.inv_freq", [inv_freq] * shards)
    return modules
