"""Language models whose KV cache is small by construction.

Importing it lets transformers' Auto classes know the models (`AutoModelForCausalLM.from_pretrained` of an
`lckv-llama` folder).
"""

from lckv.registration import register_with_transformers

register_with_transformers()
