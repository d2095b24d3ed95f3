"""What speculative decoding by prompt lookup costs and gains, on answers that repeat their prompt and others.

    OMP_NUM_THREADS=1 python -m tools.benchmarks.speculation --clock cpu \\
        --output tools/benchmarks/results/speculation.csv

Time does not depend on weights, but drafts depend on what is said. So models with random weights say what a
script has: a function of Python's library with a name changed, after the function itself (edit), or the next
sentences of an article (article). Tokens are words, spaces and signs. The engine runs as always, head and
sampling included. All ways take turns; times are medians of rounds, ratios are to the same model and text
without drafts. The prompt is computed before, and found in the cache.
"""

import argparse
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lckv.generation.config import EngineConfig
from lckv.generation.engine import Engine
from lckv.generation.sampling import SamplingParams
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv_megatron.measuring.timing import median_seconds, setting
from tools.benchmarks.biased_attention import options, show_and_write
from tools.benchmarks.generation.models import RandomModel, Sizes

_ARTICLE = Path(__file__).resolve().parents[2] / "examples" / "smollm2" / "wikitext-2-excerpt.txt"
_SURE = 100.0
"""Added to the logit of what the script has."""


def scripts(vocabulary: int, tokens: int) -> dict[str, tuple[list[int], list[int]]]:
    """Prompts and answers of `tokens` tokens, by name."""
    function = inspect.getsource(textwrap.dedent)
    article = _ARTICLE.read_text(encoding="utf-8")
    numbers: dict[str, int] = {}

    def numbered(text: str) -> list[int]:
        pieces = re.findall(r"\w+|\s+|[^\w\s]", text)
        return [numbers.setdefault(piece, len(numbers)) % vocabulary for piece in pieces]

    edit = numbered(function), numbered(function.replace("lines", "rows"))[:tokens]
    whole = numbered(article)
    return {"edit": edit, "article": (whole[:300], whole[300 : 300 + tokens])}


class Scripted:
    """Lets a model say a text, in a batch of one."""

    def __init__(self, model: LCKVLlamaForCausalLM) -> None:
        self.text: list[int] = []
        self._run, self._head, self._next = model.model.run, model.lm_head.forward, torch.empty(0)
        # With a hook on a layer every step goes through `run`.
        model.model.layers[0].register_forward_pre_hook(lambda _module, _given: None)
        model.model.run = self._running
        model.lm_head.forward = self._saying

    def _running(self, hidden_states: Tensor, cache: Any, **arguments: Any) -> Any:
        start, tokens = int(cache.seen[0]), hidden_states.shape[1]
        self._next = torch.tensor([*self.text, 0][start + 1 : start + 1 + tokens])
        return self._run(hidden_states, cache, **arguments)

    def _saying(self, hidden_states: Tensor) -> Tensor:
        logits = self._head(hidden_states)
        said = self._next[-len(hidden_states) :].to(logits.device)
        return logits.scatter_add(1, said[:, None], torch.full_like(logits[:, :1], _SURE))


class Answering:
    """Answers a prompt again and again."""

    def __init__(self, engine: Engine, scripted: Scripted, script: tuple[list[int], list[int]]) -> None:
        self._engine, self._scripted, (self._prompt, self._answer) = engine, scripted, script
        self.steps = self.drafted = self.accepted = 0

    def __call__(self) -> None:
        engine, before = self._engine, self._engine.stats()
        self._scripted.text, self.steps = [*self._prompt, *self._answer], 0
        params = SamplingParams(temperature=0.0, max_new_tokens=len(self._answer), ignore_eos=True)
        request = engine.submit(self._prompt, params)
        while engine.has_work:
            engine.step()
            self.steps += 1
        assert list(request.result().token_ids) == self._answer
        after = engine.stats()
        self.drafted = after.drafted_tokens - before.drafted_tokens
        self.accepted = after.accepted_tokens - before.accepted_tokens


def measure(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A row per map, text and number of drafted tokens; 0: no speculation."""
    hidden = args.heads * args.head_dim
    sizes = Sizes(args.layers, hidden, args.heads, args.kv_heads, args.vocab_size, args.window, 1024)
    for name in args.maps:
        model = RandomModel.parse(name).build(
            sizes, dtype=getattr(torch, args.dtype), device=torch.device(args.device)
        )
        scripted, calls = Scripted(model.eval()), {}
        for drafted in (0, *args.tokens):
            config = EngineConfig(
                memory_bytes=args.memory_mib * 2**20,
                max_batch_size=1,
                speculation="prompt_lookup" if drafted else "none",
                speculation_tokens=max(1, drafted),
            )
            engine = Engine(model, config)
            for text, script in scripts(args.vocab_size, args.new_tokens).items():
                calls[text, drafted] = Answering(engine, scripted, script)
        timed: dict[str, Callable[[], object]] = {
            f"{text} {way}": call for (text, way), call in calls.items()
        }
        seconds = median_seconds(timed, repeats=args.repeats, clock=args.clock)
        for (text, way), call in calls.items():
            yield {
                "map": name,
                "layer_types": model.config.compression_config().layer_types or "",
                "text": text,
                "speculation_tokens": way,
                "new_tokens": args.new_tokens,
                "steps": call.steps,
                "tokens_per_step": round(args.new_tokens / call.steps, 2),
                "acceptance": round(call.accepted / call.drafted, 3) if call.drafted else "",
                "seconds": round(seconds[f"{text} {way}"], 4),
                "ratio": round(seconds[f"{text} {way}"] / seconds[f"{text} 0"], 3),
                "layers": args.layers,
                "hidden_size": hidden,
                "vocab_size": args.vocab_size,
                "dtype": args.dtype,
                "clock": args.clock,
                **setting(args.device),
            }


def main(argv: list[str] | None = None) -> None:
    """The program; see the module."""
    parser = options(str(__doc__))
    parser.set_defaults(heads=6, kv_heads=2, head_dim=64, repeats=3)
    parser.add_argument("--layers", type=int, default=8, help="Of each model.")
    parser.add_argument("--vocab-size", type=int, default=4096, help="Tokens of the vocabulary.")
    parser.add_argument("--window", type=int, default=64, help="Of maps with windows.")
    parser.add_argument(
        "--maps", nargs="+", default=["plain", "sandwich-middle", "lckv"], help="Layouts or maps."
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 8], help="Most drafted tokens.")
    parser.add_argument("--new-tokens", type=int, default=96, help="Of each answer.")
    parser.add_argument("--memory-mib", type=int, default=64, help="Of the KV cache.")
    shown = "{map:15} {text:8} {speculation_tokens:>2} {tokens_per_step:5} {acceptance:>6} {ratio}"
    show_and_write(parser.parse_args(argv), measure, shown)


if __name__ == "__main__":
    main()
