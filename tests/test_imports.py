"""Imports go one way: a module or package imports only what ORDER names before it."""
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    ("hub", "triton_support"),
    ("cpu_kernels",),
    ("geglu_kernels",),
    ("attention_kernels", "lora_kernels", "loss_kernels", "norm_kernels", "tokenizer"),
    ("model",),
    ("lora", "data", "gradients"),
    ("checkpoint", "cuda_graph", "survey"),
    ("inference",),
    ("generate", "report", "token_cache"),
    ("evaluate", "export"),
    ("train", "examples"),
)
RUN_TIME = {"torch", "triton", "sentencepiece", "safetensors", "numpy", "huggingface_hub"}
PACKAGES = [path.parent for path in ROOT.glob("*/__init__.py")]
FILES = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in package.rglob("*.py"))]


def name_of(path: Path) -> str:
    """The module at the root, or the package at the root that holds the file."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


def test_no_file_imports_one_that_stands_to_its_right():
    rank = {name: i for i, group in enumerate(ORDER) for name in group}
    for path in FILES:
        name = name_of(path)
        assert name in rank, f"{path.relative_to(ROOT)} has no place in the order"
        for imported in (imports(path) & set(rank)) - {name}:
            assert rank[imported] < rank[name], f"{path.relative_to(ROOT)} imports {imported}"


def test_run_time_files_import_six_packages_and_the_standard_library_alone():
    own = {name_of(path) for path in FILES}
    for path in FILES:
        foreign = imports(path) - own - RUN_TIME - set(sys.stdlib_module_names)
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_the_tokenizer_and_the_scores_need_no_torch():
    for path in [*ROOT.glob("tokenizer/*.py"), ROOT / "inference/scoring.py"]:
        assert "torch" not in imports(path), path.name


def test_nothing_is_pickled():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in imports(path) and "torch.save(" not in text and "torch.load(" not in text, path.name


def test_no_module_imports_a_private_name_of_another():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            private = [name for name in names if name.startswith("_") and not name.endswith("__")]
            assert not private, f"{path.relative_to(ROOT)} imports {', '.join(private)} of {node.module}"
