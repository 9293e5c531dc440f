"""tokenizer.model: SentencePiece's vocabulary file, read byte by byte, and a small one trained for the demo.

The file is one protobuf message: a sequence of fields, each a key and a value. The key is a varint that holds
`number << 3 | wire`, and the wire type says how the value is written. A varint is an integer in groups of 7
bits, the lowest group first; the high bit is set on all bytes but the last.

    ModelProto   1: SentencePiece, once for each id, in order     2: TrainerSpec     3: NormalizerSpec
    SentencePiece   1: piece (UTF-8)     2: score (float32)     3: type (NORMAL if left out)

    0a 0d │ 0a 04 e2 96 81 61 │ 15 00 00 80 bf │ 18 01    field 1 of 13 bytes, a piece; in it
            1, 4 bytes: "▁a"    2: -1.0          3: NORMAL

Source: github.com/google/sentencepiece, sentencepiece_model.proto; protobuf.dev/programming-guides/encoding.
To see what a file holds: `read_model_file("FOLDER/tokenizer.model").pieces`.
"""
from __future__ import annotations

import io
import json
import math
import struct
from collections import Counter
from collections.abc import Iterable
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)    # types of a piece
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5                          # wire types
FLOAT32 = struct.Struct("<f")
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))

DAMAGED = "the file is damaged or is no tokenizer.model; download it again"
UNSUPPORTED = "this tokenizer reads Gemma's kind of model only: BPE with byte fallback on text that is left as it is"


class ModelFile(NamedTuple):
    """A vocabulary of V pieces; position is id."""

    pieces: list[str]       # (V,) all different, "▁" for a space
    scores: list[float]     # (V,) the merge with the highest score is made first
    types: list[int]        # (V,) NORMAL … BYTE
    unk_id: int
    bos_id: int             # -1 where the model has none; so too eos and pad
    eos_id: int
    pad_id: int


class _Invalid(Exception):
    """Arguments: byte offset, what is wrong there, remedy."""


def read_model_file(path: str | Path) -> ModelFile:
    """Read a tokenizer.model.  Raises ValueError with path and offset if it is damaged or unsupported."""
    try:
        return _parse(Path(path).read_bytes())
    except _Invalid as invalid:
        offset, what, remedy = invalid.args
        raise ValueError(f"{path}: byte {offset}: {what}; {remedy}") from None


def _parse(data: bytes) -> ModelFile:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    specs: dict[int, dict] = {2: {}, 3: {}, 5: {}}     # trainer, normalizer, denormalizer
    pos, end = 0, len(data)
    while pos < end:
        # Nearly all of the file is pieces as shown above, below 128 bytes. This branch only saves time.
        if end - pos > 256:
            tag, size, piece_tag, length = data[pos : pos + 4]
            stop, rest = pos + 4 + length, size - length - 7        # the piece's end; 2 bytes if there is a type
            if (tag == piece_tag == 0x0A and size < 128 and rest in (0, 2) and data[stop] == 0x15
                    and (rest == 0 or (data[stop + 5] == 0x18 and data[stop + 6] < 128))):
                pieces.append(_text(data, pos + 4, stop))
                scores.append(FLOAT32.unpack_from(data, stop + 1)[0])
                types.append(data[stop + 6] if rest else NORMAL)
                pos += 2 + size
                continue
        at, (number, wire), value, pos = pos, *_field(data, pos, end)
        if wire == BYTES and number == 1:
            fields = _message(data, *value)
            pieces.append(_text(data, *fields.get((1, BYTES), (at, at))))
            scores.append(FLOAT32.unpack_from(data, fields[2, FIXED32][0])[0] if (2, FIXED32) in fields else 0.0)
            types.append(fields.get((3, VARINT), NORMAL))
        elif wire == BYTES and number in specs:
            specs[number] |= _message(data, *value)
    _check_specs(*specs.values(), end)
    ids = [specs[2].get((number, VARINT), default) for number, default in ((40, 0), (41, 1), (42, 2), (43, -1))]
    model = ModelFile(pieces, scores, types, *((i + 2**31) % 2**32 - 2**31 for i in ids))     # from uint64 to int32
    _check_pieces(model, end)
    return model


def _varint(data: bytes, pos: int, end: int) -> tuple[int, int]:
    """-> (value, the position after it)"""
    value = 0
    for shift, at in zip(range(0, 70, 7), range(pos, end), strict=False):     # at most 10 bytes
        value |= (data[at] & 0x7F) << shift
        if data[at] < 0x80:
            return value & (1 << 64) - 1, at + 1
    raise _Invalid(pos, "an integer runs past 10 bytes or the end of its message", DAMAGED)


def _field(data: bytes, pos: int, end: int) -> tuple[tuple[int, int], int | tuple[int, int], int]:
    """-> ((number, wire type), integer or the span of any other value's bytes, the position after it)"""
    key, start = _varint(data, pos, end)
    number, wire = key >> 3, key & 7
    if not 0 < number < 1 << 29:
        raise _Invalid(pos, f"{number} is no field number", DAMAGED)
    if wire == VARINT:
        value, after = _varint(data, start, end)
        return (number, wire), value, after
    if wire == BYTES:
        size, start = _varint(data, start, end)
    elif wire in (FIXED64, FIXED32):
        size = 8 if wire == FIXED64 else 4
    else:
        what = f"field {number} has wire type {wire}, which no SentencePiece model uses"
        raise _Invalid(pos, what, DAMAGED)
    if size > end - start:
        raise _Invalid(pos, f"field {number} claims {size} bytes where {end - start} are left", DAMAGED)
    return (number, wire), (start, start + size), start + size


