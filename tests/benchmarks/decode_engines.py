"""One decode engine as a process of its own, for `decode_peers.py`: reads JSON lines and answers each with one.

The first line is the setup: model (sizes under Hugging Face's names), workload (name, kind, prefix, prompts,
new_tokens, choices; tokens as ids), batch, dtype, parts. The engine builds a model with random weights, makes a trial
run, and answers with its versions. Each further line is the number of one of `parts` shares of the workload; the answer
says how long the share took, and how much of the whole workload it was. An engine that is not installed, or fails,
answers {"error": ...}.

Static batches are sorted by length, so that little is padding, and a part is a batch (or several) from the middle of
each of `parts` stretches of that order. Its share of the whole workload is counted in decode steps, those of its
longest completion; where only a judgment of 32 tokens is generated, in positions of its longest prompt. Continuous
batching gets requests of all lengths at once, and its share is counted in tokens.
"""

import importlib.metadata
import json
import os
import sys
import time
from dataclasses import fields, replace

import numpy as np

# A peer cannot score by prefill: it generates a judgment.
JUDGMENT = 32


class Ours:
    """isheep_jax: the whole workload in each part, as the stages of the loop run it."""

    packages = ("isheep_jax", "jax")

    def __init__(self, setup: dict):
        import jax

        from isheep_jax.config import DecodeConfig, MeshConfig
        from isheep_jax.decode.engine import Engine
        from isheep_jax.decode.requests import SamplingParams
        from isheep_jax.model.architecture import init_parameters
        from isheep_jax.sharding import make_mesh
        from isheep_jax.speed.shapes import SHAPES
        from isheep_jax.speed.workloads import IdTokenizer

        shape = SHAPES["llama_100m"]
        self.workload, self.sampling = _lengths(setup["workload"]), SamplingParams(temperature=1.0)
        steps = setup["steps_per_call"] or DecodeConfig.steps_per_call
        config = DecodeConfig(slots=setup["batch"], steps_per_call=steps)
        self.engine = Engine(
            init_parameters(shape, jax.random.key(0)),
            shape,
            IdTokenizer(shape.vocab_size),
            config,
            mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
            seed=0,
            compute_dtype=setup["dtype"],
        )
        self.requests = self.workload.requests(shape.vocab_size)
        self.run(0)

    def run(self, part: int) -> dict:
        start = time.perf_counter()
        if self.workload.kind == "score":
            results = list(self.engine.choice_logprobs(self.requests, self.workload.choice_texts()))
            right = all(len(r.logprobs) == self.workload.choices for r in results)
        else:
            results = list(self.engine.generate(self.requests, self.sampling))
            right = sum(len(r.tokens) for r in results) == sum(self.workload.new_tokens)
        seconds = time.perf_counter() - start
        if not right:
            raise RuntimeError("results do not have the requested lengths")
        return {"seconds": seconds, "share": 1.0}


class Peer:
    """What the peers share: prompts that include the shared prefix, and forced lengths."""

    def __init__(self, setup: dict):
        workload = setup["workload"]
        self.setup, self.score = setup, workload["kind"] == "score"
        self.prompts = [workload["prefix"] + prompt for prompt in workload["prompts"]]
        self.new = workload["new_tokens"] or [JUDGMENT] * len(self.prompts)
        # By length; prompts in any order have like lengths where completions differ.
        self.order = sorted(range(len(self.prompts)), key=lambda i: (self.new[i], len(self.prompts[i])))

    def padded(self, batch: list[int]) -> tuple[np.ndarray, int]:
        """Prompts of a batch, padded with 0 on the left, and tokens of its longest completion."""
        prompts = [self.prompts[i] for i in batch]
        width = max(map(len, prompts))
        return np.array([[0] * (width - len(p)) + p for p in prompts]), max(self.new[i] for i in batch)


class Static(Peer):
    """A peer that decodes a batch until the longest of its completions is done."""

    def __init__(self, setup: dict):
        super().__init__(setup)
        size = setup["batch"]
        batches = [self.order[i : i + size] for i in range(0, len(self.order), size)]
        self.work = [max(len(self.prompts[i]) if self.score else self.new[i] for i in batch) for batch in batches]
        parts = min(setup["parts"], len(batches))
        # All batches if there are as many parts; otherwise those in the middle of stretches of equal length.
        self.batches = batches
        self.chosen = [int((part + 0.5) * len(batches) / parts) for part in range(parts)]
        self.build(setup)

    def run(self, part: int) -> dict:
        batch = self.chosen[part % len(self.chosen)]
        start = time.perf_counter()
        self.generate(self.batches[batch])
        return {"seconds": time.perf_counter() - start, "share": self.work[batch] / sum(self.work)}


class TransformersGenerate(Static):
    """`generate` of transformers."""

    packages = ("transformers", "torch")

    def build(self, setup: dict) -> None:
        self.model = _llama(setup, "sdpa")
        self.generate(self.batches[self.chosen[0]], trial=True)

    def generate(self, batch: list[int], trial: bool = False) -> None:
        import torch

        prompts, new = self.padded(batch)
        ids = torch.from_numpy(prompts)
        new = 2 if trial else new
        outputs = self.model.generate(
            ids,
            attention_mask=(ids != 0).long(),
            generation_config=_generation_config(new, sample=not self.score),
        )
        if outputs.shape[1] != ids.shape[1] + new:
            raise RuntimeError("completions do not have the requested length")


