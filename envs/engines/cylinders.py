"""Contacts of cylinders with capsules and boxes: distance, position and normal.

Each pair has the one contact that MuJoCo's convex collider finds. MJX computes contacts with capsules by a
descent on distance fields that stops early, and it has no contacts with boxes. C finds the shortest
translation into contact, or out of it. Both cases are one problem: of all directions n, find the one along
which the two bodies are farthest apart, n . (nearest point of the second) - n . (farthest point of the
first). For a cylinder and a box, only a few directions can be the answer, and all are tried. For a capsule
it is enough to find the point of its segment that is nearest to the cylinder, or deepest in it.

Every function is for one pair, in the frame of one of the two bodies. Matrix products are written as sums
(contacts.py says why). If the bodies touch along a whole line, the point on it that C chooses depends on
rounding, and so does ours.
"""

import jax
import jax.numpy as jnp
import numpy as np

HALVINGS = 24  # steps of each search on an interval
TINY = 1e-10  # smaller lengths are treated as zero
EDGE_AXIS = np.repeat(np.arange(3), 4)  # the axis along which each of a box's 12 edges runs
SEARCHED = 0.6  # half-width of the search around a first guess, in radians
# The middles of the edges [12, 3], in units of the box's half sizes.
EDGE_MIDDLE = np.array([np.insert([a, b], axis, 0) for axis in range(3) for a in (-1, 1) for b in (-1, 1)])

# From each edge, the directions along its two faces towards the box's inside, [12, 3] each.
EDGE_TURN = [
    np.eye(3)[other[EDGE_AXIS]] * -EDGE_MIDDLE for other in (np.array([1, 0, 0]), np.array([2, 2, 1]))
]


def capsule_cylinder(pos: jax.Array, half: jax.Array, radius: jax.Array, size: jax.Array) -> tuple:
    """The contact of a capsule and a cylinder, in the cylinder's frame: (dist [], point [3], normal [3]).

    The capsule surrounds the segment from `pos` - `half` to `pos` + `half`. `size` is the cylinder's
    (radius, half length). The normal points from capsule to cylinder, and the point is halfway between the
    surfaces.
    """
    point = pos + nearest(pos, half, size) * half
    away, outward = depth(point, size)
    return away - radius, point - outward * (radius + away) / 2, -outward


