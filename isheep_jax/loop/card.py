"""The model card of an iteration's model: how it came to be."""

from isheep_jax.config import Config


def model_card(config: Config, iteration: int, instructions: int, pairs: int) -> str:
    """Markdown for the README.md of the model's directory. Says nothing that another run of the config would not."""
    respond, assess, selection, sft = config.respond, config.assess, config.select, config.sft
    writer = "the base model" if iteration == 1 else f"the model of iteration {iteration - 1}"
    judge = writer if assess.judge == "current" else "the base model"
    start = "the base model" if sft.start == "base" or iteration == 1 else writer
    rule = {
        "threshold": f"both scores above {selection.threshold:g}",
        "top_fraction": f"the best {selection.fraction:.0%} by the sum of the scores",
        "random": f"{selection.fraction:.0%} drawn at random",
        "none": "no selection by score",
    }[selection.rule]
    method = f"LoRA of rank {sft.lora_rank}, merged" if sft.method == "lora" else "all weights"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {config.name}, iteration {iteration}

Made by isheep_jax, iterative self-alignment: a language model learned from its own instructions and responses, chosen
by its own scores. No person and no other model wrote or judged any of them, apart from the seed tasks.

| | |
| --- | --- |
| base model | {config.model.path} |
| instructions | {instructions}, written by {writer} |
| responses | {respond.samples} per instruction, written by {writer} |
| scores | quality and following the instruction, 1 to 10, by {judge} ({assess.read}) |
| kept | {pairs} pairs: {rule} |
| fine-tuning | from {start}: {method}, {sft.epochs} epochs, learning rate {sft.learning_rate:g} |
| seed | {config.seed} |

## Limits

The pairs can carry the base model's errors and biases on and strengthen them: the scores are the model's own. Nothing
was filtered for safety.
"""
