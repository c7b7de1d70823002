"""How well the bits of each scale are predicted, on right prefixes and on corrupted ones.

With a corrupted prefix (20 % of its bits flipped) the labels are those that correct it, which is
what a model trained by self-correction learns; "kept" are the labels of the right prefix. Chance is
half of the bits (but scale 1 is nearly the same in all pictures). No text is dropped. Infinity,
arXiv 2412.04431, section 3.4.
"""

import jax
import numpy as np

from eval import common, data

FLIPPED = 0.2
HEADS = ("head_kernel", "head_bias", "head_table")


def build(config):
    """Evaluator "bits": <split>_<case><nll | accuracy>, over all bits and of each scale; head_bytes
    of the classifier's matrix and bias, or of the codes' table."""
    options = config.evaluation

    def tokens(model, batch) -> list[int]:
        """Of each scale of a batch's pictures, whose shape is their bucket's."""
        height, width = batch["gen_image"].shape[1:3]
        return [h * w for h, w in model.predict["layout"](height / width).tokens]

    def scored(model, params, batches, sizes, flipped) -> dict[str, np.ndarray]:
        """Means over the tokens of all batches, [k] each; sizes [batches, k]."""
        scores = common.need(model, "bit_scores")
        key = jax.random.fold_in(jax.random.key(options.seed), 5)
        found = [
            jax.tree.map(common.to_host, scores(params, b, key, np.float32(flipped)))
            for b in batches
        ]
        return {
            name: np.average([f[name] for f in found], axis=0, weights=sizes) for name in found[0]
        }

    def evaluate(model, params, *, step, rng, workdir):
        del step, rng, workdir
        leaves = params["transformer"]
        metrics = {"head_bytes": float(sum(leaves[k].nbytes for k in HEADS if k in leaves))}
        for split in data.SPLITS:
            batches = data.loss_batches(
                config, split, rows=options.batch, count=options.loss_batches
            )
            sizes = np.array([tokens(model, batch) for batch in batches])
            right = scored(model, params, batches, sizes, 0.0)
            wrong = scored(model, params, batches, sizes, FLIPPED)
            cases = {
                "nll": right["nll"],
                "accuracy": right["accuracy"],
                **{f"corrupted_{name}": values for name, values in wrong.items()},
            }
            for name, values in cases.items():
                metrics[f"{split}_{name}"] = float(np.average(values, weights=sizes.sum(0)))
                for k, value in enumerate(values if "kept" not in name else (), 1):
                    metrics[f"{split}_{name}_scale{k}"] = float(value)
        return metrics

    return evaluate
