"""Models with weights under their published names, for the tests of language models."""

import functools

import flax.linen as nn
import jax
import numpy as np

from export.weights import WeightMap, from_published, to_published
from models import language
from tests.golden import recipes


def abstract(net: language.Net):
    """Shapes of the parameters."""
    return nn.meta.unbox(jax.eval_shape(functools.partial(language.init, net), jax.random.key(0)))


def shapes(net: language.Net, names: WeightMap) -> dict[str, tuple[int, ...]]:
    """Of the published tensors."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(net))
    return {k: v.shape for k, v in to_published(zeros, names).items()}


def from_recipe(net: language.Net, names: WeightMap):
    """Parameters from recipes.weights(1); the names go both ways."""
    weights = recipes.weights(shapes(net, names), 1)
    params = from_published(weights, names, abstract(net))
    jax.tree.map(np.testing.assert_array_equal, to_published(params, names), weights)
    return params


def count(net: language.Net) -> int:
    """Numbers in all parameters."""
    return sum(x.size for x in jax.tree.leaves(abstract(net)))
