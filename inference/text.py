"""Text from any language model: prefill, then tokens in one compiled loop.

A language model offers three functions (models/language.py): init_state(params, rows, max_len),
prefill(params, tokens, length, state) -> (scores [b, V], state) and extend(params, token [b],
state) -> (scores, state). Rows are ragged and do not depend on each other: each has its own key,
and every token one folded from it, so neither the batch nor the stride at which tokens come back
to the host changes what is written.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from inference.beam import EOS, PAD


class Sampling(NamedTuple):
    """How tokens are chosen; the defaults are greedy."""

    max_new: int = 128
    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # the smallest set of tokens with this much probability
    repetition_penalty: float = 1.0  # CTRL's: scores of tokens already there are made worse by it
    stop: tuple[str, ...] = ()  # a row ends where one of these appears; the string is left out


def penalise(scores: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty) -> Float[Array, "b v"]:
    """CTRL (arXiv 1909.05858, 4.1): positive scores of seen tokens / penalty, negative ones x."""
    worse = jnp.where(scores > 0, scores / penalty, scores * penalty)
    return jnp.where(seen, worse, scores)


def keep_likely(scores: Float[Array, "b v"], top_k: int, top_p) -> Float[Array, "b v"]:
    """Scores with all but the top_k tokens, and those outside the top_p nucleus, at -inf.

    The nucleus (arXiv 1904.09751) is the shortest list of the most likely tokens whose
    probabilities sum to top_p or more; the most likely one always stays.
    """
    if top_k and top_k < scores.shape[-1]:
        least = jax.lax.top_k(scores, top_k)[0][:, -1:]
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    order = jnp.sort(scores, axis=-1, descending=True)
    probabilities = jax.nn.softmax(order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.maximum((before < top_p).sum(-1, keepdims=True), 1)
    least = jnp.take_along_axis(order, kept - 1, axis=-1)
    return jnp.where(scores >= least, scores, -jnp.inf)


def choose(scores, keys, sampling: Sampling, nucleus: bool) -> Int[Array, "b"]:
    """One token per row; sampling's numbers may be traced, `nucleus` says whether top_p < 1."""
    greedy = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    cool = scores / jnp.maximum(sampling.temperature, 1e-6)
    if nucleus or sampling.top_k:
        cool = keep_likely(cool, sampling.top_k, sampling.top_p)
    drawn = jax.vmap(jax.random.categorical)(keys, cool).astype(jnp.int32)
    return jnp.where(sampling.temperature > 0, drawn, greedy)


class _Carry(NamedTuple):
    """Where a batch is between two calls of the compiled loop."""

    k: Int[Array, ""]  # tokens written so far, by every row that has not ended
    scores: Float[Array, "b v"]
    done: Bool[Array, "b"]
    seen: Bool[Array, "b v"]
    state: object


@functools.lru_cache(maxsize=16)
def _compiled(functions, top_k: int, nucleus: bool, penalised: bool):
    """(prefill, loop), jitted for one set of static choices."""
    predict = dict(functions)

    @functools.partial(jax.jit, donate_argnums=3)
    def prefill(params, tokens, lengths, state):
        scores, state = predict["prefill"](params, tokens, lengths, state)
        rows, vocabulary = scores.shape
        seen = jnp.zeros((rows, vocabulary), bool)
        if penalised:
            there = jnp.arange(tokens.shape[1]) < lengths[:, None]
            seen = seen.at[jnp.arange(rows)[:, None], tokens].max(there)
        return _Carry(jnp.int32(0), scores, jnp.zeros((rows,), bool), seen, state)

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
    def loop(params, carry, numbers, stride, keys):
        """(carry, ids [b, stride]): at most `stride` more tokens; PAD behind a row's EOS."""
        temperature, top_p, penalty, most = numbers
        sampling = Sampling(0, temperature, top_k, top_p, penalty)
        rows = carry.done.shape[0]
        start = carry.k

        def body(inner):
            carry, out = inner
            scores = carry.scores
            if penalised:
                scores = penalise(scores, carry.seen, penalty)
            own = jax.vmap(lambda key: jax.random.fold_in(key, carry.k))(keys)
            token = jnp.where(carry.done, PAD, choose(scores, own, sampling, nucleus))
            out = out.at[:, carry.k - start].set(token)
            done = carry.done | (token == EOS)
            seen = carry.seen
            if penalised:
                seen = seen.at[jnp.arange(rows), token].set(True)
            scores, state = predict["extend"](params, token, carry.state)
            return _Carry(carry.k + 1, scores, done, seen, state), out

        def more(inner):
            carry, _ = inner
            return (carry.k - start < stride) & (carry.k < most) & ~carry.done.all()

        out = jnp.full((rows, stride), PAD, jnp.int32)
        return jax.lax.while_loop(more, body, (carry, out))

    return prefill, loop


