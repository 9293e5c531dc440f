"""The embedded default: a small Gemma 3 and generated rows, so that `make finetune` needs no download.

    python examples/demo.py build/demo      # writes build/demo/{model, rows.jsonl}

`model/` is a folder in the published layout. It holds a Gemma 3 of 0.8 M random parameters with every branch
of the real one (local and global layers, shared kv head, tied embedding), and a vocabulary that sentencepiece
learns from the rows, in which FunctionGemma's control tokens keep their ids. `rows.jsonl` holds xLAM rows
over eleven tools of a phone. train.py trains the model from nothing until it answers new questions with the
right calls.
"""
from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch

if __name__ == "__main__":      # as a script: the project's modules are in the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset.rows import parse_row
from model import Gemma3
from storage.atomic import atomic_file, write_json
from storage.pretrained import config_from_dict, save_model
from tokenizer import Control, Segment, Tokenizer
from tokenizer.model_file import train_model_file

ROWS = 19_000
VOCABULARY = 1_600             # pieces
VOCABULARY_ROWS = 6_000        # rows that the vocabulary is trained on
# Every branch of the real model, at a size that learns in minutes on two cores.
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 8,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Gemma 3 270M's sizes, for benchmarks where its weights are not at hand.
FULL_SIZE = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2_048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)],
}
# What the models of any size have in common.
COMMON = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "max_position_embeddings": 32_768,
    "bos_token_id": 2,
    "eos_token_id": [1, 50, 106],
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}

NAMES = [
    "Ada", "Alan", "Alice", "Anna", "Ben", "Boris", "Carla", "Chen", "Clara", "Diego", "Elena", "Emma",
    "Farid", "Felix", "Grace", "Hugo", "Ines", "Jack", "Kenji", "Lara", "Leo", "Maria", "Max", "Nadia",
    "Noah", "Olga", "Omar", "Priya", "Sam", "Zoe",
]
CITIES = [
    "Athens", "Austin", "Berlin", "Boston", "Cairo", "Cape Town", "Delhi", "Dublin", "Geneva", "Hanoi",
    "Istanbul", "Kyoto", "Lagos", "Lima", "Lisbon", "London", "Los Angeles", "Madrid", "Milan", "Montreal",
    "Nairobi", "New York", "Oslo", "Paris", "Prague", "Quito", "Rome", "San Diego", "Seoul", "Vienna",
]
ROOMS = ["kitchen", "bedroom", "bathroom", "hallway", "office", "garage"]
CURRENCIES = ["USD", "EUR", "GBP", "JPY", "CHF", "INR"]
GENRES = ["jazz", "rock", "classical", "techno", "folk", "blues"]
ITEMS = [
    "apples", "bread", "butter", "carrots", "cheese", "coffee", "eggs", "flour", "garlic", "honey",
    "lemons", "milk", "noodles", "onions", "pasta", "potatoes", "rice", "sugar", "tea", "tomatoes",
]
ITEM_ADJECTIVES = ["green", "fresh", "organic", "frozen"]
QUESTIONS = [
    "when the train leaves", "what we need for dinner", "if the shop is open", "who has the keys",
    "where to meet", "how the exam went",
]
STATEMENTS = [
    "I am running late", "the meeting moved to noon", "dinner is ready", "the package has arrived",
    "I found the keys", "we are out of milk", "the car is fixed", "I will be home soon", "happy birthday",
    "the flight is on time",
]
PLACES = [
    "the airport", "the station", "the museum", "the harbor", "the library", "the stadium", "the old town",
    "the hospital",
]


def tool(name: str, description: str, /, **parameters: tuple) -> dict:
    """A tool in xLAM's columns; a parameter is (type, description) or (type, description, allowed values)."""
    declared = {}
    for key, (type_name, text, *allowed) in parameters.items():
        declared[key] = {"type": type_name, "description": text}
        if allowed:
            declared[key]["enum"] = allowed[0]
    return {"name": name, "description": description, "parameters": declared}


