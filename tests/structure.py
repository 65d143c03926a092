"""Reads the source of the package, without importing it: where does it break the floor plan or the laws?"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOMS = (
    "errors",
    "seeds",
    "parameters",
    "results",
    "losses",
    "objectives",
    "linalg",
    "operators",
    "models",
    "checkpoints",
    "resolving",
    "estimators",
    "measures",
    "projection",
    "optim",
    "choosing",
    "monitor",
    "report",
    "integrations",
    "demos",
    "testing",
)
"""From the ground up: a file imports from rooms before its own, and from its own room without a circle."""

CORE = {"torch", "numpy", "rich", "click", "safetensors"}
"""The third-party packages that are always there."""

EXTRAS = {
    "accelerate": "accelerate",
    "backpack": "backpack",
    "datasets": "datasets",
    "lightning": "lightning",
    "matplotlib": "matplotlib",
    "peft": "peft",
    "pyhessian": "pyhessian",
    "pytorch_lightning": "lightning",
    "tensorboard": "tensorboard",
    "torch.utils.tensorboard": "tensorboard",
    "torchvision": "torchvision",
    "transformers": "transformers",
}
"""Import name -> optional package: each is imported in one file, inside a function."""

SEEDING = {
    "numpy.random.seed",
    "np.random.seed",
    "random.seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.random.seed",
    "torch.seed",
}
"""Calls that move the global random state."""


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Import:
    line: int
    module: str
    name: str | None  # of `from module import name`
    relative: bool
    at_top: bool  # runs when the file is imported


@dataclass(frozen=True)
class Source:
    path: Path
    shown: str  # for the reader: curvkit/linalg/maps.py
    dotted: str  # curvkit.linalg.maps
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def room(self) -> str:
        return self.dotted.partition(".")[2].partition(".")[0]


def sources(folder: Path, name: str) -> dict[str, Source]:
    """The files of a package that lies in `folder` and is installed as `name`, by dotted name."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        parts = inside.parts[:-1] if path.name == "__init__.py" else (*inside.parts[:-1], path.stem)
        dotted = ".".join((name, *parts))
        shown = f"{folder.name}/{inside.as_posix()}"
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        found[dotted] = Source(path, shown, dotted, tree)
    if not found:
        raise FileNotFoundError(f"no Python file in {folder}")
    return found


def imports(source: Source) -> Iterator[Import]:
    """Every import of a file, relative ones made absolute; also `import_module` of a literal name."""
    inside = {
        id(node) for function in ast.walk(source.tree) if isinstance(function, FUNCTIONS) for node in ast.walk(function)
    }
    for node in ast.walk(source.tree):
        at_top = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, None, False, at_top)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                levels = node.level - source.is_package
                base = source.dotted.split(".")[: -levels or None]
                module = ".".join((*base, module)) if module else ".".join(base)
            for alias in node.names:
                yield Import(node.lineno, module, alias.name, bool(node.level), at_top)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called, argument = dotted_name(node.func), node.args[0].value
            if isinstance(argument, str) and called.split(".")[-1] in ("import_module", "__import__"):
                yield Import(node.lineno, argument, None, False, at_top)


