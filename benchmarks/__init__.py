"""Experiments with prunadag_optax; each runs as `python -m benchmarks.NAME`."""
