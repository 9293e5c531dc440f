"""Files of rows → conversations → token ids, and the order in which a run trains on them.

In reading order:
    files, tools, rows             JSONL, arrays, gzip; tools and their types; any row → `Conversation`
    examples                       `Conversation` → `Example(ids, loss_mask)`
    prefix_sharing, sampler        rows that share a prefix; the rows of each step, and the ranks they go to
    token_dataset, token_cache     all examples of a run, tokenized once and mapped from the disk
    stats, errors                  what is in the rows; what is wrong with a row
"""
