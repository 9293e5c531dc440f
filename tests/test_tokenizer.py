"""tokenizer/model_file.py and tokenizer/bpe.py give the ids that sentencepiece and Hugging Face give.

    pytest tests/test_tokenizer.py      # what needs ../shared or the real vocabulary is skipped where they are absent
"""
import json
import random
import re

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from tokenizer import Control, Segment, Tokenizer, render_segments
from tokenizer.bpe import HTML_TAGS, IdCache
from tokenizer.model_file import CONTROL, USER_DEFINED, control_names, read_model_file, train_model_file

FRAGMENTS = (
    " ", "  ", " " * 31, " " * 32, " " * 33, "▁", "\t", "\t\t", "\n", "\n\n", "\n" * 32, "\r\n", "\x00", "\x1b[",
    ")\x1b[", "<", ">", "</", "> </", ">▁</", "><", "<b>", "</b>", "<table>", "<table", "table>", "<<h1>>", "[multi",
    "<0x41>", "0", "7", "2024", "1.5", "a", "b", "the", " the", "The", " hello", "'s", "_", ".com", "http://",
    '{"', '":', "==", "é", "e\u0301", "ß", "“", "”", "。", "²", "½", "১২", "中文", "한국", "👨‍👩‍👧", "\u200d", "\ufeff",
    "\u3000", "\xa0", "\u2028", "\u0378", "\U0010ffff")
CONTROL_FRAGMENTS = (
    "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<unused7>", "<unused60>", "<escape>", "<start_of_turn>",
    "<end_of_turn>", "<start_function_call>", "<end_function_call>", "<<bos>>", "<bos", "< escape>", "<esc<escape>ape>")
