"""Contact functions that agree with C MuJoCo, for the geom pairs where MJX's own do not or are missing.

MJX 3.17 differs from the C engine in these functions of its collision table:

================  =============================================  =============================================
pair              MJX                                            C, and this module
================  =============================================  =============================================
plane-capsule     default tangent within 30 degrees of vertical  friction frame always aligned to the capsule
sphere-box        no contact while separated: margin ignored     exact distance, inside and outside
capsule-box       the same, and other contact points             nearest point, and a second along the capsule
capsule-cylinder  two contacts from a descent that stops early   one, exact (cylinders.py)
cylinder-box      none: MJX refuses the model                    one, exact, with MuJoCo's multiccd off
================  =============================================  =============================================

The first difference turns the friction pyramid of every walking leg; the next two change what happens near
walls. The rules are those of `mjc_PlaneCapsule`, `mjraw_SphereBox` and `mjraw_CapsuleBox`, with their
tie-breaks. They are written as array arithmetic for one pair of geoms, and MJX's `collider` vectorises them
over pairs. Matrix products are written as sums, because an accelerator may round matrix products to fewer
digits than contacts need.
"""

import jax
import jax.numpy as jnp
import numpy as np
from mujoco.mjx._src import collision_driver
from mujoco.mjx._src.collision_primitive import collider
from mujoco.mjx._src.collision_types import Collision, GeomInfo
from mujoco.mjx._src.types import GeomType

from ooo_rl.envs.engines import cylinders
from ooo_rl.envs.engines.replaced import Replacement

TINY = 1e-15  # mjMINVAL: C treats smaller numbers as zero
SEPARATED = 1.0  # the distance that MJX gives to contacts that do not exist

# The 12 edges of a box, in the order in which C visits them. EDGE_AXIS [12]: the axis along which each runs.
# EDGE_UPPER [12, 3]: on which axes the edge's lower end is on the upper side (never on the edge's own axis).
EDGE_AXIS = np.repeat(np.arange(3), 4)
EDGE_UPPER = np.array(
    [[bool(i & 1), bool(i & 2), bool(i & 4)] for j in range(3) for i in range(8) if not i & (1 << j)]
)


@collider(ncon=2)
def plane_capsule(plane: GeomInfo, capsule: GeomInfo) -> Collision:
    """One contact for each end of the capsule: dist [2], pos [2, 3], frame [2, 3, 3].

    The tangent of the frame is along the capsule.
    """
    normal, axis, radius = plane.mat[:, 2], capsule.mat[:, 2], capsule.size[0]
    ends = capsule.pos + axis * capsule.size[1] * jnp.array([[1.0], [-1.0]], axis.dtype)
    dist = jnp.sum((ends - plane.pos) * normal, -1) - radius
    pos = ends - normal * (radius + dist / 2)[:, None]
    return dist, pos, jnp.stack([_frame(normal, axis)] * 2)


@collider(ncon=1)
def sphere_box(sphere: GeomInfo, box: GeomInfo) -> Collision:
    """The contact of a sphere and a box: dist [], pos [3], frame [3, 3]."""
    center = _to_local(box.mat, sphere.pos - box.pos)
    return _sphere_box(center, sphere.size[0], box)


@collider(ncon=2)
def capsule_box(capsule: GeomInfo, box: GeomInfo) -> Collision:
    """Up to two contacts of a capsule and a box: dist [2], pos [2, 3], frame [2, 3, 3].

    A capsule is a sphere swept along a segment, so its contacts are those of two spheres on the segment. One
    sphere is at the point nearest to the box. The other one, if any, is as far along the box's surface as
    both bodies reach. A missing second contact has the distance `SEPARATED`.
    """
    radius, length = capsule.size[0], capsule.size[1]
    pos = _to_local(box.mat, capsule.pos - box.pos)
    axis = _to_local(box.mat, capsule.mat[:, 2])
    half = axis * length

    first, second, exists = _segment_box(pos, axis, half, length, box.size)
    contacts = [_sphere_box(pos + half * t, radius, box) for t in (first, second)]
    dist, points, frames = (jnp.stack(part) for part in zip(*contacts))
    return dist.at[1].set(jnp.where(exists, dist[1], SEPARATED)), points, frames


