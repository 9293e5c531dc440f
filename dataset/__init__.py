"""Rows in files → conversations → token ids, in the order in which they are trained on."""
