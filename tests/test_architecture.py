"""The house rules that a parser can check: who imports whom, what is imported when, how files are loaded."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

OPTIONAL = {
    "transformers": "transformers",
    "lm_eval": "lm-eval",
    "datasets": "datasets",
    "sentencepiece": "sentencepiece",
    "matplotlib": "matplotlib",
    "pynvml": "nvidia-ml-py",
    "sklearn": "scikit-learn",
    "zstandard": "zstandard",
    "ray": "ray",
}


@dataclass(frozen=True)
class Import:
    """One imported name: ``target`` is dotted and absolute, ``name`` what is taken from it, if anything."""

    target: str
    name: str | None
    line: int
    runs_on_import: bool


class _ImportCollector(ast.NodeVisitor):
    """Every import of a module, wherever it stands; remembers whether importing the module runs it."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.found: list[Import] = []
        self._deferred = 0

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, None, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        target = node.module or ""
        if node.level:
            parents = self.package.split(".")
            target = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [target])])
        for alias in node.names:
            self._add(target, alias.name, node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0] if node.args else None
        if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
            self._add(str(first.value), None, node)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)
            return
        self._visit_deferred(*node.body)
        for statement in node.orelse:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_deferred(*ast.iter_child_nodes(node))

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_deferred(*ast.iter_child_nodes(node))

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_deferred(*ast.iter_child_nodes(node))

    def _visit_deferred(self, *nodes: ast.AST) -> None:
        self._deferred += 1
        for node in nodes:
            self.visit(node)
        self._deferred -= 1

    def _add(self, target: str, name: str | None, node: ast.stmt | ast.expr) -> None:
        self.found.append(Import(target, name, node.lineno, runs_on_import=not self._deferred))


def rows_of_table(architecture: str) -> dict[str, int]:
    """Part of the package (``models``, ``api``) -> row of the table under "Folders, in import order"."""
    section = architecture.split("## Folders, in import order")[1].split("\n## ")[0]
    rows: dict[str, int] = {}
    cells = re.findall(r"^\| (`[^|]*) \|", section, flags=re.MULTILINE)
    for row, cell in enumerate(cells):
        for name in re.findall(r"`([^`]+)`", cell):
            rows[name.removesuffix("/").removesuffix(".py")] = row
    # The package itself re-exports the public functions, and `python -m quamba` is a command.
    rows["__init__"] = rows["api"]
    rows["__main__"] = rows["cli"]
    return rows


def direction_faults(package: Path, rows: dict[str, int]) -> list[str]:
    """Imports of ``package`` that go up the table, and parts of it that no row names."""
    faults = []
    for path in python_files(package):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        if part not in rows:
            faults.append(f"{_place(package, path)}: '{part}' is in no row of docs/architecture.md")
            continue
        for item in imports_of(package, path):
            imported = _part_of(item, package)
            if imported is None:
                continue
            if imported not in rows:
                faults.append(f"{_place(package, path, item.line)}: '{imported}' is in no row")
            elif rows[imported] < rows[part]:
                faults.append(
                    f"{_place(package, path, item.line)}: {part} imports {imported}, which is above"
                )
    return faults


def optional_import_faults(package: Path) -> list[str]:
    """Imports of optional packages that run when the module is imported."""
    return [
        f"{_place(package, path, item.line)}: {item.target} is imported before it is needed"
        for path in python_files(package)
        for item in imports_of(package, path)
        if item.runs_on_import and item.target.split(".")[0] in OPTIONAL
    ]


