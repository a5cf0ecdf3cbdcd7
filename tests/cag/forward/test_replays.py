"""Steps in padded buckets: the logits of plain forwards, real pages untouched, whatever the device.

On a CPU the padded steps run one by one, which is all of them but recording and replaying; on a GPU they are recorded.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from cag import model as model_module
from cag.first_steps import record_first_steps
from cag.forward.batch import Batch
from cag.forward.replays import ROWS, StepReplays, padded_sizes
from cag.forward.step_tensors import StepSizes
from cag.machine.runtime import RuntimePlan
from cag.model import LanguageModel
from cag.residency.resident import ResidentPrefix
from cag_kernels import DensePrefix, quantize_prefix
from cag_kernels.triton.launch_ways import launch_ways
from tiny import write_tiny_model

SHARED = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
SHARED |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 257, "eos_token_id": 257}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHARED),
    "qwen2": lambda: Qwen2Config(**SHARED),
    "qwen3": lambda: Qwen3Config(**SHARED),
    "mistral": lambda: MistralConfig(**SHARED, sliding_window=150),
    "gemma3": lambda: Gemma3TextConfig(**SHARED, sliding_window=40),
}
NUM_PREFIX = 137
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


def model_of(architecture, device, root, monkeypatch):
    """A random model in float32 whose sessions run in steps."""
    plan = RuntimePlan(device.type, "float32", 1, 1, "plain", {}, "for tests")
    monkeypatch.setattr(model_module, "plan_runtime", lambda _device: plan)
    config = CONFIGS[architecture]()
    model = LanguageModel.load(
        write_tiny_model(root / "model", config=config),
        model_id="tiny",
        options=model_module.ModelOptions(device=device.type, compute_dtype="float32"),
    )
    if device.type == "cpu":
        model.run_in_steps(capture=False)
    return model


def prefix_of(model, kind, seed=0):
    """Random keys and values of every layer: numbers, or codes with exact tokens behind them."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for shape in model.kv_shapes:
        size = (2, shape.num_kv_heads, NUM_PREFIX, shape.head_dim)
        sides = torch.randn(size, generator=generator).to(model.kv_dtype).to(model.device)
        if kind == "numbers":
            layers.append((DensePrefix(*sides),))
        else:
            coded = quantize_prefix(*sides[:, :, :128].bfloat16(), key_bits=kind, value_bits=kind)
            layers.append((coded, DensePrefix(*sides[:, :, 128:].contiguous())))
    prefix = ResidentPrefix(layers, torch.zeros(NUM_PREFIX, dtype=torch.int64).numpy())
    prefix.mark_loaded()
    return prefix


def chunks_of(model, prefix, counts, seed=0):
    """New tokens behind tails of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, count in enumerate(counts):
        state = model.new_session_state(prefix)
        earlier = torch.randint(0, 250, (3 + 29 * (index % 3),), generator=generator)
        model.forward(earlier.tolist(), state)
        found.append((torch.randint(0, 250, (count,), generator=generator).tolist(), state))
    return found


def plain(model, chunks, **kwargs):
    """The same tokens by the network's own forward, sequence by sequence, nothing padded."""
    replays, decoder = model.replays, model.device_decoder
    model.replays = model.device_decoder = None
    try:
        found = [model.forward(ids, state, **kwargs) for ids, state in chunks]
    finally:
        model.replays, model.device_decoder = replays, decoder
    for ids, state in chunks:
        state.rewind(state.num_tail - len(ids))
    return torch.cat(found)


def pages_of(model, states):
    """What the real tokens of some sequences have in their pages, and everything that no step may write."""
    return [
        state.tail.gathered(layer, state.num_tail)[side].clone()
        for state in states
        for layer in range(len(model.kv_shapes))
        for side in (0, 1)
    ]


