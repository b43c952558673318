"""Evaluation in a Gymnasium environment, by its id.

This is the benchmark itself, in C MuJoCo, for policies that were trained on its data.

The dense rewards of `AdroitHand{Door,Hammer,Relocate}-v1` are wrong in gymnasium-robotics 1.2.1 to 1.4.2.
The term that pulls the palm to the object is `+0.1 * distance` there, while D4RL and version 1.2.0 have
`-0.1 * distance`. With these versions `evaluate` subtracts `0.2 * distance`, computed from the observation.
Returns can then be compared with D4RL's reference scores. The sparse variants (`*Sparse-v1`), the pen and
all other versions are left as they are.
"""

import contextlib
import difflib
import re
from collections.abc import Callable
from importlib import metadata

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Space

try:
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
except ImportError:
    gymnasium_robotics = None

FAULTY_VERSIONS = (1, 2, 1), (1, 4, 2)  # the first and the last, of gymnasium-robotics
PALM_TO_OBJECT = {  # from the observation, the vector whose length has the wrong sign in the reward
    "AdroitHandDoor-v1": lambda obs: obs[35:38],
    "AdroitHandHammer-v1": lambda obs: obs[33:36] - obs[36:39],
    "AdroitHandRelocate-v1": lambda obs: obs[30:33],
}
SUCCESS_KEYS = ("success", "is_success", "goal_achieved")


def check(env_id: str) -> tuple[int, int, int, bool]:
    """Checks that `evaluate` supports an environment.

    Returns (observation size, action size, horizon in steps, whether actions are discrete). The environment
    must have vectors as observations, a time limit, and as actions vectors with finite bounds or, Discrete,
    whole numbers; then the action size is how many there are. Raises ValueError if it has not, or if there is
    no environment `env_id`.
    """
    with contextlib.closing(_make(env_id)) as env:
        discrete = isinstance(env.action_space, Discrete)
        for name, space in (("observation", env.observation_space), ("action", env.action_space)):
            is_vector = isinstance(space, Box) and len(space.shape) == 1
            if not (is_vector or (name == "action" and discrete)):
                or_whole = ", or Discrete" * (name == "action")
                raise ValueError(
                    f"{env_id}: its {name} space is {space}; it must be a vector (a Box of one dimension)"
                    + or_whole
                )
        if not discrete and not env.action_space.is_bounded():
            raise ValueError(
                f"{env_id}: its action space {env.action_space} must have finite bounds, to map [-1, 1] to"
            )
        if not env.spec.max_episode_steps:
            raise ValueError(
                f"{env_id}: it must have a time limit (max_episode_steps), or an episode might never end"
            )
        action_size = int(env.action_space.n) if discrete else env.action_space.shape[0]
        return env.observation_space.shape[0], action_size, env.spec.max_episode_steps, discrete


def evaluate(
    env_id: str, act: Callable[[np.ndarray], np.ndarray], num_episodes: int, seed: int, num_policies: int = 1
) -> dict[str, np.ndarray]:
    """Plays E = `num_episodes` episodes with each of P = `num_policies` policies, all in lock-step.

    `act` maps observations [P, E, obs] to actions [P, E, act] in [-1, 1], or to numbers [P, E] from 0 on if
    they are discrete. It is called once per step, so that vmapped policies cost one dispatch. Actions in
    [-1, 1] are clipped, and mapped linearly to the environment's bounds.
    Episode e begins in the same state for every policy. Each episode is played until it ends.

    Returns arrays [P, E]: `success` (0/1, solved at any step), `return` (undiscounted) and `length` (steps).
    An action that is not finite ends its own episode, with a return of nan; all other episodes go on. Raises
    ValueError as `check` does.

    P x E environments exist at the same time: about 9 MB each for an Adroit hand, and 1 MB for a hopper.
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
            diverged = alive & ~np.isfinite(action).reshape(*alive.shape, -1).all(-1)
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
    """The number to add to a step's reward, as a function of the observation [obs] after the step.

    The module docstring says why. It is 0 for environments and versions without the fault.
    """
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
    except Exception as error:
        # Whatever went wrong, the user can only choose another environment or install a package.
        reason = next(iter(str(error).splitlines()), "") or "no reason given"
        raise ValueError(f"{env_id} cannot be made: {type(error).__name__}: {reason}") from error
    if gymnasium_robotics is None:
        hint += (
            " gymnasium_robotics is not installed; for AdroitHand..., PointMaze...: pip install '.[robotics]'"
        )
    raise ValueError(f"there is no Gymnasium environment {env_id!r}{hint}")


def _action_map(space: Space) -> Callable[[np.ndarray], np.ndarray]:
    """The linear map of [-1, 1] onto the box; actions outside [-1, 1] are clipped first.

    Of a discrete space: the map of 0, 1 ... onto its numbers.
    """
    if isinstance(space, Discrete):
        return lambda action: space.start + action.astype(space.dtype)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return lambda action: (low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)).astype(space.dtype)


def _success(info: dict) -> float:
    return float(any(np.any(info.get(key, False)) for key in SUCCESS_KEYS))
