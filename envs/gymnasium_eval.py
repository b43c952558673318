"""Evaluation in a Gymnasium environment by its id: the benchmark itself, in C MuJoCo, for policies trained on its data.

The dense rewards of `AdroitHand{Door,Hammer,Relocate}-v1` are at fault in gymnasium-robotics 1.2.1 to 1.4.2: the term
that draws the palm to the object is `+0.1 * distance`, where D4RL and 1.2.0 have `-0.1 * distance`. With these versions
`evaluate` subtracts `0.2 * distance`, taken from the observation, so that returns compare with D4RL's reference scores.
The sparse variants (`*Sparse-v1`), the pen and all other versions are left as they are.
"""

import contextlib
import difflib
import re
from collections.abc import Callable
from importlib import metadata

import gymnasium
import numpy as np
from gymnasium.spaces import Box

try:
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
except ImportError:
    gymnasium_robotics = None

FAULTY_VERSIONS = (1, 2, 1), (1, 4, 2)  # of gymnasium-robotics, first and last
PALM_TO_OBJECT = {  # the vector in the observation whose length has the wrong sign in the reward
    "AdroitHandDoor-v1": lambda obs: obs[35:38],
    "AdroitHandHammer-v1": lambda obs: obs[33:36] - obs[36:39],
    "AdroitHandRelocate-v1": lambda obs: obs[30:33],
}
SUCCESS_KEYS = ("success", "is_success", "goal_achieved")


def check(env_id: str) -> tuple[int, int, int]:
    """(observation size, action size, horizon in steps) of an environment that `evaluate` can take; else a ValueError.

    It can take what has a vector of observations, a bounded vector of actions, and a time limit.
    """
    with contextlib.closing(_make(env_id)) as env:
        for name, space in (("observation", env.observation_space), ("action", env.action_space)):
            if not isinstance(space, Box) or len(space.shape) != 1:
                raise ValueError(f"{env_id}: its {name} space is {space}; only vectors (a Box of one dimension) are supported")
        if not env.action_space.is_bounded():
            raise ValueError(f"{env_id}: its action space {env.action_space} has no bounds to map [-1, 1] to")
        if not env.spec.max_episode_steps:
            raise ValueError(f"{env_id}: it has no time limit (max_episode_steps), so an episode might never end")
        return env.observation_space.shape[0], env.action_space.shape[0], env.spec.max_episode_steps


def evaluate(
    env_id: str, act: Callable[[np.ndarray], np.ndarray], num_episodes: int, seed: int, num_policies: int = 1
) -> dict[str, np.ndarray]:
    """Plays `num_episodes` episodes with each of P = `num_policies` policies, all in lock-step, each until it ends.

    `act` maps observations [P, E, obs] to actions [P, E, act] in [-1, 1]: one call a step, so that vmapped policies cost
    one dispatch. Actions are clipped and mapped linearly to the bounds of the environment. Episode e begins in the same state for
    every policy. Returns arrays [P, E]: `success` (0/1, solved at any step), `return` (undiscounted), `length` in steps.
    An action that is not finite ends its own episode with a return of nan: the other policies go on.

    P x E environments live at once, of about 9 MB each for an Adroit hand and 1 MB for a hopper.
    """
    check(env_id)
    tally = {name: np.zeros((num_policies, num_episodes)) for name in ("success", "return", "length")}
    alive = np.ones((num_policies, num_episodes), bool)
    places = list(np.ndindex(alive.shape))
    seeds = np.random.SeedSequence(seed).generate_state(num_episodes)
    with contextlib.ExitStack() as stack:
        envs = {place: stack.enter_context(contextlib.closing(_make(env_id))) for place in places}
        start = [envs[place].reset(seed=int(seeds[place[1]]))[0] for place in places]
        obs = np.reshape(start, (*alive.shape, -1))
        first = envs[places[0]]
        to_box, correction = _action_map(first.action_space), reward_correction(first.spec.id)
        while alive.any():
            action = np.asarray(act(obs), np.float64)
            diverged = alive & ~np.isfinite(action).all(-1)
            tally["return"][diverged] = np.nan
            alive &= ~diverged
            action = to_box(action)
            for place in map(tuple, np.argwhere(alive)):
                obs[place], reward, terminated, truncated, info = envs[place].step(action[place])
                tally["return"][place] += reward + correction(obs[place])
                tally["length"][place] += 1
                tally["success"][place] = max(tally["success"][place], _success(info))
                alive[place] = not (terminated or truncated)
    return tally


def reward_correction(env_id: str) -> Callable[[np.ndarray], float]:
    """What to add to the reward of a step, as a function of the observation [obs] that the step led to. See the module's head."""
    vector = PALM_TO_OBJECT.get(env_id)
    if vector is None or not _is_faulty(metadata.version("gymnasium-robotics")):
        return lambda obs: 0.0
    return lambda obs: -0.2 * float(np.linalg.norm(vector(obs)))


def _is_faulty(version: str) -> bool:
    first, last = FAULTY_VERSIONS
    return first <= tuple(int(number) for number in re.findall(r"\d+", version)[:3]) <= last


def _make(env_id: str) -> gymnasium.Env:
    try:
        return gymnasium.make(env_id, disable_env_checker=True)
    except gymnasium.error.UnregisteredEnv:
        near = difflib.get_close_matches(env_id, gymnasium.registry, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
    except Exception as error:  # whatever keeps an environment from being built, the user can only choose another or install
        reason = next(iter(str(error).splitlines()), "") or "no reason given"
        raise ValueError(f"{env_id} cannot be made: {type(error).__name__}: {reason}") from error
    if gymnasium_robotics is None:
        hint += " gymnasium_robotics is not installed; for its environments (AdroitHand..., PointMaze...): pip install '.[robotics]'"
    raise ValueError(f"there is no Gymnasium environment {env_id!r}{hint}")


def _action_map(space: Box) -> Callable[[np.ndarray], np.ndarray]:
    """The linear map of [-1, 1] onto the box; what lies outside is clipped."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return lambda action: (low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)).astype(space.dtype)


def _success(info: dict) -> float:
    return float(any(np.any(info.get(key, False)) for key in SUCCESS_KEYS))
