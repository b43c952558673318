"""MJX's solver with an early end: the same bits as without, fewer operations, nothing of a GPU's libraries."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx
from mujoco.mjx._src import forward, smooth, solver

from ooo_rl import envs
from ooo_rl.envs.engines import cholesky
from ooo_rl.envs.engines.contacts import exact_contacts
from ooo_rl.envs.engines.solver import lean_solver, line_search

WORLDS = 32
# A ball and a chain on the floor, with limits and friction in joints, and an equality. The bodies of the
# benchmark have no elliptic cones, but MJX's line search has more terms for them. It has a low bound here.
XML = """<mujoco><option cone="elliptic" ls_iterations="3"/>
<default><geom conaffinity="0"/></default>
<worldbody><geom type="plane" size="5 5 1" conaffinity="1"/>
<body pos="0 0 0.1"><freejoint/><geom type="sphere" size="0.1"/></body>
<body pos="1 0 0.12"><joint axis="0 1 0" frictionloss="0.3"/><geom type="capsule" size="0.05 0.2" euler="0 90 0"/>
<body pos="0.3 0 0"><joint axis="0 1 0" range="-20 20"/><geom type="capsule" size="0.05 0.1" euler="0 90 0"/>
<body pos="0.2 0 0"><joint axis="0 1 0" name="end"/><geom type="sphere" size="0.06"/></body></body></body>
</worldbody><equality><joint joint1="end" polycoef="0.1 0 0 0 0"/></equality></mujoco>"""


def load(name: str) -> mujoco.MjModel:
    """The model of an environment, or `XML` for "elliptic"."""
    model = mujoco.MjModel.from_xml_string(XML) if name == "elliptic" else envs.make(name).model
    # What begins a solve takes long to compile.
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_WARMSTART
    return model


def before_solving(model: mujoco.MjModel) -> tuple[mjx.Model, mjx.Data]:
    """The model on the device, and the data [WORLDS] of random states as MJX's solver gets them, from C."""
    rng, data, worlds = np.random.default_rng(0), mujoco.MjData(model), []
    with exact_contacts():
        for _ in range(WORLDS):
            mujoco.mj_resetData(model, data)
            mujoco.mj_integratePos(model, data.qpos, rng.normal(size=model.nv) * 0.2, 1.0)
            data.qvel[:] = rng.normal(size=model.nv) * rng.choice([0.1, 1, 10])
            mujoco.mj_forward(model, data)
            worlds.append(mjx.put_data(model, data))
        return mjx.put_model(model), jax.tree.map(lambda *x: jnp.stack(x), *worlds)


def solved(device: mjx.Model, data: mjx.Data, context=lean_solver) -> tuple:
    """Accelerations and forces [WORLDS, .] of MJX's solver, traced inside `context()`."""

    def solve(data):
        with context():
            data = solver.solve(device, data)
        return data.qacc, data.qfrc_constraint, data._impl.efc_force

    usual = {"xla_backend_optimization_level": 3}  # other levels may round otherwise here and there
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(solve), compiler_options=usual)(data))


@functools.cache
def case(name: str, bits: int) -> tuple:
    """The model on the device, the data [WORLDS] before the solver, and what MJX's own makes of them."""
    with jax.enable_x64(bits == 64):
        device, data = before_solving(load(name))
        return device, data, solved(device, data, contextlib.nullcontext)


@pytest.mark.parametrize(("name", "bits"), [("hopper", 32), ("elliptic", 64)])
def test_the_same_bits_in_every_world(name, bits):
    device, data, own = case(name, bits)
    assert own[0].dtype == f"float{bits}" and len(np.unique(own[0], axis=0)) == WORLDS
    assert (np.abs(own[2]) > 0).any(1).mean() > 0.8  # there are forces
    with jax.enable_x64(bits == 64):
        jax.tree.map(np.testing.assert_array_equal, solved(device, data), own)


