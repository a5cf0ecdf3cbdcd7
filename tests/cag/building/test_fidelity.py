"""Probes and what is measured at them: from the corpus itself, apart from each other, in float32, block by block."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from cag.building.fidelity import Fidelity, FidelityProbe, compare, standard_error
from cag.building.probes import NUM_PROBES, make_probes
from cag.corpus import Document
from cag.corpus.document import text_sha256
from cag.errors import InsufficientResources
from cag.forward.products import Float32Products
from cag.model import LanguageModel, ModelOptions
from cag.prefill import prefill
from cag.prompt import lay_out
from cag.residency.resident import ResidentPrefix
from tiny import tiny_config, write_tiny_model

SIZES = {key: value for key, value in tiny_config().to_dict().items() if key in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "pad_token_id", "eos_token_id",
)}  # fmt: skip
WINDOWS = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request, tmp_path_factory, home_of_models):
    config = tiny_config() if request.param == "llama" else Gemma3TextConfig(**SIZES, **WINDOWS)
    return LanguageModel.load(write_tiny_model(tmp_path_factory.mktemp(request.param), config=config), model_id="tiny")


def document(number, text):
    return Document(f"{number}.txt", f"Part {number}", f"/{number}.txt", text, text_sha256(text))


def documents(count=4, sentences=10):
    return [
        document(number, " ".join(f"Valve {100 * number + index} is turned by hand." for index in range(sentences)))
        for number in range(count)
    ]


def laid_out(model, corpus):
    layout = lay_out(model.tokenizer, model.template, corpus)
    return layout, make_probes(model.tokenizer, layout, corpus, 512)


def resident(model, layout):
    state = model.new_state(capacity=len(layout.token_ids))
    prefill(model, state, layout.token_ids.tolist())
    return ResidentPrefix.from_tail(state.tail, layout.token_ids)


def test_probes_come_from_the_corpus_and_are_enough(model):
    corpus = documents()
    layout, branches = laid_out(model, corpus)
    assert NUM_PROBES <= sum(len(branch.targets) for branch in branches) < NUM_PROBES + 64
    assert {branch.kind for branch in branches} == {"question", "continuation"}
    text = "".join(part.text for part in corpus)
    whole = model.tokenizer.decode(layout.token_ids.tolist())
    for branch in branches:
        known = branch.token_ids[-(len(branch.targets) - 1) :] if len(branch.targets) > 1 else ()
        assert known == branch.targets[:-1], "each target but the last is read as the next token"
        said = model.tokenizer.decode(branch.targets)
        assert said in (text if branch.kind == "question" else whole)
    assert make_probes(model.tokenizer, layout, corpus, 512) == branches


def test_excerpts_do_not_overlap(model):
    layout, branches = laid_out(model, documents())
    whole = model.tokenizer.decode(layout.token_ids.tolist())
    places = [
        whole.index(model.tokenizer.decode(branch.token_ids)) for branch in branches if branch.kind == "continuation"
    ]
    lengths = [len(branch.token_ids) for branch in branches if branch.kind == "continuation"]
    assert all(b - a >= length for a, b, length in zip(places, places[1:], lengths, strict=False))


@pytest.mark.parametrize("text", ["x", "One two.", "\u6c34" * 90, "word " * 30, "\n\n-\n"])
def test_short_and_strange_corpora_have_the_probes_they_can_give(model, text):
    layout, branches = laid_out(model, [document(0, text)])
    assert branches
    assert all(len(branch.token_ids) >= len(branch.targets) > 0 for branch in branches)
    probed = FidelityProbe(model, resident(model, layout), branches)
    with probed:
        assert probed.measure().mean_kl == 0


@pytest.mark.parametrize(
    "text",
    [
        "The old gate opens at seven in the morning.",
        "\u9598\u306f\u4e03\u6642\u306b\u958b\u304f",
        "- 12 litres\n- 7 bar\n- 4711 {x}",
        "red blue " * 20,
    ],
)
def test_a_short_text_is_asked_until_it_has_enough_probes(model, text):
    branches = laid_out(model, [document(0, text)])[1]
    num_probes = sum(len(branch.targets) for branch in branches)
    assert NUM_PROBES <= num_probes < NUM_PROBES + 32
    behind = {
        branch.token_ids[: len(branch.token_ids) - ahead] for branch in branches for ahead in range(len(branch.targets))
    }
    assert len(behind) == num_probes, "each stands behind other tokens"
    answers = [model.tokenizer.decode(branch.targets) for branch in branches if branch.kind == "question"]
    assert all(answer.rstrip("\ufffd") in text for answer in answers), "cut off, perhaps within a character"
    assert laid_out(model, [document(0, text)])[1] == branches


def test_every_document_of_a_short_corpus_is_asked_about(model):
    corpus = [document(number, f"Valve {number} is shut.") for number in range(3)]
    _, branches = laid_out(model, corpus)
    said = [model.tokenizer.decode(branch.targets) for branch in branches if branch.kind == "question"]
    for number in range(3):
        assert sum(f"{number} is shut." in answer for answer in said) >= 2


def test_a_text_with_enough_probes_is_asked_no_more(model, monkeypatch):
    monkeypatch.setattr("cag.building.probes._further", lambda *_: pytest.fail("asked"))
    _, branches = laid_out(model, documents())
    lengths = [(branch.kind, len(branch.token_ids), len(branch.targets)) for branch in branches]
    assert lengths[-1] == ("continuation", 32, 32)
    assert sum(kind == "question" for kind, *_ in lengths) == 4


def test_a_text_that_repeats_itself_is_asked_no_question_twice(model):
    line = "The valve is shut at night!\n"  # as many tokens as an excerpt with four more
    corpus = [document(number, line * 80 + "x" * number) for number in range(3)]
    _, branches = laid_out(model, corpus)
    assert len(set(branches)) == len(branches)
    assert NUM_PROBES <= sum(len(branch.targets) for branch in branches) < NUM_PROBES + 32


def test_branches_that_do_not_fit_the_window_are_left_out(model):
    corpus = documents()
    layout = lay_out(model.tokenizer, model.template, corpus)
    branches = make_probes(model.tokenizer, layout, corpus, 20)
    assert max(len(branch.token_ids) for branch in branches) <= 20
    assert sum(len(branch.targets) for branch in branches) >= NUM_PROBES


def test_branches_in_one_forward_are_sequences_of_their_own(model):
    layout, branches = laid_out(model, documents())
    prefix = resident(model, layout)
    chosen = [list(branch.token_ids) for branch in (branches[0], branches[-1], branches[1])]
    rows = list(range(sum(map(len, chosen))))
    together = model.forward_branches(chosen, prefix, rows)
    apart = torch.cat([model.forward(ids, model.new_state(prefix), num_logits=0) for ids in chosen])
    assert torch.allclose(together, apart, atol=2e-4 * float(apart.abs().max()))
    few = model.forward_branches(chosen, prefix, rows[-3:])  # the library may multiply few rows in another order
    assert torch.allclose(few, together[-3:], atol=1e-5 * float(apart.abs().max()))


def test_a_network_in_16_bits_is_probed_in_float32(tmp_path):
    """Against the same weights widened: rounding of the compute type must not be taken for the codec's loss."""
    directory = write_tiny_model(tmp_path / "model", config=tiny_config(hidden_size=64))
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    low = LanguageModel.load(directory, model_id="low", options=ModelOptions(compute_dtype="bfloat16"))
    corpus = documents(2, 6)
    layout, branches = laid_out(low, corpus)
    prefix = resident(low, layout)
    ids = [list(branches[-1].token_ids)]
    found = low.forward_branches(ids, prefix, list(range(len(ids[0]))))
    wide = LanguageModel.load(directory, model_id="wide", options=ModelOptions(compute_dtype="float32"))
    expected = wide.forward_branches(ids, prefix, list(range(len(ids[0]))))
    narrow = low.forward(ids[0], low.new_state(prefix), num_logits=0)
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-4 * scale < float((narrow - expected).abs().max())


