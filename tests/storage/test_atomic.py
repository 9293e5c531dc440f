"""storage/atomic.py: whole or not at all, whatever happens while it writes."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from storage.atomic import atomic_file, atomic_folder


def test_a_file_keeps_its_old_content_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with atomic_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a" / "folder") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path / "a") == []


def test_reading_json_imports_neither_torch_nor_the_model():
    program = "import sys, storage.atomic; print(sorted({'torch', 'model', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"
