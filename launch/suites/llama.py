"""llama.cpp as a peer: a Llama-shaped model of random Q4_0 weights, where it is installed."""

from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.config import GLMConfig

_BLOCK, _BLOCK_BYTES = 32, 18  # weights that share a float16 scale


def load(config: GLMConfig, folder: Path, threads: int) -> Any:
    """Return a `llama_cpp.Llama` with as many weights, in as many bits, as a GLM of this config.

    Four projections of hidden x hidden and three of hidden x inner a layer, and an embedding
    that is the output projection too. None, said in print, where a package is missing.
    """
    try:
        import gguf
        import llama_cpp
    except ImportError as error:
        print(f"{error.name} is not installed: its cases are left out")
        return None
    path = folder / "llama_q4_0.gguf"
    _write(gguf, config, path)
    return llama_cpp.Llama(
        str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )


def _write(gguf: Any, config: GLMConfig, path: Path) -> None:
    hidden, inner, vocab = config.hidden_size, config.inner_hidden_size, config.vocab_size
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    rng = np.random.default_rng(0)

    def add(name: str, outputs: int, inputs: int) -> None:
        blocks = rng.integers(0, 256, (outputs, inputs // _BLOCK, _BLOCK_BYTES), np.uint8)
        scale = np.array([0.003], np.float16).view(np.uint8)
        blocks[..., :2] = scale
        row = blocks.reshape(outputs, inputs // _BLOCK * _BLOCK_BYTES)
        writer.add_tensor(name, row, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    add("token_embd.weight", vocab, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i in range(config.num_layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", hidden, hidden)
        add(f"blk.{i}.ffn_gate.weight", inner, hidden)
        add(f"blk.{i}.ffn_up.weight", inner, hidden)
        add(f"blk.{i}.ffn_down.weight", hidden, inner)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
