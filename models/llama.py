"""Llama-style language models: Llama 2 and 3, Qwen 2 and 2.5, OLMo 2, and small ones for CPUs.

    x = x + Attention(RMSNorm(x));   x = x + W_down(silu(W_gate n) * (W_up n)),  n = RMSNorm(x)

with rotary positions and grouped key/value heads. Qwen 2 adds biases to q, k and v; OLMo 2 norms
what attention and MLP give instead of what they read, and q and k as a whole. All are settings of
models/blocks/decoder.py (arXiv 2307.09288, 2407.21783, 2407.10671, 2412.15115, 2501.00656).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from export.weights import WeightMap, compose
from kernels.attention import MaskSpec
from models import Model, language
from models.blocks import decoder_weights
from models.blocks.decoder import Decoder, DecoderConfig, init_cache
from models.blocks.rope import RopeBands

_COMMON = dict(
    pattern=("global",), window=0, activation="silu", norm_offset=0.0, embed_scale=False,
    init_std=0.02, norm_eps=1e-5,
)  # fmt: skip
_QWEN = dict(qkv_bias=True, rope_theta=1e6, norm_eps=1e-6)
_OLMO = dict(
    vocab_size=100_352, pre_norms=False, post_norms=True, qk_norm="all", rope_theta=5e5,
    norm_eps=1e-6, tie=False,
)  # fmt: skip
_LLAMA3 = dict(vocab_size=128_256, rope_theta=5e5)


def _sizes(width, layers, mlp, heads, kv_heads, head_dim, **rest) -> DecoderConfig:
    sizes = dict(width=width, layers=layers, mlp=mlp)
    sizes |= dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return DecoderConfig(**_COMMON | sizes | rest)


SIZES = {
    "llama2_7b": _sizes(4096, 32, 11008, 32, 32, 128, vocab_size=32_000, tie=False),
    "llama3_8b": _sizes(4096, 32, 14336, 32, 8, 128, tie=False, **_LLAMA3),
    "llama3.1_8b": _sizes(
        4096, 32, 14336, 32, 8, 128, tie=False, rope_bands=RopeBands(8.0), **_LLAMA3
    ),
    "llama3.2_1b": _sizes(2048, 16, 8192, 32, 8, 64, rope_bands=RopeBands(32.0), **_LLAMA3),
    "llama3.2_3b": _sizes(3072, 28, 8192, 24, 8, 128, rope_bands=RopeBands(32.0), **_LLAMA3),
    "qwen2.5_0.5b": _sizes(896, 24, 4864, 14, 2, 64, vocab_size=151_936, **_QWEN),
    "qwen2.5_1.5b": _sizes(1536, 28, 8960, 12, 2, 128, vocab_size=151_936, **_QWEN),
    "qwen2.5_7b": _sizes(3584, 28, 18944, 28, 4, 128, vocab_size=152_064, tie=False, **_QWEN),
    "qwen2.5_32b": _sizes(5120, 64, 27648, 40, 8, 128, vocab_size=152_064, tie=False, **_QWEN),
    "olmo2_1b": _sizes(2048, 16, 8192, 16, 16, 128, **_OLMO),
    "olmo2_7b": _sizes(4096, 32, 11008, 32, 32, 128, **_OLMO),
    "olmo2_13b": _sizes(5120, 40, 13824, 40, 40, 128, **_OLMO),
    # For CPUs; the vocabulary comes with the data.
    "tiny": _sizes(192, 6, 592, 4, 2, 48, vocab_size=4096),
    "mini": _sizes(128, 3, 384, 4, 2, 32, vocab_size=8192),
    "debug": _sizes(64, 2, 128, 2, 1, 32, vocab_size=512),
}


class State(NamedTuple):
    """Keys and values of every layer, and how many tokens each row has read."""

    cache: Any
    length: Int[Array, "b"]


class Llama(language.Net):
    """The decoder as a language model."""

    cfg: DecoderConfig

    def setup(self):
        self.decoder = Decoder(self.cfg, self.dtype, self.remat, self.impl, self.apart)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        state: State | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        valid: Bool[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        *,
        keep_state: bool = False,
    ) -> tuple[Float[Array, "b t d"], State | None]:
        """Hidden states after the final norm, and the state.

        With a state: a prompt, which must be the first call, or one token to each row.
        """
        x = self.decoder.embed(tokens)
        if state is None:
            packed = MaskSpec(q_segment_ids=segment_ids, contiguous=segment_ids is not None)
            return self.decoder(x, packed, positions)[0], None
        count = tokens.shape[1] if valid is None else valid.sum(-1, dtype=jnp.int32)
        length = state.length + count
        if tokens.shape[1] == 1:
            hidden, cache = self.decoder(x, None, state.length[:, None], state.cache)
        else:
            hidden, cache = self.decoder(x, MaskSpec(), None, state.cache, length)
        return hidden, State(cache, length) if keep_state else None

    def table(self) -> Float[Array, "v d"]:
        """Output rows."""
        return self.decoder.table()

    @property
    def softcap(self) -> float | None:
        """Cap of the scores."""
        return self.cfg.final_softcap


def init_state(net: Llama, rows: int, max_len: int) -> State:
    """Empty cache for rows of up to max_len tokens."""
    cache = init_cache(net.cfg, rows, max_len, net.dtype, apart=net.apart)
    return State(cache, jnp.zeros((rows,), jnp.int32))


def weight_map(cfg: DecoderConfig) -> WeightMap:
    """Names as transformers loads Llama, Qwen 2 and OLMo 2."""
    return compose({"decoder": decoder_weights.weight_map(cfg)})


def build(config) -> Model:
    """The language model behind the seam of models/__init__.py."""

    def start(net, params, rows, max_len):
        return init_state(net, rows, max_len)

    return language.build(config, SIZES, Llama, start, weight_map)
