"""Names of the KL autoencoder in LDM's and MAR's checkpoints (kl16.ckpt, key "model")."""

from export.weights import WeightMap, plain
from models.tokenizers.conv_weights import conv_names, decoder_names, encoder_names
from models.tokenizers.kl_vae import KLVAEConfig


def weight_map(cfg: KLVAEConfig) -> WeightMap:
    """Every leaf of the autoencoder; `latents.mean` and `latents.std` are names of our own."""
    rules = encoder_names(cfg) | decoder_names(cfg)
    for name in ("quant_conv", "post_quant_conv"):
        rules |= conv_names(name, name)
    rules |= {f"latents/{name}": plain(f"latents.{name}") for name in ("mean", "std")}
    # LDM's training checkpoints also hold the LPIPS and discriminator weights of the loss.
    return WeightMap(rules, ignore=("loss.*",))
