"""The options that say what a job is: model, sampling, prompts, the job itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import orjson

from trbatch.cli_completion import offering
from trbatch.cli_fields import Decorator, grouped, setting
from trbatch.cli_options import adapter_option, store_option
from trbatch.config import PRIORITIES, JobSpec, SamplingParams, check_chat_template_kwargs
from trbatch.errors import UsageError


def _bias(context: click.Context, option: click.Parameter, given: Sequence[str]) -> Any:
    """TOKEN_ID=NUMBER as often as given, as a mapping."""
    bias: dict[str, float] = {}
    for text in given:
        token, _, number = text.partition("=")
        try:
            bias[token.strip()] = float(number)
        except ValueError as error:
            raise click.BadParameter(f"{text!r} is not TOKEN_ID=NUMBER, e.g. 50256=-100") from error
    return bias


def _model_options(without: str) -> Decorator:
    return grouped(
        setting(
            JobSpec,
            "model",
            f"Hub name, model folder or GGUF file. Without it: {without}.",
            metavar="MODEL",
        ),
        adapter_option,
        setting(JobSpec, "revision", "Branch, tag or commit of a hub name.", metavar="REVISION"),
        setting(JobSpec, "trust_remote_code", "Run Python code that comes with the model."),
        section="Model",
    )


model_options = _model_options("TRBATCH_MODEL, trbatch.toml, or a small model for trying out")
worker_model_options = _model_options("what the next chunk needs")

sampling_options = grouped(
    setting(SamplingParams, "max_tokens", "Most tokens to generate for a row."),
    setting(SamplingParams, "temperature", "0: always the likeliest token."),
    setting(SamplingParams, "top_p", "Keep the likeliest tokens of this summed probability."),
    setting(SamplingParams, "top_k", "Keep this many likeliest tokens; 0: all."),
    setting(SamplingParams, "min_p", "Drop tokens less likely than this share of the likeliest."),
    setting(SamplingParams, "stop", "End a row before this text; may be repeated."),
    setting(
        SamplingParams,
        "stop_token_ids",
        "End a row at this token; may be repeated.",
        "--stop-token-id",
        type=int,
    ),
    setting(SamplingParams, "ignore_eos", "Go on after the model's own end."),
    setting(
        SamplingParams,
        "n",
        "Samples of each row, each a row of the dataset; they share one prefill.",
    ),
    setting(
        SamplingParams,
        "repetition_penalty",
        "Above 1: tokens of prompt and output become less likely.",
    ),
    setting(
        SamplingParams, "presence_penalty", "Above 0: tokens that came out become less likely."
    ),
    setting(SamplingParams, "frequency_penalty", "The same, as often as they came out."),
    click.option(
        "logit_bias",
        "--logit-bias",
        multiple=True,
        metavar="TOKEN_ID=NUMBER",
        callback=_bias,
        help="Add to a token's logit, -100 to 100; may be repeated.",
    ),
    setting(SamplingParams, "min_tokens", "No end of a row before so many tokens."),
    setting(
        SamplingParams,
        "logprobs",
        "Keep log probabilities of the tokens and of so many alternatives; 0: of the tokens alone.",
        type=int,
    ),
    setting(SamplingParams, "prompt_logprobs", "The same of the prompt's tokens.", type=int),
    setting(SamplingParams, "return_token_ids", "Keep token ids of prompt and output."),
    setting(
        SamplingParams,
        "reasoning_start",
        "What a thinking model's reasoning begins with; it goes into a column of its own.",
    ),
    setting(SamplingParams, "reasoning_end", "What it ends with; '': leave it in the text."),
    click.option("--json-schema", metavar="FILE", help="Every text is JSON of this."),
    click.option("--regex", help="Every text matches this regular expression, whole."),
    click.option(
        "choices", "--choice", multiple=True, help="Every text is one of these; may be repeated."
    ),
    section="Sampling",
)


def _json_object(context: click.Context, option: click.Parameter, text: str | None) -> Any:
    """The object that an option holds as JSON."""
    if text is None:
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UsageError(
            f"{option.opts[-1]} is not valid JSON at character {error.colno}: {text}",
            hint="""give an object, e.g. '{"enable_thinking": false}'""",
        ) from error
    check_chat_template_kwargs(value)
    return value


prompt_options = grouped(
    setting(
        JobSpec,
        "template",
        "Write each prompt from the row's columns: a Jinja file, or a text such as "
        "'Translate: {{ sentence }}'.",
        metavar="FILE|TEXT",
    ),
    setting(
        JobSpec,
        "system_prompt",
        "Open each chat with this, unless it has a system message; prompts become chats.",
        metavar="TEXT",
    ),
    setting(JobSpec, "chat", "Prompts are what a user says in a chat, not text to be continued."),
    setting(
        JobSpec,
        "chat_template_kwargs",
        "Arguments of the model's chat template, e.g. '{\"enable_thinking\": false}'.",
        metavar="JSON",
        callback=_json_object,
    ),
    setting(
        JobSpec,
        "ignore_body_fields",
        "Pass over this field of OpenAI lines' bodies; 'model': decode them whatever model they "
        "name. May be repeated.",
        "--ignore-body-field",
        metavar="NAME",
    ),
    section="Prompts",
)

job_options = grouped(
    store_option,
    setting(
        JobSpec,
        "name",
        "The job's id. Without it: made from the file and the settings.",
        metavar="JOB",
    ),
    setting(
        JobSpec,
        "task",
        "The kind of work: jobs of one task share a matrix, which is what drafts have learned. "
        "Without it: from the project's and the file's name.",
        metavar="TASK",
    ),
    setting(JobSpec, "cold", "Start from an empty matrix, as if the task were new."),
    setting(
        JobSpec,
        "private_matrix",
        "Keep what is learned from this job's rows to this job: nothing is shared or saved.",
    ),
    setting(JobSpec, "chunk_size", "Rows a worker takes at once."),
    setting(JobSpec, "seed", "Of the whole job. Without it: random, kept in the job.", type=int),
    setting(JobSpec, "prompt_column", "Field or column of the prompt.", metavar="COLUMN"),
    setting(
        JobSpec,
        "id_column",
        "Field or column of the row's id. Without it: custom_id, id, row number.",
        metavar="COLUMN",
    ),
    setting(JobSpec, "max_row_bytes", "A longer row of the input is an error row."),
    setting(
        JobSpec,
        "deadline",
        "Rows that are not done by then become error rows: 8h, 07:00, 2026-11-22T07:00; 'none' "
        "lifts it. Without it: none, or as it was.",
        metavar="WHEN",
    ),
    setting(
        JobSpec,
        "priority",
        "Workers take the chunks of more urgent jobs first. Without it: normal, or as it was.",
        metavar=f"[{'|'.join(PRIORITIES)}]",
        shell_complete=offering(PRIORITIES),
    ),
    setting(
        JobSpec,
        "resume",
        "Whether to continue the job if the same command has made it before.",
        type=click.Choice(["never", "always", "if_possible"]),
    ),
    section="Job",
)
