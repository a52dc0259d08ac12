"""Strings, conversations and token ids: everything about text that needs no arrays.

`tokenizer.Tokenizer` is the one class that other rooms use: it reads the tokenizer files and the chat template of a
model directory, and encodes prompts, choices and training examples. `conversation` has the types that prompts are made
of; `template_check` tests a chat template before a run. In: a model directory. Out: token ids and strings. May import
errors.
"""
