"""Makes the datasets that are ours to make, as Minari datasets in our own namespace `ooo/`.

python data/generate.py --dataset ooo/point-mass-wall/over-v0
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import envs
from data import cli, datasets
from envs.point_mass_wall import GOAL, STEP

# The paper's way-points are in a data file that was not published; these lead over the wall (top: y = 1.2 at x = 0.5) at a distance.
WAYPOINTS = np.float32([[0.0, 1.0], [0.3, 1.32], [0.7, 1.32], [1.0, 1.0], GOAL])
NOISE = 0.1  # standard deviation of the noise on the normalised action (OOO, App. B.1)


def over_the_wall(dataset_id: str, env_name: str = "point-mass-wall", episodes: int = 100, seed: int = 0) -> None:
    """Writes `episodes` sub-optimal demonstrations of the point mass: by way-points over the wall, with noise on every action."""
    env = envs.make(env_name)

    def step(carry, key):
        state, target = carry
        near = jnp.linalg.norm(jnp.asarray(WAYPOINTS)[target] - state.obs) < 1.5 * STEP
        target = jnp.minimum(target + near, len(WAYPOINTS) - 1)
        toward = jnp.clip((jnp.asarray(WAYPOINTS)[target] - state.obs) / STEP, -1, 1)
        action = jnp.clip(toward + NOISE * jax.random.normal(key, (2,)), -1, 1)
        reached = env.step(state, action)
        return (reached, target), (state.obs, action, reached.reward, reached.obs, reached.info["termination"], reached.done)

    def episode(key):
        start, steps = jax.random.split(key)
        return jax.lax.scan(step, (env.reset(start), jnp.int32(0)), jax.random.split(steps, env.horizon))[1]

    obs, action, reward, next_obs, termination, done = map(
        np.asarray, jax.jit(jax.vmap(episode))(jax.random.split(jax.random.PRNGKey(seed), episodes))
    )
    written = []
    for e in range(episodes):
        length = int(done[e].argmax()) + 1
        ended = termination[e, :length] > 0
        written.append({
            "observations": np.concatenate([obs[e, :1], next_obs[e, :length]]), "actions": action[e, :length],
            "rewards": reward[e, :length], "terminations": ended, "truncations": (done[e, :length] > 0) & ~ended,
        })  # fmt: skip
    recipe = f"way-points {WAYPOINTS.tolist()}, action noise {NOISE}, seed {seed}, {episodes} episodes in {env_name}"
    datasets.write_minari(dataset_id, written, description="Noisy demonstrations over the wall (OOO, section 5.1)", recipe=recipe)


GENERATED = {f"ooo/{name}/over-v0": partial(over_the_wall, env_name=name) for name in ("point-mass-wall", "point-mass-wall-sparse")}


@dataclass(frozen=True)
class Args:
    """Makes one of our datasets. Loading it by its id makes it too, with these defaults."""

    dataset: str = "ooo/point-mass-wall/over-v0"
    """which one"""
    id: str = ""
    """write it under this id instead"""
    episodes: int = 100
    """episodes"""
    seed: int = 0
    """seed of all noise"""


def main() -> None:
    args = tyro.cli(Args)
    if args.dataset not in GENERATED:
        raise cli.UsageError(f"--dataset {args.dataset}: not one of {', '.join(GENERATED)}")
    if args.episodes < 1:
        raise cli.UsageError(f"--episodes must be at least 1, not {args.episodes}")
    GENERATED[args.dataset](args.id or args.dataset, episodes=args.episodes, seed=args.seed)
    datasets.print_card(datasets.load(args.id or args.dataset).card)


if __name__ == "__main__":
    cli.guarded(main)