def assert_same(found, expected, within=2e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=within * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("counts", [[1, 1, 1], [7], [1, 5, 1, 30, 2], [1] * 17, [16]])
def test_padded_steps_give_the_logits_of_plain_forwards(architecture, counts, device, tmp_path, monkeypatch):
    model = model_of(architecture, device, tmp_path, monkeypatch)
    assert (model.device_decoder is None) == (architecture == "gemma3")
    prefix = prefix_of(model, "numbers")
    chunks = chunks_of(model, prefix, counts)
    expected = plain(model, chunks)
    states = [state for _, state in chunks]
    kept = pages_of(model, states)
    for _ in range(3):  # as it is, recorded, replayed
        found = model.forward_together(chunks)
        for ids, state in chunks:
            state.rewind(state.num_tail - len(ids))
        assert_same(found, expected)
        assert all(map(torch.equal, pages_of(model, states), kept))
    assert model.replays.refusal is None
    assert (model.replays.num_replayed >= 2) == (device.type == "cuda")


class Recording:
    """Stands in for a CUDA graph on a CPU: what it would leave is there already."""

    def replay(self):
        pass


@pytest.mark.parametrize("never", [False, True])
@pytest.mark.filterwarnings("ignore:steps are not recorded")
def test_where_overlapping_launches_are_not_recorded_others_are(never, tmp_path, monkeypatch):
    model = model_of("llama", torch.device("cpu"), tmp_path, monkeypatch)
    model.run_in_steps(capture=True)
    tried = []

    def recorded(replays, step):
        tried.append(launch_ways().overlaps)
        if never or tried[-1]:
            raise RuntimeError("not while capturing")
        return Recording(), replays._run(step.tensors, step.state)

    monkeypatch.setattr(StepReplays, "_recorded", recorded)
    chunks = chunks_of(model, prefix_of(model, "numbers"), [1, 1])
    expected = plain(model, chunks)
    for _ in range(3):
        assert_same(model.forward_together(chunks), expected)
        for ids, state in chunks:
            state.rewind(state.num_tail - len(ids))
    assert tried == [True, False]
    assert launch_ways().overlaps
    assert model.replays.num_replayed == (0 if never else 2)
    assert model.replays.refusal == ("not while capturing" if never else None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_any_thread_records_in_a_stream_that_nobody_else_gets(tmp_path, monkeypatch):
    """The first thing that the thread computes is what it records."""
    model = model_of("llama", torch.device("cuda"), tmp_path, monkeypatch)
    state = model.new_session_state(prefix_of(model, "numbers"))
    expected = model.forward([3], state)
    with ThreadPoolExecutor(1) as thread:
        for _ in range(2):
            state.rewind(0)
            assert_same(thread.submit(model.forward, [3], state).result(), expected)
    assert model.replays.refusal is None
    assert model.replays.num_replayed == 2
    others = {torch.cuda.Stream().cuda_stream for _ in range(64)}  # more than torch has
    assert model.replays._stream.cuda_stream not in others


def test_recordings_have_a_stream_of_their_own_and_a_handle_that_was_there(tmp_path, monkeypatch):
    """What torch would do on a GPU is only written down."""
    model = model_of("llama", torch.device("cpu"), tmp_path, monkeypatch)
    model.run_in_steps(capture=True)
    asked = []

    @contextmanager
    def graph(_graph, *, pool, stream, capture_error_mode):
        asked.append(("record", stream, capture_error_mode))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: asked.append(priority) or "own stream")
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: asked.append("handle"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: "usual stream")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _stream: None)
    prefix = prefix_of(model, "numbers")
    for count in (1, 1, 5, 5):  # two steps, each as it is and recorded
        model.forward([3] * count, model.new_session_state(prefix))
    assert asked[0] < 0  # streams of loads have the usual priority
    assert asked[1:] == ["handle", ("record", "own stream", "thread_local")] * 2


