"""examples/demo.py: what `make finetune` trains on; generate.py and evaluate.py on it."""
import json

import pytest
import torch

from data import pack
from dataset.examples import tokenize
from dataset.rows import read_rows
from evaluate import evaluate
from examples.demo import write_demo
from inference.decoding import STOP_IDS, generate
from storage.pretrained import config_from_dict, load_model
from tokenizer import Tokenizer, parse_calls


@pytest.fixture(scope="module")
def rows(demo):
    return list(read_rows([demo / "rows.jsonl"]))


def test_the_same_seed_writes_the_same_folder(demo, tmp_path):
    write_demo(tmp_path, rows=600)
    for name in ("rows.jsonl", "model/tokenizer.model", "model/config.json", "model/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (demo / name).read_bytes(), name


def test_rows_ask_each_question_once_over_many_tools_with_every_kind_of_argument(rows):
    queries = [row.query for row in rows]
    assert len(set(queries)) == len(queries) == 600
    calls = [call for row in rows for call in row.calls]
    assert len({call["name"] for call in calls}) >= 8
    assert 30 < sum(len(row.calls) == 2 for row in rows) < 150
    values = [value for call in calls for value in call["arguments"].values()]
    assert {type(value) for value in values} == {str, int, float, bool}
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for row in rows for tool in row.tools}
    assert any("enum" in schema for parameters in schemas.values() for schema in parameters["properties"].values())
    optional = [set(schemas[call["name"]]["properties"]) - set(call["arguments"]) for call in calls]
    assert any(optional) and not all(optional)


def test_every_call_keeps_to_its_declaration(rows):
    kinds = {"string": str, "integer": int, "number": float, "boolean": bool}
    for row in rows:
        declared = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.tools}
        assert len(declared) > len(row.calls)
        for call in row.calls:
            schema = declared[call["name"]]
            assert set(schema["required"]) <= set(call["arguments"]) <= set(schema["properties"])
            for name, value in call["arguments"].items():
                assert type(value) is kinds[schema["properties"][name]["type"]]
                assert value in schema["properties"][name].get("enum", [value])


def test_the_demo_model_has_every_branch_of_the_real_one(demo, rows):
    config = config_from_dict(json.loads((demo / "model" / "config.json").read_text()))
    tokenizer = Tokenizer.load(demo / "model")
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.num_key_value_heads < config.num_attention_heads and config.head_dim * config.num_attention_heads == config.hidden_size
    assert max(len(tokenize(row, tokenizer)) for row in rows[:50]) > config.sliding_window
    assert config.vocab_size == tokenizer.vocab_size
    assert tokenizer.control["<start_function_call>"] == 48 and tokenizer.control["<end_of_turn>"] == 106


def test_a_row_learned_by_heart_is_answered_exactly_and_another_is_not(demo, rows):
    tokenizer, model = Tokenizer.load(demo / "model"), load_model(demo / "model", torch.float32)
    some = [rows[0], next(row for row in rows if row.calls[0]["name"] != rows[0].calls[0]["name"])]
    examples = [tokenize(row, tokenizer) for row in some]
    assert evaluate(model, tokenizer, some)["exact_match"] == 0.0
    from ops.cross_entropy import linear_cross_entropy
    batch = pack(examples[:1], 4096)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        linear_cross_entropy(model(batch.tokens, batch.positions, batch.documents)[batch.loss_rows], model.head, batch.targets).backward()
        optimizer.step()
    answers = evaluate(model, tokenizer, some)["answers"]
    assert [answer["exact"] for answer in answers] == [parse_calls(a["text"]) == row.calls for a, row in zip(answers, some, strict=True)] == [True, False]


def test_generate_stops_at_a_stop_token_and_does_not_mix_prompts(demo, rows):
    tokenizer, model = Tokenizer.load(demo / "model"), load_model(demo / "model", torch.float32)
    prompts = [tokenizer.encode_segments(row.prompt())[0] for row in rows[:3]]
    together = generate(model, prompts, max_new_tokens=6)
    assert together == [generate(model, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert all(len(ids) == 6 or ids[-1] in STOP_IDS for ids in together)
    model.head.data[50] = 100 * torch.nn.functional.normalize(model(torch.tensor(prompts[0]), torch.arange(len(prompts[0])),
                                                                    torch.zeros(len(prompts[0])))[-1], dim=0)
    assert generate(model, prompts[:1], max_new_tokens=6) == [[50]]
