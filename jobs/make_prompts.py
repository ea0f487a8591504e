"""Any number of different prompts, made from a few templates over varied facts.

    python jobs/make_prompts.py 5000 > prompts.jsonl

They stand for a night's work of one kind: rows that share their wording and differ in their facts,
which is what a task's matrix is for. The same number and seed always give the same file, and the
first rows of a longer file are those of a shorter one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys

TEMPLATES = {
    "reply": (
        "Write a short, polite reply to this message.\n\nHello, this is {name} from {city}. On "
        "{day} I ordered {count} {colour} {thing} (order {number}), but {trouble}. What can you do?"
    ),
    "extraction": (
        "Extract name, city, product, colour, quantity and order number as JSON.\n\n{name} rang "
        "from {city} on {day}: please send {count} more {colour} {thing}, as in order {number}."
    ),
    "description": (
        "Write a product description of three sentences for our shop in {city}: {colour} {thing}, "
        "made by {name}, article {number}, {price} euros, on sale from {day}."
    ),
    "summary": (
        "Summarise this note in one sentence.\n\n{day}: {name} visited the warehouse in {city}. "
        "{count} boxes of {colour} {thing} were counted, but {trouble}. Order {number} waits until "
        "this is settled."
    ),
    "calculation": (
        "{name} sells {colour} {thing} in {city} for {price} euros each. Invoice {number} is for "
        "{count} of them, and one was paid for on {day}. What is the total, and what remains to be "
        "paid? Show the calculation step by step."
    ),
    "list": (
        "{name} opens a shop for {colour} {thing} in {city} on {day} with {count} guests. List "
        "five things to prepare, each with one sentence why. Mention booking {number}."
    ),
}

FACTS = {
    "name": (
        "Marta Kowalska", "Jonas Berg", "Aisha Rahman", "Luca Ferri", "Mei Tanaka", "Tom Okafor",
        "Clara Dubois", "Iván Morales", "Hanna Virtanen", "David Cohen", "Priya Nair",
        "Erik Lindqvist", "Sofia Papadaki", "Noah Fischer", "Lena Novak", "Omar Haddad",
        "Ruth Adeyemi", "Pavel Horák", "Grace Murphy", "Yusuf Demir",
    ),
    "city": (
        "Gdansk", "Bergen", "Leeds", "Turin", "Osaka", "Lagos", "Lyon", "Seville", "Tampere",
        "Haifa", "Kochi", "Uppsala", "Patras", "Bremen", "Maribor", "Amman", "Cork", "Brno",
        "Izmir", "Utrecht", "Quebec", "Nairobi", "Valparaíso", "Wellington",
    ),
    "thing": (
        "enamel kettles", "wool blankets", "desk lamps", "paper lanterns", "garden chairs",
        "fountain pens", "bicycle bells", "tea sets", "picture frames", "oak shelves",
        "rain coats", "wall clocks", "travel mugs", "chess boards", "flower pots", "tool boxes",
        "sleeping bags", "bread knives", "hand mirrors", "board games", "leather belts",
        "water bottles", "candle holders", "kitchen scales",
    ),
    "colour": (
        "blue", "dark green", "red", "cream", "grey", "yellow", "copper", "black", "violet",
        "white", "orange", "turquoise",
    ),
    "day": (
        "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "1 March", "12 April",
        "23 May", "4 June", "15 July", "26 August", "7 September", "18 October", "29 November",
    ),
    "trouble": (
        "the parcel has not arrived", "two of them are broken", "the colour is wrong",
        "the invoice names another customer", "the lids are missing", "the price has changed",
        "they were delivered to a neighbour", "the manual is in the wrong language",
        "one box was empty", "they are smaller than in the picture", "the screws do not fit",
        "nobody answers the telephone",
    ),
}  # fmt: skip


def prompt(index: int, seed: int) -> dict[str, object]:
    """Row number `index`, from 0. It depends on nothing but its arguments."""
    draw = random.Random(f"{seed}/{index}")
    kind = tuple(TEMPLATES)[index % len(TEMPLATES)]
    facts: dict[str, object] = {name: draw.choice(values) for name, values in FACTS.items()}
    facts |= {"count": draw.randint(2, 60), "price": draw.randint(3, 240)}
    # The number alone would make the rows different; the other facts make them varied.
    facts["number"] = 10_000 + index
    text = TEMPLATES[kind].format(**facts)
    return {
        "id": f"{kind}-{index:06d}",
        "messages": [{"role": "user", "content": text}],
        "category": kind,
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the rows to stdout."""
    parser = argparse.ArgumentParser(description="Make different prompts as JSON Lines.")
    parser.add_argument("count", type=int, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other facts")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"count must be at least 1, not {options.count}")
    for index in range(options.count):
        print(json.dumps(prompt(index, options.seed), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
