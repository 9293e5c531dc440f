"""docs/derivations.md: its formulas and its code are run and compared with autograd in float64, its figures with its tables."""
import contextlib
import io
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETED, ROOT, load

from ops.attention_tables import tables
from ops.geglu import geglu_reference
from ops.rms_norm import rms_norm_reference, rotate
from ops.triton_utils import triton

DOC = (ROOT / "docs" / "derivations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", DOC, re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def float64():
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(usual)


def run(has, **names):
    """Run the one block of code that has this in it: (its names, what it prints)."""
    [code] = [code for kind, code in BLOCKS if kind == "python" and has in code]
    names |= {"torch": torch, "np": np, "math": math, "tables": tables}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return names, printed.getvalue()


def formulas(has, **names):
    """Work out the formulas `name = …` of the one block that has this in it, as they are written there."""
    [text] = [text for kind, text in BLOCKS if not kind and has in text]
    for formula in re.split(r"\s{2,}|\n", text.strip()):
        name, right = formula.split(" = ")
        right = right.replace("ᵀ", ".T").replace("⊙", "*")
        names[name] = eval(re.sub(r"(?<=[\w)]) (?=[\w(])", " @ ", right).replace("s @", "s *"), {}, names)
    return names


def close(got, y, inputs, dy):
    """Whether the gradients are autograd's."""
    for mine, exact in zip(got, torch.autograd.grad(y, inputs, dy), strict=True):
        assert exact.norm() > 0
        torch.testing.assert_close(mine, exact)


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("has", "dropped"), [("dX = dY W + T A ", False), ("dA = Tᵀ (m ⊙ x)", True)])
def test_the_adapters_gradients_are_as_derived(has, dropped):
    x, W, A, B, dY = draw((5, 7), (6, 7), (3, 7), (6, 3), (5, 6))
    m = torch.tensor([0, 1.25]).repeat(18)[:35].view(5, 7) if dropped else torch.ones(5, 7)
    found = formulas(has, x=x, W=W, A=A, B=B, dY=dY, s=1.5, m=m)
    y = x @ W.T + 1.5 * (m * x) @ A.T @ B.T
    torch.testing.assert_close(found["y"], y)
    close([found[name] for name in ("dX", "dA", "dB")], y, (x, A, B), dY)


@INTERPRETED
@pytest.mark.skipif(triton is None, reason="no Triton for this platform")
def test_the_forward_kernel_of_the_lesson_computes_y_and_s(tmp_path):
    [code] = [code for _, code in BLOCKS if "@triton.jit" in code]
    path = tmp_path / "lesson.py"
    path.write_text("import triton\nimport triton.language as tl\n" + code, encoding="utf-8")
    lesson = load(path, "lesson")
    x, w, a, b = (t.detach().float() for t in draw((64, 32), (48, 32), (16, 32), (48, 16)))
    y, s = x.new_empty(64, 48), x.new_empty(64, 16)
    lesson.forward[(2 * 3,)](x, w, a, b, y, s, 0.5, 32, 48, 16, 32, 16, 16)
    torch.testing.assert_close(s, 0.5 * x @ a.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, x @ w.T + 0.5 * x @ a.T @ b.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tile", [1, 4, 5, 100])
def test_softmax_may_be_streamed_also_past_tiles_that_are_hidden(tile):
    q, k, v = draw((9, 4), (11, 4), (11, 4))
    seen = torch.arange(11) >= torch.arange(9)[:, None]               # the last row sees nothing of the first eight
    scores = (0.3 * q @ k.T).masked_fill(~seen, -torch.inf)
    o, lse = run("def streamed")[0]["streamed"](q, k, v, seen, 0.3, tile)
    torch.testing.assert_close(o, scores.softmax(1) @ v)
    torch.testing.assert_close(lse, scores.logsumexp(1, keepdim=True))


def test_the_gradients_of_attention_are_as_derived():
    q, k, v, do = draw((9, 4), (11, 4), (11, 4), (9, 4))
    seen = torch.arange(11) >= torch.arange(9)[:, None]
    names = run("def attention_gradients", **run("def streamed")[0])[0]
    o = (0.3 * q @ k.T).masked_fill(~seen, -torch.inf).softmax(1) @ v
    close(names["attention_gradients"](q, k, v, do, seen, 0.3), o, (q, k, v), do)


def test_the_picture_is_what_the_tables_say():
    printed = run("lengths, starts, T =")[1]
    assert printed in [text for kind, text in BLOCKS if not kind] and printed.count("■") > 100


@pytest.mark.parametrize(("rows", "span"), [(3, 4), (7, 20), (2, 7)])
def test_the_loss_and_its_gradients_are_as_derived(rows, span):
    h, w = draw((7, 5), (20, 5))
    targets = torch.tensor([0, 19, 3, 4, 4, 7, 11])
    exact = F.cross_entropy(h @ w.T, targets, reduction="sum")
    loss, *got = run("def loss_and_gradients")[0]["loss_and_gradients"](h.detach(), w.detach(), targets, rows, span)
    torch.testing.assert_close(loss, exact.detach())
    close(got, exact, (h, w), None)


@pytest.mark.parametrize("turned", [False, True])
def test_the_norms_gradients_are_as_derived(turned):
    x, w, dy, angles = draw((6, 8), (8,), (6, 8), (6, 4))
    angles = (angles.detach() * turned).repeat(1, 2)
    names = run("def norm_gradients")[0]
    y = rotate(rms_norm_reference(x, w, 0.1), angles.cos(), angles.sin())
    torch.testing.assert_close(names["rotated"](x, angles.cos(), angles.sin()), rotate(x, angles.cos(), angles.sin()))
    close(names["norm_gradients"](x, w, dy, angles.cos(), angles.sin(), 0.1), y, (x, w), dy)


def test_geglus_gradients_are_as_derived():
    gate, up, dh = draw((6, 8), (6, 8), (6, 8))
    close(run("def geglu_gradients")[0]["geglu_gradients"](gate, up, dh), geglu_reference(gate, up), (gate, up), dh)


@pytest.mark.parametrize("has", ["rng, lengths", "N, V, D, chunk"])
def test_figures_are_those_that_the_code_counts(has):
    lines = run(has)[1].splitlines()
    assert len(lines) > 5 and all(f"\n{line}\n" in DOC for line in lines)


def test_the_adapters_costs_are_those_that_the_code_counts():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in DOC.splitlines() if line.startswith("|")]
    lines = run("M, R = 16_896, 16")[1].splitlines()
    for line, more in zip(lines[::2], lines[1::2], strict=True):
        name, numbers = line.split(":")
        assert any(row[0] == name and [cell.replace(" ", "") for cell in row[2:]] == numbers.split() for row in rows), line
        definition, its_dx, addmm, addmms_dx = more.split()
        assert [name, definition, addmm, its_dx, addmms_dx] in rows, more
