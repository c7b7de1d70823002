"""VAE moments of every picture, computed once per data set and weights, then memory-mapped."""

import functools
import hashlib
from pathlib import Path

import jax
import numpy as np
from absl import logging

from input_pipeline import store
from input_pipeline.examples import Examples

ROOT = Path(__file__).resolve().parents[1]
BATCH = 64


def weights_path(data, key: str) -> Path:
    """The file or folder that config.data.KEY names; a relative one may lie in the project."""
    path = Path(data[key]).expanduser()
    path = path if path.exists() else ROOT / path
    if not path.exists():
        raise FileNotFoundError(f"config.data.{key}={data[key]!r} does not exist")
    return path


def weights_digest(path: Path) -> str:
    """Changes with any byte of a file, or of the files of a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return _digest(tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in files))


@functools.lru_cache(maxsize=8)  # an encoder of gigabytes is asked about for every shape and split
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, *_ in files:
        with open(name, "rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:12]


def _pictures_digest(found: Examples) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(found), BATCH):
        rows = np.arange(start, min(start + BATCH, len(found)))
        digest.update(np.ascontiguousarray(found.pictures.gather(rows)))
    return digest.hexdigest()[:12]


def encode_all(params, cfg, found: Examples) -> np.ndarray:
    """float32 [n, h, w, 2z]: mean and log-variance of the posterior of every picture."""
    from models.tokenizers import kl_vae

    encode = jax.jit(lambda p, x: kl_vae.encode(p, cfg, x / 127.5 - 1.0))
    out = []
    for start in range(0, len(found), BATCH):
        rows = np.arange(start, start + BATCH) % len(found)  # one shape, one compilation
        images = found.pictures.gather(rows).astype(np.float32)
        out.append(np.asarray(encode(params, images), np.float32))
    return np.concatenate(out)[: len(found)]


def load_vae(config, path: Path):
    """(params, sizes) of the autoencoder config.model.vae from a safetensors file or folder."""
    from export import weights
    from models import sized
    from models.tokenizers import kl_vae, kl_vae_weights

    cfg = sized(kl_vae.SIZES, config.model.vae, "model.vae")
    abstract = jax.eval_shape(lambda: kl_vae.init(jax.random.key(0), cfg))
    tensors = weights.load_safetensors(path)
    try:
        return weights.from_published(tensors, kl_vae_weights.weight_map(cfg), abstract), cfg
    except ValueError as error:
        raise ValueError(f"config.data.latents={str(path)!r}: {error}") from None


def moments(config, found: Examples, split: str) -> np.ndarray:
    """Moments of all pictures of `found`, in order, from the cache beside the data sets."""
    path = weights_path(config.data, "latents")

    def make(out: Path) -> None:
        params, cfg = load_vae(config, path)
        logging.info("encoding %d pictures with %s", len(found), path)
        with open(out, "wb") as file:
            np.save(file, encode_all(params, cfg, found))

    key = f"moments/{weights_digest(path)}-{_pictures_digest(found)}-{split}.npy"
    return np.load(store.prepare_once(config.data, key, make), mmap_mode="r")
