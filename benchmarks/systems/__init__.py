"""The other systems, each on the experiment that its authors report.

`python -m benchmarks.systems all` runs them, `--help` says more.
"""
