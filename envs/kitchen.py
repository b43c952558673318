"""Franka Kitchen (Gupta et al., arXiv 1910.11956): an arm of seven joints and a gripper in a kitchen.

An episode has four sub-tasks, such as opening the microwave. Actions, noise, observations, goals, starts and
rewards are D4RL's (d4rl/kitchen at 89141a6). envs/kitchen_model.py says what is simulated.

D4RL and the papers that fine-tune on the kitchen differ in reward, horizon and end:

=====================  ==========================================  =======  =========================
`--env`                reward of a step                            horizon  termination
=====================  ==========================================  =======  =========================
kitchen-complete       "cumulative": sub-tasks solved so far, 0-4  1,000    never
kitchen-complete-d4rl  "new": sub-tasks solved in this step        280      when all four are solved
=====================  ==========================================  =======  =========================

The first is the variant of D4RL that Cal-QL and OOO use (nakamotoo/d4rl at d234792). Rewards in D4RL's data
are like it: the number of elements that are at their goals. In both variants the score is 25 for each solved
sub-task. The same two exist for kitchen-partial and kitchen-mixed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ooo_rl.envs.kitchen_model import MODELS, load_model
from ooo_rl.envs.physics_task import Body, PhysicsTask, resolve

ELEMENTS = {  # element -> (its first coordinate in qpos, its goal there): d4rl/kitchen/kitchen_envs.py
    "bottom burner": (11, (-0.88, -0.01)),
    "top burner": (15, (-0.92, -0.01)),
    "light switch": (17, (-0.69, -0.05)),
    "slide cabinet": (19, (0.37,)),
    "hinge cabinet": (20, (0.0, 1.45)),
    "microwave": (22, (-0.75,)),
    "kettle": (23, (-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06)),
}
TASKS = {  # task -> its four elements, in D4RL's order
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}
REWARDS = ("cumulative", "new")
SOLVED = 0.3  # an element is solved when its coordinates are closer to the goal than this (rad, m)
JOINTS = 9  # of the robot: seven in the arm [rad], two fingers [m]
SPEED = 2.0  # the largest speed that an action asks of a joint, in rad/s or m/s
# Bounds of the controls, in rad and m (d4rl/kitchen/adept_envs/franka/robot/franka_config.xml).
LOW = np.array([-2.9, -1.8, -2.9, -3.1, -2.9, 0.0, -2.9, 0.0, 0.0])
HIGH = np.array([2.9, 1.8, 2.9, 0.0, 2.9, 3.8, 2.9, 0.04, 0.04])
# Amplitudes of the sensors' noise, by coordinate of qpos [30] (the same file). D4RL takes a tenth of them.
NOISE = np.repeat([0.1, 0.005, 0.0005, 0.005, 0.1, 0.005, 0.1, 0.005], [9, 2, 6, 3, 3, 3, 3, 1])
# The start of every episode (d4rl/kitchen/adept_envs/franka/kitchen_multitask_v0.py). All is at rest.
START = np.array([
    1.48388023e-01, -1.76848573e00, 1.84390296e00, -2.47685760e00, 2.60252026e-01, 7.12533105e-01,
    1.59515394e00, 4.79267505e-02, 3.71350919e-02,  # the robot; its left finger begins beyond its limit
    -2.66279850e-04, -5.18043486e-05, 3.12877220e-05, -4.51199853e-05, -3.90842156e-06, -4.22629655e-05,
    6.28065475e-05, 4.04984708e-05,  # knobs and burners
    4.62730939e-04, -2.26906415e-04, -4.65501369e-04, -6.44129196e-03, -1.77048263e-03, 1.08009684e-03,
    -2.69397440e-01, 3.50383255e-01, 1.61944683e00, 1.00618764e00, 4.06395120e-03, -6.62095997e-03,
    -2.68278933e-04,  # the kettle
])  # fmt: skip

OPTION = "xla_cpu_use_fusion_emitters"  # of XLA's compiler, see `Kitchen.compiler_options`


@functools.cache
def xla_knows(option: str) -> bool:
    """Whether this version of XLA's compiler has a boolean option of this name."""
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options={option: False}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@struct.dataclass
class Episode:
    """The state of an episode.

    body: the physics. seen [30]: its positions as they were observed last, with noise; the next action starts
    from them. solved [4]: which sub-tasks have been solved. key: for the noise to come.
    """

    body: Body
    seen: jax.Array
    solved: jax.Array
    key: jax.Array


