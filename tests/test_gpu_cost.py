"""What gpu_cost.py counts, on a small program whose counts are known by construction.

`gpu_program.txt` holds what XLA wrote of it when it was compiled for an H100, as far as the reader needs it:
`python tests/test_gpu_cost.py gpu_program.txt` makes it anew, with XLA's compiler for CUDA (docs/speed.md).
"""

import importlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.program import EVERYWHERE, GPU_OPTIONS, RUNS, Compiled

BENCHMARKS = pathlib.Path(__file__).parent / "benchmarks"
RECORDED = pathlib.Path(__file__).parent / "gpu_program.txt"
STEPS, PRODUCTS = 7, 3


def program(state, limit, *, length):
    """A scan whose steps have three products of matrices; a branch; two nested loops that end by their data."""

    def step(x, _):
        for _ in range(PRODUCTS):
            x = x @ x
        return x, None

    x, _ = jax.lax.scan(step, state, None, length)
    x = jax.lax.cond(limit > 3, lambda x: x @ x @ x, lambda x: -x, x)
    inner = lambda x: jax.lax.while_loop(lambda x: x[0, 1] < limit, lambda x: x @ x, x)  # noqa: E731
    return jax.lax.while_loop(lambda x: x[0, 0] < limit, lambda x: inner(x) @ x, x)


@pytest.fixture(scope="module")
def gpu():
    """The modules of gpu_cost.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setenv(
            "JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "")
        )  # it sets it, and this takes it back
        names = "cost", "programs", "thunks"
        yield SimpleNamespace(**{name: importlib.import_module(f"gpu_{name}") for name in names})


def speed(gpu):
    """A card that moves a gigabyte, and computes a thousand operations, in a second."""
    return gpu.thunks.Speed(1e9, 1e3)


def read(gpu, path):
    """The thunks of a recorded program and what counts them, with 4 and 15 iterations of the two loops."""
    sequence, metadata, hlo = path.read_text().split("-----\n")
    counting = gpu.thunks.Counting(gpu.thunks.instructions(hlo), (4, 15), speed(gpu))
    return gpu.thunks.parse(sequence, metadata), counting


def check_known_counts(gpu, thunks, counting):
    """Products are in each step and iteration as often as the program says; the host waits for its loops."""
    calls = {name for name, instruction in counting.hlo.items() if "cublas" in instruction.target}
    products = [thunk for thunk in gpu.thunks.walk(thunks) if thunk.name in calls]
    assert len(products) == PRODUCTS + 2 + 1 + 1  # one in each loop that ends by its data
    found = {(counting.hlo[name].flops, counting.hlo[name].moved) for name in calls}
    assert found == {(2 * 64**3, 3 * 4 * 64**2)}
    for thunk in gpu.thunks.walk(thunks):
        if not thunk.parts and thunk not in products:
            thunk.kind = "kWaitForStreams"  # which starts nothing
    total = counting.count(thunks)
    assert total["launches"] == STEPS * PRODUCTS + 2 + 4 * (1 + 15)
    main, steps, graph = counting.main_loop(thunks)
    assert (steps, graph) == (STEPS, False) and counting.count(main.parts["body"])["launches"] == PRODUCTS
    # The branch once, the outer loop's condition five times, the inner one's sixteen times in each iteration.
    branches = [t for t in gpu.thunks.walk(thunks) if t.kind == "kConditional"]
    assert len(branches) == 1
    assert total["waits"] == 1 + 5 + 4 * 16
    assert counting.count(main.parts["body"])["waits"] == 0
    # The products take all the time: with TF32 an eighth of that without.
    assert total["low"] == pytest.approx(total["launches"] * 2 * 64**3 / 8e3, rel=1e-3)
    assert total["high"] == pytest.approx(total["launches"] * 2 * 64**3 / 1e3, rel=1e-3)


def test_counts_of_the_recorded_program(gpu):
    check_known_counts(gpu, *read(gpu, RECORDED))


def test_a_main_loop_inside_a_graph_is_counted_there(gpu):
    kernels = {part: [gpu.thunks.Thunk("kKernel", part)] for part in ("condition", "body")}
    loop = gpu.thunks.Thunk("kWhile", "loop", kernels)
    graph = gpu.thunks.Thunk("kCommandBuffer", "graph", {"": [loop]})
    counting = gpu.thunks.Counting({"loop": gpu.thunks.Instruction(9)}, (4, 4), speed(gpu))
    assert counting.main_loop([graph]) == (loop, 9, True) and counting.main_loop([loop]) == (loop, 9, False)
    step = counting.count(loop.parts["body"], True)
    assert (step["launches"], step["outside"], counting.count([graph])["launches"]) == (1, 0, 9 + 10)


def installed() -> bool:
    return bool(importlib.util.find_spec("jax_plugins")) and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
    )


@pytest.mark.skipif(
    not installed(),
    reason="XLA's compiler for CUDA is not installed (docs/speed.md); a recorded program is counted",
)
def test_counts_of_the_program_compiled_now(gpu, tmp_path):
    """In a process of its own, where no cache of compiled programs is in use."""
    command = [sys.executable, __file__, tmp_path / "program.txt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    check_known_counts(gpu, *read(gpu, tmp_path / "program.txt"))


NESTED = """\
000: kCommandBuffer [source       | next=004 (1)]
    001: kWhile [source | sink]
