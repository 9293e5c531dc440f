"""docs/walkthrough.md is what docs/walkthrough.py writes."""
import subprocess
import sys

from conftest import ROOT


def test_the_walkthrough_is_what_the_code_computes(tmp_path):
    page = tmp_path / "walkthrough.md"
    subprocess.run([sys.executable, ROOT / "docs" / "walkthrough.py", page], check=True, timeout=120)
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
