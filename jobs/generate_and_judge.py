"""Answers, and a verdict on each: two jobs, the second made from what the first gave.

    python jobs/generate_and_judge.py prompts.jsonl judged.parquet --judge-model org/bigger

Every row of the input is in the dataset once: the answer's columns, and behind them `verdict`
(what the judge said) and `score` (the number in it, from 1 to 5; absent where there is none). Rows
without an answer are not judged. The same command again continues both jobs. Workers must run
already (see `workers/`); one without --model changes the model between the stages by itself.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import trbatch

QUESTION = """Rate how well the answer fits the request, from 1 (not at all) to 5 (perfectly).
Reply with the number alone.

Request:
{request}

Answer:
{answer}

Rating:"""
KEY = ("custom_id", "sample_index")  # what an answer is known by


def request_of(line: str) -> str:
    """What a line of the input asks for: its prompt, or what was said last in its messages."""
    row = json.loads(line)
    row = row.get("body") or row  # a line of OpenAI's batch format
    return str(row.get("prompt") or row["messages"][-1]["content"])


def write_questions(prompts: Path, answers: pa.Table, file: Path) -> int:
    """The judge's input: a row for each answer that there is. Returns how many."""
    asked = [line for line in prompts.read_text(encoding="utf-8").split("\n") if line.strip()]
    count = 0
    with file.open("w", encoding="utf-8") as lines:
        for row in answers.select([*KEY, "prompt_index", "text"]).to_pylist():
            if row["text"] is None:
                continue
            request = request_of(asked[row["prompt_index"]])
            question = QUESTION.format(request=request, answer=row["text"])
            key = f"{row['custom_id']}/{row['sample_index']}"
            message = {"role": "user", "content": question}
            lines.write(json.dumps({"id": key, "messages": [message]}) + "\n")
            count += 1
    return count


def score_of(verdict: str | None) -> int | None:
    """The first number from 1 to 5 that stands alone in a verdict."""
    found = re.search(r"(?<![\d.])[1-5](?![\d.]*\d)", verdict or "")
    return int(found[0]) if found else None


def judged(answers: pa.Table, verdicts: pa.Table) -> pa.Table:
    """The answers with what the judge said of each, in their order."""
    said = dict(zip(verdicts["custom_id"].to_pylist(), verdicts["text"].to_pylist(), strict=True))
    keys = zip(*(answers[name].to_pylist() for name in KEY), strict=True)
    texts = [said.get(f"{custom_id}/{sample}") for custom_id, sample in keys]
    scores = [score_of(text) for text in texts]
    return answers.append_column("verdict", pa.array(texts, pa.string())).append_column(
        "score", pa.array(scores, pa.int8())
    )


def stage(input: Path, output: Path, model: str, max_tokens: int) -> int:
    """A job from its submission to its dataset. Returns the receipt's exit code."""
    job = trbatch.submit(input, model=model, max_tokens=max_tokens)
    print(f"{input.name}: job {job.id}", file=sys.stderr, flush=True)
    job.wait()
    receipt = job.collect(output)
    print(receipt, file=sys.stderr)
    return receipt.exit_code


def main(arguments: list[str] | None = None) -> int:
    """Generate, judge, join. Returns 0, 3 if rows failed, or the exit code of what went wrong."""
    parser = argparse.ArgumentParser(description="Decode prompts, and have the answers judged.")
    parser.add_argument("prompts", type=Path, help="JSON Lines with 'prompt' or 'messages'")
    parser.add_argument("output", type=Path, help="Parquet file to write")
    parser.add_argument("--model", default="", help="for the answers")
    parser.add_argument("--judge-model", default="", help="for the verdicts; else the same")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer")
    options = parser.parse_args(arguments)
    answers_file = options.output.with_suffix(".answers.parquet")
    questions = options.output.with_suffix(".questions.jsonl")
    verdicts_file = options.output.with_suffix(".verdicts.parquet")
    try:
        code = stage(options.prompts, answers_file, options.model, options.max_tokens)
        answers = pq.read_table(answers_file)
        if not write_questions(options.prompts, answers, questions):
            print("error: there is no answer to judge", file=sys.stderr)
            return code
        judge = options.judge_model or options.model
        code = max(code, stage(questions, verdicts_file, judge, 8))
    except trbatch.TrbatchError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    table = judged(answers, pq.read_table(verdicts_file))
    pq.write_table(table, options.output)
    scores = [score for score in table["score"].to_pylist() if score is not None]
    mean = f", {sum(scores) / len(scores):.2f} on average" if scores else ""
    print(f"{options.output}: {table.num_rows} rows, {len(scores)} with a score{mean}")
    return code


if __name__ == "__main__":
    sys.exit(main())
