"""From a checkpoint to a Hugging Face folder (export_hf.py): hf (weights, source, comparison), card, onnx,
sentences (for sentence-transformers)."""
