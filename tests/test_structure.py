"""The house: imports run one way, public names are real and documented, files are small, nothing is pickled."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import interp

ROOT = Path(interp.__file__).resolve().parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "interp").rglob("*.py"))
}
SCRIPTS = sorted((ROOT / "data").glob("*.py"))

# A module may import what stands before it. Task generators know no models; their loader knows tokens; a model knows
# rules; an analysis knows models and pairs; results know how to be shown; the command line knows all. A new module has
# to be given a place here.
LAYERS = [
    {"interp"},  # names only; it imports nothing until asked
    {"interp.errors", "interp.blocks", "interp.precision", "interp.secants", "interp.statistics", "interp.tasks", "interp.model",
     "interp.circuits", "interp.features", "interp.factorize", "interp.neurons", "interp.steering", "interp.diagnostics",
     "interp.jobs",
     "interp.bundled", "interp.features.codes"},
    {"interp.agreement", "interp.files", "interp.metrics", "interp.backward", "interp.model.config", "interp.model.activations",
     "interp.tasks.examples", "interp.tasks.words", "interp.features.config", "interp.features.synthetic",
     "interp.features.recovery", "interp.features.activations", "interp.features.autograd", "interp.features.optimizer",
     "interp.factorize.pursuit", "interp.factorize.semi_nmf",
     "interp.factorize.starts", "interp.neurons.screen", "interp.model.sampling"},
    {"interp.features.saelens_format", "interp.factorize.folder", "interp.factorize.solvers"},
    {"interp.features.sae"},
    {"interp.features.objective", "interp.features.heads"},
    {"interp.rules", "interp.model.nonlinearities"},
    {"interp.sites", "interp.model.ops", "interp.model.tokens", "interp.tasks.files"},
    {f"interp.tasks.{task}" for task in (
        "capitals", "docstring", "gendered_pronoun", "greater_than", "induction", "ioi", "subject_verb",
    )} | {"interp.tasks.pairs", "interp.model.transformer", "interp.model.read"},
    {"interp.tasks.corrupt", "interp.model.run", "interp.model.load", "interp.model.folding"},
    {"interp.features.sources", "interp.features.splice", "interp.features.belonging", "interp.factorize.itda",
     "interp.neurons.readings", "interp.neurons.vocabulary"},
    {"interp.factorize.snmf", "interp.steering.changes", "interp.neurons.matching"},
    {"interp.factorize.hierarchy", "interp.factorize.concepts", "interp.steering.vectors", "interp.steering.generation",
     "interp.neurons.decode", "interp.neurons.clamp"},
    {"interp.steering.strength", "interp.steering.scoring", "interp.neurons.table", "interp.neurons.stability"},
    {"interp.features.shuffle", "interp.features.memory", "interp.features.cache", "interp.features.evaluate"},
    {"interp.features.checkpoints", "interp.features.contexts", "interp.features.effects"},
    {"interp.features.train"},
    {"interp.tasks.named", "interp.provenance", "interp.interventions", "interp.circuits.graph", "interp.directions",
     "interp.baseline"},
    {"interp.grids"},
    {"interp.sheet"},
    {"interp.node_attribution"},
    {"interp.rows"},
    {"interp.attend"},
    {"interp.walk"},
    {"interp.sweep"},
    {"interp.exact", "interp.site_rows", "interp.atp"},
    {"interp.paths", "interp.lens"},
    {"interp.relevance", "interp.features.attribution"},
    {"interp.features.circuits"},
    {"interp.checking"},
    {"interp.patching"},
    {"interp.circuits.exact", "interp.circuits.split"},
    {"interp.circuits.node_faithfulness", "interp.circuits.ablations", "interp.circuits.gradients", "interp.plots"},
    {"interp.circuits.circuit", "interp.circuits.masked", "interp.circuits.edges", "interp.token_plots", "interp.page",
     "interp.features.zf"} | {f"interp.diagnostics.{name}" for name in (
        "massive", "depth", "activity", "recall", "concept_vectors", "truth_vote",
    )},
    {"interp.circuits.optimal", "interp.circuits.export", "interp.circuits.checking"},
    {"interp.circuits.learned", "interp.circuits.evaluate", "interp.circuits.drawing"},
    {"interp.circuits.search", "interp.circuits.similarity"},
    {"interp.circuits.discovery"},
    {"interp.report", "interp.circuits.report", "interp.tables"},
    {"interp.discovery"},
    {"interp.jobs.kinds", "interp.jobs.arrays"},
    {"interp.jobs.spec"},
    {"interp.jobs.grid", "interp.jobs.shards"},
    {"interp.jobs.store"},
    {"interp.jobs.worker"},
    {"interp.jobs.executors"},
    {"interp.jobs.cluster"},
    {"interp.jobs.runner", "interp.jobs.estimate"},
    {"interp.jobs.query", "interp.jobs.comparison"},
    {"interp.jobs.summary"},
    {"interp.sae_cli", "interp.neurons_cli", "interp.app_cli", "interp.runs_cli"},
    {"interp.cli"},
]  # fmt: skip
LAYER = {module: i for i, layer in enumerate(LAYERS) for module in layer}


def imports(module: str) -> tuple[set[str], set[str]]:
    """(what the module imports of interp when it is imported, what its functions import later). For types: neither."""
    now, later = set(), set()

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module} line {child.lineno}: imports are written out in full here"
                source = child.module or ""
                names = [f"{source}.{a.name}" if f"{source}.{a.name}" in FILES else source for a in child.names]
            (later if inside else now).update(name for name in names if name in FILES)
            visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(FILES[module].read_text(encoding="utf-8")), False)
    return now, later


# ------------------------------------------------------------------------------------------------------------ imports


def test_every_module_has_a_layer():
    assert set(FILES) - set(LAYER) == set(), "new modules: give them a place in LAYERS"
    assert set(LAYER) - set(FILES) == set(), "modules that are gone: take them out of LAYERS"


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    now, _ = imports(module)
    upwards = {name for name in now if LAYER.get(name, -1) >= LAYER.get(module, len(LAYERS))}
    assert not upwards, f"{module} imports {', '.join(sorted(upwards))}, which is not before it in LAYERS"


def test_there_is_no_circle_even_through_functions():
    """`interp` itself is left out: it is a table of names, and anything may ask it for the version."""
    graph = {module: set.union(*imports(module)) - {"interp"} for module in FILES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError naming the circle


def test_the_library_knows_nothing_of_what_is_built_on_it():
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            outside = {name.split(".")[0] for name in names} & {
                "app",
                "tests",
                "notebooks",
                "benchmarks",
                "data",
                "streamlit",
            }
            assert not outside, f"{module} imports {outside}"


@pytest.mark.parametrize("module", ["interp.tasks.examples", "interp.errors", "interp.statistics"])
def test_light_modules_import_no_torch(module):
    assert "torch" not in _loaded_by(f"import {module}")


HEAVY = {"torch", "plotly", "transformers", "transformer_lens", "streamlit", "pandas", "xarray"}


@cache
def _loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after running the code."""
    script = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_importing_interp_imports_nothing_heavy():
    loaded = _loaded_by("import interp; interp.__version__; dir(interp)")
    assert "interp" in loaded
    assert not loaded & HEAVY


