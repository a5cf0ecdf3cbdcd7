"""Starts of a model in a fresh process: what an earlier one found out, so that a question need not wait for the whole.

Answering a short question on a CPU takes the weights, a tokenizer's tables and the forward of few rows. transformers,
whose import takes longer than all of these, reads them and checks the forward once; what it made of them is kept, with
everything that it follows from, and taken by later processes (docs/design/016-start.md). `facts`, `record`, `reading`
and `begin` know no torch, so that a command can begin before it is imported.
"""
