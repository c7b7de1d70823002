"""What each op contributes to tpu_static and gpu_static: one module per op, named here.

    TPU[op](topology, device, args) -> static.TpuOp         which programs, which kernels in them
    GPU[op][program](topology, device, args) -> static.GpuProgram
    GPU_ROWS[op](topology, device, args) -> [row]           further rows, where an op has some

A builder runs in the child process of its program, with the compilers of its topology; `device` is
described, not attached; `args` are the command line's.
"""

from benchmarks.static_ops import attention, bitwise, cache, mlstm, selective_scan, ssd

TPU = {**attention.TPU, **bitwise.TPU, **cache.TPU, "mlstm": mlstm.tpu}
TPU |= {"selective_scan": selective_scan.tpu, "ssd": ssd.tpu}
GPU = {"bitwise": bitwise.GPU, "mlstm": mlstm.GPU, "selective_scan": selective_scan.GPU}
GPU |= {"ssd": ssd.GPU}
GPU_ROWS = {"mlstm": mlstm.gpu_rows, "selective_scan": selective_scan.gpu_rows, "ssd": ssd.gpu_rows}