fragments = st.sampled_from(FRAGMENTS) | st.text(max_size=3)
texts = st.text(max_size=40) | st.lists(fragments, max_size=14).map("".join)
texts_with_names = st.lists(st.sampled_from(FRAGMENTS + 4 * CONTROL_FRAGMENTS), max_size=12).map("".join)
fuzz = settings(max_examples=400, deadline=None)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a vocabulary of 540 pieces, trained on made-up text."""
    chance = random.Random(0)
    words = ["the", "weather", "in", "get_weather", "Paris,", "café", "Zürich.", "price:", "<b>", "</b>", "(x)", "x==y",
             "  ", "\n", "12", "3.5", "\"name\":", "{", "}", "naïve", "“so”", "don't", "中文", "über", "\t"]
    folder = tmp_path_factory.mktemp("small")
    train_model_file([" ".join(chance.choices(words, k=12)) for _ in range(300)], folder, 540)
    return folder


@pytest.fixture(scope="module")
def ours(small):
    return Tokenizer.load(small)


@pytest.fixture(scope="module")
def theirs(small):
    return sentencepiece_in(small)


@pytest.fixture(scope="module")
def real_ours(real_model):
    return Tokenizer.load(real_model)


@pytest.fixture(scope="module")
def real_theirs(real_model):
    return sentencepiece_in(real_model)


def as_protobuf(data: bytes):
    return sentencepiece_model_pb2.ModelProto.FromString(data)


def sentencepiece_in(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def changed(small, tmp_path, change):
    """A folder with the small vocabulary alone, after change(ModelProto)."""
    model = as_protobuf((small / "tokenizer.model").read_bytes())
    change(model)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    return tmp_path


# ---- the same ids --------------------------------------------------------------------------------------------------

def test_all_golden_texts_get_the_published_ids(shared, real_ours):
    rows = [json.loads(line) for line in (shared / "golden/tokens.jsonl").open(encoding="utf-8")]
    assert len(rows) == 795
    for row in rows:
        assert real_ours.encode(row["text"], control=True) == row["ids"], row["text"]
        if row["kind"] == "plain":
            assert real_ours.encode(row["text"]) == row["ids"], row["text"]


@fuzz
@given(text=texts)
def test_ids_equal_sentencepieces(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text)


@fuzz
@given(text=texts.filter(lambda text: "▁▁" not in text))
def test_ids_equal_sentencepieces_in_the_real_vocabulary(real_ours, real_theirs, text):
    assert real_ours.encode(text) == real_theirs.encode(text)


def test_ids_equal_sentencepieces_on_real_rows(shared, real_ours, real_theirs):
    for name in ("seal", "sgd", "snips", "toolrl"):
        with (shared / f"data/{name}.jsonl").open(encoding="utf-8") as lines:
            for _, line in zip(range(60), lines, strict=False):
                for text in (line, *map(str, json.loads(line).values())):
                    assert real_ours.encode(text) == real_theirs.encode(text)


@fuzz
@given(text=texts_with_names | texts)
def test_ids_equal_hugging_faces_control_tokens_and_typed_spaces_included(real_model, real_ours, hugging_face, text):
    assert real_ours.encode(text, control=True) == hugging_face.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def hugging_face(real_model):
    path = real_model / "tokenizer.json"
    if not path.exists():
        pytest.skip(f"SKIPPED: no {path}")
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(path))


@pytest.mark.parametrize("extra", [
    ["e▁", "▁th▁", "r▁i", "▁in▁t", "12", "3.", ".5", "a1", "e.", "e,"],
    [a + b + c for a in "etainr" for b in "▁." for c in "▁abc."],
], ids=["some pieces cross a space", "too many do"])
def test_pieces_that_cross_our_cuts_are_still_found(small, tmp_path, extra):
    def change(model):
        there = {piece.piece for piece in model.pieces}
        for n, piece in enumerate(piece for piece in extra if piece not in there):
            model.pieces.add(piece=piece, score=-3.5 * n)

    folder = changed(small, tmp_path, change)
    ours, theirs = Tokenizer.load(folder), sentencepiece_in(folder)
    assert ours.crossing and (ours.crossing == [""]) == (len(extra) > 32)
    chance = random.Random(1)
    parts = ["e", "t", "r ", " th ", " in", ".", ",", "1", "12", "3.5", " ", "  ", "a", "\n", "é", "<b>"]
    for _ in range(2000):
        text = "".join(chance.choices(parts, k=9))
        assert ours.encode(text) == theirs.encode(text), text


def test_of_equal_scores_the_leftmost_is_merged(small, tmp_path):
    def change(model):
        for piece in model.pieces:
            piece.score = 0.0 if piece.type == 1 else piece.score

    folder = changed(small, tmp_path, change)
    ours, theirs = Tokenizer.load(folder), sentencepiece_in(folder)
    chance = random.Random(2)
    for _ in range(500):
        text = "".join(chance.choices("wheaterin ", k=30))
        assert ours.encode(text) == theirs.encode(text), text


def test_a_long_text_without_spaces_takes_no_quadratic_time(ours, theirs):
    text = "weather" * 15_000       # 105,000 characters: half a second here, an hour if each merge looked at all others
    assert ours.encode(text) == theirs.encode(text)


def test_a_full_cache_changes_nothing(ours, monkeypatch):
    chance = random.Random(3)
    lines = [" ".join(chance.choices(FRAGMENTS, k=5)) for _ in range(200)]
    wanted = [ours.encode(line) for line in lines]
    monkeypatch.setattr(IdCache, "MAX_TEXTS", 8)
    caches = ours.starts, ours.words, ours.chunks, ours.runs
    for cache in caches:
        cache.clear()
    assert [ours.encode(line) for line in lines] == wanted
    assert [ours.encode_segments([Segment(line, True)])[0] for line in lines] == wanted
    assert all(0 < len(cache) <= 8 for cache in caches)


# ---- control tokens ------------------------------------------------------------------------------------------------

def test_a_control_token_typed_by_a_user_is_text(real_ours):
    reserved = set(real_ours.control.values())
    assert reserved > {46, 52, 105, 106, 255_999, 262_144}
    for name in real_ours.control:
        text = f"{name}x{name} <{name}>\n{name}"
        ids = real_ours.encode(text)
        assert reserved.isdisjoint(ids) and real_ours.decode(ids) == text


@fuzz
@given(text=texts_with_names)
def test_no_text_gives_a_control_token(ours, text):
    assert not set(ours.encode(text)) & set(ours.control.values())


def test_no_text_gives_a_control_token_that_the_model_file_calls_user_defined(small, tmp_path):
    def change(model):
        for piece in model.pieces:
            if piece.type == CONTROL:
                piece.type = USER_DEFINED

    folder = changed(small, tmp_path, change)
    ours, theirs = Tokenizer.load(folder), sentencepiece_in(folder)
    assert theirs.encode("<escape>") == [52]        # what sentencepiece itself does with such a file
    assert 52 not in ours.encode("<escape>") and ours.encode("<escape>", control=True) == [52]
    for text in ("the weather", "<b>in</b>", "<escap", "12 <unused"):
        assert ours.encode(text) == theirs.encode(text)


def test_control_tokens_are_recognised_only_where_asked(ours):
    ids = [2, 105, *ours.encode("model"), 107, 106]
    assert ours.encode("<bos><start_of_turn>model\n<end_of_turn>", control=True) == ids
    assert ours.encode("<esc<escape>ape>", control=True) == [*ours.encode("<esc"), 52, *ours.encode("ape>")]
    assert ours.decode([2, 105, 107, 52]) == "<bos><start_of_turn>\n<escape>"


def test_names_come_from_tokenizer_config_before_tokenizer_model(small, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((small / "tokenizer.model").read_bytes())
    assert Tokenizer.load(tmp_path).control == Tokenizer.load(small).control     # without a config: the model file's
    added = {"46": {"content": "<renamed>"}, "168": {"content": "<b>"}, "540": {"content": "<new>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    ours = Tokenizer.load(tmp_path)
    assert ours.control["<renamed>"] == 46 and ours.control["<new>"] == 540 and "<b>" not in ours.control
    assert "<start_function_declaration>" not in ours.control
    assert ours.decode([46, 540]) == "<renamed><new>" and ours.vocab_size == 540


@pytest.mark.parametrize("config", [
    "{", "[]", '{"added_tokens_decoder": {"x": {"content": "<y>"}}}', '{"added_tokens_decoder": {"46": 1}}',
    '{"added_tokens_decoder": {"999": {"content": "<x>"}}}', '{"added_tokens_decoder": {"46": {"content": "<bos>"}}}',
    '{"added_tokens_decoder": {"46": {"content": "no brackets"}}}'])
def test_a_wrong_tokenizer_config_is_named(small, tmp_path, config):
    (tmp_path / "tokenizer.model").write_bytes((small / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: .*download both again"):
        Tokenizer.load(tmp_path)


def test_the_real_vocabulary_has_the_published_names(shared, real_ours):
    config = json.loads((shared / "real_model/tokenizer_config.json").read_text(encoding="utf-8"))
    ids = {token["content"]: int(i) for i, token in config["added_tokens_decoder"].items()}
    assert list(ids)[:107] == control_names()
    assert len(HTML_TAGS) == 70 and {ids[name] for name in HTML_TAGS} == set(range(168, 238))
    text = HTML_TAGS | {"[multimodal]"} | {name for name in ids if not name.strip("▁\n\t")}
    assert real_ours.control == {name: i for name, i in ids.items() if name not in text}
    assert (real_ours.vocab_size, len(real_ours.pieces)) == (262_144, 262_146)


# ---- segments ------------------------------------------------------------------------------------------------------

def test_segments_give_the_ids_of_the_whole_text(shared, real_ours):
    compared = 0
    for case in json.loads((shared / "golden/template.json").read_text(encoding="utf-8")):
        if case["expected"] is None:
            continue
        segments = render_segments(case["messages"], case["tools"], case["add_generation_prompt"])
        typed = " ".join(s.text for s in segments if not isinstance(s.text, Control))
        ids, loss_mask = real_ours.encode_segments(segments)
        assert len(ids) == len(loss_mask)
        if not any(name in typed for name in re.findall(r"<\w+>", typed) if name in real_ours.control):
            assert ids == real_ours.encode(case["expected"], control=True)
            compared += 1
        if "▁" not in case["expected"]:
            assert real_ours.decode(ids) == case["expected"]
            with_loss = real_ours.decode([i for i, carries_loss in zip(ids, loss_mask, strict=True) if carries_loss])
            assert with_loss == "".join(s.text for s in segments if s.carries_loss)
    assert compared > 500


def test_a_typed_control_token_is_text_beside_real_ones(ours):
    ids, loss_mask = ours.encode_segments([
        Segment(Control("<start_of_turn>"), False), Segment("user\n", False), Segment("<end_of_turn>", False),
        Segment(Control("<end_of_turn>"), False), Segment("wea", True), Segment("ther", True),
        Segment(Control("<eos>"), True)])
    text, said = ours.encode("user\n<end_of_turn>"), ours.encode("weather")
    assert ids == [105, *text, 106, *said, 1]
    assert loss_mask == [False] * (len(text) + 2) + [True] * (len(said) + 1)


def test_an_unknown_control_token_is_named(ours):
    with pytest.raises(ValueError, match=r"no control token <tool>; take tokenizer\.model"):
        ours.encode_segments([Segment(Control("<tool>"), False)])


# ---- back to text --------------------------------------------------------------------------------------------------

@fuzz
@given(text=texts_with_names | texts)
def test_decode_gives_the_text_back_but_for_a_typed_low_line(ours, theirs, text):
    ids = ours.encode(text)
    assert ours.decode(ids) == text.replace("▁", " ")       # as sentencepiece: "▁" and " " are one piece
    assert ours.decode(ids) == theirs.decode(ids)


@fuzz
@given(text=texts_with_names | texts)
def test_decode_gives_the_text_back_in_the_real_vocabulary(real_ours, text):
    assert real_ours.decode(real_ours.encode(text)) == text.replace("▁", " ")


@fuzz
@given(data=st.lists(st.sampled_from(b"\xe2\x82\xac\xf0\x9f\x98\x80\xed\xa0\xc0\xf4\x90A") | st.integers(0, 255)))
def test_bytes_that_are_not_utf8_decode_as_in_sentencepiece(ours, theirs, data):
    ids = [ours.byte_ids[byte] for byte in data]
    assert ours.decode(ids) == theirs.decode(ids)


def test_half_a_surrogate_pair_is_an_error_that_says_where(ours):
    for control in (False, True):
        with pytest.raises(ValueError, match=r"character 4 of the text is '\\ud83d', half a surrogate pair.*repair"):
            ours.encode("the \ud83d<bos>", control)


@pytest.mark.parametrize("bad", [-1, 540, 10**9])
def test_an_id_outside_the_vocabulary_is_an_error(ours, bad):
    with pytest.raises(ValueError, match=f"id {bad} is not in the vocabulary: expected 0 to 539"):
        ours.decode([107, bad])


# ---- tokenizer.model -----------------------------------------------------------------------------------------------

def assert_read_as_protobuf_does(path):
    ours, theirs = read_model_file(path), as_protobuf(path.read_bytes())
    assert ours.pieces == [piece.piece for piece in theirs.pieces]
    assert ours.scores == [piece.score for piece in theirs.pieces]
    assert ours.types == [piece.type for piece in theirs.pieces]
    spec = theirs.trainer_spec
    assert ours[3:] == (spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id)


def test_a_model_file_is_read_as_protobuf_reads_it(small):
    assert_read_as_protobuf_does(small / "tokenizer.model")


def test_the_real_model_file_is_read_as_protobuf_reads_it(real_model):
    assert_read_as_protobuf_does(real_model / "tokenizer.model")


def test_a_model_file_cut_anywhere_is_an_error_that_names_file_and_byte(small, tmp_path):
    data = (small / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    for size in [*range(0, len(data), 61), *range(len(data) - 60, len(data))]:
        path.write_bytes(data[:size])
        try:
            read_model_file(path)
        except ValueError as error:
            assert re.match(rf"{re.escape(str(path))}: byte \d+: .*; ", str(error)), error
        else:       # the last fields can go without loss
            assert_read_as_protobuf_does(path)
            assert size > len(data) - 60


def test_a_flipped_bit_is_an_error_or_is_read_as_protobuf_reads_it(small, tmp_path):
    data = (small / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    chance = random.Random(4)
    loaded = 0
    for _ in range(600):
        bad = bytearray(data)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        path.write_bytes(bad)
        try:
            ours = Tokenizer.load(tmp_path)
        except ValueError:
            continue
        assert_read_as_protobuf_does(path)
        assert ours.decode(ours.encode("the weather in 中文 <b>12</b>\n")) == "the weather in 中文 <b>12</b>\n"
        loaded += 1
    assert 50 < loaded < 550


@pytest.mark.parametrize("data, said", [
    (b"", "byte 0: the file ends without a trainer_spec"),
    (b"<!DOCTYPE html><html>", "byte 0: field 7 has wire type 4"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", "byte 0: field 14 has wire type 6"),
    (b"\x0a\xff\xff\xff\xff\x0f", "byte 0: field 1 claims 4294967295 bytes where 0 are left"),
    (b"\x0a\x06\x0a\x40abcd", "byte 2: field 1 claims 64 bytes where 4 are left"),
    (b"\x0a\x03\x0a\x01\xff", "byte 4: a piece's text, .* is not UTF-8"),
    (b"\xff" * 400, "byte 0: an integer runs past 10 bytes"),
    (b"\x00\x01", "byte 0: 0 is no field number"),
    (b"\x0a\x00", "byte 2: the file ends without"),
])
def test_a_lying_model_file_is_an_error(tmp_path, data, said):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=rf"tokenizer\.model: {said}.*; the file is damaged.*download it again"):
        Tokenizer.load(tmp_path)


def change_spec(spec, **values):
    def change(model):
        for name, value in values.items():
            setattr(getattr(model, spec), name, value)
    return change


def change_piece(index, **values):
    def change(model):
        for name, value in values.items():
            setattr(model.pieces[index], name, value)
    return change


@pytest.mark.parametrize("change, said", [
    (change_spec("trainer_spec", model_type=1), "model_type is UNIGRAM, expected BPE; this tokenizer reads"),
    (change_spec("trainer_spec", byte_fallback=False), "byte_fallback is off; this tokenizer reads"),
    (change_spec("trainer_spec", unk_id=7), r"unk_id is 7, but the unknown pieces are \[3\]"),
    (change_spec("normalizer_spec", add_dummy_prefix=True), "add_dummy_prefix is True, expected False; this tokenizer"),
    (change_spec("normalizer_spec", remove_extra_whitespaces=True), "remove_extra_whitespaces is True, expected False"),
    (change_spec("normalizer_spec", escape_whitespaces=False), "escape_whitespaces is False, expected True"),
    (change_spec("normalizer_spec", precompiled_charsmap=b"nfkc"), "normalizer_spec rewrites text.*expected identity"),
    (change_spec("denormalizer_spec", precompiled_charsmap=b"x"), "denormalizer_spec rewrites text"),
    (change_piece(400, type=5), "piece 400 is unused or of unknown type"),
    (change_piece(400, score=float("nan")), "a score is no finite number"),
    (change_piece(400, piece=""), "no piece, or an empty one"),
    (change_piece(400, piece="<bos>"), "piece '<bos>' occurs more than once"),
    (change_piece(200, type=1), "the byte pieces are not <0x00> to <0xFF>"),
])
def test_an_unsupported_model_file_is_an_error_that_says_what_is_wrong(small, tmp_path, change, said):
    with pytest.raises(ValueError, match=rf"tokenizer\.model: byte \d+: .*{said}"):
        Tokenizer.load(changed(small, tmp_path, change))


def test_a_trained_vocabulary_has_the_published_control_ids(ours):
    expected = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_function_declaration>": 46,
                "<end_function_declaration>": 47, "<start_function_call>": 48, "<end_function_call>": 49,
                "<start_function_response>": 50, "<end_function_response>": 51, "<escape>": 52, "<unused40>": 53,
                "<start_of_turn>": 105, "<end_of_turn>": 106}
    assert {name: ours.control[name] for name in expected} == expected
    assert ours.encode("\n") == [107] and ours.vocab_size == len(ours.pieces) == 540


def test_a_trained_vocabulary_is_the_same_every_time(small, tmp_path):
    lines = ["the weather in Paris is 12 degrees", "naïve café über alles {x: 1}"] * 40
    for name in ("a", "b"):
        train_model_file(lines, tmp_path / name, 400)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
