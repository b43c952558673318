"""What a finished run leaves behind: a policy file per seed, learning curves, and maps of where a 2-D task was explored."""

import re
from typing import Any

import jax
import numpy as np

from data import cli, coverage, datasets, figures, policy
from data.buffer import Transition, size
from data.run import Run


def save_policies(run: Run, actors: Any, phase: str, action_size: int) -> None:
    """Writes `policies/<phase>_seed<k>[_<setting>].npz` for each run that did not break; `actors` have a leading axis of runs.

    Three kinds of actors are known by their parameters: IQL's has a `log_std`; SAC's last layer gives means and log standard
    deviations, 2 * action_size in all; a deterministic one gives actions alone.
    """
    actors = jax.device_get(actors)
    for r, label in enumerate(run.labels):
        if r not in run.failed:
            own = jax.tree.map(lambda x, r=r: x[r], actors)["params"]
            layers = sorted(own["MLP_0"].items(), key=lambda item: int(item[0].rpartition("_")[2]))
            dense = [(layer["kernel"], layer["bias"]) for _, layer in layers]
            weights, bias = dense[-1]
            if "log_std" in own:
                kind = {"output": "tanh_mean", "log_std": np.clip(own["log_std"], -5, 2)}
            elif len(bias) == 2 * action_size:
                dense[-1] = (weights[:, :action_size], bias[:action_size])
                kind = {"output": "tanh", "log_std_head": (weights[:, action_size:], bias[action_size:] - 1.0, -20.0, 2.0)}
            else:
                kind = {"output": "tanh"}
            path = run.folder / "policies" / f"{phase}_{_file_name(label)}.npz"
            path.parent.mkdir(exist_ok=True)
            policy.save(path, dense, **kind, algo=run.method, trained_on=run.task, source=str(run.folder))


def draw(run: Run, env: Any, offline: Transition | None, ring: Transition | None, collected: int) -> dict:
    """Draws `figures/`: learning curves, Q-values, and for tasks with a `layout` the map of data, visits and paths (the paper's Figure 2).

    `ring` [runs, capacity, ...] holds the `collected` online rows of each run; the paths come from `run.paths`, phase -> [runs, episodes,
    steps, 2]. Returns what the map shows in numbers, for result.json: crossings of each phase and the shortest path in the data.
    """
    folder, title, rows = run.folder / "figures", f"{run.method} on {run.task}", figures.read(run.folder / "metrics.csv")
    if run.phases:
        for metric in ("success", "return", "length"):
            figures.learning_curves(rows, folder / f"{metric}.png", metric=f"eval/{metric}", title=title)
    if any(row["metric"] == "q" for row in rows):
        figures.q_curves(rows, folder / "q.png", stops(run), run.args.max_q, title)
    if not hasattr(env, "layout"):
        return {}
    layout, panels = env.layout, []
    divided = len(layout["walls"]) == 1  # one wall: a path leads over or under it, and a grid search is fine enough to find one
    online = None if ring is None else jax.tree.map(lambda x: np.asarray(x)[:, : min(collected, x.shape[1])], ring)
    if offline is not None:
        note = _describe(coverage.shortest_path(offline.obs, offline.next_obs, layout)) if divided else f"{size(offline):,} rows"
        panels.append(figures.Panel("offline data", visits=offline.obs[:, :2], note=note))
    shortest = [_shortest(offline, online, r, layout) for r in range(len(run.labels))] if collected and divided else []
    if collected:
        found = [s for s in shortest if s]
        best = min(found, key=lambda s: s.steps) if found else None
        sides = [s.side if s else "none" for s in shortest]
        counts = ", ".join(f"{side} {sides.count(side)}" for side in ("under", "over", "none"))
        note = (
            f"shortest path in the data of {len(sides)} runs: {counts}"
            if divided
            else f"{collected:,} rows in each of {len(run.labels)} runs"
        )
        visits = np.concatenate(list(online.obs[..., :2]))
        panels.append(figures.Panel("online visits", visits=visits, shortest=best.path if best else None, note=note))
    crossed = {}
    for phase, paths in run.paths.items():
        note = ""
        if divided:
            crossed[phase] = [coverage.crossings(list(p), layout) for p in paths]
            share = coverage.crossings([p for run_paths in paths for p in run_paths], layout)
            note = "crossed " + ", ".join(f"{side} {part:.0%}" for side, part in share.items())
        panels.append(figures.Panel(f"policy: {phase}", paths=[run_paths[0] for run_paths in paths], note=note))
    figures.figure_2d(folder / "map.png", layout, panels)
    if {"offline", "online", "retrained"} <= run.paths.keys():
        by_title = {panel.title.removeprefix("policy: "): panel for panel in panels}
        stages = [by_title[name] for name in ("offline", "online visits", "retrained")]
        figures.framework(folder / "framework.png", layout, stages, rows=(size(offline), collected))
    if not divided:
        return {}
    return {"crossings": crossed, "shortest_paths": [{"steps": s.steps, "side": s.side} if s else None for s in shortest]}


def stops(run: Run) -> dict[tuple[int, str], tuple[str, int]]:
    """(seed, setting) -> (phase, step) of the runs that were stopped, out of the reasons that `run.failed` keeps."""
    where = {r: re.match(r"(.+), step (\d+): ", reason).groups() for r, reason in run.failed.items()}
    return {tuple(run.labels[r]): (phase, int(step)) for r, (phase, step) in where.items()}


def _shortest(offline: Transition | None, online: Transition, r: int, layout: dict) -> coverage.ShortestPath | None:
    parts = [jax.tree.map(lambda x: x[r], online)] + ([offline] if size(offline) else [])
    return coverage.shortest_path(np.concatenate([p.obs for p in parts]), np.concatenate([p.next_obs for p in parts]), layout)


def _describe(path: coverage.ShortestPath | None) -> str:
    return f"shortest path in the data: {path.steps:.0f} steps, {path.side} the wall" if path else "no path to the goal in the data"


def _file_name(label: Any) -> str:
    return f"seed{label.seed}" + (f"_{label.setting.replace(' ', '_')}" if label.setting else "")


def conclude(run: Run, env: Any, offline: Transition | None, ring: Transition | None, actors: dict[str, Any]) -> None:
    """Ends a run: figures, policies of `actors` (name -> parameters [runs, ...]), exported experience, result.json, closing table."""
    ring = None if ring is None else jax.device_get(ring)
    collected = run.args.online_steps
    action_size = env.action_size if env else offline.action.shape[1]
    for name, parameters in actors.items():
        save_policies(run, parameters, name, action_size)
    if run.args.export:
        export(run, ring, collected)
    run.finish(draw(run, env, offline, ring, collected))
    run.close()


def export(run: Run, ring: Transition | None, collected: int) -> None:
    """Writes each run's online rows as the Minari dataset `<--export>-seed<k>[-<setting>]-v0`, for any offline method to learn from."""
    for r, label in enumerate(run.labels):
        dataset = cli.export_id(run.args, label)
        written = run.args.resume and datasets.exists(dataset)  # by this run, just before it was interrupted
        if r not in run.failed and not written:
            rows = jax.tree.map(lambda x, r=r: x[r][:collected], ring)
            datasets.export_experience(
                dataset, rows, run.args.num_envs, description=f"{run.method} exploring {run.task}", recipe=str(run.folder)
            )
