"""The README says what the files say."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_the_ones_the_results_give(monkeypatch):
    """Lines of code change with every commit; they may be off by a tenth."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")                   # for this test alone: lora.py and data.py there are others
    from tables import PAGES, rewrite, tables
    current = tables()
    files = current.pop("files")
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        assert current and rewrite(page, current) == page, path.name
    stated = re.findall(r"\| \[([\w./]+)\]\(\w[^|]* \| ([\d,]+) \|", README)
    counted = re.findall(r"\| \[([\w./]+)\]\(\w[^|]* \| ([\d,]+) \|", files)
    assert [name for name, _ in stated] == [name for name, _ in counted] and len(stated) > 8
    for (name, lines), (_, now) in zip(stated, counted, strict=True):
        lines, now = (int(number.replace(",", "")) for number in (lines, now))
        assert abs(lines - now) <= max(20, now / 10), f"{name}: python benchmarks/tables.py"


def test_the_first_screen_is_short():
    assert README.index("## Getting started") < 3_600
    assert README[:README.index("## Getting started")].count("\n") <= 50          # 40 without table marks and blank lines


def test_no_table_is_left_empty_and_no_placeholder_behind():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.findall(r"<!-- table (\w+) -->\n<!-- end -->", path.read_text(encoding="utf-8")), path.name
        assert not re.findall(r"\b[A-Z]+_TABLE\b|TODO|FIXME", path.read_text(encoding="utf-8")), path.name


def test_every_link_to_a_file_leads_somewhere():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_flag_the_readme_names_exists():
    text = "".join(subprocess.run([sys.executable, str(ROOT / name), "--help"], capture_output=True, text=True, check=True).stdout
                   for name in ("train.py", "generate.py", "evaluate.py", "export.py"))
    foreign = {"--nproc-per-node", "--max-restarts", "--parity", "--one-set"}
    pages = README + (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", pages)) - foreign:
        assert flag in text, flag
