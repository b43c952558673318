"""Contacts, one by one, and steps of the ant among walls, against C MuJoCo in double precision.

Run as a program, this file measures and prints; the tests run it so, since double precision is a setting of
the process.
"""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys

import gymnasium
import jax
import mujoco
import numpy as np
import pytest
from mujoco import mjx
from mujoco.mjx._src import collision_driver

from ooo_rl.envs.engines.contacts import CONTACTS, exact_contacts

MARGIN = 0.05
CONFIGURATIONS = 400  # per pair of geoms and kind of pose
KINDS = {
    "plane-capsule": ("any", "lying", "upright"),
    "sphere-box": ("face", "edge", "corner", "inside"),
    "capsule-box": (
        "face",
        "edge",
        "corner",
        "inside",
        "tip",
        "nearly parallel",
        "along edge",
        "parallel",
        "tie",
    ),
}
UPSTREAM = {
    "plane-capsule": "upright",
    "sphere-box": "face",
    "capsule-box": "face",
}  # kinds that show MJX's faults
SIZES = {"plane": [0, 0, 1], "sphere": [0.1, 0, 0], "capsule": [0.08, 0.3, 0], "box": [0.2, 0.5, 0.35]}
STEPS = 300


def two_geoms(first: str, second: str, rng) -> mujoco.MjModel:
    """Two free bodies (a plane stays put) of random sizes whose margins add up to `MARGIN`."""
    spec = mujoco.MjSpec()
    for name in (first, second):
        plane = name == "plane"
        body = spec.worldbody if plane else spec.worldbody.add_body()
        if not plane:
            body.add_freejoint()
        geom = body.add_geom(type=getattr(mujoco.mjtGeom, f"mjGEOM_{name.upper()}"), margin=MARGIN / 2)
        geom.size = SIZES[name] if plane else SIZES[name] * rng.uniform(0.5, 2, 3)
        if plane:
            geom.quat, geom.pos = random_quaternion(rng), rng.normal(size=3)
    return spec.compile()


def random_quaternion(rng) -> np.ndarray:
    quaternion = rng.normal(size=4)
    return quaternion / np.linalg.norm(quaternion)


def rotation(quaternion) -> np.ndarray:
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


def rotation_to(z, rng) -> np.ndarray:
    """A rotation [3, 3] whose third column is the unit vector `z` [3]."""
    x = np.cross(rng.normal(size=3), z)
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z], 1)


def capsule_on_plane(kind: str, size: np.ndarray, rng) -> tuple:
    """Position [3] and axis [3] of a capsule whose lower or upper end is near the plane z = 0."""
    axis = rng.normal(size=3) * {"any": [1, 1, 1], "lying": [1, 1, 0], "upright": [0.05, 0.05, 1]}[kind]
    axis /= np.linalg.norm(axis)
    height = size[0] + abs(axis[2]) * size[1] * rng.choice([-1, 1]) + rng.uniform(-size[0], MARGIN)
    return np.array([*rng.uniform(-1, 1, 2), height]), axis


def beside_box(kind: str, radius: float, length: float, size: np.ndarray, rng) -> tuple:
    """Position [3] and axis [3], in the frame of a box, of a capsule (or a sphere: no length), penetrating to
    separated.

    A point of the segment is put near a point of a face, an edge or a corner; the point is an end half of the
    time.
    """
    order, sign = rng.permutation(3), rng.choice([-1.0, 1.0], 3)
    fixed = order[: {"edge": 2, "along edge": 2, "corner": 3}.get(kind, 1)]
    point, out = rng.uniform(-0.95, 0.95, 3) * size, np.zeros(3)
    point[fixed], out[fixed] = (sign * size)[fixed], (sign * rng.uniform(0.2, 1, 3))[fixed]
    out /= np.linalg.norm(out)
    gap = -rng.uniform(0, 2) * radius if kind == "inside" else radius + rng.uniform(-0.7 * radius, MARGIN)
    axis = rng.normal(size=3)
    if kind in ("parallel", "tie"):  # to the face
        axis[fixed] = 0
    elif kind in ("along edge", "nearly parallel"):  # to an axis of the box, to a part in a thousand
        axis = np.eye(3)[order[2]] + 1e-3 * axis
    elif kind == "tip":
        axis = out + 0.1 * axis
    axis /= np.linalg.norm(axis)
    return point + gap * out - rng.choice([-1, 1, *rng.uniform(-1, 1, 2)]) * length * axis, axis


