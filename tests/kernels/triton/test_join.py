"""Launches that join their own parts, ask for their next tile, and overlap: the results are those of the plain ways.

Every part is NaN before it is written, so one that is read too soon, or by nobody, shows. `test_steps` and the other
tests of these kernels run the ways that are the default here too.
"""

import pytest
import torch
from test_cascade import make_tails, plain_paged

from cag_kernels import DensePrefix, PagedTails
from cag_kernels.prefix_reference import cascade_attention_reference, prefix_attention_reference, query_positions
from cag_kernels.triton.launch import attend
from cag_kernels.triton.launch_ways import LaunchWays, launch_ways, launching
from cag_kernels.triton.rows import add_and_norm_on_device, gate_on_device, rotate_and_store_on_device
from oracle import assert_close, make_prefix, moved, normal, plain_prefix_attention

INT4, INT8 = ({"key_bits": bits, "value_bits": bits, "group_channels": 64, "num_exact": 3} for bits in (4, 8))
MIXED = INT4 | {"key_bits": 8}
KINDS = {"int4": INT4, "int8": INT8, "int8 keys": MIXED}
PROCESSORS = 6  # for 9 programs a key/value head
PLAIN = LaunchWays(touches=False, joins=False, overlaps=False, ahead_bytes=0)
MASKS = [(None, None), (40, 5.0)]


@pytest.fixture
def merges(monkeypatch):
    """How often parts were joined by a launch of its own."""
    counted = []
    from cag_kernels.triton import launch as triton_launch

    merge = triton_launch.merge_parts
    monkeypatch.setattr(triton_launch, "merge_parts", lambda *args: counted.append(args) or merge(*args))
    return counted


def zeros(device, count=2):
    return torch.zeros(count, dtype=torch.int32, device=device)


@pytest.mark.parametrize("num_queries, num_tokens", [(1, 1), (2, 63), (1, 577), (2, 577)])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("window, softcap", MASKS)
def test_a_prefix(device, merges, kind, num_tokens, num_queries, window, softcap):
    """3 and 6 rows of a key/value head."""
    kind = kind | {"num_exact": min(3, num_tokens)}
    prefix, query = make_prefix(kind, 2, num_tokens, 128, None), normal(6, num_queries, 128, dtype=torch.bfloat16)
    positions = num_tokens + torch.arange(num_queries, dtype=torch.int32)
    kwargs = {"scale": 128**-0.5, "window": window, "softcap": softcap}
    expected = prefix_attention_reference(query.double(), prefix, positions=positions, **kwargs)
    plain = plain_prefix_attention(query, prefix, positions=positions, **kwargs)
    on_device, arrivals = [moved(part, device) for part in (query, prefix, positions)], zeros(device)
    found = attend(*on_device[:2], None, PROCESSORS, positions=on_device[2], **kwargs, arrivals=arrivals)
    assert_close(found, expected, plain)
    assert not merges
    assert not arrivals.any()


@pytest.mark.parametrize("num_q_heads, num_queries", [(2, 1), (2, 2), (4, 4)])
def test_any_number_of_rows_up_to_eight(device, merges, num_q_heads, num_queries):
    """1, 2 and 8 rows of a key/value head."""
    prefix, query = make_prefix(INT4, 2, 200, 64, None), normal(num_q_heads, num_queries, 64, dtype=torch.bfloat16)
    expected = prefix_attention_reference(query.double(), prefix, scale=0.125)
    plain = plain_prefix_attention(query, prefix, scale=0.125)
    masks = {"scale": 0.125, "positions": None, "window": None, "softcap": None}
    found = attend(query.to(device), moved(prefix, device), None, PROCESSORS, **masks, arrivals=zeros(device))
    assert_close(found, expected, plain)
    assert not merges


