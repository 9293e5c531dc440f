"""The embedded default: a small Gemma 3 and generated rows, so that `make finetune` learns something with nothing else.

    python demo.py build/demo      # writes build/demo/{model, rows.jsonl}

`model/` is a folder in the published layout: a Gemma 3 of 0.8 M random parameters with every branch of the real one
(local and global layers, shared kv head, tied embedding) and a vocabulary that sentencepiece learns from the rows, in
which FunctionGemma's control tokens keep their ids. `rows.jsonl` holds xLAM rows over eleven tools of a phone. The
same train.py then trains it from nothing until it answers questions it has not seen with the right calls.
"""
from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch

import checkpoint
from dataset.rows import parse_row
from model import Gemma3, GemmaConfig
from tokenizer import Control, Segment, Tokenizer
from tokenizer.model_file import train_model_file

ROWS, VOCABULARY = 19_000, 1_600
# Every branch of the real model, at a size that learns in minutes on two cores.
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
         "head_dim": 32, "query_pre_attn_scalar": 8, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2}
# Gemma 3 270M's sizes, for benchmarks where its weights are not at hand.
FULL_SIZE = {"vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2_048, "num_hidden_layers": 18, "num_attention_heads": 4,
             "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512,
             "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)]}

NAMES = ["Ada", "Alan", "Alice", "Anna", "Ben", "Boris", "Carla", "Chen", "Clara", "Diego", "Elena", "Emma", "Farid", "Felix", "Grace",
         "Hugo", "Ines", "Jack", "Kenji", "Lara", "Leo", "Maria", "Max", "Nadia", "Noah", "Olga", "Omar", "Priya", "Sam", "Zoe"]
CITIES = ["Athens", "Austin", "Berlin", "Boston", "Cairo", "Cape Town", "Delhi", "Dublin", "Geneva", "Hanoi", "Istanbul", "Kyoto",
          "Lagos", "Lima", "Lisbon", "London", "Los Angeles", "Madrid", "Milan", "Montreal", "Nairobi", "New York", "Oslo", "Paris",
          "Prague", "Quito", "Rome", "San Diego", "Seoul", "Vienna"]
ROOMS = ["kitchen", "bedroom", "bathroom", "hallway", "office", "garage"]
CURRENCIES = ["USD", "EUR", "GBP", "JPY", "CHF", "INR"]
GENRES = ["jazz", "rock", "classical", "techno", "folk", "blues"]
ITEMS = ["apples", "bread", "butter", "carrots", "cheese", "coffee", "eggs", "flour", "garlic", "honey", "lemons", "milk", "noodles",
         "onions", "pasta", "potatoes", "rice", "sugar", "tea", "tomatoes"]
KINDS = ["green", "fresh", "organic", "frozen"]
ASK = ["when the train leaves", "what we need for dinner", "if the shop is open", "who has the keys", "where to meet",
       "how the exam went"]
TELL = ["I am running late", "the meeting moved to noon", "dinner is ready", "the package has arrived", "I found the keys",
        "we are out of milk", "the car is fixed", "I will be home soon", "happy birthday", "the flight is on time"]
PLACES = ["the airport", "the station", "the museum", "the harbor", "the library", "the stadium", "the old town", "the hospital"]


def tool(name: str, description: str, /, **parameters: tuple) -> dict:
    """A tool in xLAM's columns; a parameter is (type, description) or (type, description, list of allowed values)."""
    return {"name": name, "description": description, "parameters": {
        key: {"type": kind, "description": text} | ({"enum": values[0]} if values else {})
        for key, (kind, text, *values) in parameters.items()}}


TOOLS = {entry["name"]: entry for entry in (
    tool("get_weather", "Weather forecast for a city", city=("str", "City name"),
         day=("str, optional", "Day of the forecast", ["today", "tomorrow", "weekend"])),
    tool("set_timer", "Start a countdown", minutes=("int", "Length in minutes"), label=("str, optional", "What it is for")),
    tool("set_alarm", "Set an alarm clock", hour=("int", "Hour, 0 to 23"), minute=("int", "Minute")),
    tool("set_thermostat", "Change the heating", room=("str", "Room", ROOMS), temperature=("float", "Degrees Celsius")),
    tool("switch_light", "Turn a light on or off", room=("str", "Room", ROOMS), on=("bool", "True for on")),
    tool("play_music", "Play music", genre=("str", "Style", GENRES), volume=("int, optional", "Percent")),
    tool("send_message", "Send a text message", contact=("str", "Who gets it"), text=("str", "What it says")),
    tool("convert_currency", "Convert money", amount=("float", "How much"), source=("str", "From"), target=("str", "To")),
    tool("add_to_list", "Add to the shopping list", item=("str", "What to buy"), quantity=("int, optional", "How many")),
    tool("navigate", "Show the way", destination=("str", "Where to"), avoid_tolls=("bool, optional", "Avoid toll roads")),
    tool("book_table", "Book a restaurant", city=("str", "City name"), people=("int", "Guests"), name=("str", "Booked under")),
)}


def get_weather(r: random.Random) -> tuple[str, dict]:
    city = r.choice(CITIES)
    text = r.choice(["what is the weather in {}", "will it rain in {}", "how warm is it in {}", "forecast for {}"]).format(city)
    day = r.choice(["", "", "today", "tomorrow", "weekend"])
    return text + {"": "", "weekend": " at the weekend"}.get(day, f" {day}"), {"city": city} | ({"day": day} if day else {})


def set_timer(r: random.Random) -> tuple[str, dict]:
    minutes, label = r.randint(1, 99), r.choice(["", "", "pasta", "laundry", "tea", "a nap", "the oven", "yoga"])
    text = r.choice(["set a timer for {} minutes", "count down {} minutes", "wake me in {} minutes"]).format(minutes)
    return text + (f" for {label}" if label else ""), {"minutes": minutes} | ({"label": label} if label else {})


def set_alarm(r: random.Random) -> tuple[str, dict]:
    hour, minute = r.randint(0, 23), r.randrange(0, 60, 5)
    return r.choice(["wake me at {}:{:02d}", "alarm at {}:{:02d}", "set an alarm for {}:{:02d}"]).format(hour, minute), {
        "hour": hour, "minute": minute}


def set_thermostat(r: random.Random) -> tuple[str, dict]:
    room, temperature = r.choice(ROOMS), r.randint(30, 52) / 2
    return r.choice(["heat the {} to {} degrees", "set the {} to {} degrees", "I want the {} at {} degrees"]).format(
        room, temperature), {"room": room, "temperature": temperature}


def switch_light(r: random.Random) -> tuple[str, dict]:
    room, on = r.choice(ROOMS), r.random() < 0.5
    word = "on" if on else "off"
    return r.choice([f"turn {word} the light in the {room}", f"{room} light {word}", f"switch the {room} light {word}"]), {
        "room": room, "on": on}


def play_music(r: random.Random) -> tuple[str, dict]:
    genre, volume = r.choice(GENRES), r.choice([0, 0, r.randint(1, 100)])
    text = r.choice(["play some {}", "put on {} music", "I feel like {}"]).format(genre)
    return text + (f" at {volume} percent" if volume else ""), {"genre": genre} | ({"volume": volume} if volume else {})


def send_message(r: random.Random) -> tuple[str, dict]:
    contact = r.choice(NAMES)
    if r.random() < 0.4:
        what = r.choice(ASK)
        return r.choice([f"ask {contact} {what}", f"message {contact} and ask {what}"]), {"contact": contact, "text": what}
    what = r.choice(TELL)
    return r.choice([f"tell {contact} {what}", f"text {contact} that {what}", f"let {contact} know that {what}"]), {
        "contact": contact, "text": what}


def convert_currency(r: random.Random) -> tuple[str, dict]:
    amount = r.randint(2, 199) / 2
    source, target = r.sample(CURRENCIES, 2)
    return r.choice(["how much is {} {} in {}", "convert {} {} to {}", "change {} {} into {}"]).format(amount, source, target), {
        "amount": amount, "source": source, "target": target}


def add_to_list(r: random.Random) -> tuple[str, dict]:
    item = r.choice(["", "", *(f"{word} " for word in KINDS)]) + r.choice(ITEMS)
    quantity = r.choice([0, r.randint(2, 30)])
    what = f"{quantity} {item}" if quantity else item
    return r.choice([f"add {what} to the list", f"we need {what}", f"put {what} on my shopping list", f"buy {what}"]), {
        "item": item} | ({"quantity": quantity} if quantity else {})


def navigate(r: random.Random) -> tuple[str, dict]:
    where = r.choice(PLACES) + r.choice(["", f" in {r.choice(CITIES)}"])
    tolls = r.random() < 0.3
    return r.choice(["how do I get to {}", "take me to {}", "directions to {}"]).format(where) + (
        " without tolls" if tolls else ""), {"destination": where} | ({"avoid_tolls": True} if tolls else {})


def book_table(r: random.Random) -> tuple[str, dict]:
    city, people, name = r.choice(CITIES), r.randint(1, 12), r.choice(NAMES)
    return r.choice(["book a table for {1} in {0} under {2}", "table for {1} in {0}, name {2}",
                     "reserve for {1} people in {0} as {2}"]).format(city, people, name), {
        "city": city, "people": people, "name": name}


REQUESTS: tuple[Callable, ...] = (get_weather, set_timer, set_alarm, set_thermostat, switch_light, play_music, send_message,
                                  convert_currency, add_to_list, navigate, book_table)


def make_row(r: random.Random, number: int) -> dict:
    """One xLAM row: one request in eight asks for two things, and every row has tools that it does not need."""
    wanted = r.sample(REQUESTS, 2 if r.random() < 0.125 else 1)
    texts, answers = [], []
    for request in wanted:
        text, arguments = request(r)
        texts.append(text)
        answers.append({"name": request.__name__, "arguments": arguments})
    others = r.sample([name for name in TOOLS if name not in {a["name"] for a in answers}], 1)
    tools = [TOOLS[name] for name in (*others, *(a["name"] for a in answers))]
    r.shuffle(tools)
    query = r.choice(["", "", "please ", "hey, "]) + r.choice([" and ", ", then "]).join(texts)
    return {"id": number, "query": query, "tools": json.dumps(tools), "answers": json.dumps(answers)}


def texts_between_controls(segments: list[Segment]) -> list[str]:
    return ["".join(segment.text for segment in run) for is_control, run in
            groupby(segments, key=lambda segment: isinstance(segment.text, Control)) if not is_control]


def write(folder: Path, rows: int = ROWS, seed: int = 0, config: dict = SMALL) -> None:
    """Write `folder`/rows.jsonl and `folder`/model, random weights of the sizes in `config`; the same for the same seed."""
    r = random.Random(seed)
    by_query: dict[str, dict] = {}               # each question once
    while len(by_query) < rows:
        row = make_row(r, len(by_query))
        by_query.setdefault(row["query"], row)
    made = list(by_query.values())
    (folder / "model").mkdir(parents=True, exist_ok=True)
    with checkpoint.whole_file(folder / "rows.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")

    texts = [text for row in made[:6_000] for text in texts_between_controls(parse_row(row, "demo").segments())]
    train_model_file(texts, folder / "model", VOCABULARY)
    vocabulary = Tokenizer.load(folder / "model").vocab_size
    config = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh",
              "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "max_position_embeddings": 32_768,
              "bos_token_id": 2, "eos_token_id": [1, 50, 106], "pad_token_id": 0, "torch_dtype": "bfloat16",
              "vocab_size": vocabulary, **config}
    checkpoint.write_json(folder / "model" / "config.json", config)
    model = Gemma3(GemmaConfig.from_dict(config))
    model.init_weights(torch.Generator().manual_seed(seed))
    checkpoint.save_model(model, folder / "model", folder / "model")
    size = sum(p.numel() for p in model.parameters())
    print(f"demo   {rows} rows over {len(TOOLS)} tools, a model of {size / 1e6:.2f} M random parameters, {vocabulary} pieces, in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
