"""Hugging Face model directories in and out.

`pretrained.open_model` checks a directory without reading its weights; `hf_weights` loads them into sharded
parameters, and `hf_save` saves parameters again, each process its own files (`file_streams`); `adapters` reads and
writes LoRA adapters and merges them into weights; `hf_config` translates config.json into an `Architecture` and back;
`safetensors_file` reads and writes the file format. In: directories on disks or in buckets. Out: an `Architecture`, a
`Tokenizer` and trees of arrays. May import errors, config, files, distributed, sharding, text and model.
"""
