"""Calls of functions that run only with CUDA, compared with the functions' own sources: read from the syntax
trees of both, or bound to what torch says of itself."""

import ast
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core.extensions
import pytest
import torch

from lckv.attention import backends
from lckv.attention.flash3 import FlashAttn3Pair
from lckv.attention.flash_pair import Problem
from lckv.losses import cut, liger
from megatron_ext.model import operators
from tests.pinned_sources import (
    CUT_CROSS_ENTROPY,
    FLASH_ATTN,
    FLASH_ATTN_OLDEST,
    LIGER_KERNEL,
    TRANSFORMER_ENGINE,
    Pin,
    folder_of,
)

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lckv", "megatron_ext", "lckv_megatron")
FLASH_FUNCTIONS = {function for functions in backends._FLASH_FUNCTIONS.values() for function in functions}
TORCH_PARTS = ("torch.cuda.", "torch.distributed.")
COMPILED = {
    "torch.distributed.HashStore", "torch.distributed.PrefixStore", "torch.distributed.ProcessGroup.unbox",
}  # fmt: skip
"""What torch says nothing of; it needs no CUDA, and tests run it."""
WRAPPERS = {
    "TELinear": ("module/linear.py", "Linear"),
    "TELayerNormColumnParallelLinear": ("module/layernorm_linear.py", "LayerNormLinear"),
}
"""Megatron's classes of layers that the model is made of, and the classes of Transformer Engine below."""


@dataclass(frozen=True)
class Call:
    """One call, as it is written."""

    place: str
    function: str
    positional: int
    keywords: tuple[str, ...]
    results: int | None
    """Into how many names the result is taken apart, at least; None: it is not."""

    def refusal(self, signature: inspect.Signature) -> str | None:
        """Why the function cannot be called so."""
        try:
            signature.bind(*[None] * self.positional, **dict.fromkeys(self.keywords))
        except TypeError as error:
            return f"{self.place} calls {self.function}: {error}"
        return None


