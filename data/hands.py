"""The behaviours that the hands' datasets record: demonstrations, what behaviour cloning makes of them, and short experts.

Called `(env, transitions, seed, sources) -> episodes` like those of `data/collect.py`. Demonstrations come from a file of recorded ones,
which are replayed, or, where there are none, from a policy of which successful episodes stand in.
"""

import pathlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from data import collect, policy
from data.cloning import clone
from data.datasets import episode
from data.record import cut_to
from envs.adroit import Hand

STAND_INS = 25  # episodes, as many as the human demonstrations
STAND_IN_STEPS = 200
CLONED_STEPS = 200  # of a roll-out, even with the pen, whose other episodes have 100 (the published binary sets)
TRUNCATED_STEPS = 20  # of hammer-truncated-expert (OOO)


@dataclass(frozen=True)
class Demonstrations:
    """Recorded starts and actions: qpos [E, nq], qvel [E, nv], scene [E, m], actions [E][T, A]."""

    path: pathlib.Path
    qpos: np.ndarray
    qvel: np.ndarray
    scene: np.ndarray
    actions: list[np.ndarray]


Source = Demonstrations | policy.Policy


def load_demonstrations(path: str, env: Hand) -> Demonstrations:
    """Reads a .npz of episodes end to end, in hand_dapg's terms: `actions`, `episode_lengths`, `init_qpos`, `init_qvel` and the task's
    own start (door: `door_body_pos`). A ValueError says what is missing or does not fit."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not an .npz file of plain arrays ({error})") from None
    needed = "actions", "episode_lengths", "init_qpos", "init_qvel", *env.demonstrated
    if missing := [key for key in needed if key not in arrays]:
        raise ValueError(f"{path}: no demonstrations of this task, the keys {', '.join(missing)} are missing")
    lengths = arrays["episode_lengths"]
    scene = np.concatenate([arrays[key].reshape(len(lengths), -1) for key in env.demonstrated], axis=1)
    found = [arrays["actions"].shape[-1], *(arrays[key].shape for key in ("init_qpos", "init_qvel")), scene.shape]
    wanted = [env.action_size, *((len(lengths), n) for n in (env.model.nq, env.model.nv, env.sizes[1]))]
    if found != wanted or lengths.sum() != len(arrays["actions"]):
        raise ValueError(f"{path}: actions, positions, velocities and starts of the sizes {found}, not {wanted}")
    actions = np.split(np.float32(arrays["actions"]), np.cumsum(lengths)[:-1])
    return Demonstrations(pathlib.Path(path), *map(np.float32, (arrays["init_qpos"], arrays["init_qvel"], scene)), actions)


def demonstrations(env: Hand, source: Source, seed: int) -> list[dict]:
    """The demonstrations of `source`: recorded ones as the environment replays them, or successful episodes of a policy."""
    if isinstance(source, Demonstrations):
        return replays(env, source)
    found: list[dict] = []
    for attempt in range(20):
        found += stand_ins(env, source, jax.random.PRNGKey(seed + 1000 * attempt))
        if len(found) >= STAND_INS:
            return found[:STAND_INS]
    raise ValueError(f"{len(found)} of 1280 episodes of the policy succeeded; {STAND_INS} are needed to stand in for demonstrations")


def replays(env: Hand, source: Demonstrations) -> list[dict]:
    """D4RL's human data: each episode from its recorded start with its recorded actions, clipped; it ends with its last action."""
    actions = np.zeros((len(source.actions), max(map(len, source.actions)), env.action_size), np.float32)
    for row, own in zip(actions, source.actions):
        row[: len(own)] = np.clip(own, -1, 1)

    def one(qpos, qvel, scene, actions):
        state = env.reset_to(qpos, qvel, scene)
        return state.obs, jax.lax.scan(lambda s, a: ((t := env.step(s, a)), (t.obs, t.reward)), state, actions)[1]

    first, (later, reward) = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(source.qpos, source.qvel, source.scene, actions))
    obs = np.concatenate([first[:, None], later], axis=1)
    lengths = [len(own) for own in source.actions]
    return [episode(obs[e, :n], obs[e, n], actions[e, :n], reward[e, :n], np.zeros(n)) for e, n in enumerate(lengths)]


def stand_ins(env: Hand, actor: policy.Policy, key: jax.Array, attempts: int = 64) -> list[dict]:
    """The successful ones of `attempts` episodes of 200 steps with sampled actions; one that terminates (a pen drops) is none."""

    def one(key):
        start, key = jax.random.split(key)

        def step(state, key):
            noise = jax.random.normal(key, (env.action_size,))
            action = policy.forward(actor, state.obs, noise, jnp)
            reached = env.step(state, action)
            ended = jnp.maximum(reached.info["termination"], reached.info["broken"])
            return reached, (state.obs, action, reached.reward, reached.obs, ended, reached.metrics["success"])

        return jax.lax.scan(step, env.reset(start), jax.random.split(key, STAND_IN_STEPS))[1]

    obs, action, reward, next_obs, ended, success = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(key, attempts)))
    good = np.flatnonzero((success.sum(1) > env.held) & (ended.sum(1) == 0))
    return [episode(obs[e], next_obs[e, -1], action[e], reward[e], np.zeros(STAND_IN_STEPS)) for e in good]


def human(env: Hand, transitions: int, seed: int, sources: list[Source]) -> list[dict]:
    """Recorded demonstrations, replayed."""
    played = demonstrations(env, sources[0], seed)
    return cut_to(played, transitions) if transitions else played


def cloned(env: Hand, transitions: int, seed: int, sources: list[Source]) -> list[dict]:
    """D4RL's cloned data: roll-outs of a policy cloned from the demonstrations, then the demonstrations again and again, half and half."""
    shown = demonstrations(env, sources[0], seed)
    rolled = collect.play(env, transitions // 2, seed, [], clone(shown, seed))
    left = transitions - transitions // 2
    rows = sum(len(e["rewards"]) for e in shown)
    return rolled + cut_to(shown * (left // rows + 1), left)


def mixed(env: Hand, transitions: int, seed: int, sources: list[Source]) -> list[dict]:
    """The papers' binary data: the demonstrations, and `transitions` rows of roll-outs, of 200 steps each, of a policy cloned from them."""
    shown = demonstrations(env, sources[0], seed)
    env.horizon = CLONED_STEPS
    return shown + collect.play(env, transitions, seed, [], clone(shown, seed))


def truncated(env: Hand, transitions: int, seed: int, sources: list[Source]) -> list[dict]:
    """OOO's hammer-truncated-expert: expert episodes of which the first 20 steps are kept."""
    env.horizon = TRUNCATED_STEPS
    return collect.play(env, transitions, seed, sources)
