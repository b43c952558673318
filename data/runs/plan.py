"""The plan of a run: its phases in order, cut into chunks where an evaluation or a checkpoint is due."""

import itertools
import math
from typing import Any, NamedTuple

from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.bounds import flag


class Phase(NamedTuple):
    """A stretch of one phase, from step `start` to step `end`.

    agent: the field of the method's state that holds the agent it trains.
    acts: whether its steps are environment steps, which gradient steps follow; else they are gradient steps.
    collected: online rows that are there before a phase that does not act.
    idle: its environment steps before this one are followed by no gradient step.
    """

    name: str
    start: int
    end: int
    agent: str = "agent"
    acts: bool = False
    collected: int = 0
    idle: int = 0


class Chunk(NamedTuple):
    """A part of a phase that runs as one compiled call. Steps are those of its phase."""

    phase: str
    start: int
    length: int
    evaluate: bool
    save: bool
    first: bool  # of its phase
    last: bool
    agent: str  # the field of the state that is trained
    acts: bool
    collected: int  # online rows, before the chunk
    iterations: int  # steps of all environments at once where it acts, else gradient steps
    learns: bool  # whether there are gradient steps at all


def cut(args: Any, plan: list[Phase]) -> list[Chunk]:
    """The chunks of `plan`; a UsageError if it cannot be carried out."""
    for phase in plan:
        _check(args, phase)
    chunks = [chunk for phase in plan for chunk in cut_phase(args, phase)]
    if not chunks:
        steps = [flag(name) for name in vars(args) if name.endswith("_steps")]
        raise UsageError(f"nothing to do: no phase has a step; see {', '.join(steps)}")
    return chunks


def _check(args: Any, phase: Phase) -> None:
    """Raises UsageError if a phase cannot be carried out.

    A phase that acts stays within --online-steps and ends between two vector steps. One that does not act
    has rows to learn from.
    """
    name, end = phase.name, phase.end
    if phase.acts and end > args.online_steps:
        raise UsageError(
            f"{name} is to stop at step {end}, which is beyond --online-steps {args.online_steps}"
        )
    if phase.acts and end % args.num_envs:
        what = (
            f"--online-steps {end}" if end == args.online_steps else f"step {end}, where {name} is to stop,"
        )
        near = math.ceil(end / args.num_envs) * args.num_envs
        raise UsageError(f"{what} is not a multiple of --num-envs {args.num_envs}; the next one is {near}")
    if not phase.acts and end > phase.start and args.dataset == "none" and not phase.collected:
        raise UsageError(
            f"{name} has nothing to learn from yet: it needs --dataset, since {args.env} has no dataset of "
            "its own, or steps online before it"
        )


def cut_phase(args: Any, phase: Phase) -> list[Chunk]:
    """The chunks of one phase; none if it has no step."""
    start, end = phase.start, phase.end
    if end <= start:
        return []
    block = args.num_envs if phase.acts else 1
    evaluate_every = args.eval_every or math.ceil((end - start) / 4)

    def due(every: int) -> set[int]:
        """Steps after which something is due that comes `every` so many steps, and at the end."""
        steps = range(every * (start // every + 1), end, every)
        return {min(math.ceil(step / block) * block, end) for step in steps} | {end}

    evaluations, saves = due(evaluate_every), due(args.checkpoint_every or evaluate_every)
    learning = math.ceil(phase.idle / block) * block
    begins = {learning} if start < learning < end else set()
    edges = [start, *sorted(evaluations | saves | begins)]
    return [
        Chunk(
            phase.name, a, b - a, b in evaluations, b in saves, first=a == start, last=b == end,
            agent=phase.agent, acts=phase.acts,
            collected=a if phase.acts else phase.collected, iterations=(b - a) // block, learns=a >= learning,
        )
        for a, b in itertools.pairwise(edges)
    ]  # fmt: skip
