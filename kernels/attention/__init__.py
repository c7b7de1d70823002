"""Attention over mask descriptions."""

from kernels.attention.api import attention
from kernels.attention.mask import MaskSpec

__all__ = ["MaskSpec", "attention"]
