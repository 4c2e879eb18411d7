"""The schema of the parameters: every section's keys, their types, and which of them change a result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SECTIONS = ("data", "tokenizer", "model", "pretraining", "evaluation", "chat", "carbon")
PARAMETER_NAMES = ("size", "file", "run", "base", "seed", *SECTIONS)

# a key that may change while a stage is under way or finished: it does not change the stage's result
FREE = {"identity": False}
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def free(default: Any = ..., **constraints: Any) -> Any:
    return Field(default, json_schema_extra=FREE, **constraints)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def identity(self) -> dict:
        """The keys that decide the stage's result, as plain data."""
        kept = {}
        for name, field in type(self).model_fields.items():
            if (field.json_schema_extra or {}).get("identity", True):
                kept[name] = _plain(getattr(self, name))
        return kept


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.identity()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


class Filter(Section):
    """Thresholds for one kind of text: the rules of Gopher (Rae et al. 2021, appendix A), language and near copies.

    A rule that is not named is off.
    """

    max_characters: Positive = 2_000_000
    min_words: int = 0
    max_words: Positive = 1_000_000
    min_mean_word_length: float = 0.0
    max_mean_word_length: float = 1_000_000.0
    max_symbols_per_word: float = 1_000_000.0
    max_bullet_lines: Share = 1.0
    max_ellipsis_lines: Share = 1.0
    min_letter_words: Share = 0.0
    min_stop_words: int = 0
    max_duplicate_lines: Share = 1.0
    max_duplicate_line_characters: Share = 1.0
    max_duplicate_paragraphs: Share = 1.0
    max_duplicate_paragraph_characters: Share = 1.0
    max_top_ngrams: list[Share] = Field([1.0] * 3, min_length=3, max_length=3)
    max_duplicate_ngrams: list[Share] = Field([1.0] * 6, min_length=6, max_length=6)
    min_language_probability: Share = 0.0
    near_duplicates: bool = False
    toxicity: bool = False


class Origin(Section):
    """A part of a mixed data set: its documents are told by a pattern in the set's origin column."""

    pattern: str
    kind: Literal["plain", "instruction"]
    filter: str
    licence: str


class Source(Section):
    """One place where text comes from: a wheel of the package index, a data set of the hub, or local files."""

    # a folder of the stage is named for it
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,80}$")]
    use: Literal["corpus", "chat", "downstream"]
    kind: Literal["plain", "instruction"]
    filter: str
    licence: str
    collection: str | None = None
    limit: Positive | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    # a wheel, read as a data archive
    package: str | None = None
    version: str | None = None
    sha256: str | None = None
    reader: str | None = None
    # a data set of the hub
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    # local files: Parquet, JSON lines or text, the last two also compressed
    files: list[str] = []
    text_documents: Literal["file", "line", "blank line"] = "file"
    # of the hub and of files: what is read of a row
    columns: list[str] = []
    where: dict[str, str | int | bool] = {}
    origin_column: str | None = None
    origins: list[Origin] = []

    @model_validator(mode="after")
    def one_origin(self) -> Source:
        wheel = (self.package, self.version, self.sha256, self.reader)
        hub = (self.dataset, self.split)
        given = [any(wheel), any(hub), bool(self.files)]
        whole = all(wheel) or (all(hub) and self.columns) or self.files
        if sum(given) != 1 or not whole:
            raise ValueError(
                f"source {self.name!r} needs either package, version, sha256 and reader (a wheel), "
                "or dataset, split and columns (the hub), or files (on this machine)"
            )
        for origin in self.origins:
            try:
                re.compile(origin.pattern)
            except re.error as error:
                raise ValueError(f"source {self.name!r}: pattern {origin.pattern!r} is not one ({error})") from None
        if self.origins and not self.origin_column:
            raise ValueError(f"source {self.name!r} has origins, but no origin_column to tell them by")
        return self


class PersonalData(Section):
    """What is done with each kind of personal data: `drop` rejects the whole document."""

    cpf: Literal["keep", "mask", "drop"]
    email: Literal["keep", "mask", "drop"]
    telephone: Literal["keep", "mask", "drop"]
    handle: Literal["keep", "mask", "drop"]


