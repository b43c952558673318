"""Demonstrations of the point mass."""

import jax
import jax.numpy as jnp
import numpy as np

from ooo_rl import envs
from ooo_rl.data.datasets.write import cut_to, episode
from ooo_rl.data.recipes.recipe import Recipe
from ooo_rl.envs.point_mass_wall import GOAL, STEP

# The paper's waypoints are in a data file that was not published. These lead over the wall, at some distance
# from its top, which is at x = 0.5, y = 1.2.
WAYPOINTS = np.float32([[0.0, 1.0], [0.3, 1.32], [0.7, 1.32], [1.0, 1.0], GOAL])


NOISE = 0.1  # standard deviation of the noise on the normalised action (OOO, App. B.1)


def over_the_wall(env: envs.Env, transitions: int, seed: int, policies: list) -> list[dict]:
    """Sub-optimal demonstrations of the point mass: waypoints lead over the wall, every action has noise.

    Returns the first `transitions` rows, or 100 episodes if it is 0.
    """

    def step(carry, key):
        state, target = carry
        near = jnp.linalg.norm(jnp.asarray(WAYPOINTS)[target] - state.obs) < 1.5 * STEP
        target = jnp.minimum(target + near, len(WAYPOINTS) - 1)
        toward = jnp.clip((jnp.asarray(WAYPOINTS)[target] - state.obs) / STEP, -1, 1)
        action = jnp.clip(toward + NOISE * jax.random.normal(key, (2,)), -1, 1)
        reached = env.step(state, action)
        return (reached, target), (
            state.obs,
            action,
            reached.reward,
            reached.obs,
            reached.info["termination"],
            reached.done,
        )

    def demonstration(key):
        start, steps = jax.random.split(key)
        return jax.lax.scan(step, (env.reset(start), jnp.int32(0)), jax.random.split(steps, env.horizon))[1]

    keys = jax.random.split(jax.random.PRNGKey(seed), max(100, transitions // 50))
    obs, action, reward, next_obs, termination, done = map(np.asarray, jax.jit(jax.vmap(demonstration))(keys))
    lengths = done.argmax(1) + 1
    episodes = [
        episode(obs[e, :n], next_obs[e, n - 1], action[e, :n], reward[e, :n], termination[e, :n] > 0)
        for e, n in enumerate(lengths)
    ]
    return cut_to(episodes, transitions) if transitions else episodes[:100]


RECIPES = {
    f"ooo/{name}/over-v0": Recipe(
        name,
        over_the_wall,
        transitions=0,
        description="Noisy demonstrations over the wall (OOO, section 5.1)",
        detail=f"way-points {WAYPOINTS.tolist()}, action noise {NOISE}",
    )
    for name in ("point-mass-wall", "point-mass-wall-sparse")
}
