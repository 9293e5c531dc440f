"""Text ↔ ids: SentencePiece's BPE with Gemma's rules, from scratch.

    "I need 2!" → "I▁need▁2!" → I ▁need ▁ 2 ! → [236777, 1202, 236743, 236778, 236888]

1. A space becomes "▁". Nothing else is normalised, and no space is added in front.
2. Frozen pieces (runs of spaces, tabs or newlines, HTML tags) are cut out first, the longest at each place.
3. Every other character starts as a piece of its own. Of all neighbouring pairs that together are a piece,
   the one with the highest score is merged (the leftmost among equals), until none is left.
4. A character that is not a piece becomes its UTF-8 bytes, the pieces <0x00> to <0xFF>.

No piece of Gemma's vocabulary spans a space and the character before it, a digit and a neighbour or, except
for "> </", a letter and a punctuation mark. So a text is cut there and the ids of each part are cached:
nearly all of the work is one lookup a word. Loading finds the pieces that do span a cut; a text that contains
one of them is not cut.

Control tokens (<start_of_turn>, <escape>, …) are not text. Only `control=True` and `encode_segments` give
their ids; elsewhere the same characters are ordinary text, whoever typed them.

Source: github.com/google/sentencepiece, src/bpe_model.cc; the tests ask for the same ids.
To try it: `Tokenizer.load("FOLDER").encode("I need 2!")`.
"""
from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from itertools import chain, groupby
from pathlib import Path

from tokenizer.chat import Control, Segment
from tokenizer.model_file import BYTE, BYTE_PIECES, NORMAL, USER_DEFINED, ModelFile, read_model_file

HTML_TAGS = frozenset(f"<{slash}{name}>" for slash in ("", "/") for name in (
    "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote",
    "strong", "em", "b", "i", "u", "s", "sub", "sup", "code",
    "a", "html", "body", "img", "span", "bbox", "ul", "li", "div", "iframe", "footer"))
CONTROL_NAME = re.compile(r"<\w+>")     # two matches never overlap, and none is the beginning of another