@functools.cache
def mjx_contacts(pair: str, exact: bool):
    """MJX's (distances, positions, frames) of all poses of two geoms, as a function of their sizes [2, 3],
    their positions [n, 2, 3] and their axes [n, 2, 3, 3]: one program for all kinds of poses."""
    mjx_model = mjx.put_model(two_geoms(*pair.split("-"), np.random.default_rng(0)))
    blank = mjx.make_data(mjx_model)

    def contacts(sizes, xpos, xmat):
        data = blank.replace(geom_xpos=xpos, geom_xmat=xmat)
        contact = mjx.collision(mjx_model.replace(geom_size=sizes), data)._impl.contact
        return contact.dist, contact.pos, contact.frame

    program = jax.jit(jax.vmap(contacts, (None, 0, 0)))
    return exact_contacts()(program) if exact else program


def compare_contacts(pair: str, kind: str, exact: bool) -> dict:
    """Largest differences between MJX's contacts and C's, in how many configurations the numbers of contacts
    differ, and what C's contacts were like."""
    rng = np.random.default_rng([list(KINDS).index(pair), KINDS[pair].index(kind)])
    first, second = pair.split("-")
    model = two_geoms(first, second, rng)
    data = mujoco.MjData(model)
    wanted, poses = [], []
    for _ in range(CONFIGURATIONS):
        if first == "plane":
            position, axis = capsule_on_plane(kind, model.geom_size[1], rng)
            origin, turn = model.geom_pos[0], rotation(model.geom_quat[0])
        else:
            length = model.geom_size[0][1] if first == "capsule" else 0.0
            position, axis = beside_box(kind, model.geom_size[0][0], length, model.geom_size[1], rng)
            origin = rng.normal(size=3)
            quaternion = [1, 0, 0, 0] if kind == "parallel" else random_quaternion(rng)
            data.qpos[7:], turn = [*origin, *quaternion], rotation(quaternion)
        data.qpos[:3] = origin + turn @ position
        mujoco.mju_mat2Quat(data.qpos[3:7], (turn @ rotation_to(axis, rng)).ravel())
        mujoco.mj_kinematics(model, data)
        mujoco.mj_collision(model, data)
        wanted.append([(c.dist, c.pos.copy(), c.frame.reshape(3, 3).copy()) for c in data.contact])
        poses.append((data.geom_xpos.copy(), data.geom_xmat.reshape(-1, 3, 3).copy()))

    got = jax.tree.map(np.asarray, mjx_contacts(pair, exact)(model.geom_size, *map(np.stack, zip(*poses))))
    errors, miscounted = [], 0
    for expected, *result in zip(wanted, *got):
        found = [contact for contact in zip(*result) if contact[0] <= MARGIN]
        miscounted += len(found) != len(expected)
        # Contacts may come in either order; where one is missing, those that are there must still be right.
        short, long = sorted((found, expected), key=len)
        options = (
            [[np.abs(a - b).max() for a, b in zip(s, w)] for s, w in zip(short, o)]
            for o in itertools.permutations(long, len(short))
        )
        errors += min(options, key=lambda option: sum(map(sum, option)))
    counts = [len(contacts) for contacts in wanted]
    return {
        "error": dict(zip(("dist", "pos", "frame"), np.max(errors, 0).tolist())),
        "miscounted": miscounted,
        "touching": sum(n > 0 for n in counts),
        "two": sum(n == 2 for n in counts),
        "separated": sum(c[0] > 0 for contacts in wanted for c in contacts),
        "penetrating": sum(c[0] < 0 for contacts in wanted for c in contacts),
    }


def ant_among_walls() -> mujoco.MjModel:
    """Gymnasium's ant in a cell of four wall blocks, with Euler steps, which compile in a fraction of the
    time."""
    spec = mujoco.MjSpec.from_file(
        str(pathlib.Path(gymnasium.__file__).parent / "envs/mujoco/assets/ant.xml")
    )
    for x, y in ((1.9, 0), (-1.9, 0), (0, 1.9), (0, -1.9)):
        spec.worldbody.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX, pos=[x, y, 0.5], size=[1, 1, 0.5], contype=1, conaffinity=1
        )
    model = spec.compile()
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    model.opt.tolerance = 0  # else the last iteration, taken or not, is the error
    model.opt.iterations, model.opt.ls_iterations = 20, 20
    return model


