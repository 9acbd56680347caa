"""The walls between the parts of the project, held for every module by reading its imports.

Imports inside of functions count like those at a module's head. What a module imports is compared
by name alone, so nothing is run and a module needs none of its dependencies here.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each part may not import; a module or package stands for all that is below it.
ABOVE_MODELS = [f"nanovllm_jax.{name}" for name in ("engine", "tools", "llm", "cli", "server")]
WALLS = {
    "pallas_kernels": ["nanovllm_jax"],
    "nanovllm_jax.layers": ["nanovllm_jax.models", *ABOVE_MODELS],
    "nanovllm_jax.models": ABOVE_MODELS,
    "nanovllm_jax.engine": [f"nanovllm_jax.{name}" for name in ("tools", "cli", "llm", "server")],
    "nanovllm_jax.llm": [f"nanovllm_jax.{name}" for name in ("tools", "cli", "server")],
    "nanovllm_jax.tools": ["nanovllm_jax.cli", "nanovllm_jax.server"],
    "nanovllm_jax.server": ["nanovllm_jax.cli"],
    **{f"nanovllm_jax.{name}": ABOVE_MODELS for name in ("checks", "config", "outputs")},
    **{f"nanovllm_jax.{name}": ABOVE_MODELS for name in ("sampling_params", "sharding", "weights")},
    "nanovllm_jax.recommended": ABOVE_MODELS,
    **{f"nanovllm_jax.{name}": ABOVE_MODELS for name in ("files", "tensor_files", "tokenizer")},
}
# Modules that know no array.
NO_JAX = ["engine.scheduler", "engine.block_manager", "engine.sequence"]
NO_JAX = [f"nanovllm_jax.{name}" for name in (*NO_JAX, "sampling_params", "outputs", "recommended")]
JAX = {"jax", "jaxlib", "flax", "optax", "pallas_kernels"}


def modules(*folders):
    """Every module of these folders of the repository: {dotted name: its syntax tree}."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text("utf-8"), str(path))
    return found


def imports(name, tree, known):
    """The modules that a module imports, as dotted names: of `known` ones the most exact."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if is_package(name) else name.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = ".".join(filter(None, (package, base)))
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {n if n in known else base for n in names}
    return found


def is_package(name):
    return (ROOT / name.replace(".", "/") / "__init__.py").is_file()


def inside(name, part):
    return name == part or name.startswith(part + ".")


LIBRARY = modules("nanovllm_jax", "pallas_kernels")
EVERYTHING = LIBRARY | modules("scripts", "tests")
IMPORTS = {name: imports(name, tree, EVERYTHING) for name, tree in EVERYTHING.items()}


def test_every_part_is_there():
    assert {*WALLS, *NO_JAX, "nanovllm_jax.cli", "nanovllm_jax.__main__"} <= set(LIBRARY)


def test_a_modules_imports_are_found():
    code = """
        import a.b, c as d
        from nanovllm_jax import engine, LLM
        from nanovllm_jax.engine.scheduler import Scheduler
        def f():
            from . import sequence
            from .block_manager import BlockManager
            from ..layers import norm
    """
    tree = ast.parse("if 1:" + code)
    assert imports("nanovllm_jax.engine.step", tree, EVERYTHING) == {
        *("a.b", "c", "nanovllm_jax.engine", "nanovllm_jax", "nanovllm_jax.engine.scheduler"),
        *("nanovllm_jax.engine.sequence", "nanovllm_jax.engine.block_manager"),
        "nanovllm_jax.layers.norm",
    }


@pytest.mark.parametrize("part", WALLS)
def test_imports_go_one_way(part):
    wrong = [
        f"{name} imports {imported}"
        for name in LIBRARY
        if inside(name, part)
        for imported in IMPORTS[name]
        if any(inside(imported, forbidden) for forbidden in WALLS[part])
    ]
    assert not wrong


@pytest.mark.parametrize("start", NO_JAX)
def test_no_jax_is_imported_on_any_path(start):
    """The root package's __init__ stands aside: it is run by every import, and imports it all."""
    reached, todo = {}, [(start, start)]
    while todo:
        name, path = todo.pop()
        if name in reached or name == "nanovllm_jax":
            continue
        reached[name] = path
        packages = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
        for imported in [*IMPORTS.get(name, ()), *(p for p in packages if p in LIBRARY)]:
            todo.append((imported, f"{path} -> {imported}"))
    assert not [path for name, path in reached.items() if name.partition(".")[0] in JAX]


def test_importing_the_scheduler_loads_no_jax():
    # A bare package in place of nanovllm_jax, whose __init__ imports the whole engine.
    code = (
        "import importlib, sys, types\n"
        "package = types.ModuleType('nanovllm_jax'); package.__path__ = ['nanovllm_jax']\n"
        "sys.modules['nanovllm_jax'] = package\n"
        f"for name in {[name for name in NO_JAX if name in LIBRARY]}:\n"
        "    importlib.import_module(name)\n"
        "assert not {'jax', 'jaxlib', 'flax'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def on_circles(edges):
    """The nodes of a graph {node: the nodes that it leads to} that lie on circles or between."""
    edges = {node: set(others) & set(edges) for node, others in edges.items()}
    while True:
        led_to = set().union(*edges.values())
        kept = {node for node, others in edges.items() if others and node in led_to}
        if kept == set(edges):
            return edges
        edges = {node: edges[node] & kept for node in kept}


def test_circles_are_found():
    assert on_circles({"a": "bd", "b": "c", "c": "b", "d": "e", "e": ""}) == {
        "b": {"c"},
        "c": {"b"},
    }
    assert on_circles({"a": "b", "b": "c", "c": ""}) == {}


def test_no_circle_of_imports():
    """Except that the command line imports a tool when its command is called."""
    edges = {
        name: {
            other
            for other in IMPORTS[name] - {name}
            if not (name == "nanovllm_jax.cli" and inside(other, "nanovllm_jax.tools"))
        }
        for name in LIBRARY
    }
    assert on_circles(edges) == {}


def test_nothing_imports_the_entry():
    """`python -m nanovllm_jax` is an entry, and never a library."""
    assert not [name for name in EVERYTHING if "nanovllm_jax.__main__" in IMPORTS[name]]


def test_nothing_touches_the_path_of_imports():
    touched = [
        f"{name}:{node.lineno}"
        for name, tree in EVERYTHING.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (node.attr, getattr(node.value, "id", None)) == ("path", "sys")
    ]
    assert not touched


def test_the_library_needs_no_torch():
    torch = {"torch", "torchvision", "vllm"}
    runtime = [name for name in LIBRARY if not inside(name, "nanovllm_jax.tools")]
    assert not [n for n in runtime if torch & {i.partition(".")[0] for i in IMPORTS[n]}]


def test_the_library_prints_nothing():
    """It logs; only what runs as a command prints."""
    commands = ("nanovllm_jax.cli", "nanovllm_jax.tools")
    printing = [
        f"{name}:{node.lineno}"
        for name, tree in LIBRARY.items()
        if not any(inside(name, part) for part in commands)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
    ]
    assert not printing
