"""Time of `sample` beside that of two other ways, in one run on one machine.

python tests/benchmarks/sampling.py [--rows=64] [--vocabularies=32000,151936]

sort: logits are sorted, cut at the mass, and drawn from (the usual way). bisect: nucleus and token by 30 and by
log2(vocabulary) bisections on sums over the vocabulary. All three run several steps in one program, as a decode loop
does. Prints milliseconds per step, and how many times longer the others take.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from isheep_jax.config import MeshConfig
from isheep_jax.decode.sampling import DeviceSamplingParams, request_key, sample
from isheep_jax.sharding import make_mesh

STEPS = 3
SHAPES = {"flat": 1.0, "peaked": 4.0}  # standard deviation of normal logits


def uniforms(keys, positions):
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys, impl="threefry2x32"), positions)
    return jax.vmap(jax.random.uniform)(keys)[:, None]


def by_sort(logits, keys, positions, settings):
    order = jnp.argsort(-logits, axis=-1)
    probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1) / settings.temperature, axis=-1)
    above = jnp.cumsum(probability, axis=-1) - probability
    kept = jnp.cumsum(jnp.where(above < settings.top_p, probability, 0.0), axis=-1)
    place = jnp.argmax(kept > uniforms(keys, positions) * kept[:, -1:], axis=-1)
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


def by_bisection(logits, keys, positions, settings):
    weights = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / settings.temperature)
    rows, vocabulary = logits.shape
    zero = jnp.zeros((rows, 1), jnp.int32)

    def threshold():
        mass = settings.top_p * jnp.sum(weights, axis=-1, keepdims=True)

        def halve(_, bounds):
            low, high = bounds
            middle = low + (high - low) // 2
            above = weights >= jax.lax.bitcast_convert_type(middle, jnp.float32)
            enough = jnp.sum(jnp.where(above, weights, 0.0), axis=-1, keepdims=True) >= mass
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        low, _ = jax.lax.fori_loop(0, 30, halve, (zero, zero + 0x3F800001))
        return jax.lax.bitcast_convert_type(low, jnp.float32)

    least = jax.lax.cond(settings.top_p < 1.0, threshold, lambda: jnp.zeros((rows, 1), jnp.float32))
    kept = jnp.where(weights >= least, weights, 0.0)
    target = uniforms(keys, positions) * jnp.sum(kept, axis=-1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, kept.shape, 1)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        passed = jnp.sum(jnp.where(index <= middle, kept, 0.0), axis=-1, keepdims=True) > target
        return jnp.where(passed, low, middle + 1), jnp.where(passed, middle, high)

    bounds = zero, zero + vocabulary - 1
    return jax.lax.fori_loop(0, (vocabulary - 1).bit_length(), halve, bounds)[0][:, 0]


@functools.partial(jax.jit, static_argnums=0)
def steps(way, logits, keys, settings):
    def step(place, total):
        return total + way(logits, keys, jnp.full(logits.shape[0], place, jnp.int32), settings)

    return jax.lax.fori_loop(0, STEPS, step, jnp.zeros(logits.shape[0], jnp.int32))


def milliseconds(ways, *arguments) -> list[float]:
    """The shortest of three per way, taken in turn, so that other load on the machine falls on all of them."""
    times = []
    for attempt in range(4):
        for way in ways:
            start = time.perf_counter()
            steps(way, *arguments).block_until_ready()
            if attempt:  # the first compiles
                times.append((time.perf_counter() - start) * 1e3 / STEPS)
    return [min(times[i :: len(ways)]) for i in range(len(ways))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabularies", default="32000,151936")
    options = parser.parse_args()
    ours = functools.partial(sample, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    keys = np.stack([request_key(0, str(i)) for i in range(options.rows)])
    print(f"{options.rows} rows on {jax.devices()[0].device_kind}; ms per step")
    print(f"{'vocabulary':>10} {'logits':>7} {'top_p':>6} {'top_k':>6} {'sample':>8} {'bisect':>8} {'sort':>8}  ratios")
    for vocabulary in map(int, options.vocabularies.split(",")):
        for name, deviation in SHAPES.items():
            shape = options.rows, vocabulary
            logits = jnp.asarray(np.random.default_rng(0).normal(0, deviation, shape).astype(np.float32))
            for top_p, top_k in ((1.0, 0), (0.95, 0), (0.5, 0), (0.1, 0), (0.95, 50)):
                settings = DeviceSamplingParams(top_p=np.float32(top_p), top_k=np.int32(top_k))
                ways = (ours,) if top_k else (ours, by_bisection, by_sort)
                own_time, *others = milliseconds(ways, logits, keys, settings)
                line = f"{vocabulary:>10} {name:>7} {top_p:>6} {top_k:>6} {own_time:>8.1f}"
                line += "".join(f" {t:>8.1f}" for t in others) + "  " + ", ".join(f"{t / own_time:.1f}" for t in others)
                print(line, flush=True)


if __name__ == "__main__":
    main()
