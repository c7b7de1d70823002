"""Speed, memory and compile figures; each module is one command: python -m benchmarks.NAME."""