# SentencePiece decodes each byte that is not UTF-8 to a U+FFFD; Python's "replace" gives fewer.
codecs.register_error("replace_each_byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))


def is_text(piece: str) -> bool:
    """Whether an added token is text that has this id wherever it occurs, rather than a control token."""
    return piece in HTML_TAGS or piece == "[multimodal]" or not piece.strip("▁\n\t")


class IdCache(dict):
    """{text: its ids}, computed on first use; cleared when it is full."""

    MAX_TEXTS, MAX_CHARACTERS = 1 << 16, 96

    def __init__(self, compute: Callable[[str], list[int]]):
        self.compute = compute

    def __missing__(self, text: str) -> list[int]:
        ids = self.compute(text)
        if len(text) <= self.MAX_CHARACTERS:
            if len(self) >= self.MAX_TEXTS:
                self.clear()
            self[text] = ids
        return ids


class Tokenizer:
    """Text ↔ ids in one vocabulary.

    vocab_size: V, the pieces in tokenizer.model and the rows of the embedding
    pieces: the text of each id; "▁" stands for a space
    control: {name: id}; FunctionGemma's <image_soft_token> and <end_of_image>, V and V + 1, have no such row
    """

    def __init__(self, model: ModelFile, added_tokens: dict[int, str] | None = None):
        """added_tokens: {id: name} as in tokenizer_config.json; they overrule the names in tokenizer.model

        Raises ValueError for a control token with a gap before its id, an unusual name, or one that is taken,
        and for more user-defined pieces than can be looked for in a text.
        """
        self.vocab_size = len(model.pieces)
        self.pieces = list(model.pieces)
        self.control: dict[str, int] = {}
        named = {i: self.pieces[i] for i, type in enumerate(model.types) if type not in (NORMAL, BYTE)}
        for i, name in sorted((named | (added_tokens or {})).items()):
            if is_text(name):
                continue
            if not CONTROL_NAME.fullmatch(name) or name in self.control or not 0 <= i <= len(self.pieces):
                raise ValueError(f"control token {name!r:.60} has id {i}: expected a name like <name> that no other id "
                                 f"has, and an id from 0 to {len(self.pieces)}")
            self.pieces[i : i + 1] = [name]     # or append it, after the last
            self.control[name] = i

        reserved = set(self.control.values())
        self.frozen = {piece for i, piece in enumerate(model.pieces)
                       if model.types[i] == USER_DEFINED and i not in reserved}
        if len(self.frozen) > 1000 or any(len(piece) > 256 for piece in self.frozen):
            raise ValueError(f"{len(self.frozen)} user-defined pieces, of up to {max(map(len, self.frozen))} characters: expected 1000 "
                             "at most, of 256 characters at most")
        self.ids = {piece: i for i, piece in enumerate(model.pieces)
                    if (model.types[i] == NORMAL and i not in reserved) or piece in self.frozen}
        self.costs = {piece: -model.scores[i] for piece, i in self.ids.items()}     # the cheapest merge goes first
        byte_ids = {piece: i for i, piece in enumerate(model.pieces) if model.types[i] == BYTE}
        self.byte_ids = [byte_ids[piece] for piece in BYTE_PIECES]
        self.bytes_of = {i: bytes([byte]) for byte, i in enumerate(self.byte_ids)}

        # In groups with the same first character, so that `re` rejects a whole group by one character or two.
        groups = groupby(sorted(self.frozen, key=lambda piece: (piece[0], -len(piece))), key=lambda piece: piece[0])
        group = {first: "|".join(map(re.escape, group)) for first, group in groups}
        frozen = "|".join(f"(?:{alternatives})" for alternatives in group.values()) or "(?!)"
        self.typed_spaces = re.compile(f"({group.get('▁', '(?!)')})")
        self.stretch = re.compile(rf"{frozen} | (?: (?!{frozen}) . )+", re.DOTALL | re.VERBOSE)
        words = rf"{frozen} | ▁? (?: (?!{frozen}) [^▁] )+ | ▁"
        parts_of_words = rf"""
              {frozen}
              # letters or punctuation; not if é, “ or \x1b comes next, which can join either
            | ▁? (?: [A-Za-z]++ | (?: (?!{frozen}) [!-/:-@\[-`{{-~] )++ ) (?![^!-~▁\n])
              # otherwise everything up to a space or digit
            | ▁? (?: (?!{frozen}) [^▁0-9] )+
              # a digit, or a space before one
            | ."""
        for cut in (parts_of_words, words):
            self.chunk = re.compile(cut, re.DOTALL | re.VERBOSE)
            self.crossing = [piece for piece in self.ids if self.chunk.match(piece).end() < len(piece)]
            if len(self.crossing) <= 32:
                break
        else:
            self.crossing = [""]      # every text holds "": none is cut into chunks
        self.chunks = IdCache(self._merge)
        self.starts = IdCache(self._cut)                                # words at the start of a text
        self.words = IdCache(lambda word: self._cut("▁" + word))        # words after a space
        self.runs = IdCache(self.encode)                                # texts between control tokens

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.model and, if it exists, the names of control tokens in tokenizer_config.json.

        Raises ValueError for a damaged or unsupported file, FileNotFoundError without a tokenizer.model.
        """
        model = read_model_file(Path(folder) / "tokenizer.model")
        config = Path(folder) / "tokenizer_config.json"
        try:
            added = json.loads(config.read_bytes()).get("added_tokens_decoder", {}) if config.exists() else {}
            return cls(model, {int(i): token["content"] for i, token in added.items()})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{config}: {type(error).__name__}: {error}; expected JSON with added_tokens_decoder: "
                             "{id: {\"content\": name}} that fits tokenizer.model; download both again") from None

    def encode(self, text: str, control: bool = False) -> list[int]:
        """The ids of a text, without a <bos> in front.

        control: give the ids of control tokens that the text names, as Hugging Face does; not for users' text
        Raises ValueError for half a surrogate pair, which is no character.
        """
        ids: list[int] = []
        start = 0
        try:
            for match in CONTROL_NAME.finditer(text) if control else ():
                if match[0] in self.control:
                    ids += self._plain(text[start : match.start()])
                    ids.append(self.control[match[0]])
                    start = match.end()
            return ids + self._plain(text[start:])
        except UnicodeEncodeError:
            at = re.search("[\ud800-\udfff]", text).start()
            raise ValueError(f"character {at} of the text is {text[at]!r}, half a surrogate pair: UTF-8 cannot "
                             "hold it; repair the text where it was read") from None

    def encode_segments(self, segments: Iterable[Segment | tuple[str, bool]]) -> tuple[list[int], list[bool]]:
        """(ids, loss mask) of a rendered conversation: the mask is True for the ids that carry loss.

        A `Control` becomes its id; all else is plain text, which continues from one segment to the next. It
        is cut where the loss begins or ends, so no piece may span that place, such as the end of "model\n".
        Raises ValueError for a `Control` that is not in the vocabulary, and as `encode` does.
        """
        ids: list[int] = []
        loss_mask: list[bool] = []
        run, run_carries_loss = [], False       # texts that have not become ids yet
        for text, carries_loss in chain(segments, [(Control(), False)]):
            if run and (carries_loss != run_carries_loss or type(text) is Control):
                ids += self.runs["".join(run)]
                loss_mask += [run_carries_loss] * (len(ids) - len(loss_mask))
                run = []
            if type(text) is not Control:
                run.append(text)
                run_carries_loss = carries_loss
            elif text in self.control:
                ids.append(self.control[text])
                loss_mask.append(carries_loss)
            elif text:
                raise ValueError(f"the vocabulary has no control token {text}; take tokenizer.model and "
                                 "tokenizer_config.json from FunctionGemma")
        return ids, loss_mask

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: control tokens by name, U+FFFD for each byte that is not UTF-8, a space for "▁".

        Raises ValueError for an id that is not in the vocabulary.
        """
        parts = []
        for i in ids:
            if not 0 <= i < len(self.pieces):
                raise ValueError(f"id {i} is not in the vocabulary: expected 0 to {len(self.pieces) - 1}")
            parts.append(self.bytes_of.get(i) or self.pieces[i].replace("▁", " ").encode())
        return b"".join(parts).decode(errors="replace_each_byte")

    def _plain(self, text: str) -> list[int]:
        """The ids of a text in which nothing is a control token."""
        if "▁▁" in text:      # Hugging Face keeps typed "▁▁" apart from spaces beside it; SentencePiece alone does not
            return [i for part in self.typed_spaces.split(text) for i in self._spaced(part.replace(" ", "▁"))]
        return self._spaced(text.replace(" ", "▁"))

    def _spaced(self, text: str) -> list[int]:
        if any(map(text.__contains__, self.crossing)):
            return list(chain.from_iterable(map(self._merge, self.stretch.findall(text))))
        if "▁▁" in text:
            return self._cut(text)
        first, *words = text.split("▁")
        return self.starts[first] + list(chain.from_iterable(map(self.words.__getitem__, words)))

    def _cut(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self.chunks.__getitem__, self.chunk.findall(text))))

    def _merge(self, text: str) -> list[int]:
        """BPE, of a frozen piece or of a text with none in it.

        Pieces form a linked list: the piece after piece i starts at right[i], and pieces[i] is "" once it was
        merged into the one before. Possible merges wait in a heap as (cost, position, length). If one of the
        two pieces has been merged with another by then, the length no longer matches.
        """
        if text in self.frozen:
            return [self.ids[text]]
        cost_of = self.costs.get
        pieces, size = list(text), len(text)
        left, right = list(range(-1, size - 1)), list(range(1, size + 1))
        pairs = map(str.__add__, pieces, pieces[1:])
        heap = [(cost, i, 2) for i, pair in enumerate(pairs) if (cost := cost_of(pair)) is not None]
        heapify(heap)
        while heap:
            _, i, length = heappop(heap)
            j = right[i]
            if not pieces[i] or j == size or len(pieces[i]) + len(pieces[j]) != length:
                continue
            pieces[i] += pieces[j]
            pieces[j] = ""
            h, k = left[i], right[j]
            right[i] = k
            if k < size:
                left[k] = i
                pair = pieces[i] + pieces[k]
                if (cost := cost_of(pair)) is not None:
                    heappush(heap, (cost, i, len(pair)))
            if h >= 0:
                pair = pieces[h] + pieces[i]
                if (cost := cost_of(pair)) is not None:
                    heappush(heap, (cost, h, len(pair)))
        out: list[int] = []
        for piece in filter(None, pieces):
            if piece in self.ids:
                out.append(self.ids[piece])
            else:
                out += [self.byte_ids[byte] for byte in piece.encode()]
        return out
