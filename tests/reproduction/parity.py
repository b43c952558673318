"""How far each engine's environments are from the benchmark's own, transition by transition and over whole
trajectories.

    python tests/reproduction/parity.py --precision 64 --json parity64.json
    python tests/reproduction/parity.py --precision 32 --engines mujoco mjx --json parity32.json

The reference is C MuJoCo behind code that is not ours: Gymnasium's v4 tasks, gymnasium-robotics' AntMaze and
hands (with D4RL's sign in the reward and end of the pen), and for D4RL's AntMaze an XML text put together
here. Its contact margins are halved, as ours are (docs/locomotion.md says why); on MJX, the hands are edited
further (docs/adroit.md), and compared with our C engine on that model. States are those that random actions
lead to, and expert ones where policies are given; from each, both take one step with the same action.
"""

import functools
import json
import pathlib
import re
import sys
import time
from dataclasses import dataclass

import jax
import numpy as np
import tyro

FOLDER = pathlib.Path(__file__).parents[3] / "shared" / "policies"
EXPERTS = {"halfcheetah": "dlr_tqc", "hopper": "cs285_expert", "walker2d": "cs285_expert", "ant": "dlr_trpo"}
IDS = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
HAND_IDS = {
    "door": "AdroitHandDoor-v1",
    "hammer": "AdroitHandHammer-v1",
    "pen": "AdroitHandPen-v1",
    "relocate": "AdroitHandRelocate-v1",
}
MAZE_IDS = {"umaze": "AntMaze_UMaze-v4", "medium": "AntMaze_Medium-v4", "large": "AntMaze_Large-v4"}
EVERY = (
    *IDS,
    "halfcheetah-sparse",
    "ant-sparse",
    "antmaze-umaze",
    "antmaze-medium-diverse",
    "antmaze-large-diverse",
    "antmaze-umaze-gymnasium",
    *HAND_IDS,
    "pen-binary",
)


@dataclass(frozen=True)
class Args:
    """Measures the errors of one step, and how trajectories part."""

    envs: tuple[str, ...] = EVERY
    """environments"""
    engines: tuple[str, ...] = ("mujoco", "mjx")
    """engines"""
    precision: int = 32
    """bits of JAX's floating-point numbers: 32 or 64"""
    states: int = 1000
    """states per environment and kind of action"""
    horizon: int = 1000
    """steps of the diverging trajectories; 0: none"""
    policies: pathlib.Path = FOLDER
    """folder of expert policies, <body>/<name>.npz; without it, actions are random only"""
    json: str = ""
    """file to write the numbers to as well"""
    seed: int = 0
    """seed of states and actions"""


class GymBody:
    """One of Gymnasium's v4 bodies, put into states and stepped."""

    def __init__(self, env_id: str):
        import gymnasium

        self.env = gymnasium.make(env_id, disable_env_checker=True).unwrapped
        self.model, self.data = self.env.model, self.env.data
        self.model.geom_margin[:] *= 0.5

    def put(self, qpos, qvel, goal=None):
        self.env.set_state(np.array(qpos), np.array(qvel))

    def step(self, action):
        obs, reward, terminated, *_ = self.env.step(np.array(action))
        return obs, reward, terminated


class GymSparse(GymBody):
    """The sparse tasks by their definition (LOGO, OOO): 1 if the root is more than `threshold` ahead of where
    the episode began."""

    def __init__(self, env_id: str, threshold: float, shows_x: bool):
        super().__init__(env_id)
        self.threshold, self.shows_x = threshold, shows_x

    def put(self, qpos, qvel, goal=None):
        super().put(qpos, qvel)
        self.origin = float(qpos[0])

    def step(self, action):
        obs, *_ = super().step(action)
        x = self.data.body("torso").xpos[0] if self.shows_x else self.data.qpos[0]
        return (
            np.concatenate([self.data.qpos[:1], obs]) if self.shows_x else obs,
            float(x - self.origin > self.threshold),
            False,
        )


