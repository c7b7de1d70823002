"""Names of the diffusion head in MAR's checkpoints, where it is `diffloss.net`."""

from export.weights import WeightMap, linear, plain


def _linear(ours: str, published: str, **stacking) -> dict:
    return {
        f"{ours}/kernel": linear(f"{published}.weight", **stacking),
        f"{ours}/bias": plain(f"{published}.bias", **stacking),
    }


def weight_map(prefix: str = "") -> WeightMap:
    """Every leaf of one head; prefix "diffloss.net." reads a whole MAR checkpoint."""
    block, stack = f"{prefix}res_blocks.{{layer}}", {"stack": (1,)}
    rules = {
        **_linear("time_in", f"{prefix}time_embed.mlp.0"),
        **_linear("time_out", f"{prefix}time_embed.mlp.2"),
        **_linear("cond", f"{prefix}cond_embed"),
        **_linear("input", f"{prefix}input_proj"),
        "layers/norm/scale": plain(f"{block}.in_ln.weight", **stack),
        "layers/norm/bias": plain(f"{block}.in_ln.bias", **stack),
        **_linear("layers/mlp_in", f"{block}.mlp.0", **stack),
        **_linear("layers/mlp_out", f"{block}.mlp.2", **stack),
        **_linear("layers/modulation", f"{block}.adaLN_modulation.1", **stack),
        **_linear("final/modulation", f"{prefix}final_layer.adaLN_modulation.1"),
        **_linear("final/linear", f"{prefix}final_layer.linear"),
    }
    return WeightMap(rules)
