"""Attention over mask descriptions, and what decoding writes into its cache."""

from kernels.attention.api import attention, shares_rows
from kernels.attention.cache import write_slots
from kernels.attention.mask import MaskSpec

__all__ = ["MaskSpec", "attention", "shares_rows", "write_slots"]
