"""The run's model on real devices: where the loop's protocols meet decoding and training.

`backend.JaxBackend` gives the loop its models and fine-tunes new ones; `load`, `fine_tune` and `run` are the functions
for Python programs; `locate` resolves a model argument of the user to a checkpoint directory; `vector_index` finds
nearest neighbors; `devices` sets up the cache of compiled
programs, which `compilations` counts. In: a config and checkpoint directories. Out: engines, and
directories of new models. May import every room except planning, studies, speed, cli and the commands.
"""