@collider(ncon=1)
def capsule_cylinder(capsule: GeomInfo, cylinder: GeomInfo) -> Collision:
    """The contact of a capsule and a cylinder: dist [], pos [3], frame [3, 3]."""
    pos = _to_local(cylinder.mat, capsule.pos - cylinder.pos)
    half = _to_local(cylinder.mat, capsule.mat[:, 2]) * capsule.size[1]
    dist, point, normal = cylinders.capsule_cylinder(pos, half, capsule.size[0], cylinder.size)
    return dist, _to_world(cylinder.mat, point) + cylinder.pos, _frame(_to_world(cylinder.mat, normal))


@collider(ncon=1)
def cylinder_box(cylinder: GeomInfo, box: GeomInfo) -> Collision:
    """The contact of a cylinder and a box: dist [], pos [3], frame [3, 3]."""
    pos = _to_local(box.mat, cylinder.pos - box.pos)
    axes = jnp.stack([_to_local(box.mat, cylinder.mat[:, i]) for i in range(3)], 1)
    dist, point, normal = cylinders.cylinder_box(pos, axes, cylinder.size, box.size)
    return dist, _to_world(box.mat, point) + box.pos, _frame(_to_world(box.mat, normal))


CONTACTS = {
    (GeomType.PLANE, GeomType.CAPSULE): plane_capsule,
    (GeomType.SPHERE, GeomType.BOX): sphere_box,
    (GeomType.CAPSULE, GeomType.BOX): capsule_box,
    (GeomType.CAPSULE, GeomType.CYLINDER): capsule_cylinder,
    (GeomType.CYLINDER, GeomType.BOX): cylinder_box,
}

# While a function is traced inside `exact_contacts()`, MJX finds `CONTACTS` in its collision table.
exact_contacts = Replacement((collision_driver._COLLISION_FUNC, CONTACTS))


def _to_local(mat: jax.Array, vector: jax.Array) -> jax.Array:
    """Takes `vector` [3] from the world frame to the frame whose axes are the columns of `mat` [3, 3]."""
    return jnp.sum(mat * vector[:, None], 0)


def _to_world(mat: jax.Array, vector: jax.Array) -> jax.Array:
    """The inverse of `_to_local`."""
    return jnp.sum(mat * vector, 1)


def _frame(normal: jax.Array, tangent: jax.Array | None = None) -> jax.Array:
    """The contact frame [3, 3] of a unit normal [3]. Its rows are normal, tangent and their cross product.

    The default tangent is C's: the y axis, or the z axis if the normal is within 60 degrees of y. `tangent`
    is made orthogonal to the normal. If the two are parallel, up to rounding, the x axis takes its place, as
    in C.
    """
    if tangent is None:
        along_y = jnp.abs(normal[1]) >= 0.5
        tangent = jnp.where(along_y, jnp.array([0, 0, 1], normal.dtype), jnp.array([0, 1, 0], normal.dtype))
    tangent = tangent - normal * jnp.sum(normal * tangent)
    size = jnp.sqrt(jnp.sum(tangent**2))
    lost = size < max(TINY, 4 * float(jnp.finfo(normal.dtype).eps))
    tangent = jnp.where(lost, jnp.array([1, 0, 0], normal.dtype), tangent / jnp.where(lost, 1, size))
    return jnp.stack([normal, tangent, jnp.cross(normal, tangent)])


