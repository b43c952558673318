"""Shared by all tests: a compilation cache that outlives the process, and a folder of their own for
datasets.
"""

import os
import pathlib
import sys
from importlib.metadata import version

import hypothesis
import pytest

REPO = pathlib.Path(__file__).parents[1]
SETTINGS = {  # for this process, which has not imported JAX yet, and for the programs that tests start
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # two test processes share an accelerator
    "JAX_COMPILATION_CACHE_DIR": str(REPO / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    # Much is compiled here and little run (otherwise level 3).
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
if version("jaxlib") < "0.11":  # its newer way of making kernels compiles half as long again as the older
    SETTINGS["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # later versions refuse this flag
hypothesis.settings.register_profile("no clock", deadline=None)  # machines are shared
hypothesis.settings.load_profile("no clock")
if "PYTEST_XDIST_WORKER" in os.environ:
    SETTINGS["NPROC"] = "1"  # threads of XLA: the pools of several processes would spin against one another
os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})


@pytest.fixture(scope="session", autouse=True)
def minari_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        yield


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    """An empty working directory, for modules of a user's own; what comes from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("ooo_rl.envs._REGISTERED", {})
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.hookimpl(optionalhook=True)  # pytest may run without xdist
def pytest_xdist_make_scheduler(config, log):
    """Each file goes to one of the processes as a whole; the contract of algos/, method by method."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            return f"{file} {test.partition('[')[2].partition('-')[0]}" if "test_algos" in file else file

    config.option.loadscopereorder = False  # long files begin with the alphabet here, not with many tests
    return ByFile(config, log)
