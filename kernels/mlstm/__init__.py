"""The mLSTM cell: matrix memory, exponential input gate."""

from kernels.mlstm.api import mlstm, mlstm_step
from kernels.mlstm.ref import State, empty_state

__all__ = ["State", "empty_state", "mlstm", "mlstm_step"]
