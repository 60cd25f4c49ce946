"""The rules of the house, read from the sources: what may import what, and how long things are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, aif, write_constitution, write_jsonl

PACKAGE = ROOT / "aif"

# Lowest first: a module imports from floors below its own, and from no other.
FLOORS = [
    "errors records odds price",
    "jsonl config answers paid progress digests memory diversity winrate extras visible",
    "constitution journal settings templates parse agreement",
    "run pairs llm pretrained constitution_diff decode",
    "vllm_engine",
    "train train.dialogues train.losses train.checkpoint train.metrics choices gate",
    "train.tokens train.model train.preferences train.pictures train.ppo_math train.together",
    "train.branches",
    "train.batch train.stage train.card train.actor_critic train.rollout train.prompts",
    "train.trainer train.trees train.experience train.vllm_rollouts judge_card canaries",
    "train.preference_losses train.scoring train.learner train.divergence",
    "train.sft train.known train.rewards train.head",
    "train.reward",
    "train.score train.ppo_loop",
    "train.ppo_setup train.watch",
    "train.ppo",
    "llm.options protocols budget",
    "llm.wire llm.pace llm.signals llm.generate llm.scripted llm.ledger",
    "llm.crew llm.score",
    "llm.api llm.local",
    "llm.batch_client llm.vllm",
    "llm.batch_api",
    "judge reviser asking policies measured batches",
    "combine",
    "judging",
    "panel",
    "grading",
    "ppo",
    "respond vote revise filter compare label export",
    "evaluate audit diff report.page",
    "report.files report.svg",
    "report.judged report.charts",
    "report.facts report.browser",
    "report.sections report.audit",
    "report.tiles",
    "report",
    "pipeline",
    "plan",
    "status console told told_audit told_evaluate told_diff",
    "told_run cli_constitution cli_train cli_evaluate cli_batches cli_report cli_diff cli_audit",
    "cli_run",
    "cli",
]
FLOOR_OF = {name: number for number, line in enumerate(FLOORS) for name in line.split()}
STAGES = {
    "train.sft",
    "train.reward",
    "train.ppo",
    "respond",
    "vote",
    "revise",
    "filter",
    "compare",
    "label",
}

# Loaded for a model in this process alone.
LOCAL = {
    "llm.local",
    "pretrained",
    "decode",
    "llm.generate",
    "llm.score",
    "llm.vllm",
    "vllm_engine",
}
TRAIN = {path.stem for path in (PACKAGE / "train").glob("*.py")} - {"__init__"}
TRAIN = {f"train.{name}" for name in TRAIN}
HEAVY = {  # package -> modules that may import it where they are loaded
    "torch": LOCAL | TRAIN,
    "transformers": LOCAL | TRAIN,
    "peft": set(),
    "safetensors": LOCAL,
    "gguf": LOCAL,
    "openai": {"llm.api"},
    "aiohttp": {"llm.api"},
    "httpx2": {"llm.api", "llm.batch_client"},
    "datasets": set(),
    "pandas": set(),
    "numpy": TRAIN | {"agreement", "winrate", "decode"},
    "rich": set(),
    "trl": set(),
    "vllm": set(),
    "matplotlib": set(),
    "scipy": set(),
    "sklearn": set(),
    "krippendorff": set(),
    "sacrebleu": set(),
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
    """aif.llm.Ask -> llm, aif.llm.api.ApiLLM -> llm.api, torch.nn -> torch."""
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


def test_every_module_has_a_floor():
    assert set(SOURCES) == set(FLOOR_OF), "give a new module its place in FLOORS"


@MODULES
def test_imports_go_down_only(module):
    for name in imports(at_the_top(SOURCES[module]), module) & set(SOURCES):
        assert FLOOR_OF[name] < FLOOR_OF[module], f"{module} imports {name}"
    for name in imports(SOURCES[module], module) & set(SOURCES):
        in_llm = module == "llm" and name.startswith("llm.")  # open_llm, when it is called
        assert FLOOR_OF[name] < FLOOR_OF[module] or in_llm, f"{module} imports {name}"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_never_import_each_other(stage):
    assert not imports(SOURCES[stage]) & (STAGES - {stage})


@MODULES
def test_heavy_packages_are_imported_where_they_are_used(module):
    for package in imports(at_the_top(SOURCES[module]), module) & set(HEAVY):
        assert module in HEAVY[package], f"{module} imports {package} when it is loaded"


LABEL = """
import sys
from aif.cli import main
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
    done = aif("respond", tmp_path / "run", "--prompts", prompts, "--policy", f"scripted:{rules}")
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
