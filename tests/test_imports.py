"""Imports go one way, and no module imports what another calls private."""
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
ORDER = (
    ("ops",),
    ("tokenizer", "lora_kernels", "model"),
    ("lora",),
    ("storage",),
    ("dataset",),
    ("data",),
    ("inference",),
    ("training",),
    ("report",),
    ("generate", "evaluate", "export"),
    ("train", "examples"),
)
RANK = {module: rank for rank, group in enumerate(ORDER) for module in group}
RUN_TIME = {"torch", "triton", "sentencepiece", "safetensors", "numpy", "huggingface_hub"}
# Private names that are still read from outside: (the module that reads, the name).
KNOWN_PRIVATE: set[tuple[str, str]] = set()


def sources() -> dict[str, Path]:
    """{module: its file} of everything that runs, tests and benchmarks aside."""
    paths = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imported(path: Path) -> dict[str, str]:
    """{name in the file: what it stands for} of its imports, those inside functions too."""
    names = {}
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path.name}: a relative import"
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(name: str, modules: dict[str, Path]) -> str | None:
    """The module of ours that an imported name is or stands in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def top(module: str) -> str:
    """The package or the root's module that a module belongs to."""
    return module.partition(".")[0]


def imports() -> dict[str, set[str]]:
    """{module: the modules of ours that it imports}."""
    modules = sources()
    return {module: {module_of(name, modules) for name in imported(path).values()} - {None, module}
            for module, path in modules.items()}


def test_packages_and_modules_import_only_those_that_the_order_names_before_them():
    for module, targets in imports().items():
        assert top(module) in RANK, f"{module} has no place in ORDER"
        for target in targets:
            assert top(target) == top(module) or RANK[top(target)] < RANK[top(module)], f"{module} imports {target}"


def test_no_modules_of_a_package_import_each_other_in_a_circle():
    graph = imports()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"{' → '.join((*path, module))}"
        if module not in done:
            for target in graph[module] - set(PACKAGES):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_order_names_no_module_that_is_gone():
    assert set(RANK) <= {top(module) for module in sources()}


def test_no_module_reads_a_private_name_of_another():
    modules, found = sources(), set()
    for module, path in modules.items():
        names = imported(path)
        used = set(names.values())
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
                used.add(f"{names[node.value.id]}.{node.attr}")
        found |= {(module, name) for name in used if module_of(name, modules) and is_private(name.rpartition(".")[2])}
    assert not found - KNOWN_PRIVATE


def test_what_runs_imports_six_packages_and_the_standard_library_alone():
    modules = sources()
    for module, path in modules.items():
        foreign = {name.partition(".")[0] for name in imported(path).values() if not module_of(name, modules)}
        assert not foreign - RUN_TIME - set(sys.stdlib_module_names) - {"__future__"}, f"{module} imports {foreign}"


def test_the_tokenizer_needs_no_torch():
    for path in ROOT.glob("tokenizer/*.py"):
        assert not any(name.partition(".")[0] == "torch" for name in imported(path).values()), path.name


def test_nothing_is_pickled():
    for path in sources().values():
        text = path.read_text(encoding="utf-8")
        assert not any(name.partition(".")[0] == "pickle" for name in imported(path).values()), path.name
        assert "torch.save(" not in text and "torch.load(" not in text, path.name