def test_products_in_pieces_are_the_whole_product(monkeypatch):
    monkeypatch.setattr("cag.forward.products._PIECE_WEIGHTS", 100)
    layer = torch.nn.Linear(24, 31, dtype=torch.bfloat16)
    block = torch.randn(2, 5, 24)
    with Float32Products(), torch.inference_mode():
        found = layer(block)
    expected = block @ layer.weight.float().t() + layer.bias.float()
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)


def test_divergence_is_that_of_the_definition():
    torch.manual_seed(0)
    exact, coded = torch.randn(5, 11) * 3, torch.randn(5, 11) * 3
    targets = torch.tensor([0, 3, 10, 4, 4])
    p, q = exact.double().softmax(-1), coded.double().softmax(-1)
    divergence, same, change = compare(exact, coded, targets)
    assert torch.allclose(divergence, (p * (p / q).log()).sum(-1))
    assert same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    rows = torch.arange(5)
    assert torch.allclose(change, q[rows, targets].log().neg() - p[rows, targets].log().neg())


def test_what_is_measured_grows_with_the_error(model):
    layout, branches = laid_out(model, documents())
    prefix = resident(model, layout)
    with FidelityProbe(model, prefix, branches) as probe:
        before = probe.measure()
        found = []
        for error in (1e-3, 1e-1, 10):
            for layer in range(2):
                for side in prefix.layer(layer):
                    side += error * torch.randn_like(side)
            found.append(probe.measure())
    assert (before.mean_kl, before.p95_kl, before.top1, before.nll_change) == (0, 0, 1, 0)
    assert 0 < found[0].mean_kl < found[1].mean_kl < found[2].mean_kl
    assert found[2].top1 < 1
    assert all(fidelity.p95_kl >= fidelity.mean_kl / 4 for fidelity in found)
    assert found[0].num_probes == sum(len(branch.targets) for branch in branches)
    assert found[0].probes["answer_tokens"] + found[0].probes["continuation_tokens"] == found[0].num_probes


