"""DESIGN of the house, as far as a machine can see it: import order, cycles, file length, forbidden calls."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "seriatim"

# A package imports only from its left. `testing` serves people who write parts of their own; nothing imports it.
ORDER = (
    "core", "nn", "conditions", "backbones", "heads", "sampling", "models", "tokenizers", "zoo", "checkpoints",
    "pipeline", "data", "evaluation", "training", "bench", "serving", "testing", "cli", "__main__",
)  # fmt: skip
READERS = {  # a kind of file has one reader, which knows how such a file may be damaged or hostile
    "np.load": "core/array_reading.py",
    "safe_open": "core/array_reading.py",
    "load_file": "core/array_reading.py",
    "Image.open": "core/images.py",
    "torch.load": "checkpoints/official.py",
    "yaml.safe_load": "core/reading.py",
    "json.load": "core/reading.py",
}
BANNED = {"models": {"tokenizers"}, "serving": {"training", "evaluation", "bench"}}
LONGEST = 400
LONG_ALLOWED = {"zoo.py"}
MAY_SEED = {"training/loop.py"}  # the engine seeds dropout, on every device, inside torch.random.fork_rng
MAY_SET_DEFAULTS = {"core/device.py"}  # which sets the caller's again

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the module"
            if node.module and node.module.split(".")[0] == "seriatim":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "seriatim")


def names_for_type_checkers(path: Path) -> set[str]:
    """Modules that are imported under `if TYPE_CHECKING:`, which never runs."""
    blocks = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    lines = [line for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING" for line in block.body]
    return {line.module for line in lines if isinstance(line, ast.ImportFrom) and line.module}


def part(module: str) -> str | None:
    """The entry of ORDER that a module belongs to; None for the package root."""
    names = module.split(".")
    return names[1] if len(names) > 1 else None


def test_architecture_every_part_has_a_place() -> None:
    unknown = {part(m) for m in MODULES} - set(ORDER) - {None}
    assert not unknown, f"not in the import order: {unknown}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_architecture_import_order(path: Path) -> None:
    here = part(module_of(path))
    for target in imports(path):
        there = part(target)
        if there is None:  # the root holds the version and lazy names only
            assert here is not None, f"{path}: the root imports itself"
            continue
        assert target in MODULES, f"{path}: {target} does not exist"
        is_package = MODULES[target].name == "__init__.py"
        assert not is_package, f"{path}: imports {target} through its __init__; name the defining module"
        if here is None:
            lazily = target in names_for_type_checkers(path)
            assert there == "core" or lazily, f"{path}: the root may import core only, the rest lazily"
            continue
        assert ORDER.index(there) <= ORDER.index(here), f"{path}: {here} must not import {there}"
        assert there not in BANNED.get(here, ()), f"{path}: {here} must never import {there}"
        assert there != "testing" or here == "testing", f"{path}: testing is for users, not for the package"


def test_architecture_no_cycles() -> None:
    graph = {m: {t for t in imports(p) if part(t)} for m, p in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "cycle: " + " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for target in graph.get(module, ()):
            visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_architecture_file_length(path: Path) -> None:
    assert path.name != "utils.py", f"{path}: a helper lives with its user or in a file named for what it does"
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST or path.name in LONG_ALLOWED, f"{path} has {lines} lines; {LONGEST} at most"


def forbidden(tree: ast.AST, name: str) -> Iterator[tuple[int, str]]:
    """Line and reason of each call that the house forbids."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("pickle.load", "pickle.loads", "yaml.load", "eval", "exec", "dcp.load"):
            yield node.lineno, called
        if called.endswith((".cuda", "set_default_device", "set_default_dtype")) and name not in MAY_SET_DEFAULTS:
            yield node.lineno, f"{called}: models are told their device"
        if keywords.get("weights_only") == "False" or (
            called == "torch.load" and keywords.get("weights_only") != "True"
        ):
            yield node.lineno, f"{called} without weights_only=True"
        if called in READERS and name != READERS[called]:
            yield node.lineno, f"{called}: {READERS[called]} reads this kind of file"
        for key in ("allow_pickle", "trust_remote_code"):
            if keywords.get(key) == "True":
                yield node.lineno, f"{key}=True"
        if called in ("np.random.seed", "random.seed") or (called == "torch.manual_seed" and name not in MAY_SEED):
            yield node.lineno, f"{called}: global random state"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_architecture_forbidden_calls(path: Path) -> None:
    found = list(forbidden(ast.parse(path.read_text()), str(path.relative_to(PACKAGE))))
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize(
    "code",
    [
        "pickle.load(f)", "yaml.load(f)", "eval('1')", "exec('1')", "model.cuda()", "torch.load(p)",
        "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "torch.manual_seed(0)", "np.load(p)",
        "Image.open(p)", "safe_open(p)", "load_file(p)",
    ],
)  # fmt: skip
def test_architecture_check_can_fail(code: str) -> None:
    assert list(forbidden(ast.parse(code), "x.py"))


def test_architecture_no_two_modules_share_a_name() -> None:
    """A traceback tells where one is: `base.py` and the verbs of `cli/` apart, which are named for what they do."""
    names = [path.name for path in FILES if path.parent.name != "cli" and path.name not in ("__init__.py", "base.py")]
    assert {name for name in names if names.count(name) > 1} == set()


def test_architecture_imports_are_light() -> None:
    """Neither the package nor the command line imports torch before it is needed."""
    code = "import seriatim.cli.main, sys; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
