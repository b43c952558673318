"""What four papers claim, and what came out here: runs what is missing, and writes the pages of results.

    python tests/reproduction/claims.py                          # all but tasks that end in -full, most worth first
    python tests/reproduction/claims.py --only ooo-iql-kitchen
    python tests/reproduction/claims.py --only-page              # runs nothing

A claim says that one policy ends better than another, on a task. Its two runs are those of comparisons.py. What
is finished is not run again, and what was interrupted is resumed. Of each finished run a small record stays in
docs/results/ (records.py). The pages and their figure are made from the records alone (pages.py).
"""

import pathlib
from dataclasses import dataclass

import pages
import records
import tables
import tyro
from comparisons import sources
from pages import Claim


def on_all(name: str, tasks: dict[str, str], *rest) -> list[Claim]:
    """The same claim on several tasks, each with its measure."""
    place, says, comparison, better, worse = rest
    return [
        Claim(f"{name}-{task}", place, says, comparison, task, better, worse, m) for task, m in tasks.items()
    ]


WALL, MAZE = "point-mass-wall", "maze2d-large-missing-data"
MAZE_STEPS, MAZE_FULL = f"{MAZE}-steps", f"{MAZE}-full"
KITCHEN, MIXED = "kitchen-complete", "kitchen-mixed"
CHEETAH, HOPPER, SCORE = "halfcheetah-medium", "hopper-medium", "normalized_score"
SPARSE = "halfcheetah-sparse"
CHEETAH_LONG, WALKER = f"{CHEETAH}-long", "walker2d-medium"
LONG = {CHEETAH_LONG: SCORE}  # a larger share of the paper's budget
ANT = {"antmaze-umaze-long": "success"}
CLOSER = {**LONG, "halfcheetah-official": SCORE}  # to what Off2OnRL's paper did
BODIES = {CHEETAH: SCORE, HOPPER: SCORE}
ALL_BODIES = {**BODIES, WALKER: SCORE}
BODIES_AND_WALL = {**ALL_BODIES, WALL: "return"}
BODY_NAMES = "halfcheetah", "hopper", "walker2d"
OTHER_DATA = {f"{body}-{data}": SCORE for data in ("random", "medium-expert") for body in BODY_NAMES}
CLAIMS = [  # most worth per hour first
    *on_all("ooo-iql", {WALL: "return", MAZE: "return", KITCHEN: "solved"},
            "OOO, Tables 1 and 2", "OOO(IQL) ends above IQL", "ooo", ("ooo_iql", "retrained"), ("iql", "online")),
    *on_all("ooo-iql-bonus", {WALL: "return", MAZE: "return", KITCHEN: "solved"},
            "OOO, Figure 4", "retraining ends above IQL + bonus", "ooo",
            ("ooo_iql", "retrained"), ("ooo_iql", "online")),
    *on_all("ooo-frozen", {WALL: "return"},
            "OOO, Figure 3", "OOO(IQL) ends above OOO(IQL) with the bonus kept", "ooo",
            ("ooo_iql", "retrained"), ("frozen_bonus", "retrained")),
    *[claim for run, (figure, says) in {  # of the last two we know the question alone
        "no_upsampling": ("11", "OOO(IQL) ends above OOO(IQL) without up-sampling"),
        "warm_start": ("13 (direction ours)", "OOO(IQL) from scratch ends above OOO(IQL) with a warm start"),
        "sync": ("14 (direction ours)", "OOO(IQL) ends above OOO(IQL) with a synchronised explorer"),
    }.items() for claim in on_all(
        f"ooo-{run.replace('_', '-')}", {WALL: "return"}, f"OOO, Figure {figure}", says, "ooo",
        ("ooo_iql", "retrained"), (run, "retrained"))],
    *on_all("iql-fine-tunes", {KITCHEN: "solved", MIXED: "solved"},
            "OOO, Table 1", "IQL is better after fine-tuning than before", "ooo",
            ("iql", "online"), ("iql", "offline")),
    *on_all("ooo-rlpd", {WALL: "return", MAZE: "return", SPARSE: "return"},
            "OOO, Table 3", "OOO(RLPD) ends above RLPD", "ooo", ("ooo_rlpd", "retrained"), ("rlpd", "online")),
    *on_all("ooo-rlpd-bonus", {SPARSE: "return"},
            "OOO, Table 3", "OOO(RLPD) ends above RLPD + RND",
            "ooo", ("ooo_rlpd", "retrained"), ("ooo_rlpd", "online")),
    *on_all("rlpd-bonus", {SPARSE: "return"},
            "OOO, Table 3", "RLPD + RND ends above RLPD", "ooo", ("ooo_rlpd", "online"), ("rlpd", "online")),
    *on_all("ooo-cal-ql", {WALL: "return", MAZE: "return"},
            "OOO, Table 2", "OOO(Cal-QL) ends above Cal-QL", "ooo", ("ooo_cal_ql", "retrained"), ("cal_ql", "online")),
    *on_all("ooo-pex", {WALL: "return", MAZE: "return"},
            "OOO, Table 2", "OOO(IQL) ends above PEX", "ooo", ("ooo_iql", "retrained"), ("pex", "online")),
    # the paper's steps, with small networks: hours on two cores
    Claim("steps-ooo-iql", "OOO, Tables 1 and 2", "OOO(IQL) ends above IQL", "ooo", MAZE_STEPS,
          ("ooo_iql_64", "retrained"), ("iql", "online")),
    Claim("steps-ooo-iql-bonus", "OOO, Figure 4", "retraining ends above IQL + bonus", "ooo", MAZE_STEPS,
          ("ooo_iql_64", "retrained"), ("ooo_iql_64", "online")),
    Claim("steps-ooo-pex", "OOO, Table 2", "OOO(IQL) ends above PEX", "ooo", MAZE_STEPS,
          ("ooo_iql_64", "retrained"), ("pex", "online")),
    Claim("steps-iql-fine-tunes", "OOO, Table 1", "IQL is better after fine-tuning than before", "ooo", MAZE_STEPS,
          ("iql", "online"), ("iql", "offline")),
    *[claim for run, (name, also) in {
        "iql": ("IQL", {**LONG, **ANT}), "sac": ("SAC from scratch", LONG), "awac": ("AWAC", {}),
        "jsrl": ("JSRL", {}), "pex": ("PEX", {**LONG, **ANT}),
    }.items() for claim in on_all(
        f"gde-{run}", {**BODIES_AND_WALL, **also},
        "GDE, Table 2", f"GDE ends above {name}", "gde", ("gde", "online"), (run, "online"))],
    *on_all("gde-pre", {**BODIES_AND_WALL, **LONG, **ANT},
            "GDE, Table 2", "GDE is better after fine-tuning than before",
            "gde", ("gde", "online"), ("pre", "offline")),
    *on_all("gde-qdagger", {CHEETAH: SCORE, WALKER: SCORE, WALL: "return"},
            "GDE, Table 2", "GDE ends above QDagger", "gde", ("gde", "online"), ("qdagger", "online")),
    *on_all("gde-re-iql", {CHEETAH: SCORE, **LONG, WALKER: SCORE},
            "GDE, Table 1", "ReIQL ends above OnIQL", "gde", ("re_iql", "online"), ("on_iql", "online")),
    *on_all("gde-on-iql", {HOPPER: SCORE},
            "GDE, Table 1", "OnIQL ends above ReIQL", "gde", ("on_iql", "online"), ("re_iql", "online")),
    *on_all("gde-bp-iql", ALL_BODIES,
            "GDE, Table 1", "OnIQL ends above BpIQL", "gde", ("on_iql", "online"), ("bp_iql", "online")),
    *[claim for script, name in {"td3_bc": "TD3+BC", "cql": "CQL"}.items() for claim in on_all(
        f"gde-{script.replace('_', '-')}", {CHEETAH: SCORE},
        "GDE, Table 3", f"GDE on {name} ends above {name}", "gde", (f"gde_{script}", "online"), (script, "online"))],
    *on_all("gde-no-explorer", {CHEETAH: SCORE, WALKER: SCORE, WALL: "return"},
            "GDE, Table 4", "GDE ends above GDE without explorer",
            "gde", ("gde", "online"), ("gde_no_explorer", "online")),
    *on_all("gde-alone", {CHEETAH: SCORE, **LONG},
            "GDE, Table 4", "GDE without exploiter ends above GDE",
            "gde", ("gde_no_exploiter", "online"), ("gde", "online")),
    *on_all("gde-no-exploiter", {HOPPER: SCORE, WALKER: SCORE, WALL: "return"},
            "GDE, Table 4", "GDE ends above GDE without exploiter",
            "gde", ("gde", "online"), ("gde_no_exploiter", "online")),
    *on_all("gde-no-teacher", {CHEETAH: SCORE, **LONG},
            "GDE, Table 4", "GDE without teacher ends above GDE",
            "gde", ("gde_no_teacher", "online"), ("gde", "online")),
    *on_all("gde-teacher", {WALKER: SCORE, WALL: "return", **ANT},
            "GDE, Table 4", "GDE ends above GDE without teacher",
            "gde", ("gde", "online"), ("gde_no_teacher", "online")),
    *on_all("gde-n-steps", {WALL: "return", **ANT},
            "GDE, Table 10", "n = 3 ends above n = 1", "gde", ("gde", "online"), ("gde_1_step", "online")),
    *on_all("gde-filter", BODIES,
            "GDE, Table 5", "Filter ends above IQL", "gde", ("filter", "online"), ("iql", "online")),
    *on_all("gde-per", {HOPPER: SCORE, WALL: "return"},
            "GDE, Table 5", "IQL ends above PER", "gde", ("iql", "online"), ("per", "online")),
    *on_all("gde-no-filter", {WALKER: SCORE},
            "GDE, Table 5", "IQL ends above Filter", "gde", ("iql", "online"), ("filter", "online")),
    *on_all("gde-per-better", {WALKER: SCORE},
            "GDE, Table 5", "PER ends above IQL", "gde", ("per", "online"), ("iql", "online")),
    *[claim for run, (place, says) in {
        "none": ("Figure 4", "O3F on IQL ends above fine-tuning without selection"),
        "noise": ("Figure 5", "O3F on IQL ends above noise without ranking"),
        "pre": ("Figure 4", "O3F on IQL is better after fine-tuning than before"),
        "loose_iql": ("Figure 3", "O3F on IQL ends above IQL with a larger expectile online"),
    }.items() for claim in on_all(
        f"o3f-{run}", ALL_BODIES, f"O3F, {place}", says,
        "o3f", ("o3f", "online"), (run, "offline" if run == "pre" else "online"))],
    *on_all("o3f-omega", {HOPPER: SCORE, WALKER: SCORE},
            "O3F, Figure 6 (direction ours)", "O3F by the critics' mean ends above O3F by mean and deviation",
            "o3f", ("o3f", "online"), ("omega", "online")),
    *[claim for run, (before, says) in {
        "loose_awac": ("awac", "AWAC ends above AWAC whose beta falls online"),
        "loose_cql": ("lagrange", "CQL ends above CQL whose gap falls online"),
    }.items() for claim in on_all(
        f"o3f-{run.replace('_', '-')}", {CHEETAH: SCORE}, "O3F, Figure 3 (direction ours)", says,
        "o3f", (before, "online"), (run, "online"))],
    *on_all("o3f-lapo", {CHEETAH: SCORE},
            "O3F, Figure 5", "O3F on LAPO ends above noise without ranking",
            "o3f", ("o3f_lapo", "online"), ("noise_lapo", "online")),
    *on_all("o3f-bias", {CHEETAH: "q_bias"},
            "O3F, Figure 2", "Q is further above the return in SAC after CQL than in CQL",
            "o3f", ("sac_ft", "online"), ("cql", "online")),
    *[claim for run, (place, says) in {
        "sac_ft": ("Figure 3", "Off2OnRL ends above SAC-ft"),
        "sac": ("Figure 3", "Off2OnRL ends above SAC from scratch"),
        "pre": ("Figure 3", "Off2OnRL is better after fine-tuning than before"),
        "uniform": ("Figure 4c", "balanced replay ends above uniform replay"),
        "off2onrl_1": ("Figure 4d", "an ensemble of five ends above one agent"),
    }.items() for claim in on_all(
        f"off2onrl-{run}", {**ALL_BODIES, **CLOSER, **(OTHER_DATA if run in ("pre", "sac_ft") else {})},
        f"Off2OnRL, {place}", says,
        "off2onrl", ("off2onrl", "online"), (run, "offline" if run == "pre" else "online"))],
    *on_all("off2onrl-two", {CHEETAH: SCORE},
            "Off2OnRL, Figure 4d", "an ensemble of five ends above one of two",
            "off2onrl", ("off2onrl", "online"), ("off2onrl_2", "online")),
    *[claim for run, name in {"awac": "AWAC", "bcq": "BCQ-ft"}.items() for claim in on_all(
        f"off2onrl-{run}", {**ALL_BODIES, **OTHER_DATA}, "Off2OnRL, Figure 3", f"Off2OnRL ends above {name}",
        "off2onrl", ("off2onrl", "online"), (run, "online"))],
    *on_all("off2onrl-falls", {**ALL_BODIES, **CLOSER},
            "Off2OnRL, Figure 1a", "a CQL agent is better before SAC with online rows only than after",
            "off2onrl", ("pre_1", "offline"), ("online_only_1", "online")),
    *on_all("off2onrl-online-only", {**ALL_BODIES, **CLOSER},
            "Off2OnRL, Figure 4c", "balanced replay ends above online rows only",
            "off2onrl", ("off2onrl", "online"), ("online_only", "online")),
    *on_all("off2onrl-fqe", {CHEETAH: SCORE},
            "Off2OnRL, Figure 1c", "CQL's critics to begin with end above those of FQE",
            "off2onrl", ("off2onrl", "online"), ("fqe", "online")),
    *on_all("off2onrl-target", {CHEETAH: SCORE},
            "Off2OnRL, paper against code", "a target for each member ends above one for their mean",
            "off2onrl", ("off2onrl", "online"), ("mean_target", "online")),
    *on_all("cal-ql-floor", {KITCHEN: "solved"},
            "OOO, Figure 7", "Cal-QL with a floor for uniform actions ends above Cal-QL without it",
            "ooo", ("cal_ql", "online"), ("no_uniform_floor", "online")),
    *[claim for method, name in {"iql": "IQL", "sac": "SAC"}.items() for n in (8, 32, 128) for claim in on_all(
        f"num-envs-{method}-{n}", BODIES if method == "iql" else {CHEETAH: SCORE},
        "ours", f"{name} with one environment ends above {name} with {n}",
        "num_envs", (f"{method}_1", "online"), (f"{method}_{n}", "online"))],
    # defects of official codes, put back into our scripts
    *[claim for run, (task, what, name, method, mended) in {
        "rnd_twice": (MAZE, "RND's error normalised twice", "OOO(IQL)", "iql", "ooo_iql_64"),
        "one_ring": (MAZE, "one ring of 500,000 rows", "OOO(IQL)", "iql", "ooo_iql"),
        "still_rnd": (WALL, "an RND that does not learn", "OOO(Cal-QL)", "cal_ql", "ooo_cal_ql"),
    }.items() for word in [run.replace("_", "-")]
      for claim in [
        Claim(f"defect-{word}", "OOO's code", f"{name} ends above {name} with {what}", "ooo", task,
              (mended, "retrained"), (run, "retrained")),
        Claim(f"defect-{word}-base", "OOO's code", f"{name} with {what} ends above {name[4:-1]}", "ooo", task,
              (run, "retrained"), (method, "online")),
        Claim(f"defect-{word}-explorer", "OOO's code", f"the explorer of {name} ends above that with {what}",
              "ooo", task, (mended, "online"), (run, "online")),
    ]],
    *on_all("defect-raw-online", {CHEETAH: SCORE},
            "IQL's code", "IQL ends above IQL whose online rewards are not scaled as the data's are", "gde",
            ("iql", "online"), ("raw_online", "online")),
    # the paper's own budget, which asks for a GPU; made only by name
    *on_all("full-iql-fine-tunes", {MAZE_FULL: "return"},
            "OOO, Table 2", "IQL is better after fine-tuning than before", "ooo",
            ("iql", "online"), ("iql", "offline")),
    *on_all("full-ooo-iql", {MAZE_FULL: "return"},
            "OOO, Tables 1 and 2", "OOO(IQL) ends above IQL", "ooo", ("ooo_iql", "retrained"), ("iql", "online")),
    *on_all("full-ooo-iql-bonus", {MAZE_FULL: "return"},
            "OOO, Figure 4", "retraining ends above IQL + bonus", "ooo",
            ("ooo_iql", "retrained"), ("ooo_iql", "online")),
    *on_all("full-ooo-td3", {MAZE_FULL: "return"},
            "OOO, Table 2", "TD3 + RND ends above OOO(IQL)", "ooo", ("td3", "online"), ("ooo_iql", "retrained")),
    *on_all("full-ooo-pex", {MAZE_FULL: "return"},
            "OOO, Table 2", "OOO(IQL) ends above PEX", "ooo", ("ooo_iql", "retrained"), ("pex", "online")),
]  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Runs what the claims need, keeps a record of each run, and writes the pages."""

    only: tuple[str, ...] = ()
    """names of claims, or beginnings of names; by default all, but for those that begin with "full-" """
    only_page: bool = False
    """run nothing; write the pages from the records"""
    seeds: int = 3
    """seeds of each run"""
    runs_dir: pathlib.Path = pathlib.Path("runs")
    """folder of runs"""
    logs: pathlib.Path = pathlib.Path("comparison")
    """folder for what the runs print"""


def main() -> None:
    """Exits with 1 if a run has failed; each is tried once."""
    args = tyro.cli(Args)
    if unknown := [name for name in args.only if not any(c.name.startswith(name) for c in CLAIMS)]:
        raise SystemExit(f"error: --only {unknown[0]} is not one of {', '.join(c.name for c in CLAIMS)}")
    chosen = [
        c for c in CLAIMS if (c.name.startswith(args.only) if args.only else not c.name.startswith("full-"))
    ]
    tried: set[pathlib.Path] = set()
    failed: list[str] = []
    for claim in () if args.only_page else chosen:
        key = claim.comparison, claim.task
        where = tables.Args(*key, seeds=args.seeds, runs_dir=args.runs_dir, out=args.logs)
        for run in dict.fromkeys(claim.runs):
            path = records.path_of(*key, run)
            if path.exists() or path in tried:
                continue
            tried.add(path)
            tables.carry_out(where, run)
            for made in (*sources(claim.comparison, run), run):
                folder = tables.folder_of(where, made)
                if not (folder / "result.json").exists():
                    failed.append(tables.name_of(where, made))
                elif not records.path_of(*key, made).exists():
                    records.keep(*key, made, folder)
            pages.write(CLAIMS)
    print(*(path.relative_to(tables.REPO) for path in pages.write(CLAIMS)))
    if failed:
        raise SystemExit(f"error: no result from {', '.join(dict.fromkeys(failed))}; see {args.logs}/")


if __name__ == "__main__":
    main()
