"""Trains small models with iterated maps and measures how many passes over a prompt are enough.

    python tools/benchmarks/prefill_passes.py --output tools/benchmarks/results/prefill_passes.csv

The exact perplexity is that of decoding token by token. Beside it stands that of parallel prefill with a
fixed number of passes, and with passes until the shared keys and values change less than a tolerance. The
text is the sources of Python's standard library, as bytes.
"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from lckv.generation.prefill import Settling
from lckv.models.cache import LCKVCache
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import Iteration, LCKVLlamaForCausalLM
from lckv_megatron.measuring.timing import setting, write_csv

MAPS = {"lckv": "0_6_6_6_6_6_6_7", "sandwich-middle": "0_3_3_3_3_3_3_7"}
TOLERANCES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
_TRAINING_TOKENS = 3_000_000


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maps", nargs="+", choices=[*MAPS], default=[*MAPS])
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--rows", type=int, default=16, help="texts to evaluate (default: %(default)s)")
    parser.add_argument("--row-length", type=int, default=256, help="bytes of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    torch.manual_seed(1)
    training, held_out = texts(options.rows * options.row_length)
    rows = []
    for name in options.maps:
        model = new_model(MAPS[name], options.hidden_size)
        loss = train(model, training, options.steps)
        print(f"{name}: training loss {loss:.3f} nats per byte", flush=True)
        for row in measure(model, held_out.view(options.rows, -1)):
            rows.append(
                {
                    "map": name,
                    "layer_types": MAPS[name],
                    "training_steps": options.steps,
                    **row,
                    **setting("cpu"),
                }
            )
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.output:
        write_csv(options.output, rows)


def texts(held_out: int) -> tuple[Tensor, Tensor]:
    """Bytes int64 [n] to train on, and `held_out` others."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    order = torch.randperm(len(files)).tolist()
    everything = b"".join(files[index].read_bytes() for index in order)[: _TRAINING_TOKENS + held_out]
    tokens = torch.frombuffer(bytearray(everything), dtype=torch.uint8).long()
    return tokens[:-held_out], tokens[-held_out:]


def new_model(layer_types: str, hidden_size: int) -> LCKVLlamaForCausalLM:
    """Eight layers, trained with 7 + 2 passes."""
    return LCKVLlamaForCausalLM(
        LCKVLlamaConfig(
            vocab_size=256,
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 8 // 3,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            compression={"layer_types": layer_types, "forward_passes": 7, "backward_passes": 2},
        )
    )


def train(
    model: LCKVLlamaForCausalLM, tokens: Tensor, steps: int, *, rows: int = 2, length: int = 256
) -> float:
    """The mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    losses = []
    model.train()
    for number in range(steps):
        starts = torch.randint(len(tokens) - length, (rows,)).tolist()
        batch = torch.stack([tokens[start : start + length] for start in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        if number % 100 == 0:
            print(f"step {number}: loss {losses[-1]:.3f}", flush=True)
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@torch.inference_mode()
def measure(model: LCKVLlamaForCausalLM, tokens: Tensor) -> list[dict[str, object]]:
    """Perplexity of `tokens` [rows, length] by every way of reading a prompt."""
    exact = token_by_token(model, tokens)
    most = model.model.forward_passes + model.model.backward_passes

    def row(way: str, value: object, passes: float, loss: float) -> dict[str, object]:
        percent = 100 * (math.exp(loss - exact) - 1)
        return {
            "way": way,
            "setting": value,
            "passes": round(passes, 2),
            "perplexity": round(math.exp(loss), 5),
            "perplexity_change_percent": round(percent, 4),
            "tokens": f"{tokens.shape[0]}x{tokens.shape[1]}",
        }

    rows = [row("token by token", "", 1, exact)]
    rows += [
        row("passes", passes, passes, parallel(model, tokens, Iteration(passes)))
        for passes in range(1, most + 1)
    ]
    for tolerance in TOLERANCES:
        settling = Settling(tolerance, most, len(tokens), None, key_bias=None, device=tokens.device)
        loss = parallel(model, tokens, Iteration(most, settling))
        rows.append(row("tolerance", tolerance, float(settling.passes.double().mean()), loss))
    return rows


def parallel(model: LCKVLlamaForCausalLM, tokens: Tensor, iteration: Iteration) -> float:
    """Mean loss in nats of a prefill of whole rows."""
    output = model.model.run(
        model.model.embed_tokens(tokens), LCKVCache(model.config).slots, iteration=iteration
    )
    assert output.last_hidden_state is not None
    return _loss(model.lm_head(output.last_hidden_state), tokens)


def token_by_token(model: LCKVLlamaForCausalLM, tokens: Tensor) -> float:
    """Mean loss in nats of decoding."""
    cache = LCKVCache(model.config).slots

    def newest(token: Tensor) -> Tensor:
        output = model.model.run(model.model.embed_tokens(token), cache, iteration=Iteration(1))
        assert output.last_hidden_state is not None
        return output.last_hidden_state

    hidden = torch.cat([newest(tokens[:, index : index + 1]) for index in range(tokens.shape[1])], 1)
    return _loss(model.lm_head(hidden), tokens)


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


if __name__ == "__main__":
    main()