@pytest.mark.parametrize("lengths, counts", [([5], [1]), ([300, 3], [1, 1]), ([7, 300], [0, 2])])
@pytest.mark.parametrize("kind", [INT4, INT8], ids=["int4", "int8"])
@pytest.mark.parametrize("window, softcap", MASKS)
def test_tails_go_along(device, merges, lengths, counts, kind, window, softcap):
    """One session, two, and one whose tail takes two programs beside one that asks nothing; a piece in numbers too."""
    tails, coded = make_tails(2, 64, torch.bfloat16, 16, lengths, counts), make_prefix(kind, 2, 150, 64, None)
    recent, query = DensePrefix(*normal(2, 2, 9, 64, dtype=torch.bfloat16)), normal(6, 2, 64, dtype=torch.bfloat16)
    query = query[:, : sum(counts)]
    kwargs = {"scale": 0.125, "window": window, "softcap": softcap}
    expected = cascade_attention_reference(query.double(), [coded, recent], tails, **kwargs)
    positions = query_positions(tails, 159, query.shape[1])
    lses, outs = [], []
    for piece, first in ((coded, 0), (recent, 150)):
        out, lse = plain_prefix_attention(query, piece, positions=positions - first, **kwargs)
        outs, lses = [*outs, out], [*lses, lse]
    own = plain_paged(query, tails, **kwargs)
    weights = torch.softmax(torch.stack([*lses, own[1]]), 0).to(query.dtype)
    plain = (weights[..., None] * torch.stack([*outs, own[0]])).sum(0)
    on_device, arrivals = [moved(part, device) for part in (query, coded, recent, tails, positions)], zeros(device)
    found, _ = attend(
        on_device[0], on_device[1:3], on_device[3], PROCESSORS, positions=on_device[4], **kwargs,
        dtype=torch.bfloat16, arrivals=arrivals,
    )  # fmt: skip
    assert not merges
    assert not arrivals.any()
    assert_close([found], [expected], [plain])


def test_queries_of_no_session_see_the_prefix_only(device, merges):
    tails, coded = make_tails(2, 64, torch.bfloat16, 16, [20], [1]), make_prefix(INT4, 2, 150, 64, None)
    query = normal(6, 2, 64, dtype=torch.bfloat16)
    kwargs = {"scale": 0.125, "positions": None, "window": None, "softcap": None}
    on_device = [moved(part, device) for part in (query, coded, tails)]
    found = attend(*on_device, PROCESSORS, **kwargs, arrivals=zeros(device))
    alone = attend(on_device[0][:, 1:], on_device[1], None, PROCESSORS, **kwargs, arrivals=zeros(device))
    assert not merges
    for both, one in zip(found, alone, strict=True):
        torch.testing.assert_close(both[:, 1:], one, atol=2e-2, rtol=0)
        assert not torch.isnan(both).any()


