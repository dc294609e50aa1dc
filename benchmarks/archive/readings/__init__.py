"""Readings of Algorithm 2.1: `python -m benchmarks.archive.readings`."""
