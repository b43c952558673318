"""What a finished run leaves behind: results, a policy file per seed, learning curves, maps of 2-D tasks."""

import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.table import Table

from ooo_rl.data import policy
from ooo_rl.data.buffer import Transition, size
from ooo_rl.data.datasets import write
from ooo_rl.data.figures import aggregates, curves, maps, paths
from ooo_rl.data.runs.folder import numbers
from ooo_rl.data.runs.settings import export_id
from ooo_rl.data.runs.sweep import RunLabel


def save_policies(session: Any, export: Callable, actors: dict[str, Any]) -> None:
    """Writes `policies/<name>_seed<k>[_<setting>].npz` for each actor and each run that did not break.

    `actors` maps names to parameters with a leading axis of runs; `export(actor)` makes a policy file's
    arrays (see `data.policy`) of one run's.
    """
    for name, parameters in jax.device_get(actors).items():
        for r, label in enumerate(session.labels):
            if r in session.health.failed:
                continue
            own = export(jax.tree.map(lambda x, r=r: x[r], parameters))
            path = session.folder.path / "policies" / f"{name}_{_file_name(label)}.npz"
            path.parent.mkdir(exist_ok=True)
            policy.save(
                path, own, algo=session.method, trained_on=session.task, source=str(session.folder.path)
            )


def export_experience(session: Any, ring: Transition | None, collected: int) -> None:
    """Writes each run's online rows as the Minari dataset `<--export>-seed<k>[-<setting>]-v0`."""
    args = session.args
    for r, label in enumerate(session.labels):
        dataset = export_id(args, label)
        # By this run, just before it was interrupted? Its folder may be named from elsewhere now.
        written = args.resume and _tail(write.recipe_of(dataset) or "") == _tail(session.folder.path)
        if r not in session.health.failed and not written:
            rows = jax.tree.map(lambda x, r=r: x[r][:collected], ring)
            about = f"{session.method} exploring {session.task}"
            how = {"description": about, "recipe": str(session.folder.path)}
            choices = session.action_size if args.actions == "discrete" else 0
            worlds = args.num_envs, session.env.horizon
            write.export_experience(dataset, rows, *worlds, **how, choices=choices)


def _tail(folder: str | pathlib.Path) -> tuple[str, ...]:
    """Method, task and name of a run: the end of its folder's path."""
    return pathlib.Path(folder).parts[-3:]


def draw(session: Any, ring: Transition | None, collected: int, stages: tuple[str, ...]) -> dict:
    """Draws `figures/`: learning curves and Q-values; for tasks with a `layout` also data, visits and paths.

    `ring` [runs, capacity, ...] holds the `collected` online rows of each run. The paths come from
    `session.folder.paths`, phase -> [runs, episodes, steps, 2]. `stages` names the phases in the diagram of
    three phases, if the method has one. Returns what the map shows in numbers, for result.json: the crossings
    of each phase, and the shortest path in the data.
    """
    folder, title = session.folder.path / "figures", f"{session.method} on {session.task}"
    rows = curves.read(session.folder.path / "metrics.csv")
    units = {chunk.phase: "environment steps" if chunk.acts else "gradient steps" for chunk in session.plan}
    if session.phases:
        for metric in ("success", "return", "length"):
            curves.learning_curves(
                rows, folder / f"{metric}.png", metric=f"eval/{metric}", title=title, units=units
            )
    if any(row["metric"] == "q" for row in rows):
        limit = max(map(session.health.q_limit, range(len(session.labels))))
        curves.q_curves(rows, folder / "q.png", stops(session), limit, title, units)
    if not hasattr(session.env, "layout"):
        return {}
    offline = session.data and session.data.transitions
    online = (
        None if ring is None else jax.tree.map(lambda x: np.asarray(x)[:, : min(collected, x.shape[1])], ring)
    )
    return _draw_maps(session, offline, online, collected, stages)


