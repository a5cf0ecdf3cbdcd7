"""`ask` and `chat`: the object of the contract, streams, turns, and the builder's model as the default."""

import io
import json
import shutil
import sys
from dataclasses import replace

import pytest

from cag.cli.ask import _print_answer
from cag.generation.answer import Answer, CacheOrigin, Piece, Timings, Usage

ANSWERED = {"answer", "citations", "usage", "timings", "cache", "model"}
USAGE = {
    "prompt_tokens",
    "cached_tokens",
    "computed_tokens",
    "completion_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "reasoning_tokens",
}
TIMINGS = {"load_s", "prefill_s", "ttft_s", "tpot_s", "total_s"}


@pytest.fixture
def ask(cag, book):
    def run(*options, question="When does the alpha gate open?"):
        return cag("ask", "book", question, "--store", book, "--max-tokens", 12, *options)

    return run


@pytest.fixture
def chat(cag, book, monkeypatch):
    def run(typed, *options):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return cag("chat", "book", "--store", book, "--max-tokens", 6, *options)

    return run


def test_ask_prints_the_object_of_the_contract(ask, cag, book, tiny_model_dir):
    answered = ask("--json").json
    shown = cag("show", "book", "--store", book, "--json").json
    assert set(answered) >= ANSWERED
    assert set(answered["usage"]) == USAGE
    assert set(answered["timings"]) >= TIMINGS
    assert answered["cache"] == {"name": "book", "digest": shown["digest"], "tier": "disk"}
    assert answered["model"] == str(tiny_model_dir)
    usage = answered["usage"]
    assert usage["cached_tokens"] == shown["num_tokens"]
    assert usage["cached_tokens"] + usage["computed_tokens"] == usage["prompt_tokens"]
    assert 0 < answered["timings"]["ttft_s"] <= answered["timings"]["total_s"]


def test_streamed_and_whole_answers_are_the_same_text(ask):
    whole = ask("--json").json
    for options in ((), ("--stream",), ("--no-stream",)):
        printed = ask(*options)
        answer, _, proof = printed.stdout.rpartition("-- first token")
        assert answer.strip().startswith(whole["answer"])
        assert f"{whole['usage']['cached_tokens']:,} cached, {whole['usage']['computed_tokens']:,} computed" in proof


