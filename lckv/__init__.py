"""Language models whose KV cache is small by construction.

Importing it registers the models with transformers' Auto classes, once transformers itself is imported.
"""
