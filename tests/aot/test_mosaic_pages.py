"""Attention over pages by our own kernel, compiled for an H100: what a page costs."""

import functools

import jax
import pytest
from aot.assembled import assemble, ptx_of

from glm_jax.kernels.paged_attention.api import paged_attention

# Instructions of a warp a page and head, in the loop of its program. At 75% of an H100's memory a
# multiprocessor has 3000 cycles for the 32 KiB of a page in 16 bits, 1500 for one in int8, and
# issues an instruction of four warps in each.
MOST = {("float16", "float16"): 480, ("float16", "int8"): 840, ("bfloat16", "int8"): 1100}


@pytest.mark.parametrize(("dtype", "cache"), MOST)
@pytest.mark.parametrize(("rows", "new", "heads"), [(32, 1, 96), (1, 4, 12)])
def test_no_spill_and_few_instructions(
    capfd, monkeypatch, tmp_path, dtype, cache, rows, new, heads
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    array = jax.ShapeDtypeStruct
    pages = array((heads, 300, 64, 128), cache)
    scales = array((heads, 300, 64), "float32") if cache == "int8" else None
    run = functools.partial(paged_attention, implementation="mosaic")
    ptx = ptx_of(
        capfd, "h100", run, array((rows, new, heads, 128), dtype), pages, pages,
        array((rows, 32), "int32"), array((rows, new), "int32"), scales, scales,
    )  # fmt: skip
    assembled = assemble(ptx, tmp_path)
    assert assembled.spilled_bytes == 0
    assert not assembled.is_serialized
    assert assembled.registers <= 255  # two programs: 256 threads
    assert ptx.count("cp.async.bulk.tensor") >= (8 if scales else 4)  # before the loop and in it
    assert "wgmma.mma_async" in ptx
    loop = assembled.main_loop("HGMMA")
    if loop is None:
        pytest.skip("instructions are counted by nvdisasm (pip install nvidia-cuda-nvdisasm)")
    print(f"{len(loop)} instructions a page")
    assert len(loop) <= MOST[dtype, cache]
