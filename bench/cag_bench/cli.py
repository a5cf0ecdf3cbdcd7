"""`cag bench`: the commands of the benchmark suite. Torch and the engine are imported when a command runs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cag.cli.options import JsonOption
from cag_bench.arm_names import DEFAULT_ARMS

if TYPE_CHECKING:
    from cag.engine import Engine
    from cag_bench.progress import ConsoleProgress
    from cag_bench.ttft import TtftResult

PIPE_WIDTH = 140  # columns of the table where there is no terminal

CorpusOption = Annotated[
    list[str], typer.Option(help="Folder, file, glob or JSON lines of documents; may be repeated.")
]
QuestionsOption = Annotated[Path, typer.Option(help="JSON lines: question, answers, doc_ids; may be gzip.")]
OutOption = Annotated[Path | None, typer.Option(help="Folder of the results.", show_default="results/COMMAND-TIME")]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Catalogue name, hub id, directory or GGUF file.", show_default="qwen2.5-coder-1.5b-instruct"),
]
StoreOption = Annotated[
    Path | None,
    typer.Option(help="Store to build in and to reuse.", show_default="a temporary one beside the results"),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="Compute in auto, float32, bfloat16 or float16.")]
CodecsOption = Annotated[
    list[str] | None,
    typer.Option("--codec", help="ID, ID@STEP or a JSON object; may be repeated.", show_default="a ladder"),
]
SeedOption = Annotated[int, typer.Option(help="Seeds the order of the arms.")]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def bench() -> None:
    """Measure this machine: speed, always beside the quality of the same run."""


@app.command()
def ttft(
    corpus: CorpusOption,
    questions: QuestionsOption,
    arms: Annotated[
        str, typer.Option(help="Comma-separated; also cag-ram, rag-dense@K, any K; or `all`.")
    ] = DEFAULT_ARMS,
    n: Annotated[int | None, typer.Option("--n", help="Only the first N questions.", show_default="all")] = None,
    full_n: Annotated[
        int | None, typer.Option(help="full-prefill: only the first M of these.", show_default="all")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 32,
    out: OutOption = None,
    model: ModelOption = None,
    codec: Annotated[str, typer.Option(help="Codec of the cache.")] = "lossless",
    prefix_tokens: Annotated[
        int | None, typer.Option(help="Cut the corpus to N tokens, exactly.", show_default="not cut")
    ] = None,
    store: StoreOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """First token: a cache against reading everything again and RAG."""
    from cag.building.options import check_codec
    from cag_bench.arm_names import parse_arms
    from cag_bench.corpus import read_corpus
    from cag_bench.questions import load_questions
    from cag_bench.ttft import TtftOptions, run_ttft

    options = TtftOptions(parse_arms(arms), n, full_n, max_tokens, seed, codec, prefix_tokens)
    check_codec(codec)
    asked, documents = load_questions(questions), read_corpus(corpus)
    folder = _folder(out, "ttft")
    with _loaded(model, store, folder, device, dtype) as (engine, progress):
        result = run_ttft(engine, documents, asked, options, folder, progress)
    if as_json:
        typer.echo(json.dumps(result.printed(), ensure_ascii=False))
    else:
        _print_table(result, folder)


@app.command()
def kernels(
    out: OutOption = None,
    device: DeviceOption = "auto",
    prefix_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the prefix.", show_default="85000 on a GPU, 4096 on a CPU")
    ] = None,
    sessions: Annotated[str, typer.Option(help="How many at once, on a GPU; comma-separated.")] = "1,16,64",
    samples: Annotated[int, typer.Option(help="Timings of each kernel and reference.")] = 25,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Each kernel against its references and the floor of its bytes.

    What a kernel computes is checked before it is timed.
    """
    from cag.machine.runtime import choose_device
    from cag_bench.kernels import KernelOptions, markdown, run_kernels
    from cag_bench.progress import ConsoleProgress

    options = KernelOptions(prefix_tokens, _counts("sessions", sessions), samples, seed)
    folder = _folder(out, "kernels")
    with ConsoleProgress() as progress:
        summary = run_kernels(choose_device(device), options, folder, progress)
    _print_summary(summary, markdown, folder, as_json=as_json)


