"""Schedules: the densities over a training, and their ends."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import schedules
from tests.helpers import refused


@given(
    final=st.floats(0.001, 1),
    initial=st.floats(0.001, 1),
    begin=st.integers(0, 50),
    length=st.integers(1, 50),
    step=st.integers(0, 200),
)
@settings(deadline=None, max_examples=50)
def test_cubic_is_that_of_gradual_pruning(final, initial, begin, length, step):
    final = min(initial, final)
    schedule = schedules.cubic_density(
        final, begin=begin, end=begin + length, initial=initial
    )
    u = min(max((step - begin) / length, 0), 1)
    assert float(schedule(step)) == pytest.approx(
        final + (initial - final) * (1 - u) ** 3, abs=1e-6
    )
    assert float(schedule(step + 1)) <= float(schedule(step))
    # To the last bit at both ends: no weight is pruned early, none too few at the end.
    assert schedule(begin) == np.float32(initial)
    assert schedule(begin + length) == np.float32(final)
    # Also with counts that are unsigned.
    assert schedule(np.uint32(step)) == schedule(step)


def test_cyclic_visits_every_level_and_stays_above_the_least():
    relevant = schedules.cyclic_density((1.0, 0.5, 0.25), least=lambda k: 0.3)
    found = [round(float(relevant(k)), 3) for k in range(6)]
    assert found == [1.0, 0.5, 0.3] * 2


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 2 / 3, 7 / 8])
def test_a_cycle_has_its_dense_turns_evenly_among_the_sparse_ones(share):
    cycle = np.array(schedules.density_cycle(share))
    assert np.mean(cycle == 1) == pytest.approx(share, abs=0.03)
    assert tuple(cycle[cycle < 1]) == schedules.SPARSE_TURNS
    between = np.diff(np.flatnonzero(cycle < 1))
    assert np.ptp(between) <= 1


def test_staircase_has_its_plateaus():
    ends, finals = (40, 60, 100), (0.5, 0.2, 0.1)
    relevant = schedules.staircase_density(finals, ends=ends)
    values = np.array([float(relevant(k)) for k in range(120)])
    assert values[0] == 1
    assert (np.diff(values) <= 1e-6).all()
    for begin, end, final in zip((0, 40, 60), ends, finals, strict=True):
        plateau = values[math.ceil(end - 0.4 * (end - begin)) : end]
        np.testing.assert_allclose(plateau, final, rtol=1e-6)
    np.testing.assert_allclose(values[100:], 0.1, rtol=1e-6)


def test_one_shot_prunes_once():
    density = schedules.one_shot_density(0.25, step=3)
    assert [float(density(jnp.asarray(k))) for k in range(5)] == [1, 1, 1, 0.25, 0.25]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: schedules.cyclic_density(()), "densities must hold at least one"),
        (lambda: schedules.cyclic_density((0.0,)), "densities must be"),
        (lambda: schedules.cubic_density(0.0, begin=0, end=1), "final must be"),
        (lambda: schedules.cubic_density(0.1, begin=5, end=5), "end must be"),
        (
            lambda: schedules.staircase_density((0.1, 0.5), ends=(1, 2)),
            "finals must fall; got (0.1, 0.5)",
        ),
        (
            lambda: schedules.staircase_density((0.5, 0.1), ends=(2, 2)),
            "ends must rise from above 0; got (2, 2)",
        ),
        (
            lambda: schedules.staircase_density((0.5, 0.1), ends=(2,)),
            "one entry for each stage; got 2 and 1",
        ),
        (lambda: schedules.one_shot_density(95, step=1), "density must be a finite"),
        (lambda: schedules.one_shot_density(0.5, step=-1), "step must be a finite"),
    ],
)
def test_bad_arguments_are_named(make, said):
    with refused(said):
        make()
