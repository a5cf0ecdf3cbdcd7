"""The demo: pull a model, read the sample handbook into a cache, ask it, and time the first token against RAG.

Run by `make demo`; everything it does is also a `cag` command, named as it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from rich.console import Console

import cag
from cag.cli.progress import shown_progress
from cag_bench.arm_names import parse_arms
from cag_bench.corpus import read_corpus
from cag_bench.progress import ConsoleProgress
from cag_bench.questions import load_questions
from cag_bench.table import origin_lines, terminal_table
from cag_bench.text_metrics import containment
from cag_bench.ttft import TtftOptions, run_ttft

HANDBOOK = Path(__file__).parent / "handbook"
DOCS, QUESTIONS = HANDBOOK / "docs", HANDBOOK / "questions.jsonl"
ARMS = "cag-hot,cag-disk,full-prefill,rag-bm25@3,rag-hybrid@3"
ASKED = ("handbook-02", "handbook-03", "handbook-01")

console = Console(soft_wrap=True, highlight=False)
if not console.is_terminal:
    console = Console(soft_wrap=True, highlight=False, width=140)  # room for the table in logs


def step(text: str, command: str) -> None:
    """Say what comes, and the command that does the same."""
    console.print(f"\n[bold]{text}[/bold]  [dim]$ {command}[/dim]")


def load_engine(model: str, store: Path | None) -> cag.Engine:
    """The engine, after pulling the model where it is not here yet."""
    step("Model", f"cag pull {model}")
    with shown_progress("bytes") as report:
        engine = cag.Engine.load(model, store=store, progress=report)
    plan = engine.model.plan
    console.print(f"{model} on {plan.device}, computing in {engine.model.compute_dtype}; {plan.reason}")
    return engine


def build(engine: cag.Engine) -> None:
    """Read the handbook into a cache."""
    step("Build", "cag build examples/handbook/docs --name handbook")
    with shown_progress("tokens") as report:
        built = engine.build(
            [DOCS], name="handbook", on_progress=lambda p: report(p.stage, p.done_tokens, p.total_tokens)
        )
    console.print(
        f"{built.num_documents} documents, {built.num_tokens} tokens ({built.reused_tokens} of them from the store) in "
        f"{built.total_s:.1f} s; {built.raw_bytes / 1e6:.0f} MB of keys and values stored in "
        f"{built.stored_bytes / 1e6:.0f} MB; mean KL to the uncompressed cache {built.fidelity.mean_kl:.6f}"
    )


def ask(engine: cag.Engine) -> None:
    """Three questions, their answers, and the proof."""
    items = {item["qid"]: item for item in map(json.loads, QUESTIONS.read_text().splitlines())}
    with engine.open("handbook") as prefix:
        for item in (items[qid] for qid in ASKED):
            step("Ask", f'cag ask handbook "{item["question"]}"')
            answer = prefix.ask(item["question"], max_tokens=32)
            verdict = "as expected" if containment(answer.text, item["answers"]) else f"expected {item['answers'][0]}"
            console.print(f"[green]{answer.text}[/green]  ({verdict})")
            for citation in answer.citations:
                console.print(f"  from {citation.doc_id}: “{citation.quote}”", style="dim")
            usage, timings = answer.usage, answer.timings
            console.print(
                f"  {usage.cached_tokens} tokens from the cache, {usage.computed_tokens} computed; first token after "
                f"{timings.ttft_s:.3f} s",
                style="dim",
            )


def bench(engine: cag.Engine, num_questions: int, out: Path) -> None:
    """First-token times, question by question, on the same model object."""
    step("First token", "cag bench ttft --corpus examples/handbook/docs --questions examples/handbook/questions.jsonl")
    options = TtftOptions(parse_arms(ARMS), n=num_questions, full_n=1, max_tokens=8)
    with ConsoleProgress() as progress:
        result = run_ttft(
            engine, read_corpus([os.path.relpath(DOCS)]), load_questions(QUESTIONS), options, out, progress
        )
    console.print(terminal_table(result.summary))
    for line in [*origin_lines(result.summary), *result.summary["notes"], f"Samples, table and plot: {out}"]:
        console.print(line, markup=False)


def main() -> None:
    """Parse the options and run the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--num-questions", type=int, default=3, help="questions of the first-token table")
    parser.add_argument("--out", type=Path, default=Path("results") / "demo")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cag-demo-") as store:
        engine = load_engine(arguments.model, Path(store))
        build(engine)
        ask(engine)
        bench(engine, arguments.num_questions, arguments.out)
    console.print(f"\nThe demo took {time.perf_counter() - begin:.0f} s, installation not counted.")


if __name__ == "__main__":
    main()
