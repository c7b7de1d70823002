"""The head of models that predict a token bit by bit: loss, sampling, packed bits."""

from kernels.bitwise.api import bitwise_cross_entropy, sample_bits

__all__ = ["bitwise_cross_entropy", "sample_bits"]
