"""Names of the KL autoencoder in LDM's and MAR's checkpoints (kl16.ckpt, key "model")."""

from export.weights import WeightMap, conv, plain
from models.tokenizers.kl_vae import KLVAEConfig


def _conv(ours: str, published: str) -> dict:
    return {
        f"{ours}/kernel": conv(f"{published}.weight"),
        f"{ours}/bias": plain(f"{published}.bias"),
    }


def _norm(ours: str, published: str) -> dict:
    return {
        f"{ours}/scale": plain(f"{published}.weight"),
        f"{ours}/bias": plain(f"{published}.bias"),
    }


def _res_block(ours: str, published: str, shortcut: bool) -> dict:
    rules = {}
    for i in (1, 2):
        rules |= _norm(f"{ours}/norm{i}", f"{published}.norm{i}")
        rules |= _conv(f"{ours}/conv{i}", f"{published}.conv{i}")
    return rules | (_conv(f"{ours}/shortcut", f"{published}.nin_shortcut") if shortcut else {})


def _attn_block(ours: str, published: str) -> dict:
    rules = _norm(f"{ours}/norm", f"{published}.norm")
    for name in ("q", "k", "v", "proj_out"):
        rules |= _conv(f"{ours}/{name}", f"{published}.{name}")
    return rules


def _ends(ours: str, published: str, *, conv_out: str) -> dict:
    """First convolution, middle blocks, last norm and last convolution of one side."""
    rules = _conv(f"{ours}/conv_in", f"{published}.conv_in")
    for name in ("block_1", "block_2"):
        rules |= _res_block(f"{ours}/mid/{name}", f"{published}.mid.{name}", False)
    rules |= _attn_block(f"{ours}/mid/attn_1", f"{published}.mid.attn_1")
    rules |= _norm(f"{ours}/norm_out", f"{published}.norm_out")
    return rules | _conv(conv_out, f"{published}.conv_out")


def _encoder(cfg: KLVAEConfig) -> dict:
    rules = _ends("encoder", "encoder", conv_out="encoder/conv_out")
    last = 1
    for level, mult in enumerate(cfg.mult):
        ours, published = f"encoder/down_{level}", f"encoder.down.{level}"
        for i in range(cfg.res_blocks):
            rules |= _res_block(f"{ours}_block_{i}", f"{published}.block.{i}", mult != last)
            last = mult
            if level in cfg.attn:
                rules |= _attn_block(f"{ours}_attn_{i}", f"{published}.attn.{i}")
        if level != len(cfg.mult) - 1:
            rules |= _conv(f"{ours}_downsample", f"{published}.downsample.conv")
    return rules


def _decoder(cfg: KLVAEConfig) -> dict:
    rules = _ends("decoder/body", "decoder", conv_out="decoder/conv_out")
    last = cfg.mult[-1]
    for level in reversed(range(len(cfg.mult))):
        ours, published = f"decoder/body/up_{level}", f"decoder.up.{level}"
        for i in range(cfg.res_blocks + 1):
            widens = cfg.mult[level] != last
            rules |= _res_block(f"{ours}_block_{i}", f"{published}.block.{i}", widens)
            last = cfg.mult[level]
        if level != 0:
            rules |= _conv(f"{ours}_upsample", f"{published}.upsample.conv")
    return rules


def weight_map(cfg: KLVAEConfig) -> WeightMap:
    """Every leaf of the autoencoder; `latents.mean` and `latents.std` are names of our own."""
    rules = _encoder(cfg) | _decoder(cfg)
    rules |= _conv("quant_conv", "quant_conv") | _conv("post_quant_conv", "post_quant_conv")
    rules |= {f"latents/{name}": plain(f"latents.{name}") for name in ("mean", "std")}
    # LDM's training checkpoints also hold the LPIPS and discriminator weights of the loss.
    return WeightMap(rules, ignore=("loss.*",))
