"""The house's order: nouns are imported, verbs are run; what stands left never imports what stands right."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = (("hub", "triton_support"), ("cpu_kernels",), ("geglu_kernels",),
         ("attention_kernels", "lora_kernels", "loss_kernels", "norm_kernels", "tokenizer"), ("model",),
         ("lora", "data"), ("gradients",), ("checkpoint", "cuda_graph", "survey"),
         ("generate", "report", "token_cache"), ("evaluate", "export"), ("train", "demo"))
RUN_TIME = {"torch", "triton", "sentencepiece", "safetensors", "numpy", "huggingface_hub"}


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


def test_no_file_imports_one_that_stands_to_its_right():
    rank = {name: i for i, group in enumerate(ORDER) for name in group}
    for path in ROOT.glob("*.py"):
        assert path.stem in rank, f"{path.name} has no place in the order"
        for name in imports(path) & set(rank):
            assert rank[name] < rank[path.stem], f"{path.name} imports {name}"


def test_run_time_files_import_six_packages_and_the_standard_library_alone():
    import sys
    own = {path.stem for path in ROOT.glob("*.py")} | {"tokenizer"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tokenizer/*.py")]:
        foreign = imports(path) - own - RUN_TIME - set(sys.stdlib_module_names)
        assert not foreign, f"{path.name} imports {foreign}"


def test_the_tokenizer_needs_no_torch():
    for path in ROOT.glob("tokenizer/*.py"):
        assert "torch" not in imports(path), path.name


def test_nothing_is_pickled():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tokenizer/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in imports(path) and "torch.save(" not in text and "torch.load(" not in text, path.name