def _draw_maps(
    session: Any, offline: Transition | None, online: Transition | None, collected: int, stages: tuple
) -> dict:
    """The map, and the diagram of `stages`; what they show in numbers."""
    layout, folder, panels = session.env.layout, session.folder.path / "figures", []
    # With one wall a path leads over or under it, and a grid search is fine enough.
    divided = len(layout["walls"]) == 1
    num_runs, kept = len(session.labels), 0 if online is None else online.obs.shape[1]
    last = f"the last {kept:,} of " if kept < collected else ""  # a ring that is smaller forgets
    if offline is not None:
        note = f"{size(offline):,} rows"
        if divided:
            note = _describe(paths.shortest_path(offline.obs, offline.next_obs, layout))
        panels.append(maps.Panel("offline data", visits=offline.obs[:, :2], note=note))
    shortest = (
        [_shortest(offline, online, r, layout) for r in range(num_runs)] if collected and divided else []
    )
    if collected:
        found = [s for s in shortest if s]
        best = min(found, key=lambda s: s.steps) if found else None
        sides = [s.side if s else "none" for s in shortest]
        counts = ", ".join(f"{side} {sides.count(side)}" for side in ("under", "over", "none"))
        note = f"{last}{collected:,} rows in each of {num_runs} runs"
        if divided:
            of = f" and {last}{collected:,} online rows" if last else ""
            note = f"shortest path in the data{of} of {len(sides)} runs: {counts}"
        visits = np.concatenate(list(online.obs[..., :2]))
        panels.append(
            maps.Panel("online visits", visits=visits, shortest=best.path if best else None, note=note)
        )
    crossed = {}
    for phase, walked in session.folder.paths.items():
        note = ""
        if divided:
            crossed[phase] = [paths.crossings(list(p), layout) for p in walked]
            share = paths.crossings([p for run_paths in walked for p in run_paths], layout)
            note = "crossed " + ", ".join(f"{side} {part:.0%}" for side, part in share.items())
        panels.append(maps.Panel(f"policy: {phase}", paths=[run_paths[0] for run_paths in walked], note=note))
    maps.figure_2d(folder / "map.png", layout, panels)
    if stages and set(stages) <= session.folder.paths.keys():
        by_title = {panel.title.removeprefix("policy: "): panel for panel in panels}
        shown = [by_title[name] for name in (stages[0], "online visits", stages[2])]
        maps.framework(folder / "framework.png", layout, shown, rows=(size(offline), collected))
    if not divided:
        return {}
    found = [{"steps": s.steps, "side": s.side} if s else None for s in shortest]
    return {"crossings": crossed, "shortest_paths": found}


def stops(session: Any) -> dict[tuple[int, str], tuple[str, int]]:
    """(seed, setting) -> (phase, step) of the stopped runs, from the reasons in `session.health.failed`."""
    failed = session.health.failed
    where = {r: re.match(r"(.+), step (\d+): ", reason).groups() for r, reason in failed.items()}
    return {tuple(session.labels[r]): (phase, int(step)) for r, (phase, step) in where.items()}


def _shortest(
    offline: Transition | None, online: Transition, r: int, layout: dict
) -> paths.ShortestPath | None:
    parts = [jax.tree.map(lambda x: x[r], online)] + ([offline] if size(offline) else [])
    obs, next_obs = (np.concatenate([getattr(p, name) for p in parts]) for name in ("obs", "next_obs"))
    return paths.shortest_path(obs, next_obs, layout)


def _describe(path: paths.ShortestPath | None) -> str:
    if path is None:
        return "no path to the goal in the data"
    return f"shortest path in the data: {path.steps:.0f} steps, {path.side} the wall"


def _file_name(label: RunLabel) -> str:
    return f"seed{label.seed}" + (f"_{label.setting.replace(' ', '_')}" if label.setting else "")


# --- results ---


def rows_by_setting(labels: list[RunLabel]) -> dict[str, list[int]]:
    """Swept values, in words -> the runs that have them."""
    settings = dict.fromkeys(label.setting for label in labels)
    return {
        setting: [i for i, label in enumerate(labels) if label.setting == setting] for setting in settings
    }


def results(session: Any, clock: dict[str, float], extra: dict) -> dict:
    """What result.json holds."""
    args, phases = session.args, session.phases
    found = {
        "method": session.method, "env": args.env, "eval_env": args.eval_env or args.env,
        "dataset": session.card["id"], "num_seeds": args.num_seeds,
        "seeds": [label.seed for label in session.labels],
        "phases": {**{chunk.phase: {} for chunk in session.plan}, **phases},
        "failed": {str(r): text for r, text in session.health.failed.items()},
        "broken_worlds": int(clock["broken_worlds"]),
        "wall_seconds": clock["wall"],
        "seed_updates_per_second": clock["updates"] / max(clock["run"], 1e-9),
        "env_steps_per_second": clock["env_steps"] / max(clock["online"], 1e-9),
        "compile_seconds": clock["compile"],
        **extra,
    }  # fmt: skip
    if args.sweep:
        found["settings"] = [
            {
                "setting": setting,
                "phases": {p: {m: [v[i] for i in index] for m, v in of.items()} for p, of in phases.items()},
            }
            for setting, index in rows_by_setting(session.labels).items()
        ]
    return found


def table(session: Any) -> Table:
    """Phase x measure: IQM over seeds and its 95 % stratified-bootstrap interval."""
    args, phases = session.args, session.phases
    title = f"{session.method} on {session.task}: IQM over {args.num_seeds} seeds [95 % interval]"
    drawn = Table(title=title)
    measures = list(dict.fromkeys(m for found in phases.values() for m in found))
    for column in (["setting"] if args.sweep else []) + ["phase", *measures]:
        drawn.add_column(column, overflow="fold")
    for setting, index in rows_by_setting(session.labels).items():
        for phase, found in phases.items():
            cells = [_cell(numbers(found[measure][i] for i in index)) for measure in measures]
            drawn.add_row(*([setting] if args.sweep else []), phase, *cells)
    return drawn


def _cell(values: np.ndarray) -> str:
    s = aggregates.summarise(values)
    return f"{s['iqm']:.2f}" + (f" [{s['low']:.2f}, {s['high']:.2f}]" if math.isfinite(s["low"]) else "")