def test_a_seed_makes_sampling_repeatable(ask):
    sampled = [ask("--temperature", 2, "--top-p", 0.9, "--seed", seed, "--json").json["answer"] for seed in (7, 7, 8)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_speculation_is_said_and_changes_no_answer(ask):
    plain, drafted = (ask(option, "--max-tokens", 80, "--json").json for option in ("--no-speculate", "--speculate"))
    assert plain["answer"] == drafted["answer"]
    assert plain["usage"]["drafted_tokens"] == plain["usage"]["accepted_tokens"] == 0
    assert 0 < drafted["usage"]["drafted_tokens"] >= drafted["usage"]["accepted_tokens"]
    noted = ask("--speculate", "--max-tokens", 80)
    usage = drafted["usage"]
    assert f"({usage['accepted_tokens']} of {usage['drafted_tokens']} guessed right)" in noted.stdout


def test_citations_follow_the_answer(ask, capsys):
    from cag.cli.ask import print_proof
    from cag.generation.answer import Answer, CacheOrigin, Citation, Timings, Usage

    citation = Citation("a.md", "Alpha\x1b[31m gate", "/c/a.md", "Its code\nis 4711.", 1.0)
    usage, timings = Usage(1030, 1024, 6, 2), Timings(0.01, 0.02, 0.03, 0.5, 0.6)
    print_proof(Answer("4711", (citation,), usage, timings, CacheOrigin("book", "d", "disk"), "tiny"))
    title, quote, proof = capsys.readouterr().out.splitlines()
    assert title == "[1] Alpha[31m gate (/c/a.md)"
    assert quote == '    "Its code is 4711."'
    assert "2.0 tokens/s" in proof
    assert "1,024 cached, 6 computed" in proof


def test_verbose_prints_the_sampling(ask):
    noted = ask("--verbose", "--seed", 5).stderr
    assert "max_tokens = 12" in noted
    assert "temperature = 0.0" in noted
    assert "seed = 5" in noted


def test_turns_of_a_chat_stand_behind_each_other(chat, ask):
    finished = chat("When?\n\nAnd why?\n", "--json")
    first, second = [json.loads(line) for line in finished.stdout.splitlines()]
    assert finished.exit_code == 0
    assert second["usage"]["cached_tokens"] > first["usage"]["prompt_tokens"]
    assert second["cache"]["tier"] == "device"


def test_reset_forgets_the_turns_and_quit_leaves(chat):
    finished = chat("When?\n/reset\nWhen?\n/quit\nNever asked?\n", "--json")
    first, second = [json.loads(line) for line in finished.stdout.splitlines()]
    assert second["usage"] == first["usage"]
    assert second["answer"] == first["answer"]


def test_a_chat_through_a_pipe_prints_answers_only(chat):
    printed = chat("When?\n").stdout
    assert "> " not in printed
    assert printed.count("-- first token") == 1


def test_a_question_that_does_not_fit_ends_a_piped_chat(chat):
    finished = chat(f"{'why ' * 2500}\nWhen?\n", "--json")
    assert (finished.exit_code, finished.error["code"]) == (41, "context_length_exceeded")


def test_a_question_that_does_not_fit_is_said_at_a_terminal_and_the_chat_goes_on(cag, book, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(f"{'why ' * 2500}\nWhen?\n"))
    finished = cag("chat", "book", "--store", book, "--max-tokens", 4)
    assert finished.exit_code == 0
    assert "error: prompt of" in finished.stderr
    assert finished.stdout.count("-- first token") == 1


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_ctrl_c_at_the_prompt(cag, book, monkeypatch, options):
    class Interrupted(io.StringIO):
        def readline(self, *_):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    finished = cag("chat", "book", "--store", book, *options)
    assert finished.exit_code == 130
    assert "interrupted" in (finished.error["code"] if options else finished.stderr)


def test_the_adapter_of_the_build_is_the_default(cag, corpus, tiny_model_dir, tmp_path):
    adapter = write_adapter(tiny_model_dir, tmp_path / "lora")
    options = ("--store", tmp_path / "s", "--json")
    built = cag("build", corpus, "--name", "lora", "--model", tiny_model_dir, "--adapter", adapter, *options)
    assert built.exit_code == 0
    assert cag("ask", "lora", "What?", "--max-tokens", 2, *options).exit_code == 0
    moved = shutil.move(adapter, tmp_path / "moved")
    gone = cag("ask", "lora", "What?", *options)
    assert (gone.exit_code, gone.error["code"]) == (11, "model_not_found")
    assert cag("ask", "lora", "What?", "--max-tokens", 2, "--adapter", moved, *options).exit_code == 0


def write_adapter(model_dir, folder):
    """A LoRA adapter of rank 2 with random weights on the queries."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    network = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(r=2, target_modules=["q_proj"])
    )
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    network.save_pretrained(folder)
    return folder


class Answering:
    """An answer that comes in pieces, of which an exception is the last."""

    def __init__(self, *pieces, answer=None):
        self._pieces = pieces
        self.answer = answer

    def pieces(self):
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def test_what_is_said_of_an_interrupted_answer_begins_a_line(capsys):
    with pytest.raises(KeyboardInterrupt):
        _print_answer(Answering(Piece("Half of an"), KeyboardInterrupt()), as_json=False, stream=True)
    assert capsys.readouterr().out == "Half of an\n"


THOUGHT = Answer(
    "At seven.",
    (),
    Usage(10, 6, 4, 9, reasoning_tokens=5),
    Timings(0, 0.1, 0.2, 0.1, 1, answer_ttft_s=0.7),
    CacheOrigin("book", "d", "device"),
    "tiny",
    reasoning="Well, it says seven.",
)
PIECES = Piece("", "\nWell, \x1b[31m"), Piece("\n\nAt", "it says seven.\n"), Piece(" seven.")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_thoughts_are_shown_dim_on_stderr_at_a_terminal_only(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    _print_answer(Answering(*PIECES, answer=THOUGHT), as_json=False, stream=True)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == "At seven."
    assert "9 tokens, 5 of them thoughts until 0.70 s" in printed.out
    assert printed.err == ("\x1b[2mWell, [31mit says seven.\n\x1b[0m\n" if is_terminal else "")


def test_interrupted_thoughts_leave_the_terminal_as_it_was(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        _print_answer(Answering(PIECES[0], KeyboardInterrupt()), as_json=False, stream=True)
    assert capsys.readouterr().err.endswith("\x1b[0m\n")


def test_thoughts_without_an_answer_are_said(capsys):
    cut = replace(THOUGHT, text="", finish_reason="length")
    _print_answer(Answering(answer=cut), as_json=False, stream=False)
    assert "--max-tokens" in capsys.readouterr().err


def test_a_model_is_asked_to_think(ask, chat):
    assert "think = True" in ask("--think", "--verbose").stderr
    assert "think = False" in ask("--verbose").stderr
    answered = ask("--think", "--json").json
    assert answered["reasoning"] == ""  # the tiny model has no thoughts
    assert answered["answer"] == ask("--no-think", "--json").json["answer"]
    assert json.loads(chat("When?\n", "--think", "--json").stdout)["finish_reason"]
