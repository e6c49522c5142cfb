"""Data: from text files to packed batches of GLM's blank-infilling samples."""
