"""The decoder of models/blocks alone, as a language model: a training step and greedy decoding."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from benchmarks.common import random_params
from kernels.attention import MaskSpec
from models.blocks.decoder import Decoder, DecoderConfig, init_cache
from models.blocks.losses import token_nll
from models.language import is_apart, taken_apart


class LanguageModel:
    """Random weights; `dtype` is that of the products, and of the parameters when decoding."""

    def __init__(self, cfg: DecoderConfig, dtype: str = "float32", remat: str = "none"):
        self.cfg, self.dtype = cfg, jnp.dtype(dtype)
        self.net = Decoder(cfg, self.dtype, remat)
        self.tx = optax.adamw(1e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.decode = jax.jit(self._decode, static_argnums=2)

    def init(self):
        """Float32 parameters."""
        one = jnp.zeros((1, 2), jnp.int32)
        return random_params(lambda key: self.net.init(key, one, method="text")["params"])

    def cast(self, params):
        """Parameters for decoding: matrices in `dtype`, norm weights in float32, layers apart."""

        def one(path, x):
            return x if "norm" in jax.tree_util.keystr(path) else x.astype(self.dtype)

        cast = jax.tree_util.tree_map_with_path(one, params)
        return taken_apart(cast, lambda x: jnp.split(x, x.shape[0]))

    def state(self, params):
        """(parameters, AdamW's state), copies that a step may overwrite."""
        return jax.tree.map(jnp.copy, params), self.tx.init(params)

    def loss(self, params, tokens: Int[Array, "b t"]) -> Float[Array, ""]:
        """Mean next-token cross-entropy."""
        hidden = self._apply(params, lambda net, ids: net(net.embed(ids))[0], tokens[:, :-1])
        nll, *_ = token_nll(
            hidden.reshape(-1, self.cfg.width),
            params["embedding"],
            tokens[:, 1:].reshape(-1),
            softcap=self.cfg.final_softcap,
        )
        return nll.mean()

    def _apply(self, params, method, *args):
        net = self.net.clone(apart=is_apart(params))
        return net.apply({"params": params}, *args, method=method)

    def _step(self, state, tokens):
        """state, tokens -> (state after one AdamW step, loss)."""
        params, opt = state
        loss, grads = jax.value_and_grad(self.loss)(params, tokens)
        updates, opt = self.tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), loss

    def logits(self, params, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Scores of the full forward pass."""
        return self._apply(params, "text", tokens)

    def _decode(self, params, prompt: Int[Array, "b p"], new: int) -> Int[Array, "b {new}"]:
        """Greedy tokens: the prompt at once, then one compiled loop over cached single tokens."""
        rows, length = prompt.shape

        def forward(net, ids, mask, positions, cache):
            return net(net.embed(ids), mask, positions, cache)

        def pick(hidden):
            return jnp.argmax(self._apply(params, "logits", hidden), axis=-1).astype(jnp.int32)

        def body(carry, position):
            token, cache = carry
            positions = jnp.full((rows, 1), position, jnp.int32)
            hidden, cache = self._apply(params, forward, token[:, None], None, positions, cache)
            token = pick(hidden[:, 0])
            return (token, cache), token

        cache = init_cache(self.cfg, rows, length + new, self.dtype, apart=is_apart(params))
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), prompt.shape)
        hidden, cache = self._apply(params, forward, prompt, MaskSpec(), positions, cache)
        first = pick(hidden[:, -1])
        places = length + jnp.arange(new - 1, dtype=jnp.int32)
        _, rest = jax.lax.scan(body, (first, cache), places)
        return jnp.concatenate([first[:, None], rest.T], axis=1)
