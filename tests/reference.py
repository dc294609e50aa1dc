"""Algorithm 2.1 in plain NumPy, for the tests to compare with and readers to check.

Written from the article and its specification, one index set and one equation at a
time, in float64, sharing no code with the package. Equation numbers are those of
Porcelli, Seraghiti, Toint, Computational Optimization and Applications 93 (2026)
85-119. What the package adds to the article (learning rate, decrease schedule,
relevance, scope, momentum) is marked "added"; at the defaults of `Settings` none of
it does anything.
"""

import dataclasses
import itertools
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Settings:
    relevant: float | int | Callable[[int], Any] = 0.1  # T/n, T, or a schedule of them
    variant: str = "v3"
    zeta: float = 0.01
    learning_rate: float | Callable[[int], float] = 1.0  # added: eta_k
    decrease: float | Callable[[int], float] | None = None  # added: d_k, else 1/(k+1)
    relevance: str = "gradient"  # added: or "magnitude", "taylor"
    scope: str = "global"  # added: or "leaf"
    momentum: float | None = None  # added
    accumulation: str = "optimisable"  # added: or "all", so w^O is not taken back


@dataclasses.dataclass(frozen=True)
class State:
    """What iteration k starts from; one array a leaf."""

    k: int
    w_O: list[np.ndarray]  # w^O_{k-1}  # noqa: N815
    w_D: list[np.ndarray]  # w^D_{k-1}  # noqa: N815
    m: list[np.ndarray]  # added: the average of gradients before bias correction


@dataclasses.dataclass(frozen=True)
class Info:
    """What iteration k did; one array a leaf, sets as arrays of bool."""

    R: list[np.ndarray]  # relevant
    A: list[np.ndarray]  # acceptable
    O: list[np.ndarray]  # optimisable  # noqa: E741
    D: list[np.ndarray]  # decreasable
    S: list[np.ndarray]  # outside R, parameter and gradient of the same sign
    a: list[np.ndarray]
    b: list[np.ndarray]  # NaN for relevant_only, which has none
    score: list[np.ndarray]  # what R_k is chosen by
    threshold: list[np.ndarray]  # the T-th largest score, repeated
    direction: list[np.ndarray]  # g_k, or its average with momentum
    weight: list[np.ndarray]  # w^O_k by (9), before step 5 takes it back on D_k
    step: list[np.ndarray]  # s_k
    radius: list[np.ndarray]  # |s^L_k| on D_k, NaN on O_k


def initial_state(x: list[np.ndarray], settings: Settings) -> State:
    zeta = settings.zeta
    return State(
        k=0,
        w_O=[np.full(leaf.shape, zeta) for leaf in x],
        w_D=[np.full(leaf.shape, zeta) for leaf in x],
        m=[np.zeros(leaf.shape) for leaf in x],
    )


def step(
    x: list[np.ndarray], g: list[np.ndarray], state: State, settings: Settings
) -> tuple[list[np.ndarray], State, Info]:
    """One iteration of Algorithm 2.1: (x_k, g_k, state) -> x_{k+1}, state, info."""
    columns = [x, g, state.w_O, state.w_D, state.m]
    columns = [[np.asarray(leaf, np.float64) for leaf in column] for column in columns]
    # In the article all parameters are one vector; in scope "leaf" (added) each leaf
    # is. Either way the results, laid end to end, are in the order of the leaves.
    if settings.scope == "global":
        vectors = [[np.concatenate([leaf.ravel() for leaf in c]) for c in columns]]
    else:
        vectors = [[leaf.ravel() for leaf in row] for row in zip(*columns, strict=True)]
    results = [_step_vector(*vector, state.k, settings) for vector in vectors]

    shapes = [np.shape(leaf) for leaf in x]
    ends = np.cumsum([np.size(leaf) for leaf in x]).tolist()
    places = [slice(*pair) for pair in itertools.pairwise([0, *ends])]

    def leaves(name: str) -> list[np.ndarray]:
        flat = np.concatenate([result[name] for result in results])
        return [flat[p].reshape(shape) for p, shape in zip(places, shapes, strict=True)]

    next_state = State(state.k + 1, leaves("w_O"), leaves("w_D"), leaves("m"))
    info = Info(*(leaves(field.name) for field in dataclasses.fields(Info)))
    return leaves("x_next"), next_state, info


