"""UniFluid (arXiv 2503.13436): one decoder writes text and continuous image tokens.

Generation:    [prompt] [BOI] [v_1 ... v_{N-1}]; the hidden state at BOI predicts v_1, the one at
               v_k predicts v_{k+1}, through a diffusion head (MAR's DiffLoss, arXiv 2406.11838).
Understanding: [SigLIP tokens] [BOS question sep] [answer EOS], next-token cross-entropy.
Loss:          L = L_visual + lam * L_text.

Prefixes are bidirectional, everything after is causal (PaliGemma's prefix-LM). With
`picture_alone` a picture's own tokens see each other only, not the question: several questions
about it can then share one row, each seeing the picture and itself. In random order a
causal model must be told which position it fills next, so the input at which v_{o_{k+1}} is
predicted carries P_next[o_{k+1}] beside its own P_self[o_k] (RAR, arXiv 2411.00776).
No code was published; choices the paper leaves open are config fields (docs/results/uniflud.md).
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.attention import MaskSpec
from models import sized
from models.blocks import diffusion_head as dh
from models.blocks.decoder import SIZES as DECODERS
from models.blocks.decoder import Decoder, DecoderConfig
from models.blocks.losses import chunked_cross_entropy
from models.blocks.vit import SIZES as VITS
from models.blocks.vit import ViT, ViTConfig
from models.tokenizers import kl_vae

BOI = 3  # the reserved vocabulary row of the begin-of-image token
ORDERS = ("random", "raster", "rar_anneal")
ORDER_POS = ("next+self", "next", "self", "instr_tokens", "rope2d")


@dataclasses.dataclass(frozen=True)
class UniFluidConfig:
    """Sizes and choices; `tokens` image tokens of `channels` numbers each make one picture."""

    decoder: DecoderConfig
    vit: ViTConfig
    vae: kl_vae.KLVAEConfig
    head: dh.HeadConfig
    tokens: int
    channels: int
    lam: float
    order: str
    anneal: tuple[int, int]  # rar_anneal: random until the first step, raster from the second
    order_pos: str
    prompt_bidirectional: bool
    picture_alone: bool
    cfg_drop: float
    cfg_null: str
    diffusion_mul: int
    vb_weight: float
    discretised_t0: bool
    loss_norm: str
    pos_std: float
    vit_zero_init: bool
    edit_source: str

    @property
    def group(self) -> int:
        """Inputs fed per image token: two when position-instruction tokens are interleaved."""
        return 2 if self.order_pos == "instr_tokens" else 1


def draw_orders(
    keys, tokens: int, order: str, random_share: Float[Array, ""] | float = 1.0
) -> Int[Array, "b n"]:
    """One permutation of the raster positions per row; `random_share` of the rows are random."""
    raster = jnp.arange(tokens, dtype=jnp.int32)
    if order == "raster":
        return jnp.broadcast_to(raster, (keys.shape[0], tokens))

    def one(key):
        shuffle, coin = jax.random.split(key)
        permuted = jax.random.permutation(shuffle, raster)
        return jnp.where(jax.random.uniform(coin) < random_share, permuted, raster)

    return jax.vmap(one)(keys)


def random_share(cfg: UniFluidConfig, step) -> Float[Array, ""] | float:
    """RAR's annealing: 1 before anneal[0], 0 from anneal[1] on, linear between."""
    if cfg.order != "rar_anneal":
        return 1.0
    start, end = cfg.anneal
    return jnp.clip((end - step) / max(end - start, 1), 0.0, 1.0)