def _sphere_box(center: jax.Array, radius: jax.Array, box: GeomInfo) -> Collision:
    """The contact of a box and a sphere at `center` [3] in the box's frame.

    Returns dist [], pos [3], frame [3, 3] in the world frame.
    """
    # Outside: the nearest point of the box is the centre, clamped to the box. The normal points there.
    nearest = jnp.clip(center, -box.size, box.size)
    gap = jnp.sqrt(jnp.sum((nearest - center) ** 2))
    inside = gap <= TINY
    inward = (nearest - center) / jnp.where(inside, 1, gap)

    # Inside: the way out is the nearest of the six faces (x low, x high, y low, ...), the first of equals.
    depths = jnp.stack([jnp.abs(-box.size - center), jnp.abs(box.size - center)], 1).reshape(6)
    face = jnp.argmin(depths)
    depth = depths[face]
    from_face = jnp.where(jnp.arange(3) == face // 2, jnp.where(face % 2 == 1, -1, 1), 0).astype(center.dtype)

    normal = jnp.where(inside, from_face, inward)
    dist = jnp.where(inside, -depth, gap) - radius
    # Halfway between the deepest point of the sphere and the surface of the box.
    pos = jnp.where(inside, center + normal * (radius - depth) / 2, (nearest + center + normal * radius) / 2)
    return dist, _to_world(box.mat, pos) + box.pos, _frame(_to_world(box.mat, normal))


def _segment_box(
    pos: jax.Array, axis: jax.Array, half: jax.Array, length: jax.Array, size: jax.Array
) -> tuple:
    """The two spheres on the segment `pos + half * t`: (t of the first, t of the second, whether it exists).

    t is in [-1, 1]. All is in the frame of the box with half sizes `size` [3]; `half` [3] is the unit vector
    `axis` [3] times `length` [].
    """
    # The nearest point is an end of the segment over (or in) a face, or a point that faces an edge.
    ends = pos + half * jnp.array([[-1.0], [1.0]], pos.dtype)
    beyond = jnp.abs(ends) > size
    end_gap = jnp.sum((jnp.clip(ends, -size, size) - ends) ** 2, -1)
    # If an end is beyond two faces, an edge or a corner is nearer.
    end_gap = jnp.where(jnp.sum(beyond, -1) > 1, jnp.inf, end_gap)
    edge_gap, on_edge, on_segment, edge_end = _segment_edges(pos, half, length, size)

    # Candidates are compared one after another as in C, because an edge must be nearer by more than TINY.
    best, winner = end_gap[0], jnp.array(0)
    for k in range(1, 14):
        gap = end_gap[k] if k < 2 else edge_gap[k - 2]
        nearer = gap < (best if k < 2 else best - TINY)
        best, winner = jnp.where(nearer, gap, best), jnp.where(nearer, k, winner)

    edge = jnp.maximum(winner - 2, 0)
    is_end, in_middle = winner < 2, edge_end[edge] == 0
    t = jnp.where(is_end, jnp.where(winner == 0, -1, 1).astype(pos.dtype), on_segment[edge])

    own = jnp.arange(3) == jnp.asarray(EDGE_AXIS)[edge]
    upper = jnp.asarray(EDGE_UPPER)[edge] | (own & (edge_end[edge] > 0))
    differs = (half > 0) != upper  # on which axes the segment's direction and the corner have different sides
    crossing = _divide(2 * size, jnp.abs(half))  # how much t it takes to cross the whole box along each axis

    face_step, face_two = _after_face(pos + half * t, half * -t, beyond[jnp.where(winner == 1, 1, 0)], size)
    corner_step, corner_two = _after_corner(t, axis, differs, crossing)
    edge_step, edge_two = _after_edge(
        t, on_edge[edge], axis, differs & ~own, jnp.asarray(EDGE_AXIS)[edge], crossing, half
    )
    step = jnp.where(is_end, -t * face_step, jnp.where(in_middle, edge_step, corner_step))
    exists = jnp.where(is_end, face_two, jnp.where(in_middle, edge_two, corner_two))
    return t, t + jnp.where(exists, step, 0), exists


def _after_face(end: jax.Array, inward: jax.Array, over: jax.Array, size: jax.Array) -> tuple:
    """The step from an end of the segment over a face to the second contact: (step, whether it exists).

    The step goes along the segment to the outline of the face. `end` [3] is beyond the box on the axis that
    `over` [3] marks. The step is in units of `inward` [3], half the way to the other end. An end inside the
    box has no second contact.
    """
    exits = _divide(jnp.stack([size, -size]) - end, inward)
    exits = jnp.where((exits > 0) & ~over, exits, 2)
    return jnp.minimum(2, jnp.min(exits)), jnp.any(over)


def _after_corner(t: jax.Array, axis: jax.Array, differs: jax.Array, crossing: jax.Array) -> tuple:
    """The step in t from a corner to the second contact: (step, whether it exists).

    There is none if the segment points at the corner or away from it. Otherwise, one axis has another value
    of `differs` than the other two. A segment that is mostly along this axis follows the edge there; any
    other follows the face across.
    """
    count = jnp.sum(differs)
    odd, way = differs == (count == 1), jnp.where(count == 1, 1, -1).astype(t.dtype)
    follow = way * jnp.minimum(1 - way * t, jnp.min(jnp.where(odd, crossing, jnp.inf)))
    across = -way * jnp.minimum(1 + way * t, jnp.min(jnp.where(odd, jnp.inf, crossing)))
    step = jnp.where(jnp.sum(jnp.where(odd, axis**2, 0)) > 0.5, follow, across)
    return step, (count == 1) | (count == 2)


def _after_edge(t, on_edge, axis, differs, along, crossing, half) -> tuple:
    """The step in t from the middle of an edge to the second contact: (step, whether it exists).

    There is none if segment and edge form a T. Otherwise the step goes over the face to which the segment is
    flatter. It stops at the segment's end, at the face's far side, or at the end of the edge. `along` [] is
    the edge's axis, `differs` [3] is False there, and `on_edge` [] is the place on the edge in [-1, 1].
    """
    next1, next2 = (along + 1) % 3, (along + 2) % 3
    main = jnp.where(jnp.abs(axis[next1]) > jnp.abs(axis[next2]), next1, next2)
    way = jnp.where(differs[main], 1, -1).astype(t.dtype)
    # `crossing` is for the whole edge, two of its halves. The rest depends on which end the step heads for.
    rest = 1 - jnp.where((half[along] > 0) == differs[main], 1, -1) * on_edge
    to_edge_end = jnp.where(half[along] == 0, jnp.inf, rest / 2 * crossing[along])
    step = way * jnp.minimum(jnp.minimum(1 - way * t, crossing[main]), to_edge_end)
    return step, jnp.sum(differs) == 1


def _segment_edges(pos: jax.Array, half: jax.Array, length: jax.Array, size: jax.Array) -> tuple:
    """The nearest points of the segment and of each of the 12 edges.

    Returns four arrays [12]: the squared distances, the places on the edges in [-1, 1], the places on the
    segment in [-1, 1], and whether a place counts as the lower end (-1), the middle (0) or the upper end (1)
    of its edge. A parallel edge has an infinite distance.
    """
    along = np.arange(3) == EDGE_AXIS[:, None]
    reach = size[EDGE_AXIS]
    offset = jnp.where(along, 0, jnp.where(EDGE_UPPER, size, -size)) - pos

    # x on the edge and y on the segment minimise a quadratic: ma x + mb y = u, and mb x + mc y = v.
    ma, mb, mc = reach**2, -reach * half[EDGE_AXIS], length**2
    u, v = -reach * jnp.sum(jnp.where(along, offset, 0), -1), jnp.sum(offset * half, -1)
    det = ma * mc - mb**2
    parallel = jnp.abs(det) < TINY

    # First comes the unconstrained minimum on the edge, clamped; then the best y for this x, clamped. If y
    # was clamped, the best x for this y follows. As in C, `end` keeps the first clamp of x, unless the second
    # one clamps again.
    free = (mc * u - mb * v) / jnp.where(parallel, 1, det)
    x, end = jnp.clip(free, -1, 1), _beyond_one(free)
    free = (v - mb * x) / mc
    y, off = jnp.clip(free, -1, 1), _beyond_one(free)
    free = (u - mb * y) / ma
    x = jnp.where(off != 0, jnp.clip(free, -1, 1), x)
    end = jnp.where((off != 0) & (_beyond_one(free) != 0), _beyond_one(free), end)

    gap = jnp.sum((offset - half * y[:, None] + jnp.where(along, (reach * x)[:, None], 0)) ** 2, -1)
    return jnp.where(parallel, jnp.inf, gap), x, y, end


def _beyond_one(x: jax.Array) -> jax.Array:
    """1 where x is above 1, -1 where it is below -1, else 0."""
    return (x > 1).astype(int) - (x < -1).astype(int)


def _divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, and infinity where y is zero."""
    return jnp.where(y == 0, jnp.inf, x / jnp.where(y == 0, 1, y))
