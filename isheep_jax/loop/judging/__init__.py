"""Judging: who scores pairs, how a score is read from an answer, and how far two judges agree.

Answers of a judge come in (logprobs of the ten scores, or sampled judgments), `Score` records go out (`scores`).
`damages` makes bad responses out of good ones, by which `check` measures a judge. `judges` finds the judge that a
setting names, `endpoint` talks to one on a server, `agreement` compares two. Imports the loop's records and run
directory, `filters`, `prompting`, `selection.ranking`, `chat_server` and `decode.requests`.
"""
