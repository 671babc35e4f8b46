"""Settings of what is learned from: sources of text or images, tokenizer, batches."""

import math
from fractions import Fraction
from operator import not_
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from relora_train.settings.base import Address, FrozenConfig

FILE_SOURCES = ("text", "jsonl", "csv", "parquet")
"""Sources of text that lie in files."""

RECORD_SOURCES = ("jsonl", "csv", "parquet", "hub")
"""Sources whose records have fields."""

_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_PACKAGE = r"^[A-Za-z0-9][A-Za-z0-9._-]*==[^\s=]+$"


class TokenizerConfig(FrozenConfig):
    """The tokenizer: one to load, the model's own, or a byte-level BPE trained on the training part."""

    path: Address | None = None
    """tokenizer.json, directory or hub id to load; when absent, the model's own, or a trained one for a new model."""

    revision: str | None = None
    """Hub revision of `path`."""

    train: bool = False
    """Train one although the model has its own, whose embeddings then belong to other ids; a new model has none."""

    vocab_size: int = Field(4096, ge=257)
    """Entries of a trained tokenizer, its end-of-text token included."""

    eos_token: str | None = None
    """The document separator; found by its usual names when absent ('<|endoftext|>' in a trained tokenizer)."""

    mask_token: str | None = None
    """The token in place of hidden ones, for 'masked_lm'; found by its usual names ('[MASK]' in a trained one)."""

    training_bytes: int = Field(200_000_000, ge=10_000)
    """Text a tokenizer is trained on at most."""

    @model_validator(mode="after")
    def a_loaded_one_is_not_trained(self) -> Self:
        if self.path is not None and self.train:
            raise ValueError(f"train = true trains a tokenizer, and path {self.path!r} names one to load; drop one")
        return self


Holds = Literal["texts", "messages", "prompts", "labels"]
"""The things that a source's records hold: whole texts (or images), or examples of a kind."""


class InstructionsConfig(FrozenConfig):
    """Conversations, or prompts with completions: only the answers are learned."""

    messages: str | None = None
    """Field that holds a conversation: a list of {"role": …, "content": …}."""

    prompt: str | None = None
    """Field of the text that is given."""

    completion: str | None = None
    """Field of the text that answers it."""

    chat_template: Address | None = None
    """File of the Jinja template that turns messages into text; the tokenizer's own when absent."""

    @model_validator(mode="after")
    def it_names_messages_or_a_prompt_with_its_completion(self) -> Self:
        if (self.prompt is None) != (self.completion is None) or (self.messages is None) == (self.prompt is None):
            raise ValueError("instructions name messages, or prompt and completion together")
        if self.chat_template is not None and self.messages is None:
            raise ValueError("chat_template is for messages; prompt and completion are taken as they are")
        return self


class LabelsConfig(FrozenConfig):
    """Texts, or pairs of texts, with a class. The text is `data.text_field`."""

    field: str = "label"
    """Field that holds the class: a whole number or a name."""

    text_pair_field: str | None = None
    """Field of a second text."""


class SourceConfig(FrozenConfig):
    """The place of text or images."""

    source: Literal["python-stdlib", "packages", "text", "jsonl", "csv", "parquet", "hub", "digits", "idx"] = (
        "python-stdlib"
    )
    """'python-stdlib' is the standard library's own source. Images: scikit-learn's 'digits', 'idx' of MNIST's kind."""

    # Keys that came later: at their defaults they are not dumped, and so in no name, also in a list of sources.
    packages: tuple[Annotated[str, Field(pattern=_PACKAGE)], ...] = Field((), exclude_if=not_)
    """Installed Python packages as NAME==VERSION, whose own source is the text, for source 'packages'."""

    content_sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$", exclude_if=not_)
    """SHA-256 that the files must have together, as manifests and reports name it; other content is refused."""

    paths: tuple[Address, ...] = ()
    """Files, directories, globs or s3:// prefixes, for text, jsonl, csv, parquet and idx; a file counts once."""

    validation_paths: tuple[Address, ...] = ()
    """Files to hold out, named like `paths` and read alike; then the rest of `paths` is trained on."""

    hub_id: Address | None = None
    """Dataset on the hub, for source 'hub'."""

    hub_config: str | None = None
    """Its configuration, such as 'en'."""

    hub_split: str = "train"
    """Its split."""

    hub_revision: str | None = None
    """Its revision; the newest when absent, recorded with the dataset."""

    text_field: str = "text"
    """Field of a document, or column of a CSV, that holds its text; inside other fields: 'meta.body.text'."""

    instructions: InstructionsConfig | None = None
    """Answers to learn, instead of whole texts."""

    labels: LabelsConfig | None = None
    """Classes of texts to learn."""

    unreadable: Literal["stop", "skip"] = "stop"
    """'skip' leaves out, and counts, records without text and files that are no text. 'stop' ends with an error."""

    max_documents: int | None = Field(None, ge=1)
    """Stop after so many documents, or training images, of the source."""

    @property
    def holds(self) -> Holds:
        """The kind of examples that the settings ask for; 'texts' where they ask for none."""
        if self.instructions:
            return "messages" if self.instructions.messages else "prompts"
        return "labels" if self.labels else "texts"

    @model_validator(mode="after")
    def settings_fit_the_source(self) -> Self:
        if self.source in (*FILE_SOURCES, "idx") and not self.paths:
            raise ValueError(f"source {self.source!r} needs paths")
        if self.source == "hub" and not self.hub_id:
            raise ValueError("source 'hub' needs hub_id")
        if self.source == "hub" and self.content_sha256:
            raise ValueError("source 'hub' takes no content_sha256; hub_revision pins it")
        if (self.source == "packages") != bool(self.packages):
            raise ValueError("packages and source 'packages' go together; set both, or packages to []")
        if self.validation_paths and self.source not in FILE_SOURCES:
            raise ValueError(f"source {self.source!r} takes no validation_paths; {', '.join(FILE_SOURCES)} do")
        if self.unreadable == "skip" and self.source not in (*FILE_SOURCES, "hub"):
            raise ValueError(f"source {self.source!r} takes no unreadable 'skip'; {', '.join(FILE_SOURCES)}, hub do")
        if (self.instructions or self.labels) and self.source not in RECORD_SOURCES:
            raise ValueError(
                f"source {self.source!r} has no records with fields, which instructions and labels are read from; "
                f"{', '.join(RECORD_SOURCES)} do"
            )
        if self.instructions and self.labels:
            raise ValueError("a source has instructions or labels, not both")
        if self.paths and self.source in ("python-stdlib", "packages", "hub", "digits"):
            readers = ", ".join((*FILE_SOURCES, "idx"))
            raise ValueError(
                f"source {self.source!r} does not read paths; set source to one that does ({readers}), or paths to []"
            )
        return self