def generate(
    model,
    params,
    prompts: Sequence[Sequence[int]],
    rng,
    sampling: Sampling,
    *,
    decode: Callable[[list[int]], str] | None = None,
    emit: Callable[[int, str], None] | None = None,
    stride: int = 0,
) -> list[list[int]]:
    """Ids written after each prompt (ids, BOS included), without EOS.

    decode: ids -> text, needed by stop strings and `emit`; emit(row, more text) is called as text
    comes, every `stride` tokens (by default 8 with emit, 32 with stop strings, else once).
    """
    if (sampling.stop or emit) and decode is None:
        raise ValueError("generate: stop strings and emit need decode")
    if min(map(len, prompts), default=0) < 1:
        raise ValueError("generate: every prompt needs at least one token, BOS")
    rows, width = len(prompts), _padded(max(map(len, prompts)))
    tokens = np.full((rows, width), PAD, np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    stride = stride or (8 if emit else 32 if sampling.stop else sampling.max_new)
    prefill, loop = _compiled(
        tuple(model.predict.items()),
        sampling.top_k,
        sampling.top_p < 1.0,
        sampling.repetition_penalty != 1.0,
    )
    if "decoding" in model.predict:
        params = model.predict["decoding"](params)
    state = model.predict["init_state"](params, rows, width + sampling.max_new)
    carry = prefill(params, tokens, lengths, state)
    keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(rows))
    numbers = (sampling.temperature, sampling.top_p, sampling.repetition_penalty)
    numbers = (*(jnp.float32(x) for x in numbers), jnp.int32(sampling.max_new))
    written: list[list[int]] = [[] for _ in prompts]
    shown = [""] * rows
    ended = np.zeros(rows, bool)
    while int(carry.k) < sampling.max_new and not ended.all():
        begin = int(carry.k)
        carry, out = loop(params, carry, numbers, stride, keys)
        for row, ids in enumerate(np.asarray(out)[:, : int(carry.k) - begin].tolist()):
            if ended[row]:
                continue
            own = written[row]
            own += ids[: ids.index(EOS)] if EOS in ids else ids
            ended[row] = EOS in ids
            if decode is not None:
                ended[row] |= _end(own, decode, sampling.stop)
            if emit is not None:
                _show(row, own, shown, decode, emit, bool(ended[row]), sampling.stop)
        carry = carry._replace(done=carry.done | ended)
    if emit is not None:
        for row in np.flatnonzero(~ended):
            _show(row, written[row], shown, decode, emit, True, sampling.stop)
    return written


def _padded(length: int) -> int:
    """Prompt lengths are padded to these, so that few programs are compiled."""
    return max(16, 1 << (length - 1).bit_length())


def _end(ids: list[int], decode, stop: tuple[str, ...]) -> bool:
    """Whether a stop string appeared; cuts ids to the longest prefix whose text lacks it."""
    if not stop or not any(s in decode(ids) for s in stop):
        return False
    low, high = 0, len(ids)  # text of `low` ids lacks every stop string, that of `high` has one
    while high - low > 1:
        middle = (low + high) // 2
        if any(s in decode(ids[:middle]) for s in stop):
            high = middle
        else:
            low = middle
    del ids[low:]
    return True


def _show(row, ids, shown, decode, emit, last: bool, stop: tuple[str, ...]) -> None:
    """Emits what is new; characters that are not whole yet, or may begin a stop string, wait."""
    text = decode(ids)
    if not last:
        text = text.rstrip("\ufffd")
        wait = max((len(s) - 1 for s in stop), default=0)
        text = text[: len(text) - wait] if wait else text
    if text.startswith(shown[row]) and len(text) > len(shown[row]):
        emit(row, text[len(shown[row]) :])
        shown[row] = text
