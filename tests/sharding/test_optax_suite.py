"""optax's own tests of sharded optimizers, for prunAdag and the methods."""

import prunadag_optax
from tests.optax_suites import ALL_SETTINGS, FACTORIES, METHODS, label, suite

ShardingTest = suite(
    "_src/sharding_test.py",
    "ShardingTest",
    "class ShardingTest(",
    {
        "OPTIMIZERS": {label(s): prunadag_optax.prunadag(**s) for s in ALL_SETTINGS}
        | {name: FACTORIES[name](**s) for name, s in METHODS}
    },
    # As strings '0.10.2' < '0.7.2', so on jax 0.10 these tests would skip themselves.
    edits=[("jax.__version__ < '0.7.2'", "jax.__version_info__ < (0, 7, 2)", 2)],
    without="test_microbatch",
)