class NearDuplicates(Section):
    """MinHash over word n-grams: two texts are candidates when all `rows` hashes of one of `bands` agree."""

    ngram: Positive
    bands: Positive
    rows: Positive


class Toxicity(Section):
    """The classifier whose low scores reject a document."""

    model: str
    revision: str | None = None
    threshold: float
    max_length: Positive
    batch_size: Positive = free()


class TextSet(Section):
    """Texts of a data set of the hub or of local files, to be read beside the corpus."""

    name: str
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    files: list[str] = []
    text_documents: Literal["file", "line", "blank line"] = "file"
    columns: list[str] = []

    @model_validator(mode="after")
    def one_origin(self) -> TextSet:
        if bool(self.dataset) == bool(self.files) or (self.dataset and not (self.split and self.columns)):
            raise ValueError(f"{self.name!r} needs either dataset, split and columns (the hub) or files")
        return self


class Overlap(Section):
    """Which evaluation sets are looked for in the training text, by word n-grams."""

    ngram: Positive
    sets: list[TextSet]


class Data(Section):
    collection: str | None
    sources: list[Source] = Field(min_length=1)
    filters: dict[str, Filter]
    language: Annotated[str, Field(min_length=2, max_length=3)]
    permissive_only: bool
    personal_data: PersonalData
    near_duplicates: NearDuplicates
    toxicity: Toxicity | None
    overlap: Overlap = free()
    test_share: Share
    passage_sentences: Positive
    instruction_copies: Positive
    shard_mb: Positive = free()
    workers: Positive | None = free()

    @model_validator(mode="after")
    def known_names(self) -> Data:
        for source in self.sources:
            for name in (source.filter, *(origin.filter for origin in source.origins)):
                if name not in self.filters:
                    known = ", ".join(self.filters)
                    raise ValueError(f"source {source.name!r} names filter {name!r}; known filters: {known}")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("two sources have the same name")
        collections = {source.collection for source in self.sources if source.collection}
        if self.collection is not None and self.collection not in collections:
            known = ", ".join(sorted(collections)) or "none"
            raise ValueError(f"collection {self.collection!r}: no source belongs to it; known collections: {known}")
        if not self.active:
            raise ValueError("collection null leaves no source: every source belongs to a collection")
        return self

    @property
    def active(self) -> list[Source]:
        """The sources that are read: those of the chosen collection, and those that belong to none."""
        return [source for source in self.sources if source.collection in (None, self.collection)]

    def identity(self) -> dict:
        # a source that is not read, and a filter that none uses, change no result
        filters = {item.filter for source in self.active for item in (source, *source.origins)}
        kept = super().identity() | {"sources": [source.identity() for source in self.active]}
        return kept | {"filters": {name: kept["filters"][name] for name in self.filters if name in filters}}


class Tokens(Section):
    """A tokenized data set of the hub, taken in the place of the corpus of stage 01."""

    dataset: str
    config: str | None = None
    revision: str | None = None
    train_split: str
    test_split: str
    column: str


class Comparison(Section):
    """Other tokenizers beside ours: trained on the same lines, or loaded."""

    algorithms: list[Literal["bpe", "unigram", "wordpiece"]]
    samples: Positive
    documents: Positive
    tokenizers: list[str]
    texts: list[TextSet]


class Tokenizer(Section):
    source: str | None
    revision: str | None
    tokens: Tokens | None
    vocab_size: Annotated[int, Field(ge=300, le=2**16)]
    train_samples: Positive
    train_characters: Positive
    character_coverage: Share
    max_sentence_length: Positive
    split_digits: bool
    append_eos: bool
    efficiency_words: Positive
    comparison: Comparison = free()
    parity_documents: Positive | None = free()
    shard_tokens: Positive = free()

    @model_validator(mode="after")
    def tokens_have_a_tokenizer(self) -> Tokenizer:
        if self.tokens and not self.source:
            raise ValueError("tokens are given, but not source: the tokenizer that made them")
        return self


class Model(Section):
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    max_position_embeddings: Annotated[int, Field(ge=8)]
    rope_theta: float
    rms_norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool

    @model_validator(mode="after")
    def heads_divide(self) -> Model:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError("hidden_size / num_attention_heads must be even: rotary embeddings turn pairs")
        return self


