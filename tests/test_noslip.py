"""The no-slip solver: what friction holds stays, as in C MuJoCo with its own."""

import pathlib

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx

from ooo_rl.envs import adroit
from ooo_rl.envs.engines import noslip
from ooo_rl.envs.engines.contacts import exact_contacts

XML = """<mujoco><option noslip_iterations="{}" noslip_tolerance="0" gravity="{} 0 -9.81"/><worldbody>
<geom type="plane" size="1 1 1"/>
<body pos="0 0 0.049">
<joint type="slide" axis="1 0 0"/><joint type="slide" axis="0 1 0"/><joint type="slide" axis="0 0 1"/>
<geom type="sphere" size="0.05" density="300" friction="0.6 0.01 0.001"/></body>
<body pos="0 1 0.3">
<joint type="slide" axis="1 0 0" frictionloss="2.5" range="-0.01 0.09" limited="true" margin="0.01"/>
<geom type="capsule" size="0.02 0.05" density="1000" contype="0" conaffinity="0"/></body>
</worldbody></mujoco>"""


def played_in_c(pull, qpos, steps, noslip_iterations=500):
    """The positions [4] after `steps`, where gravity pulls by `pull` along x."""
    model = mujoco.MjModel.from_xml_string(XML.format(noslip_iterations, pull))
    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    for _ in range(steps):
        mujoco.mj_step(model, data)
    return data.qpos.copy()


@pytest.fixture(scope="module")
def played():
    """The same by MJX, with our solver: one program for every pull, start and number of steps."""
    model = mujoco.MjModel.from_xml_string(XML.format(500, 0))
    with exact_contacts():
        device, start = mjx.put_model(model), mjx.make_data(model)

    @jax.jit
    def run(pull, qpos, steps):
        world = device.replace(opt=device.opt.replace(gravity=device.opt.gravity.at[0].set(pull)))
        begun = start.replace(qpos=qpos)
        return jax.lax.fori_loop(0, steps, lambda _, data: noslip.step(world, data), begun).qpos

    return exact_contacts()(lambda pull, qpos, steps: np.asarray(run(pull, jnp.float32(qpos), steps)))


def test_a_thing_held_by_friction_stays(played):
    """A ball on a slope that friction can hold, and a nail pressed back by the end of its way: 2 s of both."""
    case = 2.0, [0, 0, 0, 0.085], 1000
    held, creeping = played_in_c(*case), played_in_c(*case, noslip_iterations=0)
    assert abs(creeping[0]) > 0.005 > 10 * abs(held[0])
    np.testing.assert_allclose(played(*case), held, atol=2e-4)


def test_beyond_its_bound_friction_slides(played):
    case = 20.0, np.zeros(4), 200
    slid = played_in_c(*case)
    assert slid[0] > 0.1
    np.testing.assert_allclose(played(*case)[:3], slid[:3], atol=5e-3)


def test_a_nail_stays_in_while_a_hand_holds_the_hammer():
    """Accelerations in four states of an expert's episode, where a dozen contacts make the solve a hard one.

    The nail pushes back with 2.8 m/s^2 and friction must take all of it. With 10 iterations in the place of
    20 it does not (0.5 to 1.6 m/s^2 are left), although nothing shows in the smaller models above.
    """
    model = adroit.load_model("adroit_hammer.xml", "mjx")
    data, nail = mujoco.MjData(model), model.jnt_dofadr[model.joint("nail_dir").id]
    with np.load(pathlib.Path(__file__).parent / "hammer_held.npz") as file:
        states = list(zip(file["qpos"], file["qvel"], file["ctrl"]))
    accelerations, firsts = {0: [], 500: []}, []
    with exact_contacts():
        device = mjx.put_model(model)
        for iterations in (500, 0):
            model.opt.noslip_iterations, model.opt.noslip_tolerance = iterations, 0.0
            for state in states:
                mujoco.mj_resetData(model, data)
                data.qpos[:], data.qvel[:], data.ctrl[:] = state
                mujoco.mj_forward(model, data)
                accelerations[iterations].append(data.qacc.copy())
                if not iterations:
                    firsts.append(mjx.put_data(model, data))  # what MJX's own solver hands on
    with jax.default_matmul_precision("highest"):
        hold = jax.jit(jax.vmap(lambda d: noslip.hold(device, d).qacc))
        ours = np.asarray(hold(jax.tree.map(lambda *x: jnp.stack(x), *firsts)))
    wanted, without = np.array(accelerations[500]), np.array(accelerations[0])
    assert (np.abs(without - wanted)[:, nail] > 2).all() and (np.abs(without - wanted).max(1) > 10).all()
    np.testing.assert_allclose(ours[:, nail], wanted[:, nail], atol=0.01)
    assert (np.abs(ours - wanted).max(1) < 0.25 * np.abs(without - wanted).max(1)).all()
