"""Training in tests: what a run of any script leaves in memory."""

import inspect
from collections import Counter
from types import SimpleNamespace

import jax
import pytest

from ooo_rl.data.runs import session
from ooo_rl.data.runs.program import Compiled
from ooo_rl.data.runs.session import Result


class Watched(Compiled):
    """Compiled, counting its traces and its calls by static arguments."""

    def __init__(self, function, *arguments, **more):
        self.traces, self.calls = 0, Counter()

        def traced(*inputs, **static):
            self.traces += 1
            return function(*inputs, **static)

        traced.__signature__ = inspect.signature(function)
        super().__init__(traced, *arguments, **more)

    def __call__(self, *arguments, **static):
        self.calls[tuple(static.items())] += 1
        return super().__call__(*arguments, **static)


def trained(script, whole=True, like=None, options=None, **settings):
    """A finished run of `script`: what `train` returned, its networks, its programs and the policy played.

    `ended` holds for each phase (the agent trained in it, the policy's parameters) at its end, [runs, ...].
    If not `whole`, the run is trained and nothing else. It runs the programs of the run `like`, if there is
    one, whose settings must be the same in all that is compiled. `options` of XLA's compiler are for the
    programs of its phases.
    """
    seen = SimpleNamespace(programs=[], ended={})
    make_nets, begin, after = script.make_nets, session.Session.begin, session.Session.after

    def note_nets(*inputs):
        seen.nets = make_nets(*inputs)
        return seen.nets

    def note_policy(self, state, act):
        seen.act = act
        return begin(self, state, act)

    def note_end(self, chunk, metrics, state, actor=None):
        after(self, chunk, metrics, state, actor)
        if chunk.last:
            agent = getattr(state, chunk.agent)
            seen.ended[chunk.phase] = jax.device_get((agent, agent.actor.params if actor is None else actor))

    def note_program(*arguments, **more):
        program = Watched(*arguments, **more | ({"options": options} if options else {}))
        if like:
            program.programs = like.programs[len(seen.programs)].programs
        seen.programs.append(program)
        return program

    def conclude(self, *_, **__):
        self.folder.close()
        return Result(self.path, {}, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_nets", note_nets)
        patch.setattr(session.Session, "begin", note_policy)
        patch.setattr(session.Session, "after", note_end)
        patch.setattr(session, "Compiled", note_program)
        if not whole:
            patch.setattr(session, "Evaluator", lambda *_: SimpleNamespace(possible=False))
            patch.setattr(session.Session, "conclude", conclude)
        seen.result = script.train(script.Args(**settings))
    return seen
