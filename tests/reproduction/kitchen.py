"""Whether our kitchen is D4RL's: one step from many states, and the human demonstrations, on each engine.

    python tests/reproduction/kitchen.py parity --precision 64
    python tests/reproduction/kitchen.py replay --engines mujoco:d4rl mujoco:mjx mjx:mjx

The reference is C MuJoCo with gymnasium-robotics' XML file, stepped by code that is not ours: D4RL's pedestal
and contact margins are set here as well. `parity` takes one step of the environment from states of three
kinds: those of the demonstrations, with N(0, 0.3^2) added to their actions, and those to which smooth or
white random actions lead, from the start and from states of the demonstrations. Sensors have no noise there.
`replay` plays the recorded controls of all demonstrations and counts the sub-tasks that they solve. `draw`
draws a demonstration, below it an episode made of pieces, in which the scripted expert turns both knobs, and
below that an episode of `--policy`. It prints what each of them solved.
"""

import functools
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import tyro

from ooo_rl import envs
from ooo_rl.data.figures import render
from ooo_rl.data.recipes import kitchen as recipes
from ooo_rl.envs import robotics

RAW = pathlib.Path(__file__).parents[3] / "shared" / "datasets" / "raw" / "kitchen_complete_human"
LOW = np.array([-2.9, -1.8, -2.9, -3.1, -2.9, 0, -2.9, 0, 0])
HIGH = np.array([2.9, 1.8, 2.9, 0, 2.9, 3.8, 2.9, 0.04, 0.04])


@dataclass(frozen=True)
class Args:
    """Compares the kitchen with C MuJoCo, and replays human demonstrations in it."""

    what: Annotated[Literal["parity", "replay", "draw"], tyro.conf.Positional]
    """what to do"""
    engines: tuple[str, ...] = ("mujoco:d4rl", "mujoco:mjx", "mjx:mjx")
    """engine:model pairs of ours"""
    demonstrations: pathlib.Path = RAW / "kitchen_complete_human.npz"
    """file of the human demonstrations"""
    states: int = 150
    """states of each kind"""
    noise: float = 0.1
    """scale of the sensors' noise in replays"""
    precision: int = 32
    """bits of JAX's floating-point numbers: 32 or 64"""
    seed: int = 0
    """seed of states, actions and noise"""
    policy: pathlib.Path | None = None
    """file of a policy, whose mean action plays an episode that is drawn, too"""
    out: pathlib.Path = pathlib.Path("kitchen.png")
    """file of the drawing"""


