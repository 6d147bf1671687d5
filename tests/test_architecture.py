"""The rules of structure, held by reading the source: who imports whom, the services' anatomy, sizes, first sentences."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from common.messages import Role

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("services", "common", "kernels")
ROLES: tuple[str, ...] = get_args(Role)
ANATOMY = ("__init__.py", "__main__.py", "actor.py", "config.py")
ALLOWED = {"services": {"common", "kernels"}, "common": {"common"}, "kernels": {"kernels"}}
"""Which of our packages a file of a package may import, besides its own service."""
HEAVY = {"torch", "triton", "transformers", "peft", "accelerate", "gguf", "safetensors", "huggingface_hub"}
"""Slow to import, absent where only the control plane is installed."""
CONTROL_PLANE = ("gateway", "admission", "planner", "trainer", "cli")
CONVERTER = ROOT / "services" / "cli" / "convert.py"
CONVERTERS = {CONVERTER, CONVERTER.with_name("gguf_extras.py")}
"""Where a model is converted, with libraries that nothing else of the control plane needs."""
DISTILLERS = set((ROOT / "services" / "cli").glob("distill_*.py"))
"""Where a drafter is trained: `distill.py` imports them when it is asked to."""
NEURAL_DRAFTERS = {
    ROOT / "services" / "planner" / name
    for name in ("drafters.py", "features.py", "features_head.py", "model.py", "draft_model.py")
}
"""Drafters with weights: a planner imports them if it has such weights."""
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60

SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").glob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_names(path: Path) -> Iterator[str]:
    """Every module that the file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top(name: str) -> str:
    return name.split(".")[0]


def violations(path: Path) -> list[str]:
    """Imports of our own packages that the file's place does not allow."""
    parts = path.relative_to(ROOT).parts
    own = ".".join(parts[:2])
    ours = [name for name in imported_names(path) if top(name) in PACKAGES]
    return [name for name in ours if top(name) not in ALLOWED[parts[0]] and not f"{name}.".startswith(f"{own}.")]


def test_the_rules_see_something() -> None:
    assert len(SOURCES) > 60
    assert violations(ROOT / "services" / "cli" / "up.py") == []
    assert "common.bus.Bus" in imported_names(ROOT / "services" / "cli" / "up.py")


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_one_way(path: Path) -> None:
    assert violations(path) == []


@pytest.mark.parametrize("path", sorted((ROOT / "common").rglob("*.py")), ids=relative)
def test_common_knows_no_tensors(path: Path) -> None:
    assert not HEAVY & set(map(top, imported_names(path)))


@pytest.mark.parametrize("role", CONTROL_PLANE)
def test_the_control_plane_names_no_heavy_library(role: str) -> None:
    for path in (ROOT / "services" / role).rglob("*.py"):
        if path not in CONVERTERS | DISTILLERS | NEURAL_DRAFTERS:
            assert not HEAVY & set(map(top, imported_names(path))), relative(path)


def test_the_converter_imports_heavy_libraries_only_when_it_converts() -> None:
    body = ast.parse(CONVERTER.read_text()).body
    at_top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in at_top for alias in node.names] + [getattr(node, "module", "") or "" for node in at_top]
    assert not HEAVY & set(map(top, names))


def test_the_control_plane_loads_no_heavy_library() -> None:
    modules = [f"services.{role}.__main__" for role in CONTROL_PLANE]
    script = f"import sys; import {', '.join(modules)}; print(*({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == ""


def test_the_executor_never_imports_what_conversion_needs() -> None:
    for path in (ROOT / "services" / "executor").rglob("*.py"):
        assert not (HEAVY - {"torch", "triton", "safetensors"}) & set(map(top, imported_names(path))), relative(path)


@pytest.mark.parametrize("role", ROLES)
def test_every_service_has_the_same_anatomy(role: str) -> None:
    folder = ROOT / "services" / role
    assert {name for name in ANATOMY if (folder / name).is_file()} == set(ANATOMY)
    main = ast.parse((folder / "__main__.py").read_text())
    assert "main" in {node.name for node in main.body if isinstance(node, ast.FunctionDef)}
    assert any(name.startswith("common.service") for name in imported_names(folder / "__main__.py"))
    assert f"{role.capitalize()}Config" in (folder / "config.py").read_text()


INITS = [path for path in SOURCES if path.name == "__init__.py" and path.parent.name != "messages"]


@pytest.mark.parametrize("path", INITS, ids=relative)
def test_packages_hold_only_a_sentence(path: Path) -> None:
    (statement,) = ast.parse(path.read_text()).body
    assert isinstance(statement, ast.Expr)


def test_the_list_of_messages_is_only_a_list() -> None:
    body = ast.parse((ROOT / "common" / "messages" / "__init__.py").read_text()).body
    assert not [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_files_say_what_they_know_and_stay_small(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no sentence at the top"
    assert text.isascii()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, node.name


def test_tests_are_flat() -> None:
    assert not [path for path in (ROOT / "tests").rglob("*.py") if path.parent != ROOT / "tests" or path.name == "__init__.py"]
