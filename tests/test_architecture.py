"""The rules of the code as checks over its text; each is a few lines and names what breaks it.

`EXCEPTIONS_*` may only shrink.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TypeGuard

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sglang_moelb"
KERNELS = PACKAGE / "kernels"
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60

# A part may import the parts on its right, and nothing imports `plugin` or `cli`.
ARROWS = MappingProxyType(
    {
        "types": set(),
        "words": {"types"},
        "environment": set(),
        "stored_formats": set(),
        "placement": {"stored_formats", "types"},
        "config": {"types", "words"},
        "hot_config": {"config", "words"},
        "controller": {"config", "placement", "types", "words"},
        "kernels": {"types"},
        "trace": {"config", "types"},
        "metrics": {"types"},
        "ep": {
            "config", "controller", "environment", "hot_config", "kernels", "live", "metrics",
            "placement", "stored_formats", "trace", "types",
        },
        "plugin": {"environment", "ep"},
        "patching": set(),
        "demo": {"ab", "ep"},
        "ab": {"demo", "ep"},
        "doctor": {"config", "environment", "ep", "patching", "types"},
        "live": set(),
        "replay": {"ab", "config", "controller", "hot_config", "trace", "types"},
        "calibrate": {"ab", "controller", "placement", "stored_formats", "trace", "types"},
        "cli": {"ab", "calibrate", "demo", "doctor", "live", "patching", "replay"},
    }
)
SERVING = (
    "types", "config", "environment", "hot_config", "stored_formats", "placement", "controller",
    "kernels", "ep", "plugin",
)  # fmt: skip
IMPURE = {"time", "random", "os", "threading", "asyncio", "socket", "subprocess", "datetime"}
EXCEPTIONS_LONG_FILES: set[str] = set()
# One parameter an option, each with its help: the signature is the command line.
EXCEPTIONS_LONG_FUNCTIONS = {"ab/cli.py: ab"}
EXCEPTIONS_ENVIRONMENT = {
    "config.py",
    "environment.py",
    "ep/standin/launch.py",  # makes the environment of a server on CPU
}


@cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def sources() -> list[Path]:
    """Every Python file of the package; none of the links inside it."""
    return sorted(PACKAGE.rglob("*.py"))


def nodes(path: Path) -> Iterator[ast.AST]:
    """Every node of a file."""
    return ast.walk(tree(path))


def name(path: Path) -> str:
    """Path below the package."""
    return str(path.relative_to(PACKAGE))


def part(path: Path) -> str:
    """The part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top(dotted: str) -> str:
    """The distribution's part of a dotted name."""
    return dotted.partition(".")[0]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All parameters but self and cls, in order."""
    a = node.args
    extra = [arg for arg in (a.vararg, a.kwarg) if arg]
    found = [*a.posonlyargs, *a.args, *a.kwonlyargs, *extra]
    return [arg for arg in found if arg.arg not in ("self", "cls")]


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Length of a function without its docstring, which may hold a worked example."""
    first = node.body[0]
    has_docstring = ast.get_docstring(node) is not None
    text = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
    return (node.end_lineno or 0) - node.lineno + 1 - text


def is_device_code(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles it."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def ops() -> list[Path]:
    """The folders of `kernels/`."""
    return sorted(path.parent for path in KERNELS.glob("*/kernel.py"))


def test_imports_follow_the_arrows_and_every_part_has_some() -> None:
    parts = {part(path) for path in sources()} - {"__init__"}
    assert parts == set(ARROWS)
    wrong = [
        f"{name(path)} imports {dotted}"
        for path in sources()
        for dotted in imports(path)
        if top(dotted) == "sglang_moelb"
        and dotted.split(".")[1] not in {part(path), *ARROWS.get(part(path), set())}
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "owners"),
    [
        ("sglang", {"ep"}),
        ("torch.distributed", {"ep"}),
        ("deep_ep", {"ep"}),
        ("triton", {"kernels"}),
        ("transformers", {"demo"}),
    ],
)
def test_a_foreign_interface_is_touched_in_one_part_only(module: str, owners: set[str]) -> None:
    users = {
        part(path)
        for path in sources()
        for dotted in imports(path)
        if f"{dotted}.".startswith(f"{module}.")
    }
    assert users <= owners
    spelled = [
        name(path)
        for path in sources()
        if module == "torch.distributed"
        and part(path) not in owners
        and any(isinstance(n, ast.Attribute) and ast.unparse(n) == module for n in nodes(path))
    ]
    assert spelled == []


def test_the_controller_is_pure() -> None:
    wrong = [
        f"{name(path)}: {dotted}"
        for path in sources()
        if part(path) == "controller"
        for dotted in imports(path)
        if top(dotted) in {*IMPURE, "sglang", "triton", "torch"}
    ]
    assert wrong == []


def test_kernels_know_tensors_only() -> None:
    known = {"__future__", "torch", "triton", "sglang_moelb", "dataclasses", "collections"}
    known |= {"typing", "functools", "math", "enum"}
    wrong = [
        f"{name(path)}: {dotted}"
        for path in sources()
        if part(path) == "kernels" and path.name != "testing.py"
        for dotted in imports(path)
        if top(dotted) not in known
    ]
    assert wrong == []