def calls(tree: ast.AST, place: str) -> Iterator[Call]:
    """All calls below `tree`; what `**name` and `**self.method()` hold is looked up there."""
    taken_apart = {
        id(node.value): node.targets[0].elts
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
    }
    keys = dict(_keys_of_dictionaries(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
        for keyword in node.keywords:
            if keyword.arg is None:
                keywords += keys.get(_name(keyword.value), ())
        names = taken_apart.get(id(node))
        yield Call(
            f"{place}:{node.lineno}",
            _dotted(node.func),
            len(node.args),
            tuple(keywords),
            None if names is None else len([name for name in names if not isinstance(name, ast.Starred)]),
        )


def trees(*words: str) -> Iterator[tuple[str, ast.Module]]:
    """The project's files in which one of these words stands."""
    for path in itertools.chain(*((ROOT / name).rglob("*.py") for name in PACKAGES)):
        text = path.read_text(encoding="utf-8")
        if any(word in text for word in words):
            yield str(path.relative_to(ROOT)), ast.parse(text)


def _name(value: ast.expr) -> str:
    return _dotted(value.func if isinstance(value, ast.Call) else value).removeprefix("self.")


def _dotted(value: ast.expr) -> str:
    """a.b.c; where it is something else, that in brackets."""
    if isinstance(value, ast.Attribute):
        return f"{_dotted(value.value)}.{value.attr}"
    if isinstance(value, ast.Call):
        return f"{_dotted(value.func)}()"
    return value.id if isinstance(value, ast.Name) else f"({type(value).__name__})"


def _keys_of_dictionaries(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Of each variable that is set to a dictionary, and each function that returns one; assigned later
    included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for last in node.body[-1:]:
                if isinstance(last, ast.Return) and isinstance(last.value, ast.Dict):
                    yield node.name, _keys(last.value)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            yield _dotted(target), _keys(node.value)


def _keys(dictionary: ast.Dict) -> list[str]:
    return [key.value for key in dictionary.keys if isinstance(key, ast.Constant)]


def signature_of(function: ast.FunctionDef) -> inspect.Signature:
    """What `inspect.signature` would say."""
    given = function.args
    places = [*given.posonlyargs, *given.args]
    required = len(places) - len(given.defaults)
    kinds = inspect.Parameter
    parameters = [
        kinds(
            argument.arg,
            kinds.POSITIONAL_OR_KEYWORD,
            default=kinds.empty if place < required else None,
        )
        for place, argument in enumerate(places)
    ]
    if given.vararg:
        parameters.append(kinds(given.vararg.arg, kinds.VAR_POSITIONAL))
    parameters += [
        kinds(argument.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None)
        for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    if given.kwarg:
        parameters.append(kinds(given.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    """The functions at the top of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def number_returned(function: ast.FunctionDef) -> int | None:
    """How many results it returns together; None: one, or it cannot be read."""
    last = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)][-1]
    return len(last.elts) if isinstance(last, ast.Tuple) else None


@cache
def our_flash_calls(*, hopper: bool = False) -> list[Call]:
    """Of flash-attn 2, or of FlashAttention 3, whose functions have the same names."""
    return [
        call
        for place, tree in trees(*FLASH_FUNCTIONS)
        for call in calls(tree, place)
        if call.function.rpartition(".")[2] in FLASH_FUNCTIONS
        if place.endswith("flash3.py") == hopper
        if call.function.rpartition(".")[0] != "self"  # of a class that stands in for the package
    ]


def test_every_flash_function_that_is_looked_for_is_called() -> None:
    assert {call.function.rpartition(".")[2] for call in our_flash_calls()} == FLASH_FUNCTIONS


@pytest.mark.parametrize("pin", [FLASH_ATTN_OLDEST, FLASH_ATTN], ids=lambda pin: pin.version)
def test_flash_attn_is_called_as_it_is(pin: Pin) -> None:
    package = folder_of(pin) / "flash_attn"
    functions = functions_of(package / "flash_attn_interface.py")
    for call in our_flash_calls():
        function = functions[call.function.rpartition(".")[2]]
        assert call.refusal(signature_of(function)) is None
        if call.results is not None:
            assert call.results == number_returned(function), call
    exported = {
        alias.name
        for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(backends._FLASH_FUNCTIONS["flash_attn"]) <= exported


def test_flash_attention_3_is_called_as_it_is() -> None:
    functions = functions_of(folder_of(FLASH_ATTN) / "hopper" / f"{backends._FLASH3_MODULE}.py")
    made = our_flash_calls(hopper=True)
    assert {call.function.rpartition(".")[2] for call in made} == set(backends._FLASH3_FUNCTIONS)
    for call in made:
        name = call.function.rpartition(".")[2]
        if not name.startswith("_"):  # arguments of the private ones have places, see below
            assert call.refusal(signature_of(functions[name])) is None


def test_private_functions_of_flash_attention_3_are_called_as_they_are() -> None:
    functions = functions_of(folder_of(FLASH_ATTN) / "hopper" / f"{backends._FLASH3_MODULE}.py")
    signatures = {name: signature_of(functions[name]) for name in backends._FLASH3_FUNCTIONS}
    given: dict[str, dict[str, Any]] = {}

    def kernel(name: str, *results: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]]:
        def call(*arguments: Any, **named: Any) -> tuple[torch.Tensor, ...]:
            given[name] = signatures[name].bind(*arguments, **named).arguments
            return results

        return call

    heads = torch.randn(1, 2, 4, 8)
    forward, backward = "_flash_attn_forward", "_flash_attn_backward"
    results = {forward: kernel(forward, heads.transpose(1, 2), heads[..., 0]), backward: kernel(backward)}
    pair = FlashAttn3Pair(SimpleNamespace(**results))
    problem = Problem(heads, heads, heads, 0.5, causal=True)
    pair.backward(heads, problem, pair.forward(problem))
    of_backward = {"dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"}
    for name, expected in ((forward, {"q", "k", "v"}), (backward, of_backward)):
        assert given[name].pop("softmax_scale") == 0.5
        assert given[name].pop("causal") is True
        given[name].pop("deterministic", None)
        tensors = {argument for argument, value in given[name].items() if value is not None}
        assert tensors == expected


def test_transformer_engine_is_called_as_it_is() -> None:
    """By Megatron's wrappers, of which the model is made; test_transformer_engine.py constructs them."""
    sources = folder_of(TRANSFORMER_ENGINE) / "transformer_engine" / "pytorch"
    path = Path(megatron.core.extensions.__path__[0]) / "transformer_engine.py"
    classes = {
        node.name: node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    for wrapper, (file, name) in WRAPPERS.items():
        methods = {
            method.name: method
            for node in ast.parse((sources / file).read_text(encoding="utf-8")).body
            if isinstance(node, ast.ClassDef) and node.name == name
            for method in node.body
            if isinstance(method, ast.FunctionDef)
        }
        made = [call for call in calls(classes[wrapper], path.name) if call.function == "super().forward"]
        assert made, wrapper
        for call in made:  # `self` is not written where it is called
            bound = Call(call.place, call.function, call.positional + 1, call.keywords, None)
            assert bound.refusal(signature_of(methods["forward"])) is None


def loss_calls(file: str, name: str) -> list[Call]:
    """Of a backend's kernel, where the file calls it so."""
    (found,) = [tree for place, tree in trees("kernel") if place == f"lckv/losses/{file}.py"]
    made = [call for call in calls(found, file) if call.function == name]
    assert len(made) == 1
    return made


def test_liger_kernel_is_called_as_it_is() -> None:
    """Its autograd function, whose first argument is not written where it is called."""
    path = folder_of(LIGER_KERNEL) / f"{liger.MODULE.replace('.', '/')}.py"
    (forward,) = [
        method
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == liger.FUNCTION
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "forward"
    ]
    own = inspect.signature(liger.VocabParallelCrossEntropy.apply)
    assert list(own.parameters)[1:] == list(signature_of(forward).parameters)[1:]
    for call in loss_calls("liger", "kernel.apply"):
        bound = Call(call.place, call.function, call.positional + 1, call.keywords, None)
        assert bound.refusal(signature_of(forward)) is None


@pytest.mark.parametrize(
    ("used", "protocol", "line"),
    [
        (operators.LIGER_NORM, operators.LigerNormFunction, "liger_norm"),
        (operators.LIGER_SWIGLU, operators.LigerSwiGLUFunction, "liger_swiglu"),
    ],
)
def test_operators_of_liger_kernel_are_called_as_they_are(
    used: tuple[str, str], protocol: type, line: str
) -> None:
    module, function = used
    path = folder_of(LIGER_KERNEL) / f"{module.replace('.', '/')}.py"
    (forward,) = [
        method
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == function
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "forward"
    ]
    theirs, own = signature_of(forward), inspect.signature(protocol.apply)  # type: ignore[attr-defined]
    # the first is not written where it is called, and what may be left out is at the end
    assert list(own.parameters)[1:] == list(theirs.parameters)[1 : len(own.parameters)]
    (tree,) = [tree for place, tree in trees("kernel") if place == "megatron_ext/model/operators.py"]
    (caller,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == line]
    (call,) = [call for call in calls(caller, line) if call.function == "kernel.apply"]
    bound = Call(call.place, call.function, call.positional + 1, call.keywords, None)
    assert bound.refusal(theirs) is None


def test_cut_cross_entropy_is_called_as_it_is() -> None:
    package = folder_of(CUT_CROSS_ENTROPY) / cut.MODULE
    function = functions_of(package / "linear_cross_entropy.py")[cut.FUNCTION]
    for call in loss_calls("cut", "kernel"):
        assert call.refusal(signature_of(function)) is None


def torch_calls() -> list[Call]:
    """Under the functions' full names."""
    made = []
    for place, tree in trees("torch.cuda.", "torch.distributed"):
        aliases = {
            alias.asname or alias.name: alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        for call in calls(tree, place):
            first, _, rest = call.function.partition(".")
            name = f"{aliases.get(first, first)}.{rest}"
            if name.startswith(TORCH_PARTS):
                made.append(Call(call.place, name, call.positional, call.keywords, call.results))
    return made


def resolve(name: str) -> object:
    """The object behind a dotted name of torch's."""
    parts, found = name.split("."), importlib.import_module("torch")
    for part in parts[1:]:
        found = getattr(found, part)
    return found


def test_torch_is_called_as_it_is() -> None:
    made = torch_calls()
    assert len({call.function for call in made}) > 25
    refusals = [
        call.refusal(inspect.signature(resolve(call.function)))
        for call in made
        if call.function not in COMPILED
    ]
    assert [refusal for refusal in refusals if refusal is not None] == []


SOURCE = """
def run(kernel, options):
    settings = {"scale": 1.0, "causal": True}
    one, two, *rest = kernel.attend(1, 2, **settings)
    kernel.attend(1, **self._options(), drop=0.0)

def _options():
    return {"scale": 1.0}
"""


def test_calls_are_read() -> None:
    made = [call for call in calls(ast.parse(SOURCE), "here") if call.function == "kernel.attend"]
    assert made == [
        Call("here:4", "kernel.attend", 2, ("scale", "causal"), 2),
        Call("here:5", "kernel.attend", 1, ("drop", "scale"), None),
    ]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def attend(q, k, scale, causal=False): return q, k", None),
        ("def attend(q, k, *, scale, **others): return q, k", None),
        ("def attend(q, k, causal=False): pass", "unexpected keyword argument 'scale'"),
        ("def attend(q, k, v, scale, causal): pass", "missing a required argument: 'v'"),
        ("def attend(q, scale, causal): pass", "too many|multiple values"),
        ("def attend(q, k, scale, causal, *, drop): pass", "missing a required"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(source: str, said: str | None) -> None:
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    refusal = Call("here:1", "attend", 2, ("scale", "causal"), None).refusal(signature_of(function))
    if said is None:
        assert refusal is None
        assert number_returned(function) == 2
    else:
        assert any(part in str(refusal) for part in said.split("|"))
