"""Where cylinders touch capsules and boxes: distance, place and normal of the one contact that MuJoCo's convex collider finds.

MJX takes such contacts from a descent on distance fields that stops early (capsules), or does not know them (boxes). C finds the
shortest way out of, or into, contact. Both signs are one problem: of all directions n, take the one along which the two bodies are
farthest apart, n . (nearest point of the second) - n . (farthest point of the first). For a cylinder and a box few directions can be the
answer, and all are tried; for the segment within a capsule it is enough to find the point of it that is nearest to the cylinder, or
deepest in it.

Everything is for one pair, in the frame of one of the two, in sums rather than matrix products (see envs/contacts.py). Where a whole line
touches, C's choice of a point on it hangs on rounding, and so does ours.
"""

import jax
import jax.numpy as jnp
import numpy as np

HALVINGS = 24
TINY = 1e-10
EDGE_AXIS = np.repeat(np.arange(3), 4)  # of a box's 12 edges, the axis along which each runs
SEARCHED = 0.6  # radians to both sides of a first guess
EDGE_MIDDLE = np.array([np.insert([a, b], axis, 0) for axis in range(3) for a in (-1, 1) for b in (-1, 1)])

# From each edge towards the box's inside, along its two faces [12, 3] each.
EDGE_TURN = [np.eye(3)[other[EDGE_AXIS]] * -EDGE_MIDDLE for other in (np.array([1, 0, 0]), np.array([2, 2, 1]))]


def capsule_cylinder(pos: jax.Array, half: jax.Array, radius: jax.Array, size: jax.Array) -> tuple:
    """A capsule around the segment `pos` +- `half` [3] in the frame of a cylinder of `size` (radius, half length): (dist, point, normal).

    The normal [3] goes from capsule to cylinder, the point [3] lies halfway between the surfaces.
    """
    point = pos + nearest(pos, half, size) * half
    away, outward = depth(point, size)
    return away - radius, point - outward * (radius + away) / 2, -outward


