"""The layout: what the root holds, which module may import which, and that importing does nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

IN_THE_ROOT = {"train_cls.py", "train_nlg.py", "finetuning_nlg.py", "evaluate_nlg.py", "ppo.py"}
SCRIPTS = sorted(IN_THE_ROOT - {"ppo.py"})
LAYERS = [  # a module imports from the layers before its own only
    "errors distributed precision muon frontier seeds model_card environment recipes",
    "lora activations cli threads user_code",
    "runtime flags checkpoint fast_path vocabulary plots",
    "forward data guard querying",
    "policy choice_data",
    "sampling optim chat",
    "models rollout supervised memory",
    "prompting",
    "rewards",
    "gold human",
    "run_log evaluation task",
    "outputs",
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
FILES = [
    path
    for folder in (".", "rlhf", "rlhf/human", "experiments", "benchmarks", "tests", "tests/stress")
    for path in sorted((ROOT / folder).glob("*.py"))
]


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_root_shows_the_method():
    assert {path.name for path in ROOT.glob("*.py")} == IN_THE_ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "rlhf").glob("**/*.py")), ids=lambda path: path.stem)
def test_a_module_of_rlhf_imports_from_lower_layers_only(path):
    module = path.relative_to(ROOT / "rlhf").parts[0].removesuffix(".py")
    names = imported(path)
    assert not {name for name in names if f"{name.split('.')[0]}.py" in IN_THE_ROOT}
    assert not {name for name in names if name.split(".")[0] in ("experiments", "benchmarks", "tests")}
    used = {name.split(".")[1] for name in names if name.startswith("rlhf.")}
    assert all(LAYER_OF[other] < LAYER_OF[module] for other in used - {module}), used


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_meet_through_folders(script):
    others = {name.removesuffix(".py") for name in SCRIPTS}
    assert not imported(ROOT / script) & others


def test_the_algorithm_knows_no_files_flags_or_models():
    assert imported(ROOT / "ppo.py") == {
        "math",
        "dataclasses.dataclass",
        "torch",
        "torch.Tensor",
        "rlhf.distributed.all_reduce",
        "rlhf.distributed.masked_mean",
        "rlhf.optim.Optimizer",
        "rlhf.policy.PolicyWithValue",
        "rlhf.rollout.Rollout",
        "rlhf.rollout.evaluate",
        "rlhf.rollout.forward_batches",
        "rlhf.rollout.shuffled_minibatches",
    }


def test_nobody_edits_the_path_of_imports():
    for path in FILES:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        attributes = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
        assert ".".join(("sys", "path")) not in attributes, path


def test_a_file_fits_on_a_few_screens():
    """Test files may list cases."""
    long = {path.name: len(path.read_text("utf-8").splitlines()) for path in FILES if "tests" not in path.parts}
    assert {name: count for name, count in long.items() if count > 350} == {}


def test_the_loop_fits_on_one_screen():
    tree = ast.parse((ROOT / "finetuning_nlg.py").read_text(encoding="utf-8"))
    (loop,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.For) and ast.unparse(node.iter) == "log.updates()"
    )
    assert loop.end_lineno - loop.lineno + 1 <= 50


@pytest.mark.parametrize(
    "variables, expected",
    [({}, "10000 64"), ({"OMP_NUM_THREADS": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}, "None 8")],
    ids=["unset", "the user knows better"],
)
def test_scripts_bound_what_the_libraries_under_torch_take(variables, expected):
    names = ("GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    program = f"import os, rlhf.environment; print(*(os.environ.get(name) for name in {names}))"
    others = {name: x for name, x in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "ONEDNN_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=others | variables, capture_output=True, text=True
    )
    assert done.stdout.strip() == expected, done.stderr


def test_importing_changes_nothing():
    """Environment, random state, threads, signals and the libraries' messages stay as they were."""
    program = """
import importlib, os, random, signal, sys
import datasets, matplotlib, numpy, sklearn.metrics, torch, transformers

def state():
    meant = "GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"  # which must be set before torch is loaded
    not_ours = "TORCHINDUCTOR", *meant
    environment = {name: x for name, x in os.environ.items() if not name.startswith(not_ours)}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seeds = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    messages = datasets.utils.is_progress_bar_enabled(), transformers.utils.logging.get_verbosity()
    return environment, handlers, seeds, messages, torch.get_num_threads(), dict(matplotlib.rcParams)

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert state() == before
"""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    modules = [name for name in modules if name.split(".")[0] in ("rlhf", "ppo") or f"{name}.py" in SCRIPTS]
    modules = [name.removesuffix(".__init__") for name in modules]
    done = subprocess.run([sys.executable, "-c", program, *modules], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
