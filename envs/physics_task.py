"""The base class of all tasks with a MuJoCo model. It works with every engine."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco

from ooo_rl.envs.base import Task
from ooo_rl.envs.engines.physics import Body, Scene, make_engine, resolve

__all__ = ["Body", "PhysicsTask", "Scene", "resolve"]


class PhysicsTask(Task):
    """A task whose inner state is, or contains, a `Body` of a MuJoCo model.

    `root` names the body whose position (x, y) becomes `Body.place`. With None, `place` is the first
    coordinate of qpos, which the rewards of planar bodies use. `frame_skip` is the number of physics steps
    per environment step. Every actuator needs a control range: actions are mapped to it. Raises ValueError
    for a model with an actuator that has none, or that has a state of its own.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        frame_skip: int,
        physics: str = "auto",
        root: str | None = None,
        scene: Scene | None = None,
    ):
        low, high = model.actuator_ctrlrange.T
        if without := [model.actuator(i).name or f"number {i}" for i in range(model.nu) if low[i] >= high[i]]:
            raise ValueError(
                f"the model's actuator {without[0]} has no control range, and actions are mapped to that; "
                "give it a ctrlrange"
            )
        self.engine = make_engine(physics, model, frame_skip, root, scene)
        self.model, self.frame_skip = model, frame_skip
        self.dt = frame_skip * model.opt.timestep  # seconds of one environment step
        self.control_low, self.control_high = low, high

    def control(self, action: jax.Array, inner: Any = None) -> jax.Array:
        """Actuator controls [nu] of an action [nu] in [-1, 1]: the linear map to the control ranges.

        `inner` is the inner state in which the action is taken. It counts where actions are relative to it.
        """
        middle, half = (self.control_high + self.control_low) / 2, (self.control_high - self.control_low) / 2
        return jnp.asarray(middle) + jnp.asarray(half) * action

    def put(self, qpos: jax.Array, qvel: jax.Array) -> Body:
        """A body at positions `qpos` [nq] and velocities `qvel` [nv].

        Raises ValueError for other shapes, before they reach an engine.
        """
        wanted = (self.model.nq,), (self.model.nv,)
        if (jnp.shape(qpos), jnp.shape(qvel)) != wanted:
            raise ValueError(
                f"{type(self).__name__} needs qpos {wanted[0]} and qvel {wanted[1]}, "
                f"not {jnp.shape(qpos)} and {jnp.shape(qvel)}"
            )
        return self.engine.begin(jnp.asarray(qpos, float), jnp.asarray(qvel, float))

    def reset_to(self, qpos: jax.Array, qvel: jax.Array) -> Any:
        return self.begin(self.put(qpos, qvel))

    @property
    def action_size(self) -> int:
        return self.model.nu

    @property
    def backend(self) -> str:
        return self.engine.name
