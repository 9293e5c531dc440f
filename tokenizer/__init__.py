"""Text ↔ ids and messages ↔ text, written by hand: no torch, no sentencepiece at run time.

In reading order: `chat.py` (FunctionGemma's format), `bpe.py` (SentencePiece BPE), `model_file.py`
(tokenizer.model).
"""
from tokenizer.bpe import Tokenizer
from tokenizer.chat import (
    DEVELOPER_TEXT,
    Calls,
    Control,
    Pairs,
    Segment,
    parse_calls,
    render,
    render_around_tools,
    render_segments,
    render_tool,
)

__all__ = ["DEVELOPER_TEXT", "Calls", "Control", "Pairs", "Segment", "Tokenizer", "parse_calls", "render",
           "render_around_tools", "render_segments", "render_tool"]
