"""The no-slip solver: what friction holds stays, as in C MuJoCo with its own."""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from envs import noslip
from envs.contacts import exact_contacts

XML = """<mujoco><option noslip_iterations="{}" noslip_tolerance="0" gravity="2 0 -9.81"/><worldbody>
<geom type="plane" size="1 1 1"/>
<body pos="0 0 0.049"><joint type="slide" axis="1 0 0"/><joint type="slide" axis="0 1 0"/><joint type="slide" axis="0 0 1"/>
<geom type="sphere" size="0.05" density="300" friction="0.6 0.01 0.001"/></body>
<body pos="0 1 0.3"><joint type="slide" axis="1 0 0" frictionloss="2.5" range="-0.01 0.09" limited="true" margin="0.01"/>
<geom type="capsule" size="0.02 0.05" density="1000" contype="0" conaffinity="0"/></body></worldbody></mujoco>"""


def test_a_thing_held_by_friction_stays():
    """A ball on a slope that friction can hold, and a nail pressed back by the end of its way: 2 s of both, beside C."""
    model = mujoco.MjModel.from_xml_string(XML.format(500))
    ends = {}
    for name, iterations in (("with", 500), ("without", 0)):
        model.opt.noslip_iterations = iterations
        data = mujoco.MjData(model)
        data.qpos[:] = [0, 0, 0, 0.085]
        for _ in range(1000):
            mujoco.mj_step(model, data)
        ends[name] = data.qpos.copy()
    assert abs(ends["without"][0]) > 0.005 > 10 * abs(ends["with"][0])
    with exact_contacts():
        device, start = mjx.put_model(model), mjx.make_data(model)
        run = jax.jit(lambda d: jax.lax.scan(lambda d, _: (noslip.step(device, d), None), d, None, 1000)[0])
        ours = np.asarray(run(start.replace(qpos=jnp.array([0, 0, 0, 0.085]))).qpos)
    np.testing.assert_allclose(ours, ends["with"], atol=2e-4)


def test_beyond_its_bound_friction_slides():
    model = mujoco.MjModel.from_xml_string(XML.format(500).replace("2 0 -9.81", "20 0 -9.81"))
    data = mujoco.MjData(model)
    for _ in range(200):
        mujoco.mj_step(model, data)
    with exact_contacts():
        device, start = mjx.put_model(model), mjx.make_data(model)
        run = jax.jit(lambda d: jax.lax.scan(lambda d, _: (noslip.step(device, d), None), d, None, 200)[0])
        ours = np.asarray(run(start).qpos)
    assert data.qpos[0] > 0.1
    np.testing.assert_allclose(ours[:3], data.qpos[:3], atol=5e-3)
