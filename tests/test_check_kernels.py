"""tests/check_kernels.py: which spills are wrong."""
import pytest
from conftest import ROOT, load

from ops import triton_utils

pytestmark = pytest.mark.skipif(triton_utils.triton is None, reason="no Triton for this platform")


@pytest.fixture(scope="module")
def gate():
    return load(ROOT / "tests" / "check_kernels.py", "check_kernels")


def compiled(gate, launch, spilled):
    return {"launch": launch, "what": "o bfloat16", "kernel": "lora_forward", "card": "sm_90", "spilled": spilled,
            "too_large": False, "tensor_cores": "wgmma", "narrow_reads": 0, "narrowest_read": 16}


def test_a_spill_is_excused_only_where_another_configuration_of_the_launch_has_none(gate):
    avoidable, sound, only = (compiled(gate, *of) for of in (("o", 8), ("o", 0), ("down", 8)))
    assert [gate.wrong(made) for made in (avoidable, sound, only)] == ["8 bytes spilled", "", "8 bytes spilled"]
    assert gate.excuse_spills([avoidable, sound, only]) == [avoidable]
    assert [gate.wrong(made) for made in (avoidable, sound, only)] == ["", "", "8 bytes spilled"]
    assert gate.wrong(avoidable | {"too_large": True}) == "too much shared memory"      # nothing else is excused


def test_a_known_spill_is_excused_for_its_version_up_to_its_bytes(gate, monkeypatch):
    monkeypatch.setattr(gate, "KNOWN_SPILLS", {("3.6.0", "lora_forward", "sm_90"): 8})
    for version, spilled, excused in (("3.6.0", 8, True), ("3.6.0", 16, False), ("3.6.1", 8, False)):
        monkeypatch.setattr(gate.triton, "__version__", version)
        made = compiled(gate, "o", spilled)
        assert gate.excuse_spills([made]) == ([made] if excused else [])
        assert gate.wrong(made) == ("" if excused else f"{spilled} bytes spilled")


@pytest.mark.parametrize(("version", "spills", "code"), [
    ("pinned", (0, 0), 0), ("pinned", (8, 0), 1), ("3.6.0", (8, 0), 0), ("3.6.0", (8, 8), 1)])
def test_the_pinned_triton_may_not_spill_at_all(gate, version, spills, code, monkeypatch, capsys, tmp_path):
    version = gate.pinned_triton() if version == "pinned" else version
    monkeypatch.setattr(gate.triton, "__version__", version)
    monkeypatch.setattr(gate, "jobs", lambda: list(spills))
    monkeypatch.setattr(gate, "compile_one", lambda spilled: compiled(gate, "o", spilled) | {
        "config": str(spilled), "registers": 255, "shared_kib": 1, "programs": 2})
    monkeypatch.setattr(gate, "ProcessPoolExecutor", lambda *_, **__: InThisProcess())
    monkeypatch.setattr(gate, "stamp", lambda: tmp_path / "gate" / "stamp")
    assert gate.main(everything=False, files=[]) == code
    wrong = sum(map(bool, spills)) if code else 0
    assert f"triton {version}: 2 configurations compiled, {wrong} wrong" in capsys.readouterr().out


def test_kernels_that_passed_are_compiled_again_only_when_they_change(gate, monkeypatch, capsys, tmp_path):
    spills, stamp = [0], tmp_path / "stamp"
    monkeypatch.setattr(gate, "jobs", lambda: [("o", "ops.attention", spilled) for spilled in spills])
    monkeypatch.setattr(gate, "compile_one", lambda job: compiled(gate, "o", job[2]) | {
        "config": str(job[2]), "registers": 255, "shared_kib": 1, "programs": 2})
    monkeypatch.setattr(gate, "ProcessPoolExecutor", lambda *_, **__: InThisProcess())
    monkeypatch.setattr(gate, "stamp", lambda: stamp)
    assert gate.main(everything=False, files=["attention"]) == 0 and not stamp.exists()          # a part is not all
    assert gate.main(everything=False, files=[]) == 0 and stamp.exists()
    spills[:] = [8]
    capsys.readouterr()
    assert gate.main(everything=False, files=[]) == 0 and "unchanged since then" in capsys.readouterr().out
    assert gate.main(everything=True, files=[]) == 1
    stamp.unlink()
    assert gate.main(everything=False, files=[]) == 1 and not stamp.exists()


def test_the_stamp_depends_on_the_kernels_and_on_triton(gate, monkeypatch):
    before = gate.stamp()
    assert gate.stamp() == before
    monkeypatch.setattr(gate.triton, "__version__", "0.0")
    assert gate.stamp() != before


class InThisProcess:
    map = staticmethod(map)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