class UniFluid(nn.Module):
    """The trainable part: Gemma decoder, SigLIP tower, visual embeddings, diffusion head."""

    cfg: UniFluidConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        cfg, width = self.cfg, self.cfg.decoder.width
        self.decoder = Decoder(cfg.decoder, self.dtype, self.remat)
        self.vit = ViT(cfg.vit, self.dtype, self.remat)
        zero_or_fan_in = (
            nn.initializers.zeros if cfg.vit_zero_init else nn.initializers.lecun_normal()
        )
        self.vit_proj = self._dense(width, zero_or_fan_in)
        self.visual_in = self._dense(width, nn.initializers.lecun_normal())
        table = nn.with_logical_partitioning(
            nn.initializers.normal(cfg.pos_std), ("positions", "embed")
        )
        self.pos_self = self.param("pos_self", table, (cfg.tokens, width), jnp.float32)
        self.pos_next = self.param("pos_next", table, (cfg.tokens, width), jnp.float32)
        null = nn.with_logical_partitioning(nn.initializers.normal(cfg.pos_std), ("embed",))
        self.null = self.param("null", null, (width,), jnp.float32)
        self.head = dh.DiffusionHead(cfg.head, self.dtype, unroll=self.remat == "none")

    def _dense(self, features, kernel_init):
        return nn.Dense(
            features,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(kernel_init, ("width_in", "embed")),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
        )

    def encode_image(self, image) -> Float[Array, "b m d"]:
        """uint8 pictures [b, s, s, 3] -> SigLIP tokens in the decoder's width, unscaled."""
        return self.vit_proj(self.vit(image.astype(jnp.float32) / 127.5 - 1.0))

    def text(self, tokens: Int[Array, "b t"], null=None) -> Float[Array, "b t d"]:
        """Token embeddings; rows where `null` is set become the learned null token."""
        x = self.decoder.embed(tokens)
        if null is not None and self.cfg.cfg_null == "learned":
            x = jnp.where(null[:, None, None], self.null.astype(x.dtype), x)
        return x

    def source(self, image, tokens) -> Float[Array, "b s d"]:
        """Editing prefix: the source picture as SigLIP tokens and/or raster VAE tokens."""
        parts = []
        if self.cfg.edit_source in ("siglip", "both"):
            parts.append(self.encode_image(image))
        if self.cfg.edit_source in ("vae", "both"):
            parts.append(self.visual_in(tokens.astype(self.dtype)) + self._row(self.pos_self))
        return jnp.concatenate(parts, axis=1)

    def _row(self, table, index=None):
        return (table if index is None else table[index]).astype(self.dtype)

    def _next(self, x, index) -> Float[Array, "b n g d"]:
        """Tell the inputs x [b, n, d] that position `index` [b, n] comes next."""
        match self.cfg.order_pos:
            case "instr_tokens":
                return jnp.stack([x, self._row(self.pos_next, index)], axis=2)
            case "self" | "rope2d":
                return x[:, :, None]
            case _:
                return (x + self._row(self.pos_next, index))[:, :, None]

    def start(self, next_index: Int[Array, "b"]) -> Float[Array, "b g d"]:
        """The input(s) at which the first image token is predicted: BOI + P_next[o_1]."""
        boi = self.decoder.embed(jnp.full((next_index.shape[0], 1), BOI, jnp.int32))
        return self._next(boi, next_index[:, None])[:, 0]

    def visual(
        self,
        v: Float[Array, "b n c"],
        self_index: Int[Array, "b n"],
        next_index: Int[Array, "b n"],
    ) -> Float[Array, "b n g d"]:
        """Image tokens as inputs: W_in v + P_self[o_k], and P_next[o_{k+1}]."""
        x = self.visual_in(v.astype(self.dtype))
        if self.cfg.order_pos not in ("next", "rope2d"):
            x = x + self._row(self.pos_self, self_index)
        return self._next(x, next_index)

    def trunk(self, x, mask, positions, cache=None, lengths=None, turns=None):
        """Inputs [b, t, d] -> (final-normed hidden states [b, t, d], cache)."""
        return self.decoder(x, mask, positions, cache, lengths, turns)

    def logits(self, hidden):
        """Hidden states -> fp32 logits over the vocabulary (tied table, final soft-cap)."""
        return self.decoder.logits(hidden)

    def __call__(self, image, tokens):
        """Touches every parameter once; used for initialisation only."""
        rows = tokens.shape[0]
        x = jnp.concatenate([self.encode_image(image), self.text(tokens)], axis=1)
        first = jnp.zeros((rows,), jnp.int32)
        v = jnp.zeros((rows, 1, self.cfg.channels))
        visual = self.visual(v, first[:, None], first[:, None])[:, 0]
        x = jnp.concatenate([x, self.start(first), visual], axis=1)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        hidden, _ = self.trunk(x, MaskSpec(causal=True), positions)
        return self.head(v[:, 0], first, hidden[:, -1]), self.logits(hidden[:, -1:])


