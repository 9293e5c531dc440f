"""inference/scoring.py: what counts as a right call, why an answer is none, and the figures over many."""
import math

import pytest
from sample_rows import BOOKING_TOOLS as TOOLS
from sample_rows import call

from dataset.rows import parse_row
from inference.scoring import (
    CAUSES,
    accepted_values,
    bootstrap_interval,
    results_table,
    score,
    summarize,
    value_matches,
)
from tokenizer import parse_calls, render


def judged(wanted, given, unread=()):
    return score([accepted_values(w) if "arguments" in w else w for w in wanted], given, TOOLS, unread)


@pytest.mark.parametrize(("wanted", "given", "exact", "ast"), [
    (call(city="Rome"), call(city="Rome"), True, True),
    (call(city="New York"), call(city="new-york"), False, True),               # case, space, punctuation
    (call(city="it's"), call(city='it"s'), False, True),
    (call(city="Rome"), call(city="Rom"), False, False),
    (call(city="a", price=5), call(city="a", price=5.0), False, True),         # an int and a declared float
    (call(city="a", price=5.0), call(city="a", price=5), False, True),
    (call(city="a", nights=5), call(city="a", nights=5.0), False, False),      # but not the other way round
    (call(city="a", nights=5), call(city="a", nights="5"), False, False),
    (call(city="a", nights="5"), call(city="a", nights="5"), True, True),      # a row that breaks its own declaration
    (call(city="a", pets=True), call(city="a", pets=1), False, False),
    (call(city="a", nights=1), call(city="a", nights=True), False, False),
    (call(city="a", pets=True), call(city="a", pets=True), True, True),
    (call(city="a", tags=["x", "y"]), call(city="a", tags=["X", "y"]), False, True),
    (call(city="a", tags=["x", "y"]), call(city="a", tags=["y", "x"]), False, False),
    (call(city="a", tags=["x"]), call(city="a", tags=["x", "x"]), False, False),
    (call(city="a", area=[1, 2.5]), call(city="a", area=[1.0, 2.5]), False, True),
    (call(city="a", guest={"name": "Bo", "age": 3}), call(city="a", guest={"age": 3.0, "name": "bo"}), False, True),
    (call(city="a", guest={"name": "Bo"}), call(city="a", guest={"name": "Bo", "age": 1}), False, False),
    (call(city="a", guest={"name": "Bo", "age": 1}), call(city="a", guest={"name": "Bo"}), False, False),
    (call(city="a", guest={"name": "Bo"}), call(city="a", guest="Bo"), False, False),
    (call(city="a", nights=None), call(city="a", nights=None), True, True),
    (call(city="a", undeclared=1), call(city="a", undeclared=1), True, True),
    (call(city=""), call(city=""), True, True),
    (call("cancel"), call("cancel"), True, True),
    (call("cancel"), call("Cancel"), False, False),                            # a name is a name
    (call(city="a", price=10 ** 400), call(city="a", price=10 ** 400), True, True),
    (call(city="a", price=1e20), call(city="a", price=1e20), True, True),
    (call(city="a", price=0.0), call(city="a", price=-0.0), True, True),
])
def test_a_call_is_right_by_the_letter_or_by_the_leaderboard_s_rules(wanted, given, exact, ast):
    got = judged([wanted], [given])
    assert (got.exact, got.ast) == (exact, ast)
    assert (got.fault is None) == ast


@pytest.mark.parametrize(("wanted", "given", "unread", "cause", "detail"), [
    ([call(city="Rome")], [], [], "no call", ""),
    ([call(city="Rome")], [], ["call at character 0: …"], "unparsable", "character 0"),
    ([call(city="Rome")], [call(city="Rome")], ["call at character 90: …"], "unparsable", "character 90"),
    ([call(city="Rome")], [call("cancel")], [], "wrong function", "cancel, wanted book"),
    ([call(city="Rome")], [call(nights=2)], [], "missing argument", "city"),
    ([call(city="Rome", nights=2)], [call(city="Rome")], [], "missing argument", "nights"),
    ([call(city="Rome")], [call(city="Rome", nights=2)], [], "extra argument", "nights is 2"),
    ([call(city="Rome")], [call(city="Rome", colour="red")], [], "extra argument", "colour"),
    ([call(city="Rome")], [call(city=3)], [], "wrong type", 'city is 3, wanted "Rome"'),
    ([call(city="Rome")], [call(city="Oslo")], [], "wrong argument", 'city is "Oslo", wanted "Rome"'),
    ([call(city="Rome")], [call(city="Rome")] * 2, [], "wrong count", "2 calls, wanted 1"),
    ([call(city="Rome")], [call(city="Rome")] * 2, ["call at character 90: …"], "wrong count", "2 calls, wanted 1"),
    ([], [call("cancel")], [], "unwanted call", "cancel"),
    ([], [], ["call at character 0: …"], "unparsable", "character 0"),
])
def test_every_miss_has_a_cause(wanted, given, unread, cause, detail):
    got = judged(wanted, given, unread)
    assert not got.ast and not got.exact and got.fault.cause == cause and detail in got.fault.detail
    assert cause in CAUSES


def test_parallel_calls_match_in_any_order_but_none_twice():
    a, b = call(city="Rome"), call(city="Oslo")
    assert judged([a, b], [b, a]).exact
    assert judged([a, a], [a, b]).fault.cause == "wrong argument"
    assert judged([a, b, a], [a, a, b]).exact


def test_pairs_are_found_where_taking_the_first_that_fits_fails():
    loose, strict = {"book": {"city": ["Rome", "Oslo"]}}, {"book": {"city": ["Rome"]}}
    assert judged([loose, strict], [call(city="Rome"), call(city="Oslo")]).exact