condition:
        002: kKernel [source | sink] less
      body:
        003: kKernel [source | sink] more
004: kSequential    [prev=000 (1) | sink        ]   005: kCopy [source       | next=006 (1)] kCopy
  006: kTriangularSolve [prev=005 (1) | sink        ] (no description)
007: kCustomCall    [prev=004 (1) | sink        ] kCustomCall
"""
HLO = """\
  %loop = (s32[], f32[64,2]{1,0}) while(%start), condition=%c, body=%b, backend_config={KNOWN}
  ROOT %solve = (f32[8,8]{1,0:T(8,128)}, s8[100]{0}) custom-call(%a), custom_call_target="trsm", etc={1 = 2}
  %back = f32[] custom-call(%a), custom_call_target="xla_ffi_python_gpu_callback"
"""
NAMES = {1: "loop", 2: "less", 3: "more", 5: "solve", 6: "solve", 7: "back"}
METADATA = "".join(
    f'thunk_metadata {{\n thunk_info {{\n profile_annotation: "{name}"\n thunk_id: {i}\n }}\n}}\n'
    for i, name in NAMES.items()
)


@pytest.mark.parametrize(("config", "launches"), [('{"known_trip_count":{"n":"7"}}', 15), ("{}", 9)])
def test_a_loop_inside_a_graph_needs_no_host_and_a_callback_does(gpu, config, launches):
    hlo = gpu.thunks.instructions(HLO.replace("{KNOWN}", config))
    total = gpu.thunks.Counting(hlo, (4,), speed(gpu)).count(gpu.thunks.parse(NESTED, METADATA))
    assert (total["graphs"], total["waits"], total["outside"]) == (1, 1, 3)
    copied = 8 * 8 * 4 + 100
    assert (total["launches"], total["copies"], total["copied_bytes"]) == (launches + 3, 1, copied)
    copy = 2 * copied / 1e9  # read and written; the rest takes the least times
    assert total["low"] == pytest.approx(copy + 1e-6 * (launches * 1.4 + 2 * 2 + 1 * 5 + 1 * 10), abs=2e-6)
    assert total["high"] == pytest.approx(1e-6 * (launches * 2.9 + 3 * 5 + 1 * 10 + 1 * 25))


MISREAD = [  # a change to the text; what the error says
    (("kSequential", "new: kind"), "line 7 of the thunks is not understood: '004: new: kind"),
    (("      body:", "      rest:"), "line 5 of the thunks is not understood: 'rest:'"),
    (("      body:\n", ""), r"the loop loop has the parts \['condition'\]"),
    (("007: kCustomCall", "008: kCustomCall"), "1 thunks of the metadata are not in the list, such as back"),
    ((NESTED, ""), "the list of thunks is empty"),
]


@pytest.mark.parametrize(("change", "said"), MISREAD)
def test_what_is_not_understood_is_an_error(gpu, change, said):
    with pytest.raises(ValueError, match=said):
        gpu.thunks.parse(NESTED.replace(*change), METADATA)


def test_a_loop_that_the_program_does_not_have_is_an_error(gpu):
    with pytest.raises(ValueError, match="the loop 'loop' is not in the program"):
        gpu.thunks.Counting({}, (4,), speed(gpu)).count(gpu.thunks.parse(NESTED, METADATA))


# --- the programs of a run ---


def test_all_programs_of_a_run_are_found_without_computing(gpu, monkeypatch):
    """What each is called with has the shapes that the one before it returned, and 8 of 24 steps are a call."""
    compiled = []
    monkeypatch.setattr(gpu.programs.Noted, "program", lambda *_, **__: compiled.append(1))
    card = SimpleNamespace(mesh=Mesh(np.array(jax.devices()[:1]), ("runs",)))
    settings = dict(
        offline_steps=40, online_steps=24, eval_every=8, num_envs=1, utd_ratio=1, hidden=(8,), unknown=1
    )
    found = gpu.programs.of_method("iql", card, 2, env="point-mass-wall", **settings)
    assert [(p.name, p.width, p.length) for p in found] == [
        ("iql/init_state", 2, 0), ("iql/pretrain_chunk", 2, 8), ("iql/finetune_chunk", 2, 8), ("iql/play", 2, 0),
    ]  # fmt: skip
    assert not compiled
    initialise, pretrain, finetune, _ = found
    (keys,), (state, hyper, offline, done), (later, *_, added) = (
        p.arguments for p in (initialise, pretrain, finetune)
    )
    made = jax.eval_shape(jax.vmap(initialise.compiled.function), keys)
    shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shape(state) == shape(made) == shape(later)
    assert (
        hyper.actor_lr.shape == (2,) and offline.obs.shape == (100_000, 2) and added.shape == done.shape == ()
    )
    assert state.ring.obs.shape == (2, 24, 2) and state.ring.obs.sharding.spec == RUNS


def test_one_environment_of_each_model(gpu):
    found = set(gpu.programs.bodies())
    assert {"halfcheetah", "hopper", "walker2d", "ant", "door", "hammer", "pen", "relocate"} < found
    assert not {"halfcheetah-sparse", "door-binary", "maze2d-large", "point-mass-wall"} & found
    assert {gpu.programs.physics_of(name) for name in ("ant-sparse", "maze2d-large")} == {"mjx", "auto"}


# --- bounds ---

FOUND = {"program": "iql/finetune_chunk", "width": 16, "launches": 90, "outside": 0, "graphs": 1, "waits": 2}
FOUND |= {"copies": 0, "copied_bytes": 0}
RULES = [  # a rule; what is said of it
    ({"programs": "*_chunk", "waits": 0}, ["iql/finetune_chunk at width 16: waits 2 per step, at most 0"]),
    (
        {"programs": "iql/*", "width": 16, "launches": 80, "waits": 1},
        [
            "iql/finetune_chunk at width 16: launches 90 per step, at most 80",
            "iql/finetune_chunk at width 16: waits 2 per step, at most 1",
        ],
    ),
    ({"programs": "iql/*", "width": 16, "launches": 90, "graphs": 1}, []),
    ({"programs": "iql/*", "width": 1, "launches": 80}, []),
    ({"programs": "sac/*", "launches": 80}, []),
]


@pytest.mark.parametrize(("rule", "said"), RULES)
def test_what_is_beyond_a_bound(gpu, rule, said):
    assert gpu.cost.beyond(FOUND, [rule]) == said


def test_a_program_that_does_not_compile_is_a_fault(gpu):
    found = {"program": "iql/init_state", "width": 1, "error": "ValueError: no"}
    assert gpu.cost.beyond(found, []) == ["iql/init_state at width 1 was not compiled: ValueError: no"]


def test_the_bounds_of_this_house(gpu):
    """Each rule is about methods and environments that there are."""
    names = (*gpu.cost.METHODS, *gpu.programs.bodies())
    for rule in gpu.cost.read_bounds(gpu.cost.BOUNDS):
        owner = rule["programs"].partition("/")[0]
        assert "*" in owner or owner in names, rule


@pytest.mark.parametrize("rule", [{"programs": "*"}, {"waits": 0}, {"programs": "*", "lunches": 1}])
def test_a_rule_that_bounds_nothing_is_refused(gpu, tmp_path, rule):
    (tmp_path / "bounds.json").write_text(json.dumps([rule]))
    with pytest.raises(ValueError, match="needs a pattern `programs` and some of launches, outside"):
        gpu.cost.read_bounds(tmp_path / "bounds.json")


@pytest.mark.parametrize(("flags", "code"), [("", 0), ("--check", 1)])
def test_the_command_fails_only_if_it_is_to_check(gpu, tmp_path, monkeypatch, capsys, flags, code):
    """With a card and costs that are made up."""
    cost = gpu.programs.Cost(8, {"launches": 93, "waits": 1}, {"launches": 700}, {"peak": 10}, 0.1)
    monkeypatch.setattr(gpu.cost, "Card", lambda name: SimpleNamespace(name=name, options={}))
    monkeypatch.setattr(
        gpu.programs, "of_body", lambda *_: SimpleNamespace(name="iql/pretrain_chunk", width=16)
    )
    monkeypatch.setattr(gpu.programs, "cost", lambda *_: cost)
    out = tmp_path / "out.json"
    argv = ["gpu_cost.py", "--methods", "--bodies", "hopper", "--json", str(out), *flags.split()]
    monkeypatch.setattr(sys, "argv", argv)
    if code:
        with pytest.raises(SystemExit, match="1"):
            gpu.cost.main()
    else:
        gpu.cost.main()
    said = capsys.readouterr().out
    assert ("error: iql/pretrain_chunk at width 16: waits 1 per step, at most 0" in said) == bool(code)
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["launches"], row["waits"], row["graphs"], row["whole_launches"]) == (93, 1, 0, 700)


SMALL = 'name: "x"\nmemory_bandwidth: 1\ncore_count: 1\nfpus_per_core: 1\nclock_rate_ghz: 1.5'
UNUSABLE = [  # a card's file; what the error says
    (None, "neither one of a100, h100, h200, nor a file"),
    ("gpu_device_info {}", "it has no line name"),
    (SMALL, "pip install --no-deps --target cuda_compiler jax-cuda12-plugin=="),
]


@pytest.mark.parametrize(("text", "said"), UNUSABLE)
def test_a_card_that_cannot_be_compiled_for(gpu, tmp_path, monkeypatch, text, said):
    def missing(**_):
        raise RuntimeError("topology not implemented for cuda")

    monkeypatch.setattr(gpu.programs.topologies, "get_topology_desc", missing)
    path = tmp_path / "card.txtpb"
    if text:
        path.write_text(text)
    with pytest.raises(UsageError, match=said):
        gpu.programs.Card(str(path))


def record(path: str) -> None:
    """Compiles the program for an H100 without one, and writes what XLA says of it."""
    jax.config.update("jax_platforms", "cpu")  # or JAX looks for the GPU itself
    sys.path.insert(0, str(BENCHMARKS))
    import gpu_programs
    from gpu_thunks import names_of

    jax.config.update("jax_enable_compilation_cache", False)
    GPU_OPTIONS.clear()  # there are loops and a branch outside graphs then, which the reader must understand
    card = gpu_programs.Card("h100")
    state = gpu_programs.shapes(jnp.zeros((1, 64, 64)), card.mesh, RUNS)
    limit = gpu_programs.shapes(jnp.float32(0), card.mesh, EVERYWHERE)
    with gpu_programs.dumping(card.options | {"xla_gpu_graph_min_graph_size": 4}) as folder:
        compiled = Compiled(program, card.mesh, shared=("limit",)).program(state, limit, length=STEPS)
        sequence, metadata = gpu_programs.texts(folder)
    lines = [line.strip() for line in compiled.as_text().splitlines() if " = " in line]
    lines = {re.match(r"(ROOT )?%?([^ ]*)", line)[2]: line for line in lines}
    named = set(names_of(metadata).values()) & set(lines)
    factors = {
        name
        for line in map(lines.get, named)
        for name in re.findall(r"%([\w.-]+)[,)]", line)
        if "cublas" in line
    }
    unread = r', metadata=\{[^}]*\}|,"alpha_imag".*|,"compute_time_us".*'
    hlo = [re.sub(unread, "", line) for name, line in lines.items() if name in named | factors]
    pathlib.Path(path).write_text("-----\n".join([sequence, metadata, "\n".join(hlo) + "\n"]))


if __name__ == "__main__":
    record(sys.argv[1])
