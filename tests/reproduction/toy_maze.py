"""GDE's Figure 2 in our toy maze: which of two goals fine-tuning finds, from one and the same CQL agent.

    python tests/reproduction/toy_maze.py --out toy_maze

Discrete CQL is trained on the maze's data, which mostly lead to the right goal or nowhere. From its networks
three methods go on, each of `--seeds` seeds: CQL with its own loss, DQN (the same without the conservative
loss) and GDE. What is finished is not run again, and what was interrupted is resumed; so this can be called
again and again; other settings need another `--out`. Writes there the table `toy_maze.md`, the heat maps
`visits.png` (with the policies' paths) and the learning curves `return.png`.
"""

import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro

from ooo_rl import envs
from ooo_rl.data import policy
from ooo_rl.data.figures import aggregates, curves, maps
from ooo_rl.data.recipes import library
from ooo_rl.envs.rollout import rollout

REPO = pathlib.Path(__file__).parents[2]
RUNS = {  # name -> (script, flags, title)
    "offline": ("dqn", "--online-steps 0", "CQL, offline"),
    "cql": ("dqn", "--online-cql-weight 3 --init-from OFFLINE --offline-steps 0", "CQL, fine-tuned"),
    "dqn": ("dqn", "--online-cql-weight 0 --init-from OFFLINE --offline-steps 0", "DQN, fine-tuned"),
    "gde": ("gde_dqn", "--init-from OFFLINE --offline-steps 0", "GDE"),
}
EPISODES = 100  # with each policy, to see where it goes


@dataclass(frozen=True)
class Args:
    """Runs the experiment, and draws its figures."""

    out: pathlib.Path = pathlib.Path("toy_maze")
    """folder to write to"""
    seeds: int = 5
    """seeds of each run"""
    offline: str = ""
    """more flags of the offline run, for a shorter experiment"""
    online: str = ""
    """more flags of the others"""
    gde: str = ""
    """more flags of GDE, after those: its trials"""


def folder_of(args: Args, run: str) -> pathlib.Path:
    return args.out / "runs" / RUNS[run][0] / "toy-maze" / run


def command(args: Args, run: str) -> list[str]:
    """The command line of one run."""
    script, flags, _ = RUNS[run]
    more = args.offline if run == "offline" else f"{args.online} {args.gde if run == 'gde' else ''}"
    words = [*flags.replace("OFFLINE", str(folder_of(args, "offline"))).split(), *more.split()]
    return [f"algos/{script}.py", "--env", "toy-maze", "--num-seeds", str(args.seeds), *words,
            "--eval-every", "5000", "--checkpoint-every", "25000",
            "--runs-dir", str(args.out / "runs"), "--name", run]  # fmt: skip


def carry_out(args: Args, run: str) -> None:
    """Runs what is left of a run; raises SystemExit if it fails."""
    folder = folder_of(args, run)
    if (folder / "result.json").exists():
        return
    script, *words = command(args, run)
    if (folder / "config.json").exists():
        words = ["--resume", str(folder)]
    print(time.strftime("%T"), script, *words, flush=True)
    log = args.out / f"{run}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        code = subprocess.run([sys.executable, REPO / script, *words], stdout=file, stderr=file, check=False)
    if code.returncode:
        raise SystemExit(f"error: {run} failed: {log}")


def visits(folder: pathlib.Path) -> np.ndarray:
    """Positions [N, 2] of all online rows of all seeds, from the last checkpoint."""
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        what = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(manager.latest_step(), args=what)["state"]
    return np.asarray(state["ring"]["obs"]).reshape(-1, 2)


def player(env: envs.Env) -> Callable[[list[dict]], dict[str, np.ndarray]]:
    """The function that plays EPISODES with each of P policies of one shape: arrays [P, EPISODES, ...]."""

    @jax.jit
    def play(numbers, keys):
        words = {"output_activation": "argmax", "hidden_activation": "relu", "num_layers": 3}
        one = lambda own, key: rollout(  # noqa: E731
            env, lambda obs: policy.forward(words | own, obs, None, jnp), key, EPISODES, record=True
        )
        return jax.vmap(one)(numbers, keys)

    def play_all(actors):
        numbers = [{k: v for k, v in actor.items() if v.dtype.kind == "f"} for actor in actors]
        stacked = jax.tree.map(lambda *parts: np.stack(parts), *numbers)
        keys = jax.random.split(jax.random.PRNGKey(1000), len(actors))
        return jax.device_get(play(stacked, keys))

    return play_all


def ends(env: envs.Env, tally: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The shares [P] of the episodes that end at the left goal, at the right one, and at none."""
    last = tally["obs"][:, :, -1]  # the last position is repeated
    distance = np.linalg.norm(last[:, :, None] - np.array(env.layout["goals"]), axis=-1)
    at = [(tally["success"] > 0) & (distance.argmin(axis=-1) == goal) for goal in (0, 1)]
    left, right = (found.mean(axis=1) for found in at)
    return {"left": left, "right": right, "none": 1 - left - right}


def main() -> None:
    args = tyro.cli(Args)
    for run in RUNS:
        carry_out(args, run)
    env, lines, rows = envs.make("toy-maze"), [], []
    play = player(env)
    data = library.load("ooo/toy-maze/mixed-v0").transitions
    panels = [maps.Panel("data", visits=data.obs, note=f"{len(data.obs):,} rows")]
    for run, (_, _, title) in RUNS.items():
        folder = folder_of(args, run)
        files = [folder / "policies" / f"policy_seed{seed}.npz" for seed in range(args.seeds)]
        tally = play([policy.load(file) for file in files])
        found = ends(env, tally)
        note = ", ".join(f"{goal} {share.mean():.0%}" for goal, share in found.items())
        seen = None if run == "offline" else visits(folder)
        paths = tally["obs"][:, 0]
        panels.append(maps.Panel(title, visits=seen, paths=paths, note=note))
        returns = aggregates.summarise(tally["return"].mean(axis=1))
        cells = [f"{share.mean():.2f}" for share in found.values()]
        cells += [" ".join(f"{share:.2f}" for share in found["left"])]
        cells += [f"{returns['iqm']:.1f} [{returns['low']:.1f}, {returns['high']:.1f}]"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
        if run != "offline":
            rows += [{**row, "setting": title} for row in curves.read(folder / "metrics.csv")]
    head = "| policy | left goal | right goal | none | left, by seed | return |\n|---|--:|--:|--:|---|---|\n"
    text = head + "\n".join(lines) + "\n"
    (args.out / "toy_maze.md").write_text(text)
    print(text)
    maps.figure_2d(args.out / "visits.png", env.layout, panels)
    units = {"online": "environment steps"}
    curves.learning_curves(rows, args.out / "return.png", "eval/return", "fine-tuning in the toy maze", units)


if __name__ == "__main__":
    main()
