"""Plug-ins: files and packages of the user's own, which register heads, orders and other parts when they are imported.

A plug-in is code that runs with the rights of its user. So only the user can name one, at the command line or in
Python, or install one, as a package with an entry point. No file that is read can name one: no recipe, no model folder.

The tables are named by text and imported when the first plug-in is loaded, for two reasons: a command line without
plug-ins needs no torch to start, and this module stands left of all of them, so that whatever runs can tell what was
loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from seriatim.core.errors import UsageError, caller_level, is_out_of_memory, one_line, shown

GROUP = "seriatim.plugins"  # the group of entry points in which packages name their modules
ROOT = __name__.split(".")[0]


class Table(NamedTuple):
    """A public table, name -> part, to which a plug-in may add."""

    module: str
    name: str
    noun: str  # what one entry is called in messages
    base: str | None = None  # the class of which entries are subclasses, as "module:Class"; None for other entries

    def content(self) -> dict[str, Any]:
        found: dict[str, Any] = getattr(importlib.import_module(f"{ROOT}.{self.module}"), self.name)
        return found

    def check(self, name: object, part: object, who: str) -> None:
        """Raise UsageError unless an entry is of the kind that this table holds."""
        if not isinstance(name, str) or not name:
            raise UsageError(f"{who} registers the {self.noun} {shown(name)} in {self.name}; its name must be a text")
        if self.base is not None:
            module, cls = self.base.split(":")
            if not (
                isinstance(part, type) and issubclass(part, getattr(importlib.import_module(f"{ROOT}.{module}"), cls))
            ):
                raise UsageError(
                    f"{who} registers {shown(part)} as the {self.noun} {name!r}; {self.name} holds subclasses of "
                    f"{ROOT}.{module}.{cls}"
                )
        elif self.name in ("ORDERS", "GUIDANCE_SCHEDULES") and not callable(part):
            raise UsageError(f"{who} registers {shown(part)} as the {self.noun} {name!r}; {self.name} holds functions")


TABLES = (
    Table("models.registry", "HEADS", "head", "heads.base:Head"),
    Table("models.registry", "BACKBONES", "backbone", "backbones.base:Backbone"),
    Table("models.registry", "CONDITIONERS", "conditioner", "conditions.base:Conditioner"),
    Table("models.registry", "MODELS", "model", "models.base:SequenceModel"),
    Table("models.registry", "SPLITS", "split", "models.splits:Split"),
    Table("tokenizers.kinds", "TOKENIZERS", "tokenizer", "tokenizers.base:Tokenizer"),
    Table("data.sources", "DATASETS", "data source", "data.base:ImageData"),
    Table("evaluation.features", "FEATURES", "feature extractor", "evaluation.base:FeatureExtractor"),
    Table("core.orders", "ORDERS", "order"),
    Table("core.schedules", "GUIDANCE_SCHEDULES", "guidance schedule"),
    Table("core.schedules", "TOKEN_SCHEDULES", "token schedule"),
    Table("training.optim", "OPTIMISERS", "optimiser"),
    Table("training.trackers", "TRACKERS", "tracker"),
    Table("zoo", "PRESETS", "preset"),
)


@dataclass(frozen=True)
class Plugin:
    """A plug-in that was loaded."""

    module: ModuleType
    source: Path  # its file, or the folder of its package
    origin: dict[str, str]  # path and sha256 of a file; package, version and entry point of a package
    added: tuple[tuple[Table, str], ...]  # the entries that it has added to the tables

    @property
    def registers(self) -> list[str]:
        return [f"{table.noun} {name}" for table, name in self.added]

    def stands(self) -> bool:
        """Whether all that it has registered is still there."""
        return all(name in table.content() for table, name in self.added)


LOADED: dict[str, Plugin] = {}  # path of a file, or name of an entry point -> plug-in


def loaded_plugins() -> list[dict[str, Any]]:
    """What was loaded and what each plug-in registers, as plain data, for environment.json of a run."""
    return [{**plugin.origin, "registers": plugin.registers} for plugin in LOADED.values()]


def plugin_files() -> list[str]:
    """The files that were loaded, which a process that this one starts must load too."""
    return [plugin.origin["path"] for plugin in LOADED.values() if "path" in plugin.origin]


def plugin_changes(before: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the plug-ins that are loaded differ from those `before`, as `loaded_plugins` told them; empty if equal."""
    then, now = ({name_of(told): mark_of(told) for told in each} for each in (before, loaded_plugins()))
    return [
        f"plug-in {name} from {then.get(name, 'none')} to {now.get(name, 'none')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def name_of(told: Mapping[str, Any]) -> str:
    return Path(str(told["path"])).name if "path" in told else str(told.get("package"))


def mark_of(told: Mapping[str, Any]) -> str:
    return f"sha256 {str(told.get('sha256'))[:12]}" if "path" in told else f"version {told.get('version')}"


# --- files --------------------------------------------------------------------------------------------------------


class Source(importlib.abc.InspectLoader):
    """Runs a module from bytes that were read before, so that what is hashed is what runs, and no cache is written."""

    def __init__(self, content: bytes, path: Path) -> None:
        self.content, self.path = content, path

    def get_source(self, fullname: str) -> str:  # noqa: ARG002 (the interface's)
        return importlib.util.decode_source(self.content)

    def get_code(self, fullname: str) -> Any:  # noqa: ARG002
        return self.source_to_code(self.content, str(self.path))


def load_plugin(path: Path | str) -> ModuleType:
    """Import a Python file that registers parts of the user's own, such as `HEADS["mine"] = Mine`; returns the module.

    A file that is loaded already is not run again unless it has changed; then what it registers replaces what it
    registered before. Modules beside the file can be imported at its top. Raises UsageError if the file is not there,
    fails, or registers a name that exists; the tables are then as they were.
    """
    path = Path(path).expanduser().absolute()
    who = f"plugin: {path}"
    if path.is_dir():
        raise UsageError(f"{who} is a folder; name a Python file, or install the package and its entry point")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{who} does not exist; name a Python file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{who} can't be read: {one_line(error)}; name a Python file") from error
    origin = {"path": str(path), "sha256": hashlib.sha256(content).hexdigest()}
    before = LOADED.get(str(path))
    if before is not None and before.origin == origin and before.stands():
        return before.module
    name = f"plugin_{hashlib.sha256(str(path).encode('utf-8', 'surrogateescape')).hexdigest()[:8]}_{path.stem}"

    def work() -> ModuleType:
        for table, entry in () if before is None else before.added:
            table.content().pop(entry, None)
        with beside(path.parent):
            loader.exec_module(module)
        return module

    loader = Source(content, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None, "a loader is given"
    module = importlib.util.module_from_spec(spec)
    with in_modules(name, module):
        _, added = registered(work, who, path, () if before is None else before.added)
    LOADED[str(path)] = Plugin(module, path, origin, added)
    return module


@contextlib.contextmanager
def in_modules(name: str, module: ModuleType) -> Iterator[None]:
    """The module is in `sys.modules`, where dataclasses and pickle look for it; if the code inside fails, no longer."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[None]:
    """Modules in `folder` can be imported inside, unless one of that name is installed.

    It ends with the import of the plug-in, because a folder `datasets/` beside it would later pass for a library.
    """
    if str(folder) in sys.path:
        yield
        return
    sys.path.append(str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the plug-in may have removed it
            sys.path.remove(str(folder))


T = TypeVar("T")


def after_plugins(cls: type[T], files: Sequence[str]) -> T:
    """An object of `cls` without attributes, made after the plug-ins in `files` were loaded.

    What `__reduce__` returns names this function so that a worker process that was not forked can read what it is sent:
    pickle calls it before it reads the attributes, which may be of classes of a plug-in.
    """
    for file in files:
        load_plugin(file)
    return cls.__new__(cls)


# --- packages -----------------------------------------------------------------------------------------------------


def load_installed_plugins() -> None:
    """Import the modules that installed packages name in the entry point group `seriatim.plugins`.

    The command line does so before each verb. A package that fails is left out with a warning that names it, because
    it may have nothing to do with the work at hand.
    """
    from importlib.metadata import entry_points  # slow to import

    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        package = "unknown" if entry.dist is None else entry.dist.name
        version = "" if entry.dist is None else entry.dist.version
        key = f"{package}:{entry.name}={entry.value}"
        if key in LOADED and LOADED[key].stands():
            continue
        who = f"plugin: {entry.value} of the package {package} {version}".rstrip()
        try:
            if entry.attr:
                raise UsageError(
                    f"{who} is part of a module; its entry point must name a module, which registers parts at import"
                )
            source = source_of(entry.module)
            module, added = registered(entry.load, who, source)
        except UsageError as error:
            sys.modules.pop(entry.module, None)  # so that the next attempt imports it again, and does not pass for good
            warnings.warn(
                f"{one_line(error)}; it is left out: mend it, or uninstall {package}", stacklevel=caller_level()
            )
            continue
        origin = {"package": package, "version": version, "entry_point": f"{entry.name} = {entry.value}"}
        LOADED[key] = Plugin(module, source, origin, added)


def source_of(module: str) -> Path:
    """The file of a top-level module, or the folder of the package; its own name if it can't be found."""
    top = module.split(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        return Path(top)
    return Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)


# --- what both share ----------------------------------------------------------------------------------------------


def registered(
    work: Callable[[], ModuleType], who: str, source: Path, own: tuple[tuple[Table, str], ...] = ()
) -> tuple[ModuleType, tuple[tuple[Table, str], ...]]:
    """What `work` returns, and the entries that it has added to the tables.

    Raises UsageError, after the tables were restored, if it fails, adds something of the wrong kind, or replaces or
    removes an entry that is not among its `own`.
    """
    contents = [(table, table.content()) for table in TABLES]
    before = [dict(content) for _, content in contents]
    try:
        try:
            module = work()
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            line = line_in(error, source)
            where = "" if line is None else f" in line {line}"
            what = (
                "it calls exit()"
                if isinstance(error, SystemExit)
                else f"{type(error).__name__}: {one_line(error)[:300]}"
            )
            raise UsageError(f"{who} failed{where}: {what}; SERIATIM_DEBUG=1 shows the traceback") from error
        added = []
        for (table, content), old in zip(contents, before, strict=True):
            for name, part in old.items():
                if content.get(name) is not part and (table, name) not in own:
                    does = "replaces" if name in content else "removes"
                    raise UsageError(
                        f"{who} {does} the {table.noun} {name!r}, which exists already; choose another name"
                    )
            for name, part in content.items():
                if name not in old or (table, name) in own:
                    table.check(name, part, who)
                    added.append((table, name))
        return module, tuple(added)
    except BaseException:
        for (_, content), old in zip(contents, before, strict=True):
            content.clear()
            content.update(old)
        raise


def line_in(error: BaseException, source: Path) -> int | None:
    """The line of the file, or of a file in the folder, `source` that an error last passed through."""
    if isinstance(error, SyntaxError) and error.filename == str(source):
        return error.lineno
    found, frame = None, error.__traceback__
    while frame is not None:
        file = Path(frame.tb_frame.f_code.co_filename)
        if file == source or source in file.parents:
            found = frame.tb_lineno
        frame = frame.tb_next
    return found


def fault_of_plugin(error: BaseException) -> str | None:
    """The plug-in, with the line, that an error passed through; None if it passed through none."""
    for plugin in LOADED.values():
        line = line_in(error, plugin.source)
        if line is not None:
            what = plugin.origin.get("path") or f"{plugin.origin['package']} {plugin.origin['version']}"
            return f"plugin: {what} failed in line {line}"
    return None
