"""A GGUF file of llama.cpp, read as a Hugging Face directory: without a copy on the disk.

`files.model_files` returns what its config.json and tokenizer files would be, `tensors.stored_tensors` its tensors by
Hugging Face name, each read and dequantized row by row. In: the path of one file, on a disk or in a bucket. Out: bytes
and arrays. May import errors.
"""
