"""What `import seriatim` promises is there, seen alike by Python and by type checkers, and says what it is."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import seriatim

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {  # the packages that export lazily, and the sources of their __init__
    ".".join(path.parent.relative_to(ROOT).parts): path.read_text()
    for path in sorted((ROOT / "seriatim").rglob("__init__.py"))
    if "core.lazy" in path.read_text()
}
PUBLIC: list[str] = vars(seriatim)["__all__"]  # made at run time, which type checkers do not see
CONTRACTS = (
    "Bundle", "Conditioner", "FeatureExtractor", "Head", "Keys", "Parallel", "Pipeline", "Result", "Sequential", "Step",
    "Tokenizer",
)  # fmt: skip


def test_public_names_exist() -> None:
    for name in PUBLIC:
        assert getattr(seriatim, name) is not None
    assert PUBLIC == sorted(PUBLIC), "the public list is sorted"
    with pytest.raises(AttributeError):
        _ = seriatim.no_such_name  # type: ignore[attr-defined]


def test_what_users_build_on_is_public() -> None:
    assert {*CONTRACTS, "load", "read_recipe"} <= {*PUBLIC}
    checks = importlib.import_module("seriatim.testing")
    assert {"check_backbone", "check_head", "check_model", "check_tokenizer"} <= {*checks.__all__}


def typed(package: str, source: str) -> dict[str, str]:
    """Name -> module of the imports that type checkers read; each is marked as public by `X as X`."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom) and line.module, ast.unparse(line)
                for alias in line.names:
                    assert alias.asname == alias.name, f"{package}: write {alias.name} as {alias.name}"
                    found[alias.name] = line.module
    return found


def lazy(package: str, source: str) -> dict[str, str]:
    """Name -> module of the table that Python reads."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (call,) = (call for call in calls if ast.unparse(call.func) == "exports")
    table: dict[str, str] = ast.literal_eval(call.args[1])
    return {name: f"{package}.{module}" for module, names in table.items() for name in names.split()}


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_the_names_that_python_sees(package: str) -> None:
    assert typed(package, PACKAGES[package]) == lazy(package, PACKAGES[package])
    module = importlib.import_module(package)
    assert {*lazy(package, PACKAGES[package])} <= {*module.__all__} <= {*dir(module)}


def test_packages_import_no_torch_before_a_name_is_used() -> None:
    assert len(PACKAGES) >= 9
    look = "print('torch' in sys.modules)"
    code = f"import sys, {', '.join(PACKAGES)}; {look}; seriatim.Keys; {look}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "True"]


def undocumented(name: str, thing: Any) -> Iterator[str]:
    """The public functions, classes and methods in `thing` that have no docstring."""
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return
    if not vars(thing).get("__doc__") if inspect.isclass(thing) else not thing.__doc__:
        yield name
    if inspect.isclass(thing):
        for key, member in vars(thing).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            own = inspect.isfunction(function) and function.__module__.startswith("seriatim.")
            if own and not key.startswith("_") and not inspect.getdoc(getattr(thing, key)):  # or that of a base class
                yield f"{name}.{key}"


def test_public_names_have_docstrings() -> None:
    things = {f"{package}.{name}": name for package in PACKAGES for name in importlib.import_module(package).__all__}
    lacking = [
        each
        for path, name in things.items()
        for each in undocumented(path, getattr(importlib.import_module(path.rpartition(".")[0]), name))
    ]
    assert not lacking
