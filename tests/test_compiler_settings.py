"""The compiler's settings: this JAX knows them, and the environment wins."""

import jax
import pytest

from glm_jax.compiler_settings import of_decoding, of_training, process_flags


def test_this_jax_knows_those_of_training(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = of_training("gpu", 10**8)
    assert options["xla_gpu_enable_triton_gemm"] is False
    jax.jit(lambda x: x + 1, compiler_options=options).lower(1.0).compile()
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_no": True}).lower(1.0).compile()
    assert of_training("cpu", 10**8) == of_training("tpu", 10**8) == {}


def test_this_jax_knows_what_graphs_of_a_decode_step_may_have(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    [(name, kinds)] = of_decoding().items()
    jax.jit(lambda x: x + 1, compiler_options={name: kinds}).lower(1.0).compile()
    with pytest.raises(Exception, match="not a valid enum value"):
        jax.jit(lambda x: x + 1, compiler_options={name: f"{kinds},NO"}).lower(1.0).compile()
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer=")
    assert of_decoding() == {}


def test_the_environment_wins(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert "xla_gpu_enable_triton_gemm" not in of_training("cuda")
    scheduler = "--xla_gpu_enable_latency_hiding_scheduler"
    # A name is a whole one.
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm_too=true")
    assert "xla_gpu_enable_triton_gemm" in of_training("cuda")
    assert process_flags("") == f"{scheduler}=true"
    assert process_flags("--a=1") == f"--a=1 {scheduler}=true"
    assert process_flags(f"{scheduler}=false") == f"{scheduler}=false"


def test_collectives_are_combined_up_to_a_layer(monkeypatch):
    """Gathered weights have two bytes, gradients four; XLA's own threshold is the least."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    kinds = ("all_gather", "reduce_scatter", "all_reduce")
    names = [f"xla_gpu_{kind}_combine_threshold_bytes" for kind in kinds]
    of = lambda *given: [of_training("cuda", *given).get(name) for name in names]
    assert of(10**8) == [2 * 10**8, 4 * 10**8, 4 * 10**8]
    assert of(1000) == [30 * 2**20] * 3
    assert of() == [None] * 3
    monkeypatch.setenv("XLA_FLAGS", f"--a=1 --{names[0]}=5")
    assert of(10**8) == [None, 4 * 10**8, 4 * 10**8]
