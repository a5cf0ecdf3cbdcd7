from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from cag.errors import UsageError
from cag.prompt import lay_out
from cag_bench import exact_prefix
from cag_bench.cli import app
from cag_bench.corpus import read_corpus
from cag_bench.errors import PeerDied, PeerNonsense, PeerRefused, PeerTimeout, PrefixRecomputed
from cag_bench.exact_prefix import cut_corpus
from cag_bench.full_answers import answers_of_full_length
from cag_bench.peers.measure import PeerSample, SessionsSample, drawn
from cag_bench.peers.parties import DISK, MEMORY, AskedQuestion, PeerParty, PeerSessions
from cag_bench.peers.process import PeerProcess, peer_environment
from cag_bench.peers.run import PeersOptions, run_peers
from cag_bench.peers.specs import SCRIPTS, PeerLimits, PeerSpec, named_peers, read_facts
from cag_bench.peers.summary import party_figures, question_ratios, sessions_ratios
from cag_bench.questions import load_questions

FAKE = Path(__file__).with_name("fake_peer.py")
QUESTION = AskedQuestion("q", "What?", [5, 6, 7])


def fake_spec(name: str = "fake") -> PeerSpec:
    return PeerSpec(name, FAKE, sys.executable, (MEMORY, DISK), {})


@pytest.fixture
def start(tmp_path):
    started = []

    def make(mode: str = "well") -> PeerProcess:
        process = PeerProcess("fake", [sys.executable, str(FAKE), mode], tmp_path / "fake.log", 1)
        started.append(process)
        return process

    yield make
    for process in started:
        process.close()


def make_peer_sample(party: str, index: int, ttft_s: float, source: str = MEMORY) -> PeerSample:
    return PeerSample(party, source, index, 0, "q", 3, 0.0, ttft_s, ttft_s / 10, (1,), 100, None, (0.0,), 0.0)


def test_a_peer_answers_with_its_own_times(start):
    reply = PeerParty("fake memory", start(), MEMORY, 30).ask(QUESTION, 4)
    assert (reply.load_s, reply.ttft_s, reply.tpot_s) == (0.0, 0.5, 0.25)
    assert (reply.token_ids, reply.cached_tokens, reply.page_cache_dropped) == ((5, 5, 5, 5), 100, None)


def test_the_state_of_a_peer_is_dropped_from_memory_before_each_question(start, tmp_path):
    state = tmp_path / "state"
    state.write_bytes(b"x" * 10_000)
    reply = PeerParty("fake disk", start(), DISK, 30, state).ask(QUESTION, 4)
    assert reply.ttft_s == 0.625
    assert reply.page_cache_dropped in (True, False)


def test_many_sessions_have_one_clock(start):
    reply = PeerSessions("fake", start(), 30).ask_all([QUESTION, AskedQuestion("r", "Why?", [8])], 3)
    assert reply.total_s == 2.0
    assert reply.token_ids == ((5, 5, 5), (8, 8, 8))


def test_a_peer_that_dies_is_named_with_its_last_words(start):
    with pytest.raises(PeerDied, match="fake ended with code 7") as caught:
        PeerParty("fake memory", start("dies"), MEMORY, 30).ask(QUESTION, 4)
    assert "out of luck" in str(caught.value)
    assert caught.value.facts["peer"] == "fake"


def test_a_dead_peer_stays_an_error(start):
    party = PeerParty("fake memory", start("dies"), MEMORY, 30)
    for _ in range(2):
        with pytest.raises(PeerDied):
            party.ask(QUESTION, 4)


def test_a_peer_that_hangs_is_ended(start):
    process = start("hangs")
    with pytest.raises(PeerTimeout, match=r"within 0\.2 s"):
        PeerParty("fake memory", process, MEMORY, 0.2).ask(QUESTION, 4)
    with pytest.raises(PeerDied):
        process.request({"do": "ask"}, 30)


def test_a_peer_that_cannot_be_started_is_an_error(tmp_path):
    with pytest.raises(PeerDied, match="cannot be started"):
        PeerProcess("fake", [str(tmp_path / "no-python"), str(FAKE)], tmp_path / "log", 1)


@pytest.mark.parametrize("mode", ["babbles", "list", "short", "nan", "negative"])
def test_nonsense_is_no_figure(start, mode):
    with pytest.raises(PeerNonsense, match="peer fake"):
        PeerParty("fake memory", start(mode), MEMORY, 30).ask(QUESTION, 4)


