"""Experiments with prunadag_optax: `python -m benchmarks list`, and README.md."""
