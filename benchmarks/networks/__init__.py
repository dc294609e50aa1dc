"""prunAdag against every rival on small networks, with minibatches, at equal budgets.

`python -m benchmarks.networks --help` says more.
"""
