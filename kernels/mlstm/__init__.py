"""The mLSTM cell: matrix memory, exponential input gate."""

from kernels.linear_attention import State
from kernels.mlstm.api import mlstm, mlstm_step
from kernels.mlstm.ref import empty_state

__all__ = ["State", "empty_state", "mlstm", "mlstm_step"]