TOOL_LIST = (
    tool("get_weather", "Weather forecast for a city",
         city=("str", "City name"),
         day=("str, optional", "Day of the forecast", ["today", "tomorrow", "weekend"])),
    tool("set_timer", "Start a countdown",
         minutes=("int", "Length in minutes"),
         label=("str, optional", "What it is for")),
    tool("set_alarm", "Set an alarm clock",
         hour=("int", "Hour, 0 to 23"),
         minute=("int", "Minute")),
    tool("set_thermostat", "Change the heating",
         room=("str", "Room", ROOMS),
         temperature=("float", "Degrees Celsius")),
    tool("switch_light", "Turn a light on or off",
         room=("str", "Room", ROOMS),
         on=("bool", "True for on")),
    tool("play_music", "Play music",
         genre=("str", "Style", GENRES),
         volume=("int, optional", "Percent")),
    tool("send_message", "Send a text message",
         contact=("str", "Who gets it"),
         text=("str", "What it says")),
    tool("convert_currency", "Convert money",
         amount=("float", "How much"),
         source=("str", "From"),
         target=("str", "To")),
    tool("add_to_list", "Add to the shopping list",
         item=("str", "What to buy"),
         quantity=("int, optional", "How many")),
    tool("navigate", "Show the way",
         destination=("str", "Where to"),
         avoid_tolls=("bool, optional", "Avoid toll roads")),
    tool("book_table", "Book a restaurant",
         city=("str", "City name"),
         people=("int", "Guests"),
         name=("str", "Booked under")),
)
TOOLS = {entry["name"]: entry for entry in TOOL_LIST}


# ----------------------------------------------------------------------------------------------------------
# Requests: for each tool a function of its name that draws a query and the arguments of the call it asks for


def get_weather(r: random.Random) -> tuple[str, dict]:
    city = r.choice(CITIES)
    query = r.choice(["what is the weather in {}", "will it rain in {}", "how warm is it in {}",
                      "forecast for {}"])
    day = r.choice(["", "", "today", "tomorrow", "weekend"])
    arguments = {"city": city}
    if day:
        arguments["day"] = day
    ending = {"": "", "weekend": " at the weekend"}.get(day, f" {day}")
    return query.format(city) + ending, arguments


def set_timer(r: random.Random) -> tuple[str, dict]:
    minutes = r.randint(1, 99)
    label = r.choice(["", "", "pasta", "laundry", "tea", "a nap", "the oven", "yoga"])
    query = r.choice(["set a timer for {} minutes", "count down {} minutes", "wake me in {} minutes"])
    query = query.format(minutes)
    if label:
        return f"{query} for {label}", {"minutes": minutes, "label": label}
    return query, {"minutes": minutes}


def set_alarm(r: random.Random) -> tuple[str, dict]:
    hour = r.randint(0, 23)
    minute = r.randrange(0, 60, 5)
    query = r.choice(["wake me at {}:{:02d}", "alarm at {}:{:02d}", "set an alarm for {}:{:02d}"])
    return query.format(hour, minute), {"hour": hour, "minute": minute}


def set_thermostat(r: random.Random) -> tuple[str, dict]:
    room = r.choice(ROOMS)
    temperature = r.randint(30, 52) / 2
    query = r.choice(["heat the {} to {} degrees", "set the {} to {} degrees", "I want the {} at {} degrees"])
    return query.format(room, temperature), {"room": room, "temperature": temperature}


def switch_light(r: random.Random) -> tuple[str, dict]:
    room = r.choice(ROOMS)
    on = r.random() < 0.5
    word = "on" if on else "off"
    query = r.choice([
        f"turn {word} the light in the {room}",
        f"{room} light {word}",
        f"switch the {room} light {word}",
    ])
    return query, {"room": room, "on": on}


def play_music(r: random.Random) -> tuple[str, dict]:
    genre = r.choice(GENRES)
    volume = r.choice([0, 0, r.randint(1, 100)])
    query = r.choice(["play some {}", "put on {} music", "I feel like {}"]).format(genre)
    if volume:
        return f"{query} at {volume} percent", {"genre": genre, "volume": volume}
    return query, {"genre": genre}


def send_message(r: random.Random) -> tuple[str, dict]:
    contact = r.choice(NAMES)
    if r.random() < 0.4:
        text = r.choice(QUESTIONS)
        query = r.choice([f"ask {contact} {text}", f"message {contact} and ask {text}"])
    else:
        text = r.choice(STATEMENTS)
        query = r.choice([
            f"tell {contact} {text}",
            f"text {contact} that {text}",
            f"let {contact} know that {text}",
        ])
    return query, {"contact": contact, "text": text}


def convert_currency(r: random.Random) -> tuple[str, dict]:
    amount = r.randint(2, 199) / 2
    source, target = r.sample(CURRENCIES, 2)
    query = r.choice(["how much is {} {} in {}", "convert {} {} to {}", "change {} {} into {}"])
    return query.format(amount, source, target), {"amount": amount, "source": source, "target": target}


