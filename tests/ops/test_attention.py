"""Attention over packed documents equals its definition, in values, gradients and rounding."""
import inspect
from types import SimpleNamespace

import pytest
import torch
from conftest import GPU, INTERPRETED, INTERPRETER, NEEDS_CPP

from ops import attention as module
from ops import attention_tables
from ops.attention import attention, attention_reference
from ops.attention_tables import Tables, plan, tables, tile
from ops.triton_utils import triton


def naive_attention(q, k, v, documents, window, scale):
    """With one (T, T) mask: the definition."""
    i = torch.arange(len(q))
    seen = (documents[:, None] == documents) & (i[:, None] >= i) & (i[:, None] - i < window)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("inh,jnh->nij", q, k) * scale
    return torch.einsum("nij,jnh->inh", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def gradients(function, inputs, dout):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))


def operands(T, generator, dtype=torch.float64, kv_heads=2):
    q, k, v = (torch.randn(T, heads, 16, generator=generator, dtype=torch.float64).to(dtype) for heads in (4, kv_heads, kv_heads))
    return (q, k, v), torch.randn(T, 4, 16, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("function", [attention, attention_reference], ids=["ours", "reference"])
@pytest.mark.parametrize("queries", [5, 256])
@pytest.mark.parametrize("lengths", [[1], [8], [9], [23], [3, 8, 1, 30, 17]], ids=str)
@pytest.mark.parametrize("window", [8, None])
def test_attention_and_its_gradients_equal_the_masked_definition(function, queries, lengths, window, generator, monkeypatch):
    monkeypatch.setattr(attention_tables, "QUERIES", queries)
    T = sum(lengths)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    inputs, dout = operands(T, generator)
    tiles = tile(lengths, window, torch.float64, torch.device("cpu"))
    assert max(t.mask.shape[0] for t in tiles) <= queries
    got = gradients(lambda q, k, v: function(q, k, v, 0.3, tiles), inputs, dout)
    want = gradients(lambda q, k, v: naive_attention(q, k, v, documents, window or T, 0.3), inputs, dout)
    for mine, exact in zip(got, want, strict=True):
        assert T == 1 or exact.norm() > 0
        torch.testing.assert_close(mine, exact)


def shared_and_whole(lengths, starts):
    """For documents that continue others: the same documents whole, and where each of their tokens lies in the shared layout."""
    firsts, root, places, documents = [sum(lengths[:i]) for i in range(len(lengths))], 0, [], []
    for i, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        root = i if start == 0 else root
        places += [*range(firsts[root], firsts[root] + start), *range(firsts[i], firsts[i] + length)]
        documents += [i] * (start + length)
    return torch.tensor(places), torch.tensor(documents)


@pytest.mark.parametrize("function", [attention, attention_reference], ids=["ours", "reference"])
@pytest.mark.parametrize("queries", [5, 256])
@pytest.mark.parametrize(("lengths", "starts"), [([7, 3], [0, 7]), ([7, 3, 12, 1, 4], [0, 7, 7, 7, 7]), ([20, 9, 2], [0, 20, 20]),
                                                 ([3, 6, 4, 2, 11, 5, 9], [0, 0, 6, 6, 0, 8, 8]), ([12, 4, 4, 4], [0, 5, 12, 5])], ids=str)
@pytest.mark.parametrize("window", [8, None])
def test_documents_that_continue_a_shared_beginning_are_as_if_each_held_it(function, queries, lengths, starts, window, generator, monkeypatch):
    monkeypatch.setattr(attention_tables, "QUERIES", queries)
    T = sum(lengths)
    places, documents = shared_and_whole(lengths, starts)
    inputs, dout = operands(T, generator)
    tiles = tile(lengths, window, torch.float64, torch.device("cpu"), starts)
    assert sorted(row for t in tiles for row in range(t.queries.start, t.queries.stop)) == list(range(T))
    last = torch.zeros(T, dtype=torch.int64).scatter_(0, places, torch.arange(len(places)))        # a whole copy of each token

    def whole(q, k, v):
        return naive_attention(q[places], k[places], v[places], documents, window or len(places), 0.3)[last]

    for mine, exact in zip(gradients(lambda q, k, v: function(q, k, v, 0.3, tiles), inputs, dout), gradients(whole, inputs, dout), strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize(("lengths", "starts"), [([3], [2]), ([5, 4], [0, 6]), ([5, 4, 2], [0, 5, 9])])
def test_a_document_that_continues_nothing_is_refused(lengths, starts):
    for make in (lambda: tile(lengths, None, torch.float32, torch.device("cpu"), starts), lambda: tables(lengths, None, torch.device("cpu"), starts)):
        with pytest.raises(ValueError, match=r"but the last one that starts at 0 has \d tokens to continue"):
            make()


@pytest.mark.parametrize("window", [8, None])
@pytest.mark.parametrize("before", [1, 7, 8, 20])
def test_a_beginning_may_give_keys_alone(before, window, generator, monkeypatch):
    monkeypatch.setattr(attention_tables, "QUERIES", 5)
    lengths, starts = [before, 3, 12, 1], [0, before, before, before]
    (q, k, v), _ = operands(sum(lengths), generator)
    everything = attention(q, k, v, 0.3, tile(lengths, window, torch.float64, torch.device("cpu"), starts))
    some = attention(q[before:], k, v, 0.3, tile(lengths, window, torch.float64, torch.device("cpu"), starts, keys_only=1))
    torch.testing.assert_close(some, everything[before:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1.0, 6.0], ids=["even scores", "sharp scores"])
def test_attention_rounds_no_more_than_the_reference(dtype, size, generator, monkeypatch):
    monkeypatch.setattr(attention_tables, "QUERIES", 64)
    lengths, window = [150, 300], 100
    inputs, dout = operands(450, generator, dtype, kv_heads=1)
    inputs = (inputs[0] * size, *inputs[1:])
    documents = torch.arange(2).repeat_interleave(torch.tensor(lengths))
    exact = gradients(lambda q, k, v: naive_attention(q, k, v, documents, window, 0.25), [x.double() for x in inputs], dout.to(dtype).double())
    tiles = tile(lengths, window, dtype, torch.device("cpu"))
    ours = gradients(lambda q, k, v: attention(q, k, v, 0.25, tiles), inputs, dout)
    reference = gradients(lambda q, k, v: attention_reference(q, k, v, 0.25, tiles), inputs, dout)
    for name, got, naive, want in zip(("out", "dq", "dk", "dv"), ours, reference, exact, strict=True):
        def error(x, want=want):
            return ((x.double() - want).norm() / want.norm()).item()
        assert got.dtype == dtype and error(got) <= 2 * error(naive), (name, error(got), error(naive))


def test_gradcheck(generator, monkeypatch):
    monkeypatch.setattr(attention_tables, "QUERIES", 3)
    (q, k, v), _ = operands(7, generator)
    tiles = tile([2, 5], 4, torch.float64, torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, 0.3, tiles), [x.requires_grad_() for x in (q, k, v)])


# The kernels

MACHINES = [pytest.param("cpu", dtype, marks=INTERPRETED, id=f"interpreted-{dtype}") for dtype in (torch.float32, torch.float16)]
MACHINES += [pytest.param("cuda", dtype, marks=GPU.marks, id=f"cuda-{dtype}") for dtype in (torch.float32, torch.float16, torch.bfloat16)]
LAYOUTS = {"one": ([1], None), "short": ([9, 1, 30], None), "long": ([150, 5, 70], None), "shared": ([40, 12, 3, 25], [0, 40, 40, 40]),
           "many": ([70, 9, 2, 90, 8, 40, 33], [0, 70, 70, 0, 60, 60, 90])}


def kernel_faults(lengths, starts, window, device, dtype, generator, heads=(4, 1, 16), attention=attention, tables=tables, block_q=128, block_k=64, backend="triton"):
    """The names of outputs and gradients further from float64 than twice PyTorch's attention is, or all zero."""
    T, (N, K, H) = sum(lengths), heads
    q, k, v, dout = (torch.randn(T, n, H, generator=generator).to(device, dtype) for n in (N, K, K, N))
    tiles = tile(lengths, window, torch.float64, torch.device("cpu"), starts)
    exact = gradients(lambda q, k, v: attention_reference(q, k, v, 0.3, tiles), [x.double().cpu() for x in (q, k, v)], dout.cpu().double())
    tiles = tile(lengths, window, dtype, torch.device(device), starts)
    naive = gradients(lambda q, k, v: attention_reference(q, k, v, 0.3, tiles), (q, k, v), dout)
    table = tables(lengths, window, torch.device(device), starts, block_q=block_q * K // N, block_k=block_k, longest_first=backend == "triton")
    ours = gradients(lambda q, k, v: attention(q, k, v, 0.3, table, backend), (q, k, v), dout)

    def error(got, want):                   # where all see themselves alone dq and dk are 0, and what cancels is of the other size
        return ((got.cpu().double() - want).norm() / (want.norm() if want.norm() > 1e-9 else k.norm() * dout.norm()).item()).item()
    return [name for name, mine, other, want in zip(("out", "dq", "dk", "dv"), ours, naive, exact, strict=True)
            if (want.norm() > 1e-9 and not mine.norm() > 0) or mine.dtype != dtype or not error(mine, want) <= 2 * error(other, want) + 2 * torch.finfo(dtype).eps]


@pytest.mark.parametrize(("device", "dtype"), MACHINES)
@pytest.mark.parametrize("window", [8, 50, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_are_as_accurate_as_pytorchs_attention(layout, window, device, dtype, generator, poisoned):
    assert kernel_faults(*LAYOUTS[layout], window, device, dtype, generator) == []
    assert kernel_faults(*LAYOUTS[layout], window, device, dtype, generator, block_q=64, block_k=32) == []


@pytest.fixture
def parts(request, monkeypatch):
    """From now on each program of the forward kernel takes this part of a block: 1 all of it, 2 a half."""
    config = triton.Config({"PARTS": request.param, "BLOCK_K": 32}, num_warps=8 // request.param, num_stages=2)
    monkeypatch.setattr(module._forward_kernel, "configs", [config])
    return request.param


@pytest.mark.parametrize(("device", "dtype"), MACHINES)
@pytest.mark.parametrize("parts", [1, 2], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_in_one_part_or_two_are_as_accurate(layout, parts, device, dtype, generator, poisoned):
    assert kernel_faults(*LAYOUTS[layout], 50, device, dtype, generator) == []


@pytest.mark.parametrize("device", [INTERPRETER, GPU])
@pytest.mark.parametrize("parts", [1, 2], indirect=True)
@pytest.mark.parametrize(("lengths", "starts", "window", "key", "half"), [([32], None, 16, 0, 1), ([32], None, 16, 16, 0)],
                         ids=["first keys", "last keys"])
def test_each_half_reads_only_the_keys_of_its_own_run_that_it_needs(lengths, starts, window, key, half, parts, device, generator):
    """NaN in a value that one half of the last block's queries does not see reaches it only where the block is computed as one."""
    T = sum(lengths)
    q, k, v = (torch.randn(T, n, 16, generator=generator).to(device, torch.float16) for n in (4, 1, 1))
    v[key] = torch.nan
    out = attention(q, k, v, 0.3, tables(lengths, window, torch.device(device), starts, block_q=32), "triton")[-32:].isnan().flatten(1).any(1)
    assert out.unflatten(0, (2, 16))[1 - half].any() and out.unflatten(0, (2, 16))[half].any() == (parts == 1)


@pytest.mark.parametrize("window", [8, 50, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_blocks_that_take_longest_come_first(layout, window):
    lengths, starts = LAYOUTS[layout]
    plain, ordered = (tables(lengths, window, torch.device("cpu"), starts, block_q=16, block_k=32, longest_first=way) for way in (False, True))
    for before, after, block, ranges in ((plain.queries, ordered.queries, 32, ((2, 3), (4, 5))), (plain.keys, ordered.keys, 16, ((2, 3),))):
        assert before[:, 0].tolist() == sorted(before[:, 0].tolist())
        assert sorted(after.tolist()) == before.tolist()
        tiles = [sum(-(-(row[end] - row[start]) // block) for start, end in ranges) for row in after.tolist()]
        order = list(zip(tiles, after[:, 0].tolist(), strict=True))
        assert order == sorted(order, key=lambda block: (-block[0], block[1]))          # of equals the first tokens first
    assert layout in ("one", "short") or window == 8 or ordered.queries.tolist() != plain.queries.tolist()
    assert torch.equal(plain.seen, ordered.seen)


def test_plans_for_a_gpu_are_ordered_and_those_for_a_cpu_are_not(monkeypatch):
    made = []
    monkeypatch.setattr(attention_tables, "tables", lambda *of, **more: made.append((of[5], more)) or tables(*of[:2], torch.device("cpu"), *of[3:], **more))
    for major in (9, 8):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, major=major: SimpleNamespace(major=major))
        assert plan([3, 90], None, torch.bfloat16, torch.device("cuda"), (4, 1, 256), backend="triton").queries[0, 0] > 3
    by_cpp = plan([3, 90], None, torch.bfloat16, torch.device("cpu"), (4, 1, 256), backend="cpp")
    assert by_cpp.queries[:, 0].tolist() == [0, 3, 51]
    assert made == [(32, {"longest_first": True}), (16, {"longest_first": True}), (48, {})]
    tiles = plan([3, 90], None, torch.float32, torch.device("cpu"), (4, 1, 256))
    assert [t.queries.start for t in tiles] == [0, 3]


@pytest.mark.parametrize(("device", "dtype"), MACHINES)
@pytest.mark.parametrize("window", [1, 40, 41])
def test_a_window_may_be_one_token_or_end_with_the_shared_beginning(window, device, dtype, generator, poisoned):
    assert kernel_faults([40, 12, 3], [0, 40, 40], window, device, dtype, generator) == []


@pytest.mark.parametrize(("device", "dtype"), MACHINES)
@pytest.mark.parametrize("heads", [(2, 2, 32), (4, 2, 16), (8, 1, 16), (4, 1, 256)], ids=str)
def test_heads_are_grouped_as_the_model_has_them(heads, device, dtype, generator, poisoned):
    if device == "cuda" and dtype == torch.float32 and heads[2] == 256:
        pytest.skip("no card has the shared memory for it, and `plan` gives the kernels no fp32")
    assert kernel_faults([40, 33, 5], [0, 40, 0], 20, device, dtype, generator, heads) == []


@pytest.mark.parametrize(("device", "dtype"), MACHINES)
@pytest.mark.parametrize("window", [8, None])
def test_a_beginning_may_give_the_kernels_keys_alone(window, device, dtype, generator, poisoned):
    lengths, starts = [45, 3, 40, 1], [0, 45, 45, 45]
    q, k, v = (torch.randn(sum(lengths), n, 16, generator=generator).to(device, dtype) for n in (4, 1, 1))
    dout = torch.randn(44, 4, 16, generator=generator).to(device, dtype)
    everything = gradients(lambda *of: attention(*of, 0.3, tables(lengths, window, torch.device(device), starts), "triton")[45:], (q, k, v), dout)
    some = gradients(lambda q, k, v: attention(q[45:], k, v, 0.3, tables(lengths, window, torch.device(device), starts, keys_only=1), "triton"), (q, k, v), dout)
    for mine, whole in zip(some, everything, strict=True):
        torch.testing.assert_close(mine, whole)


@pytest.mark.parametrize("device", [INTERPRETER, GPU])
@pytest.mark.parametrize(("lengths", "keys_only"), [([], 0), ([45], 1)])
def test_no_queries_give_the_keys_a_gradient_of_zero(lengths, keys_only, device, poisoned):
    q, k, v = (torch.randn(tokens, n, 16, dtype=torch.float16, device=device) for tokens, n in ((0, 4), (sum(lengths), 1), (sum(lengths), 1)))
    table = tables(lengths, None, torch.device(device), keys_only=keys_only)
    assert all(not x.any() for x in gradients(lambda q, k, v: attention(q, k, v, 0.3, table, "triton"), (q, k, v), q))


@pytest.mark.parametrize(("queries", "keys", "values"), [(7, 7, 7), (9, 9, 9), (5, 8, 7), (5, 9, 8), (8, 8, 8)])
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_a_plan_for_other_documents_is_refused(queries, keys, values, backend):
    q, k, v = (torch.zeros(tokens, n, 16) for tokens, n in ((queries, 4), (keys, 1), (values, 1)))
    with pytest.raises(ValueError, match=f"have {queries}, {keys} and {values} tokens, the plan is for 5 queries and 8 keys"):
        attention(q, k, v, 0.3, tables([3, 5], None, torch.device("cpu"), keys_only=1), backend)


@INTERPRETED
@pytest.mark.parametrize(("sound", "broken", "where"), [
    ("(own <= keys)", "(own < keys)", {"out", "dk", "dv"}), ("(keys <= tokens)", "(keys <= tokens + 1)", {"out"}),
    ("(prefix <= keys)", "(prefix <= keys + 1)", {"out"}), ("(keys < prefix_end)", "(keys <= prefix_end)", {"out", "dk", "dv"}),
    ("np.arange(len(documents)) - reach + 1)", "np.arange(len(documents)) - reach)", {"out"}),
    ("np.clip(positions - reach + 1, 0, prefix_length)", "np.clip(positions - reach, 0, prefix_length)", {"out"}),
    ("total = total * rescale", "total = total", {"out"}), ("sums * rescale[:, None]", "sums", {"out"}), ("top + tl.log2(total)", "top", {"dq", "dk"}),
    ("- delta_tile[:, None])", ")", {"dq"}), ("- delta_tile[None, :])", ")", {"dk"}), ("(dk_sums * factor)", "dk_sums", {"dk"}),
    ("np.where(continuation[of] - positions[stop - 1] < reach, ", "np.where(False, ", {"dk", "dv"}),
    ("np.clip(lowest - reach + 1, 0, start[of])", "np.clip(lowest - reach + 2, 0, start[of])", {"out"}),
    ("key = tl.load(seen + first + offset,", "key = 1 + tl.load(seen + first + offset,", {"out"}),
    ("first + offset + TOKENS)", "first + offset + TOKENS - 1)", {"out"}),
    ("prefix = tl.where(count > 0, prefix, prefix_end)", "prefix = prefix_end", {"out"}),
    ("tl.program_id(0) % PARTS * TOKENS", "0", {"out"})])
def test_a_broken_kernel_is_caught(sound, broken, where, generator, poisoned, mutant):
    of_tables = sound in inspect.getsource(attention_tables)
    broken_module = mutant(attention_tables if of_tables else module, sound, broken)
    if of_tables:
        changed = {"tables": lambda *of, **more: Tables(**vars(broken_module.tables(*of, **more)))}
    else:
        changed = {"attention": broken_module.attention}
    found = {name for layout in ("shared", "long", "many") for name in
             kernel_faults(*LAYOUTS[layout], 50, "cpu", torch.float32, generator, **changed)}
    assert where <= found


# By C++


@NEEDS_CPP
@pytest.mark.parametrize("window", [1, 8, 50, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpp_is_as_accurate_as_pytorchs_attention(layout, window, generator, poisoned):
    for block_q in (192, 64, 8):
        assert kernel_faults(*LAYOUTS[layout], window, "cpu", torch.bfloat16, generator, (4, 1, 32), block_q=block_q, backend="cpp") == []


@NEEDS_CPP
@pytest.mark.parametrize("heads", [(2, 2, 32), (4, 2, 64), (8, 1, 32), (3, 1, 96), (16, 1, 32), (4, 1, 256)], ids=str)
def test_cpp_groups_heads_as_the_model_has_them(heads, generator, poisoned):
    N, K, _ = heads
    assert kernel_faults([40, 33, 5], [0, 40, 0], 20, "cpu", torch.bfloat16, generator, heads, block_q=max(192, N // K), backend="cpp") == []
    assert kernel_faults([1100, 7], None, 512, "cpu", torch.bfloat16, generator, heads, block_q=max(192, N // K), backend="cpp") == []


@NEEDS_CPP
def test_cpp_takes_large_scores_and_gives_the_same_bits_with_any_number_of_threads(generator, poisoned):
    lengths, threads = [300, 90, 17], torch.get_num_threads()
    q, k, v, dout = (torch.randn(407, n, 64, generator=generator).bfloat16() for n in (4, 1, 1, 4))
    q *= 100
    by_cpp, tiles = (make(lengths, 64, *of) for make, of in ((plan, (torch.bfloat16, torch.device("cpu"), (4, 1, 64), None, 0, "cpp")),
                                                             (tile, (torch.float32, torch.device("cpu")))))
    seen = []
    for count in (threads, threads, 1, 3):
        torch.set_num_threads(count)
        seen.append(gradients(lambda *of: attention(*of, 1.0, by_cpp, "cpp"), (q, k, v), dout))
    torch.set_num_threads(threads)
    for all_threads, *others in zip(*seen, strict=True):
        assert all(torch.equal(all_threads, other) for other in others)
    exact = gradients(lambda *of: attention(*of, 1.0, tiles), (q.float(), k.float(), v.float()), dout.float())
    for mine, want in zip(seen[0], exact, strict=True):
        assert (mine.float() - want).norm() < 0.01 * want.norm()


@NEEDS_CPP
@pytest.mark.parametrize(("lengths", "keys_only"), [([], 0), ([45], 1)])
def test_cpp_gives_keys_without_queries_a_gradient_of_zero(lengths, keys_only, poisoned):
    q, k, v = (torch.randn(tokens, n, 32, dtype=torch.bfloat16) for tokens, n in ((0, 4), (sum(lengths), 1), (sum(lengths), 1)))
    by_cpp = plan(lengths, None, torch.bfloat16, torch.device("cpu"), (4, 1, 32), keys_only=keys_only, backend="cpp")
    assert all(not x.any() for x in gradients(lambda q, k, v: attention(q, k, v, 0.3, by_cpp, "cpp"), (q, k, v), q))


@NEEDS_CPP
@pytest.mark.parametrize(("sound", "broken", "where"), [
    ("(int)first_query + token + 1}", "(int)first_query + token + 2}", {"out", "dk"}), ("return {seen[keys + first_query + token]", "return {1 + seen[keys + first_query + token]", {"out"}),
    ("clamp(keys.hi - panel * PANEL, 0, PANEL)", "clamp(keys.hi - panel * PANEL, 0, 15)", {"out", "dv"}), ("add ? _mm512_add_ps(", "false ? _mm512_add_ps(", {"dk", "dv"}),
    ("_mm512_sub_ps(_mm512_loadu_ps(dp_high + c * PANEL), high)", "_mm512_loadu_ps(dp_high + c * PANEL)", {"dq", "dk"}),
    ("while (strip < end && !sees(strip)) strip++;", "while (strip < end && !sees(strip)) strip++; strip++;", {"dk", "dv"}),
    ("call.scale, dk, panel, head)", "1, dk, panel, head)", {"dk"}), ("call.scale, dq)", "1, dq)", {"dq"})])
def test_broken_cpp_is_caught(sound, broken, where, generator, poisoned, mutant_cpp):
    mutant_cpp(sound, broken)
    found = {name for layout in ("shared", "long", "many") for name in
             kernel_faults(*LAYOUTS[layout], 50, "cpu", torch.bfloat16, generator, (4, 1, 32), backend="cpp")}
    assert where <= found


def test_a_backend_refuses_the_plan_of_another(generator):
    (q, k, v), _ = operands(8, generator, torch.float32, kv_heads=1)
    made = tables([3, 5], None, torch.device("cpu")), tile([3, 5], None, torch.float32, torch.device("cpu"))
    for backend, given in (("torch", made[0]), ("triton", made[1]), ("cpp", made[1])):
        with pytest.raises(ValueError, match="make the plan for the same backend"):
            attention(q, k, v, 0.3, given, backend)
    with pytest.raises(ValueError, match="no backend 'cuda' for this operation; it has triton, cpp, torch"):
        attention(q, k, v, 0.3, made[0], "cuda")


@pytest.mark.skipif(triton is None, reason="no Triton for this platform")
def test_kernels_refuse_tensors_that_they_cannot_run_on(generator, monkeypatch):
    monkeypatch.setattr("ops.triton_utils.INTERPRETED", False)
    (q, k, v), _ = operands(8, generator, torch.float32, kv_heads=1)
    with pytest.raises(ValueError, match="takes the current CUDA device; got cpu"):
        attention(q, k, v, 0.3, tables([8], None, torch.device("cpu")), "triton")