def depth(point: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distance [] of a point [3] from the surface of the cylinder of `size`, negative inside, and the direction [3] in which it grows."""
    across = jnp.sqrt(point[0] ** 2 + point[1] ** 2)
    radial = jnp.where(across > TINY, jnp.array([point[0], point[1], 0 * across]) / jnp.maximum(across, TINY), jnp.array([1.0, 0, 0]))
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
    """The place t in [-1, 1] on the segment `pos + t half` that is nearest to the cylinder's surface, or deepest below it.

    The signed distance from a convex body is convex along a line: its slope changes sign once.
    """

    def halve(bounds, _):
        middle = (bounds[0] + bounds[1]) / 2
        falling = jnp.sum(depth(pos + middle * half, size)[1] * half) < 0
        return jnp.where(falling, jnp.stack([middle, bounds[1]]), jnp.stack([bounds[0], middle])), None

    bounds, _ = jax.lax.scan(halve, jnp.array([-1.0, 1.0], pos.dtype), None, HALVINGS)
    middle = bounds.mean()
    # An end of the segment is never reached by halving.
    return jnp.where(middle > 1 - 1e-6, 1.0, jnp.where(middle < -1 + 1e-6, -1.0, middle)).astype(pos.dtype)


def cylinder_box(pos: jax.Array, axes: jax.Array, size: jax.Array, box: jax.Array) -> tuple:
    """A cylinder at `pos` [3] with `axes` [3, 3] (columns, the last one its own) in the frame of a box of half sizes `box` [3].

    Returns (dist [], point [3], normal [3] from cylinder to box), in that frame.
    """
    axis = axes[:, 2]
    edges, edge_normals = _edge_candidates(pos, axes, size, box)
    rims, rim_normals = _rim_candidates(pos, axis, size, box, edge_normals)
    crossed = jnp.stack([jnp.cross(axis, unit) for unit in jnp.eye(3, dtype=pos.dtype)])
    lengths = jnp.sqrt(jnp.sum(crossed**2, 1))
    flat = jnp.concatenate([jnp.eye(3, dtype=pos.dtype), axis[None], crossed / jnp.maximum(lengths, TINY)[:, None]])
    flat = flat * jnp.where(flat @ pos > 0, -1.0, 1.0)[:, None]  # each towards the box's middle
    # No direction lies across parallels, and only of the edge that the box has nearest along a direction is the point for it.
    nearest_of_box = jnp.minimum(*(jnp.sum(edge_normals * turn, 1) for turn in EDGE_TURN)) > -1e-4
    valid = jnp.concatenate([jnp.ones(4, bool), lengths > 1e-3, nearest_of_box, jnp.ones(12, bool)])
    normals = jnp.concatenate([flat, edge_normals, rim_normals])

    gaps = jnp.where(valid, gap(normals, pos, axis, size, box), -jnp.inf)
    best = jnp.argmax(gaps)
    dist, normal = gaps[best], normals[best]
    points = jnp.concatenate([_flat_points(pos, axis, size, box, flat), edges, rims])
    inward = jnp.where(best < 3, 1.0, -1.0)  # on a face of the box the point is the cylinder's, else the box's
    return dist, points[best] + inward * normal * dist / 2, normal


def gap(normals: jax.Array, pos: jax.Array, axis: jax.Array, size: jax.Array, box: jax.Array) -> jax.Array:
    """How far cylinder and box are apart along each of `normals` [n, 3], which go from cylinder to box: negative where they overlap."""
    along = jnp.sum(normals * axis, 1)
    radial = jnp.sqrt(jnp.maximum(1 - along**2, 0))
    return -jnp.sum(normals * pos, 1) - jnp.sum(jnp.abs(normals) * box, 1) - size[1] * jnp.abs(along) - size[0] * radial


def _edge_candidates(pos: jax.Array, axes: jax.Array, size: jax.Array, box: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each edge of the box, its point nearest to the cylinder (or deepest in it), and the direction from the cylinder there [12, 3]."""
    middles, halves = EDGE_MIDDLE * box, np.eye(3)[EDGE_AXIS] * box
    to_cylinder = lambda v: jnp.sum(axes[None] * v[:, :, None], 1)  # noqa: E731
    begin, half = to_cylinder(middles - pos), to_cylinder(halves)
    t = jax.vmap(nearest, (0, 0, None))(begin, half, size)
    _, outward = jax.vmap(depth, (0, None))(begin + t[:, None] * half, size)
    return middles + t[:, None] * halves, jnp.sum(axes[None] * outward[:, None, :], 2)


def _rim_candidates(pos: jax.Array, axis: jax.Array, size: jax.Array, box: jax.Array, guesses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where an edge of the box meets the rim of the cylinder: a point of each edge and a direction across it [12, 3].

    Of the quarter turn of directions in which the edge is what the box has nearest, the one that keeps the two farthest apart. It is
    sought near the `guesses` [12, 3], which are exact only as long as the edge stays outside.
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


def _flat_points(pos: jax.Array, axis: jax.Array, size: jax.Array, box: jax.Array, normals: jax.Array) -> jax.Array:
    """The point [7, 3] at which each of the candidates `normals` makes contact.

    The first three are the box's faces, and theirs a point of the cylinder; then come the cylinder's end and its side across the three
    directions of the edges, with a point of the box.
    """
    found = []
    for i in range(7):
        normal = normals[i]
        along = jnp.sum(normal * axis)
        across = normal - along * axis
        across = across / jnp.maximum(jnp.sqrt(jnp.sum(across**2)), TINY)
        begin, sign = pos + size[0] * across, jnp.where(along < 0, -1.0, 1.0)  # the line of the side that is nearest to the box
        if i < 3:
            # As far along that line as it lies over the face.
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
        # The edge through that corner, along its axis to where the cylinder's line crosses it.
        k = i - 4
        gap = begin - corner
        crossing = gap[k] - axis[k] * jnp.sum(gap * axis)
        flatness = jnp.maximum(1 - axis[k] ** 2, TINY)
        found.append(corner.at[k].set(jnp.clip(corner[k] + crossing / flatness, -box[k], box[k])))
    return jnp.stack(found)
