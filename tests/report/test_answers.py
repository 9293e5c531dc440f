"""report/answers.py: expected and given calls, difference by difference."""
from report.answers import compare_calls

ROME = {"name": "get_weather", "arguments": {"city": "Rome", "day": "today"}}


def test_arguments_are_compared_one_by_one():
    given = {"name": "get_weather", "arguments": {"city": "Rom", "year": 7}}
    wanted, found = compare_calls([ROME], {"given": [given]})
    assert '≠</i>city: <mark class="wanted">&quot;Rome&quot;' in wanted
    assert '+</i>day: <mark class="wanted">&quot;today&quot;' in wanted
    assert '≠</i>city: <mark class="given">&quot;Rom&quot;' in found
    assert '−</i>day: <mark class="given">absent' in found
    assert '+</i>year: <mark class="given">7' in found and "year" not in wanted
    both = "".join(compare_calls([ROME, given], {"given": [given, ROME]}))
    assert "<mark" not in both, "each call is compared with the one most like it"
    wanted, found = compare_calls([ROME, given], {"given": [ROME]})
    assert wanted.count("<mark") == 1 and "no call of get_weather" in found
    wanted, found = compare_calls([], {"given": [ROME]})
    assert "no call" in wanted and '<mark class="given">+ <b>get_weather' in found
    assert "no call: &lt;b&gt;" in compare_calls([ROME], {"given": [], "text": "<b>"})[1]