def test_several_accepted_values_and_arguments_that_may_be_left_out():
    truth = {"book": {"city": ["New York", "NYC"], "nights": [2, ""], "guest": [{"name": ["Bo", "Bob"], "age": [3, ""]}, ""]}}
    for given, right in ((call(city="NYC"), True), (call(city="nyc", nights=2), True), (call(city="LA"), False), (call(nights=2), False),
                         (call(city="NYC", nights=3), False), (call(city="NYC", guest={"name": "Bob"}), True),
                         (call(city="NYC", guest={"name": "Al"}), False), (call(city="NYC", guest={"age": 3}), False)):
        assert judged([truth], [given]).ast == right, given


@pytest.mark.parametrize("given", ["", "-", "abc"])
def test_an_empty_text_among_other_values_says_only_that_it_may_be_left_out(given):
    truth = {"book": {"city": ["Rome"], "nights": [2, ""]}}
    got = judged([truth], [call(city="Rome", nights=given)])
    assert not got.ast and not got.exact and got.fault.cause == "wrong type"
    assert judged([{"book": {"city": ["Rome", ""]}}], [call(city="")]).ast         # among texts it is one of them


def test_recall_counts_an_optional_argument_where_it_was_given():
    with_optional = judged([{"book": {"city": ["Rome"], "nights": [2, ""]}}], [call(city="Rome", nights=2)])
    missing = judged([call(city="Rome")], [call()])
    got = summarize([with_optional, missing])
    assert got["argument_recall"] == 2 / 3 and got["argument_precision"] == 1.0


def test_a_required_argument_must_be_there_even_where_the_answer_does_not_ask_for_it():
    assert judged([{"book": {"city": ["Rome", ""]}}], [call()]).fault.cause == "missing argument"


def test_silence_is_right_where_no_call_is_wanted():
    assert judged([], []).exact and judged([], []).ast and judged([], []).names


def test_arguments_are_counted_call_by_call():
    got = judged([call(city="Rome", nights=2), call("cancel")], [call(city="Rome", nights=3, pets=True)])
    assert (got.correct_arguments, got.given_arguments, got.expected_arguments) == (1, 3, 2)
    assert not got.names


def test_types_in_capitals_are_the_same_types():
    parameters = {"type": "OBJECT", "properties": {"price": {"type": "NUMBER"}}, "required": ["price"]}
    row = parse_row({"query": "go", "tools": [{"function": {"name": "f", "parameters": parameters}}], "answers": [call("f", price=5)]}, "a:1")
    assert score([accepted_values(call("f", price=5.0))], [call("f", price=5)], row.tools).ast


def test_what_was_written_by_the_template_is_an_exact_match_when_read_back():
    """Whatever a row wants, saying just that is right."""
    for value in ("x", "", "É ü", 3, -1, 2.5, 1e20, -0.0, True, None, [], [1, [2]], {}, {"a": {"b": [None, False]}}, 10 ** 30):
        wanted = call("f", p=value)
        text = render([{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"function": wanted}]}])
        calls = parse_calls(text)
        assert score([accepted_values(wanted)], calls, [], calls.unread).exact, value


def test_hostile_declarations_are_no_crash():
    for parameters in ({}, {"properties": None}, {"properties": {"p": None}}, {"properties": {"p": {"type": ["string", "null"]}}},
                       {"properties": {"p": {"type": "array", "items": "string"}}}, {"required": "p"}, {"required": [["p"]]}, {"required": ["q"]}):
        tools = [{"function": {"name": "f", "parameters": parameters}}]
        assert score([accepted_values(call("f", p=["x"]))], [call("f", p=["x"])], tools).ast
    assert not value_matches({"a": [1]}, {"b": 1}, {"properties": 3}, exact=False)
    assert not value_matches(float("nan"), float("nan"), {}, exact=True)


# ---------------------------------------------------------------------------------------------------------------------
# Over many rows


def test_figures_over_rows_are_the_shares_counted_by_hand():
    scores = [judged([call(city="Rome")], [call(city="Rome")]), judged([call(city="Rome")], [call(city="rome")]),
              judged([call(city="Rome")], [call(city="Oslo")]), judged([call(city="Rome")], [], ["?"]), judged([], []), judged([], [call("cancel")])]
    got = summarize(scores)
    assert got["rows"] == 6 and got["counts"] == {"exact_match": 2, "ast_match": 3, "name_accuracy": 4}
    assert got["exact_match"] == 2 / 6 and got["ast_match"] == 3 / 6 and got["name_accuracy"] == 4 / 6
    assert got["parse_failures"] == 1 / 6 and got["no_call_rows"] == 2 and got["correct_silence"] == 1 / 2
    assert got["argument_precision"] == 2 / 3 and got["argument_recall"] == 2 / 4
    assert got["causes"] == {"unparsable": 1, "wrong argument": 1, "unwanted call": 1}
    assert "33.3%" in results_table({"all": got}) and "missed: wrong argument" in results_table({"all": got})


def test_the_interval_holds_the_share_and_shrinks_with_the_rows():
    few, many = bootstrap_interval([True] * 5 + [False] * 5), bootstrap_interval([True] * 500 + [False] * 500)
    assert few[0] < 0.5 < few[1] and many[0] < 0.5 < many[1]
    assert math.isclose(many[1] - many[0], 2 * 1.96 * 0.5 / math.sqrt(1000), rel_tol=0.1)
    assert bootstrap_interval([]) is None and bootstrap_interval([True] * 3) == [1.0, 1.0]


