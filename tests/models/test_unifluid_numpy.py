"""The composite oracle of unifluid.md section 6: the training loss recomputed in float64 NumPy.

Written from the equations alone, row by row, over the flat names that export writes; it shares no
code with models/. Only the random draws are taken from the product.
"""

import functools
import math

import jax
import numpy as np

from models import MODELS, unifluid
from tests.models.unifluid_case import batch_of, params_of, tiny_config


def flat(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(k.key for k in path): np.asarray(x, np.float64) for path, x in leaves}


def rms(x, w):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + w)


def layer_norm(x, scale=1.0, bias=0.0):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rope(x, positions):
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10_000.0 ** (-2 * np.arange(half) / (2 * half))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def attend(q, k, v, visible, cap):
    """q [t, h, d]; k, v [t, g, d]; visible [t, t]."""
    share = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // share].T / math.sqrt(q.shape[-1])
        scores = cap * np.tanh(scores / cap) if cap else scores
        out[:, head] = softmax(np.where(visible, scores, -1e30)) @ v[:, head // share]
    return out


def decoder(p, cfg, x, prefix):
    """One row without padding; the first `prefix` inputs are bidirectional."""
    t = np.arange(len(x))
    causal = (t[None] <= t[:, None]) | (t[None] < prefix)
    for layer in range(cfg.layers):
        kind = ("local", "global")[layer % 2]
        w = {
            key.removeprefix(f"decoder/layers/{layer % 2}_{kind}/"): value[layer // 2]
            for key, value in p.items()
            if key.startswith(f"decoder/layers/{layer % 2}_{kind}/")
        }
        visible = causal & (t[:, None] - t[None] < cfg.window) if kind == "local" else causal
        y = rms(x, w["pre_attn_norm/scale"])
        q, k, v = (np.einsum("td,dhk->thk", y, w[f"attn/{n}/kernel"]) for n in "qkv")
        y = attend(rope(q, t), rope(k, t), v, visible, 50.0)
        y = np.einsum("thk,hkd->td", y, w["attn/o/kernel"])
        x = x + rms(y, w["post_attn_norm/scale"])
        y = rms(x, w["pre_mlp_norm/scale"])
        y = (gelu(y @ w["mlp/gate/kernel"]) * (y @ w["mlp/up/kernel"])) @ w["mlp/down/kernel"]
        x = x + rms(y, w["post_mlp_norm/scale"])
    return rms(x, p["decoder/final_norm/scale"])


def dense(p, name, x):
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def vit(p, cfg, image):
    size, rows = cfg.patch, cfg.image_size // cfg.patch
    pixels = image.astype(np.float64) / 127.5 - 1
    patches = [
        pixels[i * size : (i + 1) * size, j * size : (j + 1) * size].ravel()
        for i in range(rows)
        for j in range(rows)
    ]
    x = dense(p, "vit/patch", np.stack(patches)) + p["vit/positions"]
    for layer in range(cfg.layers):
        w = {
            key.removeprefix("vit/layers/"): value[layer]
            for key, value in p.items()
            if key.startswith("vit/layers/")
        }
        y = layer_norm(x, w["norm1/scale"], w["norm1/bias"])
        q, k, v = (
            np.einsum("td,dhk->thk", y, w[f"attn/{n}/kernel"]) + w[f"attn/{n}/bias"] for n in "qkv"
        )
        y = attend(q, k, v, np.ones((len(x), len(x)), bool), None)
        x = x + np.einsum("thk,hkd->td", y, w["attn/o/kernel"]) + w["attn/o/bias"]
        y = gelu(dense(w, "mlp/in", layer_norm(x, w["norm2/scale"], w["norm2/bias"])))
        x = x + dense(w, "mlp/out", y)
    x = layer_norm(x, p["vit/final_norm/scale"], p["vit/final_norm/bias"])
    return dense(p, "vit_proj", x)


def head(p, cfg, x, t, z):
    freqs = 10_000.0 ** (-np.arange(128) / 128)
    time = np.concatenate([np.cos(t[..., None] * freqs), np.sin(t[..., None] * freqs)], -1)
    y = dense(p, "head/time_out", silu(dense(p, "head/time_in", time))) + dense(p, "head/cond", z)
    h = dense(p, "head/input", x)
    for layer in range(cfg.depth):
        w = {
            k.removeprefix("head/layers/"): v[layer]
            for k, v in p.items()
            if k.startswith("head/layers/")
        }
        shift, scale, gate = np.split(dense(w, "modulation", silu(y)), 3, -1)
        u = layer_norm(h, w["norm/scale"], w["norm/bias"]) * (1 + scale) + shift
        h = h + gate * dense(w, "mlp_out", silu(dense(w, "mlp_in", u)))
    shift, scale = np.split(dense(p, "head/final/modulation", silu(y)), 2, -1)
    return np.split(dense(p, "head/final/linear", layer_norm(h) * (1 + scale) + shift), 2, -1)


def diffusion_terms(p, cfg, v, z, t, eps):
    """(MSE, bound in bits) of tokens v [n, c] at steps t [r, n]; the bound's KL form at t = 0."""
    u = np.arange(1001) / 1000
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    bar = np.cumprod(1 - beta)
    before = np.append(1.0, bar[:-1])
    posterior = beta * (1 - before) / (1 - bar)
    log_posterior = np.log(np.append(posterior[1], posterior[1:]))
    c1 = beta * np.sqrt(before) / (1 - bar)
    at = lambda table: table[t][..., None]  # noqa: E731
    noisy = np.sqrt(at(bar)) * v + np.sqrt(1 - at(bar)) * eps
    guess, spread = head(p, cfg, noisy, t.astype(np.float64), z)
    frac = (spread + 1) / 2
    log_var = frac * np.log(at(beta)) + (1 - frac) * at(log_posterior)
    clean = noisy / np.sqrt(at(bar)) - np.sqrt(1 / at(bar) - 1) * guess
    gap = at(c1) * (v - clean)  # the c2 x_t of both means cancels
    kl = 0.5 * (log_var - at(log_posterior) - 1 + np.exp(at(log_posterior) - log_var))
    kl = kl + 0.5 * gap**2 * np.exp(-log_var)
    return ((guess - eps) ** 2).mean(-1).sum(), kl.mean(-1).sum() / np.log(2)


def test_loss_equals_an_independent_recomputation():
    """Both losses of a mixed batch agree with NumPy to 1e-4, unnormalised draws included."""
    config = tiny_config(model__cfg_drop=0.3)
    model, cfg = MODELS["unifluid"](config), unifluid.read_config(config)
    params, batch = params_of(), batch_of(model, config)
    rng = jax.random.key(5)
    _, (metrics, _) = jax.jit(
        lambda p: model.loss(p, {}, batch, rng, step=0, norms=model.norms(batch))
    )(params)
    keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(batch["example"])
    rows = len(batch["gen_length"])
    draws = jax.tree.map(np.asarray, unifluid.draw_noise(cfg, keys[:rows], 0))
    assert draws.drop.any() and not draws.drop.all()
    p, data = flat(params), jax.tree.map(np.asarray, batch)
    embed = p["decoder/embedding"] * math.sqrt(cfg.decoder.width)

    mse = vb = 0.0
    for i in range(rows):
        mean, logvar = np.split(data["gen_moments"][i].astype(np.float64), 2, -1)
        z = mean + np.exp(logvar / 2) * draws.posterior[i].reshape(mean.shape)
        v = ((z - p["vae/latents/mean"]) / p["vae/latents/std"]).reshape(cfg.tokens, cfg.channels)
        order = draws.order[i]
        v = v[order]
        prompt = embed[data["gen_tokens"][i][: 1 if draws.drop[i] else data["gen_length"][i]]]
        boi = embed[unifluid.BOI] + p["pos_next"][order[0]]
        inputs = dense(p, "visual_in", v[:-1]) + p["pos_self"][order[:-1]]
        inputs = inputs + p["pos_next"][order[1:]]
        x = np.concatenate([prompt, boi[None], inputs])
        states = decoder(p, cfg.decoder, x, len(prompt))[len(prompt) :]
        a, b = diffusion_terms(p, cfg.head, v, states, draws.t[:, i], draws.eps[:, i])
        mse, vb = mse + a / cfg.diffusion_mul, vb + b / cfg.diffusion_mul
    norm = rows * cfg.tokens
    np.testing.assert_allclose(float(metrics["mse"]), mse / norm, rtol=1e-4)
    np.testing.assert_allclose(float(metrics["vb"]), vb / norm, rtol=1e-4)

    text = 0.0
    for i in range(len(data["und_length"])):
        length, prefix = data["und_length"][i], data["und_prefix"][i]
        ids = data["und_tokens"][i][:length]
        soft = vit(p, cfg.vit, data["und_image"][i])
        states = decoder(p, cfg.decoder, np.concatenate([soft, embed[ids]]), len(soft) + prefix)
        logits = 30 * np.tanh(states @ p["decoder/embedding"].T / 30)
        at = np.arange(prefix, length)
        chosen = softmax(logits[len(soft) + at - 1])[np.arange(len(at)), ids[at]]
        text += -np.log(chosen).mean()
    np.testing.assert_allclose(float(metrics["text"]), text / len(data["und_length"]), rtol=1e-4)