@pytest.mark.parametrize("reason", ["rows", "tails", "numbers", "the way", "nothing to count with"])
def test_what_does_not_join_is_merged(device, merges, reason):
    lengths = [900] * 3 if reason == "tails" else [20]
    tails, counts = make_tails(2, 64, torch.bfloat16, 16, lengths, [1] * len(lengths)), zeros(device)
    kind = "plain" if reason == "numbers" else INT4
    prefix, query = make_prefix(kind, 2, 70, 64, torch.bfloat16), normal(6, 3, 64, dtype=torch.bfloat16)
    query = {"rows": normal(18, 1, 64, dtype=torch.bfloat16), "tails": query[:2]}.get(reason, query[:, :1])
    on_device = [moved(part, device) for part in (query, prefix, tails)]
    kwargs = {"scale": 0.125, "positions": None, "window": None, "softcap": None}
    ways = launch_ways()._replace(joins=reason != "the way")
    with launching(ways):
        found, _ = attend(*on_device, 2, **kwargs, arrivals=None if reason == "nothing to count with" else counts)
    assert len(merges) == 1
    expected = cascade_attention_reference(query.double(), prefix, tails, scale=0.125)
    torch.testing.assert_close(found.cpu().double(), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_touching_changes_no_bit(device, kind):
    """Rows of keys that do not lie side by side too, and a last tile that is not full."""
    prefix, query = make_prefix(kind, 2, 520, 128, None), normal(6, 2, 128, dtype=torch.bfloat16)
    wide = [
        torch.cat([part, torch.full_like(part[:, :, :9], 77)], 2)[:, :, : part.shape[2]] for part in prefix[::3][:2]
    ]
    spread = prefix._replace(key_codes=wide[0], value_codes=wide[1])
    kwargs = {"scale": 128**-0.5, "positions": None, "window": None, "softcap": None}
    found = []
    for touches in (True, False):
        for part in (prefix, spread):
            with launching(launch_ways()._replace(touches=touches)):
                found.append(attend(query.to(device), moved(part, device), None, 2, **kwargs))
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(lse, found[0][1])


def test_a_missed_part_would_show(device):
    """Counting that says too soon that all parts are there; programs run one behind the other in the interpreter."""
    if device.type == "cuda":
        pytest.skip("compiled kernels cannot be changed by a test")
    prefix, query = make_prefix(INT4, 2, 577, 128, None), normal(6, 1, 128, dtype=torch.bfloat16)
    kwargs = {"scale": 0.1, "positions": None, "window": None, "softcap": None}
    assert not attend(query, prefix, None, PROCESSORS, **kwargs, arrivals=zeros(device))[0].isnan().any()
    arrivals = zeros(device)
    arrivals += 1  # one that never came
    assert attend(query, prefix, None, PROCESSORS, **kwargs, arrivals=arrivals)[0].isnan().any()


@pytest.mark.parametrize("kind", [INT4, INT8], ids=["int4", "int8"])
def test_many_launches_find_all_parts(device, kind):
    """On a GPU: thousands of launches that fill it, recorded and not, over parts that are NaN before; each has the bits
    of the first, as the order of parts is fixed whoever is the last."""
    native = device.type == "cuda"
    num_tokens, rounds, processors = (60_000, 40, 132) if native else (400, 1, 2)
    heads, group = (8, 4) if native else (2, 2)
    prefix = make_prefix(kind, heads, num_tokens, 128, None)
    query = normal(heads * group, 1, 128, dtype=torch.bfloat16)
    tails = make_tails(heads, 128, torch.bfloat16, 16, [90], [1])
    query, prefix, tails = (moved(part, device) for part in (query, prefix, tails))
    kwargs = {"scale": 128**-0.5, "positions": None, "window": None, "softcap": None, "dtype": torch.bfloat16}
    arrivals = zeros(device, heads)

    def launch():
        return attend(query, prefix, tails, processors, **kwargs, arrivals=arrivals)

    with launching(PLAIN):
        apart = launch()
    first = launch()
    torch.testing.assert_close(first[0], apart[0], atol=4e-3, rtol=2e-2)  # other splits, another rounding
    torch.testing.assert_close(first[1], apart[1], atol=1e-3, rtol=0)
    wrong = torch.zeros((), dtype=torch.int64, device=device)

    def some():
        for _ in range(10 if native else 2):
            found = launch()
            wrong.add_(sum((part != other).sum() for part, other in zip(found, first, strict=True)))

    for _ in range(rounds):
        some()
    if native:
        graph, _ = recorded(some)
        for _ in range(20 * rounds):
            graph.replay()
    assert wrong.item() == 0
    assert not arrivals.any()


def steps_of_a_layer(device, num_rows):
    """A function that runs layers: small steps, attention and products, each reads what the launch before it wrote."""
    size, heads, kv_heads, head_dim = 384, 4, 2, 64
    projections = normal((heads + 2 * kv_heads) * head_dim, size, dtype=torch.bfloat16, scale=size**-0.5)
    output = normal(size, heads * head_dim, dtype=torch.bfloat16, scale=size**-0.5)
    widened = normal(2 * 512, size, dtype=torch.bfloat16, scale=size**-0.5)
    narrowed = normal(size, 512, dtype=torch.bfloat16, scale=size**-0.5)
    weights = [part.to(device) for part in (projections, output, widened, narrowed)]
    norm, angles = torch.ones(size, device=device), normal(num_rows, head_dim // 2).repeat(1, 2).to(device)
    rotation = angles.cos().contiguous(), angles.sin().contiguous()
    prefix = moved(make_prefix(INT4, kv_heads, 300, head_dim, None), device)
    pool = torch.zeros(2, 2, kv_heads, 64, head_dim, dtype=torch.bfloat16, device=device)
    pages, places = torch.zeros(num_rows, dtype=torch.int64), torch.arange(num_rows)
    where = pages.to(device), places.to(device)
    numbers = [torch.tensor(part, dtype=torch.int32, device=device) for part in ([[0, 1]], [num_rows], [0, num_rows])]
    start, arrivals = normal(num_rows, size).to(device), zeros(device)

    def layer(residual, update):
        normed = add_and_norm_on_device(residual, update, norm, 1e-5, torch.bfloat16, weights[0])
        query = rotate_and_store_on_device(normed @ weights[0].T, rotation, tuple(pool), where, (None, None), 0.0)
        tails = PagedTails(*pool, *numbers, num_rows)
        masks = {"scale": head_dim**-0.5, "positions": None, "window": None, "softcap": None}
        out, _ = attend(query, prefix, tails, 8, **masks, dtype=torch.bfloat16, arrivals=arrivals)
        update = out.transpose(0, 1).reshape(num_rows, -1) @ weights[1].T
        normed = add_and_norm_on_device(residual, update, norm, 1e-5, torch.bfloat16, weights[2])
        return gate_on_device((normed @ weights[2].T), weights[3]) @ weights[3].T

    def run(num_layers):
        residual, update = start.clone(), None
        for _ in range(num_layers):
            update = layer(residual, update)
        return residual

    return run


@pytest.mark.parametrize("num_rows", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_overlapping_launches_wait_for_each_other(device, num_rows, monkeypatch):
    """Bits with and without, layers behind each other, recorded too: whoever did not wait would read old numbers."""
    native = device.type == "cuda"
    if native:  # fresh memory that is filled would put a launch that overlaps nothing before each of ours
        monkeypatch.undo()
    run = steps_of_a_layer(device, num_rows)
    num_layers = 24 if native else 2
    found = []
    for overlaps, ahead_bytes in ((False, 0), (True, 1 << 16)):
        with launching(launch_ways()._replace(overlaps=overlaps, ahead_bytes=ahead_bytes)):
            found.append((run(num_layers), recorded(lambda: run(num_layers)) if native else None))
    (expected, at_rest), (overlapped, graph) = found
    assert torch.isfinite(expected).all()
    assert torch.equal(overlapped, expected)
    if native:
        at_rest[0].replay()
        for _ in range(100):
            graph[1].fill_(torch.nan)
            graph[0].replay()
            assert torch.equal(graph[1], at_rest[1])


def recorded(work):
    """A recording of `work`, and what it gives."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    return graph, found


def test_sizes_that_are_called_ahead(monkeypatch):
    from cag_kernels.triton import overlap as triton_overlap

    weight = torch.zeros(6144, 4096, dtype=torch.bfloat16)
    assert triton_overlap.ahead_sizes(weight) == (0, 0, 0)  # no such device
    assert triton_overlap.launch_options(weight.device) == {"overlaps": False}
    monkeypatch.setattr(triton_overlap, "overlaps_on", lambda _device: True)
    assert triton_overlap.launch_options(weight.device) == {"overlaps": True, "launch_pdl": True}
    with launching(LaunchWays(ahead_bytes=8 << 20)):
        for shape, expected in (
            ((6144, 4096), (6144, 8192, 1280)),
            ((28672, 4096), (16384, 8192, 512)),
            ((64, 4096), (64, 8192, 8192)),
        ):
            found = triton_overlap.ahead_sizes(torch.zeros(shape, dtype=torch.bfloat16))
            assert found == expected
            assert found[0] * found[2] <= 8 << 20
        assert triton_overlap.ahead_sizes(weight.T) == (0, 0, 0)
        assert triton_overlap.ahead_sizes(weight[:, :12].contiguous()) == (0, 0, 0)
        assert triton_overlap.ahead_sizes(None) == (0, 0, 0)
    with launching(PLAIN):
        assert triton_overlap.ahead_sizes(weight) == (0, 0, 0)
        assert triton_overlap.launch_options(weight.device) == {"overlaps": False}
