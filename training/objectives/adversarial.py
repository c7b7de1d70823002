"""Adversarial training of an image tokenizer: PatchGAN, hinge loss, one summed loss.

loss = L_rec + [step >= start] (w lambda L_gan(G) + L_hinge(D)), where stop-gradients keep each
player's term to itself and lambda = |dL_rec/dW| / (|dL_gan/dW| + 1e-4), W the last kernel of the
decoder, clipped to [0, 1e4] (VQGAN, arXiv 2012.09841, eq. 7; LDM). Deviation: the discriminator
normalises per example (group norm), not per batch, so that shards do not change its numbers.
lambda is taken over a micro-batch, as elsewhere over a device's batch, and so is the optional
LeCam penalty.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models import Model
from models.tokenizers.conv import group_norm
from training.objectives import OBJECTIVES, Objective

MAX_WEIGHT = 1e4


def _boxed(init, *names):
    return nn.with_logical_partitioning(init, names)


class PatchGAN(nn.Module):
    """Judges overlapping patches: `layers` strided 4x4 convolutions, then two of stride 1."""

    width: int = 64
    layers: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 1"]:
        x = nn.leaky_relu(self._conv("conv_in", x, self.width, 2), 0.2)
        for i in range(1, self.layers + 1):
            features = self.width * min(2**i, 8)
            x = self._conv(f"conv_{i}", x, features, 2 if i < self.layers else 1)
            scale = self.param(
                f"norm_{i}_scale", _boxed(nn.initializers.normal(0.02), "norm"), (features,)
            )
            bias = self.param(f"norm_{i}_bias", _boxed(nn.initializers.zeros, "norm"), (features,))
            x = nn.leaky_relu(group_norm(x, 1.0 + scale, bias, min(32, features // 4)), 0.2)
        return self._conv("conv_out", x, 1, 1)

    def _conv(self, name, x, features, stride):
        axes = ("spatial", None, "channels_in", "channels_out")  # flax takes a name only once
        return nn.Conv(
            features,
            (4, 4),
            (stride, stride),
            padding=1,
            kernel_init=_boxed(nn.initializers.normal(0.02), *axes),
            bias_init=_boxed(nn.initializers.zeros, "channels_out"),
            name=name,
        )(x)


def adaptive_weight(reconstruction: Array, adversarial: Array) -> Float[Array, ""]:
    """Ratio of the two gradients' norms at the last layer, clipped; no gradient flows through."""
    ratio = jnp.linalg.norm(reconstruction) / (jnp.linalg.norm(adversarial) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, MAX_WEIGHT))


def per_image(scores: Float[Array, "b h w 1"]) -> Float[Array, "b"]:
    """Mean over an image's patches."""
    return scores.mean((1, 2, 3))


def hinge(real: Float[Array, "b h w 1"], fake: Float[Array, "b h w 1"]) -> Float[Array, "b"]:
    """Discriminator's loss per image: half of relu(1 - D(real)) + relu(1 + D(fake))."""
    return 0.5 * (per_image(nn.relu(1.0 - real)) + per_image(nn.relu(1.0 + fake)))


def lecam_zero(
    real: Float[Array, "b h w 1"], fake: Float[Array, "b h w 1"], free: float = 0.1
) -> Float[Array, ""]:
    """LeCam's penalty with 0 as both anchors, as Infinity's tokenizer trains with: squares of how
    far the mean scores of a batch lie outside +-free."""
    return sum(jnp.square(nn.relu(jnp.abs(x.mean()) - free)) for x in (real, fake))


def build(model: Model, config) -> Objective:
    """Objective around a model with predict["generate"]; config.objective: start (step), weight,
    width and layers of the discriminator; adaptive=False is lambda = 1, lecam weighs the penalty
    on scores far from 0; freeze (parts of the model that do not train)."""
    o = config.objective
    if "generate" not in model.predict:
        raise ValueError(f"config.objective.name='adversarial': {config.model.name} cannot use it")
    judge, plain = PatchGAN(o.width, o.layers), OBJECTIVES["model"](model, config)

    def init(rng, params):
        params, frozen = plain.init(rng, params)
        side = config.data.image_size
        boxed = judge.init(rng, jnp.zeros((1, side, side, 3)))["params"]
        return {**params, "discriminator": boxed}, frozen

    def model_params(params, frozen):
        trained = {k: v for k, v in params.items() if k != "discriminator"}
        return plain.model_params(trained, frozen)

    def adversarial_terms(params, g, images):
        """(generator's term, discriminator's term, metrics), sums over images / their number."""
        held = jax.lax.stop_gradient(params["discriminator"])

        def fool(fake):
            return -per_image(judge.apply({"params": held}, fake)).sum() / images

        fake = jax.lax.stop_gradient(g.fake)
        weight = jnp.float32(o.weight)
        if o.adaptive:
            weight *= adaptive_weight(
                g.last_layer(jax.grad(g.reconstruction)(fake)), g.last_layer(jax.grad(fool)(fake))
            )
        own = {"params": params["discriminator"]}
        real_scores, fake_scores = judge.apply(own, g.real), judge.apply(own, fake)
        discriminator = hinge(real_scores, fake_scores).sum() / images
        metrics = {
            "gan/weight": weight * g.real.shape[0] / images,  # micro-batches add up to their mean
            "gan/discriminator": discriminator,
            "gan/real": per_image(real_scores).sum() / images,
            "gan/fake": per_image(fake_scores).sum() / images,
        }
        if o.lecam:
            share = g.real.shape[0] / images
            discriminator += o.lecam * share * lecam_zero(real_scores, fake_scores)
        return weight * fool(g.fake), discriminator, metrics

    def loss(params, frozen, extra, batch, rng, *, step, norms):
        own = model_params(params, frozen)
        g = model.predict["generate"](own, extra, batch, rng, norms=norms)
        images = norms["images"]

        def on(params, fake):
            return adversarial_terms(params, g._replace(fake=fake), images)

        def off(params, fake):
            shapes = jax.eval_shape(on, params, fake)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def when_due(params, fake):  # before the start neither network of the game runs
            return jax.lax.cond(step >= o.start, on, off, params, fake)

        def always(params, fake):
            terms = on(params, fake)
            return jax.tree.map(lambda x: jnp.where(step >= o.start, x, 0.0), terms)

        # On CPUs XLA runs gradients of convolutions inside a conditional many times slower.
        generator, discriminator, metrics = jax.lax.platform_dependent(
            params, g.fake, cpu=always, default=when_due
        )
        total = g.reconstruction(g.fake) + g.rest + generator + discriminator
        return total, ({**g.metrics, **metrics}, g.extra)

    def labels(params):
        def group(key):
            return "discriminator" if key == "discriminator" else "generator"

        return {k: jax.tree.map(lambda _, k=k: group(k), v) for k, v in params.items()}

    return Objective(init, loss, labels, None, model_params)
