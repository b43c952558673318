"""What is compared with what, task by task: the runs of each paper's comparison, and their budgets.

A comparison is a set of runs. Each run is one command of a script of algos/. Budgets are flags that are
alike within a family of methods, so that nothing but the method differs. Words in capitals stand for other
words: in a run's flags those of its task's budget, and `AFTER_<run>` for the flags that start from the agents
of that run.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Run:
    """A run of `script` with `flags`, after those of the whole task.

    rows: phase -> its name in tables; a phase that is not there has no row.
    """

    script: str
    flags: str = ""
    rows: dict[str, str] = field(default_factory=dict)


OOO = {
    "iql": Run("iql", "IQL", {"offline": "IQL, offline", "online": "IQL"}),
    "ooo_iql": Run("ooo_iql", "IQL IQL_RETRAIN", {"online": "IQL + bonus", "retrained": "OOO(IQL)"}),
    "pex": Run("pex", "IQL", {"online": "PEX"}),
    "cql": Run("cql", "CQL", {"offline": "CQL, offline", "online": "CQL"}),
    "sac_ft": Run("sac", "SAC AFTER_cql --random-steps 0", {"online": "SAC-ft (from CQL)"}),
    "cal_ql": Run("cal_ql", "CQL", {"offline": "Cal-QL, offline", "online": "Cal-QL"}),
    "ooo_cal_ql": Run("ooo_cal_ql", "CQL CQL_RETRAIN", {"online": "Cal-QL + RND", "retrained": "OOO(Cal-QL)"}),
    "rlpd": Run("rlpd", "RLPD", {"online": "RLPD"}),
    "ooo_rlpd": Run("ooo_rlpd", "RLPD RLPD_RETRAIN", {"online": "RLPD + RND", "retrained": "OOO(RLPD)"}),
    "td3": Run("td3", "TD3 --intrinsic rnd TD3_RETRAIN", {"online": "TD3 + RND", "retrained": "TD3, retrained"}),
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
}  # fmt: skip
COMPARISONS = {"ooo": OOO}

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
        "SAC": "--online-steps 200000 --utd-ratio 0.03125 --hidden 64 64 --critic-hidden 64 64",
        "RLPD": "--online-steps 200000 --utd-ratio 0.0625 --hidden 128 128 --critic-hidden 128 128 --policy-every 1",
        "RLPD_RETRAIN": "--retrain-steps 25000",
        "TD3": "--online-steps 400000 --utd-ratio 0.0625 --hidden 128 128 --critic-hidden 128 128",
        "TD3_RETRAIN": "--retrain-steps 50000",
    },
    **{("ooo", f"kitchen-{task}"): {
        "ALL": "--num-envs 32 --eval-episodes 5 --eval-every 12000 --checkpoint-every 3000",
        "IQL": "--offline-steps 12000 --online-steps 19200 --utd-ratio 0.25",
        "IQL_RETRAIN": "--retrain-steps 12000",
    } for task in ("complete", "mixed")},
}  # fmt: skip


def words_of(comparison: str, task: str, run: str, folder_of) -> list[str]:
    """The flags of one run, split into words; `folder_of(run)` is where another run's agents are."""
    stand_for = BUDGETS[comparison, task]
    words = []
    for word in f"ALL {COMPARISONS[comparison].get(run, Run(run)).flags}".split():
        if word.startswith("AFTER_"):
            words += ["--init-from", str(folder_of(word.removeprefix("AFTER_"))), "--offline-steps", "0"]
        else:
            words += stand_for.get(word, word).split()
    return words
