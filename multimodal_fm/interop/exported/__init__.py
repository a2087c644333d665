"""The code that travels with an exported model: it needs PyTorch and `transformers`, and nothing of this package.

The files are copied as they are into a Hugging Face folder, so that they import each other and nothing else of ours.
"""
