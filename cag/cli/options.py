"""Arguments and options that several commands share, each written once. Defaults are the engine's own: an option that
is not given is not passed on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cag.cli.quantities import codec_choice, duration_s, size_bytes

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the cache.")]
PathsArgument = Annotated[
    list[str], typer.Argument(metavar="PATH", help="Files, folders, quoted globs, or JSONL files of documents.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Print the effective configuration.")]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store", help="Directory or URL (s3://, gs://, az://, file://) of the store.", show_default="$CAG_HOME/store"
    ),
]
CacheBytesOption = Annotated[
    int | None,
    typer.Option(
        "--cache-bytes",
        help="Keep at most so much of what is read from a URL in $CAG_HOME/objects; 0 keeps nothing.",
        metavar="SIZE",
        parser=size_bytes,
        show_default="10GB",
    ),
]
CodecOption = Annotated[
    str | None,  # or what its parser makes of that
    typer.Option(
        "--codec",
        help="How keys and values are encoded: an id, a configuration as JSON, or auto, which takes the smallest that "
        "stays within --max-kl.",
        metavar="CODEC",
        parser=codec_choice,
        show_default="lossless",
    ),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter", help="Directory of a LoRA adapter (peft).", exists=True, file_okay=False, resolve_path=True
    ),
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.", show_default="auto")]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="Compute in auto, float32, bfloat16 or float16.", show_default="auto"),
]
SkipErrorsOption = Annotated[
    bool, typer.Option("--skip-errors", help="List files that cannot be read, and go on without them.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Keep the cache although it misses its --max-kl.")]
BuildersModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Catalogue name, hub id, directory or GGUF file; it must be the builder's.",
        show_default="the builder's",
    ),
]
MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", help="At most this many tokens an answer.", show_default="128", min=1)
]
ThinkOption = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think",
        help="Let a reasoning model think before it answers; it has 4,096 tokens more for that.",
        show_default="no-think",
    ),
]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", help="0 is greedy.", show_default="0", min=0.0)
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        help="Sample from the likeliest, up to this probability.",
        show_default="1",
        min=0.0,
        max=1.0,
    ),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.", show_default=False)]
SpeculateOption = Annotated[
    bool | None,
    typer.Option(
        "--speculate/--no-speculate",
        help="Guess what an answer quotes, and run the guess along: the same answer, sooner.",
        show_default="where it is the same to the bit",
    ),
]
TtlOption = Annotated[
    float | None,
    typer.Option(
        "--ttl",
        help="Let the cache expire after this long: 90s, 30m, 12h, 7d, 2w.",
        metavar="DURATION",
        parser=duration_s,
        show_default="never",
    ),
]
MaxBytesOption = Annotated[
    int | None,
    typer.Option(
        "--max-bytes",
        help="Keep the store below this size: evict caches, least worth first. Like 20GB or 512MiB.",
        metavar="SIZE",
        parser=size_bytes,
        envvar="CAG_MAX_BYTES",
        show_default="no limit",
    ),
]


def given(**options: Any) -> dict[str, Any]:
    """The options that have a value, for a callee that knows the defaults of the others."""
    return {name: value for name, value in options.items() if value is not None}