def depth(point: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The signed distance [] of a point [3] from a cylinder, and the direction [3] in which it grows.

    The distance is negative inside. `size` is the cylinder's (radius, half length).
    """
    across = jnp.sqrt(point[0] ** 2 + point[1] ** 2)
    radial = jnp.where(
        across > TINY,
        jnp.array([point[0], point[1], 0 * across]) / jnp.maximum(across, TINY),
        jnp.array([1.0, 0, 0]),
    )
    axial = jnp.array([0.0, 0, 1]) * jnp.where(point[2] < 0, -1.0, 1.0)
    side, end = across - size[0], jnp.abs(point[2]) - size[1]
    corner = jnp.sqrt(side**2 + end**2)
    from_rim = (side * radial + end * axial) / jnp.maximum(corner, TINY)
    at_rim = (side > 0) & (end > 0)
    return (
        jnp.where(at_rim, corner, jnp.maximum(side, end)),
        jnp.where(at_rim, from_rim, jnp.where(side > end, radial, axial)).astype(point.dtype),
    )


def nearest(pos: jax.Array, half: jax.Array, size: jax.Array) -> jax.Array:
    """The t in [-1, 1] at which the segment `pos + t half` is nearest to the cylinder, or deepest in it.

    The method is bisection. The signed distance from a convex body is convex along a line, so its slope
    changes sign only once.
    """

    def halve(bounds, _):
        middle = (bounds[0] + bounds[1]) / 2
        falling = jnp.sum(depth(pos + middle * half, size)[1] * half) < 0
        return jnp.where(falling, jnp.stack([middle, bounds[1]]), jnp.stack([bounds[0], middle])), None

    bounds, _ = jax.lax.scan(halve, jnp.array([-1.0, 1.0], pos.dtype), None, HALVINGS)
    middle = bounds.mean()
    # Bisection never reaches an end of the segment.
    return jnp.where(middle > 1 - 1e-6, 1.0, jnp.where(middle < -1 + 1e-6, -1.0, middle)).astype(pos.dtype)


def cylinder_box(pos: jax.Array, axes: jax.Array, size: jax.Array, box: jax.Array) -> tuple:
    """The contact of a cylinder and a box, in the box's frame: (dist [], point [3], normal [3]).

    The cylinder's centre is `pos` [3], and the columns of `axes` [3, 3] are the axes of its frame; the last
    one is its axis of rotation. `size` is its (radius, half length). `box` [3] holds the box's half sizes.
    The normal points from cylinder to box.
    """
    axis = axes[:, 2]
    edges, edge_normals = _edge_candidates(pos, axes, size, box)
    rims, rim_normals = _rim_candidates(pos, axis, size, box, edge_normals)
    crossed = jnp.stack([jnp.cross(axis, unit) for unit in jnp.eye(3, dtype=pos.dtype)])
    lengths = jnp.sqrt(jnp.sum(crossed**2, 1))
    flat = jnp.concatenate(
        [jnp.eye(3, dtype=pos.dtype), axis[None], crossed / jnp.maximum(lengths, TINY)[:, None]]
    )
    flat = flat * jnp.where(flat @ pos > 0, -1.0, 1.0)[:, None]  # each points towards the box's middle
    # If two axes are parallel, there is no direction across both. An edge is a candidate only if it is the
    # part of the box that is nearest along its direction.
    nearest_of_box = jnp.minimum(*(jnp.sum(edge_normals * turn, 1) for turn in EDGE_TURN)) > -1e-4
    valid = jnp.concatenate([jnp.ones(4, bool), lengths > 1e-3, nearest_of_box, jnp.ones(12, bool)])
    normals = jnp.concatenate([flat, edge_normals, rim_normals])

    gaps = jnp.where(valid, gap(normals, pos, axis, size, box), -jnp.inf)
    best = jnp.argmax(gaps)
    dist, normal = gaps[best], normals[best]
    points = jnp.concatenate([_flat_points(pos, axis, size, box, flat), edges, rims])
    # For a face of the box the point is on the cylinder, else it is on the box.
    inward = jnp.where(best < 3, 1.0, -1.0)
    return dist, points[best] + inward * normal * dist / 2, normal


def gap(normals: jax.Array, pos: jax.Array, axis: jax.Array, size: jax.Array, box: jax.Array) -> jax.Array:
    """The gap [n] between cylinder and box along `normals` [n, 3], negative where they overlap.

    The normals point from cylinder to box.
    """
    along = jnp.sum(normals * axis, 1)
    radial = jnp.sqrt(jnp.maximum(1 - along**2, 0))
    return (
        -jnp.sum(normals * pos, 1)
        - jnp.sum(jnp.abs(normals) * box, 1)
        - size[1] * jnp.abs(along)
        - size[0] * radial
    )


def _edge_candidates(
    pos: jax.Array, axes: jax.Array, size: jax.Array, box: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The point of each edge of the box that is nearest to the cylinder, or deepest in it.

    Returns these points [12, 3], and the directions [12, 3] from the cylinder to them.
    """
    middles, halves = EDGE_MIDDLE * box, np.eye(3)[EDGE_AXIS] * box
    to_cylinder = lambda v: jnp.sum(axes[None] * v[:, :, None], 1)  # noqa: E731
    begin, half = to_cylinder(middles - pos), to_cylinder(halves)
    t = jax.vmap(nearest, (0, 0, None))(begin, half, size)
    _, outward = jax.vmap(depth, (0, None))(begin + t[:, None] * half, size)
    return middles + t[:, None] * halves, jnp.sum(axes[None] * outward[:, None, :], 2)


def _rim_candidates(
    pos: jax.Array, axis: jax.Array, size: jax.Array, box: jax.Array, guesses: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Contacts of the box's edges with the cylinder's rims: points on the edges and normals, [12, 3] each.

    The normal is across the edge. An edge is the part of the box that is nearest for a quarter turn of
    directions; the normal is the one of them along which cylinder and box are farthest apart. It is searched
    near `guesses` [12, 3], which are exact only as long as the edge stays outside the cylinder.
    """

    def towards(angle):
        return jnp.cos(angle)[:, None] * EDGE_TURN[0] + jnp.sin(angle)[:, None] * EDGE_TURN[1]

    def narrow(bounds, _):
        low, high = bounds
        one, other = low + (high - low) / 3, high - (high - low) / 3
        better = gap(towards(one), pos, axis, size, box) > gap(towards(other), pos, axis, size, box)
        return (jnp.where(better, low, one), jnp.where(better, other, high)), None

    a, b = (jnp.maximum(jnp.sum(guesses * turn, 1), 0) for turn in EDGE_TURN)
    guess = jnp.arctan2(b, jnp.maximum(a, TINY))
    bounds = jnp.maximum(guess - SEARCHED, 0), jnp.minimum(guess + SEARCHED, np.pi / 2)
    (low, high), _ = jax.lax.scan(narrow, bounds, None, HALVINGS)
    normals = towards((low + high) / 2)
    along = jnp.sum(normals * axis, 1)[:, None]
    across = normals - along * axis
    across = across / jnp.maximum(jnp.sqrt(jnp.sum(across**2, 1)), TINY)[:, None]
    rim = pos + jnp.where(along < 0, -1.0, 1.0) * size[1] * axis + size[0] * across
    return EDGE_MIDDLE * box + np.eye(3)[EDGE_AXIS] * jnp.clip(rim, -box, box), normals


def _flat_points(
    pos: jax.Array, axis: jax.Array, size: jax.Array, box: jax.Array, normals: jax.Array
) -> jax.Array:
    """The contact points [7, 3] of the candidates `normals` [7, 3].

    The first three candidates are the box's faces; their points are on the cylinder. The others are the
    cylinder's end, and its side across the three directions of the edges; their points are on the box.
    """
    found = []
    for i in range(7):
        normal = normals[i]
        along = jnp.sum(normal * axis)
        across = normal - along * axis
        across = across / jnp.maximum(jnp.sqrt(jnp.sum(across**2)), TINY)
        # `begin` is on the line of the cylinder's side that is nearest to the box.
        begin, sign = pos + size[0] * across, jnp.where(along < 0, -1.0, 1.0)
        if i < 3:
            # The point goes along that line, as far as the line is over the face.
            over = np.arange(3) != i
            steep = jnp.where(jnp.abs(axis) < TINY, TINY, axis)
            cuts = jnp.sort(jnp.stack([(-box - begin) / steep, (box - begin) / steep]), axis=0)
            low = jnp.maximum(-size[1], jnp.max(jnp.where(over, cuts[0], -jnp.inf)))
            high = jnp.minimum(size[1], jnp.min(jnp.where(over, cuts[1], jnp.inf)))
            t = jnp.where(low <= high, jnp.where(sign > 0, high, low), sign * size[1])
            found.append(begin + t * axis)
            continue
        corner = -jnp.where(normal < 0, -1.0, 1.0) * box
        end = pos + sign * size[1] * axis
        if i == 3:
            found.append(jnp.where(jnp.abs(normal) < 1e-4, jnp.clip(end, -box, box), corner))
            continue
        # The point goes from that corner along the edge, to where the cylinder's line crosses it.
        k = i - 4
        gap = begin - corner
        crossing = gap[k] - axis[k] * jnp.sum(gap * axis)
        flatness = jnp.maximum(1 - axis[k] ** 2, TINY)
        found.append(corner.at[k].set(jnp.clip(corner[k] + crossing / flatness, -box[k], box[k])))
    return jnp.stack(found)
