"""The one contact function in which Warp's MuJoCo differs from C's, for bodies with capsules for legs.

Warp turns the friction frame of a capsule on a plane along the capsule only if the capsule is more than 30
degrees from upright; C does always (`contacts.py` has the same function for MJX). Import this module only
where Warp is installed.
"""

import warp
from mujoco.mjx.third_party.mujoco_warp._src import collision_primitive

theirs = collision_primitive.plane_capsule
PARALLEL = warp.constant(5e-7)  # a few roundings in float32: the capsule is upright, and no side is along it


@warp.func
def plane_capsule(
    normal: warp.vec3,
    plane: warp.vec3,
    centre: warp.vec3,
    axis: warp.vec3,
    radius: float,
    half_length: float,
):
    """Warp's function, with C's frame: (distances, positions, frame)."""
    dist, pos, _ = theirs(normal, plane, centre, axis, radius, half_length)
    along = axis - normal * warp.dot(normal, axis)
    size = warp.length(along)
    tangent = warp.vec3(1.0, 0.0, 0.0)
    if size > PARALLEL:
        tangent = along / size
    side = warp.cross(normal, tangent)
    frame = warp.mat33(
        normal[0], normal[1], normal[2], tangent[0], tangent[1], tangent[2], side[0], side[1], side[2]
    )
    return dist, pos, frame


def replace_theirs() -> None:
    """Makes Warp use this module's function in all kernels that it builds from now on."""
    collision_primitive.plane_capsule = plane_capsule
