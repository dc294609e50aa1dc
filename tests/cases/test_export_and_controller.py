"""Hostile files, group MCP near the convex limit, the controller's count of changes."""

import json
import zipfile

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import export
from prunadag_optax.methods import bregman
from prunadag_optax.methods.penalties import operators, regularisers


def test_a_bit_that_says_encrypted(tmp_path):
    file = tmp_path / "m"
    export.save_sparse({"a": np.eye(20, dtype=np.float32)}, file)
    content = bytearray(file.read_bytes())
    content[content.find(b"PK\x01\x02") + 8] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="m is damaged, or no file for load_sparse"):
        export.load_sparse(file)


@pytest.mark.parametrize(
    ("shape", "mask", "values"),
    [
        ([10**12], [1, 0, 1], [1.0, 1.0]),
        ([10**30], [1, 0, 1], [1.0, 1.0]),
        ([100], [1, 0, 1], [1.0, 1.0]),
        ([8], [1] * 8, [7.0]),
        ([3], [1, 0, 1], [1.0, 2.0]),  # as it should be
    ],
    ids=["10^12", "10^30", "mask too short", "one value for eight", "right"],
)
def test_sizes_that_do_not_fit(tmp_path, shape, mask, values):
    file = tmp_path / "m"
    header = {"format": 2, "tree": ["dict", ["w"], "w"]}
    header["leaves"] = [["w", "float32", shape]]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps(header))
        archive.writestr("0.mask", np.packbits(mask).tobytes())
        archive.writestr("0.values", np.float32(values).tobytes())
    if shape == [3]:
        np.testing.assert_array_equal(export.load_sparse(file)["w"], [1, 0, 2])
        return
    with pytest.raises(ValueError, match="m is damaged, or no file for load_sparse"):
        export.load_sparse(file)


def test_group_mcp_between_1_and_1_01():
    d, eta, lam = 1.0, 0.3, 1.0
    gamma = 1.005 * eta / d
    x = 0.5 * (eta * lam / d + gamma * lam)
    exact = (d * x - eta * lam) / (d - eta / gamma)
    assert 0 < exact < x
    for metric in (None, jnp.array([d])):
        z = operators.prox_group_mcp(
            jnp.array([x]), lam, gamma, eta, metric=metric, axis=(), reweight=False
        )
        np.testing.assert_allclose(z, [exact], rtol=1e-4)


def test_below_the_target_and_exactly_on_it_is_no_change_of_sign():
    controller = bregman.Controller(target=0.9, every=1, decay=0.95)
    tx = bregman.linearised_bregman(
        optax.identity(),
        regularisers.l1(1.0),
        strength=jnp.float32(0.5),
        adaptive=controller,
    )
    w = jnp.ones(10, jnp.float32)
    state = tx.init(w)
    for t in range(8):
        zero = np.arange(10) < (8 if t % 2 == 0 else 9)
        v = jnp.asarray(np.where(zero, 0.0, 1e5), jnp.float32)
        updates, state = tx.update(v - state.dual, state, w)
        w = optax.apply_updates(w, updates)
        assert int(jnp.sum(w == 0)) == zero.sum()
        assert int(state.controller.changes) == 0
