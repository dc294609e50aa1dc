"""Studies that decided earlier settings, with their pages as they were.

What they found is in `benchmarks/archive/results`; `python -m benchmarks.archive.NAME`
runs one again. New experiments belong to `python -m benchmarks`.
"""