def at(value: Any, k: int) -> Any:
    """A number, or the value of a schedule at iteration k."""
    return value(k) if callable(value) else value


def target(relevant: float | int, n: int) -> int:
    """T among n components, from a count or from a fraction."""
    if isinstance(relevant, numbers.Integral):
        return min(int(relevant), n)
    return max(1, round(relevant * n))


def decrease_at(settings: Settings, k: int) -> float:
    return 1 / (k + 1) if settings.decrease is None else at(settings.decrease, k)


def _step_vector(x, g, w_O, w_D, m, k: int, settings: Settings) -> dict[str, Any]:
    n = x.size
    everything = np.arange(n)
    eta = at(settings.learning_rate, k)
    d = decrease_at(settings, k)

    # Added: with momentum a bias-corrected average takes the gradient's place in the
    # classification and in both steps, though not in w^O.
    v = g
    if settings.momentum is not None:
        beta = settings.momentum
        m = beta * m + (1 - beta) * g
        v = m / (1 - beta ** (k + 1))

    # Step 1. R_k: the T largest |g_i| (added: or other scores), ties included.
    T = target(at(settings.relevant, k), n)
    score = {
        "gradient": np.abs(v),
        "magnitude": np.abs(x),
        "taylor": np.abs(v * x),
    }[settings.relevance]
    threshold = np.sort(score)[n - T]
    R = np.flatnonzero(score >= threshold)

    # Step 2, equation (9).
    weight = np.sqrt(w_O**2 + g**2)

    # Step 3, Table 1: the bounds a and b of each variant.
    not_R = np.setdiff1d(everything, R)
    S = not_R[np.sign(x[not_R]) == np.sign(v[not_R])]
    norm_g_R = np.sqrt(np.sum(v[R] ** 2))
    norm_x_S = np.sqrt(np.sum(x[S] ** 2))
    if settings.variant in ("v2", "v4"):
        a = np.abs(x) * d
    elif norm_x_S > 0:
        a = np.abs(x) * d * norm_g_R / norm_x_S
    else:
        a = np.zeros(n)
    b = {
        "v1": np.full(n, np.inf),
        "v2": np.full(n, np.inf),
        "v3": np.abs(x),
        "v4": np.abs(x),
        "relevant_only": np.full(n, np.nan),
    }[settings.variant]

    # Step 3, equations (6) and (7): A_k, O_k and D_k.
    length = np.abs(eta * v / weight)
    if settings.variant == "relevant_only":
        A = np.array([], int)
    else:
        A = S[(a[S] <= length[S]) & (length[S] <= b[S])]
    O = np.union1d(R, A)  # noqa: E741
    D = np.setdiff1d(everything, O)

    # Step 4, equation (10).
    s = np.zeros(n)
    s[O] = -eta * v[O] / weight[O]

    # Step 5, equations (12), (11) and (17); w^O is taken back on D_k (16), and w^D
    # stays as it was on O_k (15).
    w_O_next = weight.copy()
    if settings.accumulation == "optimisable":
        w_O_next[D] = w_O[D]
    w_D_next = w_D.copy()
    w_D_next[D] = np.sqrt(w_D[D] ** 2 + x[D] ** 2)
    radius = np.full(n, np.nan)
    radius[D] = np.abs(x[D]) / w_D_next[D]
    shrinking = D[np.sign(x[D]) == np.sign(v[D])]
    s[shrinking] = -np.sign(x[shrinking]) * np.minimum(a[shrinking], radius[shrinking])

    def indicator(indices):
        members = np.zeros(n, bool)
        members[indices] = True
        return members

    # Step 6.
    return {
        "x_next": x + s,
        "w_O": w_O_next,
        "w_D": w_D_next,
        "m": m,
        "R": indicator(R),
        "A": indicator(A),
        "O": indicator(O),
        "D": indicator(D),
        "S": indicator(S),
        "a": a,
        "b": b,
        "score": score,
        "threshold": np.full(n, threshold),
        "direction": v,
        "weight": weight,
        "step": s,
        "radius": radius,
    }