class Optimisation(Section):
    """What the training loop needs, for pretraining and for chat alike."""

    tokens_per_step: Positive
    per_device_train_batch_size: Positive = free()
    learning_rate: Annotated[float, Field(gt=0)]
    lr_scheduler_type: Literal["cosine", "linear", "constant"]
    warmup_steps: Annotated[int, Field(ge=0)]
    adam_beta1: Share
    adam_beta2: Share
    adam_epsilon: float
    weight_decay: Annotated[float, Field(ge=0)]
    decay_norms: bool
    max_grad_norm: Annotated[float, Field(gt=0)] | None
    device: Literal["auto", "cpu", "cuda", "mps"] = free()
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = free()
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = free()
    compile: bool = free()
    gradient_checkpointing: bool = free(False)
    optim: Literal["adamw_torch_fused", "adamw_torch"] = free("adamw_torch_fused")
    logging_steps: Positive = free()
    log_with: list[str] = free([])
    save_steps: Positive = free()
    resumable_checkpoints: Positive = free()
    save_total_limit: Positive | None = free(None)
    resume_from_checkpoint: Annotated[int, Field(ge=0)] | None = free(None)
    max_hours: Annotated[float, Field(gt=0)] | None = free(None)
    copy_to: str | None = free(None)


class Pretraining(Optimisation):
    max_steps: Positive
    seed: int | None = None
    block_size: Annotated[int, Field(ge=8)] | None
    isolate_documents: bool
    # the weights' hash is the identity, not the place they came from
    init_from: str | None = free(None)
    init_revision: str | None = free(None)
    init_schedule: Literal["new", "same", "longer"] = free("new")
    search_steps: Positive | None = free(None)
    eval_steps: Positive = free()
    eval_tokens: Positive | None = free()
    prompts: list[str] = free()
    max_new_tokens: Positive = free()


class Task(Section):
    name: str
    # None: as the task's own file says
    num_fewshot: Annotated[int, Field(ge=0)] | None = None


class Inference(Section):
    """The load under which tokens per second are measured."""

    batch_sizes: list[Positive] = Field(min_length=1)
    prompt_tokens: Positive
    new_tokens: Annotated[int, Field(ge=2)]


class Generation(Section):
    """What a model is made to write, to measure what section 5 of the paper warns of."""

    prompts: list[str]
    code_prompts: list[str]
    samples: Positive
    max_new_tokens: Positive
    temperature: Annotated[float, Field(gt=0)]
    top_k: Positive
    top_p: Share
    repetition_penalty: Annotated[float, Field(gt=0)]
    toxicity: Toxicity | None


class Downstream(Section):
    """A text classification set: either a `use: downstream` source of stage 01, or a set of the hub."""

    name: str
    source: str | None = None
    dataset: str | None = None
    config: str | None = None
    revision: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    text: str
    label: str
    max_length: Positive

    @model_validator(mode="after")
    def one_origin(self) -> Downstream:
        if (self.source is None) == (self.dataset is None):
            raise ValueError(f"downstream {self.name!r} needs either source (of stage 01) or dataset (of the hub)")
        if self.dataset is not None and not (self.train_split and self.test_split):
            raise ValueError(f"downstream {self.name!r} needs train_split and test_split")
        return self


class Evaluation(Section):
    # the weights' hash is the identity, not the place they came from
    model: str | None = free(None)
    model_revision: str | None = free(None)
    texts: list[TextSet] = free()
    texts_limit: Positive | None = free()
    protocols: list[Literal["paper", "leaderboard"]]
    harness: list[Task]
    harness_limit: Positive | None
    checkpoint_tasks: list[str] = free()
    downstream: list[Downstream]
    downstream_epochs: Positive
    downstream_batch_size: Positive
    downstream_learning_rate: Annotated[float, Field(gt=0)]
    downstream_weight_decay: Annotated[float, Field(ge=0)]
    downstream_seeds: Positive
    downstream_baselines: list[str]
    inference: Inference | None = free()
    generation: Generation | None = free()
    batch_size: Positive = free()


