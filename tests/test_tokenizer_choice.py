"""A model keeps its tokenizer, and documents begin as it begins a text, unless the profile says otherwise."""

import hashlib
import json
import logging
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import checkpoint_manifest, dataset_manifest
from made_up_corpus import made_up_text, write_corpus
from stage_runs import CPU
from test_prepare import contents, documents_of
from tiny_models import tiny_gpt_neox, tiny_llama
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.layout import dataset_prefix
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.run import CheckpointStore
from relora_train.cli.run import check_inputs
from relora_train.data.prepare import PreparedDataset, describe_dataset, prepare_dataset
from relora_train.data.tokenizer import load_tokenizer, train_tokenizer
from relora_train.errors import ProfileInvalidError, RunSettingsChangedError, TokenizerError, VocabularyMismatchError
from relora_train.runs.datasets import TextSettings, as_checkpoint, choose_tokenizer
from relora_train.runs.run import Run
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.settings.load import load_profile
from relora_train.settings.profile import Profile, default_run_id
from relora_train.storage.opening import open_store
from relora_train.training.models.registry import facts_of, objective_of

TEXTS = [made_up_text(seed) for seed in range(50)]
BOS, EOS = "<s>", "<|endoftext|>"
INPUTS_BEFORE = {
    "dataset_format", "source", "text_field", "max_documents", "tokenizer", "eos_token", "split", "shard_tokens",
    "piece_bytes",
}  # fmt: skip
TOKENIZERS_BEFORE = ({"sha256"}, {"trained", "vocab_size", "training_bytes"})


