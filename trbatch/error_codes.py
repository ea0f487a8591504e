"""What the error codes of rows mean: the column `error_code`, for the documentation.

A code is part of what programs rely on: it is never renamed. Whoever adds one adds its line here.
"""

from __future__ import annotations

# code, what is wrong with the row, what to do about it
FROM_THE_INPUT: tuple[tuple[str, str, str], ...] = (
    ("invalid_json", "the line is not valid JSON", "write one JSON object a line"),
    ("not_an_object", "the line is JSON, but no object", "write `{…}`"),
    ("missing_prompt", "there is neither a prompt nor messages", "give one; `--prompt-column`"),
    ("prompt_and_messages", "there are a prompt and messages", "keep one of them"),
    ("invalid_prompt", "the prompt is no text", "a list of messages goes into `messages`"),
    ("empty_prompt", "the prompt, or every message, is empty", "give it a text or drop the row"),
    ("invalid_messages", "the messages are no list of roles and texts", "`[{role, content}, …]`"),
    ("unsupported_content", "a message holds an image or the like", "only text can be read"),
    ("invalid_characters", "a text holds NUL or is not UTF-8", "remove or re-encode it"),
    ("invalid_value", "a Parquet value cannot be read", "correct the value"),
    ("invalid_id", "the id is missing, empty, or neither text nor whole number", "correct it"),
    ("invalid_sampling", "a sampling field is unknown or out of range", "correct or remove it"),
    ("other_model", "an OpenAI line names another model", "`--ignore-body-field model`"),
    ("not_a_chat", "a prompt has settings that only chats have", "`--chat`, or remove them"),
    ("template_failed", "`--template` cannot be filled from this row", "see the message"),
    ("invalid_chat_template_kwargs", "unusable chat template arguments", "correct them"),
    ("unsupported_field", "an OpenAI field that trbatch does not have", "remove it"),
    ("unsupported_url", "an OpenAI URL other than chat or completions", "use one of the two"),
    ("unsupported_method", "an OpenAI method other than POST", "use `POST`"),
    ("row_too_large", "the row is longer than allowed", "`--max-row-bytes`, or shorten it"),
    ("too_deeply_nested", "the row is nested too deeply", "make it flatter"),
)
FROM_DECODING: tuple[tuple[str, str, str], ...] = (
    ("prompt_too_long", "the prompt does not fit", "`--max-model-len`, or shorten the prompt"),
    ("no_chat_template", "messages, but the model has no chat template", "give `prompt`"),
    ("chat_template_failed", "the model's chat template refuses these messages", "change them"),
    ("invalid_token", "the tokenizer gave a token that the model lacks", "use its own tokenizer"),
    ("out_of_memory", "the row does not fit into memory, even alone", "a larger device"),
    (
        "structured_output_failed",
        "the text ended by itself and has not the form that was asked for",
        "see the message; report it",
    ),
    (
        "structured_output_unavailable",
        "the worker lacks llguidance, or the model's tokenizer cannot be used with it",
        "see the message; `pip install 'trbatch[structured]'` where the worker runs",
    ),
    ("sampling_failed", "choosing a token failed", "report it with the message"),
    ("poison", "decoding this row alone ended the worker three times", "see the message"),
    ("unwritable", "the text does not fit into a dataset", "report it with the message"),
    ("deadline", "the job's deadline passed first", "`trbatch resume --deadline …`"),
    ("cancelled", "the job was cancelled first", "`trbatch resume`"),
)


def error_table(rows: tuple[tuple[str, str, str], ...]) -> str:
    """Codes as a Markdown table: code, meaning, cure."""
    lines = ["| code | what is wrong | what to do |", "|---|---|---|"]
    lines += [f"| `{code}` | {meaning} | {cure} |" for code, meaning, cure in rows]
    return "\n".join(lines) + "\n"
