"""The rules of the house, read from the sources: what may import what, and how long things are."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT, aif, aif_here, write_constitution, write_jsonl

PACKAGE = ROOT / "aif"

# Lowest first: an import goes to a floor below, or stays in its package, without a circle.
FLOORS = [
    "errors",
    "dependencies progress signals",
    "stats store",
    "config",
    "run",
    "data constitution",
    "models",
    "train llm",
    "judge",
    "stages",
    "auditing evaluation",
    "report",
    "pipeline",
    "planning status",
    "forecast",
    "cli",
]
FLOOR_OF = {name: number for number, line in enumerate(FLOORS) for name in line.split()}

SHARED_BY_STAGES = {"stages.critique"}  # what is asked of a reviser

# Loaded for a model in this process alone.
LOCAL = ("llm.local", "llm.vllm", "llm.sampler", "llm.prefix_scorer", "models", "train")
HEAVY = {  # package -> where it may be imported when a module is loaded
    "torch": LOCAL,
    "transformers": LOCAL,
    "peft": (),
    "safetensors": LOCAL,
    "gguf": LOCAL,
    "openai": ("llm.openai_api",),
    "aiohttp": ("llm.openai_api",),
    "httpx2": ("llm.openai_api", "llm.batch_client"),
    "datasets": (),
    "pandas": (),
    "numpy": ("train", "models.decode", "stats"),
    "rich": (),
    "trl": (),
    "vllm": (),
    "matplotlib": (),
    "scipy": (),
    "sklearn": (),
    "krippendorff": (),
    "sacrebleu": (),
}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


SOURCES = {
    module_name(path): ast.parse(path.read_text("utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or not path.name.startswith("__")
}
MODULES = pytest.mark.parametrize("module", SOURCES)


def imports(tree: ast.AST, module: str = "") -> set[str]:
    """What is imported anywhere in `tree`: ours as `run`, `llm.api`; others as their package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found.update(map(shortest, names))
    return found


def shortest(name: str) -> str:
    """aif.llm.Ask -> llm, aif.llm.openai_api.ApiLLM -> llm.api, torch.nn -> torch."""
    package, _, rest = name.partition(".")
    if package != "aif":
        return package
    while rest not in SOURCES:
        assert rest, f"{name}: not a module"
        rest = rest.rpartition(".")[0]
    return rest


def at_the_top(tree: ast.Module) -> ast.Module:
    """The part of a module that runs on import: functions are cut out, `if TYPE_CHECKING` too."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else node

    return Cut().visit(ast.parse(ast.unparse(tree)))


def package(module: str) -> str:
    """aif.judge.panel -> judge, aif.run -> run."""
    return module.partition(".")[0]


def ours(module: str) -> set[str]:
    """The modules of the house that `module` imports, now or when it is called."""
    return imports(SOURCES[module], module) & set(SOURCES) - {module}


def test_every_package_has_a_floor():
    assert {package(module) for module in SOURCES} == set(FLOOR_OF), "a new one needs its place"


@MODULES
def test_imports_go_down_or_stay_in_their_package(module):
    for name in ours(module):
        inside = package(name) == package(module)
        below = FLOOR_OF[package(name)] < FLOOR_OF[package(module)]
        assert inside or below, f"{module} imports {name}"


def test_no_imports_run_in_a_circle():
    at_load = {module: imports(at_the_top(SOURCES[module]), module) for module in SOURCES}
    TopologicalSorter({m: names & set(SOURCES) - {m} for m, names in at_load.items()}).prepare()


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("stages.")])
def test_stages_never_import_each_other(module):
    assert not {name for name in ours(module) if name.startswith("stages.")} - SHARED_BY_STAGES


@MODULES
def test_heavy_packages_are_imported_where_they_are_used(module):
    for heavy in imports(at_the_top(SOURCES[module]), module) & set(HEAVY):
        places = HEAVY[heavy]
        here = any(module == place or module.startswith(f"{place}.") for place in places)
        assert here, f"{module} imports {heavy} when it is loaded"


LABEL = """
import sys
from aif.cli.verbs import main
try:
    main()
except SystemExit as end:
    assert end.code in (0, None), end.code
    print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("judge", ["scripted", "openai"])
def test_labelling_without_a_local_model_never_loads_torch(tmp_path, judge):
    pairs = write_jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": "p", "response_a": "x", "response_b": "y"}]
    )
    rules = write_jsonl(tmp_path / "rules.jsonl", [{"text": "A"}])
    write_constitution(tmp_path / "c.toml", {"kind": "Which is kinder?"})
    arguments = ["label", "--out", tmp_path / "run", "--pairs", pairs]
    arguments += ["--constitution", tmp_path / "c.toml", "--judge"]
    if judge == "openai":  # nobody is there: the call fails, but not the run
        arguments += ["openai:x", "--base-url", "http://127.0.0.1:9/v1", "--max-fault-rate", "1"]
        arguments += ["--set", "judge.attempts=1"]
    else:
        arguments += [f"scripted:{rules}"]
    command = [sys.executable, "-c", LABEL, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.partition("LOADED")[2].split())
    assert "aif" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "pandas", "numpy", "trl"}
    assert ("openai" in loaded) == (judge == "openai")


def test_revising_by_an_api_never_loads_torch(tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    rules = write_jsonl(tmp_path / "rules.jsonl", [{"text": "An answer."}])
    done = aif_here(
        "respond", tmp_path / "run", "--prompts", prompts, "--policy", f"scripted:{rules}"
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "c.toml").write_text(
        'name = "c"\n[[principle]]\nid = "kind"\ncritique = "C."\nrevision = "R."\n'
    )
    arguments = ["revise", tmp_path / "run", "--constitution", tmp_path / "c.toml"]
    arguments += ["--reviser", "openai:x", "--base-url", "http://127.0.0.1:9/v1"]
    arguments += ["--max-fault-rate", "1", "--set", "reviser.attempts=1"]
    command = [sys.executable, "-c", LABEL, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.partition("LOADED")[2].split())
    assert "openai" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "pandas", "numpy", "trl"}


@MODULES
def test_files_and_functions_are_short(module):
    tree = SOURCES[module]
    path = PACKAGE / (module.replace(".", "/") + ".py")
    if path.exists():
        assert len(path.read_text("utf-8").splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{module}.{node.name} has {length} lines"


@MODULES
def test_what_is_public_says_what_it_is_for(module):
    tree = SOURCES[module]
    assert ast.get_docstring(tree), f"{module} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            public = not node.name.startswith("_")
            assert not public or ast.get_docstring(node), f"{module}.{node.name} has no docstring"


def test_no_file_is_called_after_nothing():
    assert not {"utils", "common", "helpers", "misc"} & {n.rpartition(".")[2] for n in SOURCES}


def test_the_module_runs_as_the_command_does():
    assert aif("--help").stdout.startswith("Usage: ")
