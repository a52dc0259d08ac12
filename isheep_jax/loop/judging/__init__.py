"""Judging: who scores pairs, how a score is read from an answer, and how far two judges agree.

Answers of a judge come in (logprobs of the ten scores, or sampled judgments), `Score` records go out (`scores`).
`judges` finds the judge that a setting names, `endpoint` talks to one on a server, `agreement` compares two. Imports
the loop's records and run directory, `chat_server` and `decode.requests`.
"""
