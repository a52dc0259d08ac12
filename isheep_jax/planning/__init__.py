"""Plans a run before any hardware is rented: memory, collectives, least times and the cost of an iteration.

`programs` lowers the functions that decoding and training call on abstract arrays; `compile` compiles them for the
config's devices (TPU slices that are not there included) and `collectives` reads what they send; `cost` counts what
they compute; `iteration` adds up the stages; `plan` joins all of this and `fit` searches settings that fit. In: a
config and an architecture. Out: a `Plan`. May import every room except speed, studies and cli.
"""
