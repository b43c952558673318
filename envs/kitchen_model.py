"""The models of the Franka Kitchen: gymnasium-robotics' XML file, and what D4RL or MJX need changed in it.

`model` chooses the model to simulate, on every engine that supports it:

=======  ==================================================================================================
shipped  the XML file without changes
d4rl     as D4RL's data were recorded: the robot's pedestal does not collide, and contacts have the margins
         that they had before MuJoCo 3.5, when the margin of a pair was the larger one of its two geoms. It is
         their sum since. So each margin is half of what the file says. Contacts of the arm's links, which
         have no margin, with other things lose half of their 1 mm; a margin for the links would make the
         first two of them touch
mjx      the changes that MJX needs: see `for_mjx`
auto     mjx on MJX's engines, d4rl on the C engine
=======  ==================================================================================================
"""

import mujoco
import numpy as np

from ooo_rl.envs import robotics

MODELS = ("auto", "shipped", "d4rl", "mjx")
FILE = "kitchen_franka/kitchen_assets/kitchen_env_model.xml"
MARGIN = 0.001  # contact margin of a pair, in metres

PLANE, SPHERE, CAPSULE, CYLINDER, BOX, MESH = (
    getattr(mujoco.mjtGeom, f"mjGEOM_{name}")
    for name in ("PLANE", "SPHERE", "CAPSULE", "CYLINDER", "BOX", "MESH")
)


def load_model(kind: str) -> mujoco.MjModel:
    """Loads the model `kind`, which is any of `MODELS` except "auto".

    Raises ValueError if gymnasium-robotics is not installed, or if MuJoCo cannot load its file.
    """
    model = robotics.load_model(FILE, for_mjx if kind == "mjx" else None)
    if kind == "d4rl":
        model.geom_margin[:] = np.where(model.geom_margin > 0, MARGIN / 2, 0)
        pedestal = (model.geom_type == CYLINDER) & (model.geom_bodyid == model.body("panda0_link0").parentid)
        model.geom_contype[pedestal] = model.geom_conaffinity[pedestal] = 0
    return model


# Collision bits: the groups of geoms that may touch. FINGERTIPS are FINGERS that also touch what is fixed.
FINGERS, FINGERTIPS, HAND, HULL, ARM, KETTLE = 1, 2, 4, 8, 16, 32
THINGS = ("microdoorroot", "lightswitchroot", "slidelink", "hingeleftdoor", "hingerightdoor", "knob")
# Body -> which of its colliding geoms, all of them boxes, are within the robot's or the kettle's reach.
FIXED = {
    "ovenroot": (0,),
    "hoodroot": (0,),
    "microroot": (1, 5),
    "counters": (8,),
    "slide": (0,),
    "hingecab": (5,),
    "wallroot": (0, 1),
}
# Capsules in place of the meshes of links and hand: two ends [3] and a radius, in metres. They were fitted to
# the support functions of the meshes' convex hulls; docs/kitchen.md has the errors.
LINKS: dict[int, tuple] = {
    0: (
        (-0.001, 0, 0.089, 0.007, 0, 0.051, 0.068),
        (0.005, 0.088, 0.004, 0.006, -0.087, 0.004, 0.007),
        (-0.134, 0.055, 0.005, -0.134, -0.054, 0.005, 0.01),
    ),
    2: (
        (0, -0.014, 0.057, 0, -0.15, 0.008, 0.061),
        (-0.003, -0.162, -0.011, 0, 0.003, 0.081, 0.05),
        (0, -0.013, 0.068, 0, 0.002, 0.031, 0.058),
    ),
    5: (
        (0, 0.047, 0.003, 0.001, 0.025, -0.216, 0.051),
        (0.005, 0.005, -0.212, 0, 0.08, 0.002, 0.052),
        (0.003, -0.049, -0.254, -0.044, 0.02, -0.255, 0.008),
        (-0.04, -0.021, -0.252, 0.047, -0.005, -0.251, 0.012),
    ),
    6: (
        (-0.004, -0.001, 0.014, 0.085, 0.04, 0.001, 0.044),
        (0.08, 0.064, -0.022, 0.105, -0.04, -0.026, 0.017),
        (0.112, -0.043, 0.024, -0.006, -0.035, -0.01, 0.014),
        (-0.024, 0.022, -0.005, -0.031, -0.008, -0.005, 0.018),
    ),
    7: (
        (-0.013, 0.006, 0.077, -0.009, -0.015, 0.077, 0.034),
        (0.067, 0.036, 0.085, 0.037, 0.067, 0.085, 0.014),
    ),
}
FOREARM = (5, 6, 7)  # links that touch things, and the links 0 and 2
HAND_CAPSULES = (
    (0.046, 0.074, 0.109, -0.059, -0.06, 0.087, 0.006),
    (0.07, 0.045, 0.11, -0.018, -0.047, 0.114, 0.01),
    (0.068, 0.057, 0.161, -0.068, -0.057, 0.161, 0.013),
    (0.016, 0.039, 0.106, -0.057, -0.068, 0.161, 0.013),
    (-0.065, -0.065, 0.1, 0.057, 0.07, 0.162, 0.011),
)
HULL_VERTICES = 32
FOOT = 0.002  # radius of the spheres at the corners of the kettle, in metres
MAX_PAIRS, MAX_CONTACTS = 64, 16  # pairs of geoms of each kind, contacts of each dimension (condim)


