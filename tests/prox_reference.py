"""Proximal operators and penalties in plain NumPy, in float64, one group at a time."""

import numpy as np


def soft(x, lam):
    return np.sign(x) * np.maximum(np.abs(x) - lam, 0)


def block(x, d, lam, bend=0.0):
    """argmin_z 1/2 sum_i d_i (z_i - x_i)^2 + lam ||z|| - bend ||z||^2 / 2."""
    if np.linalg.norm(d * x) <= lam:
        return np.zeros_like(x)
    if lam == 0:
        return x

    def excess(theta):
        return np.sum((d * x / ((d - bend) * theta + lam)) ** 2) - 1

    low, high = 0.0, 1.0
    while excess(high) > 0:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return d * low * x / ((d - bend) * low + lam)


def block_mcp(x, d, lam, gamma, eta):
    """The same for eta p(||z||), p MCP with lam and gamma."""
    return x if np.linalg.norm(x) > gamma * lam else block(x, d, eta * lam, eta / gamma)


def mcp(u, lam, gamma):
    return lam * u - u**2 / (2 * gamma) if u <= gamma * lam else gamma * lam**2 / 2


def k_support(x, k):
    """The norm by sorted magnitudes: Argyriou, Foygel, Srebro (2012), prop. 2.1."""
    a = np.sort(np.abs(x).ravel())[::-1]
    padded = np.concatenate([[np.inf], a])
    for r in range(k):
        rest = padded[k - r :].sum()
        if padded[k - r - 1] > rest / (r + 1) * (1 + 1e-13) or r == k - 1:
            break
    return np.sqrt(np.sum(a[: k - r - 1] ** 2) + rest**2 / (r + 1))


def by_rows(function, x, *others):
    """A function of one group, on every row of arrays [groups, entries]."""
    rows = zip(x, *(np.broadcast_to(other, x.shape) for other in others), strict=True)
    return np.stack([function(*row) for row in rows])
