"""Datasets of the Adroit hands: demonstrations, roll-outs of policies cloned from them, and expert episodes.

Demonstrations are read from a file and replayed. If there is no file, successful episodes of a policy replace
them.
"""

import pathlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ooo_rl.data import policy
from ooo_rl.data.datasets.write import cut_to, episode
from ooo_rl.data.recipes.cloning import clone
from ooo_rl.data.recipes.episodes import actions_of, is_sampled, play
from ooo_rl.data.recipes.recipe import Recipe
from ooo_rl.envs.adroit import Hand

STAND_INS = 25  # episodes that replace demonstrations: as many as there are human demonstrations
STAND_IN_STEPS = 200  # steps of such an episode
# Steps of a roll-out of a cloned policy, as in the published binary datasets. This holds for the pen too,
# though its other episodes have 100 steps.
CLONED_STEPS = 200
TRUNCATED_STEPS = 20  # steps of an episode in hammer-truncated-expert (OOO)


@dataclass(frozen=True)
class Demonstrations:
    """The starts and actions of E recorded episodes.

    The shapes are qpos [E, nq], qvel [E, nv], scene [E, m], and actions [E][T, A]. `scene` is the part of a
    start that belongs to the task, such as the position of the door.
    """

    path: pathlib.Path
    qpos: np.ndarray
    qvel: np.ndarray
    scene: np.ndarray
    actions: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.actions)


Source = Demonstrations | policy.Policy


def load_demonstrations(path: str, env: Hand) -> Demonstrations:
    """Reads demonstrations from the .npz file `path`, in which episodes follow one another.

    The keys are hand_dapg's: `actions`, `episode_lengths`, `init_qpos`, `init_qvel`, and those of the task's
    start (door: `door_body_pos`). Raises ValueError, which says what is missing or does not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except policy.NO_ARRAYS as error:
        raise ValueError(f"{path}: not an .npz file of plain arrays ({error})") from None
    needed = "actions", "episode_lengths", "init_qpos", "init_qvel", *env.demonstrated
    if missing := [key for key in needed if key not in arrays]:
        raise ValueError(f"{path}: no demonstrations of this task, the keys {', '.join(missing)} are missing")
    lengths = arrays["episode_lengths"]
    scene = np.concatenate([arrays[key].reshape(len(lengths), -1) for key in env.demonstrated], axis=1)
    found = [
        arrays["actions"].shape[-1],
        *(arrays[key].shape for key in ("init_qpos", "init_qvel")),
        scene.shape,
    ]
    wanted = [env.action_size, *((len(lengths), n) for n in (env.model.nq, env.model.nv, env.sizes[1]))]
    if found != wanted or lengths.sum() != len(arrays["actions"]):
        raise ValueError(
            f"{path}: actions, positions, velocities and starts have the sizes {found}, "
            f"this task needs {wanted}; episode_lengths add up to {lengths.sum()} "
            f"for {len(arrays['actions'])} actions"
        )
    actions = np.split(np.float32(arrays["actions"]), np.cumsum(lengths)[:-1])
    return Demonstrations(
        pathlib.Path(path), *map(np.float32, (arrays["init_qpos"], arrays["init_qvel"], scene)), actions
    )


def demonstrations(env: Hand, source: Source, seed: int) -> list[dict]:
    """The demonstrations of `source`: recorded ones, replayed in `env`, or successful episodes of a policy.

    Raises ValueError if fewer than 25 of 1280 episodes of the policy succeed.
    """
    if isinstance(source, Demonstrations):
        return replays(env, source)
    found: list[dict] = []
    for attempt in range(20):
        found += stand_ins(env, source, jax.random.PRNGKey(seed + 1000 * attempt))
        if len(found) >= STAND_INS:
            return found[:STAND_INS]
    raise ValueError(
        f"{len(found)} of 1280 episodes of the policy succeeded; {STAND_INS} are needed in place of "
        "demonstrations. Give a better --policy, or --demonstrations FILE"
    )


def replays(env: Hand, source: Demonstrations) -> list[dict]:
    """D4RL's human data: each episode begins at its recorded start and plays its recorded actions.

    The actions are clipped to [-1, 1]. The episode ends with its last action.
    """
    actions = np.zeros((len(source.actions), max(map(len, source.actions)), env.action_size), np.float32)
    for row, own in zip(actions, source.actions):
        row[: len(own)] = np.clip(own, -1, 1)

    def one(qpos, qvel, scene, actions):
        state = env.reset_to(qpos, qvel, scene)
        return state.obs, jax.lax.scan(
            lambda s, a: ((t := env.step(s, a)), (t.obs, t.reward)), state, actions
        )[1]

    first, (later, reward) = jax.tree.map(
        np.asarray, jax.jit(jax.vmap(one))(source.qpos, source.qvel, source.scene, actions)
    )
    obs = np.concatenate([first[:, None], later], axis=1)
    lengths = [len(own) for own in source.actions]
    return [
        episode(obs[e, :n], obs[e, n], actions[e, :n], reward[e, :n], np.zeros(n))
        for e, n in enumerate(lengths)
    ]


def stand_ins(env: Hand, actor: policy.Policy, key: jax.Array, attempts: int = 64) -> list[dict]:
    """The successful ones of `attempts` episodes of 200 steps with actions sampled from the policy `actor`.

    An episode is successful if more than `env.held` of its steps are. An episode that terminates (the pen
    falls) does not count.
    """

    def one(key):
        start, key = jax.random.split(key)

        def step(state, key):
            noise = jax.random.normal(key, (env.action_size,))
            action = policy.forward(actor, state.obs, noise, jnp)
            reached = env.step(state, action)
            ended = jnp.maximum(reached.info["termination"], reached.info["broken"])
            return reached, (
                state.obs,
                action,
                reached.reward,
                reached.obs,
                ended,
                reached.metrics["success"],
            )

        return jax.lax.scan(step, env.reset(start), jax.random.split(key, STAND_IN_STEPS))[1]

    obs, action, reward, next_obs, ended, success = jax.tree.map(
        np.asarray, jax.jit(jax.vmap(one))(jax.random.split(key, attempts))
    )
    good = np.flatnonzero((success.sum(1) > env.held) & (ended.sum(1) == 0))
    return [episode(obs[e], next_obs[e, -1], action[e], reward[e], np.zeros(STAND_IN_STEPS)) for e in good]


def human(env: Hand, transitions: int, seed: int, sources: list[Source]) -> list[dict]:
    """D4RL's human data: the first `transitions` rows of the demonstrations, or all of them if it is 0."""
    played = demonstrations(env, sources[0], seed)
    return cut_to(played, transitions) if transitions else played