# ---------------------------------------------------------------- the two training sequences


def apply(net: UniFluid, params, method, *args):
    """Run one method of the module on the trainable part of the parameters."""
    own = {k: v for k, v in params.items() if k != "vae"}
    return net.apply({"params": own}, *args, method=method)


def head(net: UniFluid, params) -> dh.Head:
    """The diffusion head on plain parameters."""
    unroll = net.remat == "none"
    return dh.bind(params["head"], net.cfg.head, dtype=net.dtype, unroll=unroll)


def generation_prefix(net: UniFluid, params, tokens, length, *, source=None, drop=None):
    """Prefix of a picture: (inputs [b, s, d], valid [b, s]).

    Rows where `drop` is set get the null prompt: BOS alone, as the empty caption is written, or
    the learned null token in its place.
    """
    if drop is not None:
        length = jnp.where(drop, 1, length)
    x = apply(net, params, "text", tokens, drop)
    valid = jnp.arange(tokens.shape[1]) < length[:, None]
    if source is not None:
        soft = apply(net, params, "source", *source)
        x = jnp.concatenate([soft.astype(x.dtype), x], axis=1)
        valid = jnp.concatenate([jnp.ones(soft.shape[:2], bool), valid], axis=1)
    return x, valid


def prompt_mask(cfg: UniFluidConfig, valid: Bool[Array, "b s"], picture: int = 0) -> MaskSpec:
    """Mask of a right-padded prefix alone, as it is cached before generation.

    picture: how many of the first tokens are a picture to understand.
    """
    length = valid.sum(axis=1)
    prefix = length if cfg.prompt_bidirectional or picture else None
    if picture and cfg.picture_alone:
        prefix = jnp.where(jnp.arange(valid.shape[1]) < picture, picture, length[:, None])
    return MaskSpec(causal=True, prefix_length=prefix, kv_valid=valid)


