"""The card of a dataset: what to know about a dataset before training on it."""

import hashlib
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ooo_rl.data.buffer import Transition
from ooo_rl.data.datasets import action_box
from ooo_rl.data.datasets.scores import normalized_score, scored


def make_card(
    raw: Any, rows: Transition, episode: np.ndarray, truncation: np.ndarray, name: str, source: str
) -> dict:
    """The card of the dataset `name` that was read from `source`, in plain types.

    `rows` are the N checked rows, `episode` [N] their episode numbers and `truncation` [N] the flags of
    truncated last rows. `raw` (validate.Raw) gives the notes, the recipe and the actions before clipping.

    action_low and action_high are the bounds that the actions had in the file: they are rescaled to [-1, 1]
    already. They are None where nobody has said. discrete: True if actions are numbers of choices, of which
    there are action_size, or, if the file does not say it, one more than the largest. ordered: whether rows
    follow one another in time.
    """
    returns, lengths = np.bincount(episode, rows.reward), np.bincount(episode)
    quantiles = lambda x: [round(float(q), 4) for q in np.quantile(x, (0, 0.25, 0.5, 0.75, 1))]  # noqa: E731
    columns = rows.obs, rows.action, rows.reward, rows.next_obs, rows.discount
    task = raw.dataset_id or name
    has_returns = raw.ordered and not raw.endless
    score = normalized_score(task, scored(task, rows.reward, episode).mean()) if has_returns else None
    low, high = map(action_box.plain, raw.box) if raw.box else (None, None)
    return {
        "id": name, "source": source, "sha256": _digest(*columns), "sha256_of_ends": _digest(truncation),
        "episodes": len(lengths), "transitions": len(episode),
        "obs_size": rows.obs.shape[1], "action_size": raw.choices or rows.action.shape[1],
        "discrete": bool(raw.choices) or None,
        "return_quantiles": quantiles(returns), "return_mean": float(returns.mean()),
        "length_quantiles": quantiles(lengths),
        "reward_range": [float(rows.reward.min()), float(rows.reward.max())],
        "action_range": [float(raw.action.min()), float(raw.action.max())],
        "action_low": low, "action_high": high, "ordered": raw.ordered,
        "terminated_episodes": int((rows.discount == 0).sum()), "truncated_episodes": int(truncation.sum()),
        "normalized_score": None if score is None else float(score), "notes": raw.notes, "recipe": raw.recipe,
    }  # fmt: skip


def _digest(*columns: np.ndarray) -> str:
    """The first 16 digits of the SHA-256 of all bytes."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(column.tobytes())
    return digest.hexdigest()[:16]


def print_card(card: dict) -> None:
    """Prints a card as a table; empty entries are left out."""
    table = Table(title=escape(f"dataset {card['id']}"), show_header=False)
    for key, value in card.items():
        if value not in (None, [], "") and key not in ("id", "ordered", "sha256_of_ends"):
            shown = (
                ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
                if isinstance(value, list)
                else str(value)
            )
            table.add_row(
                key.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else escape(shown)
            )
    Console().print(table)
