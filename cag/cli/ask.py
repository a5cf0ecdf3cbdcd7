"""`cag ask` and `cag chat`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cag.cli.opening import ModelChoice, load_engine_of, store_at
from cag.cli.options import (
    AdapterOption,
    BuildersModelOption,
    CacheBytesOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxTokensOption,
    NameArgument,
    SeedOption,
    SpeculateOption,
    StoreOption,
    TemperatureOption,
    ThinkOption,
    TopPOption,
    VerboseOption,
    given,
)
from cag.cli.output import DimmedNote, note, note_configuration, one_line, print_json, printable, report_error

if TYPE_CHECKING:
    from cag.generation.answer import Answer
    from cag.generation.generate import SamplingOptions
    from cag.generation.session import AnswerStream

PROMPT = "> "
QUIT, RESET = "/quit", "/reset"

StreamOption = Annotated[
    bool, typer.Option("--stream/--no-stream", help="Print the answer piece by piece, as it comes; never with --json.")
]


def ask(
    name: NameArgument,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, in one argument.")],
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    speculate: SpeculateOption = None,
    think: ThinkOption = None,
    stream: StreamOption = True,
    model: BuildersModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    store: StoreOption = None,
    cache_bytes: CacheBytesOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer one question; then citations and timings."""
    engine = load_engine_of(
        store_at(store, cache_bytes), name, ModelChoice(model, adapter, device, dtype), verbose=verbose
    )
    options = _sampling(
        verbose,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        speculate=speculate,
        think=think,
    )
    started_at = time.perf_counter()
    with engine.open(name) as prefix:
        answering = prefix.session().stream(question, options, started_at=started_at)
        _print_answer(answering, as_json=as_json, stream=stream)


def chat(
    name: NameArgument,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    speculate: SpeculateOption = None,
    think: ThinkOption = None,
    stream: StreamOption = True,
    model: BuildersModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    store: StoreOption = None,
    cache_bytes: CacheBytesOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Ask one question after the other; each answer knows those before it.

    One question a line. /reset forgets what was said; /quit or the end of input leaves.
    """
    engine = load_engine_of(
        store_at(store, cache_bytes), name, ModelChoice(model, adapter, device, dtype), verbose=verbose
    )
    options = _sampling(
        verbose,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        speculate=speculate,
        think=think,
    )
    with engine.open(name) as prefix:
        session = prefix.session()
        while (question := _read_question(as_json=as_json)) != QUIT:
            if question == RESET:
                session = prefix.session()
            elif question:
                with _said_at_terminal(as_json=as_json):
                    _print_answer(session.stream(question, options), as_json=as_json, stream=stream)


def _sampling(verbose: bool, **options: Any) -> SamplingOptions:
    """Raises: UsageError for a value out of its range."""
    from cag.generation.generate import SamplingOptions

    sampling = SamplingOptions(**given(**options))
    note_configuration(verbose, **asdict(sampling))
    return sampling


@contextlib.contextmanager
def _said_at_terminal(*, as_json: bool) -> Iterator[None]:
    """A question that cannot be answered ends a script, but not a conversation."""
    from cag.errors import RequestError

    try:
        yield
    except RequestError as error:
        if not sys.stdin.isatty():
            raise
        report_error(error, as_json=as_json, verbose=False)


def _read_question(*, as_json: bool) -> str:
    """The next line, stripped; `QUIT` at the end of input. Asked for at a terminal only."""
    prompt = ""
    if sys.stdin.isatty() and not as_json:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        prompt = PROMPT
    try:
        return input(prompt).strip()
    except EOFError:
        return QUIT


def _print_answer(answering: AnswerStream, *, as_json: bool, stream: bool) -> None:
    """Run an answer to its end and print it with citations and timings."""
    begun = False
    try:
        with DimmedNote() as thoughts:
            for piece in answering.pieces():
                if stream and not as_json:
                    thoughts.add(piece.reasoning)
                    text = printable(piece.text) if begun else printable(piece.text).lstrip()
                    if text:
                        thoughts.end()
                    begun = begun or bool(text)
                    print(text, end="", flush=True)
    except BaseException:
        if begun:
            print(flush=True)  # what is said of it begins a line
        raise
    answer = answering.answer
    if as_json:
        print_json(answer.to_json())
        return
    print("" if stream else printable(answer.text))
    if answer.usage.reasoning_tokens and not answer.text:
        note("the model did not come to an answer" + (": see --max-tokens" if answer.finish_reason == "length" else ""))
    print_proof(answer)


def print_proof(answer: Answer) -> None:
    """Citations, then where the tokens came from and where the time went."""
    for number, citation in enumerate(answer.citations, start=1):
        print(f"[{number}] {one_line(citation.title)} ({one_line(citation.path)})")
        print(f'    "{one_line(citation.quote)}"')
    usage, timings = answer.usage, answer.timings
    speed = f" at {1 / timings.tpot_s:.1f} tokens/s" if timings.tpot_s else ""
    thought = f", {usage.reasoning_tokens} of them thoughts" if usage.reasoning_tokens else ""
    thought += f" until {timings.answer_ttft_s:.2f} s" if thought and timings.answer_ttft_s else ""
    drafted = f" ({usage.accepted_tokens} of {usage.drafted_tokens} guessed right)" if usage.drafted_tokens else ""
    load = f", beside a load of {timings.load_s:.2f} s from {answer.cache.tier}" if timings.load_s else ""
    print(
        f"-- first token {timings.ttft_s:.2f} s (question {timings.prefill_s:.2f} s{load}); "
        f"{usage.completion_tokens} tokens{thought}{drafted}{speed}; "
        f"total {timings.total_s:.2f} s; "
        f"prompt {usage.prompt_tokens:,} tokens: {usage.cached_tokens:,} cached, {usage.computed_tokens:,} computed"
    )