def turns(
    cfg: UniFluidConfig,
    begin: Int[Array, "b"],
    own: Int[Array, "b n"],
    following: Int[Array, "b n"],
):
    """Rotary positions (queries, keys), each [b, n, 2] (row, column), of n inputs of a picture.

    order_pos="rope2d": a key is turned to its own place in the grid, a query to the place it
    fills, both counted from the position after BOI, which stands at `begin`; own is -1 for BOI.
    None for all other values: then the sequence's positions turn both.
    """
    if cfg.order_pos != "rope2d":
        return None
    side = round(cfg.tokens**0.5)
    first = begin[:, None, None]

    def place(index):
        grid = first + 1 + jnp.stack([index // side, index % side], axis=-1)
        return jnp.where(index[..., None] < 0, first, grid)

    return place(following), place(own)


def generation_states(net: UniFluid, params, prefix, valid, v, order) -> Float[Array, "b n d"]:
    """Teacher forcing: z [b, n, d], the state from which token order[k] is predicted."""
    cfg = net.cfg
    rows, n = order.shape
    inputs = [prefix, apply(net, params, "start", order[:, 0])]
    if n > 1:
        x = apply(net, params, "visual", v[:, :-1], order[:, :-1], order[:, 1:])
        inputs.append(x.reshape(rows, (n - 1) * cfg.group, -1))
    length = valid.sum(axis=1)
    image = length[:, None] + jnp.arange(n * cfg.group)
    positions = jnp.concatenate([jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0), image], axis=1)
    mask = MaskSpec(
        causal=True,
        prefix_length=length if cfg.prompt_bidirectional else None,
        q_positions=positions,
        kv_positions=positions,
        kv_valid=jnp.concatenate([valid, jnp.ones_like(image, bool)], axis=1),
    )
    own = jnp.pad(order[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    turned = turns(cfg, length, own, order)
    if turned is not None:
        before = jnp.broadcast_to(positions[:, : prefix.shape[1], None], (*prefix.shape[:2], 2))
        turned = tuple(jnp.concatenate([before, x], axis=1) for x in turned)
    x = jnp.concatenate(inputs, axis=1)
    hidden, _ = apply(net, params, "trunk", x, mask, positions, None, None, turned)
    return hidden[:, prefix.shape[1] + cfg.group - 1 :: cfg.group]


class Texts(NamedTuple):
    """Where the questions and answers of a row are; every row [b, t] of text holds one or more."""

    segment: Int[Array, "b t"]  # 1, 2, ... of each question with its answer, 0 for padding
    position: Int[Array, "b t"]  # within the segment
    prefix: Int[Array, "b t"]  # tokens of the segment that are its question


def texts(batch) -> Texts:
    """The text layout of a batch: und_length [b] and und_prefix [b] with one question per row,
    und_segments [b, t] and und_prefix [b, t] with several."""
    t = jnp.arange(batch["und_tokens"].shape[1])
    if "und_segments" not in batch:
        segment = (t < batch["und_length"][:, None]).astype(jnp.int32)
        shape = segment.shape
        prefix = jnp.broadcast_to(batch["und_prefix"][:, None], shape)
        return Texts(segment, jnp.broadcast_to(t, shape), prefix)
    segment = batch["und_segments"]
    begins = segment != jnp.pad(segment[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(begins, t, 0), axis=1)
    return Texts(segment, t - start, batch["und_prefix"])


def understanding_mask(cfg: UniFluidConfig, batch, picture: int) -> tuple[MaskSpec, Array]:
    """(mask, positions [b, m + t]) of `picture` = m picture tokens and the text after them."""
    if "und_segments" in batch and not cfg.picture_alone:
        raise ValueError(
            "several questions in a row (config.data.questions > 1) need "
            "config.model.picture_alone=True"
        )
    found = texts(batch)
    soft = (len(found.position), picture)
    first = jnp.broadcast_to(jnp.arange(picture), soft)
    positions = jnp.concatenate([first, picture + found.position], axis=1)
    seen = picture if cfg.picture_alone else picture + found.prefix[:, :1]
    segment = jnp.concatenate([jnp.full(soft, -1), found.segment], axis=1)
    mask = MaskSpec(
        causal=True,
        prefix_length=jnp.concatenate(
            [jnp.broadcast_to(seen, soft), picture + found.prefix], axis=1
        ),
        q_segment_ids=segment if cfg.picture_alone else None,
        q_positions=positions,
        kv_positions=positions,
        kv_valid=segment != 0,
    )
    return mask, positions


def understanding_states(net: UniFluid, params, batch) -> Float[Array, "b t d"]:
    """Hidden states at the text tokens of [SigLIP] [BOS question sep] [answer EOS] ..."""
    soft = apply(net, params, "encode_image", batch["und_image"])
    text = apply(net, params, "text", batch["und_tokens"])
    x = jnp.concatenate([soft.astype(text.dtype), text], axis=1)
    mask, positions = understanding_mask(net.cfg, batch, soft.shape[1])
    hidden, _ = apply(net, params, "trunk", x, mask, positions)
    return hidden[:, soft.shape[1] :]


def answer_weights(batch) -> Float[Array, "b t"]:
    """1 where the state at t predicts an answer token (the last prefix token up to EOS)."""
    found = texts(batch)
    following = jnp.pad(found.segment[:, 1:], ((0, 0), (0, 1)))
    inside = (found.segment == following) & (found.segment > 0)
    return (inside & (found.position >= found.prefix - 1)).astype(jnp.float32)


def loss_weights(cfg: UniFluidConfig, batch) -> Float[Array, "b t"]:
    """answer_weights, under loss_norm="per_example" divided by the tokens of each answer."""
    weights = answer_weights(batch)
    if cfg.loss_norm == "per_token":
        return weights
    if "und_segments" not in batch:
        return weights / jnp.maximum(weights.sum(1, keepdims=True), 1)
    segment = batch["und_segments"]
    same = (segment[:, :, None] == segment[:, None, :]).astype(jnp.float32)
    return weights / jnp.maximum(jnp.einsum("bts,bs->bt", same, weights), 1)


def next_tokens(batch) -> Int[Array, "b t"]:
    """The token that follows each text position."""
    return jnp.pad(batch["und_tokens"][:, 1:], ((0, 0), (0, 1)))


def output_table(net: UniFluid, params) -> Float[Array, "v d"]:
    """Rows the final states are scored against."""
    return params["decoder"]["embedding" if net.cfg.decoder.tie else "head"]


# ---------------------------------------------------------------- the losses


def normalised_tokens(cfg: UniFluidConfig, vae, z: Float[Array, "b h w z"]):
    """VAE latents -> unit-variance tokens [b, n, c] in raster order."""
    return kl_vae.tokens_from_latents(kl_vae.normalise(z, vae["latents"]), cfg.vae.patch)


def image_tokens(
    cfg: UniFluidConfig, params, batch, noise: Float[Array, "b n c"] | None, name="gen"
) -> Float[Array, "b n c"]:
    """Clean tokens v of a batch: fresh posterior noise every step (None: the mean), normalised."""
    vae = params["vae"]
    moments = batch.get(f"{name}_moments")
    if moments is None:
        pixels = batch[f"{name}_image"].astype(jnp.float32) / 127.5 - 1.0
        side = round(cfg.tokens**0.5) * cfg.vae.stride * cfg.vae.patch
        if pixels.shape[1] != side:  # a source picture comes in the size that SigLIP reads
            pixels = jax.image.resize(pixels, (len(pixels), side, side, 3), "cubic")
        moments = kl_vae.encode(vae, cfg.vae, pixels)
    z, logvar = kl_vae.split_moments(moments)
    if noise is not None:
        z = z + jnp.exp(0.5 * logvar) * kl_vae.latents_from_tokens(noise, cfg.vae.patch)
    return jax.lax.stop_gradient(normalised_tokens(cfg, vae, z))


class Draws(NamedTuple):
    """Everything random about the generation half of a step, one row per example."""

    order: Int[Array, "b n"]
    drop: Bool[Array, "b"]  # rows that lose their prompt
    blind: Bool[Array, "b"]  # rows that lose the picture to edit as well
    posterior: Float[Array, "b n c"]
    t: Int[Array, "r b n"]  # r repeats
    eps: Float[Array, "r b n c"]


def draw_noise(cfg: UniFluidConfig, keys, step) -> Draws:
    """One key per example, so that neither sharding nor micro-batches change a number."""
    shape = (cfg.diffusion_mul, cfg.tokens, cfg.channels)

    def one(key):
        normal, coins, steps = jax.random.split(key, 3)
        # One normal draw: the first slice is posterior noise, the rest are the eps.
        noise = jax.random.normal(normal, (shape[0] + 1, *shape[1:]))
        return (
            noise,
            jax.random.uniform(coins, (2,)),
            jax.random.randint(steps, shape[:2], 0, dh.STEPS),
        )

    noise, coins, t = jax.vmap(one)(keys)
    drop = coins[:, 0] < cfg.cfg_drop
    return Draws(
        order=draw_orders(keys, cfg.tokens, cfg.order, random_share(cfg, step)),
        drop=drop,
        blind=drop & (coins[:, 1] < 0.5),
        posterior=noise[:, 0],
        t=t.swapaxes(0, 1),
        eps=noise[:, 1:].swapaxes(0, 1),
    )


def visual_loss(net: UniFluid, params, batch, draws: Draws):
    """Sums over examples and tokens, mean over repeats: (mse, variational bound)."""
    cfg = net.cfg
    v = image_tokens(cfg, params, batch, draws.posterior)
    v = jnp.take_along_axis(v, draws.order[:, :, None], axis=1)
    source = None
    if "gen_source_image" in batch:
        source = (batch["gen_source_image"], image_tokens(cfg, params, batch, None, "gen_source"))
    prefix, valid = generation_prefix(
        net, params, batch["gen_tokens"], batch["gen_length"], source=source, drop=draws.drop
    )
    if source is not None:  # the second guidance scale needs rows that saw no source either
        soft = jnp.arange(valid.shape[1]) < valid.shape[1] - batch["gen_tokens"].shape[1]
        valid = valid & ~(draws.blind[:, None] & soft)
    z = generation_states(net, params, prefix, valid, v, draws.order)
    mse, vb = dh.loss(
        head(net, params), v, z, draws.t, draws.eps, discretised_t0=cfg.discretised_t0
    )
    return mse.sum() / cfg.diffusion_mul, vb.sum() / cfg.diffusion_mul


def text_loss(net: UniFluid, params, batch, weights):
    """Weighted sums over the answers of one batch: (nll, correct), without [b, t, V] logits."""
    hidden = understanding_states(net, params, batch)
    return chunked_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        output_table(net, params),
        next_tokens(batch).reshape(-1),
        weights.reshape(-1),
        softcap=net.cfg.decoder.final_softcap,
    )


def norms(cfg: UniFluidConfig, batch) -> dict[str, Float[Array, ""]]:
    """Denominators over the whole global batch; 1 where a kind of example is absent."""
    visual = batch["gen_tokens"].shape[0] * cfg.tokens if "gen_tokens" in batch else 1
    text = jnp.float32(1)
    if "und_tokens" in batch:
        text = jnp.round(loss_weights(cfg, batch).sum())  # answers, or tokens of answers
    return {"visual": jnp.float32(visual), "text": jnp.maximum(text, 1).astype(jnp.float32)}


def loss(net: UniFluid, params, extra, batch, rng, *, step, norms):
    """L_visual + lam * L_text, each a sum over the batch divided by its own norm."""
    cfg = net.cfg
    keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(batch["example"])
    mse = vb = nll = correct = jnp.float32(0)
    if "gen_tokens" in batch:
        rows = batch["gen_tokens"].shape[0]
        mse, vb = visual_loss(net, params, batch, draw_noise(cfg, keys[:rows], step))
    if "und_tokens" in batch:
        nll, correct = text_loss(net, params, batch, loss_weights(cfg, batch))
    visual = (mse + cfg.vb_weight * vb) / norms["visual"]
    text = nll / norms["text"]
    total = visual + cfg.lam * text
    metrics = {
        "loss": total,
        "mse": mse / norms["visual"],
        "vb": vb / norms["visual"],
        "text": text,
        "text_accuracy": correct / norms["text"],
    }
    return total, (metrics, extra)


# ---------------------------------------------------------------- from a config


def read_config(config) -> UniFluidConfig:
    """config.model -> UniFluidConfig, with every choice checked."""
    m = config.model
    vae = sized(kl_vae.SIZES, m.vae, "model.vae")
    grid = m.image_size // (vae.stride * vae.patch)
    if grid * vae.stride * vae.patch != m.image_size:
        raise ValueError(
            f"config.model.image_size={m.image_size} must be a multiple of the tokenizer's "
            f"{vae.stride * vae.patch} pixels per token"
        )
    for key, allowed in (
        ("order", ORDERS),
        ("order_pos", ORDER_POS),
        ("cfg_null", ("empty", "learned")),
        ("loss_norm", ("per_example", "per_token")),
        ("edit_source", ("siglip", "vae", "both")),
    ):
        if m[key] not in allowed:
            raise ValueError(f"config.model.{key}={m[key]!r}: allowed are {', '.join(allowed)}")
    decoder = sized(DECODERS, m.decoder, "model.decoder")
    decoder = dataclasses.replace(decoder, vocab_size=m.vocab_size or decoder.vocab_size)
    own = {f.name for f in dataclasses.fields(UniFluidConfig)} - {
        "decoder", "vit", "vae", "head", "tokens", "channels", "anneal"
    }  # fmt: skip
    return UniFluidConfig(
        decoder=decoder,
        vit=sized(VITS, m.vit, "model.vit"),
        vae=vae,
        head=dh.HeadConfig(
            width=m.head.width, depth=m.head.depth, channels=vae.channels, cond=decoder.width
        ),
        tokens=grid * grid,
        channels=vae.channels,
        anneal=tuple(m.anneal),
        **{name: m[name] for name in own},
    )