def test_a_forgotten_session_is_nonsense(start):
    with pytest.raises(PeerNonsense, match="no 2 answers"):
        PeerSessions("fake", start("forgets"), 30).ask_all([QUESTION, QUESTION], 4)


def test_a_peer_that_reads_its_prefix_again_is_no_cache_to_compare_with(start):
    with pytest.raises(PrefixRecomputed, match="vllm memory: 0 of the 100 tokens"):
        PeerParty("vllm memory", start("forgets"), MEMORY, 10.0, prefix_tokens=100).ask(QUESTION, 3)
    assert PeerParty("vllm memory", start(), MEMORY, 10.0, prefix_tokens=128).ask(QUESTION, 3).cached_tokens == 100


def test_an_error_of_the_peer_is_passed_on(start):
    with pytest.raises(PeerRefused, match="no room"):
        PeerParty("fake memory", start("refuses"), MEMORY, 30).ask(QUESTION, 4)


def test_a_state_that_was_promised_must_be_there(start):
    answer = {"versions": {}, "settings": {}, "read_s": 1.0, "state_path": "/nowhere/state"}
    with pytest.raises(PeerNonsense, match="state"):
        read_facts(answer, fake_spec(), start())


def test_a_peer_sees_none_of_our_packages_and_sleeps_when_idle():
    found = peer_environment({"PYTHONPATH": "/ours", "VIRTUAL_ENV": "/ours", "HOME": "/home"}, 2)
    assert "PYTHONPATH" not in found
    assert "VIRTUAL_ENV" not in found
    assert found["HOME"] == "/home"
    assert (found["OMP_WAIT_POLICY"], found["OMP_NUM_THREADS"]) == ("passive", "2")


def test_the_loop_of_the_scripts_speaks_the_protocol_and_keeps_prints_out_of_it(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(
        "import os\nfrom peer_loop import serve\n"
        "def ask(what):\n    print('noise'); os.write(1, b'more noise\\n')\n    return {'said': what}\n"
        "serve({'ask': ask})\n"
    )
    lines = [{"do": "ask", "what": 1}, {"do": "dance"}, {"do": "ask", "what": 2}]
    done = subprocess.run(
        [sys.executable, str(script)],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
        timeout=60,
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"said": 1},
        {"error": "KeyError: 'dance'"},
        {"said": 2},
    ]
    assert "more noise" in done.stderr


def test_a_corpus_is_cut_to_exactly_the_tokens_that_are_wanted(tiny_engine, corpus_dir):
    model, corpus = tiny_engine.model, read_corpus([str(corpus_dir)])
    whole = len(lay_out(model.tokenizer, model.template, corpus.documents).token_ids)
    empty = len(lay_out(model.tokenizer, model.template, ()).token_ids)
    wanted = (whole + empty) // 2
    cut = cut_corpus(corpus, model.tokenizer, model.template, wanted)
    assert len(lay_out(model.tokenizer, model.template, cut.documents).token_ids) == wanted
    for document, original in zip(cut.documents, corpus.documents, strict=False):
        assert original.text.startswith(document.text)
    with pytest.raises(UsageError, match="fewer than"):
        cut_corpus(corpus, model.tokenizer, model.template, whole + 1)
    prompt = len(lay_out(model.tokenizer, model.template, ()).token_ids)
    with pytest.raises(UsageError, match="no cut"):
        cut_corpus(corpus, model.tokenizer, model.template, prompt + 1)


def test_a_cut_below_the_prompt_is_refused_before_any_document_is_tokenized(tiny_engine, corpus_dir, monkeypatch):
    model, laid_out = tiny_engine.model, []

    def counting(tokenizer, template, documents):
        laid_out.append(len(documents))
        return lay_out(tokenizer, template, documents)

    monkeypatch.setattr(exact_prefix, "lay_out", counting)
    with pytest.raises(UsageError, match="the prompt alone has"):
        cut_corpus(read_corpus([str(corpus_dir)]), model.tokenizer, model.template, 50)
    assert set(laid_out) == {0}


def test_inside_no_answer_ends_early(tiny_engine):
    stop_ids = tiny_engine.model.stop_ids
    with answers_of_full_length(tiny_engine.model):
        assert tiny_engine.model.stop_ids == frozenset()
    assert tiny_engine.model.stop_ids == stop_ids


