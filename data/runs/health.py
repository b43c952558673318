"""Whether side-by-side runs are sound: which of them broke and why, and how large their Q-values may be."""

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ooo_rl.data.buffer import Transition
from ooo_rl.data.runs.plan import Chunk
from ooo_rl.data.runs.program import real
from ooo_rl.data.runs.sweep import RunLabel


class Health:
    """What is known of the soundness of the runs `labels`.

    failed: run -> why it was stopped, in words. largest_reward [runs]: the largest |scaled reward| so far.
    """

    def __init__(self, labels: list[RunLabel], discount: np.ndarray, horizon: int, max_q: float):
        """`discount` [runs]; without discount a return is as long as an episode, `horizon`."""
        self.labels, self.max_q = labels, max_q
        self.horizon, self.lost_steps = horizon, [0] * len(labels)
        lengths = 1 / np.where(discount < 1, 1 - discount, 1 / horizon)
        self.lengths = np.asarray(lengths, np.float64)  # [runs], of what a Q-value adds up
        self.failed: dict[int, str] = {}
        self.largest_reward = [0.0] * len(labels)

    def note_rewards(self, hyper: Any, *rewards: Any) -> None:
        """Takes task rewards into account, numbers or arrays [runs]; `hyper` [runs] scales them."""
        num_runs = len(self.labels)
        scale, bias = real((hyper.reward_scale, hyper.reward_bias), num_runs)
        sizes = [np.abs(scale * np.asarray(reward) + bias) for reward in rewards]
        self.largest_reward = np.max([self.largest_reward, *sizes], axis=0).tolist()

    def note_ring(self, hyper: Any, ring: Transition | None) -> None:
        """Takes the rewards of the online rows [runs, capacity] into account; empty slots hold 0."""
        if ring is not None:
            extremes = [ring.reward.min(axis=1), ring.reward.max(axis=1)]
            self.note_rewards(hyper, *real(extremes, len(self.labels)))

    def q_limit(self, r: int) -> float:
        """The mean |Q-value| beyond which run `r` has diverged: --max-q times what rewards allow."""
        return self.max_q * (self.largest_reward[r] or 1.0) * self.lengths[r]

    def find_broken(
        self, chunk: Chunk, metrics: dict[str, Any], parameters: Any, others: dict[str, Any] | None = None
    ) -> list[int]:
        """Notes and returns the runs that broke in `chunk`.

        A run breaks where a metric [runs] or a parameter [runs, ...] is not finite, or the metric "q" is
        beyond `q_limit`. `others` maps names to more parameters that learn beside those of the agent.
        """
        runs = range(len(self.labels))
        bad = [[name for name, values in metrics.items() if not np.isfinite(values[r])] for r in runs]
        for owner, tree in {"": parameters, **(others or {})}.items():
            for path, finite in jax.tree_util.tree_leaves_with_path(self._finite(tree)):
                for r in np.flatnonzero(~finite):
                    bad[r].append(f"parameter {owner}{jax.tree_util.keystr(path)}")
        new = []
        for r, names in enumerate(bad):
            q = abs(float(metrics["q"][r])) if "q" in metrics else 0.0
            if r in self.failed or not (names or q > self.q_limit(r)):
                continue
            since = metrics["nonfinite_at"][r]
            why = self._not_finite(names, chunk, since) if names else self._diverged(r, metrics)
            self._stop(r, chunk, why)
            new.append(r)
        return new

    def _finite(self, tree: Any) -> Any:
        """Whether all numbers of each leaf [runs, ...] are finite, [runs]."""
        on_host = isinstance(next(iter(jax.tree.leaves(tree)), None), np.ndarray)
        return real((_finite_leaves if on_host else _finite_on_device)(tree), len(self.labels))

    def _not_finite(self, names: list[str], chunk: Chunk, first: Any) -> str:
        """`first`: the iteration of the chunk since which a metric is not finite; below 0: none is."""
        end = chunk.start + chunk.length
        since = f"step {end}" if first < 0 else f"iteration {int(first)} after step {chunk.start}"
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"not finite since {since}: {', '.join(names[:8])}{more}"

    def _diverged(self, r: int, metrics: dict) -> str:
        return (
            f"diverged, the mean Q-value is {metrics['q'][r]:.3g}, beyond {self.q_limit(r):.3g}, which is "
            f"--max-q {self.max_q:g} times what rewards up to {self.largest_reward[r]:.3g} allow"
        )

    def find_lost(self, chunk: Chunk, lost: np.ndarray) -> list[int]:
        """Notes and returns the runs with nothing to learn from: in an episode's time, all their steps broke.

        `lost` [runs] is how many worlds broke in `chunk`, whose steps count those of all worlds.
        """
        new = []
        for r, count in enumerate(lost):
            self.lost_steps[r] = self.lost_steps[r] + chunk.length if count > chunk.length - 0.5 else 0
            if self.lost_steps[r] >= self.horizon and r not in self.failed:
                why = f"in each of the last {self.lost_steps[r]} steps reward, state or action was not finite"
                self._stop(r, chunk, f"{why}; look at what the environment's step gives")
                new.append(r)
        return new

    def count_broken_worlds(self, chunk: Chunk, lost: np.ndarray) -> int:
        """Reports and adds up the worlds [runs] that became non-finite in `chunk`.

        The worlds of a stopped run do not count, since its actions are not finite.
        """
        total = sum(count for r, count in enumerate(lost) if r not in self.failed)
        if total:
            where, said = f"{chunk.phase}, step {chunk.start + chunk.length}", "broke and were started anew"
            print(f"{where}: {total:.0f} worlds {said}; the broken steps are not stored", file=sys.stderr)
        return round(float(total))

    def _stop(self, r: int, chunk: Chunk, why: str) -> None:
        self.failed[r] = f"{chunk.phase}, step {chunk.start + chunk.length}: {why}"
        label = f"seed {self.labels[r].seed} {self.labels[r].setting}".strip()
        print(f"{label} stopped in {self.failed[r]}", file=sys.stderr, flush=True)


def _finite_leaves(tree: Any, xp: Any = np) -> Any:
    return jax.tree.map(lambda x: xp.isfinite(x).reshape(x.shape[0], -1).all(axis=1), tree)


_finite_on_device = jax.jit(partial(_finite_leaves, xp=jnp))