def test_a_full_temporary_directory_is_a_typed_error(model, monkeypatch):
    import cag.building.fidelity as fidelity

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(fidelity.tempfile, "TemporaryFile", Full)
    layout, branches = laid_out(model, documents())
    with pytest.raises(InsufficientResources, match="No space"):
        FidelityProbe(model, resident(model, layout), branches)


def test_distributions_that_were_cut_are_not_compared(model):
    """What is missing would be whatever lay in memory."""
    layout, branches = laid_out(model, documents())
    with FidelityProbe(model, resident(model, layout), branches) as probe:
        probe._exact.truncate(probe._exact.seek(0, 2) - 1)
        with pytest.raises(InsufficientResources, match="cut"):
            probe.measure()


def test_a_loss_at_few_probes_comes_with_a_warning():
    counts = {"answer_tokens": 0}
    few, enough = (Fidelity(0.1, 0.2, 0.9, number, 0.01, counts) for number in (NUM_PROBES - 1, NUM_PROBES))
    assert not few.is_judged
    assert [str(NUM_PROBES - 1) in warning for warning in few.warnings] == [True]
    assert enough.is_judged and not enough.warnings
    bits = replace(few, method="bits")
    assert bits.is_judged and not bits.warnings


def test_the_standard_error_takes_probes_of_a_branch_together():
    """Against the spread of the means of ever new branches, whose probes are alike to another degree each time."""
    generator = torch.Generator().manual_seed(0)
    counts = [32, 5, 17, 32, 1, 28, 32, 9] * 4
    for alike in (0.0, 1.0):
        draws = [
            torch.cat(
                [
                    alike * torch.rand(1, generator=generator) + torch.rand(count, generator=generator)
                    for count in counts
                ]
            )
            for _ in range(400)
        ]
        spread = torch.stack([values.mean() for values in draws]).std()
        errors = [standard_error(values.double(), counts) for values in draws]
        assert sum(errors) / len(errors) == pytest.approx(float(spread), rel=0.12)
    assert standard_error(torch.rand(5), [5]) is None
    assert standard_error(torch.zeros(6), [2, 4]) == 0


def test_fidelity_of_other_versions_is_not_taken_for_this_ones():
    stored = Fidelity(0.1, 0.2, 0.9, 256, 0.01, {"answer_tokens": 0}).to_json()
    assert Fidelity.from_json(stored) == Fidelity(**stored)
    older = {name: value for name, value in stored.items() if name != "mean_kl_se"}
    assert Fidelity.from_json(older) == Fidelity(**older)
    assert Fidelity.from_json({"mean_kl": 0.1, "p95_kl": 0.2, "top1": 0.9, "num_probes": 256}) is None
