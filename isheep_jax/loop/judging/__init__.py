"""Judging: who judges pairs, how its opinion is read, whether it can judge, and how far two judges agree.

Pairs come in (`reader.Candidate`), `Scores` records go out of `readings.read`. `readings` is the table of the ways to
read an opinion: `rubric` (scores out of answers: `scores`), `likelihoods` (without what is copied: `copying`) and
`comparisons` of the responses to an instruction. `framing` puts a question into a text or a conversation. `damages`
makes bad responses out of good ones, by which `check` measures a judge. `judges` finds the judge that a setting names,
`endpoint` talks to one on a server, `agreement` compares two. Imports the loop's records and run directory, `filters`,
`prompting`, `selection.ranking`, `chat_server` and `decode.requests`.
"""