def cloned(env: Hand, transitions: int, seed: int, sources: list[Source]) -> list[dict]:
    """D4RL's cloned data: one half is roll-outs of a policy cloned from the demonstrations.

    The other half is the demonstrations, repeated until there are enough rows.
    """
    shown = demonstrations(env, sources[0], seed)
    rolled = play(env, transitions // 2, seed, [], clone(shown, seed))
    left = transitions - transitions // 2
    rows = sum(len(e["rewards"]) for e in shown)
    return rolled + cut_to(shown * (left // rows + 1), left)


def mixed(env: Hand, transitions: int, seed: int, sources: list[Source]) -> list[dict]:
    """The binary data of AWAC and OOO: the demonstrations, and roll-outs of a policy cloned from them.

    The roll-outs have 200 steps each, and `transitions` rows in all.
    """
    shown = demonstrations(env, sources[0], seed)
    env.horizon = CLONED_STEPS
    return shown + play(env, transitions, seed, [], clone(shown, seed))


def truncated(env: Hand, transitions: int, seed: int, sources: list[Source]) -> list[dict]:
    """OOO's hammer-truncated-expert: the first 20 steps of expert episodes."""
    env.horizon = TRUNCATED_STEPS
    return play(env, transitions, seed, sources)


def _about_expert(sources: list[Source], episodes: list[dict]) -> str:
    """The description of expert data. D4RL's has sampled actions, so that of mean actions is not D4RL's."""
    (actor,) = sources
    return f"{actions_of(actor)} of an expert policy{' (D4RL)' if is_sampled(actor) else ''}"


def _about_mixed(sources: list[Source], episodes: list[dict]) -> str:
    """The description of what `mixed` made."""
    shown = len(sources[0]) if isinstance(sources[0], Demonstrations) else STAND_INS
    rolled = _counted(len(episodes) - shown, "roll-out")
    return f"Demonstrations, and {rolled} of a policy cloned from them (AWAC, OOO)"


def _about_truncated(sources: list[Source], episodes: list[dict]) -> str:
    """The description of what `truncated` made."""
    return f"The first {TRUNCATED_STEPS} steps of {_counted(len(episodes), 'expert episode')} (OOO)"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' if number != 1 else ''}"


# Task -> D4RL's number of rows.
HANDS = {"door": 1_000_000, "hammer": 1_000_000, "pen": 500_000, "relocate": 1_000_000}


def _of_hand(task: str, rows: int) -> dict[str, Recipe]:
    """The recipes of one hand, under D4RL's names."""
    half = "Half roll-outs of a policy cloned from demonstrations, half these, repeated (D4RL)"
    return {
        f"ooo/{task}/human-v0": Recipe(
            task, human, 0, "Human demonstrations, replayed", demonstrations="file", read=load_demonstrations
        ),
        f"ooo/{task}/expert-v0": Recipe(task, play, rows, _about_expert, policies=(1,)),
        f"ooo/{task}/cloned-v0": Recipe(
            task, cloned, rows, half, demonstrations="any", read=load_demonstrations
        ),
    }


def _binary(task: str) -> Recipe:
    """The recipe of AWAC's and OOO's data for a task that rewards only success."""
    env, rows = f"{task}-binary", 500 * CLONED_STEPS
    also, read = (f"{env}-ending",), load_demonstrations
    return Recipe(env, mixed, rows, _about_mixed, also=also, demonstrations="any", read=read)


RECIPES = {name: recipe for task, rows in HANDS.items() for name, recipe in _of_hand(task, rows).items()}
RECIPES |= {f"ooo/{task}-binary/mixed-v0": _binary(task) for task in ("door", "pen", "relocate")}
RECIPES["ooo/hammer-truncated-expert/expert-v0"] = Recipe(
    "hammer-truncated-expert",
    truncated,
    5_000 * TRUNCATED_STEPS,
    _about_truncated,
    policies=(1,),
)
