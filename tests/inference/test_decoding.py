"""Decoding with cached keys and values gives what running the whole sequence anew gives, whatever shares a batch with it."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from inference import decoding, kv_cache
from inference.decoding import RecordedSteps, generate, sample, stream
from inference.kv_cache import KVCache, empty_prefix, prefill, shared_prefix_length
from lora import LoRAConfig, merge, wrap
from model import Gemma3, GemmaConfig
from storage.pretrained import load_model
from tokenizer import Tokenizer

SMALL = GemmaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                    head_dim=16, query_pre_attn_scalar=16, sliding_window=12, layer_types=("sliding_attention", "full_attention") * 2)
LENGTHS = (1, 2, 5, 11, 12, 13, 30, 47)            # around the window, and several windows long


@pytest.fixture(scope="module")
def small() -> Gemma3:
    """A random model with two kv heads and a window of 12, lively enough that its answers do not repeat one token."""
    model = Gemma3(SMALL)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_" in name:
                parameter.fill_(4.0)                           # what the layers add outweighs the last token's own embedding
    return model.eval()


def prompts_of(lengths, seed=0) -> list[list[int]]:
    r = torch.Generator().manual_seed(seed)
    return [torch.randint(110, (n,), generator=r).clamp(max=96).tolist() for n in lengths]


@torch.no_grad()
def recomputed(model: Gemma3, prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens and (len(ids) == len(prompt) or ids[-1] not in decoding.STOP_IDS):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("shared", [0, 7, 20])
@torch.no_grad()
def test_scores_of_a_step_are_those_of_the_whole_sequence(small, shared, width):
    start = prompts_of([shared], seed=1)[0]
    rows = [start + prompt for prompt in prompts_of(LENGTHS)]
    coming = torch.randint(97, (len(rows), 24), generator=torch.Generator().manual_seed(2))
    cache = KVCache(small, len(rows), 100, width)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(1e4)                                      # whatever an earlier row left must not be seen
    prefix = prefill(small, empty_prefix(small), [start])[0] if start else empty_prefix(small)
    for i, own in enumerate(prefill(small, prefix, [row[shared:] for row in rows])):
        cache.fill(i, prefix, own)
    for done in range(0, 24, width):
        tokens = coming[:, done:done + width]
        positions = torch.tensor([[len(row) + done + i for i in range(width)] for row in rows])
        got = cache.step(small, tokens, positions, max_position=int(positions.max()))
        for i, row in enumerate(rows):
            whole = torch.tensor([row + coming[i, :done + width].tolist()])
            torch.testing.assert_close(got[i], small.logits(whole)[0, -width:], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("look_ahead", [None, 0, 4])
@pytest.mark.parametrize("batch_rows", [1, 3, 16])
def test_answers_are_those_of_recomputing_everything(small, batch_rows, look_ahead):
    prompts = prompts_of(LENGTHS)
    want = [recomputed(small, prompt, 40) for prompt in prompts]
    assert len({token for answer in want for token in answer}) > 20, "this test needs a livelier model"
    assert generate(small, prompts, 40, batch_rows=batch_rows, look_ahead=look_ahead) == want


def test_an_answer_ends_with_its_first_stop_token(small, monkeypatch):
    prompts = prompts_of(LENGTHS)
    free = generate(small, prompts, 40)
    monkeypatch.setattr(decoding, "STOP_IDS", tuple({answer[6] for answer in free}))
    for answer, cut in zip(free, generate(small, prompts, 40, batch_rows=3), strict=True):
        end = next(i for i, token in enumerate(answer) if token in decoding.STOP_IDS)
        assert cut == answer[:end + 1]


def test_drafts_save_steps_and_change_nothing(small, monkeypatch):
    steps = []
    step = KVCache.step
    monkeypatch.setattr(KVCache, "step", lambda self, *args, **kwargs: steps.append(1) or step(self, *args, **kwargs))
    prompt = prompts_of([30])[0]
    want = generate(small, [prompt], 40, look_ahead=0)
    plain, said = len(steps), [prompt[-1], *want[0]]
    steps.clear()
    assert generate(small, [prompt], 40, look_ahead=7, phrases=[said]) == want
    assert plain == len(want[0]) and len(steps) <= plain / 4, "told the answer, it must take a few steps only"


def test_a_shared_prefix_is_computed_once(small, monkeypatch):
    start = prompts_of([200], seed=1)[0]
    prompts = [start + own for own in prompts_of([9] * 20)]
    want = [recomputed(small, prompt, 3) for prompt in prompts]
    counted = []
    run = Gemma3.run
    monkeypatch.setattr(Gemma3, "run", lambda self, tokens, *rest: counted.append(len(tokens)) or run(self, tokens, *rest))
    assert generate(small, prompts, 3, batch_rows=4, look_ahead=0) == want
    assert sum(counted) <= 200 + 20 * 9 + 20 * 3 + 20


@pytest.mark.parametrize("at_once", [1, 10, 31])
def test_prompts_prefilled_in_several_passes_give_the_same_answers(small, monkeypatch, at_once):
    prompts = [*prompts_of(LENGTHS), prompts_of(LENGTHS)[-1]]                       # two of them equal: nothing of its own to prefill
    want = generate(small, prompts, 6)
    monkeypatch.setattr(kv_cache, "PREFILL_TOKENS", at_once)
    monkeypatch.setattr(kv_cache, "MIN_SHARED_PREFIX_TOKENS", 1)
    assert generate(small, prompts, 6) == generate(small, prompts, 6, batch_rows=2) == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_head_gives_the_same_scores_however_it_is_laid_out(dtype):
    model = Gemma3(SMALL, dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.to(dtype)
    for rows in (1, 3, 40):
        hidden = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)).to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(kv_cache.output_projection(model)(hidden), F.linear(hidden, model.head), atol=1e-2, rtol=1e-2)


def test_the_longest_shared_prefix():
    assert shared_prefix_length([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert shared_prefix_length([[1, 2]]) == 2 and shared_prefix_length([[], [1]]) == 0 and shared_prefix_length([[5], [6]]) == 0


def test_each_answer_comes_as_soon_as_it_is_done(small):
    prompts = prompts_of(LENGTHS)
    seen = [i for i, _ in stream(small, prompts, 4, batch_rows=2)]
    assert sorted(seen) == list(range(len(prompts)))
    assert generate(small, [], 4) == []
    assert [len(answer) for answer in generate(small, prompts[:3], [1, 5, 3])] == [1, 5, 3]


def test_an_empty_prompt_is_named(small):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(small, [[2], []], 4)
    for limits, options in (([4], {}), ([4, 0], {}), (4, {"batch_rows": 0})):
        with pytest.raises(ValueError, match="must be at least 1"):
            generate(small, [[2], [2]], limits, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_sampled_tokens_follow_the_model_s_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(40_000, 4)
    for temperature in (0.5, 1.0, 2.0):
        sampled = sample(logits, temperature, 1.0, torch.Generator().manual_seed(0))
        shares = torch.bincount(sampled, minlength=4) / len(sampled)
        torch.testing.assert_close(shares, F.softmax(logits[0] / temperature, -1), atol=0.01, rtol=0)


def test_top_p_samples_among_the_likeliest_alone():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    for top_p, kept in ((0.4, 1), (0.5, 1), (0.51, 2), (0.9, 3), (1.0, 4)):
        sampled = sample(logits, 1.0, top_p, torch.Generator().manual_seed(0))
        assert len(sampled.unique()) == kept, top_p


def test_one_seed_gives_one_answer(small):
    prompts = prompts_of(LENGTHS)
    one, same, other = (generate(small, prompts, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == same and one != other
    assert generate(small, prompts, 20, temperature=1e-4) == generate(small, prompts, 20)


# ---------------------------------------------------------------------------------------------------------------------
# Beside transformers, and on a GPU


@pytest.fixture(scope="module")
def both(real_model):
    """The real model, as transformers and as we load it, in fp32."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32), load_model(real_model, torch.float32)