class RoboticsMaze(GymBody):
    """gymnasium-robotics' AntMaze with D4RL's layout of the observation."""

    def __init__(self, env_id: str):
        import gymnasium
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
        self.maze = gymnasium.make(
            env_id, continuing_task=False, reward_type="sparse", disable_env_checker=True
        ).unwrapped
        self.maze.reset(seed=0)
        self.env = self.maze.ant_env
        self.model, self.data = self.env.model, self.env.data
        self.model.geom_margin[:] *= 0.5

    def put(self, qpos, qvel, goal=None):
        super().put(qpos, qvel)
        self.maze.goal = np.array(goal)

    def step(self, action):
        _, reward, terminated, *_ = self.maze.step(np.array(action))
        return np.concatenate([self.data.qpos, self.data.qvel]), reward, terminated


class RoboticsHand(GymBody):
    """gymnasium-robotics' hands, as D4RL has them; the goal is our scene."""

    def __init__(self, name: str):
        import gymnasium
        import gymnasium_robotics

        from ooo_rl.envs import gymnasium_eval

        gymnasium.register_envs(gymnasium_robotics)
        task, _, self.binary = name.partition("-")
        self.env = gymnasium.make(HAND_IDS[task], disable_env_checker=True).unwrapped
        self.model, self.data = self.env.model, self.env.data
        self.model.geom_margin[:] = (
            0.00025  # each pair has 0.5 mm, as before MuJoCo 3.5, the board's pairs too
        )
        self.env.reset(seed=0)  # measures the pen
        self.fixtures = {
            "door": [self.model.body_pos[self.model.body("frame").id]] if task == "door" else [],
            "hammer": [self.model.body_pos[self.model.body("nail_board").id]] if task == "hammer" else [],
            "pen": [self.model.body_quat[self.model.body("target").id]] if task == "pen" else [],
            "relocate": [
                self.model.body_pos[self.model.body("Object").id],
                self.model.site_pos[self.model.site("target").id],
            ]
            if task == "relocate"
            else [],
        }[task]
        self.correction = gymnasium_eval.reward_correction(HAND_IDS[task])
        self.pen = self.model.body("Object").id if name == "pen" else None

    def put(self, qpos, qvel, goal=None):
        for fixture, numbers in zip(self.fixtures, np.split(np.array(goal), len(self.fixtures))):
            fixture[:] = numbers
        super().put(qpos, qvel)
        self.data.qacc_warmstart[:] = 0  # a state has no history

    def step(self, action):
        obs, reward, *_, info = self.env.step(np.array(action))
        self.success = bool(info["success"])
        dropped = self.pen is not None and self.data.xpos[self.pen][2] < 0.075
        return obs, self.success - 1.0 if self.binary else reward + self.correction(obs), bool(dropped)


class OurC:
    """Our own environment on the C engine with the model that MJX is given: the engines differ, and nothing
    else."""

    def __init__(self, name: str):
        from ooo_rl import envs

        self.env, self.model = envs.make(name, "mujoco", model="mjx"), None
        self.begin, self.advance = jax.jit(self.env.reset_to), jax.jit(self.env.step)

    def put(self, qpos, qvel, goal=None):
        self.state = self.begin(qpos, qvel, goal)

    def step(self, action):
        self.state = self.advance(self.state, action)
        obs, ended = np.asarray(self.state.obs, np.float64), bool(self.state.info["termination"])
        return obs, float(self.state.reward), ended


class D4RLMaze:
    """D4RL's AntMaze from text: Gymnasium's ant.xml with D4RL's numbers, and a box for every wall cell."""

    def __init__(self, maze: tuple[str, ...]):
        import gymnasium
        import mujoco

        text = (pathlib.Path(gymnasium.__file__).parent / "envs/mujoco/assets/ant.xml").read_text()
        text = (
            text.replace('timestep="0.01"', 'timestep="0.02"')
            .replace('gear="150"', 'gear="1"')
            .replace('ctrlrange="-1.0 1.0"', 'ctrlrange="-30 30"')
        )
        text = re.sub(
            r'(<geom conaffinity="0" [^>]*)margin="0.01"',
            r'\1margin="0.005" solref=".02 1" solimp=".8 .8 .01"',
            text,
        )
        boxes = "".join(
            f'<geom type="box" pos="{4 * (c - 1)} {4 * (r - 1)} 1" size="2 2 1" contype="1" conaffinity="1"/>'
            for r, row in enumerate(maze) for c, mark in enumerate(row) if mark == "#"
        )  # fmt: skip
        self.model = mujoco.MjModel.from_xml_string(text.replace("</worldbody>", boxes + "</worldbody>"))
        self.data, self.mujoco = mujoco.MjData(self.model), mujoco

    def put(self, qpos, qvel, goal=None):
        self.mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:], self.goal = qpos, qvel, np.array(goal)
        self.mujoco.mj_forward(self.model, self.data)

    def step(self, action):
        self.data.ctrl[:] = 30 * np.array(action)
        self.mujoco.mj_step(self.model, self.data, 5)
        reached = np.linalg.norm(self.data.qpos[:2] - self.goal) <= 0.5
        return np.concatenate([self.data.qpos, self.data.qvel]), float(reached), bool(reached)


