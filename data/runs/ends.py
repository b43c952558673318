"""--end-reward: the rows that pay enough end the return, whatever the data and the environment say.

OOO's code does so in the kitchen, whose reward is the number of solved sub-tasks: the return ends where all
four are solved. The demonstrations stop there, but an episode goes on, and is paid for it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from brax.envs.base import Wrapper

from ooo_rl.data.datasets.validate import Dataset
from ooo_rl.envs import State

AS_GIVEN = -float("inf")  # the value of the setting that changes nothing


class EndsByReward(Wrapper):
    """`env`, with a termination where the reward is at least `least`, and nowhere else.

    Episodes end as before, so one may go on after a termination. An end without a reward is a truncation.
    """

    def __init__(self, env, least: float):
        super().__init__(env)
        self.least = least

    def step(self, state: State, action: jax.Array) -> State:
        reached = self.env.step(state, action)
        sound = reached.info["broken"] == 0
        termination = jnp.asarray(sound & (reached.reward >= self.least), reached.done.dtype)
        truncation = reached.done * (1 - termination)
        return reached.replace(info={**reached.info, "termination": termination, "truncation": truncation})


def by_reward(data: Dataset, least: float) -> Dataset:
    """`data`, with a termination in the rows whose reward is at least `least`, and in no others."""
    rows = data.transitions
    terminated = rows.reward >= least
    last = np.append(np.diff(data.episode) != 0, True)
    discount = np.where(terminated, 0, 1).astype(rows.discount.dtype)
    return dataclasses.replace(
        data, transitions=rows.replace(discount=discount), truncation=last & ~terminated
    )