def test_on_a_gpu_rounding_alone_changes(monkeypatch):
    monkeypatch.setattr(cholesky, "by_backend", lambda *operands, gpu, other: gpu(*operands))
    device, data, own = case("elliptic", 64)
    with jax.enable_x64(True):
        ours = solved(device, data)
    for one, other in zip(ours, own):
        far = np.abs(one - other).max(1) / np.abs(other).max()
        # After a few iterations of its line search a world may stand on the other side of a branch, on some processors.
        assert np.sort(far)[-2] < 1e-6 and far.max() < 1e-3
    assert (ours[0] != own[0]).any()


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_a_loop_ends_where_that_of_mjx_stands_still(on_a_gpu, monkeypatch):
    """From 0 to 50 iterations per world; a flag and a count go through the packed array, too."""
    monkeypatch.setattr(
        cholesky, "by_backend", lambda *operands, gpu, other: (gpu if on_a_gpu else other)(*operands)
    )

    def run(loop, limit):
        cond = lambda c: c["on"] & (c["turns"] < jnp.minimum(limit, 50))  # noqa: E731
        body = lambda c: {"on": c["x"] < 2e6, "x": 1.3 * c["x"] + 0.1, "turns": c["turns"] + 1}  # noqa: E731
        return loop(cond, body, {"on": jnp.array(True), "x": jnp.float32(limit), "turns": 0}, 50)

    limits = jnp.arange(60)
    own, ours = (
        jax.jit(jax.vmap(functools.partial(run, loop)))(limits)
        for loop in (solver._while_loop_scan, line_search)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, own)
    assert ours["turns"].dtype == own["turns"].dtype and ours["on"].dtype == bool
    assert {0, 1, 2, 3, 11} < {*own["turns"].tolist()} and not own["on"].all()


@pytest.mark.parametrize("n", [1, 6, 14])
def test_a_factor_without_a_library_is_as_exact_as_lapack(n):
    """Errors of x in a @ x = b, for matrices whose eigenvalues span five decades."""
    rng = np.random.default_rng(n)
    turns = np.linalg.qr(rng.normal(size=(30, n, n)))[0]
    a = np.float32(turns * 10 ** rng.uniform(-2, 3, (30, 1, n)) @ turns.swapaxes(1, 2))
    a, b = (a + a.swapaxes(1, 2)) / 2, np.float32(rng.normal(size=(30, n)))
    exact = np.linalg.solve(np.float64(a), np.float64(b)[..., None])[..., 0]

    def both(a, b):
        upper = jnp.where(jnp.tri(n, k=-1) > 0, jnp.nan, a)  # what is below the diagonal is not read
        lapack = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(upper), b)
        return cholesky.solve_by_inverse(cholesky.inverse_factor(upper), b), lapack

    ours, lapack = (
        np.median(np.abs(x - exact).max(1) / np.abs(exact).max(1)) for x in jax.jit(jax.vmap(both))(a, b)
    )
    assert ours < 2 * lapack + 1e-6, (ours, lapack)
    assert np.isnan(jax.jit(cholesky.inverse_factor)(-jnp.eye(n))).any()


def test_what_is_compiled_for_a_gpu_leaves_it_to_no_library_and_has_no_loop_of_a_fixed_length():
    """Fails if MJX calls its functions by other names, so that ours would be there for nothing."""
    device, data, _ = case("elliptic", 64)

    def program(context):
        def forces(data):
            with context():
                return solver.solve(device, smooth.factor_m(device, data)).efc_force

        traced = jax.jit(jax.vmap(forces)).trace(data)
        return str(traced.jaxpr), traced.lower(lowering_platforms=("cuda",)).as_text()

    with jax.enable_x64(True):
        (own_loops, own), (loops, ours) = program(contextlib.nullcontext), program(lean_solver)
    assert "length=3\n" in own_loops and "length=3\n" not in loops and loops.count(" while[") == 2
    assert "cusolver" in own and "triangular_solve" in own, "MJX has mended its own: drop ours"
    assert "cusolver" not in ours and "triangular_solve" not in ours


def test_mjx_is_its_own_again_outside():
    names = ("jax", "_while_loop_scan")
    own = [vars(module).get(name) for module in (solver, smooth, forward) for name in names]
    with pytest.raises(KeyError), lean_solver():
        assert solver.jax is not jax and solver.jax.numpy is jax.numpy
        raise KeyError
    assert [vars(module).get(name) for module in (solver, smooth, forward) for name in names] == own
    assert solver.jax is jax and "_while_loop_scan" not in vars(smooth)