def write_tokenizer(directory: Path, template: str | None = f"{BOS} $A", vocab_size: int = 300, **config: Any) -> Path:
    """A directory with a tokenizer that puts before a text, and after it, what the template says."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(train_tokenizer(TEXTS, vocab_size=vocab_size).json_text)
    tokenizer.add_special_tokens([BOS, "</s>"])
    if template:
        named = [(token, tokenizer.token_to_id(token)) for token in {*template.split()} - {"$A"}]
        tokenizer.post_processor = processors.TemplateProcessing(template, None, named)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def corpus(tmp_path: Path) -> DataConfig:
    return write_corpus(tmp_path / "corpus.jsonl", documents=120)


@pytest.mark.parametrize(
    ("template", "config"),
    [
        (f"{BOS} $A", {}),
        (f"{BOS} $A", {"add_bos_token": False}),  # transformers goes by tokenizer.json
        (f"{BOS} {BOS} $A </s>", {}),
        ("$A </s>", {}),
        (None, {"add_bos_token": True}),
    ],
)
def test_by_default_a_document_begins_as_transformers_begins_a_text(tmp_path, template, config):
    loaded = load_tokenizer(str(write_tokenizer(tmp_path, template, **config)))
    theirs = AutoTokenizer.from_pretrained(tmp_path)("the text").input_ids
    ours = [*loaded.bos_ids, *loaded.encoder().encode("the text", add_special_tokens=False).ids]
    assert theirs[: len(ours)] == ours


def test_a_separator_that_is_also_bos_is_not_doubled_unless_that_is_asked_for(tmp_path):
    path = str(write_tokenizer(tmp_path, f"{EOS} $A"))
    assert load_tokenizer(path).bos_ids == ()
    assert load_tokenizer(path, bos=True).bos_ids == (load_tokenizer(path).encoder().token_to_id(BOS),)


def test_bos_is_the_configured_token_or_a_usual_one_or_an_error(tmp_path):
    path = write_tokenizer(tmp_path, None, bos_token="</s>")
    assert load_tokenizer(str(path), bos=True).bos_ids == (301,)
    write_tokenizer(tmp_path, None, bos_token=None)
    assert load_tokenizer(str(path), bos=True).bos_ids == (300,)
    assert load_tokenizer(str(path), bos=False).bos_ids == load_tokenizer(str(path)).bos_ids == ()
    train_tokenizer(TEXTS, vocab_size=300).save(tmp_path)
    with pytest.raises(TokenizerError, match=r"no BOS token.*data\.bos to 'auto'"):
        load_tokenizer(str(path), bos=True)


def test_a_bos_that_is_not_marked_special_cannot_be_forged_either(tmp_path):
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    description = json.loads(path.read_text())
    for token in description["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(description))
    loaded = load_tokenizer(str(path))
    assert loaded.bos_ids == (300,)
    assert 300 not in loaded.encoder().encode(f"a{BOS} b", add_special_tokens=False).ids


def test_every_document_begins_with_bos_once_by_any_engine_and_however_it_is_cut(tmp_path, corpus):
    settings = TokenizerConfig(path=str(write_tokenizer(tmp_path / "t")))
    long = " ".join(TEXTS * 20)
    with (tmp_path / "corpus.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": long}) + "\n")  # goes over many shards
        stream.write(json.dumps({"text": f"{BOS} forged {EOS}"}) + "\n")
    made = prepare_dataset(corpus, settings, tmp_path / "one")
    documents = documents_in(made)
    assert len(documents) == 122
    bos_id = made.manifest.bos_ids[0]
    assert all(tokens[0] == bos_id and tokens.count(bos_id) == 1 for tokens in documents)
    plain = prepare_dataset(corpus.model_copy(update={"bos": False}), settings, tmp_path / "plain")
    assert [tokens[1:] for tokens in documents] == documents_in(plain)
    assert plain.manifest.dataset_id != made.manifest.dataset_id and plain.manifest.bos_ids == ()
    assert made.manifest.train_tokens == plain.manifest.train_tokens + made.manifest.train_documents
    one_shard = prepare_dataset(corpus.model_copy(update={"shard_tokens": 2_000_000}), settings, tmp_path / "long")
    assert documents_in(one_shard) == documents  # there the long one is several pieces of one shard
    for engine, workers in (("tiktoken", 2), ("tokenizers", 3)):
        other = corpus.model_copy(update={"engine": engine, "workers": workers})
        assert contents(prepare_dataset(other, settings, tmp_path / engine)) == contents(made)


def documents_in(made: PreparedDataset) -> list[list[int]]:
    """All documents of a dataset; those that the ends of shards have cut are whole again."""
    documents: list[list[int]] = [[]]
    for part in (part for split in ("train", "val") for part in documents_of(made, split)):
        documents[-1].extend(part)
        if part[-1] == made.manifest.eos_id:
            documents.append([])
    return documents[:-1]


def test_a_shard_of_tiny_documents_holds_no_more_tokens_than_it_may(tmp_path):
    rows = "".join(json.dumps({"text": chr(97 + n % 26)}) + "\n" for n in range(4000))
    (tmp_path / "tiny.jsonl").write_text(rows)
    data = DataConfig(
        source="jsonl", paths=(str(tmp_path / "tiny.jsonl"),), shard_tokens=1024, validation_fraction=0.3, workers=1
    )
    made = prepare_dataset(data, TokenizerConfig(path=str(write_tokenizer(tmp_path / "t"))), tmp_path / "out")
    shards = [entry.size_bytes // 2 for entry in made.manifest.files if entry.path.endswith(".bin")]
    assert max(shards) <= 1024 and len(shards) > 10


def test_only_datasets_that_begin_with_bos_have_another_id_than_before(tmp_path, corpus):
    """The ids of the version before data.bos existed, computed from the same inputs by its own formula."""

    def before(settings: TokenizerConfig) -> str:
        _, inputs = describe_dataset(corpus.model_copy(update={"bos": False}), settings)
        assert inputs.keys() == INPUTS_BEFORE and inputs["tokenizer"].keys() in TOKENIZERS_BEFORE
        canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    trained, plain = TokenizerConfig(vocab_size=300), TokenizerConfig(path=str(write_tokenizer(tmp_path / "p", None)))
    assert describe_dataset(corpus, trained)[0] == before(trained)
    assert describe_dataset(corpus, plain)[0] == before(plain)
    with_bos = TokenizerConfig(path=str(write_tokenizer(tmp_path / "b")))
    assert describe_dataset(corpus, with_bos)[0] != before(with_bos)
    with pytest.raises(TokenizerError, match="a tokenizer that is trained has none"):
        describe_dataset(corpus.model_copy(update={"bos": True}), trained)


def test_a_prompt_begins_as_documents_do(tmp_path):
    path = write_tokenizer(tmp_path)
    evaluation = {"sample_prompts": ("the", ""), "sample_tokens": 3}
    objective = objective_of(Profile.model_validate({"name": "p", "evaluation": evaluation}))
    model = tiny_llama()
    model.resize_token_embeddings(302)
    seen: list[list[int]] = []
    generate = model.generate
    model.generate = lambda ids, **options: (seen.append(ids[0].tolist()), generate(ids, **options))[1]
    for bos_ids in ((), (300,)):
        objective.sample(model, path, SimpleNamespace(bos_ids=bos_ids, eos_id=299), CPU)
    the = Tokenizer.from_file(str(path / "tokenizer.json")).encode("the", add_special_tokens=False).ids
    assert seen == [the, [299], [300, *the], [300]]


def profile_of(corpus: DataConfig, **sections: Any) -> Profile:
    data = corpus.model_dump(mode="json") | sections.pop("data", {})
    batch = {"sequence_length": 32}  # as many positions as a tiny model has
    return Profile.model_validate({"name": "p", "data": data, "batch": batch, **sections})


def pretrained(directory: Path) -> Path:
    model = tiny_gpt_neox()
    model.resize_token_embeddings(302)
    model.save_pretrained(directory)
    return write_tokenizer(directory)


class Runs:
    """A store in which runs have checkpoints on datasets that nobody prepared."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def choose(
        self, profile: Profile, parent: CheckpointRef | None = None, run_id: str = "r"
    ) -> tuple[TextSettings, str]:
        """Choose for a run of this profile, which branches where it has a parent."""
        run = Run(run_id, self.root.as_uri(), profile, branches=parent is not None)
        return choose_tokenizer(run, parent)

    def commit(
        self, dataset_id: str, tokenizer: Path, *, parent: CheckpointRef | None = None, bos_ids: tuple[int, ...] = ()
    ) -> CheckpointRef:
        """A checkpoint of the run, and the manifest of its dataset."""
        made = self.root / f"made-{uuid.uuid4().hex}"
        made.mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (made / name).write_bytes((tokenizer / name).read_bytes())
        step = parent.step + 1 if parent else 1
        manifest = checkpoint_manifest(
            made, run_id="r", step=step, work=made.name, parent=parent, stage=f"cycle-{step}"
        )
        store, prefix = open_store(self.root.as_uri()), dataset_prefix("corpus", dataset_id)
        names = {"dataset_id": dataset_id, "dataset_uri": f"{self.root.as_uri()}/{prefix}"}
        dataset = dataset_manifest(made, dataset_id=dataset_id)
        inputs = {"bos_ids": list(bos_ids)} if bos_ids else {}
        commit_bundle(store, prefix, made, dataset.model_copy(update={"inputs": inputs}))
        return CheckpointStore(store, "r").commit(made, manifest.model_copy(update=names))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "store").mkdir()
    return Runs(tmp_path / "store")


