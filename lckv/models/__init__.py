"""The models for Hugging Face's tools.

`import lckv.models` lets transformers' Auto classes know them (`AutoModelForCausalLM.from_pretrained` of an
`lckv-llama` folder). It is the one import of this project that has an effect.
"""

from lckv.models.registration import register

register()
