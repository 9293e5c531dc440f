"""Files of rows → conversations → token ids, and the order in which a run trains on them.

In reading order: `files` (JSONL, JSON arrays, gzip), `tools` and `rows` (every shape of row →
`Conversation`), `examples` (`Conversation` → `Example`), `token_dataset` and `token_cache` (all examples of a
run, kept on disk), `sampler` and `prefix_sharing` (which rows make a step, and which of them share a prefix),
`stats` (what is in the rows).
"""
