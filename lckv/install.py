"""Commands that install what is optional."""

INSTALL_GPU = "pip install --no-build-isolation 'lckv-megatron[gpu]', when torch is installed"
"""flash-attn and Transformer Engine are compiled against the torch that is there, and need it when they are
built; pip's isolated builds have none."""
