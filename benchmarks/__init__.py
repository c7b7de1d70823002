"""Speed, memory and compile figures; each module is one command: python -m benchmarks.NAME."""

from training import platform

platform.before_jax()  # as main.py does: compile cache, the CPU without noise, memory reused
