"""The page examples/policy_from_zero: a whole KV policy in 40 lines, loaded as its README.md says."""

from pathlib import Path

import pytest
import torch

from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.registry import VARIABLE, config_classes

MODULE = "examples.policy_from_zero.policy"
FOLDER = Path(__file__).resolve().parents[2] / "examples" / "policy_from_zero"


@pytest.fixture(autouse=True)
def _named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, MODULE)


def test_it_is_as_short_as_its_page_says() -> None:
    assert len((FOLDER / "policy.py").read_text().splitlines()) <= 40
    page = (FOLDER / "README.md").read_text()
    assert f"export {VARIABLE}={MODULE}" in page and "in 40 lines" in page
    assert "forget-odd" in config_classes()


def test_it_trains_and_generates_and_forgets() -> None:
    torch.manual_seed(0)
    config = LCKVLlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        initializer_range=0.2,
        compression={"layer_types": "0_2_2_3", "policy": {"name": "forget-odd", "age": 4}},
    )
    model = LCKVLlamaForCausalLM(config)
    ids = torch.randint(1, 50, (2, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        output = model(ids, labels=ids)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[1] < losses[0]
    model.eval()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {
        "attention_mask": mask,
        "do_sample": False,
        "max_new_tokens": 6,
        "return_dict_in_generate": True,
    }
    cached = model.generate(ids, **options)
    assert torch.equal(cached.sequences, model.generate(ids, use_cache=False, **options).sequences)
    # 25 and 20 tokens were taken in: the newest 4, and of those before every second one.
    assert [cached.past_key_values.slots.lengths(0)[row, 0].item() for row in (0, 1)] == [4 + 11, 4 + 8]