@app.command()
def gpu(
    out: OutOption = None,
    device: DeviceOption = "auto",
    small: Annotated[
        bool, typer.Option("--small", help="Tiny sizes, for a test of the run itself; on a CPU too.")
    ] = False,
    prefix_tokens: Annotated[int | None, typer.Option(help="Tokens of the prefix.", show_default="85000")] = None,
    sessions: Annotated[int | None, typer.Option(help="Sessions at once.", show_default="64")] = None,
    samples: Annotated[int | None, typer.Option(help="Timings of each figure.", show_default="20")] = None,
    joint_layers: Annotated[
        int | None, typer.Option(help="Layers of a group of the codec transform.", show_default="4")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds of the whole run.", show_default="450")] = None,
    as_json: JsonOption = False,
) -> None:
    """A model of Llama 3.1 8B's shape on a GPU, with random weights.

    First tokens, many sessions, caches in codes, decoding.
    """
    from dataclasses import replace

    from cag.errors import UsageError
    from cag.machine.runtime import choose_device
    from cag_bench.gpu.run import run_gpu
    from cag_bench.gpu.shapes import SMALL, GpuOptions
    from cag_bench.gpu.table import markdown
    from cag_bench.progress import ConsoleProgress

    given = {"prefix_tokens": prefix_tokens, "sessions": sessions, "samples": samples, "budget_s": budget}
    given |= {"joint_layers": joint_layers}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options = replace(SMALL if small else GpuOptions(), **changes)
    chosen, folder = choose_device(device), _folder(out, "gpu")
    if chosen.type == "cpu" and not small:
        raise UsageError("a network of this size needs a CUDA device.", hint="Use --small to try the run on a CPU.")
    with ConsoleProgress() as progress:
        summary = run_gpu(chosen, options, folder, progress)
    _print_summary(summary, markdown, folder, as_json=as_json)


@app.command()
def quality(
    corpus: Annotated[
        list[str], typer.Option(help="A corpus each: folder, file, glob or JSON lines; may be repeated.")
    ],
    codec: CodecsOption = None,
    tokens: Annotated[int, typer.Option(help="Corpora are cut to so many tokens.")] = 6144,
    max_kl: Annotated[str, typer.Option(help="Limits for which the smallest codec is named.")] = "0.001,0.004,0.02",
    out: OutOption = None,
    model: ModelOption = None,
    store: StoreOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Codecs: bytes of a whole cache against what its answers lose."""
    from cag_bench.codec_list import LADDER, parse_codecs
    from cag_bench.corpus import read_corpus
    from cag_bench.quality import QualityOptions, run_quality
    from cag_bench.quality_table import markdown

    options = QualityOptions(parse_codecs(codec or LADDER), tokens, _floats("max-kl", max_kl))
    corpora = [read_corpus([path]) for path in corpus]
    folder = _folder(out, "quality")
    with _loaded(model, store, folder, device, dtype) as (engine, progress):
        summary = run_quality(engine, corpora, options, folder, progress)
    _print_summary(summary, markdown, folder, as_json=as_json)


@app.command(name="store")
def store_command(
    corpus: CorpusOption,
    codec: CodecsOption = None,
    tokens: Annotated[int, typer.Option(help="The corpus is cut to so many tokens.")] = 6144,
    cores: Annotated[
        str | None,
        typer.Option(
            help="How many cores codecs are timed on; comma-separated.", show_default="1,2, as far as there are"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Timings of each figure.")] = 7,
    out: OutOption = None,
    model: ModelOption = None,
    store: StoreOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Codecs from memory to memory; loads against reading and decoding."""
    from cag_bench.codec_list import parse_codecs
    from cag_bench.corpus import read_corpus
    from cag_bench.store_bench import CODECS, StoreOptions, run_store
    from cag_bench.store_table import markdown

    options = StoreOptions(parse_codecs(codec or CODECS), tokens, _cores(cores), samples, seed)
    documents = read_corpus(corpus)
    folder = _folder(out, "store")
    with _loaded(model, store, folder, "cpu", "auto") as (engine, progress):
        summary = run_store(engine, documents, options, folder, progress)
    _print_summary(summary, markdown, folder, as_json=as_json)


@app.command()
def serve(
    corpus: CorpusOption,
    questions: QuestionsOption,
    sessions: Annotated[str, typer.Option(help="How many at once; comma-separated.")] = "1,4,16",
    max_tokens: Annotated[int, typer.Option(help="Tokens of every answer; stop tokens are not heeded.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds of all sizes, alone and together.")] = 5,
    speculate: Annotated[
        bool, typer.Option("--speculate", help="Each with drafts too; stop tokens are heeded, --max-tokens is a limit.")
    ] = False,
    out: OutOption = None,
    model: ModelOption = None,
    codec: Annotated[str, typer.Option(help="Codec of the cache.")] = "lossless",
    store: StoreOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Many sessions on one prefix, together against one by one.

    Tokens a second and first tokens; the answers are compared.
    """
    from cag.building.options import check_codec
    from cag_bench.corpus import read_corpus
    from cag_bench.questions import load_questions
    from cag_bench.serve import ServeOptions, run_serve
    from cag_bench.serve_table import markdown

    options = ServeOptions(_counts("sessions", sessions), max_tokens, rounds, seed, codec, speculate)
    check_codec(codec)
    asked, documents = load_questions(questions), read_corpus(corpus)
    folder = _folder(out, "serve")
    with _loaded(model, store, folder, device, dtype) as (engine, progress):
        summary = run_serve(engine, documents, asked, options, folder, progress)
    _print_summary(summary, markdown, folder, as_json=as_json)


def _floats(option: str, text: str) -> list[float]:
    """Numbers with commas between. Raises: UsageError."""
    from cag.errors import UsageError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--{option} is {text!r}, not numbers with commas between.") from error


def _counts(option: str, text: str) -> list[int]:
    """Whole numbers with commas between. Raises: UsageError."""
    from cag.errors import UsageError

    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UsageError(f"--{option} is {text!r}, not numbers with commas between.")
    return [int(part) for part in text.split(",")]


@app.command()
def peers(
    corpus: CorpusOption,
    questions: QuestionsOption,
    vllm_python: Annotated[str | None, typer.Option(help="Python of an environment with vLLM.")] = None,
    llama_python: Annotated[str | None, typer.Option(help="Python of an environment with llama-cpp-python.")] = None,
    llama_gguf: Annotated[
        list[str] | None, typer.Option(help="The same model as GGUF; repeated, a llama.cpp for each.")
    ] = None,
    vllm_eager: Annotated[
        bool, typer.Option("--vllm-eager", help="vLLM without its compiled graph: starts sooner.")
    ] = False,
    n: Annotated[int, typer.Option("--n", help="The first N questions.")] = 8,
    prefix_tokens: Annotated[int, typer.Option(help="Tokens of the prefix, exactly.")] = 4096,
    codecs: Annotated[str, typer.Option(help="Codecs of our caches, comma-separated.")] = "lossless,int8",
    tokens: Annotated[int, typer.Option(help="Tokens of an answer, exactly.")] = 16,
    sessions: Annotated[int, typer.Option(help="Questions at once; 0: none.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds of all sessions at once.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Threads of each peer.", show_default="the cores")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer of a peer.")] = 600.0,
    pause: Annotated[
        bool, typer.Option("--pause", help="When all is ready, wait for Enter before the clock starts.")
    ] = False,
    out: OutOption = None,
    model: Annotated[str, typer.Option(help="Catalogue name, hub id or directory.")] = "smollm2-135m-instruct",
    store: StoreOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """A cache on this CPU beside vLLM and llama.cpp, same tokens."""
    from cag.building.options import check_codec
    from cag.machine.runtime import usable_cores
    from cag.models import fetch_model
    from cag_bench.corpus import read_corpus
    from cag_bench.peers.run import PeersOptions, run_peers
    from cag_bench.peers.specs import named_peers
    from cag_bench.peers.table import markdown
    from cag_bench.questions import load_questions

    names = tuple(name.strip() for name in codecs.split(",") if name.strip())
    for name in names:
        check_codec(name)
    num_threads = usable_cores() if threads is None else threads
    options = PeersOptions(prefix_tokens, names, n, tokens, sessions, rounds, num_threads, timeout, seed)
    asked, documents = load_questions(questions), read_corpus(corpus)
    folder = _folder(out, "peers")
    files = fetch_model(model)
    specs = named_peers(vllm_python, llama_python, llama_gguf or [], files.directory, eager=vllm_eager)
    with _loaded(model, store, folder, "cpu", "auto") as (engine, progress):
        wait = _wait_for_enter if pause else lambda: None
        summary = run_peers(engine, documents, asked, specs, options, folder, progress, wait)
    _print_summary(summary, markdown, folder, as_json=as_json)


def _wait_for_enter() -> None:
    typer.echo("Ready. Press Enter to start the clock.", err=True)
    input()


def _cores(given: str | None) -> tuple[int, ...]:
    """Numbers of cores that this process has. Raises: UsageError."""
    from cag.errors import UsageError
    from cag.machine.runtime import usable_cores

    usable = usable_cores()
    wanted = tuple(range(1, min(2, usable) + 1)) if given is None else tuple(_counts("cores", given))
    if max(wanted, default=0) > usable:
        raise UsageError(f"--cores has {max(wanted)}, and there are {usable} to run on.")
    return wanted


def _folder(out: Path | None, command: str) -> Path:
    """Where results go; made and tried, that nothing is measured for a folder that takes none. Raises: UsageError."""
    from cag.errors import UsageError

    folder = out or Path("results") / f"{command}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"no folder for the results at {folder}: {error.strerror}.", hint="Choose another --out."
        ) from error
    return folder


@contextmanager
def _loaded(
    model: str | None, store: Path | None, folder: Path, device: str, dtype: str
) -> Iterator[tuple[Engine, ConsoleProgress]]:
    """An engine over `store_folder`, and the progress that its loading was shown with."""
    from cag.engine import Engine
    from cag.models import DEFAULT_MODEL
    from cag_bench.progress import ConsoleProgress
    from cag_bench.store_folder import store_folder

    with store_folder(store, folder) as store_directory, ConsoleProgress() as progress:
        progress("load model", 0, 0)
        engine = Engine.load(
            model or DEFAULT_MODEL, store=store_directory, device=device, dtype=dtype, progress=progress
        )
        yield engine, progress


def _print_table(result: TtftResult, folder: Path) -> None:
    from rich.console import Console

    from cag_bench.table import origin_lines, outcome_lines, terminal_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    console.print(terminal_table(result.summary))
    summary = result.summary
    for line in [*origin_lines(summary), *outcome_lines(summary), *summary["notes"], f"Results: {folder}"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_summary(
    summary: dict[str, Any], markdown: Callable[[dict[str, Any]], str], folder: Path, *, as_json: bool
) -> None:
    """One object, or its tables and where the files are."""
    text = json.dumps(summary, ensure_ascii=False) if as_json else f"{markdown(summary).rstrip()}\n\nResults: {folder}"
    typer.echo(text)