def compare_steps() -> dict:
    """Largest errors of single steps, each from C's own state, and what the walls make of these steps."""
    model = ant_among_walls()
    data, unhindered, rng = mujoco.MjData(model), ant_among_walls(), np.random.default_rng(0)
    walls = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    unhindered.geom_contype[walls] = unhindered.geom_conaffinity[walls] = 0
    free = mujoco.MjData(unhindered)
    before, after, through_walls, at_wall = [], [], [], []
    for k in range(STEPS):
        if k % 50 == 0:
            mujoco.mj_resetData(model, data)
            data.qpos[2] = 0.5
            data.qpos[3:7] += 0.3 * rng.normal(size=4)
            data.qpos[7:] += rng.uniform(-0.1, 0.1, 8)
            data.qvel[:] = rng.normal(size=14) * [3, 3, *[1] * 12]
        data.ctrl[:] = rng.uniform(-1, 1, 8)
        before.append([x.copy() for x in (data.qpos, data.qvel, data.qacc_warmstart, data.ctrl)])
        free.qpos[:], free.qvel[:], free.qacc_warmstart[:], free.ctrl[:] = before[-1]
        for own_model, own_data, kept in ((model, data, after), (unhindered, free, through_walls)):
            mujoco.mj_step(own_model, own_data)
            kept.append(np.concatenate([own_data.qpos, own_data.qvel]))
        at_wall.append(bool(data.ncon) and bool(walls[data.contact.geom].any()))

    mjx_model = mjx.put_model(model)
    blank = mjx.make_data(mjx_model)

    def step(state):
        qpos, qvel, warm, ctrl = state
        data = mjx.step(mjx_model, blank.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warm, ctrl=ctrl))
        return jax.numpy.concatenate([data.qpos, data.qvel])

    states = [np.stack(part) for part in zip(*before)]
    got = exact_contacts()(jax.jit(lambda states: jax.lax.map(step, states)))(states)
    error, apart = (np.abs(np.stack(x) - np.stack(after)).max(1) for x in (got, through_walls))
    return {"max": float(error.max()), "at_wall": sum(at_wall), "pushed_by_wall": int((apart > 1e-3).sum())}


def measure() -> dict:
    exact = {f"{pair} {kind}": compare_contacts(pair, kind, True) for pair in KINDS for kind in KINDS[pair]}
    upstream = {f"{pair} upstream": compare_contacts(pair, kind, False) for pair, kind in UPSTREAM.items()}
    return exact | upstream | {"steps": compare_steps()}


@pytest.fixture(scope="module")
def measured():
    environment = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(("pair", "kind"), [(pair, kind) for pair, kinds in KINDS.items() for kind in kinds])
def test_contacts_are_those_of_c(measured, pair, kind):
    report = measured[f"{pair} {kind}"]
    assert max(report["error"].values()) < 1e-9, report
    # Parallel to a face of a turned box, rounding decides in C if there is a second contact.
    assert report["miscounted"] <= (0.05 * CONFIGURATIONS if kind == "tie" else 0), report
    assert report["touching"] > 0.5 * CONFIGURATIONS and report["penetrating"] > 0.1 * CONFIGURATIONS, report
    assert kind == "inside" or report["separated"] > 0.1 * CONFIGURATIONS, report
    assert pair != "capsule-box" or report["two"] > 0, report


@pytest.mark.parametrize("pair", KINDS)
def test_upstream_still_differs(measured, pair):
    report = measured[f"{pair} upstream"]
    assert report["miscounted"] > 0 or max(report["error"].values()) > 1e-3, (
        f"{pair}: upstream has been mended: drop ours ({report})"
    )


def test_steps_of_an_ant_among_walls_are_those_of_c(measured):
    steps = measured["steps"]
    assert steps["max"] < 1e-9, steps
    assert steps["at_wall"] > 0.2 * STEPS and steps["pushed_by_wall"] > 0.1 * STEPS, steps


def test_table_is_ours_inside_and_theirs_outside():
    table = collision_driver._COLLISION_FUNC
    theirs = {pair: table.get(pair) for pair in CONTACTS}

    def ours():
        return all(table.get(pair) is function for pair, function in CONTACTS.items())

    counts = {
        "-".join(kind.name for kind in pair).lower(): (f and f.ncon, CONTACTS[pair].ncon)
        for pair, f in theirs.items()
    }
    differing = {name for name, (upstream, own) in counts.items() if upstream != own}
    assert differing == {"capsule-cylinder", "cylinder-box"}, counts
    assert not ours()
    outer, inner = exact_contacts(), exact_contacts()
    with outer:
        inner.__enter__()
        assert ours()
    assert ours(), "the inner one is still open"
    with pytest.raises(KeyError), exact_contacts():
        raise KeyError
    assert ours()
    inner.__exit__(None, None, None)
    assert {pair: table.get(pair) for pair in CONTACTS} == theirs
    assert exact_contacts()(ours)() and not ours()


if __name__ == "__main__":
    print(json.dumps(measure()))