class TransformersContinuous(Peer):
    """Continuous batching of transformers; in each part a share of the requests, of all lengths."""

    packages = ("transformers", "torch")

    def __init__(self, setup: dict):
        super().__init__(setup)
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        self.model = _llama(setup, "paged|sdpa")
        longest = max(len(p) + n for p, n in zip(self.prompts, self.new))
        page = 32
        self.config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=setup["batch"] * (-(-longest // page) + 1),
            max_batch_tokens=512,
            max_requests_per_batch=setup["batch"],
        )
        parts = -(-len(self.order) // (2 * setup["batch"]))
        self.parts = [self.order[part::parts] for part in range(parts)]
        self.generate(self.order[: setup["batch"]], trial=True)

    def generate(self, chosen: list[int], trial: bool = False) -> None:
        manager = self.model.continuous_batching_context_manager(
            generation_config=_generation_config(max(self.new), sample=not self.score),
            continuous_batching_config=replace(self.config),
            block=True,
        )
        requested = {str(i): 2 if trial else self.new[i] for i in chosen}
        with manager as running:
            # The longest first, so that none is left alone at the end.
            for name in reversed(requested):
                running.add_request(self.prompts[int(name)], name, max_new_tokens=requested[name], eos_token_id=-1)
            lengths = {}
            while len(lengths) < len(requested):
                result = running.get_result(timeout=1)
                if result is not None and result.is_finished():
                    lengths[result.request_id] = len(result.generated_tokens)
                elif result is None and not running.is_running():
                    raise RuntimeError("the manager stopped before all requests were done")
        if lengths != requested:
            raise RuntimeError("completions do not have the requested lengths")

    def run(self, part: int) -> dict:
        chosen = self.parts[part % len(self.parts)]
        start = time.perf_counter()
        self.generate(chosen)
        tokens = sum(self.new[i] for i in chosen)
        return {"seconds": time.perf_counter() - start, "share": tokens / sum(self.new)}


class TunixSampler(Static):
    """The sampler of Tunix with its Llama, and a cache of just the length that a batch needs."""

    packages = ("google-tunix", "jax", "flax")

    def build(self, setup: dict) -> None:
        import jax
        import jax.numpy as jnp
        from flax import nnx
        from tunix.models.llama3 import model as llama3

        sizes = setup["model"]
        self.config = llama3.ModelConfig(
            num_layers=sizes["num_hidden_layers"],
            vocab_size=sizes["vocab_size"],
            embed_dim=sizes["hidden_size"],
            hidden_dim=sizes["intermediate_size"],
            num_heads=sizes["num_attention_heads"],
            head_dim=sizes["head_dim"],
            num_kv_heads=sizes["num_key_value_heads"],
            rope_theta=int(sizes["rope_theta"]),
            norm_eps=sizes["rms_norm_eps"],
            weight_tying=True,
        )
        self.model = llama3.Llama3(self.config, rngs=nnx.Rngs(0))
        state, key = nnx.state(self.model), jax.random.key(0)
        # Its feed-forward weights begin at zero.
        nnx.update(
            self.model,
            jax.tree.map(lambda w: 0.02 * jax.random.normal(key, w.shape, jnp.float32) if w.ndim > 1 else w, state),
        )
        self.samplers = {}
        for batch in self.chosen:
            self.generate(self.batches[batch], trial=True)

    def generate(self, batch: list[int], trial: bool = False) -> None:
        prompts, new = self.padded(batch)
        width = prompts.shape[1]
        sampler = self.sampler(width, new)
        unchanged = sampler.init_sample_state
        if trial:
            # Compiles for these lengths: the loop ends before its first step.
            sampler.init_sample_state = lambda *args, **kwargs: replace(
                unchanged(*args, **kwargs), total_sampling_steps=0
            )
        draw = {"temperature": 0.0} if self.score else {"temperature": 1.0, "top_p": 1.0}
        texts = [" ".join(str(token) for token in prompt if token) for prompt in prompts]
        outputs = sampler(texts, max_generation_steps=new, max_prompt_length=width, seed=0, **draw)
        sampler.init_sample_state = unchanged
        if not trial and any(len(tokens) != new for tokens in outputs.tokens):
            raise RuntimeError("completions do not have the requested length")

    def sampler(self, width: int, new: int):
        from tunix.generate.sampler import CacheConfig, Sampler

        if (width, new) not in self.samplers:
            config = self.config
            cache = CacheConfig(width + new, config.num_layers, config.num_kv_heads, config.head_dim)
            self.samplers[width, new] = Sampler(self.model, _Ids(), cache)
        return self.samplers[width, new]


class _Ids:
    """Texts are decimal token ids, for Tunix. 0 is padding; no token ends a completion."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return 0


def _llama(setup: dict, attention: str):
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **setup["model"], tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    config._attn_implementation = attention
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, setup["dtype"])).eval()
    model.generation_config.eos_token_id = None
    return model


def _generation_config(new: int, sample: bool):
    from transformers import GenerationConfig

    draw = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, eos_token_id=None, **draw)


def _lengths(workload: dict):
    from isheep_jax.speed.workloads import Workload

    return Workload(**{field.name: workload[field.name] for field in fields(Workload)})


ENGINES = {
    "isheep_jax": Ours,
    "transformers": TransformersGenerate,
    "continuous": TransformersContinuous,
    "tunix": TunixSampler,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer

    def answer(message: dict) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        setup = json.loads(sys.stdin.readline())
        kind = ENGINES[setup["engine"]]
        engine = kind(setup)
        answer({"versions": {name: importlib.metadata.version(name) for name in kind.packages}})
        for line in sys.stdin:
            answer(engine.run(json.loads(line)))
    except ModuleNotFoundError as error:
        answer({"error": f"not installed ({error})"})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        raise


if __name__ == "__main__":
    main()
