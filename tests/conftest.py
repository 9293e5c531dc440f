"""Fixtures that several tests share. What is absent on a machine is skipped, and said so."""
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

CUDA = torch.cuda.is_available()
os.environ.setdefault("GLIBC_TUNABLES", "")        # train.py need not start itself again, as it does for a CPU's sake
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"         # before Triton's first import: its kernels then run on a CPU

from ops import triton_utils  # noqa: E402
from ops.compiled import has_compiler  # noqa: E402
from ops.cpu import build  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
INTERPRETED = pytest.mark.skipif(CUDA, reason="the kernels are interpreted where there is no CUDA device")
INTERPRETER = pytest.param("cpu", marks=INTERPRETED)
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="SKIPPED: no CUDA device")])
NEEDS_COMPILER = pytest.mark.skipif(not has_compiler(), reason="SKIPPED: no C++ compiler")
NEEDS_CPP = pytest.mark.skipif(build.library() is None, reason="SKIPPED: no g++, or a CPU without AVX512-BF16")
REAL_MODEL = Path(os.environ.get("REAL_MODEL", Path.home() / ".cache/nano-functiongemma/gemma-3-270m"))


def load(path: Path, name: str) -> ModuleType:
    """The module in a file that stands in no folder of modules."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchrun(processes: int, program: str, *arguments, **more) -> subprocess.CompletedProcess:
    """The end of a program of ours that torchrun started in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, ROOT / program, *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **more)


@pytest.fixture(scope="session", autouse=True)
def quick_tuning():
    """The autotuner times a configuration for two milliseconds, not forty: tests want right, not fast."""
    usual, triton_utils.TUNING_MS = triton_utils.TUNING_MS, (0.5, 1.5)
    yield
    triton_utils.TUNING_MS = usual


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden files and real rows, beside the checkout where the project is developed."""
    if not SHARED.is_dir():
        pytest.skip("SKIPPED: ../shared (golden files and real rows) is not here")
    return SHARED


@pytest.fixture(scope="session")
def real_model() -> Path:
    """A folder with the real Gemma 3 270M in the published layout."""
    if not (REAL_MODEL / "config.json").exists():
        pytest.skip(f"SKIPPED: no real weights in {REAL_MODEL} (set REAL_MODEL to a folder that has them)")
    return REAL_MODEL


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """The embedded demo, small: a random model of every branch, its vocabulary, and 600 rows."""
    from examples.demo import write_demo
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, rows=600)
    return folder


@pytest.fixture
def trained(demo) -> tuple:
    """A wrapped model and its optimizer after one step."""
    from lora import LoRAConfig, wrap
    from storage.pretrained import load_model
    model = load_model(demo / "model", torch.float32)
    wrap(model, LoRAConfig(rank=2), torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    model(torch.tensor([2, 105, 107]), torch.arange(3), torch.zeros(3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def poisoned():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def mutant_cpp(tmp_path, monkeypatch):
    """(a piece of ops/cpu/kernels.cpp, another): from now on it has the second in place of the first."""
    def make(sound, broken):
        source = (ROOT / "ops/cpu/kernels.cpp").read_text(encoding="utf-8")
        assert source.count(sound) == 1, sound
        path = tmp_path / "mutant.cpp"
        path.write_text(source.replace(sound, broken), encoding="utf-8")
        monkeypatch.setenv("NANO_FUNCTIONGEMMA_CACHE", str(tmp_path))
        library = build.compiled(path)
        monkeypatch.setattr(build, "library", lambda: library)
    return make


@pytest.fixture
def mutant(tmp_path, monkeypatch):
    """(a module, a piece of its source that stands there once, another) → the module with the one in place of the other."""
    def make(module, sound, broken):
        source = inspect.getsource(module)
        assert source.count(sound) == 1, sound
        path = tmp_path / "mutant.py"
        path.write_text(source.replace(sound, broken), encoding="utf-8")
        monkeypatch.setitem(sys.modules, name := f"{module.__name__}_mutant", None)         # and taken out again
        return load(path, name)
    return make