def test_orders_are_drawn_from_the_key():
    orders = {tuple(party for _, party in drawn("abcd", str(key))) for key in range(20)}
    assert len(orders) > 5
    assert drawn("abcd", "0") == drawn("abcd", "0")
    assert [position for position, _ in drawn("abcd", "0")] == [0, 1, 2, 3]


def test_ratios_pair_ours_with_peers_that_have_the_prefix_in_the_same_place():
    samples = [
        make_peer_sample(party, index, seconds * (index + 1), source)
        for index in range(3)
        for party, seconds, source in [
            ("cag-hot@int8", 1.0, MEMORY),
            ("cag-disk@int8", 3.0, DISK),
            ("peer memory", 2.0, MEMORY),
            ("peer disk", 4.0, DISK),
        ]
    ]
    ratios = question_ratios(samples)
    assert set(ratios["ttft_s"]) == {"cag-hot@int8/peer memory", "cag-disk@int8/peer disk"}
    assert ratios["ttft_s"]["cag-hot@int8/peer memory"] == {"p50": 0.5, "ci95": None, "n": 3}
    assert ratios["tpot_s"]["cag-disk@int8/peer disk"]["p50"] == pytest.approx(0.75)


def test_answers_of_peers_are_scored_as_those_of_arms():
    question = AskedQuestion("q", "Which two?", [5], ("the pump, the gate",), ("pump", "gate"))
    samples = [make_peer_sample("vllm memory", 0, 1.0)]
    for text, containment in (("Gate and pump.", 1.0), ("Only the pump.", 0.0)):
        figures = party_figures(samples, samples, [question], lambda _, text=text: text)
        assert figures["containment"] == containment


@pytest.fixture
def llama_cpp_peer(monkeypatch):
    """The script, with a library that has nothing."""
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("llama_cpp_peer")
    for name in ("llama_cpp_peer", "peer_loop"):
        sys.modules.pop(name, None)


def test_llama_cpp_never_gets_more_rows_than_its_batch_holds(llama_cpp_peer, monkeypatch):
    monkeypatch.setattr(llama_cpp_peer, "BLOCK_TOKENS", 4)
    rooms = {name: [None] * 4 for name in ("token", "pos", "n_seq_id", "logits")}
    context = llama_cpp_peer.Context.__new__(llama_cpp_peer.Context)
    context.handle, context.batch = None, SimpleNamespace(**rooms, seq_id=[[None] for _ in range(4)], n_tokens=0)
    read = []

    def decode(_handle, batch):
        read.extend(batch.token[: batch.n_tokens])
        return 0

    monkeypatch.setattr(llama_cpp_peer.lib, "llama_decode", decode, raising=False)
    monkeypatch.setattr(context, "_choice", lambda place: 100 + context.batch.token[place])
    rows = [(token, token, 0, token in (2, 5, 8)) for token in range(9)]
    assert context.run(rows) == [102, 105, 108]
    assert read == list(range(9))


def test_ratios_of_sessions_are_ours_over_the_peer_round_by_round():
    rounds = [
        SessionsSample(party, index, 0, 2, 8, 8 / rate, rate * (index + 1), ((1,),), (0.0,), 0.0)
        for index in range(3)
        for party, rate in [("cag@int8", 40.0), ("llama.cpp", 10.0)]
    ]
    assert sessions_ratios(rounds) == {"cag@int8/llama.cpp": {"p50": 4.0, "ci95": None, "n": 3}}


def test_peers_come_from_the_interpreters_that_were_given(tmp_path):
    ggufs = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path in ggufs:
        path.touch()
    assert named_peers(None, None, [], tmp_path, eager=False) == []
    specs = named_peers("/vllm/python", "/llama/python", [str(path) for path in ggufs], tmp_path, eager=True)
    assert [spec.name for spec in specs] == ["vllm", "llama.cpp-a", "llama.cpp-b"]
    request = specs[0].preparation([1, 2], PeerLimits(2, 512, 16), tmp_path)
    assert request["prefix_ids"] == [1, 2]
    assert request["eager"] is True
    assert "state_path" not in request
    assert "state_path" in specs[1].preparation([1, 2], PeerLimits(2, 512, 16), tmp_path)
    for spec in specs:
        assert spec.script.is_file()
    with pytest.raises(UsageError, match="--llama-gguf"):
        named_peers(None, "/llama/python", [], tmp_path, eager=False)
    with pytest.raises(UsageError, match="same name"):
        other = tmp_path / "other" / "a.gguf"
        other.parent.mkdir()
        other.touch()
        named_peers(None, "/llama/python", [str(tmp_path / "a.gguf"), str(other)], tmp_path, eager=False)
    with pytest.raises(UsageError, match="no file"):
        named_peers(None, "/llama/python", [str(tmp_path / "c.gguf")], tmp_path, eager=False)