class WeightedSourceConfig(SourceConfig):
    """One of several sources of text, and its share of what is trained on."""

    name: str = Field(pattern=_NAME)
    """Folder of its dataset in the store, and its name in logs and reports."""

    weight: float = Field(1.0, gt=0)
    """Its share of the tokens is this over the sum of all weights."""

    @model_validator(mode="after")
    def it_is_of_text(self) -> Self:
        if self.source in ("digits", "idx"):
            raise ValueError(f"source {self.source!r} is of images, and only sources of text are mixed")
        if self.labels:
            raise ValueError("labels are of one source: set [data.labels], and leave [[data.sources]] out")
        return self


class DataConfig(SourceConfig):
    """The source of text or images, or several sources, and how they become shards."""

    name: str = Field("corpus", pattern=_NAME)
    """Folder of the dataset in the store."""

    sources: tuple[WeightedSourceConfig, ...] = ()
    """Several sources of text as [[data.sources]], each with a name, a weight by tokens, and the keys of one source."""

    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of documents or digits held out, chosen by a hash of their content; of idx it is the test files."""

    shard_tokens: int = Field(8_388_608, ge=1024)
    """Tokens a shard holds at most."""

    workers: int | None = Field(None, ge=1)
    """Processes that tokenize; one a core when absent. Does not change the result."""

    engine: Literal["auto", "tokenizers", "tiktoken"] = "auto"
    """Encoder; both give the same bytes."""

    dask: Address | None = None
    """Scheduler of a Dask cluster whose workers tokenize, such as 'tcp://head:8786'. Does not change the result."""

    bos: Literal["auto"] | bool = "auto"
    """Begin each document with the tokenizer's BOS token; 'auto': where the tokenizer does so itself."""

    @model_validator(mode="after")
    def several_sources_replace_the_one(self) -> Self:
        fields = SourceConfig.model_fields
        if self.sources and (given := [key for key in fields if getattr(self, key) != fields[key].default]):
            keys = ", ".join(f"data.{key}" for key in given)
            raise ValueError(f"{keys} say nothing beside [[data.sources]]; set them in each source that they are for")
        return self

    @model_validator(mode="after")
    def names_of_sources_differ(self) -> Self:
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two of [[data.sources]] are called {twice[0]!r}; give each a name of its own")
        return self

    @property
    def shares(self) -> dict[str, Fraction]:
        """Each source's share of the tokens, by name: exact, 0.1 as one tenth. Empty where there is one source."""
        weights = {source.name: Fraction(str(source.weight)) for source in self.sources}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def parts(self) -> tuple["DataConfig", ...]:
        """Return the settings of each source as of one alone; these themselves where there is one."""
        shared = self.model_dump(exclude={*SourceConfig.model_fields, "name", "sources"})
        parts = (source.model_dump(exclude={"weight"}) for source in self.sources)
        return tuple(DataConfig(**part, **shared) for part in parts) if self.sources else (self,)


class BatchConfig(FrozenConfig):
    """Geometry of one optimizer update."""

    sequences: int = Field(32, ge=1)
    """Sequences in an update, over all ranks and micro-steps."""

    sequence_length: int = Field(256, ge=8)
    """Tokens in a sequence."""

    micro_sequences: int | None = Field(None, ge=1)
    """Sequences in one forward pass of one rank; all of a rank's share when absent."""

    documents: Literal["join", "mask"] = "join"
    """Documents in a sequence: 'join' reads them on as one text; 'mask' predicts from a token's own document alone."""

    too_long: Literal["cut", "drop"] = "cut"
    """Conversations, labelled texts and prompts longer than a sequence: cut to it by a rule, or left out; counted."""

    target_length: int | None = Field(None, ge=2)
    """Tokens of a target, of an objective from sequence to sequence; sequence_length when absent."""

    @model_validator(mode="after")
    def micro_sequences_divide_sequences(self) -> Self:
        if self.micro_sequences and self.sequences % self.micro_sequences:
            raise ValueError(f"sequences {self.sequences} is not a multiple of micro_sequences {self.micro_sequences}")
        return self

    @property
    def tokens(self) -> int:
        """Tokens in an update."""
        return self.sequences * self.sequence_length

    def forward_passes(self, ranks: int) -> tuple[int, int]:
        """Sequences in a forward pass of the rank with the largest share, and its forward passes an update."""
        share = math.ceil(self.sequences / ranks)
        return (sequences := min(self.micro_sequences or share, share)), math.ceil(share / sequences)
