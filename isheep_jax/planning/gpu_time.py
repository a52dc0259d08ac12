"""Forecasts the time of a program's step on one GPU: a roofline at stated shares of its peaks, and launches of kernels.

The GPU's compiler estimates nothing, so this is arithmetic: good for a first guess, and no more.
"""

from isheep_jax.config import Config
from isheep_jax.decode.cache import ROW_TOKENS
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.attention_cached import cache_block
from isheep_jax.planning import programs
from isheep_jax.planning.cost import program_flops, program_hbm_bytes
from isheep_jax.planning.forecast import StepTimes
from isheep_jax.planning.hardware import Chip
from isheep_jax.planning.programs import Meshes, few_slots, make_program
from isheep_jax.planning.step_time import SAMPLING_TRIES, StepTime

# Shares of the peaks that large products reach, and that reading weights and cache reaches.
COMPUTE_SHARE, MEMORY_SHARE = 0.5, 0.7
# Kernels that a layer launches in a forward pass, and the seconds of a launch that no other work hides while decoding.
KERNELS, LAUNCH = 25, 3e-6
# Seconds that the launch queue is empty after the host has read whether the loop over draws of top-p goes on.
LOOP_TURN = 25e-6

ASSUMPTIONS = (
    f"large products reach {COMPUTE_SHARE:.0%} of the peak, reading from memory {MEMORY_SHARE:.0%} of its bandwidth",
    f"a decode step launches {KERNELS} kernels per layer at {LAUNCH * 1e6:.0f} us, and waits for the host "
    f"{LOOP_TURN * 1e6:.0f} us after each of {SAMPLING_TRIES} draws of top-p",
)


def gpu_step_times(config: Config, architecture: Architecture, meshes: Meshes, chip: Chip) -> StepTimes:
    """Returns the times of all programs on GPUs with the peaks of `chip`; what several GPUs send is left out.

    Args:
        config: settings.
        architecture: the model's.
        meshes: those of the config.
        chip: the GPU's figures.
    """
    block = cache_block("gpu")
    devices = meshes.train.size

    def step(name: str, size: int = 0, positions: float | None = None) -> StepTime:
        program = make_program(name, config, architecture, meshes, size)
        flops = program_flops(program, config, architecture, positions) / devices
        read = program_hbm_bytes(program, config, architecture, meshes, positions)
        return StepTime(compute=max(flops / COMPUTE_SHARE / chip.flops, read / MEMORY_SHARE / chip.hbm_bandwidth))

    def decode(slots: int, blocks: int) -> StepTime:
        launches = architecture.layers * KERNELS * LAUNCH + SAMPLING_TRIES * LOOP_TURN
        positions = min(blocks * block, config.decode.max_length)
        return step(programs.DECODE, slots, positions) + StepTime(host=launches)

    blocks = -(-config.decode.max_length // block)
    counts = {config.decode.slots, few_slots(config, meshes.decode)}
    rows = sorted({ROW_TOKENS, config.decode.max_length})
    return StepTimes(
        block=block,
        decode={count: [decode(count, b) for b in range(1, blocks + 1)] for count in counts},
        prefill={tokens: step(programs.PREFILL, tokens) for tokens in rows},
        score={tokens: step(programs.SCORE, tokens) for tokens in rows},
        train=step(programs.TRAIN),
    )
