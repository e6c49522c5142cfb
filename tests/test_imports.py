"""Imports run one way: no module imports from a layer above its own."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "glm_jax.allocator": 0,
    "glm_jax.compiler_settings": 0,
    "glm_jax.errors": 0,
    "glm_jax.numerics": 0,
    "glm_jax.progress": 0,
    "glm_jax.config": 1,
    "glm_jax.processes": 1,
    "glm_jax.supervision": 1,
    "glm_jax.files": 2,
    "glm_jax.text_files": 2,
    "glm_jax.sharding": 2,
    "glm_jax.quantization": 2,
    "glm_jax.kernels": 3,
    "glm_jax.tokenizer": 3,
    "glm_jax.model": 4,
    "glm_jax.checkpoints": 5,
    "glm_jax.data": 5,
    "glm_jax.engine": 5,
    "glm_jax.generation": 6,
    "glm_jax.training": 6,
    "glm_jax.cli": 6,
    "glm_jax.jobs": 7,
    "glm_jax.serving": 7,
    "glm_jax.evaluation": 8,
    "glm_jax.planning": 8,
    "configs": 8,
    "convert": 8,
    "launch": 9,
}
# Where a number would let pass what must stay apart: what each never reaches, directly or not.
WALLS = {
    "glm_jax.kernels": ("glm_jax.checkpoints",),
    "glm_jax.model": ("glm_jax.checkpoints", "orbax", "tensorstore"),
    "glm_jax.engine": ("glm_jax.checkpoints", "glm_jax.data", "glm_jax.generation"),
    "glm_jax.checkpoints": ("glm_jax.data", "glm_jax.engine"),
    "glm_jax.data": ("glm_jax.checkpoints", "glm_jax.model"),
    "glm_jax.training": ("glm_jax.engine", "glm_jax.generation"),
    "glm_jax.planning": ("glm_jax.evaluation", "glm_jax.generation", "glm_jax.jobs"),
    "glm_jax.serving": ("glm_jax.evaluation", "glm_jax.jobs", "glm_jax.training"),
}
FILES = sorted(
    path
    for top in ("glm_jax", "convert", "launch", "configs")
    for path in (ROOT / top).rglob("*.py")
)


def _layer(module: str) -> str | None:
    matches = [name for name in LAYERS if module == name or module.startswith(name + ".")]
    return max(matches, key=len) if matches else None


def _imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module == "glm_jax":
        return  # the public interface imports what it exports
    own = _layer(module)
    assert own is not None, f"{module} has no place in the architecture"
    for imported in _imported(path):
        other = _layer(imported)
        if other is None or other == own:
            continue
        assert LAYERS[other] <= LAYERS[own], f"{module} imports {imported}"


@pytest.fixture(scope="module")
def reached():
    """What each module of the project imports, itself or through others."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
    }

    def whole(name):  # of the module itself: `from package import name` may be either
        return name if name in names else name.rpartition(".")[0]

    direct = {name: {whole(x) for x in _imported(path)} - {""} for name, path in names.items()}

    @functools.cache
    def below(name):
        todo, seen = [name], set()
        while todo:
            for other in direct.get(todo.pop(), set()) - seen:
                seen.add(other)
                todo.append(other)
        return seen

    return below


@pytest.mark.parametrize("package", WALLS)
def test_walls_are_whole(package, reached):
    """`glm_jax` itself, which imports what it exports, is none of these modules' imports."""
    folder = ROOT.joinpath(*package.split("."))
    modules = [
        package + "." + ".".join(p.relative_to(folder).with_suffix("").parts)
        for p in folder.rglob("*.py")
    ]
    assert modules
    for module in modules:
        for other in reached(module.removesuffix(".__init__")):
            assert not any(other == x or other.startswith(x + ".") for x in WALLS[package]), (
                f"{module} reaches {other}"
            )


def test_one_place_asks_whether_there_is_a_mesh():
    """Without a mesh JAX's is empty and of size 0 or 1, by its version: `sharding` knows."""
    question = re.compile(r"mesh\(?\)?\.(empty\b|size\s*(==|!=|<|>))")
    for path in FILES:
        if path.name != "sharding.py":
            assert not question.search(path.read_text()), path


def test_torch_is_imported_by_tests_and_benchmarks_alone():
    for path in FILES:
        if path.parent.name == "suites":
            continue
        assert not any(m.split(".")[0] == "torch" for m in _imported(path)), path


def test_public_interface_is_documented():
    import glm_jax

    for name in glm_jax.__all__:
        assert getattr(glm_jax, name).__doc__, name
