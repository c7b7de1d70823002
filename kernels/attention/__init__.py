"""Attention over mask descriptions."""

from kernels.attention.api import attention, shares_rows
from kernels.attention.mask import MaskSpec

__all__ = ["MaskSpec", "attention", "shares_rows"]