def reference(name: str, engine: str = "mujoco"):
    """The benchmark's own environment for one of ours."""
    from ooo_rl.envs.antmaze import MAZES

    if name in IDS:
        return GymBody(IDS[name])
    if name.partition("-")[0] in HAND_IDS:
        return RoboticsHand(name) if engine == "mujoco" else OurC(name)
    if name.endswith("-sparse"):
        body = name.removesuffix("-sparse")
        return GymSparse(IDS[body], 20.0 if body == "halfcheetah" else 10.0, body == "ant")
    maze = name.split("-")[1]
    return RoboticsMaze(MAZE_IDS[maze]) if name.endswith("-gymnasium") else D4RLMaze(MAZES[maze])


def sample_states(name: str, args: Args) -> list[tuple]:
    """(qpos, qvel, goal, action) on the way of random and expert actions, with a new start after an episode's
    end or 200 steps."""
    from ooo_rl.data import policy

    rng, ours, theirs = np.random.default_rng(args.seed), make(name, "mujoco"), reference(name)
    start, body = starter(name, "mujoco"), name.split("-")[0]
    file = args.policies / body / f"{EXPERTS.get(body, 'none')}.npz"
    actors = [None] + ([policy.load(file)] if file.is_file() and not name.endswith("sparse") else [])
    states, touching = [], 0
    for actor in actors:
        own, age = [], 10**9
        while len(own) < args.states:
            if age >= 200:
                inner, age = start(jax.random.PRNGKey(int(rng.integers(2**31)))), 0
                body_state = getattr(inner, "body", inner)
                goal = goal_of(inner)
                qpos = np.array(body_state.qpos, np.float64)
                if "maze" in name:  # near the walls, so that they are touched
                    qpos[:2] += rng.uniform(-1.5, 1.5, 2)
                theirs.put(qpos, np.asarray(body_state.qvel, np.float64), goal)
                obs = None
            action = (
                rng.uniform(-1, 1, ours.action_size)
                if actor is None or obs is None
                else policy.act(actor, obs, rng)
            )
            action = np.float64(np.float32(np.clip(action, -1, 1)))
            qpos, qvel = (np.float64(np.float32(x)) for x in (theirs.data.qpos, theirs.data.qvel))
            if age % 4 == 3:
                near = goal
                if "maze" in name and rng.random() >= 0.8:
                    near = np.float64(np.float32(qpos[:2] + rng.uniform(-0.6, 0.6, 2)))  # rewarded steps too
                own.append((qpos, qvel, near, action))
                touching += bool(theirs.data.ncon)
            obs, _, ended = theirs.step(action)
            age = 10**9 if ended and rng.random() < 0.5 else age + 1
        states += own
    print(f"{name}: {touching} of {len(states)} states touch something", file=sys.stderr)
    return states


def goal_of(inner) -> np.ndarray:
    """What an episode draws besides the body's state: a goal, or a hand's scene."""
    drawn = getattr(inner, "goal", getattr(inner, "scene", None))
    return np.zeros(2) if drawn is None else np.asarray(drawn, np.float64)


@functools.cache
def make(name: str, physics: str):
    from ooo_rl import envs

    return envs.make(name, physics)


@functools.cache
def starter(name: str, physics: str):
    """The compiled `start` of one of our environments."""
    return jax.jit(make(name, physics).start)


