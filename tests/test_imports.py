"""The house's order: nouns are imported, verbs are run; what stands left never imports what stands right."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = (("hub", "triton_support"), ("cpu_kernels",), ("geglu_kernels",), ("attention_kernels", "lora_kernels", "loss_kernels", "norm_kernels", "tokenizer"), ("model",), ("lora", "gradients"),
         ("checkpoint",), ("dataset",), ("data",), ("cuda_graph",), ("generate", "report"), ("evaluate", "export"), ("train", "demo"))
# Inside dataset/, in the same way.
DATASET_ORDER = ("errors", "files", "tools", "rows", "examples", "prefix_sharing", "sampler", "token_dataset", "stats", "token_cache")
RUN_TIME = {"torch", "triton", "sentencepiece", "safetensors", "numpy", "huggingface_hub"}


def modules(path: Path) -> set[str]:
    """What a file imports: modules, and the names out of them, which may be modules too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imports(path: Path) -> set[str]:
    """The packages and the modules of the root that a file imports."""
    return {name.partition(".")[0] for name in modules(path)}


def test_no_file_imports_one_that_stands_to_its_right():
    rank = {name: i for i, group in enumerate(ORDER) for name in group}
    for path in ROOT.glob("*.py"):
        assert path.stem in rank, f"{path.name} has no place in the order"
        for name in imports(path) & set(rank):
            assert rank[name] < rank[path.stem], f"{path.name} imports {name}"


def test_a_folder_stands_where_its_name_does():
    rank = {name: i for i, group in enumerate(ORDER) for name in group}
    for folder in ("dataset", "tokenizer"):
        for path in ROOT.glob(f"{folder}/*.py"):
            for name in (imports(path) & set(rank)) - {folder}:
                assert rank[name] < rank[folder], f"{folder}/{path.name} imports {name}"


def test_no_file_of_the_dataset_imports_one_that_stands_to_its_right():
    rank = {f"dataset.{name}": i for i, name in enumerate(DATASET_ORDER)}
    assert {path.stem for path in ROOT.glob("dataset/*.py")} - {"__init__"} == set(DATASET_ORDER)
    for path in ROOT.glob("dataset/*.py"):
        if path.stem != "__init__":
            for name in modules(path) & set(rank):
                assert rank[name] < rank[f"dataset.{path.stem}"], f"dataset/{path.name} imports {name}"


def test_no_file_of_the_dataset_imports_another_s_private_names():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("dataset/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dataset"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path.name} imports {private} from {node.module}"


def test_run_time_files_import_six_packages_and_the_standard_library_alone():
    import sys
    own = {path.stem for path in ROOT.glob("*.py")} | {"tokenizer", "dataset"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tokenizer/*.py"), *ROOT.glob("dataset/*.py")]:
        foreign = imports(path) - own - RUN_TIME - set(sys.stdlib_module_names)
        assert not foreign, f"{path.name} imports {foreign}"


def test_the_tokenizer_needs_no_torch():
    for path in ROOT.glob("tokenizer/*.py"):
        assert "torch" not in imports(path), path.name


def test_nothing_is_pickled():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tokenizer/*.py"), *ROOT.glob("dataset/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in imports(path) and "torch.save(" not in text and "torch.load(" not in text, path.name