@pytest.mark.parametrize(
    "changes",
    [{"num_tokens": 1}, {"num_questions": 0}, {"codecs": ()}, {"codecs": ("int8",) * 2}, {"num_sessions": -1}],
)
def test_bad_options_are_usage_errors(changes):
    with pytest.raises(UsageError):
        PeersOptions(**changes)


@pytest.fixture
def num_prefix_tokens(tiny_engine, corpus_dir):
    """A size that the corpus can be cut to."""
    model, corpus = tiny_engine.model, read_corpus([str(corpus_dir)])
    return len(lay_out(model.tokenizer, model.template, corpus.documents).token_ids) - 10


@pytest.fixture
def run(tiny_engine, corpus_dir, questions_file, num_prefix_tokens, tmp_path):
    corpus = read_corpus([str(corpus_dir)])

    def call():
        options = PeersOptions(num_prefix_tokens, ("lossless",), 2, 3, 3, 2, 1, 30.0)
        events = []
        questions = load_questions(questions_file)
        summary = run_peers(
            tiny_engine, corpus, questions, [fake_spec()], options, tmp_path / "out",
            lambda stage, *_: events.append(stage), lambda: events.append("clock"),
        )  # fmt: skip
        return summary, events

    return call


def test_a_run_writes_rows_of_all_parties_on_the_same_prefix(run, num_prefix_tokens, tmp_path):
    summary, events = run()
    assert set(summary["parties"]) == {"cag-hot@lossless", "cag-disk@lossless", "fake memory", "fake disk"}
    for name in ("cag-hot@lossless", "cag-disk@lossless"):
        assert summary["parties"][name]["cached_tokens"] == num_prefix_tokens
    assert set(summary["ratios"]["ttft_s"]) == {"cag-hot@lossless/fake memory", "cag-disk@lossless/fake disk"}
    assert summary["sessions"]["cag@lossless"]["num_tokens"] == 9
    assert summary["ratios"]["tokens_per_s"]["cag@lossless/fake"]["n"] == 2
    assert summary["peers"]["fake"]["settings"]["num_sessions"] == 3
    assert summary["peers"]["fake"]["state_bytes"] == 5 * num_prefix_tokens
    assert events.index("warm-up") < events.index("clock") < events.index("measure questions")

    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["sample"] * 8 + ["sessions"] * 4 + ["run"]
    for row in rows:
        assert row["machine"]["cores"] >= 1
        assert row["peers"]["fake"]["versions"] == {"fake": "1"}
    assert all(len(row["token_ids"]) == 3 for row in rows if row["kind"] == "sample")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| cag-hot@lossless/fake memory | ttft_s |" in table
    assert "vllm was left out" in table
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "fake.log", "results.jsonl", "summary.json", "table.md",
    ]  # fmt: skip


def test_sessions_answer_as_a_question_alone(run, tmp_path):
    run()
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    alone = {row["question_index"]: row["token_ids"] for row in rows if row.get("party") == "cag-hot@lossless"}
    together = next(row["token_ids"] for row in rows if row.get("party") == "cag@lossless")
    assert [alone[0], alone[1]] == together[:2]


def test_the_command_runs_without_peers_and_says_so(
    tiny_model_dir, num_prefix_tokens, corpus_dir, questions_file, tmp_path
):
    base = ["peers", "--corpus", corpus_dir, "--questions", questions_file, "--model", tiny_model_dir]
    rest = [
        "--prefix-tokens",
        num_prefix_tokens,
        "--codecs",
        "lossless",
        "--n",
        "1",
        "--tokens",
        "2",
        "--sessions",
        "0",
    ]
    arguments = [str(part) for part in [*base, *rest, "--pause", "--out", tmp_path / "out"]]
    result = CliRunner().invoke(app, arguments, input="\n")
    assert result.exit_code == 0, result.output
    assert "llama.cpp was left out" in result.stdout
    assert "| cag-hot@lossless | 1 |" in result.stdout
    assert "Press Enter" in result.stderr