@pytest.mark.parametrize("length", [10, 600, 1500])
def test_greedy_ids_equal_transformers_on_real_weights(both, real_model, length):
    theirs, ours = both
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("model.py", "README.md"))
    prompt = [2, *Tokenizer.load(real_model).encode(text)[:length - 1]]
    assert len(prompt) == length
    with torch.no_grad():
        want = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, length, dtype=torch.long), max_new_tokens=12,
                               do_sample=False, eos_token_id=list(decoding.STOP_IDS), pad_token_id=0)[0, length:].tolist()
    assert generate(ours, [prompt], 12) == [want]
    if length <= 600:
        assert generate(ours, [prompt, prompt[:length // 2]], 12, look_ahead=0)[0] == want


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="SKIPPED: no CUDA device")
def test_a_captured_step_gives_the_cpu_s_answers(small):
    prompts = prompts_of(LENGTHS)
    on_gpu, recorded = copy.deepcopy(small).to("cuda"), RecordedSteps()
    for batch_rows in (1, 3, 16, 3):
        want = generate(small, prompts, 40, batch_rows=batch_rows)
        assert generate(on_gpu, prompts, 40, batch_rows=batch_rows) == want
        assert generate(on_gpu, prompts, 40, batch_rows=batch_rows, recorded=recorded) == want
    changed = copy.deepcopy(small)
    for assign in (False, True):
        changed.load_state_dict(other_weights(changed))
        weights = {name: tensor.cuda() for name, tensor in changed.state_dict().items()}
        on_gpu.load_state_dict(weights, assign=assign)
        want = generate(changed, prompts, 40)
        assert generate(on_gpu, prompts, 40, batch_rows=3, recorded=recorded) == want


# ---------------------------------------------------------------------------------------------------------------------
# Recorded steps.  A CPU records nothing; these tests record what a step reads, and replay it as a GPU would.


@pytest.fixture
def recordings(monkeypatch):
    """Counts what is recorded; a replay reads the weights in the memory where they lay then."""
    def start(model: Gemma3) -> list[int]:
        made = []

        def record(run, device):
            run()
            run()
            made.append(1)
            then = [(owner, name, torch.nn.Parameter(parameter.data, requires_grad=False))
                    for owner in model.modules() for name, parameter in owner.named_parameters(recurse=False)]

            def replay() -> None:
                now = [owner._parameters[name] for owner, name, _ in then]
                for owner, name, parameter in then:
                    owner._parameters[name] = parameter
                run()
                for (owner, name, _), parameter in zip(then, now, strict=True):
                    owner._parameters[name] = parameter
            return replay
        monkeypatch.setattr(decoding, "record", record)
        return made
    return start


def test_recorded_steps_are_kept_for_prompts_of_similar_lengths(small, recordings):
    made, recorded = recordings(small), RecordedSteps()
    prompts = prompts_of((1, 5, 20, 15, 110, 120))
    want = generate(small, prompts, 20)
    for _ in range(2):
        assert [generate(small, [prompt], 20, recorded=recorded)[0] for prompt in prompts] == want
        assert len(made) == 2                                       # room for 64 positions, and for 192
        for step in recorded.steps.values():
            for tensor in (*step.cache.keys, *step.cache.values):
                tensor.fill_(torch.nan)                             # what a call left must not be seen
    assert generate(small, prompts, 20, batch_rows=3, recorded=recorded) == want
    assert generate(small, prompts, 20, batch_rows=3, look_ahead=0, recorded=recorded) == want
    assert len(made) == 4


def test_the_recorded_steps_used_last_are_kept(small, recordings, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_RECORDED_STEPS", 2)
    made, recorded = recordings(small), RecordedSteps()
    [prompt] = prompts_of([5])
    for look_ahead, recorded_so_far in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        generate(small, [prompt], 4, recorded=recorded, look_ahead=look_ahead)
        assert len(made) == recorded_so_far and len(recorded.steps) <= 2


def test_answers_given_side_by_side_share_no_recorded_step(small, recordings):
    made, recorded = recordings(small), RecordedSteps()
    prompts = prompts_of((5, 6, 7, 8))
    want = generate(small, prompts, 10)
    left, right = (stream(small, two, 10, batch_rows=1, recorded=recorded)
                   for two in (prompts[:2], prompts[2:]))
    seen = [answer for both in zip(left, right, strict=True) for _, answer in both]
    assert sorted(seen) == sorted(want) and len(made) == 2 and len(recorded.steps) == 1
    next(stream(small, prompts, 10, batch_rows=1, recorded=recorded))           # left before its end
    assert generate(small, prompts, 10, batch_rows=1, recorded=recorded) == want and len(made) == 3


def other_weights(model: Gemma3) -> dict:
    other = copy.deepcopy(model)
    other.init_weights(torch.Generator().manual_seed(5))
    others = other.state_dict()
    return {name: torch.lerp(tensor, others[name], 0.5) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def assign_data(model: Gemma3) -> None:
    for parameter, tensor in zip(model.parameters(), other_weights(model).values(), strict=True):
        parameter.data = tensor


def merge_an_adapter(model: Gemma3) -> None:
    wrap(model, LoRAConfig(rank=4), torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    merge(model)


CHANGES = {"in place": (0, lambda model: model.load_state_dict(other_weights(model))),
           "loaded": (1, lambda model: model.load_state_dict(other_weights(model), assign=True)),
           "new data": (1, assign_data), "adapter merged": (1, merge_an_adapter)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_seen_by_recorded_steps(small, recordings, change):
    model, prompts = copy.deepcopy(small), prompts_of((5, 20))
    made, recorded = recordings(model), RecordedSteps()
    before = generate(model, prompts, 20, recorded=recorded)
    under_way = stream(model, prompts, 20, recorded=recorded, batch_rows=1)
    next(under_way)
    more, alter = CHANGES[change]
    alter(model)
    want = generate(model, prompts, 20)
    assert generate(model, prompts, 20, recorded=recorded) == want != before
    assert len(made) == 2 + more
    list(under_way)                                                 # what it recorded is of other weights
    assert len(recorded.steps) == (1 if more else 2)
    assert all(step.model_state is recorded.model_state for step in recorded.steps.values())


def test_a_head_that_is_cast_may_change_in_place_under_a_recorded_step(recordings):
    model = Gemma3(SMALL, torch.bfloat16)                           # fp32 masters
    model.init_weights(torch.Generator().manual_seed(0))
    made, recorded, prompts = recordings(model), RecordedSteps(), prompts_of((5, 20))
    before = generate(model, prompts, 20, recorded=recorded)
    with torch.no_grad():
        model.head.copy_(model.head.flip(0).clone())
    want = generate(model, prompts, 20, recorded=RecordedSteps())
    assert generate(model, prompts, 20, recorded=recorded) == want != before and len(made) == 2
