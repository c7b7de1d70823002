"""Names of the discrete tokenizers in their checkpoints.

VQGAN: Chameleon's vqgan.ckpt as Liquid and transformers spell it (which ships the encoder only);
Infinity: infinity_vae_d32.pth and its kin, key "vae"; VAR: vae_ch160v4096z32.pth.
"""

from export.weights import WeightMap, plain
from models.tokenizers.conv_weights import STYLES, conv_names, decoder_names, encoder_names
from models.tokenizers.discrete import TokenizerConfig

# Losses and statistics that training left in the files.
IGNORE = ("loss.*", "quantizer.*", "quantize.lfq.*", "quantize.ema_vocab_hit_SV")


def weight_map(cfg: TokenizerConfig) -> WeightMap:
    """Every leaf of the tokenizer."""
    style = STYLES[cfg.names]
    rules = encoder_names(cfg, style) | decoder_names(cfg, style)
    if cfg.quant_conv:
        for name in ("quant_conv", "post_quant_conv"):
            rules |= conv_names(name, name)
    if cfg.quantiser == "vq":
        rules["quantiser/embedding"] = plain("quantize.embedding.weight")
        for i in range(cfg.phis):
            rules |= conv_names(f"quantiser/phi_{i}", f"quantize.quant_resi.qresi_ls.{i}")
    return WeightMap(rules, ignore=IGNORE)