def test_the_environment_is_read_in_two_modules_only() -> None:
    users = {
        name(path)
        for path in sources()
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")
    }
    assert users == EXCEPTIONS_ENVIRONMENT


def test_files_are_short() -> None:
    long = {
        name(path)
        for path in sources()
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES
        and path.name != "kernel.py"
    }
    assert long == EXCEPTIONS_LONG_FILES


def test_functions_are_short() -> None:
    long = {
        f"{name(path)}: {node.name}"
        for path in sources()
        if path.name != "kernel.py"
        for node in functions(path)
        if num_lines(node) > MAX_FUNCTION_LINES
    }
    assert long == EXCEPTIONS_LONG_FUNCTIONS


def test_every_parameter_and_result_is_annotated() -> None:
    wrong = [
        f"{name(path)}: {node.name}"
        for path in sources()
        for node in functions(path)
        if not is_device_code(node)
        and (node.returns is None or any(p.annotation is None for p in parameters(node)))
    ]
    assert wrong == []


def test_what_is_public_has_a_docstring() -> None:
    wrong = [
        f"{name(path)}: {getattr(node, 'name', 'module')}"
        for path in sources()
        if path.read_text(encoding="utf-8").strip()
        for node in (tree(path), *public(tree(path)))
        if ast.get_docstring(node) is None
    ]
    assert wrong == []


def public(
    node: ast.Module | ast.ClassDef,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and the methods of those classes."""
    for child in node.body:
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if (is_function or isinstance(child, ast.ClassDef)) and not child.name.startswith("_"):
            if is_function and is_device_code(child):
                continue
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


def test_no_exception_is_caught_blindly_and_dropped() -> None:
    def blind(handler: ast.ExceptHandler) -> bool:
        caught = ast.unparse(handler.type) if handler.type else "BaseException"
        reraises = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(handler))
        return caught in ("Exception", "BaseException") and not reraises

    wrong = [
        f"{name(path)}:{node.lineno}"
        for path in sources()
        for node in nodes(path)
        if isinstance(node, ast.ExceptHandler) and blind(node)
    ]
    assert wrong == []


def test_shape_letters_are_explained_in_the_modules_docstring() -> None:
    wrong = []
    for path in sources():
        legend = ast.get_docstring(tree(path)) or ""
        if path.parent in ops():  # the legend of an op is in its __init__.py
            legend += ast.get_docstring(tree(path.parent / "__init__.py")) or ""
        letters = {letter for suffix in shape_suffixes(path) for letter in suffix}
        missing = sorted(x for x in letters if not re.search(rf"\b{x}\b", legend))
        if missing:
            wrong.append(f"{name(path)}: {' '.join(missing)}")
    assert wrong == []


def shape_suffixes(path: Path) -> set[str]:
    """Suffixes such as TK of `ids_TK`: of names that are bound in a file, not only read there."""
    pattern = r"\b[a-z0-9_]*[a-z0-9]_([A-Za-z]?[A-Z]+)\b"
    return set(re.findall(pattern, bound_text(path)))


def bound_text(path: Path) -> str:
    """Names that a file binds, parameters included, one a line."""
    names = [node.id for node in nodes(path) if is_stored(node)]
    return "\n".join(names + [node.arg for node in nodes(path) if isinstance(node, ast.arg)])


def is_stored(node: ast.AST) -> TypeGuard[ast.Name]:
    """Whether a name is assigned to here."""
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def test_counts_are_spelled_num() -> None:
    wrong = [
        f"{name(path)}: {word}"
        for path in sources()
        for word in re.findall(r"\bn_(?:experts|ranks|layers|tokens|rows)\b", bound_text(path))
    ]
    assert wrong == []


@pytest.mark.parametrize("op", ops(), ids=lambda path: path.name)
def test_a_kernel_is_a_folder_of_three_with_a_test_and_a_benchmark(op: Path) -> None:
    assert {"__init__.py", "kernel.py", "ref.py"} <= {path.name for path in op.glob("*.py")}
    assert (ROOT / "tests" / "kernels" / f"test_{op.name}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{op.name}.py").is_file()


@pytest.mark.parametrize("op", ops(), ids=lambda path: path.name)
def test_reference_and_kernel_have_the_same_signature(op: Path) -> None:
    signatures = []
    for file in ("ref.py", "kernel.py"):
        found = [node for node in functions(op / file) if node.name == op.name]
        assert len(found) == 1, f"{op.name}/{file} has no function {op.name}"
        signatures.append(f"({ast.unparse(found[0].args)}) -> {ast.unparse(found[0].returns)}")
    assert signatures[0] == signatures[1]


def test_serving_code_does_not_print() -> None:
    wrong = [
        f"{name(path)}:{node.lineno}"
        for path in sources()
        if part(path) in SERVING
        for node in nodes(path)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert wrong == []