def test_a_recording_that_the_driver_refuses_leaves_the_stream_that_was(tmp_path, monkeypatch):
    """torch's own `torch.cuda.graph`, with a driver that says of a wait inside that the recording is none any more."""
    model = model_of("llama", torch.device("cpu"), tmp_path, monkeypatch)
    model.run_in_steps(capture=True)
    streams = ["usual stream"]

    class Refused(Recording):
        def capture_begin(self, *_pool, **_options):
            assert streams[-1] == "own stream"

        def capture_end(self):
            raise RuntimeError("operation failed due to a previous error during capture")

    @contextmanager
    def inside(stream):
        before = streams[-1]
        streams.append(stream)
        yield
        streams.append(before)

    for name, fake in {
        "CUDAGraph": Refused, "graph_pool_handle": object, "Stream": lambda *_, **__: "own stream", "stream": inside,
        "current_blas_handle": lambda: None, "synchronize": lambda: None, "empty_cache": lambda: None,
        "current_stream": lambda _device: streams[-1], "set_stream": streams.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    chunk = [3], model.new_session_state(prefix_of(model, "numbers"))
    expected = plain(model, [chunk])
    with pytest.warns(RuntimeWarning, match="not recorded"):
        for _ in range(2):
            assert_same(model.forward(*chunk), expected)
            chunk[1].rewind(0)
    assert "previous error" in model.replays.refusal
    assert "own stream" in streams
    assert streams[-1] == "usual stream"


@pytest.mark.parametrize("kind", [8, 4])
def test_codes_stay_codes(kind, device, tmp_path, monkeypatch):
    model = model_of("llama", device, tmp_path, monkeypatch)
    prefix = prefix_of(model, kind)
    assert prefix.num_bytes < prefix_of(model, "numbers").num_bytes / (2 if kind == 8 else 3)
    chunks = chunks_of(model, prefix, [1, 4, 1])
    expected = plain(model, chunks)
    # compiled code without tiles meets codes by 16-bit integers, Triton's kernels by numbers
    assert_same(model.forward_together(chunks), expected, within=2e-4)


def test_all_logits_of_a_question(device, tmp_path, monkeypatch):
    model = model_of("llama", device, tmp_path, monkeypatch)
    chunks = chunks_of(model, prefix_of(model, "numbers"), [21])
    expected = plain(model, chunks, num_logits=0)
    found = model.forward(*chunks[0], num_logits=0)
    assert found.shape[0] == 21
    assert_same(found, expected)


def test_without_a_prefix_and_with_more_rows_than_buckets(device, tmp_path, monkeypatch):
    model = model_of("llama", device, tmp_path, monkeypatch)
    for count in (5, ROWS[-1], ROWS[-1] + 1):
        chunks = chunks_of(model, None, [count])
        assert_same(model.forward_together(chunks), plain_after(model, chunks))


def plain_after(model, chunks):
    for ids, state in chunks:
        state.rewind(state.num_tail - len(ids))
    return plain(model, chunks)


def test_several_prefixes_share_a_step(device, tmp_path, monkeypatch):
    model = model_of("mistral", device, tmp_path, monkeypatch)
    prefixes = [prefix_of(model, "numbers", 1), prefix_of(model, 8, 2)]
    chunks = [chunk for prefix in prefixes for chunk in chunks_of(model, prefix, [1, 3])]
    expected = plain(model, chunks)
    assert not model.replays.serves(Batch([state for _, state in chunks], [1, 3, 1, 3]))
    assert_same(model.forward_together(chunks), expected)


@torch.inference_mode()
def test_padded_rows_write_to_the_scratch_page_only(tmp_path, monkeypatch):
    model = model_of("llama", torch.device("cpu"), tmp_path, monkeypatch)
    chunks = chunks_of(model, prefix_of(model, "numbers"), [1, 2, 9])
    pool, states = model.pages, [state for _, state in chunks]
    for (ids, _), state in zip(chunks, states, strict=True):
        state.begin(len(ids))  # with pages for the new tokens
    owned = {page for state in states for page in state.tail.pages}
    for side in (*pool.keys, *pool.values):
        side[[page for page in range(pool.num_pages) if page not in owned]] = torch.nan
    before = [side.clone() for side in (*pool.keys, *pool.values)]
    logits = model.forward_together(chunks)
    assert torch.isfinite(logits).all()
    for side, old in zip((*pool.keys, *pool.values), before, strict=True):
        now, then = side.nan_to_num(), old.nan_to_num()
        changed = {page for page in range(pool.num_pages) if not torch.equal(now[page], then[page])}
        assert changed <= owned | {pool.scratch_page}
        assert pool.scratch_page in changed
        assert torch.isfinite(side[pool.scratch_page][:, :4]).all()
    pool.check_integrity([state.tail.pages for state in states])


def test_steps_are_made_anew_when_pages_have_moved(device, tmp_path, monkeypatch):
    model = model_of("llama", device, tmp_path, monkeypatch)
    prefix = prefix_of(model, "numbers")
    version = model.pages.version
    kept = [state for _, state in chunks_of(model, prefix, [1] * 40)]  # the pool grows meanwhile
    assert model.pages.version > version
    chunks = [([5], state) for state in kept]
    expected = plain(model, chunks)
    for _ in range(3):
        assert_same(model.forward_together(chunks), expected)
        for _, state in chunks:
            state.rewind(state.num_tail - 1)
    del kept, chunks, state
    model.pages.check_integrity([])
    model.settle_pages()
    state = model.new_session_state(prefix)
    model.forward([1, 2], state)
    model.pages.check_integrity([state.tail.pages])


def test_a_prefix_that_is_gone_leaves_no_steps(device, tmp_path, monkeypatch):
    model = model_of("llama", device, tmp_path, monkeypatch)
    prefix = prefix_of(model, "numbers")
    model.forward([1], model.new_session_state(prefix))
    assert len(model.replays._behind) == 1
    del prefix
    assert len(model.replays._behind) == 0


def test_first_steps_are_recorded_before_anybody_asks(device, tmp_path, monkeypatch):
    model = model_of("llama", device, tmp_path, monkeypatch)
    prefix = prefix_of(model, "numbers")
    record_first_steps(model, prefix)
    before = model.replays.num_replayed
    state = model.new_session_state(prefix)
    for count in (19, 1, 1):
        model.forward([3] * count, state)
    assert model.replays.num_replayed - before == (3 if device.type == "cuda" else 0)
    del state
    model.pages.check_integrity([])


def test_buckets_hold_what_they_are_for():
    for rows in range(1, 200):
        sizes = padded_sizes(StepSizes(rows, rows, rows, 1, rows))
        assert sizes.num_rows == sizes.num_sequences == sizes.num_wanted >= rows
        assert sizes.num_pages >= rows
        assert sizes.max_rows == 1
        sizes = padded_sizes(StepSizes(rows + 1, 1, 1, rows + 1, 1))
        assert sizes.num_rows > rows
        assert sizes.num_sequences == 2
    assert len({padded_sizes(StepSizes(rows, rows, 1, 1, rows)) for rows in range(1, 257)}) == len(ROWS)
    with pytest.raises(ValueError, match="at most"):
        padded_sizes(StepSizes(257, 257, 1, 1, 257))


def test_a_step_needs_little_for_few_sessions():
    assert padded_sizes(StepSizes(1, 1, 1, 1, 1)) == StepSizes(1, 1, 4, 1, 1)
    assert padded_sizes(StepSizes(32, 1, 1, 32, 1)) == StepSizes(32, 2, 4, 32, 1)
