"""The same model in PyTorch, of its own modules: the peer of the train and decode suites."""

import math
from typing import Any

from glm_jax.config import GLMConfig
from launch.suites.case import find_torch


def build(config: GLMConfig, dropout: float = 0.0) -> Any:
    """Return a GLM of `torch.nn` modules: forward(tokens, positions, mask) -> [batch, seq, vocab].

    With `is_causal` and no mask each token sees those before it. `dropout` is that of the paper:
    of the embedding, of attention's weights and of both outputs of a block.

    With `cache`, from `make_cache`, and `start` keys and values go there from that place on,
    a token sees those before it too, and only the last token's scores are returned.

    Post-layernorm residuals scaled as DeepNorm does, rotary positions, GeGLU, scaled
    dot-product attention under a boolean mask, tied embedding.
    """
    torch: Any = find_torch()
    nn, functional = torch.nn, torch.nn.functional
    alpha, heads, head_dim = config.residual_scale, config.num_heads, config.head_dim

    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    class Block(nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            hidden, inner = config.hidden_size, config.inner_hidden_size
            self.input_norm, self.attention_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
            self.query_key_value = nn.Linear(hidden, 3 * hidden)
            self.dense = nn.Linear(hidden, hidden)
            self.drop = nn.Dropout(dropout)
            self.widen, self.narrow = nn.Linear(hidden, 2 * inner), nn.Linear(inner, hidden)

        def forward(
            self, x: Any, cos: Any, sin: Any, mask: Any, cache: Any, start: int, is_causal: bool
        ) -> Any:
            h = self.input_norm(x)
            parts = self.query_key_value(h).view(*h.shape[:2], heads, 3, head_dim)
            query, key, value = parts.transpose(1, 2).unbind(3)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            if cache is not None:
                end = start + x.shape[1]
                cache[0][:, :, start:end], cache[1][:, :, start:end] = key, value
                key, value = cache[0][:, :, :end], cache[1][:, :, :end]
            attended = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout if self.training else 0.0,
                is_causal=is_causal,
            )
            x = h * alpha + self.drop(self.dense(attended.transpose(1, 2).flatten(2)))
            h = self.attention_norm(x)
            up, gate = self.widen(h).chunk(2, dim=-1)
            return h * alpha + self.drop(self.narrow(up * functional.gelu(gate)))

    class Model(nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.blocks = nn.ModuleList(Block() for _ in range(config.num_layers))
            self.final_norm = nn.LayerNorm(config.hidden_size)
            self.drop = nn.Dropout(dropout)

        def make_cache(self, batch: int, length: int) -> Any:
            shape = (len(self.blocks), 2, batch, heads, length, head_dim)
            return torch.zeros(shape)

        def forward(
            self,
            tokens: Any,
            positions: Any,
            mask: Any = None,
            cache: Any = None,
            start: int = 0,
            is_causal: bool = False,
        ) -> Any:
            exponent = torch.arange(0, head_dim, 2, device=tokens.device) / head_dim
            angle = positions[..., None] * torch.exp(-exponent * math.log(config.rotary_base))
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            x = self.drop(self.embedding(tokens))
            for i, block in enumerate(self.blocks):
                of_block = None if cache is None else cache[i]
                x = block(x, cos, sin, mask, of_block, start, is_causal)
            x = x if cache is None else x[:, -1:]
            return functional.linear(self.final_norm(x), self.embedding.weight)

    return Model()
