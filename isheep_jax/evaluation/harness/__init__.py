"""Tasks of lm-evaluation-harness (`lm_eval:NAME`, extra `eval`) on a model of ours.

`definitions.py` finds a task by its name and loads it with its data; `language_model.py` is the harness's view of a
model, which keeps every answer; `evaluator.py` turns the harness's results into a `TaskResult`. lm_eval is imported
inside functions, and by `language_model.py`.
"""

PREFIX = "lm_eval:"