def dotted_name(node: ast.expr) -> str:
    """`torch.random.seed` for the expression of that look; "" for another."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def layer_faults(folder: Path) -> list[str]:
    """Imports of curvkit that go upwards, in a circle, to the package root, or to what is no dependency."""
    files, faults = sources(folder, "curvkit"), []
    circles: dict[str, set[str]] = {}
    for source in files.values():
        if source.room and source.room not in ROOMS:
            faults.append(f"{source.shown}: the room {source.room!r} is not on the floor plan")
            continue
        for used in imports(source):
            where = f"{source.shown}:{used.line}"
            package = used.module.partition(".")[0]
            if package in ("curvkit_cli", "cli"):
                faults.append(f"{where}: the package imports the command line ({used.module})")
            elif package != "curvkit":
                if package not in CORE and package not in sys.stdlib_module_names and not extra_of(used):
                    faults.append(f"{where}: {used.module} is not a dependency")
            elif source.room:  # curvkit/__init__.py names every room, and nothing imports it
                target = files.get(f"{used.module}.{used.name}") or files.get(used.module)
                if target is None:
                    faults.append(f"{where}: {used.module} does not exist")
                elif not target.room:
                    faults.append(f"{where}: imports from the package root; name the file that defines it")
                elif target.room not in ROOMS or ROOMS.index(target.room) > ROOMS.index(source.room):
                    faults.append(f"{where}: {source.room} imports {target.room}, a later room")
                elif target.room == source.room:
                    circles.setdefault(source.dotted, set()).add(target.dotted)
    try:
        graphlib.TopologicalSorter(circles).prepare()
    except graphlib.CycleError as error:
        faults.append(f"imports in a circle: {' -> '.join(error.args[1])}")
    return faults


def cli_faults(folder: Path) -> list[str]:
    """Imports by which the command line names itself absolutely, or anything but curvkit and the core."""
    faults = []
    for source in sources(folder, "curvkit_cli").values():
        for used in imports(source):
            where, package = f"{source.shown}:{used.line}", used.module.partition(".")[0]
            if used.relative:
                if package != "curvkit_cli":
                    faults.append(f"{where}: the relative import leaves the package")
            elif package in ("curvkit_cli", "cli"):
                faults.append(f"{where}: the command line imports itself absolutely ({used.module})")
            elif package not in {"curvkit", *CORE} and package not in sys.stdlib_module_names:
                faults.append(f"{where}: the command line imports {used.module}")
    return faults


def extra_of(used: Import) -> str | None:
    for prefix, extra in EXTRAS.items():
        full = f"{used.module}.{used.name}" if used.name else used.module
        if full == prefix or full.startswith(f"{prefix}."):
            return extra
    return None


def extra_faults(folder: Path) -> list[str]:
    """Optional packages that are imported in several files, or by the mere import of a file."""
    faults: list[str] = []
    users: dict[str, set[str]] = {}
    for source in sources(folder, "curvkit").values():
        for used in imports(source):
            extra = extra_of(used)
            if extra is None:
                continue
            users.setdefault(extra, set()).add(source.shown)
            if used.at_top:
                faults.append(f"{source.shown}:{used.line}: {extra} is optional and imported outside a function")
    for extra, shown in users.items():
        if len(shown) > 1:
            faults.append(f"{extra} is imported in {len(shown)} files: {', '.join(sorted(shown))}")
    return faults


def name_faults(folder: Path, name: str) -> list[str]:
    """Modules that bear the name of a public object of their package: importing one would hide the other."""
    files, faults = sources(folder, name), []
    for source in files.values():
        if source.is_package:
            modules = {other.rpartition(".")[2] for other in files if other.rpartition(".")[0] == source.dotted}
            for public in sorted(modules & public_objects(source)):
                faults.append(f"{source.shown}: {public!r} is a module and a public object")
    return faults


def public_objects(source: Source) -> set[str]:
    """What an `__init__` offers, its own modules apart: imports, `__all__`, and the keys of its tables."""
    named, modules = set(), set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(dotted_name(target) == "__all__" for target in targets) and node.value is not None:
                named |= {leaf.value for leaf in ast.walk(node.value) if isinstance(leaf, ast.Constant)}
        elif isinstance(node, ast.Dict):
            named |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            named.add(node.name)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom):
            own = node.module == source.dotted or (node.level == 1 and node.module is None)
            (modules if own else named).update(alias.asname or alias.name for alias in node.names)
    return {name for name in named - modules if isinstance(name, str)}


def law_faults(folder: Path, name: str) -> list[str]:
    """Writes through `.data`, prints, asserts; global seeds where no `with` puts the random state back."""
    faults = []
    for source in sources(folder, name).values():
        restored = nodes_that_restore_the_random_state(source.tree)
        for node in ast.walk(source.tree):
            said = ""
            if isinstance(node, ast.Assert):
                said = "assert; raise an error that says what to do"
            elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
                held = node if isinstance(node, ast.Attribute) else node.value
                if isinstance(held, ast.Attribute) and held.attr == "data" and dotted_name(held.value) != "self":
                    said = "write through .data; use torch.no_grad() and copy_"
            elif isinstance(node, ast.ImportFrom):
                if any(f"{node.module}.{alias.name}" in SEEDING for alias in node.names):
                    said = "hides a call that moves the global random state; write it in full"
            elif isinstance(node, ast.Call):
                said = call_fault(node, restored=id(node) in restored)
            if said:
                faults.append(f"{source.shown}:{node.lineno}: {said}")
    return faults


def nodes_that_restore_the_random_state(tree: ast.Module) -> set[int]:
    """Whatever stands inside `with random_state():` or `with torch.random.fork_rng():`."""
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            entered = [item.context_expr for item in node.items]
            names = [dotted_name(call.func).split(".")[-1] for call in entered if isinstance(call, ast.Call)]
            if "random_state" in names or "fork_rng" in names:
                inside.update(id(child) for statement in node.body for child in ast.walk(statement))
    return inside


def call_fault(node: ast.Call, *, restored: bool) -> str:
    if isinstance(node.func, ast.Name) and node.func.id == "print":
        return "print; the package returns, the command line renders"
    if dotted_name(node.func) in SEEDING and not restored:
        return "moves the global random state; use curvkit.seeds"
    if isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_") and not node.func.attr.startswith("_"):
        held = node.func.value
        if isinstance(held, ast.Attribute) and held.attr == "data":
            return "write through .data; use torch.no_grad() and copy_"
    return ""
