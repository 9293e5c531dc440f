"""report/page.py and its style sheet."""
import re

from report.page import STYLE


def test_every_colour_is_defined_for_light_and_for_dark():
    style = STYLE.read_text(encoding="utf-8")
    light, _, dark = style.partition("@media screen and (prefers-color-scheme: dark)")
    light, dark = (set(re.findall(r"--([a-z-]+): #", part)) for part in (light, dark))
    assert light == dark and set(re.findall(r"var\(--([a-z-]+)\)", style)) <= light | {"tone"}
    assert not re.findall(r"#[0-9a-f]{3,6}", style.partition("* {")[2])
