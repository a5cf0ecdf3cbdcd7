"""Rows of `cag bench store` as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cag_bench.table import ratio_cell


def header(summary: Mapping[str, Any]) -> list[str]:
    """Columns: encode and decode for each number of cores, then loads."""
    cores = list(summary["rows"][0]["encode"]) if summary["rows"] else []
    speeds = [f"{work}, {count} core{'s' if count != '1' else ''}" for work in ("encode", "decode") for count in cores]
    reads = ["read cold, in pieces", "read cold, whole files"]
    loads = [*reads, "load cold", "load warm", "first load", "cold load / longer of reading and decoding", "by files"]
    codes = ["load cold, in codes", "the same / longer of reading and keeping", "by files"]
    return ["codec", "MB", "raw / stored", "relative error", *speeds, "encode / prefill", *loads, *codes]


def table_rows(summary: Mapping[str, Any]) -> Iterator[list[str]]:
    """A row a codec: GB of raw keys and values a second, milliseconds."""
    for row in summary["rows"]:
        speeds = [f"{row[work][count]['raw_gb_per_s']:.2f}" for work in ("encode", "decode") for count in row[work]]
        names = ("read_cold", "read_files_cold", "load_cold", "load_warm")
        times = [f"{1e3 * row['seconds'][name]['p50']:.0f}" for name in names]
        codes = row["seconds"].get("load_cold_codes")
        size = row["stored_bytes"]
        yield [
            row["label"],
            f"{size / 1e6:.1f}",
            f"{row['raw_bytes'] / size:.2f}",
            f"{row['relative_error']:.2g}",
            *speeds,
            f"{row['encode_over_prefill']:.2f}",
            *times,
            f"{1e3 * row['first_load_s']:.0f}",
            ratio_cell(row["cold_over_longer"]),
            ratio_cell(row["cold_over_longer_of_files"]),
            "" if codes is None else f"{1e3 * codes['p50']:.0f}",
            "" if codes is None else ratio_cell(row["codes_over_longer"]),
            "" if codes is None else ratio_cell(row["codes_over_longer_of_files"]),
        ]


def notes(rows: Sequence[Mapping[str, Any]], bound: bool) -> list[str]:
    """What a reader must know beside the figures."""
    found = [
        "Speeds are GB of uncompressed keys and values a second, from memory to memory, medians; encoding is of all "
        "layers and chunks, without what a codec prepares once. On the most cores it is set over the prefill of the "
        "same tokens, which ran once for all codecs.",
        "Relative error: the length of what decoding gets wrong over that of all keys and values; what it does to "
        "answers is measured by `cag bench quality`.",
        "Milliseconds are medians. A load opens, verifies and decodes into buffers that were touched before; the first "
        "load is warm, and has what a codec prepares from its basis in it.",
        "In codes: as the engine loads them on a CPU that attends to codes; the codec's bytes are moved to where they "
        "belong and not decoded to numbers. Keeping alone is that move from memory to memory.",
        "Ratios are taken sample by sample; reading alone is in pieces as large, and as many at once, as a load reads, "
        "or by as many whole files at once.",
    ]
    if not bound:
        found.append("Threads cannot be bound to cores here: the numbers of cores are those of threads.")
    kept = [row["label"] for row in rows if not row["page_cache_dropped"]]
    if kept:
        found.append(f"The page cache could NOT be dropped before every cold sample of: {', '.join(kept)}.")
    else:
        found.append("The page cache was dropped for the cache's files before each cold sample.")
    return found


def markdown(summary: Mapping[str, Any]) -> str:
    """The table with what it was measured on above and the notes below."""
    machine = summary["machine"]
    lines = [
        "# Codecs and loads",
        "",
        f"- machine: {machine['processor']}, {machine['cores']} cores",
        f"- code: {summary['commit']}",
        f"- keys and values: {summary['model']}, {summary['num_tokens']} tokens",
        "",
    ]
    columns = header(summary)
    lines += [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *table_rows(summary))]
    return "\n".join([*lines, "", *(f"- {note}" for note in summary["notes"])]) + "\n"
