"""Time of `retrieval.Index.nearest` beside that of numpy's brute force, in one run on one machine.

python tests/benchmarks/retrieval.py [--sizes=10000,100000,1000000] [--width=256] [--queries=256] [--count=5]

numpy: one float32 product of all queries with all vectors, then argpartition and a sort of the best (exact as far as
float32 is). Ours: exact, from vectors that stay in float16 on the host. What is done once for all queries, such as the
scaling, is not counted. Prints milliseconds for all queries, how many times longer numpy takes, and the share of the
queries for which both find the same.
"""

import argparse
import functools
import time

import jax
import numpy as np

from isheep_jax.config import MeshConfig
from isheep_jax.runtime.vector_index import Index, unit
from isheep_jax.sharding import make_mesh

ROUNDS = 3


def by_numpy(vectors: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    scores = queries @ vectors.T
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    found = np.take_along_axis(scores, best, axis=1)
    order = np.lexsort((best, -found))
    return np.take_along_axis(best, order, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--count", type=int, default=5)
    options = parser.parse_args()
    print(
        f"{options.queries} queries of {options.width} dimensions, the nearest {options.count}, on "
        f"{jax.devices()[0].device_kind}; ms, the shortest of {ROUNDS} in turn"
    )
    print(f"{'vectors':>9} {'ours':>9} {'numpy':>9} {'ratio':>6}  same")
    mesh = make_mesh(MeshConfig())
    rng = np.random.default_rng(0)
    queries = unit(rng.standard_normal((options.queries, options.width), np.float32))
    for size in map(int, options.sizes.split(",")):
        vectors = unit(rng.standard_normal((size, options.width), np.float32))
        ways = {
            "ours": functools.partial(Index(vectors, mesh).nearest, queries, options.count),
            "numpy": functools.partial(by_numpy, vectors.astype(np.float32), queries.astype(np.float32), options.count),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        found = {}
        for attempt in range(ROUNDS + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                found[name] = way()
                if attempt:  # the first compiles
                    times[name].append(1e3 * (time.perf_counter() - start))
        ours, numpy = (min(times[name]) for name in ("ours", "numpy"))
        same = np.mean(np.all(found["ours"] == found["numpy"], axis=1))
        print(f"{size:>9} {ours:>9.1f} {numpy:>9.1f} {numpy / ours:>6.2f}  {same:.1%}", flush=True)


if __name__ == "__main__":
    main()