def unsafe_load_faults(root: Path) -> list[str]:
    """Uses of ``torch.load`` that are not a call with ``weights_only=True``, and imports of pickle."""
    faults = []
    for path in python_files(root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        torch_names = {"torch"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                torch_names |= {a.asname for a in node.names if a.name == "torch" and a.asname}
                if any(a.name in ("pickle", "dill", "cloudpickle") for a in node.names):
                    faults.append(f"{_place(root, path, node.lineno)}: imports pickle")
            elif isinstance(node, ast.ImportFrom):
                names = {a.name for a in node.names}
                if node.module in ("pickle", "dill", "cloudpickle") or (
                    node.module in ("torch", "torch.serialization") and "load" in names
                ):
                    faults.append(f"{_place(root, path, node.lineno)}: imports from {node.module}: {names}")
        safe = {
            id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _weights_only(node)
        }
        faults += [
            f"{_place(root, path, node.lineno)}: torch.load without weights_only=True"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr == "load"
            and ast.unparse(node.value) in {*torch_names, *(f"{n}.serialization" for n in torch_names)}
            and id(node) not in safe
        ]
    return faults


def python_files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*.py")) if "__pycache__" not in path.parts)


def imports_of(package: Path, path: Path) -> list[Import]:
    folders = path.relative_to(package.parent).parent.parts
    collector = _ImportCollector(".".join(folders))
    collector.visit(ast.parse(path.read_text(encoding="utf-8")))
    return collector.found


def _part_of(item: Import, package: Path) -> str | None:
    """The folder or file right under the package that an import reaches; None for other packages."""
    root, *rest = item.target.split(".")
    if root != package.name:
        return None
    if rest:
        return rest[0]
    is_module = item.name and ((package / item.name).is_dir() or (package / f"{item.name}.py").is_file())
    return item.name if is_module else "__init__"


def _weights_only(call: ast.Call) -> bool:
    return any(
        k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
        for k in call.keywords
    )


def _place(root: Path, path: Path, line: int | None = None) -> str:
    return f"{path.relative_to(root.parent).as_posix()}" + (f":{line}" if line else "")


@pytest.fixture(scope="module")
def package(repo_root: Path) -> Path:
    return repo_root / "src" / "quamba"


@pytest.fixture(scope="module")
def rows(repo_root: Path) -> dict[str, int]:
    return rows_of_table((repo_root / "docs" / "architecture.md").read_text(encoding="utf-8"))


def test_imports_go_down_the_table(package: Path, rows: dict[str, int]) -> None:
    assert direction_faults(package, rows) == []


def test_optional_packages_are_imported_where_used(package: Path) -> None:
    assert optional_import_faults(package) == []


@pytest.mark.parametrize("folder", ["src/quamba", "benchmarks", "examples", "scripts"])
def test_checkpoints_are_never_unpickled(repo_root: Path, folder: str) -> None:
    assert unsafe_load_faults(repo_root / folder) == []


def test_importing_quamba_leaves_optional_packages_out(package: Path) -> None:
    modules = sorted(OPTIONAL)
    script = f"import quamba, sys; print([m for m in {modules} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=package.parent, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_optional_packages_are_declared(repo_root: Path) -> None:
    project = (repo_root / "pyproject.toml").read_text(encoding="utf-8")
    for distribution in OPTIONAL.values():
        assert re.search(rf'"{distribution}[>=]', project), f"pyproject.toml does not declare {distribution}"


def test_the_table_is_read_in_order(rows: dict[str, int]) -> None:
    order = ["cli", "api", "evaluation", "runtime", "checkpoints", "recipes", "models", "modules", "kernels"]
    order += ["formats", "errors"]
    assert [rows[name] for name in order] == list(range(11))
    assert rows["runtime"] == rows["quantization"]
    assert rows["checkpoints"] == rows["transforms"] == rows["calibration"]


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "quamba" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "quamba"


UPWARD = {
    "at the top": "import quamba.api\n",
    "in a function": "def f():\n    from quamba.models.lm import MambaLM\n",
    "in a method": "class C:\n    def f(self):\n        import quamba.recipes.plan as plan\n",
    "for types only": "import typing\nif typing.TYPE_CHECKING:\n    from quamba.cli import main\n",
    "relative": "from ..models import lm\n",
    "relative to the root": "from .. import models\n",
    "of a folder": "from quamba import models\n",
    "of the public API": "from quamba import load\n",
    "of the package": "import quamba\n",
    "by name": "import importlib\nlm = importlib.import_module('quamba.models.lm')\n",
    "of an unknown part": "from quamba.misc import thing\n",
}


@pytest.mark.parametrize("source", UPWARD.values(), ids=UPWARD.keys())
def test_an_upward_import_is_found(tmp_path: Path, rows: dict[str, int], source: str) -> None:
    package = _write(tmp_path, {"formats/packing.py": source, "models/lm.py": ""})
    (fault,) = direction_faults(package, rows)
    assert fault.startswith("quamba/formats/packing.py:")


DOWNWARD = {
    "a lower row": "from quamba.formats.weight import QuantizedWeight\n",
    "its own row": "from quamba.models.config import MambaConfig\n",
    "a sibling": "from . import config\nfrom .config import MambaConfig\n",
    "a lower row, relative": "from ..errors import QuambaError\nfrom .. import errors\n",
    "another package": "import torch\nfrom torch import nn\n",
    "a namesake elsewhere": "from quambaplus.api import load\n",
}


@pytest.mark.parametrize("source", DOWNWARD.values(), ids=DOWNWARD.keys())
def test_a_downward_import_is_let_pass(tmp_path: Path, rows: dict[str, int], source: str) -> None:
    files = {"models/lm.py": source, "models/config.py": "", "formats/weight.py": "", "errors.py": ""}
    assert direction_faults(_write(tmp_path, files), rows) == []


def test_a_folder_outside_the_table_is_found(tmp_path: Path, rows: dict[str, int]) -> None:
    (fault,) = direction_faults(_write(tmp_path, {"misc/thing.py": ""}), rows)
    assert fault == "quamba/misc/thing.py: 'misc' is in no row of docs/architecture.md"


def test_the_package_root_may_import_the_api(tmp_path: Path, rows: dict[str, int]) -> None:
    files = {"__init__.py": "from quamba.api import load\n", "api.py": "", "cli/main.py": "import quamba\n"}
    assert direction_faults(_write(tmp_path, files), rows) == []


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("import transformers\n", 1),
        ("from sklearn.cluster import KMeans\n", 1),
        ("try:\n    import datasets\nexcept ImportError:\n    datasets = None\n", 1),
        ("class C:\n    import matplotlib.pyplot as plt\n", 1),
        ("def f():\n    import transformers\n    from lm_eval import simple_evaluate\n", 0),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers\n", 0),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import zstandard\n", 1),
    ],
)
def test_an_early_optional_import_is_found(tmp_path: Path, source: str, faults: int) -> None:
    assert len(optional_import_faults(_write(tmp_path, {"evaluation/tasks.py": source}))) == faults


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("import torch\ntorch.load(p)\n", 1),
        ("import torch\ntorch.load(p, weights_only=False)\n", 1),
        ("import torch\ntorch.load(p, weights_only=flag)\n", 1),
        ("import torch as t\ndef f():\n    return t.load(p)\n", 1),
        ("import torch\nread = torch.load\n", 1),
        ("import torch\ntorch.serialization.load(p)\n", 1),
        ("from torch import load\n", 1),
        ("import pickle\n", 1),
        ("import torch\ntorch.load(p, map_location='cpu', weights_only=True)\n", 0),
        ("import json\njson.load(f)\n", 0),
    ],
)
def test_an_unsafe_load_is_found(tmp_path: Path, source: str, faults: int) -> None:
    assert len(unsafe_load_faults(_write(tmp_path, {"checkpoints/upstream.py": source}))) == faults
