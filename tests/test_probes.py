"""Methods solve the five probes, whose values and best actions are known by hand, offline and online."""

import pytest
from probing import PROBES, STEPS, Probing, random_data, settings, state_value, value_of_mean_action

from ooo_rl.algos import iql, ooo_iql, sac
from ooo_rl.data import buffer

ALL_PROBES = pytest.mark.parametrize("name", PROBES)
IQL = {"value_lr": 3e-3, "expectile": 0.98, "temperature": 20.0}
SAC = {"alpha_lr": 3e-3, "entropy_per_action": -3.0, "backup_entropy": 0.0}
ONLINE = {"online_steps": 8 * STEPS, "offline_steps": 0, "num_envs": 8, "utd_ratio": 0.125}


@ALL_PROBES
def test_iql_offline(name):
    offline = random_data(name)
    probing = Probing(
        iql, settings(iql, name, IQL, online_steps=0, offline_steps=STEPS, actor_decay="none"), offline
    )
    probing.run("pretrain", STEPS)
    probing.check(probing.state.agent, state_value)


@ALL_PROBES
def test_iql_online(name):
    probing = Probing(iql, settings(iql, name, IQL, **ONLINE))
    probing.run("finetune", STEPS)
    probing.check(probing.state.agent, state_value)


@ALL_PROBES
def test_ooo_iql_offline_and_online(name):
    """One run through all phases without bonus: the explorer solves the probe online, the exploiter on the
    explorer's rows alone.
    """
    probing = Probing(ooo_iql, settings(ooo_iql, name, IQL, **ONLINE, intrinsic="none", retrain_steps=STEPS))
    probing.run("explore", STEPS)
    probing.check(probing.state.explorer, state_value)
    probing.run("retrain", STEPS)
    probing.check(probing.state.exploiter, state_value)


@ALL_PROBES
def test_ooo_iql_purely_offline(name):
    flags = {"online_steps": 0, "offline_steps": STEPS, "intrinsic": "none", "retrain_steps": STEPS}
    probing = Probing(ooo_iql, settings(ooo_iql, name, IQL, **flags), random_data(name))
    probing.run("pretrain", STEPS)
    probing.check(probing.state.explorer, state_value)
    probing.run("retrain", STEPS)
    probing.check(probing.state.exploiter, state_value)
    assert buffer.size(probing.state.ring) == 0


@ALL_PROBES
def test_sac_online(name):
    probing = Probing(sac, settings(sac, name, SAC, **ONLINE, random_steps=800))
    probing.run("finetune", STEPS)
    probing.check(probing.state.agent, value_of_mean_action)
