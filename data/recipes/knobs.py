"""A scripted expert turns the knobs of the kitchen's burners. It knows the true state of the simulation.

The gripper, closed, is put beside the upper half of the knob's bar and pushes it around. Joint velocities
come from damped least squares on the gripper's pose (Nakamura and Hanafusa, 1986).
"""

import mujoco
import numpy as np

from ooo_rl.envs.kitchen import ELEMENTS, HIGH, JOINTS, LOW, SPEED, START, Kitchen

KNOBS = {"bottom burner": 2, "top burner": 4}  # element -> number of its knob
ARM = slice(0, 7)
DAMPING = 0.03  # of the least squares, in metres
TURN_WEIGHT = 0.3  # of a radian of the gripper's orientation, against a metre of its position
GAIN = 1.7  # the controllers of the joints follow a moving target by about 1 / 1.7 of its speed
TIP = 0.05  # from the gripper's site to the ends of the fingers, in metres
LEVER = 0.038  # from the knob's axis to where the bar is pushed, in metres
AHEAD = 0.7  # how far ahead of the bar the gripper aims, in rad
POSTURE = np.concatenate([START[:1], [-1.5], START[2:7]])  # of the arm, where the task leaves a choice


class Arm:
    """The robot in the C engine, from the kitchen's start. `controls` are those that were sent so far."""

    def __init__(self, env: Kitchen):
        self.model, self.data, self.dt = env.model, mujoco.MjData(env.model), env.dt
        self.skip = env.frame_skip
        self.data.qpos[:] = START
        mujoco.mj_forward(self.model, self.data)
        self.site = self.data.site("end_effector")
        self.level = self.site.xmat.reshape(3, 3).copy()  # the orientation to keep
        limits = self.model.jnt_range[ARM].T
        self.low, self.high = np.maximum(LOW[ARM], limits[0]) + 0.01, np.minimum(HIGH[ARM], limits[1]) - 0.01
        self.stiffness = self.model.actuator_gainprm[ARM, 0]
        self.controls: list[np.ndarray] = []

    def twist(self, target: np.ndarray, gain: float) -> np.ndarray:
        """The velocity [6] that takes the gripper to `target` [3] with its orientation kept (m/s, rad/s)."""
        turn, quaternion = np.zeros(3), np.zeros(4)
        mujoco.mju_mat2Quat(quaternion, (self.level @ self.site.xmat.reshape(3, 3).T).ravel())
        mujoco.mju_quat2Vel(turn, quaternion, 1.0)
        bounded = lambda v, most: v * min(1.0, most / max(np.linalg.norm(v), 1e-9))  # noqa: E731
        return np.concatenate([bounded(gain * (target - self.site.xpos), 0.5), bounded(4 * turn, 2.0)])

    def speeds(self, twist: np.ndarray) -> np.ndarray:
        """Joint velocities [7] for a `twist` [6] of the gripper. Others make up for a joint at its limit."""
        jacobian, q = np.zeros((2, 3, self.model.nv)), self.data.qpos[ARM]
        mujoco.mj_jacSite(self.model, self.data, *jacobian, self.model.site("end_effector").id)
        weight = np.repeat([1, TURN_WEIGHT], 3)
        jacobian, twist = weight[:, None] * jacobian.reshape(6, -1)[:, ARM], weight * twist
        free, speed = np.ones(7, bool), np.zeros(7)
        for _ in range(4):
            own = jacobian[:, free]
            inverse = own.T @ np.linalg.inv(own @ own.T + DAMPING**2 * np.eye(6))
            rest = 0.5 * (POSTURE - q)[free]
            speed[:] = 0
            speed[free] = inverse @ twist + rest - inverse @ (own @ rest)
            after = q + speed * self.dt
            stuck = free & (((after < self.low) & (speed < 0)) | ((after > self.high) & (speed > 0)))
            if not stuck.any():
                break
            free &= ~stuck
        return speed

    def step(self, target: np.ndarray, gain: float = 6.0) -> None:
        """One step of the environment towards `target` [3], with closed fingers."""
        speed = GAIN * self.speeds(self.twist(target, gain))
        gravity = self.data.qfrc_bias[ARM] / self.stiffness
        wanted = np.concatenate([self.data.qpos[ARM] + speed * self.dt + gravity, np.zeros(2)])
        reach = SPEED * self.dt
        wanted = np.clip(wanted, self.data.qpos[:JOINTS] - reach, self.data.qpos[:JOINTS] + reach)
        self.data.ctrl[:] = np.clip(wanted, LOW, HIGH)
        self.controls.append(self.data.ctrl.copy())
        mujoco.mj_step(self.model, self.data, self.skip)

    def go(self, target: np.ndarray, near: float, steps: int) -> None:
        """Steps until the gripper is `near` its `target` [3] (metres), at most `steps` of them."""
        for _ in range(steps):
            if np.linalg.norm(self.site.xpos - target) < near:
                return
            self.step(target)


def turn(env: Kitchen, element: str, rng: np.random.Generator) -> np.ndarray | None:
    """The controls [T, 9] that turn a burner on from the kitchen's start; None if this attempt fails.

    `element` is one of `KNOBS`. The places to push at are drawn anew by up to 3 mm.
    """
    arm, (first, goal) = Arm(env), ELEMENTS[element]
    knob = arm.data.site(f"knob{KNOBS[element]}_site").xpos + rng.uniform(-0.003, 0.003, 3)
    angle = lambda: arm.data.qpos[first]  # noqa: E731
    arm.go(knob + [-0.05, -0.12, LEVER], 0.02, 80)
    arm.go(knob + [-0.045, -TIP, LEVER], 0.012, 30)
    for _ in range(40):
        if abs(angle() - goal[0]) < 0.12:
            break
        ahead = abs(angle()) + AHEAD
        beside = LEVER * np.sin(ahead) - 0.045 * max(0.0, 1 - ahead)
        arm.step(knob + [beside, -TIP, LEVER * np.cos(ahead)], gain=8.0)
    arm.go(arm.site.xpos + [0, -0.1, 0], 0.01, 12)
    reached = np.linalg.norm(arm.data.qpos[first : first + len(goal)] - goal) < 0.2
    return np.stack(arm.controls) if reached else None