def one_steps(name: str, engine: str, states: list[tuple]) -> tuple[np.ndarray, ...]:
    """What our environment makes of each state: obs [N, obs], reward [N], termination [N], and the seconds
    that compiling took."""
    env = make(name, engine)
    qpos, qvel, goal, action = (np.stack(column) for column in zip(*states))

    def step(qpos, qvel, goal, action):
        drawn = name.startswith("antmaze") or name.partition("-")[0] in HAND_IDS
        state = env.reset_to(qpos, qvel, goal) if drawn else env.reset_to(qpos, qvel)
        reached = env.step(state, action)
        return reached.obs, reached.reward, reached.info["termination"]

    dtype = jax.numpy.zeros(()).dtype
    arguments = [x.astype(dtype) for x in (qpos, qvel, goal, action)]
    began = time.perf_counter()
    program = jax.jit(jax.vmap(step)).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    return (*(np.asarray(x, np.float64) for x in program(*arguments)), seconds)


def measure(name: str, args: Args) -> list[dict]:
    """One row per engine: errors of one step."""
    states, rows = sample_states(name, args), []
    for engine in args.engines:
        theirs, wanted = reference(name, engine), []
        for qpos, qvel, goal, action in states:
            theirs.put(qpos, qvel, goal)
            wanted.append(theirs.step(action))
        obs, reward, ended = (np.array(column, np.float64) for column in zip(*wanted))
        got_obs, got_reward, got_ended, seconds = one_steps(name, engine, states)
        errors = {"obs": np.abs(got_obs - obs).max(axis=1), "reward": np.abs(got_reward - reward)}
        row = {"env": name, "engine": engine, "precision": args.precision}
        row |= {"states": len(states), "compile_seconds": seconds}
        quantiles = (("median", 0.5), ("p99", 0.99), ("max", 1.0))
        for what, error in errors.items():
            row |= {f"{what}_{key}": float(np.quantile(error, q)) for key, q in quantiles}
        differ = int((got_ended != ended).sum())
        row["terminations"] = f"{int(got_ended.sum())}/{int(ended.sum())}, {differ} differ"
        if args.horizon:
            row["diverged"] = diverged(name, engine, args)
        rows.append(row)
    return rows


def diverged(name: str, engine: str, args: Args) -> dict:
    """Largest observation error after 10, 100, 1000 steps of one action sequence.

    "perturbed" is C against C that started 1e-7 apart.
    """
    rng, env, theirs = np.random.default_rng(args.seed + 1), make(name, engine), reference(name, engine)
    inner = starter(name, engine)(jax.random.PRNGKey(args.seed))
    body = getattr(inner, "body", inner)
    qpos, qvel = np.asarray(body.qpos, np.float64), np.asarray(body.qvel, np.float64)
    goal = goal_of(inner)
    actions = np.float32(rng.uniform(-1, 1, (args.horizon, env.action_size)))

    def trajectory(qpos):
        theirs.put(qpos, qvel, goal)
        return np.stack([theirs.step(np.float64(a))[0] for a in actions])

    exact, perturbed = trajectory(qpos), trajectory(qpos * (1 + 1e-7) + (0 if qpos.any() else 1e-7))
    # Terminations are ignored on both sides: bodies that fell go on falling.
    run = jax.jit(
        lambda state, actions: jax.lax.scan(lambda s, a: ((t := env.step(s, a)), t.obs), state, actions)[1]
    )
    dtype = jax.numpy.zeros(()).dtype
    ours = np.asarray(run(env.begin(inner), actions.astype(dtype)), np.float64)
    steps = [n for n in (10, 100, 1000) if n <= args.horizon]
    gap = lambda x: {str(n): float(np.abs(x[n - 1] - exact[n - 1]).max()) for n in steps}  # noqa: E731
    return {"ours": gap(ours), "perturbed": gap(perturbed)}


def main() -> None:
    args = tyro.cli(Args)
    if args.precision not in (32, 64):
        sys.exit(f"error: --precision is 32 or 64, not {args.precision}")
    jax.config.update("jax_enable_x64", args.precision == 64)
    rows = []
    for name in args.envs:
        for row in measure(name, args):
            rows.append(row)
            each = [f"{row[f'{f}_{q}']:.0e}" for f in ("obs", "reward") for q in ("median", "p99", "max")]
            apart = row.get("diverged", {}).items()
            each += [row["terminations"]]
            each += [f"{kind} {'/'.join(f'{v:.0e}' for v in found.values())}" for kind, found in apart]
            head, tail = (
                f"{name:24} {row['engine']:7} f{args.precision}",
                f"compile {row['compile_seconds']:.0f} s",
            )
            print(head, *each, tail, sep="  ", flush=True)
    if args.json:
        content = {"command": " ".join(sys.argv), "rows": rows}
        pathlib.Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
