"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tesserafl
from tesserafl.methods import METHODS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "tesserafl"
FILES = sorted(SOURCE.rglob("*.py"))
PAPERS = [SOURCE / "methods" / f"{name}.py" for name in METHODS]
METHOD_FILES = sorted((SOURCE / "methods").glob("*.py"))

NO_PARAMETER = re.compile(
    r"(^|[._])(weight|bias|conv|attn|attention|head|norm|lora|proj)(\d*)($|\.)"
)
FAMILIES = {"transformers", "resnet", "resnet18", "gpt2", "bert", "llama", "vit", "mlp", "cnn"}


def name_of(file: Path) -> str:
    return str(file.relative_to(SOURCE))


each_file = pytest.mark.parametrize("file", FILES, ids=name_of)
each_method_file = pytest.mark.parametrize("file", METHOD_FILES, ids=name_of)


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def names(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is used, and every module that is imported, as written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            yield ast.unparse(node)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.AST) -> Iterator[str]:
    return (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_the_package_is_where_these_tests_look() -> None:
    assert Path(tesserafl.__file__).parent == SOURCE
    assert len(FILES) > 40 and all(file in FILES for file in PAPERS)


@each_file
def test_randomness_starts_in_seeds_alone(file: Path) -> None:
    if file == SOURCE / "core" / "seeds.py":
        return
    tree = tree_of(file)
    found = {
        name
        for name in names(tree)
        if re.search(
            r"(^|\.)(manual_seed\w*|default_rng|set_rng_state|RandomState|use_seed)$", name
        )
        or re.match(r"(np|numpy)\.random\b|random\.|secrets\b", name)
        or name in ("random", "torch.seed")
    }
    assert not found
    assert "torch.Generator" not in calls(tree)  # as a type it is welcome


def test_the_rule_on_randomness_sees_what_it_forbids() -> None:
    # Guards the rule above against a slip in its patterns.
    seen = set(names(tree_of(SOURCE / "core" / "seeds.py")))
    assert "torch.default_generator.manual_seed" in seen
    assert "torch.Generator" in calls(tree_of(SOURCE / "core" / "seeds.py"))


@each_file
def test_nothing_that_runs_foreign_code(file: Path) -> None:
    tree = tree_of(file)
    roots = {name.split(".")[0] for name in names(tree)}
    assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    forbidden = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system"}
    assert not forbidden & set(calls(tree))
    keywords = {
        k.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for k in node.keywords
    }
    assert not keywords & {"allow_pickle", "trust_remote_code", "shell"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page(name: str) -> None:
    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.is_file(), f"write {page.relative_to(ROOT)}"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_worked_example(name: str) -> None:
    text = (ROOT / "tests" / "papers" / f"test_{name}.py").read_text(encoding="utf-8")
    assert METHODS[name].__name__ in text and "def test_" in text


@each_file
def test_files_are_short(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    limit = 150 if file in PAPERS else 300
    assert lines <= limit, f"{name_of(file)} has {lines} lines, more than {limit}; split it"


def constants(tree: ast.Module) -> Iterator[str]:
    """Strings that are not docstrings, field docstrings or parts of a message."""
    spoken = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr | ast.Raise | ast.JoinedStr)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in spoken
        ):
            yield node.value


@each_method_file
def test_methods_know_no_parameter_and_no_family(file: Path) -> None:
    tree = tree_of(file)
    found = [text for text in constants(tree) if NO_PARAMETER.search(text)]
    assert not set(found) - set(METHODS)  # a method may be called after what it trains
    words = {part.lower() for name in names(tree) for part in name.split(".")}
    words |= {text.lower() for text in constants(tree)}
    assert not words & FAMILIES
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"weight", "bias", "named_parameters", "state_dict", "nn", "head"}
    assert not [name for name in names(tree) if re.match(r"(torch\.)?nn\b|transformers\b", name)]


@pytest.mark.parametrize(
    "text", ["weight", "layers.0.bias", "head", "conv1", "h.3.attn.weight", "q_proj"]
)
def test_the_rule_on_names_sees_what_it_forbids(text: str) -> None:
    assert NO_PARAMETER.search(text)


@each_method_file
def test_methods_name_no_engine_and_no_loop(file: Path) -> None:
    imported = {name for name in names(tree_of(file)) if name.startswith("tesserafl.")}
    allowed = ("core.", "methods.", "models.scaling.", "models.inside.")
    allowed = tuple(f"tesserafl.{name}" for name in allowed)
    assert not [name for name in imported if not name.startswith(allowed)]


@each_file
def test_no_module_has_a_name_that_says_nothing(file: Path) -> None:
    assert file.stem not in {"utils", "common", "helpers", "base", "manager", "misc"}


@each_file
def test_text_is_ascii(file: Path) -> None:
    assert file.read_text(encoding="utf-8").isascii()


def python(code: str) -> str:
    """What a fresh interpreter prints; warnings are errors, but that of flwr 1.41's typer."""
    kept = ["-W", "error"]
    for name in ("binary", "text"):
        kept += ["-W", f"ignore:'click.utils.get_{name}_stream':DeprecationWarning"]
    done = subprocess.run([sys.executable, *kept, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_starts_without_torch() -> None:
    heavy = python(
        "import sys, tesserafl.cli; "
        "print(*sorted({'torch', 'datasets', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert heavy.split() == []


def test_help_is_answered_as_a_module_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tesserafl.cli", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for command in (
        "run",
        "resume",
        "plan",
        "list",
        "compare",
        "report",
        "certs",
        "token",
        "proxy",
        "doctor",
    ):
        assert f"tessera {command}" in done.stdout


def test_importing_everything_changes_no_global_state() -> None:
    walked = [m.name for m in pkgutil.walk_packages(tesserafl.__path__, "tesserafl.")]
    assert len(walked) > 40
    changed = python(f"""
import importlib, os, sys
import numpy, torch
def state():
    return {{
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(numpy.random.get_state()),
        "threads": torch.get_num_threads(),
        "type": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "environment": {{k: v for k, v in os.environ.items() if k.startswith("TESSERA")}},
        "folder": os.getcwd(),
        "arguments": list(sys.argv),
    }}
torch.manual_seed(1)
before = state()
for name in {walked!r}:
    importlib.import_module(name)
after = state()
print(*[key for key in before if before[key] != after[key]])
""")
    assert changed.split() == []


def test_every_module_says_what_it_is_for() -> None:
    for module in pkgutil.walk_packages(tesserafl.__path__, "tesserafl."):
        text = importlib.import_module(module.name).__doc__ or ""
        assert len(text.strip()) > 10, f"{module.name} has no docstring"


def test_test_files_have_names_of_their_own() -> None:
    stems = [file.name for file in (ROOT / "tests").rglob("*.py") if file.name != "conftest.py"]
    assert len(stems) == len(set(stems))


def test_the_reference_pages_are_as_the_source_says() -> None:
    page = ROOT / "docs" / "reference" / "generate.py"
    done = subprocess.run(
        [sys.executable, str(page), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
