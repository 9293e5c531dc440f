"""The README says what the files say."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_the_ones_the_results_give(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")                   # for this test alone: lora.py and data.py there are others
    from tables import PAGES, rewrite, tables
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        assert tables() and rewrite(page, tables()) == page, path.name


def test_every_file_at_the_root_and_of_storage_and_training_is_in_the_file_map():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("storage/*.py"), *ROOT.glob("training/*.py")]:
        name = path.relative_to(ROOT).as_posix()
        assert f"[{path.name}]({name})" in README or f"[{name}]({name})" in README or path.name == "__init__.py", name


def test_no_table_is_left_empty_and_no_placeholder_behind():
    assert not re.findall(r"<!-- table (\w+) -->\n<!-- end -->", README)
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.findall(r"\b[A-Z]+_TABLE\b|TODO|FIXME", path.read_text(encoding="utf-8")), path.name


def test_every_link_to_a_file_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_flag_the_readme_names_exists():
    text = "".join(subprocess.run([sys.executable, str(ROOT / name), "--help"], capture_output=True, text=True, check=True).stdout
                   for name in ("train.py", "generate.py", "evaluate.py", "export.py"))
    foreign = {"--nproc-per-node", "--max-restarts", "--parity", "--one-set"}
    for flag in set(re.findall(r"--[a-z][a-z-]+", README)) - foreign:
        assert flag in text, flag
