"""Grammars made ready for one tokenizer, by llguidance, and kept for the next request that has them."""

import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

from lckv.generation import grammar_trial
from lckv.generation.constraints import Constraint
from lckv.generation.detokenize import TokenTexts
from lckv.generation.grammar import Grammar, json_rule

TRIAL_SECONDS = 5.0
"""Seconds in which a grammar must compile."""

_KEPT = 64
"""Compiled grammars that are kept when nobody uses them."""

_SAID = 300
"""Characters of the library's message that are passed on."""


class GrammarError(ValueError):
    """A grammar that cannot be held to, and why."""


class CompiledGrammar:
    """A grammar that answers can begin with. Any thread may use it."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._lock = matcher, threading.Lock()

    def begin(self) -> Constraint:
        """For one answer."""
        with self._lock:
            return Constraint(self._matcher.deep_copy())


class Grammars:
    """Of one engine. Any thread may ask."""

    def __init__(self, texts: TokenTexts, *, vocabulary: int, ends: frozenset[int]) -> None:
        """`vocabulary`: tokens of the model, of which the tokenizer may have fewer; `ends`: those that end an
        answer."""
        self.texts, self._vocabulary, self._ends = texts, vocabulary, ends
        self._tokenizer: Any = None
        self._compiling = threading.Lock()  # also of the tokenizer
        self._lock = threading.Lock()  # of what follows; nobody holds it for long
        self._alive: WeakValueDictionary[Grammar, CompiledGrammar] = WeakValueDictionary()
        self._recent: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Made ready, or taken from those that are. As long as somebody holds it, it need not be made again.

        Takes up to `TRIAL_SECONDS`, in which a grammar is tried in a process of its own. Raises GrammarError.
        """
        compiled = self._ready(grammar)
        if compiled is not None:
            return compiled
        library = _library()
        lark = _lark(library, grammar)
        _try(library, lark, self._vocabulary if grammar.kind == "lark" else 0)
        with self._compiling:
            return self._keep(grammar, self._compile(library, lark))

    def _ready(self, grammar: Grammar) -> CompiledGrammar | None:
        with self._lock:
            compiled = self._alive.get(grammar)
        return None if compiled is None else self._keep(grammar, compiled)

    def _keep(self, grammar: Grammar, compiled: CompiledGrammar) -> CompiledGrammar:
        with self._lock:
            self._alive[grammar] = self._recent[grammar] = compiled
            self._recent.move_to_end(grammar)
            if len(self._recent) > _KEPT:
                self._recent.popitem(last=False)
        return compiled

    def _compile(self, library: ModuleType, lark: str) -> CompiledGrammar:
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer(library)
        limits = grammar_trial.limits(library)
        matcher = library.LLMatcher(self._tokenizer, lark, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(_said(matcher.get_error()))
        return CompiledGrammar(matcher)

    def _make_tokenizer(self, library: ModuleType) -> Any:
        contents = [self.texts.bytes_of(token) for token in range(self._vocabulary)]
        for token in self._ends:
            contents[token] = None
        ends = sorted(self._ends)
        if not ends:  # the library needs one; no model gives it
            ends = [len(contents)]
            contents.append(None)
        return grammar_trial.vocabulary(library, contents, ends)


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise GrammarError(
            f"a grammar needs the extra 'serve': pip install 'lckv-megatron[serve]' ({error})"
        ) from error
    return llguidance


def _lark(library: ModuleType, grammar: Grammar) -> str:
    """The grammar in the library's language. Where only one text can follow, the model still chooses its
    tokens."""
    head = '%llguidance {"no_forcing": true}\n'
    if grammar.kind == "lark":
        return head + grammar.text
    if grammar.kind == "regex":
        of_regex = json.loads(library.LLMatcher.grammar_from_regex(grammar.text))
        return f"{head}{of_regex['grammars'][0]['lark_grammar']}"
    try:
        schema = json.loads(grammar.text)
    except ValueError as error:
        raise GrammarError(f"the schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise GrammarError(f"the schema is {grammar.text[:_SAID]}; it must be a JSON object")
    return f"{head}start: {json_rule(schema)}"


def _try(library: ModuleType, lark: str, tokens: int) -> None:
    """Compile it where it can do no harm; it may name `tokens` tokens. Raises GrammarError."""
    folder = Path(str(library.__file__)).parent.parent
    command = [sys.executable, "-I", "-S", grammar_trial.__file__, str(folder), str(tokens)]
    try:
        ran = subprocess.run(command, input=lark.encode(), capture_output=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        raise GrammarError(
            f"it is too complex: it was not compiled after {TRIAL_SECONDS:g} seconds"
        ) from None
    problem = ran.stdout.decode("utf-8", "replace")
    if problem:
        raise GrammarError(_said(problem))
    if ran.returncode or ran.stderr:
        raise GrammarError(f"it is too complex: compiling it ended with status {ran.returncode}")


def _said(problem: str) -> str:
    """What the library says, without the place in a grammar that the user has not seen."""
    lines = [line.strip() for line in re.sub(r"^at \d+\(\d+\): ", "", problem).splitlines()]
    shown = [line for line in lines if line and not re.match(r"\d+ \||\^|<", line)]
    return " ".join(shown)[:_SAID]
