"""Plans a run before any hardware is rented: memory, collectives, times of steps and the cost of an iteration.

`programs` lowers the functions that decoding and training call on abstract arrays; `compile` compiles them for the
config's devices (TPU slices that are not there included); `module` and `collectives` read what they compiled to. There
are two times of everything: the bound, which `cost` counts, and the forecast, for which `step_time` replays what the
compiler scheduled, over the links of `torus` (`gpu_time` for GPUs). `demands` says what each stage asks for on texts of
the assumed `lengths`, `schedule` which calls the loop makes of it, `forecast` what these take; `iteration` adds up the
stages and what is between them, the `transfers` of weights. `serving` counts requests per second. `plan` joins all of
this and `fit` searches settings that fit. In: a config and an architecture. Out: a `Plan`. May import every room except
speed, studies and cli.
"""
