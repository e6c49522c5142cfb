"""Keys and values in pages, so that a sequence holds as many as its length asks for.

The pages of all layers lie in one array where layers are stacked, so that a program that
loops over them changes it in place; else each layer has its own. Pages are divided over the
devices that divide rows (data, fsdp), heads over those that divide heads (tensor); a page's
number counts within its device and layer, and page 0 takes what no one will read.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Int32, Shaped

from glm_jax.config import GLMConfig
from glm_jax.sharding import (
    activation_sharding,
    fitting_activation_spec,
    mesh_to_divide,
    per_device,
    row_shards,
)

PAGE_AXES = ("heads", "batch", "seq", "head_dim")


@struct.dataclass
class PagedCache:
    """Keys and values of a layer, or of all layers after one another.

    Attributes:
      keys, values: [heads, pages, page_size, head_dim], float or int8.
      key_scales, value_scales: float32 [heads, pages, page_size], what int8 is multiplied
        by; None for floats.
    """

    keys: Shaped[Any, "heads pages page_size head_dim"]
    values: Shaped[Any, "heads pages page_size head_dim"]
    key_scales: Float[Any, "heads pages page_size"] | None = None
    value_scales: Float[Any, "heads pages page_size"] | None = None


PagedKVCache = PagedCache | tuple[PagedCache, ...]


@struct.dataclass
class Paging:
    """Where a program's tokens lie.

    Attributes:
      pages, offsets: int32 [batch, seq]: the page, and the position in it, where each new
        token's key and value go.
      tables: int32 [batch, table_size], the pages of each row in order; None where new
        tokens see one another alone.
      lengths: int32 [batch, seq], how many keys of its row's pages each new token sees, its
        own included; None with the tables.
      pages_a_layer: of a device.
    """

    pages: Int32[Any, "batch seq"]
    offsets: Int32[Any, "batch seq"]
    tables: Int32[Array, "batch table_size"] | None = None
    lengths: Int32[Array, "batch seq"] | None = None
    pages_a_layer: int = struct.field(pytree_node=False, default=0)

    def of_layer(self, index: Int[Array, ""] | int) -> "Paging":
        """Return the same in pages that follow those of `index` other layers."""
        if not self.pages_a_layer:  # each layer has pages of its own
            return self
        first = jnp.asarray(index, jnp.int32) * self.pages_a_layer
        tables = None if self.tables is None else self.tables + first
        return dataclasses.replace(self, pages=self.pages + first, tables=tables)


def init_paged_cache(
    config: GLMConfig, pages: int, page_size: int, unstacked: bool, mesh: Mesh | None = None
) -> PagedKVCache:
    """Empty pages in the config's cache dtype, by default its compute dtype.

    Args:
      pages: of each device and layer.
      unstacked: one `PagedCache` a layer, for parameters whose layers are a tuple.
    """
    count = row_shards(mesh) * pages * (1 if unstacked else config.num_layers)
    shape = (config.num_heads, count, page_size, config.head_dim)
    dtype = config.cache_dtype or config.activation_dtype

    def zeros(shape: tuple[int, ...], dtype: str) -> Array:
        device = None if mesh is None else activation_sharding(mesh, PAGE_AXES[: len(shape)])
        return jnp.zeros(shape, dtype, device=device)

    def layer() -> PagedCache:
        if dtype != "int8":
            return PagedCache(zeros(shape, dtype), zeros(shape, dtype))
        scales = [zeros(shape[:-1], "float32") for _ in range(2)]
        return PagedCache(zeros(shape, dtype), zeros(shape, dtype), *scales)

    return tuple(layer() for _ in range(config.num_layers)) if unstacked else layer()


def write(
    cache: PagedCache,
    keys: Float[Array, "batch seq heads head_dim"],
    values: Float[Array, "batch seq heads head_dim"],
    paging: Paging,
) -> PagedCache:
    """Put new keys and values into their pages, rounded as the cache stores them."""
    new = PagedCache(keys=keys, values=values)
    if cache.key_scales is not None:
        new = PagedCache(*quantize_heads(keys, values))

    def local(cache: PagedCache, new: PagedCache, pages: Array, offsets: Array) -> PagedCache:
        at = (pages.reshape(-1), offsets.reshape(-1))

        def put(old: Array, x: Array) -> Array:
            tokens = x.astype(old.dtype).reshape(-1, *x.shape[2:])  # [tokens, heads, ..]
            return old.at[:, *at].set(jnp.swapaxes(tokens, 0, 1))

        written: PagedCache = jax.tree.map(put, cache, new)
        return written

    if mesh_to_divide() is None:
        return local(cache, new, paging.pages, paging.offsets)
    rows, _, heads, _ = fitting_activation_spec(keys.shape, ("batch", "seq", "heads", "head_dim"))
    of_cache, of_new = PartitionSpec(heads, rows), PartitionSpec(rows, None, heads)
    return per_device(
        local,
        in_specs=(of_cache, of_new, PartitionSpec(rows), PartitionSpec(rows)),
        out_specs=of_cache,
    )(cache, new, paging.pages, paging.offsets)


def copy_pages(
    cache: PagedKVCache,
    sources: Int32[Array, " copies"],
    targets: Int32[Array, " copies"],
    pages_a_layer: int,
) -> PagedKVCache:
    """Copy pages of every layer onto others.

    Args:
      sources, targets: pages within a device and layer: as many for each group of devices that
        has rows of its own, one group's after another's.
      pages_a_layer: of a device where layers share an array, else 0.
    """

    def local(cache: PagedKVCache, sources: Array, targets: Array) -> PagedKVCache:
        def copy(x: Array) -> Array:
            layers = x.shape[1] // pages_a_layer if pages_a_layer else 1
            first = pages_a_layer * jnp.arange(layers, dtype=jnp.int32)[:, None]
            from_, to = ((first + pages).reshape(-1) for pages in (sources, targets))
            return x.at[:, to].set(x[:, from_])

        copied: PagedKVCache = jax.tree.map(copy, cache)
        return copied

    if mesh_to_divide() is None:
        return local(cache, sources, targets)
    keys, *_ = jax.tree.leaves(cache)
    heads, rows, *_ = fitting_activation_spec(keys.shape, PAGE_AXES)
    of_cache, of_group = PartitionSpec(heads, rows), PartitionSpec(rows)
    run = per_device(local, in_specs=(of_cache, of_group, of_group), out_specs=of_cache)
    copied: PagedKVCache = run(cache, sources, targets)
    return copied


def quantize_heads(*floats: Array) -> tuple[Array, ...]:
    """Integers of each array [.., head_dim], then the scales of the vectors of each."""
    wide = [x.astype(jnp.float32) for x in floats]
    scales = [jnp.max(jnp.abs(x), axis=-1) / 127 for x in wide]
    divisors = [jnp.where(scale == 0, 1, scale)[..., None] for scale in scales]
    integers = [jnp.round(x / d).astype(jnp.int8) for x, d in zip(wide, divisors, strict=True)]
    return (*integers, *scales)
