"""What is compared with what, task by task: the runs of each paper's comparison, and their budgets.

A comparison is a set of runs. Each run is one command of a script of algos/. Budgets are flags that are
alike within a family of methods, so that nothing but the method differs. Words in capitals stand for other
words: in a run's flags those of its task's budget, `FROM_<run>` for the flag that starts from the agents of
that run, and `AFTER_<run>` for this and no offline phase. A task that is not the name of an environment names
it in its budget, as `ENV`. Where a budget lacks a word, the task has no run that needs it.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Run:
    """A run of `script` with `flags`, after those of the whole task.

    rows: phase -> its name in tables; a phase that is not there has no row.
    changes: parts of the script, and what stands in their place in a copy that is run instead. So a defect of
    an official code can be tried, and our script needs no switch for it.
    """

    script: str
    flags: str = ""
    rows: dict[str, str] = field(default_factory=dict)
    changes: tuple[tuple[str, str], ...] = ()


# where all other networks have 64 or 128 units: RND's 512 would take most of the time on two cores
SMALL_RND = "MLP((512, 512, 512) if", "MLP((64, 64, 64) if"
OOO = {
    "iql": Run("iql", "IQL", {"offline": "IQL, offline", "online": "IQL"}),
    "ooo_iql": Run("ooo_iql", "IQL IQL_RETRAIN", {"online": "IQL + bonus", "retrained": "OOO(IQL)"}),
    "ooo_iql_64": Run("ooo_iql", "IQL IQL_RETRAIN", {
        "online": "IQL + RND of 64 units", "retrained": "OOO(IQL), RND of 64 units"}, (SMALL_RND,)),
    "pex": Run("pex", "IQL", {"online": "PEX"}),
    "cql": Run("cql", "CQL", {"offline": "CQL, offline", "online": "CQL"}),
    "sac_ft": Run("sac", "SAC AFTER_cql --random-steps 0", {"online": "SAC-ft (from CQL)"}),
    "cal_ql": Run("cal_ql", "CQL", {"offline": "Cal-QL, offline", "online": "Cal-QL"}),
    "ooo_cal_ql": Run("ooo_cal_ql", "CQL CQL_RETRAIN", {"online": "Cal-QL + RND", "retrained": "OOO(Cal-QL)"}),
    "rlpd": Run("rlpd", "RLPD", {"online": "RLPD"}),
    "ooo_rlpd": Run("ooo_rlpd", "RLPD RLPD_RETRAIN", {"online": "RLPD + RND", "retrained": "OOO(RLPD)"}),
    "td3": Run("td3", "TD3 --intrinsic rnd TD3_RETRAIN", {"online": "TD3 + RND", "retrained": "TD3, retrained"}),
    # Cal-QL without what OOO changed in it
    "no_uniform_floor": Run("cal_ql", "CQL --no-calibrate-random", {
        "offline": "Cal-QL as published, offline", "online": "Cal-QL as published (Fig. 7)"}),
    # ablations of OOO(IQL)
    "frozen_bonus": Run("ooo_iql", "IQL IQL_RETRAIN --frozen-bonus", {
        "retrained": "OOO(IQL), bonus kept (Fig. 3)"}),
    "no_upsampling": Run("ooo_iql", "IQL IQL_RETRAIN --upsample 0", {
        "retrained": "OOO(IQL), no up-sampling (Fig. 11)"}),
    "no_bounds": Run("ooo_iql", "IQL IQL_RETRAIN --no-bound-q", {"retrained": "OOO(IQL), Q unbounded"}),
    "warm_start": Run("ooo_iql", "IQL IQL_RETRAIN HALVES --warm-start", {
        "retrained": "OOO(IQL), warm start (Fig. 13)"}),
    "sync": Run("ooo_iql", "IQL IQL_RETRAIN HALVES --sync-explorer", {
        "online": "explorer, synchronised (Fig. 14)", "retrained": "OOO(IQL), synchronised (Fig. 14)"}),
    # Defects of its official code. RND's deviation is that of the error already divided by it. A ring of
    # 500,000 rows holds the offline rows, too, and new rows overwrite them. The compiled step never changes RND's
    # predictor; its normalisers do learn here, and not there.
    "rnd_twice": Run("ooo_iql", "IQL IQL_RETRAIN", {
        "online": "IQL + RND of 64 units, normalised twice",
        "retrained": "OOO(IQL), RND of 64 units, normalised twice"}, (
        ("rnd.error.update(novelty(static, rnd, batch))", "rnd.error.update(bonus(static, rnd, batch))"), SMALL_RND)),
    "one_ring": Run("ooo_iql", "IQL IQL_RETRAIN", {
        "online": "IQL + RND, one ring", "retrained": "OOO(IQL), one ring"}, (
        ("(num_updates, args.batch_size), 0, filled)",
         "(num_updates, args.batch_size), jnp.maximum(filled - 500_000, 0), filled)"),
        ("(args.batch_size - num_best,), 0, filled)",
         "(args.batch_size - num_best,), jnp.maximum(filled - 500_000, 0), filled)"))),
    "still_rnd": Run("ooo_cal_ql", "CQL CQL_RETRAIN --rnd-lr 0", {
        "online": "Cal-QL + RND that does not learn", "retrained": "OOO(Cal-QL), RND that does not learn"}),
}  # fmt: skip

# All fine-tuners go on from one run of IQL, but for those whose offline method is another one.
GDE = {
    "pre": Run("iql", "NETS DATA OFFLINE --online-steps 0 --actor-decay none", {"offline": "IQL, offline"}),
    "gde": Run("gde_iql", "NETS DATA ONLINE TRIALS AFTER_pre", {"online": "GDE"}),
    "iql": Run("iql", "NETS DATA ONLINE AFTER_pre", {"online": "IQL"}),
    "on_iql": Run("iql", "NETS DATA ONLINE AFTER_pre --keep none", {"online": "OnIQL"}),
    "sac": Run("sac", "NETS CRITICS --dataset none ONLINE", {"online": "SAC from scratch"}),
    "awac": Run("awac", "NETS CRITICS DATA AWAC ONLINE", {"offline": "AWAC, offline", "online": "AWAC"}),
    "jsrl": Run("jsrl", "NETS DATA ONLINE OFTEN AFTER_pre", {"online": "JSRL"}),
    "qdagger": Run("qdagger", "NETS DATA ONLINE OFTEN AFTER_pre", {"online": "QDagger"}),
    "pex": Run("pex", "NETS DATA ONLINE PEX AFTER_pre", {"online": "PEX"}),
    "re_iql": Run("gde_iql", "NETS DATA ONLINE AFTER_pre --without exploiter --teacher none "
                  "--trial-every 1000000 --trial-steps 1", {"online": "ReIQL"}),
    "bp_iql": Run("bp_iql", "NETS DATA ONLINE FROM_pre --offline-learns prior PRIOR", {"online": "BpIQL"}),
    # other ways to go on with the offline rows (its Table 5)
    "filter": Run("iql", "NETS DATA ONLINE AFTER_pre --keep best", {"online": "Filter"}),
    "per": Run("per_iql", "NETS DATA ONLINE AFTER_pre", {"online": "PER"}),
    # ablations of GDE (its Tables 4 and 10; outside mazes n is 1 anyway)
    "gde_no_exploiter": Run("gde_iql", "NETS DATA ONLINE TRIALS AFTER_pre --without exploiter", {
        "online": "GDE without exploiter"}),
    "gde_no_explorer": Run("gde_iql", "NETS DATA ONLINE TRIALS AFTER_pre --without explorer", {
        "online": "GDE without explorer"}),
    "gde_no_teacher": Run("gde_iql", "NETS DATA ONLINE TRIALS AFTER_pre --teacher none", {
        "online": "GDE without teacher"}),
    "gde_1_step": Run("gde_iql", "NETS DATA ONLINE TRIALS AFTER_pre --n-steps 1", {"online": "GDE with n = 1"}),
    # other offline methods underneath (its Table 3); the naive way is to go on with the offline method
    "td3_bc_pre": Run("td3_bc", "NETS CRITICS DATA OFFLINE --online-steps 0", {"offline": "TD3+BC, offline"}),
    "td3_bc": Run("td3_bc", "NETS CRITICS DATA ONLINE AFTER_td3_bc_pre", {"online": "TD3+BC"}),
    "gde_td3_bc": Run("gde_td3_bc", "NETS CRITICS DATA ONLINE TRIALS AFTER_td3_bc_pre", {"online": "GDE on TD3+BC"}),
    "cql_pre": Run("cql", "NETS CRITICS CQL DATA CQL_OFFLINE --online-steps 0", {"offline": "CQL, offline"}),
    "cql": Run("cql", "NETS CRITICS CQL DATA ONLINE AFTER_cql_pre", {"online": "CQL"}),
    "gde_cql": Run("gde_cql", "NETS CRITICS CQL DATA ONLINE TRIALS AFTER_cql_pre", {"online": "GDE on CQL"}),
    # a defect of IQL's official code: the dataset's rewards are scaled, and those seen online are not
    "raw_online": Run("iql", "NETS DATA ONLINE AFTER_pre", {"online": "IQL, online rewards not scaled"}, (
        ("Transition(obs, action, reached.reward,",
         "Transition(obs, action, (reached.reward - hyper.reward_bias) / hyper.reward_scale,"),)),
}  # fmt: skip

O3F = {
    "pre": Run("o3f_iql", "NETS DATA OFFLINE --online-steps 0 --actor-decay none", {
        "offline": "IQL with five critics, offline"}),
    "o3f": Run("o3f_iql", "NETS DATA ONLINE AFTER_pre", {"online": "O3F"}),
    "omega": Run("o3f_iql", "NETS DATA ONLINE AFTER_pre --omega 1", {"online": "O3F, omega 1"}),
    "noise": Run("o3f_iql", "NETS DATA ONLINE AFTER_pre --candidates 1", {"online": "noise, no ranking"}),
    "none": Run("o3f_iql", "NETS DATA ONLINE AFTER_pre --candidates 1 --candidate-std 0", {
        "online": "the policy's own actions"}),
    "lapo_pre": Run("o3f_lapo", "NETS LAPO DATA OFFLINE --online-steps 0", {
        "offline": "LAPO with five critics, offline"}),
    "o3f_lapo": Run("o3f_lapo", "NETS LAPO DATA MANY AFTER_lapo_pre", {"online": "O3F on LAPO"}),
    "noise_lapo": Run("o3f_lapo", "NETS LAPO DATA MANY AFTER_lapo_pre --candidates 1", {
        "online": "noise on LAPO, no ranking"}),
    "none_lapo": Run("o3f_lapo", "NETS LAPO DATA MANY AFTER_lapo_pre --candidates 1 --candidate-std 0", {
        "online": "LAPO's own actions"}),
    # an objective that changes as the online phase begins (its Figures 2 and 3)
    "loose_iql": Run("o3f_iql", "NETS DATA ONLINE AFTER_pre --candidates 1 --candidate-std 0 "
                     "--online-change expectile=0.85", {"online": "IQL, expectile 0.7, then 0.85"}),
    "cql_pre": Run("cql", "NETS CRITICS CQL DATA CQL_OFFLINE --online-steps 0 --q-bias", {"offline": "CQL, offline"}),
    "cql": Run("cql", "NETS CRITICS CQL DATA ONLINE AFTER_cql_pre --q-bias", {"online": "CQL"}),
    "sac_ft": Run("sac", "NETS CRITICS DATA ONLINE AFTER_cql_pre --random-steps 0 --q-bias", {
        "online": "SAC after CQL"}),
    "lagrange_pre": Run("cql", "NETS CRITICS CQL DATA CQL_OFFLINE --online-steps 0 LAGRANGE", {
        "offline": "CQL with a gap of 5, offline"}),
    "lagrange": Run("cql", "NETS CRITICS CQL DATA ONLINE AFTER_lagrange_pre LAGRANGE", {
        "online": "CQL, gap of 5"}),
    "loose_cql": Run("cql", "NETS CRITICS CQL DATA ONLINE AFTER_lagrange_pre LAGRANGE "
                     "--online-change lagrange-gap=0.5", {"online": "CQL, gap of 5, then 0.5"}),
    "awac_pre": Run("awac", "NETS CRITICS AWAC DATA OFFLINE --online-steps 0", {"offline": "AWAC, offline"}),
    "awac": Run("awac", "NETS CRITICS AWAC DATA ONLINE AFTER_awac_pre", {"online": "AWAC"}),
    "loose_awac": Run("awac", "NETS CRITICS AWAC DATA ONLINE AFTER_awac_pre --online-change beta=0.1", {
        "online": "AWAC, beta of 1, then 0.1"}),
}  # fmt: skip

OFF2ONRL = {
    "pre": Run("off2onrl", "NETS CRITICS CQL DATA OFFLINE --online-steps 0", {"offline": "ensemble of 5, offline"}),
    "off2onrl": Run("off2onrl", "NETS CRITICS CQL DATA ONLINE AFTER_pre", {"online": "Off2OnRL"}),
    "uniform": Run("off2onrl", "NETS CRITICS CQL DATA ONLINE AFTER_pre --replay uniform", {
        "online": "Off2OnRL, uniform replay"}),
    "online_only": Run("off2onrl", "NETS CRITICS CQL DATA ONLINE AFTER_pre --replay online", {
        "online": "Off2OnRL, online rows only"}),
    "mean_target": Run("off2onrl", "NETS CRITICS CQL DATA ONLINE AFTER_pre --target mean", {
        "online": "Off2OnRL, one target for the mean"}),
    "fqe": Run("off2onrl", "NETS CRITICS CQL DATA ONLINE AFTER_pre --init-q fqe FQE", {
        "online": "Off2OnRL, critics of FQE (Fig. 1c)"}),
    "pre_1": Run("off2onrl", "NETS CRITICS CQL DATA OFFLINE --online-steps 0 --num-members 1", {
        "offline": "one CQL agent, offline"}),
    "off2onrl_1": Run("off2onrl", "NETS CRITICS CQL DATA ONLINE AFTER_pre_1 --num-members 1", {
        "online": "Off2OnRL, one agent"}),
    "pre_2": Run("off2onrl", "NETS CRITICS CQL DATA OFFLINE --online-steps 0 --num-members 2", {
        "offline": "ensemble of 2, offline"}),
    "off2onrl_2": Run("off2onrl", "NETS CRITICS CQL DATA ONLINE AFTER_pre_2 --num-members 2", {
        "online": "Off2OnRL, two agents"}),
    "sac_ft": Run("off2onrl", "NETS CRITICS CQL DATA ONLINE AFTER_pre_1 --num-members 1 --replay uniform", {
        "online": "SAC-ft"}),
    "online_only_1": Run("off2onrl", "NETS CRITICS CQL DATA ONLINE AFTER_pre_1 --num-members 1 --replay online", {
        "online": "SAC-ft, online rows only (Fig. 1a)"}),
    "sac": Run("sac", "NETS CRITICS --dataset none ONLINE", {"online": "SAC from scratch"}),
    # one agent each; the paper has ensembles
    "awac": Run("awac", "NETS CRITICS DATA OFFLINE ONLINE", {"offline": "AWAC, offline", "online": "AWAC"}),
    "bcq": Run("bcq", "NETS CRITICS VAE DATA OFFLINE ONLINE", {"offline": "BCQ, offline", "online": "BCQ-ft"}),
}  # fmt: skip

# Not a paper's question: does it cost anything that many environments act side by side? Steps of the environment
# and updates are alike.
NUM_ENVS = {
    "pre": Run("iql", "NETS DATA OFFLINE --online-steps 0 --actor-decay none", {"offline": "IQL, offline"}),
    **{f"iql_{n}": Run("iql", f"NETS DATA ONLINE AFTER_pre --num-envs {n}", {"online": f"IQL, num_envs {n}"})
       for n in (1, 8, 32, 128)},
    **{f"sac_{n}": Run("sac", f"NETS CRITICS --dataset none ONLINE --num-envs {n}", {
        "online": f"SAC from scratch, num_envs {n}"}) for n in (1, 8, 32, 128)},
}  # fmt: skip
# Offline alone: what fine-tuning starts from, beside the level of the data.
BASE = {
    "iql": Run("iql", "NETS DATA OFFLINE --online-steps 0", {"offline": "IQL"}),
    "td3_bc": Run("td3_bc", "NETS CRITICS DATA OFFLINE --online-steps 0", {"offline": "TD3+BC"}),
    "cql": Run("cql", "NETS CRITICS CQL DATA CQL_OFFLINE --online-steps 0", {"offline": "CQL"}),
}
COMPARISONS = {"ooo": OOO, "gde": GDE, "o3f": O3F, "off2onrl": OFF2ONRL, "base": BASE, "num_envs": NUM_ENVS}

LOCOMOTION = {
    "ALL": "--num-envs 1 --eval-every 10000 --eval-episodes 10 --checkpoint-every 5000",
    "NETS": "--hidden 64 64",
    "CRITICS": "--critic-hidden 64 64",
    "OFFLINE": "--offline-steps 50000",
    "ONLINE": "--online-steps 50000",
}

BUDGETS = {  # (comparison, task) -> what the words in capitals stand for; ALL is in front of every run's flags
    ("ooo", "point-mass-wall"): {
        "ALL": "--num-envs 48",
        **{f"{family}_RETRAIN": "--retrain-steps 24000" for family in ("IQL", "CQL", "RLPD", "TD3")},
        "HALVES": "--retrain-at 1440000 2880000",
        "IQL": "--online-steps 2880000",
        "CQL": "--online-steps 960000",
        "SAC": "--online-steps 960000",
        "RLPD": "--online-steps 480000 --utd-ratio 0.08333333333333333",
        "TD3": "--online-steps 480000 --utd-ratio 0.08333333333333333 --offline-ratio 0.5 "
               "--target-rate 0.02 --exploration-noise 0.5",
    },
    ("ooo", "maze2d-large-missing-data"): {
        "ALL": "--num-envs 32",
        "IQL": "--online-steps 400000 --utd-ratio 0.0625 --hidden 128 128 --offline-steps 10000",
        "IQL_RETRAIN": "--retrain-steps 50000",
        "HALVES": "--retrain-at 200000 400000",
        "CQL": "--online-steps 200000 --utd-ratio 0.03125 --hidden 64 64 --critic-hidden 64 64 "
               "--num-samples 4 --offline-steps 5000",
        "CQL_RETRAIN": "--retrain-steps 10000",
        "SAC": "--online-steps 200000 --utd-ratio 0.03125 --hidden 64 64 --critic-hidden 64 64 --reward-scale 10 "
               "--reward-bias -5",  # CQL's, whose critics go on
        "RLPD": "--online-steps 200000 --utd-ratio 0.0625 --hidden 128 128 --critic-hidden 128 128 --policy-every 1",
        "RLPD_RETRAIN": "--retrain-steps 25000",
        "TD3": "--online-steps 400000 --utd-ratio 0.0625 --hidden 128 128 --critic-hidden 128 128",
        "TD3_RETRAIN": "--retrain-steps 50000",
    },
    # the paper's own budget and networks, which are the scripts' settings: for a GPU
    ("ooo", "maze2d-large-missing-data-full"): {
        "ENV": "maze2d-large-missing-data", "HALVES": "--retrain-at 250000 500000",
        "SAC": "--reward-scale 10 --reward-bias -5",
        **dict.fromkeys(("ALL", "IQL", "IQL_RETRAIN", "CQL", "CQL_RETRAIN", "RLPD", "RLPD_RETRAIN", "TD3",
                         "TD3_RETRAIN"), ""),
    },
    **{("ooo", f"kitchen-{task}"): {
        "ALL": "--num-envs 32 --eval-episodes 5 --eval-every 12000 --checkpoint-every 3000",
        "IQL": "--offline-steps 12000 --online-steps 19200 --utd-ratio 0.25",
        "IQL_RETRAIN": "--retrain-steps 12000",
        "CQL": "--hidden 64 64 --critic-hidden 64 64 --num-samples 4 --offline-steps 12000 --online-steps 19200 "
               "--utd-ratio 0.25",
    } for task in ("complete", "mixed")},
    # a task without data
    ("ooo", "halfcheetah-sparse"): {
        "ALL": "--num-envs 32 --hidden 64 64 --eval-every 50000 --eval-episodes 10",
        "RLPD": "--critic-hidden 64 64 --online-steps 400000 --utd-ratio 0.125 --policy-every 2",
        "RLPD_RETRAIN": "--retrain-steps 25000 --rnd-units 64",
    },
    ("gde", "point-mass-wall"): {
        "ALL": "--num-envs 48", "DATA": "--dataset own",
        **dict.fromkeys(("NETS", "CRITICS", "OFFLINE", "ONLINE", "TRIALS", "OFTEN", "AWAC", "PRIOR", "PEX", "CQL",
                         "CQL_OFFLINE"), ""),
    },
    # here IQL's offline policy solves nothing, and so there is nothing to fine-tune
    ("gde", "antmaze-umaze-diverse"): {
        **LOCOMOTION, "ALL": "--num-envs 1 --eval-every 10000 --eval-episodes 20 --checkpoint-every 5000",
        "DATA": "--dataset own",
        **dict.fromkeys(("TRIALS", "OFTEN", "AWAC", "PRIOR", "PEX", "CQL", "CQL_OFFLINE"), ""),
    },
    **{(comparison, f"{body}-{data}"): {
        **LOCOMOTION, "ENV": body, "DATA": f"--dataset ooo/{body}/{data}-v0", **more,
    } for body in ("halfcheetah", "hopper", "walker2d") for comparison, datasets, more in [
        ("gde", ("medium",), {
            "AWAC": "--offline-steps 10000 --batch-size 256", "PRIOR": "--offline-steps 10000",
            "ONLINE": "--online-steps 100000", "OFTEN": "--eval-every 5000 --eval-episodes 5", "TRIALS": "",
            "PEX": "--return-range 1000 --expectile 0.7 --temperature 3",  # IQL's, whose critics go on
            "CQL": "--num-samples 4", "CQL_OFFLINE": "--offline-steps 20000"}),
        ("o3f", ("medium",), {
            "CQL": "--num-samples 4", "CQL_OFFLINE": "--offline-steps 20000", "LAPO": "--batch-size 256",
            "LAGRANGE": "--lagrange --lagrange-gap 5", "AWAC": "--beta 1 --batch-size 256",
            "MANY": "--online-steps 2500 --checkpoint-every 500"}),
        ("off2onrl", ("random", "medium", "medium-expert"), {
            "ALL": f"{LOCOMOTION['ALL']} --batch-size 64", "CQL": "--num-samples 4", "VAE": "--vae-hidden 64 64",
            "OFFLINE": "--offline-steps 10000", "ONLINE": "--online-steps 25000", "FQE": "--fqe-steps 5000"}),
        ("base", ("medium", "medium-expert"), {
            "ALL": "--eval-every 10000 --eval-episodes 20 --checkpoint-every 10000",
            "CQL": "--num-samples 4", "CQL_OFFLINE": "--offline-steps 20000"}),
        ("num_envs", ("medium",), {  # multiples of 128 environments
            "ALL": "--eval-every 10240 --eval-episodes 10", "OFFLINE": "--offline-steps 51200",
            "ONLINE": "--online-steps 51200"}),
    ] for data in datasets},
}  # fmt: skip
# the paper's own steps, with small networks: for two cores
BUDGETS["ooo", "maze2d-large-missing-data-steps"] = {
    **BUDGETS["ooo", "maze2d-large-missing-data-full"],
    "ALL": "--num-envs 32 --hidden 64 64 --eval-every 100000",
    "HALVES": "--retrain-at 256000 500000",
    **dict.fromkeys(("CQL", "RLPD", "TD3"), "--critic-hidden 64 64"),
}
BUDGETS["gde", "halfcheetah-medium-long"] = {  # the paper's own 250,000 steps online
    **BUDGETS["gde", "halfcheetah-medium"],
    "ALL": "--num-envs 1 --eval-every 25000 --eval-episodes 20 --checkpoint-every 25000",
    "OFFLINE": "--offline-steps 200000",
    "ONLINE": "--online-steps 250000",
}
BUDGETS["gde", "antmaze-umaze-long"] = {  # 64 units, or 50,000 steps, are too few for the ant
    **BUDGETS["gde", "antmaze-umaze-diverse"],
    "ENV": "antmaze-umaze",
    "ALL": "--num-envs 1 --eval-every 20000 --eval-episodes 20 --checkpoint-every 10000",
    "NETS": "--hidden 128 128",
    "CRITICS": "--critic-hidden 128 128",
    "OFFLINE": "--offline-steps 200000",
    "ONLINE": "--online-steps 100000",
}
# The paper's own 250,000 steps online, after five times the steps offline: do the verdicts on Off2OnRL come from
# its small budget?
BUDGETS["off2onrl", "halfcheetah-medium-long"] = {
    **BUDGETS["off2onrl", "halfcheetah-medium"],
    "ALL": "--num-envs 1 --eval-every 25000 --eval-episodes 10 --checkpoint-every 12500 --batch-size 64",
    "OFFLINE": "--offline-steps 50000",
    "ONLINE": "--online-steps 250000",
}
# The paper's own agents of a million offline steps, and their networks; see official_agents.py, which makes the
# dataset and the runs `pre` and `pre_1`.
BUDGETS["off2onrl", "halfcheetah-official"] = {
    **BUDGETS["off2onrl", "halfcheetah-medium"],
    "ALL": "--num-envs 1 --eval-every 5000 --eval-episodes 10 --checkpoint-every 5000 --batch-size 64",
    "DATA": "--dataset ooo/halfcheetah/official-v0",
    **dict.fromkeys(("NETS", "CRITICS", "CQL"), ""),
    "VAE": "--vae-hidden 256 256",
}
MADE_BY = {  # runs that are no command of algos/: (comparison, task, run) -> what makes them
    ("off2onrl", "halfcheetah-official", run): "tests/reproduction/official_agents.py --repo Off2OnRL"
    for run in ("pre", "pre_1")
}


def words_of(comparison: str, task: str, run: str, folder_of) -> list[str]:
    """The flags of one run, split into words; `folder_of(run)` is where another run's agents are."""
    stand_for = BUDGETS[comparison, task]
    words = []
    for word in f"ALL {COMPARISONS[comparison].get(run, Run(run)).flags}".split():
        if word.startswith(("AFTER_", "FROM_")):
            words += ["--init-from", str(folder_of(word.partition("_")[2]))]
            words += ["--offline-steps", "0"] if word.startswith("AFTER_") else []
        else:
            words += stand_for.get(word, word).split()
    return words


def runs_of(comparison: str, task: str) -> list[str]:
    """The runs that a task has: those for whose words in capitals its budget has something."""
    return [
        run for run in COMPARISONS[comparison]
        if not any(word.isupper() and word[0] != "-" for word in words_of(comparison, task, run, str))
    ]  # fmt: skip


def sources(comparison: str, run: str) -> list[str]:
    """The runs whose agents a run starts from."""
    flags = COMPARISONS[comparison].get(run, Run(run)).flags.split()
    return [word.partition("_")[2] for word in flags if word.startswith(("AFTER_", "FROM_"))]