class Kitchen(PhysicsTask):
    """Solve the four sub-tasks of `task`, a key of `TASKS`: 60 observations, 9 actions, steps of 0.08 s.

    An observation has the positions of the robot [9] and of the objects [21], with noise, and their goals
    [30], which are 0 outside the task's elements. An action asks for the joints' velocities. A sub-task
    counts once, when its element is first within `SOLVED` of its goal.

    `metrics["solved"]` is the number of sub-tasks solved so far; `metrics["success"]` whether all four are.

    `reward` is one of `REWARDS`, `horizon` the number of steps of an episode. With `end_at_success` an
    episode terminates when the fourth sub-task is solved. `noise` scales `NOISE`; 0 switches it off. `model`
    is one of `MODELS`. Raises ValueError for settings that do not exist.
    """

    observation_size = 60
    # A camera: the point (x, y, z) it looks at and its distance in metres, azimuth and elevation in degrees.
    view = (-0.2, 0.5, 2.0, 2.2, 70.0, -35.0)

    def __init__(
        self,
        task: str,
        physics: str = "auto",
        model: str = "auto",
        reward: str = "cumulative",
        horizon: int = 1000,
        end_at_success: bool = False,
        noise: float = 0.1,
    ):
        for name, value, known in (
            ("task", task, TASKS),
            ("model", model, MODELS),
            ("reward", reward, REWARDS),
        ):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
        if horizon < 1 or not 0 <= noise < np.inf:
            raise ValueError(f"horizon is at least 1 and noise at least 0, got {horizon} and {noise}")
        kind = ("d4rl" if resolve(physics) == "mujoco" else "mjx") if model == "auto" else model
        self.task, self.reward, self.noise = task, reward, noise
        self.horizon, self.end_at_success = horizon, end_at_success
        self.elements = [
            (slice(first, first + len(goal)), np.array(goal))
            for first, goal in (ELEMENTS[name] for name in TASKS[task])
        ]
        self.goal = np.zeros(30)
        for place, goal in self.elements:
            self.goal[place] = goal
        super().__init__(load_model(kind), 40, physics)

    @property
    def compiler_options(self) -> dict[str, bool]:
        """As in `Task`. Without the option, JAX 0.10's MJX on a CPU takes 100 times as long.

        XLA's fused loops would compute the poses of the arm's links anew for each use of them. JAX 0.12 does
        not, and has no such option.
        """
        on_cpu = self.backend == "mjx" and jax.default_backend() == "cpu"
        return {OPTION: False} if on_cpu and xla_knows(OPTION) else {}

    def start(self, key: jax.Array) -> Episode:
        return self.episode(self.put(START, np.zeros(self.model.nv)), key)

    def episode(self, body: Body, key: jax.Array) -> Episode:
        """An episode that begins with `body`."""
        seen, key = self.look(body, key)
        return Episode(body, seen, jnp.zeros(len(self.elements), bool), key)

    def look(self, body: Body, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The positions [30] of `body` with the noise of the sensors, and the key for the next look."""
        key, now = jax.random.split(key)
        uniform = jax.random.uniform(now, body.qpos.shape, body.qpos.dtype, minval=-1.0, maxval=1.0)
        return body.qpos + self.noise * NOISE * uniform, key

    def reset_to(self, qpos: jax.Array, qvel: jax.Array, key: jax.Array | None = None):
        """As in `PhysicsTask`; `key` is that of the noise, by default PRNGKey(0). Nothing is solved yet."""
        key = jax.random.PRNGKey(0) if key is None else key
        return self.begin(self.episode(self.put(qpos, qvel), key))

    def begin(self, inner: Episode):
        state = super().begin(inner)
        return state.replace(metrics={**state.metrics, "solved": jnp.zeros(())})

    def step(self, state, action: jax.Array):
        reached = super().step(state, action)
        solved = jnp.sum(reached.pipeline_state.solved, dtype=reached.reward.dtype)
        return reached.replace(metrics={**reached.metrics, "solved": solved})

    def control(self, action: jax.Array, inner: Episode) -> jax.Array:
        """The controls [9], wanted positions of the joints: the observed ones, moved on by `action` [9]."""
        return jnp.clip(inner.seen[:JOINTS] + SPEED * self.dt * action, LOW, HIGH)

    def advance(self, inner: Episode, action: jax.Array):
        body = self.engine.step(inner.body, self.control(action, inner))
        seen, key = self.look(body, inner.key)
        solved = inner.solved | self.near_goals(seen)
        new = solved & ~inner.solved
        reward = jnp.sum(solved if self.reward == "cumulative" else new, dtype=seen.dtype)
        done = solved.all()
        return Episode(body, seen, solved, key), reward, done & self.end_at_success, done

    def near_goals(self, seen: jax.Array) -> jax.Array:
        """Whether each element [4] of the task is at its goal, judged by the noisy positions `seen` [30]."""
        gaps = [jnp.sqrt(jnp.sum((seen[place] - goal) ** 2)) for place, goal in self.elements]
        return jnp.stack(gaps) < SOLVED

    def observe(self, inner: Episode) -> jax.Array:
        return jnp.concatenate([inner.seen, jnp.asarray(self.goal, inner.seen.dtype)])
