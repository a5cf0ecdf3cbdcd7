"""Registry of formats by file name. Loaders are imported when a file of their format is first met."""

from __future__ import annotations

import importlib
from pathlib import PurePath
from typing import cast

from cag.corpus.loaders.base import CorpusLimits, Extract, Loader, Source, check_text_size, unreadable
from cag.errors import CorpusError

__all__ = ["CorpusLimits", "Extract", "Loader", "Source", "format_of", "load_source", "unreadable"]

_SUFFIXES = {
    "text": ".txt .text .log .adoc .asciidoc .org .tex .textile .wiki",
    "markdown": ".md .markdown .mdown .mdx .mkd .qmd .rmd",
    "rst": ".rst .rest",
    "html": ".html .htm .xhtml",
    "pdf": ".pdf",
    "docx": ".docx .docm",
    "jsonl": ".jsonl .ndjson .jsonl.gz .ndjson.gz",
    "code": """
        .py .pyi .pyx .js .mjs .cjs .jsx .ts .tsx .vue .svelte .go .rs .java .kt .kts .scala .groovy .gradle .c .h .cc
        .cpp .cxx .hpp .hh .hxx .cu .cuh .m .mm .cs .fs .vb .swift .dart .rb .php .pl .pm .lua .r .jl .ex .exs .erl .hs
        .clj .ml .mli .zig .nim .sh .bash .zsh .fish .ps1 .bat .cmd .sql .css .scss .sass .less .graphql .gql .proto
        .thrift .toml .yaml .yml .json .json5 .jsonc .ini .cfg .conf .properties .xml .xsd .xsl .csv .tsv .tf .hcl .nix
        .cmake .mk .dockerfile .diff .patch .j2 .jinja .tmpl .bzl .bazel .asm .s .f90 .sol .vim .el .lisp .scm""",
}
_NAMES = {
    "text": "readme license licence notice authors contributors changelog changes news todo install copying",
    "code": "makefile dockerfile containerfile justfile rakefile gemfile procfile jenkinsfile",
}
_FORMAT_OF_SUFFIX = {suffix: name for name, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
_FORMAT_OF_NAME = {file_name: name for name, file_names in _NAMES.items() for file_name in file_names.split()}


def format_of(path: PurePath) -> str | None:
    """The format that the name of a file tells, or None for an unknown one."""
    name = path.name.lower()
    suffixes = PurePath(name).suffixes[-2:]
    of_suffix = _FORMAT_OF_SUFFIX.get("".join(suffixes)) or _FORMAT_OF_SUFFIX.get("".join(suffixes[-1:]))
    return of_suffix or _FORMAT_OF_NAME.get(name)


def load_source(source: Source, format_name: str) -> list[Extract]:
    """The texts of one file, none of them over the limits.

    Raises: UnreadableDocument, also for whatever a library raises on malformed content.
    """
    loader = cast(Loader, importlib.import_module(f"{__name__}.{format_name}").load)
    try:
        extracts = loader(source)
    except CorpusError:
        raise
    except RecursionError as error:
        raise unreadable(source.name, "its structure is nested too deeply") from error
    # Parsers meet hostile bytes here, and their libraries raise whatever the defect hits first.
    except Exception as error:
        reason = f"not a well-formed {format_name} file ({type(error).__name__}: {error})"
        raise unreadable(source.name, reason, "Repair or convert it.") from error
    for extract in extracts:
        check_text_size(source, len(extract.text.encode("utf-8", "replace")))
    return extracts