def id_of(profile: Profile, **tokenizer: Any) -> str:
    return describe_dataset(profile.data, profile.tokenizer.model_copy(update=tokenizer))[0]


def test_a_pretrained_model_is_trained_with_its_own_tokenizer(tmp_path, corpus, runs, caplog):
    model = pretrained(tmp_path / "model")
    profile = profile_of(corpus, model={"pretrained": str(model)})
    chosen, dataset_id = runs.choose(profile)
    assert chosen.tokenizer.path == str(model) and dataset_id == id_of(profile, path=str(model))
    assert dataset_id == check_inputs(profile)
    assert "ANOTHER TOKENIZER" not in caplog.text
    new = profile_of(corpus)
    assert runs.choose(new)[0].tokenizer.path is None
    assert facts_of(profile_of(corpus, model={"pretrained": "a/b", "revision": "v2"})).tokenizer().revision == "v2"


def test_another_tokenizer_is_used_only_where_the_profile_says_so_and_never_silently(tmp_path, corpus, runs, caplog):
    model, other = pretrained(tmp_path / "model"), write_tokenizer(tmp_path / "other", vocab_size=290)
    named = profile_of(corpus, model={"pretrained": str(model)}, tokenizer={"path": str(other)})
    assert runs.choose(named)[0].tokenizer.path == str(other)
    warning = next(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "\n" not in warning and str(model) in warning
    assert "ANOTHER TOKENIZER THAN THE MODEL'S" in warning and "2 of its 292 tokens have another id there" in warning
    caplog.clear()
    trained = profile_of(corpus, model={"pretrained": str(model)}, tokenizer={"train": True, "vocab_size": 300})
    chosen, dataset_id = runs.choose(trained)
    assert chosen.tokenizer.path is None and dataset_id == id_of(trained, train=False)
    assert "a tokenizer trained on this text" in caplog.text
    caplog.clear()
    same = write_tokenizer(tmp_path / "same")
    runs.choose(profile_of(corpus, model={"pretrained": str(model)}, tokenizer={"path": str(same)}))
    assert not caplog.records


def test_equal_tokens_that_are_cut_otherwise_are_told_apart(tmp_path, corpus, runs, caplog):
    model, other = pretrained(tmp_path / "model"), write_tokenizer(tmp_path / "other")
    description = json.loads((other / "tokenizer.json").read_text())
    description["pre_tokenizer"]["add_prefix_space"] = True
    (other / "tokenizer.json").write_text(json.dumps(description))
    named = profile_of(corpus, model={"pretrained": str(model)}, tokenizer={"path": str(other)})
    runs.choose(named)
    assert "is cut into others" in caplog.text


@pytest.mark.parametrize("build", [tiny_gpt_neox, tiny_llama])
def test_a_pretrained_model_without_a_tokenizer_names_the_two_ways_out(tmp_path, corpus, runs, build):
    build().save_pretrained(tmp_path / "model")  # of a GPT-NeoX, transformers would make an empty tokenizer up
    profile = profile_of(corpus, model={"pretrained": str(tmp_path / "model")})
    for look in (check_inputs, lambda p: runs.choose(p)):
        with pytest.raises(TokenizerError, match=r"holds no tokenizer.*tokenizer\.path.*tokenizer\.train = true"):
            look(profile)


def test_a_tokenizer_with_more_entries_than_the_model_has_rows_is_found_first(tmp_path, corpus):
    model = pretrained(tmp_path / "model")
    with pytest.raises(
        VocabularyMismatchError, match=r"400 entries.*302 rows.*leave tokenizer\.path and tokenizer\.train"
    ):
        check_inputs(profile_of(corpus, model={"pretrained": str(model)}, tokenizer={"train": True, "vocab_size": 400}))


def test_a_run_from_before_is_met_by_its_old_settings_and_told_how_to_go_on(tmp_path, corpus, runs):
    model = pretrained(tmp_path / "model")
    old = profile_of(corpus, model={"pretrained": str(model)}, tokenizer={"vocab_size": 300})
    before = id_of(old)  # a tokenizer was trained
    runs.commit(before, model)
    with pytest.raises(
        RunSettingsChangedError, match=r"made with tokenizer\.train=true; .*--set tokenizer\.train=true \("
    ):
        runs.choose(old)
    going_on = profile_of(corpus, model={"pretrained": str(model)}, tokenizer={"vocab_size": 300, "train": True})
    assert runs.choose(going_on)[1] == before
    assert default_run_id(going_on) == default_run_id(old)
    assert runs.choose(old, run_id="new")[1] == id_of(old, path=str(model))


def test_a_run_from_before_bos_is_told_to_go_on_without_it(tmp_path, corpus, runs):
    tokenizer = write_tokenizer(tmp_path / "t")
    old = profile_of(corpus, tokenizer={"path": str(tokenizer)})
    plain = profile_of(corpus, tokenizer={"path": str(tokenizer)}, data={"bos": False})
    start = runs.commit(id_of(plain), tokenizer)
    with pytest.raises(RunSettingsChangedError, match=r"made with data\.bos=false; .*--set data\.bos=false \("):
        runs.choose(old)
    assert runs.choose(plain)[1] == start.manifest.dataset_id
    assert default_run_id(plain) == default_run_id(old)
    asked = profile_of(corpus, tokenizer={"path": str(tokenizer)}, data={"bos": True})
    assert default_run_id(asked) != default_run_id(old)
    chosen, dataset_id = runs.choose(old, start)  # a run that gets more cycles
    assert dataset_id == start.manifest.dataset_id and chosen.data.bos is False
    assert runs.choose(asked, start)[0].data.bos is True


def test_what_goes_on_from_a_checkpoint_on_other_text_keeps_its_tokenizer_and_bos(tmp_path, corpus, runs, caplog):
    tokenizer = write_tokenizer(tmp_path / "t")
    for bos_ids in ((), (300,)):
        start = runs.commit(uuid.uuid4().hex * 2, tokenizer, bos_ids=bos_ids)
        profile = profile_of(corpus)
        chosen, dataset_id = runs.choose(profile, start, "branch")
        expected = profile.model_copy(update={"data": profile.data.model_copy(update={"bos": bool(bos_ids)})})
        assert dataset_id == id_of(expected, path=str(tokenizer))
        assert as_checkpoint(start, profile) == chosen
    assert "ANOTHER" not in caplog.text
    trained = profile_of(corpus, tokenizer={"train": True})
    assert runs.choose(trained, start, "branch")[0].tokenizer.path is None
    assert f"the embeddings of {start.uri} were learned for other ids" in caplog.text
    named = profile_of(corpus, tokenizer={"path": str(tokenizer)})  # the parent's own, by name
    assert runs.choose(named, start, "branch")[0].data.bos is True


def test_more_cycles_of_a_run_with_a_trained_tokenizer_stay_on_its_dataset(tmp_path, corpus, runs, caplog):
    model = pretrained(tmp_path / "model")
    for profile in (profile_of(corpus), profile_of(corpus, model={"pretrained": str(model)})):
        start = runs.commit(id_of(profile), model)
        chosen, dataset_id = runs.choose(profile, start)
        assert dataset_id == start.manifest.dataset_id and chosen.tokenizer.path is None
    assert "ANOTHER" not in caplog.text


def test_a_branch_from_before_on_other_text_is_told_how_to_go_on(tmp_path, corpus, runs):
    tokenizer = write_tokenizer(tmp_path / "t", None)
    start = runs.commit("e" * 64, tokenizer)
    profile = profile_of(corpus)
    runs.commit(id_of(profile), tokenizer, parent=start)  # with a tokenizer that was trained on the other text
    with pytest.raises(RunSettingsChangedError, match=r"--set tokenizer\.train=true \("):
        runs.choose(profile, start)
    going_on = profile_of(corpus, tokenizer={"train": True})
    assert runs.choose(going_on, start)[1] == id_of(profile)


def test_a_series_keeps_the_tokenizer_and_bos_of_its_champion_whatever_is_asked(tmp_path, corpus, runs):
    tokenizer = write_tokenizer(tmp_path / "t")
    champion = runs.commit("e" * 64, tokenizer)
    asked = profile_of(corpus, tokenizer={"path": "another"}, data={"bos": True})
    kept = as_checkpoint(champion, asked, always=True)
    assert isinstance(kept, TextSettings) and kept.data.bos is False
    assert (Path(kept.tokenizer.path) / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_a_tokenizer_is_loaded_or_trained_and_not_both(tmp_path):
    with pytest.raises(ProfileInvalidError, match="drop one"):
        load_profile("smoke", {"tokenizer.train": True, "tokenizer.path": "x"})
    assert load_profile("smoke", ["data.bos=true"]).data.bos is True
    assert load_profile("smoke", ["data.bos=auto"]).data.bos == "auto"


def test_bits_per_byte_are_of_the_text_alone(tmp_path, corpus):
    """BOS tokens are predicted too, and hold no byte: bytes a token fall as much as tokens rise."""
    from relora_train.data.dataset import TokenDataset

    settings = TokenizerConfig(path=str(write_tokenizer(tmp_path / "t")))
    ratio = []
    for bos in ("auto", False):
        made = prepare_dataset(corpus.model_copy(update={"bos": bos}), settings, tmp_path / str(bos))
        data = TokenDataset(made.directory, "val", sequence_length=16, manifest=made.manifest)
        shards = [np.fromfile(path, "<u2") for path in sorted((made.directory / "val").glob("*.bin"))]
        assert data.tokens == sum(map(len, shards))
        ratio.append(data.bytes_per_token * data.tokens)
    assert ratio[0] == pytest.approx(ratio[1])
