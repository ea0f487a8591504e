"""Every setting that trbatch has, its default, its check, and nothing else.

The dataclasses are frozen and checked when they are made. Each default is written here once; the
command line reads it from here. An unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from trbatch import structured
from trbatch.checks import (
    INT32,
    bias_of,
    check_choice,
    check_integer,
    check_number,
    listed,
    nearest,
    refuse_unknown,
    texts_of,
    whole,
)
from trbatch.errors import UsageError
from trbatch.masking import mask_text

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_TREE_SIZE = 81
GREEDY_BELOW = 1e-5  # a temperature below it divides float32 logits to infinity
HOTTEST = 1e6  # temperature, where all tokens are alike long since
MAX_SAMPLES = 1024  # of a row
MAX_LOGPROBS = 100  # alternatives at each place
PRIORITIES = ("high", "normal", "low")  # in the order in which workers take chunks
MAX_ROW_BYTES = 4 << 20  # a chunk of such rows still fits into memory
LONGEST_BY_DEFAULT = 8192  # tokens of prompt and output that a worker takes unless asked for more


class _Config:
    """What the config dataclasses share: dictionaries in and out, unknown keys refused."""

    __slots__ = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping, e.g. parsed JSON or TOML.

        Raises:
            UsageError: on an unknown key (names the nearest valid one) or a bad value.
        """
        refuse_unknown(values, [field.name for field in dataclasses.fields(cls)])  # type: ignore[arg-type]
        return cls(**values)

    def __repr__(self) -> str:
        """The settings, without the passwords of URLs."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}  # type: ignore[arg-type]
        inner = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return mask_text(f"{type(self).__name__}({inner})")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-serialisable values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(_Config):
    """How tokens are chosen and when a row ends. Names are vLLM's.

    `temperature` 0 is greedy: always the likeliest token. Logits are changed in vLLM's order:
    `logit_bias`, `min_tokens`, `repetition_penalty` (prompt and output), `frequency_penalty` and
    `presence_penalty` (output); then come temperature, top-k, top-p, min-p, as in transformers.
    Whole numbers may come as floats: that is what a table makes of a column of them in which some
    are absent.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: no limit
    min_p: float = 0.0
    seed: int | None = None  # of the row; None: derived from the job's seed and the row's id
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1  # samples a row
    repetition_penalty: float = 1.0  # divides logits above 0, multiplies those below
    presence_penalty: float = 0.0  # subtracted once from tokens that came out
    frequency_penalty: float = 0.0  # subtracted as often as they came out
    logit_bias: Mapping[Any, float] = field(default_factory=dict, hash=False)  # token id -> number
    min_tokens: int = 0  # before the model's end, a stop token or a stop text may end the row
    logprobs: int | None = None  # alternatives at each token; 0: the token's own alone; None: none
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    return_token_ids: bool = False
    reasoning_start: str = "<think>"  # what stands around the reasoning of models that think
    reasoning_end: str = "</think>"  # "": nothing is split off
    # What the text has to be: {"json": schema}, {"regex": …} or {"choice": […]}; see `structured`.
    structured: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "structured", structured.normalised(self.structured))
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name) or ()
            object.__setattr__(self, name, listed(name, value))
        for name in _WHOLE_NUMBERS:
            object.__setattr__(self, name, whole(getattr(self, name)))
        object.__setattr__(self, "logit_bias", bias_of(self.logit_bias))
        object.__setattr__(self, "stop_token_ids", tuple(map(whole, self.stop_token_ids)))
        check_integer("max_tokens", self.max_tokens, 1, INT32)
        check_number("temperature", self.temperature, 0.0, HOTTEST)
        check_number("top_p", self.top_p, 0.0, 1.0, open_below=True)
        check_integer("top_k", self.top_k, -1, INT32)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_integer("n", self.n, 1, MAX_SAMPLES)
        if self.seed is not None:
            check_integer("seed", self.seed, 0, 2**63 - 1)
        for name in ("ignore_eos", "return_token_ids"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.structured and self.ignore_eos:
            raise UsageError("structured and ignore_eos contradict each other; drop one of them")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError("stop must be a non-empty text or a list of them")
        for token in self.stop_token_ids:
            check_integer("stop_token_ids", token, 0, INT32)
        self._check_more()

    def _check_more(self) -> None:
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_integer("min_tokens", self.min_tokens, 0, INT32)
        if self.min_tokens > self.max_tokens:
            most = f"max_tokens, which is {self.max_tokens}"
            raise UsageError(f"min_tokens must be at most {most}, not {self.min_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("reasoning_start", "reasoning_end"):
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"{name} must be a text, not {getattr(self, name)!r}")
        if self.reasoning_end and not self.reasoning_start:
            raise UsageError("reasoning_start must not be empty where reasoning_end is not")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    def identity(self) -> dict[str, Any]:
        """The settings as JSON-serialisable values, without later ones that are at their default.

        So that what is named after settings keeps its name when there come to be more of them.
        """
        of_old, default = self.to_dict(), SamplingParams().to_dict()
        return {k: v for k, v in of_old.items() if k in _FIRST_FIELDS or v != default[k]}

    def merged(self, overrides: Mapping[str, Any]) -> SamplingParams:
        """These settings with a row's own over them.

        Raises:
            UsageError: on an unknown key or a bad value.
        """
        if not overrides:
            return self
        names = [field.name for field in dataclasses.fields(self)]
        refuse_unknown(overrides, names, what="sampling field")
        return dataclasses.replace(self, **overrides)


_FIRST_FIELDS = frozenset(
    {"max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids",
     "ignore_eos", "n"}
)  # fmt: skip
_WHOLE_NUMBERS = ("max_tokens", "top_k", "seed", "n", "min_tokens", "logprobs", "prompt_logprobs")
SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class JobSpec(_Config):
    """What a job is: an input, a model, how to sample, where the job folder goes."""

    input: str
    out: str = ""  # the job store, a folder of job folders; "": `default_store()`
    output: str = ""  # the dataset that `collect` writes; "": inside the job folder
    name: str = ""  # the job's id; "": made from the input's path and the settings
    model: str = ""  # hub name, folder or GGUF file; "": `default_model()`
    revision: str = ""
    trust_remote_code: bool = False
    task: str = ""  # whose matrix warms these rows; "": from the folder's and the file's name
    cold: bool = False  # start from an empty matrix
    private_matrix: bool = False  # learn from this job for this job alone
    chunk_size: int = 256  # rows a lease covers
    seed: int | None = None  # of the job; None: random, kept in the manifest
    prompt_column: str = "prompt"
    id_column: str = ""  # "": custom_id, else id, else the row number
    max_row_bytes: int = MAX_ROW_BYTES  # a longer row is an error row
    template: str = ""  # Jinja over a row's columns, as text or as its file; "": rows have prompts
    system_prompt: str = ""  # opens each chat that has none; makes chats of prompts
    chat: bool = False  # prompts are the user's turn of a chat, not text to be continued
    chat_template_kwargs: Mapping[str, Any] | None = None  # arguments of the model's chat template
    ignore_body_fields: tuple[str, ...] = ()  # of OpenAI bodies, `model` among them
    deadline: str = ""  # a span or a point in time; see `moments.moment_of`; "": none, or as it was
    priority: str = ""  # high, normal, low; "": normal, or as it was
    resume: str = "if_possible"
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if isinstance(self.sampling, Mapping):
            object.__setattr__(self, "sampling", SamplingParams.from_dict(self.sampling))
        if not self.input:
            raise UsageError("a job needs an input file")
        check_integer("chunk_size", self.chunk_size, 1)
        check_integer("max_row_bytes", self.max_row_bytes, 1, 1 << 30)
        check_chat_template_kwargs(self.chat_template_kwargs or {})
        object.__setattr__(self, "chat_template_kwargs", self.chat_template_kwargs or None)
        fields = texts_of("ignore_body_fields", self.ignore_body_fields)
        object.__setattr__(self, "ignore_body_fields", fields)
        if self.seed is not None:
            check_integer("seed", self.seed, 0, 2**63 - 1)
        check_choice("resume", self.resume, ("never", "always", "if_possible"))
        check_choice("priority", self.priority, ("", *PRIORITIES))


# What the model's chat template cannot be told, because trbatch decides it.
_OWN_ARGUMENTS = {"chat_template", "tokenize", "return_dict", "return_tensors", "conversation"}


def check_chat_template_kwargs(arguments: Any) -> None:
    """Refuse what cannot be given to a chat template.

    Raises:
        UsageError: not an object of names and values, or a name that is taken.
    """
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise UsageError(
            f"chat_template_kwargs must be an object, not {arguments!r:.80}",
            hint='give JSON such as {"enable_thinking": false}',
        )
    if taken := sorted(_OWN_ARGUMENTS.intersection(arguments)):
        raise UsageError(f"chat_template_kwargs may not set {', '.join(taken)}")


TREES = ("best_first", "learned", "paper")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(_Config):
    """How the engine runs on one device. Sizes of 0 are chosen from what the machine has."""

    device: str = "auto"  # auto, cpu, cuda:0, …
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    max_num_seqs: int = 0  # sequences decoded together; 0: 8 on a CPU, 128 on a GPU
    max_model_len: int = 0  # prompt and output together, tokens; 0: the model's, 8,192 at most
    gpu_memory_utilization: float = 0.9
    page_size: int = 16  # tokens a page of the K/V cache
    prefill_chunk: int = 0  # prompt tokens a prefill, over all its sequences; 0: by the machine
    admission_window: int = 256  # rows that wait, of which the longest goes first; 1: in order
    prefix_sharing: bool = True  # run what prompts have in common at their begin only once
    speculate: bool = True
    # How nodes are picked: for each row by chance, along one tree of the task that is learned, or
    # along the published one, as a reference.
    tree: str = "best_first"
    bigrams: bool = True  # begin matrices with what the model says after each single token
    recycle_prompts: bool = True  # learn from prefill, too
    spine: bool = True  # let a repeated passage of the text be a branch of the tree
    tree_size: int = 0  # tokens a step per sequence, the root included; 0: by the budget
    max_tree_size: int = DEFAULT_TREE_SIZE  # the largest that the budget may choose
    enforce_eager: bool = False  # on a GPU, launch each kernel by itself: no captured graphs

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        check_choice("tree", self.tree, TREES)
        for name in ("max_num_seqs", "max_model_len", "tree_size", "prefill_chunk"):
            check_integer(name, getattr(self, name), 0)
        for name in ("page_size", "max_tree_size", "admission_window"):
            check_integer(name, getattr(self, name), 1)
        check_number(
            "gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0, open_below=True
        )


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class WorkerConfig(_Config):
    """How a worker takes chunks from the queue."""

    model: str = ""  # take only this model's chunks; "": load what the next chunk needs
    revision: str = ""  # of the model, where it is a hub name
    name: str = ""  # "": host, device and process id
    burst: bool = False  # stop when the queue is empty
    redis_url: str = ""  # "": TRBATCH_REDIS_URL, REDIS_URL, else the embedded server
    publish_s: float = 2.0  # seconds between segments
    chunks_in_flight: int = 0  # 0: enough that the batch never drains at a chunk's end
    grace_s: float = 60.0  # seconds to finish what was taken when asked to stop
    until: str = ""  # stop then; a span or a point in time, see `moments.moment_of`; "": never
    roots: tuple[str, ...] = ()  # job folders must lie below one of these; (): anywhere
    trust_remote_code: bool = False
    metrics_port: int = 0  # for Prometheus; 0: none
    metrics_host: str = "127.0.0.1"  # whom it is served to: this host alone
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if isinstance(self.engine, Mapping):
            object.__setattr__(self, "engine", EngineConfig.from_dict(self.engine))
        object.__setattr__(self, "roots", texts_of("roots", self.roots))
        check_number("publish_s", self.publish_s, 0.0, 3600.0)
        check_integer("chunks_in_flight", self.chunks_in_flight, 0)
        check_integer("metrics_port", self.metrics_port, 0, 65_535)
        check_number("grace_s", self.grace_s, 0.0, 24 * 3600.0)


PROJECT_SETTINGS = ("model", "worker")  # of `trbatch.toml`; the latter is `profiles`'


def default_model(folder: Path | None = None) -> str:
    """The model of `TRBATCH_MODEL`, else of `model = "…"` in `trbatch.toml`, else the small one.

    Args:
        folder: where `trbatch.toml` is looked for; the working directory if None.
    """
    if model := os.environ.get("TRBATCH_MODEL"):
        return model
    file = (folder or Path.cwd()) / "trbatch.toml"
    if not file.is_file():
        return DEFAULT_MODEL
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not valid TOML: {error}") from error
    for key in settings:
        if key not in PROJECT_SETTINGS:
            hint = nearest(key, PROJECT_SETTINGS)
            raise UsageError(f"{file}: unknown setting {key!r}", hint=hint)
    return str(settings.get("model", DEFAULT_MODEL))


def state_folder() -> Path:
    """The user's folder for what trbatch keeps between runs: `TRBATCH_HOME`, else XDG's."""
    if home := os.environ.get("TRBATCH_HOME"):
        return Path(home)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "trbatch"


def cache_folder() -> Path:
    """The user's folder for what can be made again: models, step costs."""
    if cache := os.environ.get("TRBATCH_CACHE"):
        return Path(cache)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trbatch"


def default_store() -> Path | str:
    """Where job folders go unless told: `TRBATCH_STORE`, else `jobs` in the state folder.

    A URL stays a text: a path would lose one of its slashes.
    """
    store = os.environ.get("TRBATCH_STORE", "")
    return store if "://" in store else Path(store or state_folder() / "jobs")
