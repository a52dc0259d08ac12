"""Fine-tuning: a model from examples.

In go starting weights, examples (conversations with the responses to learn) and `SFTConfig`; out come the tuned
weights, the LoRA adapters if there are any, and losses. `trainer.fine_tune` is the door: it tokenizes and packs
(`data`), makes updates (`train_step`, `loss`, `lora`) and resumes bit for bit from any checkpoint (`checkpoints`). The
loop only knows `examples`. May import checkpoint, model, text, sharding and what is below them; not decode.
"""