class Reference:
    """The kitchen by hand."""

    def __init__(self):
        path = robotics.assets() / "kitchen_franka" / "kitchen_assets" / "kitchen_env_model.xml"
        self.model = mujoco.MjModel.from_xml_path(str(path))
        self.model.geom_margin[self.model.geom_margin > 0] = 0.0005
        pedestal = np.isclose(self.model.geom_size[:, 0], 0.12) & (self.model.geom_type == 5)
        self.model.geom_contype[pedestal] = self.model.geom_conaffinity[pedestal] = 0
        self.data = mujoco.MjData(self.model)

    def put(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel

    def step(self, action: np.ndarray) -> np.ndarray:
        self.data.ctrl[:] = np.clip(self.data.qpos[:9] + 0.16 * action, LOW, HIGH)
        mujoco.mj_step(self.model, self.data, 40)
        return self.data.qpos.copy()


def states(args: Args, theirs: Reference) -> dict[str, list[tuple]]:
    """Kind of state -> (qpos, qvel, action) with numbers of float32, so that all engines begin alike."""
    rng, kinds = np.random.default_rng(args.seed), {}
    with np.load(args.demonstrations) as file:
        recorded = {key: file[key] for key in ("qpos", "qvel", "actions")}
    short = lambda *x: tuple(np.float64(np.float32(part)) for part in x)  # noqa: E731
    rows = rng.choice(len(recorded["qpos"]), args.states, replace=False)
    nearly = np.clip(recorded["actions"][rows] + rng.normal(0, 0.3, (args.states, 9)), -1, 1)
    kinds["demonstrations"] = [
        short(recorded["qpos"][row], recorded["qvel"][row], action) for row, action in zip(rows, nearly)
    ]
    start = np.asarray(
        jax.jit(envs.make("kitchen-complete", "mujoco", noise=0).reset)(jax.random.PRNGKey(0)).obs
    )[:30]
    for kind in ("smooth", "white"):
        found: list[tuple] = []
        while len(found) < args.states:
            qpos, qvel = start, np.zeros(29)
            if rng.random() < 0.5:
                row = rng.integers(len(recorded["qpos"]))
                qpos, qvel = recorded["qpos"][row], recorded["qvel"][row]
            theirs.put(qpos, qvel)
            action = np.zeros(9)
            for step in range(60):
                action = (
                    0.9 * action + 0.4 * rng.normal(size=9) if kind == "smooth" else rng.uniform(-1, 1, 9)
                )
                action = np.clip(action, -1, 1)
                if step % 6 == 5:
                    found.append(short(theirs.data.qpos, theirs.data.qvel, action))
                theirs.step(action)
        kinds[f"{kind} random actions"] = found[: args.states]
    return kinds


@functools.cache
def program(engine: str) -> Callable:
    """The compiled function from 10 states to the positions [10, 30] after one step of ours."""
    physics, model = engine.split(":")
    env = envs.make("kitchen-complete", physics, model=model, noise=0)

    def step(qpos, qvel, action):
        return env.step(env.reset_to(qpos, qvel), action).pipeline_state.body.qpos

    return jax.jit(jax.vmap(step), compiler_options=env.compiler_options)


def one_steps(engine: str, found: list[tuple]) -> np.ndarray:
    """The positions [N, 30] after one step of ours from each state."""
    columns = [np.stack(column).astype(jnp.zeros(()).dtype) for column in zip(*found)]
    parts = [program(engine)(*(x[i : i + 10] for x in columns)) for i in range(0, len(found), 10)]
    return np.concatenate([np.asarray(part, np.float64) for part in parts])


def parity(args: Args) -> None:
    theirs = Reference()
    kinds = states(args, theirs)
    pairs = [("C", "C, 1e-7 apart")]
    pairs += [("C", engine) for engine in args.engines if engine.startswith("mujoco")]
    pairs += [
        (f"mujoco:{engine.partition(':')[2]}", engine) for engine in args.engines if engine.startswith("mjx")
    ]
    print(
        "| state | engine | against | robot: median | 90 % | 99 % | largest | objects: median | 90 % | 99 % | largest |"
    )
    print("|---|---|---|" + "--:|" * 8)
    for kind, found in kinds.items():
        after: dict[str, np.ndarray] = {}
        for name, scale in (("C", 1), ("C, 1e-7 apart", 1 + 1e-7)):
            rows = []
            for qpos, qvel, action in found:
                theirs.put(qpos * scale, qvel)
                rows.append(theirs.step(action))
            after[name] = np.stack(rows)
        for against, engine in pairs:
            for name in (against, engine):
                if name not in after:
                    after[name] = one_steps(name, found)
            error = np.abs(after[engine] - after[against])
            cells = [
                f"{q:.0e}"
                for part in (error[:, :9], error[:, 9:])
                for q in np.quantile(part.max(1), (0.5, 0.9, 0.99, 1))
            ]
            print(f"| {kind} | {engine} | {against} | {' | '.join(cells)} |", flush=True)


def replay(args: Args) -> None:
    for engine in args.engines:
        physics, model = engine.split(":")
        env = envs.make("kitchen-complete", physics, model=model, noise=args.noise)
        source, began = recipes.load_demonstrations(str(args.demonstrations), env), time.perf_counter()
        played = recipes.replays(env, source, jax.random.PRNGKey(args.seed))
        with np.load(args.demonstrations) as file:
            seen = np.split(file["observations"][:, 18:39], file["episode_ends"][:-1])
        solved = [int(episode["rewards"][-1]) for episode in played]
        gaps = [np.abs(e["observations"][:-1, 9:30] - own).mean() for e, own in zip(played, seen)]
        print(
            f"{engine:12} f{args.precision} noise {args.noise}: {sum(solved)} of {4 * len(solved)} sub-tasks, "
            f"objects {np.mean(gaps):.1e} from the recorded ones on average, {time.perf_counter() - began:.0f} s",
            flush=True,
        )


def draw_episodes(args: Args) -> None:
    env, rng = envs.make("kitchen-complete", "mujoco"), np.random.default_rng(args.seed)
    source = recipes.load_demonstrations(str(args.demonstrations), env)
    ways, home = recipes.segments(env, source, rng), source.controls[0][0]
    order = ("kettle", "bottom burner", "top burner", "slide cabinet")
    key, planned = jax.random.PRNGKey(args.seed), [recipes.plan(ways, order, home, rng)]
    shown = [recipes.replays(env, source, key)[0], recipes.played(env, key, planned)[0]]
    tracks, rows = [render.Track(played["observations"][:, :30], None) for played in shown], []
    if args.policy:
        actor = render.load_actor(str(args.policy), env, "kitchen-complete", sample=False)
        tracks += render.play(env, actor, key)
    for track in tracks:
        print(*(name for name in recipes.ORDER if recipes.solved(track.places, name).any()), sep=", ")
        which = np.linspace(0, len(track.places) - 1, 6).astype(int)
        rows.append(list(render.draw(env, track, which, 240, 180)))
    render.write_strip(args.out, rows)


if __name__ == "__main__":
    given = tyro.cli(Args)
    jax.config.update("jax_enable_x64", given.precision == 64)
    {"parity": parity, "replay": replay, "draw": draw_episodes}[given.what](given)