class Chat(Optimisation):
    # the weights' hash is the identity, not the place they came from
    base_model: str | None = free(None)
    base_model_revision: str | None = free(None)
    faithful: bool
    user_open: str
    user_close: str
    num_train_epochs: Positive
    prompts: list[str] = Field(min_length=1)
    samples: Positive
    max_new_tokens: Positive
    temperature: Annotated[float, Field(gt=0)]
    top_k: Positive
    top_p: Share
    repetition_penalty: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def marks(self) -> Chat:
        for name in ("user_open", "user_close"):
            mark = getattr(self, name)
            # they stand in the template between quotes, and are tokens of their own
            if not mark.strip() or set(mark) & set("'\"\\{}") or mark in ("<s>", "</s>", "<unk>", "<pad>"):
                raise ValueError(
                    f"{name} {mark!r}: give a mark such as <instruction>, without quotes, braces and backslashes, that "
                    "is no control token of the tokenizer (<s>, </s>, <unk>, <pad>)"
                )
        if self.user_open == self.user_close:
            raise ValueError(f"user_open and user_close are both {self.user_open!r}: give two different marks")
        return self

    def sampling(self, toxicity: Toxicity | None = None) -> Generation:
        """How answers are drawn, and whether they are scored."""
        return Generation(code_prompts=[], toxicity=toxicity, **self.model_dump(include=set(Generation.model_fields)))


class Carbon(Section):
    country_iso_code: Annotated[str, Field(min_length=3, max_length=3)]
    carbon_intensity_g_per_kwh: Annotated[float, Field(gt=0)] | None
    pue: Annotated[float, Field(ge=1)]
    measure_power_s: Annotated[float, Field(gt=0)] = free()


class Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    file: str
    size: str
    run: str | None
    base: str | None
    seed: int
    data: Data
    tokenizer: Tokenizer
    model: Model
    pretraining: Pretraining
    evaluation: Evaluation
    chat: Chat
    carbon: Carbon

    @model_validator(mode="after")
    def sections_fit(self) -> Parameters:
        context = self.model.max_position_embeddings
        block = self.pretraining.block_size or context
        if block > context:
            raise ValueError(f"pretraining.block_size {block} is longer than model.max_position_embeddings {context}")
        for name, length in (("pretraining", block), ("chat", context)):
            section = getattr(self, name)
            micro = section.per_device_train_batch_size * length
            if section.tokens_per_step % micro:
                own = name == "pretraining" and self.pretraining.block_size
                what = "pretraining.block_size" if own else "model.max_position_embeddings"
                raise ValueError(
                    f"{name}.tokens_per_step {section.tokens_per_step} is not a multiple of "
                    f"{name}.per_device_train_batch_size x {what} "
                    f"({section.per_device_train_batch_size} x {length} = {micro})"
                )
        # a question is four tokens at least: <s>, both marks, and a word
        if self.chat.max_new_tokens > context - 4:
            raise ValueError(
                f"chat.max_new_tokens {self.chat.max_new_tokens} leaves no room for a question in "
                f"model.max_position_embeddings {context}: at most {context - 4}"
            )
        for item in self.evaluation.downstream:
            if item.max_length > context:
                raise ValueError(
                    f"evaluation.downstream {item.name!r}: max_length {item.max_length} is longer than "
                    f"model.max_position_embeddings {context}"
                )
            if item.source and item.source not in [s.name for s in self.data.sources if s.use == "downstream"]:
                raise ValueError(
                    f"evaluation.downstream {item.name!r}: no source of data.sources with use: downstream "
                    f"is named {item.source!r}"
                )
        load = self.evaluation.inference
        if load and not self.evaluation.model and load.prompt_tokens + load.new_tokens > context:
            raise ValueError(
                f"evaluation.inference: prompt_tokens {load.prompt_tokens} and new_tokens {load.new_tokens} are more "
                f"than model.max_position_embeddings {context} together"
            )
        # the size is the folder's name where no run is named
        for name in ("size", "run", "base"):
            value = getattr(self, name)
            if value is not None and (not value or Path(value).name != value or value.startswith(".")):
                raise ValueError(f"{name} {value!r} is not a plain folder name")
        return self