def for_mjx(spec: mujoco.MjSpec) -> None:
    """Makes the changes that MJX needs (measurements: docs/kitchen.md).

    * Geoms that do not collide are removed, and meshes. Bodies keep their mass and inertia.
    * Cylinders of handles and of the kettle's spout become capsules. The discs below the knobs are removed.
    * The hand has two shapes: for capsules the hull of its mesh with 32 vertices, for boxes capsules.
    * The links 5 to 7 of the arm become capsules (`LINKS`), and the links 0 and 2, which they may hit.
    * The kettle stands on spheres of 2 mm at its corners. MJX's contacts between two boxes are not C's.
    * Of what is fixed only `FIXED` and the floor count. Fixed boxes meet the ends of the fingers, not their
      middles.
    * Contact margins are 1 mm for fingers and the kettle's corners, and otherwise 0. MJX has none for meshes.
    * At most 64 pairs of geoms of each kind are looked at, the nearest ones, and 16 contacts of each
      dimension (condim) count, the deepest ones.
    """
    whole = spec.compile()
    for body in spec.bodies[1:]:
        row = body.id
        if whole.body_mass[row] > 0:
            body.explicitinertial, body.fullinertia = True, np.full(6, np.nan)
            body.mass, body.inertia = whole.body_mass[row], whole.body_inertia[row]
            body.ipos, body.iquat = whole.body_ipos[row], whole.body_iquat[row]
    seen: dict[str, int] = {}  # body -> how many of its colliding geoms have come
    for geom in list(spec.geoms):
        name, collides = geom.parent.name, geom.contype or geom.conaffinity
        number = seen.get(name, 0)
        seen[name] = number + bool(collides)
        if not collides or not place(geom, number):
            spec.delete(geom)
    for mesh in list(spec.meshes):
        if mesh.name == "hand_col":
            mesh.maxhullvert = HULL_VERTICES
        else:
            spec.delete(mesh)
    spec.add_numeric(name="max_geom_pairs", data=[MAX_PAIRS], size=1)
    spec.add_numeric(name="max_contact_points", data=[MAX_CONTACTS], size=1)


def place(geom: mujoco.MjsGeom, number: int) -> bool:
    """Gives the `number`-th colliding geom of a body its shape and its groups; whether it stays.

    What replaces it is added to its body.
    """
    body, name = geom.parent, geom.parent.name
    link = int(name[-1]) if name.startswith("panda0_link") else None
    geom.margin = 0
    if "finger" in name:
        tip = number in (0, 1, 10, 11)
        geom.margin = MARGIN
        return touch(geom, FINGERS | FINGERTIPS * tip, 0)
    if link == 7 and number == 1:
        add_capsules(body, HAND_CAPSULES, HAND, 0)
        return touch(geom, HULL, 0)
    if link is not None:
        add_capsules(body, LINKS.get(link, ()), *((ARM, 0) if link in FOREARM else (0, ARM)))
        return False
    if name == "kettleroot":
        if geom.type == BOX:
            for corner in np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, 8).T:
                foot = added(body, SPHERE, KETTLE, 0)
                foot.pos, foot.size[0] = geom.pos + corner * (geom.size - FOOT), FOOT
                foot.margin, foot.condim = MARGIN, geom.condim
                foot.solref, foot.solimp, foot.friction = geom.solref, geom.solimp, geom.friction
            return touch(geom, 0, FINGERS | HAND | ARM)
        to_capsule(geom)
        return touch(geom, KETTLE, FINGERS | HULL | ARM)
    if name.startswith(THINGS):
        if geom.type == CYLINDER and name.startswith("knob"):
            return False
        if geom.type == BOX:
            return touch(geom, 0, FINGERS | HAND | ARM | KETTLE)
        to_capsule(geom)
        return touch(geom, 0, FINGERS | HULL | ARM)
    if geom.type == PLANE:
        return touch(geom, 0, KETTLE)
    return number in FIXED.get(name, ()) and touch(geom, 0, FINGERTIPS | HAND | ARM | KETTLE)


def touch(geom: mujoco.MjsGeom, groups: int, others: int) -> bool:
    """Makes `geom` a member of `groups` that touches the groups `others` (collision bits). Returns True."""
    geom.contype, geom.conaffinity = groups, others
    return True


def added(body: mujoco.MjsBody, kind: mujoco.mjtGeom, groups: int, others: int) -> mujoco.MjsGeom:
    """A new geom of `body`, without mass, that touches as `touch` says."""
    geom = body.add_geom(type=kind, mass=0, group=3, condim=3, margin=0)
    touch(geom, groups, others)
    return geom


def add_capsules(body: mujoco.MjsBody, capsules: tuple, groups: int, others: int) -> None:
    """Adds capsules, each as two ends [3] and a radius, to `body`."""
    for *ends, radius in capsules:
        capsule = added(body, CAPSULE, groups, others)
        capsule.fromto, capsule.size[0] = ends, radius


def to_capsule(geom: mujoco.MjsGeom) -> None:
    """Turns a cylinder into a capsule of the same radius and whole length; other geoms stay."""
    if geom.type == CYLINDER:
        radius, half = geom.size[:2]
        geom.type, geom.size = CAPSULE, [radius, max(half - radius, 0.001), 0]