def add_to_list(r: random.Random) -> tuple[str, dict]:
    adjective = r.choice(["", "", *(f"{word} " for word in ITEM_ADJECTIVES)])
    item = adjective + r.choice(ITEMS)
    quantity = r.choice([0, r.randint(2, 30)])
    what = f"{quantity} {item}" if quantity else item
    query = r.choice([
        f"add {what} to the list",
        f"we need {what}",
        f"put {what} on my shopping list",
        f"buy {what}",
    ])
    if quantity:
        return query, {"item": item, "quantity": quantity}
    return query, {"item": item}


def navigate(r: random.Random) -> tuple[str, dict]:
    destination = r.choice(PLACES) + r.choice(["", f" in {r.choice(CITIES)}"])
    avoid_tolls = r.random() < 0.3
    query = r.choice(["how do I get to {}", "take me to {}", "directions to {}"]).format(destination)
    if avoid_tolls:
        return f"{query} without tolls", {"destination": destination, "avoid_tolls": True}
    return query, {"destination": destination}


def book_table(r: random.Random) -> tuple[str, dict]:
    city, people, name = r.choice(CITIES), r.randint(1, 12), r.choice(NAMES)
    query = r.choice([
        f"book a table for {people} in {city} under {name}",
        f"table for {people} in {city}, name {name}",
        f"reserve for {people} people in {city} as {name}",
    ])
    return query, {"city": city, "people": people, "name": name}


REQUESTS: tuple[Callable[[random.Random], tuple[str, dict]], ...] = (
    get_weather, set_timer, set_alarm, set_thermostat, switch_light, play_music, send_message,
    convert_currency, add_to_list, navigate, book_table,
)


# ----------------------------------------------------------------------------------------------------------
# Rows and model


def make_row(r: random.Random, number: int) -> dict:
    """One xLAM row. One query in eight asks for two calls; every row has one tool that it does not need."""
    requests = r.sample(REQUESTS, 2 if r.random() < 0.125 else 1)
    queries, calls = [], []
    for request in requests:
        query, arguments = request(r)
        queries.append(query)
        calls.append({"name": request.__name__, "arguments": arguments})
    needed = [call["name"] for call in calls]
    others = r.sample([name for name in TOOLS if name not in needed], 1)
    tools = [TOOLS[name] for name in (*others, *needed)]
    r.shuffle(tools)
    query = r.choice(["", "", "please ", "hey, "]) + r.choice([" and ", ", then "]).join(queries)
    return {"id": number, "query": query, "tools": json.dumps(tools), "answers": json.dumps(calls)}


def make_rows(r: random.Random, count: int) -> list[dict]:
    """Rows of which no two have the same query."""
    by_query: dict[str, dict] = {}
    while len(by_query) < count:
        row = make_row(r, len(by_query))
        by_query.setdefault(row["query"], row)
    return list(by_query.values())


def texts_between_controls(segments: list[Segment]) -> list[str]:
    """The texts of a row between its control tokens."""
    texts = []
    for is_control, run in groupby(segments, key=lambda segment: isinstance(segment.text, Control)):
        if not is_control:
            texts.append("".join(segment.text for segment in run))
    return texts


def write_demo(folder: Path, rows: int = ROWS, seed: int = 0, config: dict = SMALL) -> None:
    """Write `folder`/rows.jsonl and `folder`/model with random weights; the same files for the same seed.

    config: the model's sizes. Without a "vocab_size" it is that of the vocabulary trained on the rows.
    """
    made = make_rows(random.Random(seed), rows)
    model_folder = folder / "model"
    model_folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "rows.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")

    texts = []
    for row in made[:VOCABULARY_ROWS]:
        texts += texts_between_controls(parse_row(row, "demo").segments())
    train_model_file(texts, model_folder, VOCABULARY)
    vocabulary = Tokenizer.load(model_folder).vocab_size

    config = COMMON | {"vocab_size": vocabulary} | config
    write_json(model_folder / "config.json", config)
    model = Gemma3(config_from_dict(config))
    model.init_weights(torch.Generator().manual_seed(seed))
    save_model(model, model_folder, model_folder)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"demo   {rows} rows over {len(TOOLS)} tools, a model of {millions:.2f} M random parameters, "
          f"{vocabulary} pieces, in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_demo(Path(sys.argv[1]))
