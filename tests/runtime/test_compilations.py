"""Programs are counted by name: compiled, or from the cache."""

import threading

import jax
import jax.numpy as jnp

from isheep_jax.runtime.compilations import compilations


def test_programs_are_counted_once_and_by_name():
    before = compilations()

    @jax.jit
    def ours(x):
        return jnp.sin(x) * 3

    ours(jnp.ones(7)).block_until_ready()
    new = compilations() - before
    assert (new.compiled + new.cached)["jit(ours)"] == 1
    assert new.seconds > 0
    before = compilations()
    ours(jnp.ones(7)).block_until_ready()
    assert (compilations() - before).programs == 0


def test_a_hit_counts_for_the_program_of_its_thread():
    before = compilations()
    hit, done = threading.Event(), threading.Event()

    def other():
        hit.wait()
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 2.0, fun_name="other")
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
    hit.set()
    done.wait()
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.0, fun_name="ours")
    thread.join()
    new = compilations() - before
    assert (dict(new.compiled), dict(new.cached), new.seconds) == ({"other": 1}, {"ours": 1}, 3.0)
