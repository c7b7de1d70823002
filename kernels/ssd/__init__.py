"""Mamba-2's state-space duality (SSD): one decay per head and token, heads that share B and C."""

from kernels.ssd.api import ssd, ssd_step

__all__ = ["ssd", "ssd_step"]