def _message(data: bytes, pos: int, end: int) -> dict[tuple[int, int], int | tuple[int, int]]:
    """All fields of a message by number and wire type; of a repeated one the last."""
    fields = {}
    while pos < end:
        key, value, pos = _field(data, pos, end)
        fields[key] = value
    return fields


def _text(data: bytes, start: int, stop: int) -> str:
    try:
        return data[start:stop].decode()
    except UnicodeDecodeError:
        raise _Invalid(start, f"a piece's text, {data[start:stop][:32]!r}, is not UTF-8", DAMAGED) from None


def _check_specs(trainer: dict, normalizer: dict, denormalizer: dict, end: int) -> None:
    if not trainer or not normalizer:
        raise _Invalid(end, "the file ends without a trainer_spec and a normalizer_spec", DAMAGED)
    model_type = trainer.get((3, VARINT), 1)
    if model_type != 2:
        names = {1: "UNIGRAM", 3: "WORD", 4: "CHAR"}
        raise _Invalid(end, f"model_type is {names.get(model_type, model_type)}, expected BPE", UNSUPPORTED)
    if not trainer.get((35, VARINT), False):
        raise _Invalid(end, "byte_fallback is off", UNSUPPORTED)
    for number, name, wanted in ((3, "add_dummy_prefix", False), (4, "remove_extra_whitespaces", False),
                                 (5, "escape_whitespaces", True)):
        if bool(normalizer.get((number, VARINT), True)) != wanted:
            raise _Invalid(end, f"normalizer_spec.{name} is {not wanted}, expected {wanted}", UNSUPPORTED)
    for spec, name in ((normalizer, "normalizer_spec"), (denormalizer, "denormalizer_spec")):
        start, stop = spec.get((2, BYTES), (0, 0))
        if start < stop:
            raise _Invalid(start, f"{name} rewrites text by a precompiled_charsmap, expected identity",
                           UNSUPPORTED)


def _check_pieces(model: ModelFile, end: int) -> None:
    pieces, scores, types = model[:3]
    if not pieces or "" in pieces:
        raise _Invalid(end, "there is no piece, or an empty one", DAMAGED)
    if len(set(pieces)) < len(pieces):
        piece = Counter(pieces).most_common(1)[0][0]
        raise _Invalid(end, f"piece {piece!r} occurs more than once", DAMAGED)
    if not all(map(math.isfinite, scores)):
        raise _Invalid(end, "a score is no finite number", DAMAGED)
    if bad := set(types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE}:
        raise _Invalid(end, f"piece {types.index(bad.pop())} is unused or of unknown type", UNSUPPORTED)
    unknown = [i for i, type in enumerate(types) if type == UNKNOWN]
    if unknown != [model.unk_id]:
        raise _Invalid(end, f"unk_id is {model.unk_id}, but the unknown pieces are {unknown[:4]}", DAMAGED)
    if sorted(piece for piece, type in zip(pieces, types, strict=True) if type == BYTE) != sorted(BYTE_PIECES):
        raise _Invalid(end, "the byte pieces are not <0x00> to <0xFF>", DAMAGED)


def control_names() -> list[str]:
    """The names of ids 0 to 106 as FunctionGemma publishes them."""
    unused = (f"<unused{i}>" for i in count())
    functions = [f"<{side}_function_{part}>" for part in ("declaration", "call", "response")
                 for side in ("start", "end")]
    return ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]", *islice(unused, 40), *functions, "<escape>",
            *islice(unused, 47), "<start_receiver>", "<end_receiver>", *islice(unused, 3),
            "<start_of_turn>", "<end_of_turn>"]


def train_model_file(texts: Iterable[str], folder: str | Path, vocab_size: int) -> None:
    """Train a BPE vocabulary on texts; write tokenizer.model and tokenizer_config.json into the folder.

    The files are the same for the same texts. Ids 0 to 107, the control tokens and "\\n", are the published
    ones; 256 byte pieces and what was learned follow.

    vocab_size: number of pieces, at least 364 and one more for each different character of texts
    Raises RuntimeError (sentencepiece's, which names the bound) for a vocab_size that does not fit the texts.
    """
    from sentencepiece import SentencePieceTrainer

    names, model = control_names(), io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        unk_piece="<unk>", control_symbols=names[4:], user_defined_symbols=["\n"], character_coverage=1.0,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        split_by_unicode_script=False,      # so that ":{description:" can be one piece
        allow_whitespace_only_pieces=True, max_sentence_length=1 << 20, num_threads=1, minloglevel=2)
    special = {"<pad>", "<eos>", "<bos>", "<unk>", "<start_function_response>", "<start_of_turn>", "<end_of_turn>"}
    added = {str(i): {"content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                      "special": name in special} for i, name in enumerate([*names, "\n"])}
    config = {"add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added, "bos_token": "<bos>",
              "clean_up_tokenization_spaces": False, "eos_token": "<eos>", "pad_token": "<pad>",
              "spaces_between_special_tokens": False, "tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>"}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")