def test_importing_the_command_line_imports_nothing_heavy():
    assert not _loaded_by("import interp.cli") & HEAVY


def test_a_model_needs_neither_plots_nor_the_dashboard():
    assert not _loaded_by("import interp; interp.load_model, interp.load_task") & {"plotly", "streamlit"}


# -------------------------------------------------------------------------------------------------------- public names


@pytest.mark.parametrize("name", interp.__all__)
def test_a_public_name_is_there_and_documented(name):
    value = getattr(interp, name)
    assert not isinstance(value, ModuleType)
    if name == "METRICS":
        assert all(metric.describe for metric in value.values())
        return
    doc = (value.__doc__ or "").strip()
    assert doc
    assert not doc.startswith(f"{name}("), "dataclass's own signature is no docstring"
    assert name in dir(interp)


@pytest.mark.parametrize("name", interp.__all__)
def test_a_public_name_stays_what_it_is(name):
    """A module called like a public name takes its place in the package as soon as anything imports it."""
    assert f"interp.{name}" not in FILES
    assert getattr(interp, name) is getattr(interp, name)


def test_public_names_come_from_where_they_live():
    for name in interp.__all__:
        home = importlib.import_module(interp._HOME[name])
        assert getattr(interp, name) is getattr(home, name)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        interp.no_such_name  # noqa: B018


@pytest.mark.parametrize("module", [m for m, path in FILES.items() if path.stat().st_size])
def test_a_module_says_what_it_is_for(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            lines = node.end_lineno - node.lineno
            assert ast.get_docstring(node) or lines <= 3, f"{module}.{node.name} has no docstring"


# ------------------------------------------------------------------------------------------------------------- habits


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_a_file_does_one_thing(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


def _calls(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def _modules(tree: ast.AST) -> set[str]:
    plain = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    return plain | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("path", [*FILES.values(), *SCRIPTS], ids=[*FILES, *(p.name for p in SCRIPTS)])
def test_nothing_is_pickled_and_no_machine_is_assumed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not _modules(tree) & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    forbidden = {"torch.save", "torch.load", "np.save", "np.load", "numpy.save", "numpy.load", "eval", "exec"}
    assert not {c for c in _calls(tree) if c in forbidden or c.endswith((".to_pickle", ".read_pickle", ".cuda"))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in ("cuda", "cuda:0"), f"line {node.lineno}: a device is the caller's to choose"
            starts = ("/home/", "/Users/", "/work/", "/tmp/", "/root/", "/mnt/", "C:\\", "~/")
            assert not node.value.startswith(starts), f"line {node.lineno}: {node.value} is a path on one machine"


def test_the_scripts_that_made_the_data_are_there():
    assert {"train_mini.py", "corpus.py"} <= {p.name for p in SCRIPTS}
