"""The run's model on real devices: where the loop's protocols meet decoding and training.

`backend.JaxBackend` gives the loop its models and fine-tunes new ones; `locate` turns a model argument of the user into
a checkpoint directory; `vector_index` finds nearest neighbors; `devices` sets up the compilation cache. In: a config
and checkpoint directories. Out: engines, and directories of new models. May import every room except planning, speed,
studies and cli; neither the loop nor evaluation imports it.
"""
