"""Published names of the convolutional encoders and decoders: LDM's, and the two variants of them.

LDM (KL-VAE, VQGAN, Chameleon) says conv1.weight; Infinity wraps every layer once more and says
conv1.conv.weight and norm1.norm.weight; VAR publishes q, k and v of an attention as one tensor.
"""

from typing import NamedTuple

from export.weights import Rule, conv, plain
from models.tokenizers.conv import ConvConfig


class Style(NamedTuple):
    """What a publication does differently from LDM."""

    conv: str = ""  # between a convolution's name and its weight
    norm: str = ""
    fused: bool = False  # q, k and v as one tensor "qkv"


STYLES = {
    "ldm": Style(),
    "infinity": Style(conv=".conv", norm=".norm"),
    "var": Style(fused=True),
}


def conv_names(ours: str, published: str, style: Style = STYLES["ldm"], **part) -> dict[str, Rule]:
    """Kernel and bias of one convolution."""
    name = published + style.conv
    return {
        f"{ours}/kernel": conv(f"{name}.weight", **part),
        f"{ours}/bias": plain(f"{name}.bias", **part),
    }


def _norm(ours: str, published: str, style: Style) -> dict[str, Rule]:
    name = published + style.norm
    return {f"{ours}/scale": plain(f"{name}.weight"), f"{ours}/bias": plain(f"{name}.bias")}


def _res_block(ours: str, published: str, shortcut: bool, style: Style) -> dict[str, Rule]:
    rules = {}
    for i in (1, 2):
        rules |= _norm(f"{ours}/norm{i}", f"{published}.norm{i}", style)
        rules |= conv_names(f"{ours}/conv{i}", f"{published}.conv{i}", style)
    if shortcut:
        rules |= conv_names(f"{ours}/shortcut", f"{published}.nin_shortcut", style)
    return rules


def _attn_block(ours: str, published: str, channels: int, style: Style) -> dict[str, Rule]:
    rules = _norm(f"{ours}/norm", f"{published}.norm", style)
    rules |= conv_names(f"{ours}/proj_out", f"{published}.proj_out", style)
    for i, name in enumerate("qkv"):
        part = (i * channels, (i + 1) * channels, 3 * channels) if style.fused else None
        source = "qkv" if style.fused else name
        rules |= conv_names(f"{ours}/{name}", f"{published}.{source}", style, part=part)
    return rules


def _ends(
    ours: str, published: str, cfg: ConvConfig, style: Style, *, conv_out: str
) -> dict[str, Rule]:
    """First convolution, middle blocks, last norm and last convolution of one side."""
    rules = conv_names(f"{ours}/conv_in", f"{published}.conv_in", style)
    for name in ("block_1", "block_2"):
        rules |= _res_block(f"{ours}/mid/{name}", f"{published}.mid.{name}", False, style)
    if cfg.mid_attn:
        channels = cfg.ch * cfg.mult[-1]
        rules |= _attn_block(f"{ours}/mid/attn_1", f"{published}.mid.attn_1", channels, style)
    rules |= _norm(f"{ours}/norm_out", f"{published}.norm_out", style)
    return rules | conv_names(conv_out, f"{published}.conv_out", style)


def encoder_names(cfg: ConvConfig, style: Style = STYLES["ldm"]) -> dict[str, Rule]:
    """Every leaf below "encoder"."""
    rules = _ends("encoder", "encoder", cfg, style, conv_out="encoder/conv_out")
    last = 1
    for level, mult in enumerate(cfg.mult):
        ours, published = f"encoder/down_{level}", f"encoder.down.{level}"
        for i in range(cfg.res_blocks):
            rules |= _res_block(f"{ours}_block_{i}", f"{published}.block.{i}", mult != last, style)
            last = mult
            if level in cfg.attn:
                rules |= _attn_block(
                    f"{ours}_attn_{i}", f"{published}.attn.{i}", cfg.ch * mult, style
                )
        if level != len(cfg.mult) - 1:
            rules |= conv_names(f"{ours}_downsample", f"{published}.downsample.conv", style)
    return rules


def decoder_names(cfg: ConvConfig, style: Style = STYLES["ldm"]) -> dict[str, Rule]:
    """Every leaf below "decoder"."""
    rules = _ends("decoder/body", "decoder", cfg, style, conv_out="decoder/conv_out")
    last = cfg.mult[-1]
    for level in reversed(range(len(cfg.mult))):
        ours, published, mult = f"decoder/body/up_{level}", f"decoder.up.{level}", cfg.mult[level]
        for i in range(cfg.res_blocks + 1):
            rules |= _res_block(f"{ours}_block_{i}", f"{published}.block.{i}", mult != last, style)
            last = mult
            if level in cfg.up_attn:
                rules |= _attn_block(
                    f"{ours}_attn_{i}", f"{published}.attn.{i}", cfg.ch * mult, style
                )
        if level != 0:
            rules |= conv_names(f"{ours}_upsample", f"{published}.upsample.conv", style)
    return rules
