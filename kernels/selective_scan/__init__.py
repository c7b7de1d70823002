"""The selective scan of Mamba-1: a diagonal state whose decay depends on the token."""

from kernels.selective_scan.api import selective_scan, selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
