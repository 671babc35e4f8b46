"""objective = "sequence_classification": encoders and decoders tell the class of a padded text, or of a pair."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from stage_runs import ignore, manifest_of, metrics_of, run_all, stage_request, tiny_profile
from test_ranks import by_two_ranks
from test_snapshot import run_with_stops
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

from relora_train.checkpoints.example_format import ExampleFormat
from relora_train.data.padded_dataset import PADDING, LabelledTexts
from relora_train.data.prepare import prepare_dataset
from relora_train.errors import ModelError, ModelUnsuitableError
from relora_train.method.wrap import apply_relora
from relora_train.runs.plan import plan
from relora_train.settings.profile import Profile
from relora_train.training.files import write_manifest
from relora_train.training.models.kinds import SEQUENCE_CLASSIFIER
from relora_train.training.models.pretrained import NewHead, load_model
from relora_train.training.models.registry import model_shape, objective_of
from relora_train.training.models.sequence_classification import LabelLoss, SequenceClassification
from relora_train.training.peft_export import write_adapter
from relora_train.training.trainer import run_stage

SCHEDULE = {"warm_start_steps": 4, "cycles": 1, "cycle_length": 8, "warmup_steps": 2, "restart_warmup_steps": 1}
SHORT = {"sequences": 8, "sequence_length": 40}
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def labelled(count: int, classes: list[str], seed: int = 0) -> list[dict[str, str]]:
    """Texts whose class is the one of its words that names a class; half of them are of the first."""
    rng, records = random.Random(seed), []
    for number in range(count):
        label = classes[0] if number % 2 else rng.choice(classes[1:])
        words = rng.choices(WORDS, k=rng.randint(2, 9))
        words.insert(rng.randrange(len(words) + 1), label)
        records.append({"text": " ".join(words), "other": " ".join(rng.choices(WORDS, k=4)), "label": label})
    return records


def profile_of(corpus: Path, **sections: Any) -> Profile:
    data = {"source": "jsonl", "paths": [str(corpus)], "labels": {"field": "label"}, "validation_fraction": 0.3}
    settings = {"tokenizer": {"vocab_size": 300}, "batch": SHORT, **sections}
    return tiny_profile(
        objective="sequence_classification", **{**settings, "data": {**data, **sections.get("data", {})}}
    )


def write_corpus(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepared(profile: Profile, directory: Path) -> Path:
    made = prepare_dataset(profile.data, profile.tokenizer, directory)
    write_manifest(made.manifest, made.directory)
    return made.directory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts.jsonl", labelled(700, ["red", "green", "blue"]))


@pytest.fixture(scope="module")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(profile_of(corpus), tmp_path_factory.mktemp("data"))


def tiny(family: str, vocabulary: int = 300) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    if family == "bert":
        bert = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, type_vocab_size=2)
        return BertForMaskedLM(bert)
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) for family in ("bert", "llama")}
    for family, directory in made.items():
        tiny(family).save_pretrained(directory)
    return made


# --- scores


@pytest.mark.parametrize("classes", [2, 4])
def test_the_scores_are_those_of_scikit_learn(classes: int):
    rng = np.random.default_rng(classes)
    truth, answers = rng.integers(0, classes, 200), rng.integers(0, classes, 200)
    answers[:120] = truth[:120]
    answers[truth == 3] = 0  # a class that is never answered
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (truth, answers), 1)
    found = summarized(confusion, nats=50.0)
    assert found.val_accuracy == pytest.approx(accuracy_score(truth, answers))
    average = {"average": "binary", "pos_label": 1} if classes == 2 else {"average": "macro", "zero_division": 0}
    assert found.val_f1 == pytest.approx(f1_score(truth, answers, **average))
    assert found.val_matthews == pytest.approx(matthews_corrcoef(truth, answers))
    assert (found.val_loss, found.val_examples) == (0.25, 200)


def test_a_constant_answer_has_no_correlation_and_classes_that_are_not_there_count_for_nothing():
    confusion = np.zeros((4, 4))
    confusion[:3, 0] = [5, 3, 2]
    found = summarized(confusion, nats=1.0)
    truth, answers = [0] * 5 + [1] * 3 + [2] * 2, [0] * 10
    assert found.val_matthews == matthews_corrcoef(truth, answers) == 0
    assert found.val_f1 == pytest.approx(f1_score(truth, answers, average="macro", zero_division=0))


def summarized(confusion: Any, nats: float) -> Any:
    form = ExampleFormat(kind="labels", before=(), between=(), after=(), classes=tuple("abcd"[: len(confusion)]))
    data: Any = SimpleNamespace(manifest=SimpleNamespace(examples=form))
    objective = SequenceClassification(Profile())
    return objective.summarize([nats, *np.asarray(confusion).flatten().tolist()], data)


# --- the model


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_changes_no_loss_and_pairs_have_types(
    family: str, corpus: Path, pretrained: dict[str, Path], tmp_path: Path
):
    pairs = profile_of(
        corpus,
        data={"labels": {"field": "label", "text_pair_field": "other"}},
        model={"pretrained": str(pretrained[family])},
    )
    data = objective_of(pairs).open_data(prepared(pairs, tmp_path), "val")
    model = objective_of(pairs).load_pretrained(data.manifest).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from an untrained model's indifference
    rows = torch.from_numpy(data.read_blocks(0, 12))
    form = data.manifest.examples
    assert form is not None and form.pairs and len({int((row == PADDING).sum()) for row in rows}) > 3
    function = LabelLoss(model, form)
    alone = 0.0
    for row in rows:
        ids = row[:-1][row[:-1] != PADDING]
        first = ids.tolist().index(form.between[0])
        types = {"token_type_ids": (torch.arange(len(ids)) > first).long()[None]} if family == "bert" else {}
        with torch.no_grad():
            scores = model(input_ids=ids[None], **types).logits
        alone += float(F.cross_entropy(scores, row[-1:], reduction="sum"))
    with torch.no_grad():
        assert float(function.loss(rows)) == pytest.approx(alone, rel=1e-6)
        assert float(function.sums(rows)[0]) == pytest.approx(alone, rel=1e-6)
        answers = function.logits(rows).argmax(-1)
        confusion = function.sums(rows)[1:].reshape(3, 3)
    assert int(confusion.sum()) == int(function.terms(rows)) == 12
    assert int(confusion.diagonal().sum()) == int((answers == rows[:, -1]).sum())
    assert confusion.sum(1).tolist() == torch.bincount(rows[:, -1], minlength=3).tolist()


def test_a_pretrained_t5_tells_classes_too(tmp_path: Path):
    """Its own class for that reads the last end-of-text token."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=280, d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    head = NewHead(seed=0, classes=("a", "b", "c"), pad_id=0)
    model = load_model(tmp_path, kind=SEQUENCE_CLASSIFIER, head=head).eval()
    form = ExampleFormat(kind="labels", before=(), between=(1,), after=(1,), classes=("a", "b", "c"))
    rows = torch.tensor([[5, 6, 7, 1, PADDING, PADDING, 2], [5, 6, 9, 10, 11, 1, 0]])
    with torch.no_grad():
        alone = F.cross_entropy(model(input_ids=rows[:1, :4]).logits, rows[:1, -1])
        assert float(LabelLoss(model, form).loss(rows[:1])) == pytest.approx(float(alone), rel=1e-6)
    assert len(apply_relora(model, rank=4, alpha=4, dropout=0.0, target_modules=None, seed=0)) == 2 * 6 + 2 * 10


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_pretrained_model_gets_a_head_by_the_seed_and_keeps_all_else(
    family: str,
    corpus: Path,
    dataset: Path,
    pretrained: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    profile = profile_of(corpus, model={"pretrained": str(pretrained[family])})
    manifest = LabelledTexts(dataset, "val", sequence_length=40).manifest
    one, same = (objective_of(profile).load_pretrained(manifest) for _ in range(2))
    other = objective_of(profile_of(corpus, seed=1, model={"pretrained": str(pretrained[family])})).load_pretrained(
        manifest
    )
    before = tiny(family).state_dict()
    heads = {name for name in one.state_dict() if name not in before}
    assert heads == {"score.weight"} if family == "llama" else "classifier.weight" in heads
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
        if name in heads and name.endswith("weight"):
            assert not torch.equal(value, other.state_dict()[name]) and value.std() > 0.01
        elif name not in heads:
            assert torch.equal(value, before[name])
    assert "NEW HEAD" in caplog.text and sorted(heads)[0] in caplog.text
    assert one.config.id2label == {0: "blue", 1: "green", 2: "red"} and one.config.pad_token_id is not None
    one.save_pretrained(tmp_path)
    again = objective_of(profile_of(corpus, model={"pretrained": str(tmp_path)})).load_pretrained(manifest)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in one.state_dict().items())


def test_what_is_not_a_head_is_never_made_up(corpus: Path, dataset: Path, tmp_path: Path):
    manifest = LabelledTexts(dataset, "val", sequence_length=40).manifest
    model = tiny("llama")
    tensors = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=tensors)
    objective = objective_of(profile_of(corpus, model={"pretrained": str(tmp_path)}))
    with pytest.raises(ModelUnsuitableError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        objective.load_pretrained(manifest)
    with pytest.raises(ModelUnsuitableError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight, score\.weight"):
        objective.load_model(tmp_path)  # as a checkpoint: with its head, or not at all


def test_a_run_goes_on_with_the_classes_it_began_with(corpus: Path, dataset: Path, tmp_path: Path):
    two = profile_of(write_corpus(tmp_path / "two.jsonl", labelled(60, ["yes", "no"])))
    other = LabelledTexts(prepared(two, tmp_path), "val", sequence_length=40).manifest
    objective = objective_of(profile_of(corpus))
    model = objective.build_model(LabelledTexts(dataset, "val", sequence_length=40).manifest)
    with pytest.raises(ModelError, match="tells 3 classes apart, and the dataset has 2"):
        objective.check_fits(model, other)


def test_a_plan_counts_the_model_that_is_trained_for_two_classes(corpus: Path, pretrained: dict[str, Path]):
    profile = profile_of(corpus)
    planned, shape = plan(profile), model_shape(profile)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_labels=2
    )
    model = AutoModelForSequenceClassification.from_config(config)
    assert shape.parameters == planned.parameters == sum(p.numel() for p in model.parameters())
    apply_relora(model, rank=4, alpha=4, dropout=0.0, target_modules=None, seed=0)
    assert planned.low_rank is not None and planned.rough
    assert planned.low_rank.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    bert = plan(profile_of(corpus, model={"pretrained": str(pretrained["bert"])}))
    assert bert.parameters and bert.low_rank


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"labels": None}}, "does not learn from whole texts; it takes data.labels"),
        ({"objective": "causal_lm"}, "objective 'causal_lm' does not learn from data.labels"),
        ({"objective": "masked_lm"}, "objective 'masked_lm' does not learn from data.labels"),
        ({"batch": {**SHORT, "documents": "mask"}}, "batch.documents is of objective 'causal_lm'"),
    ],
)
def test_sections_that_do_not_fit_are_refused(corpus: Path, changes: dict[str, Any], said: str):
    settings = profile_of(corpus).model_dump()
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=said):
        Profile.model_validate(settings)


# --- training


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
@pytest.mark.parametrize("family", ["bert", "llama", "new"])
def test_training_beats_the_majority_by_more_than_three_standard_errors(
    family: str, corpus: Path, dataset: Path, pretrained: dict[str, Path], tmp_path: Path
):
    schedule = {"warm_start_steps": 20, "cycles": 2, "cycle_length": 15, "warmup_steps": 5, "restart_warmup_steps": 2}
    began = {} if family == "new" else {"model": {"pretrained": str(pretrained[family])}}
    profile = profile_of(
        corpus, **began, schedule=schedule, batch={**SHORT, "sequences": 16}, evaluation={"sequences": 1000}
    )
    made = run_all(profile, dataset, tmp_path)
    scores = manifest_of(made["cycle-2"])["evaluation"]
    data = LabelledTexts(dataset, "val", sequence_length=40)
    rows = torch.from_numpy(data.read_blocks(0, data.blocks))
    majority = float(torch.bincount(rows[:, -1]).max()) / len(rows)
    error = (majority * (1 - majority) / len(rows)) ** 0.5
    assert scores["val_examples"] == len(rows) > 150 and majority > 0.4
    assert scores["val_accuracy"] > majority + 3 * error
    assert manifest_of(made["warm-start"])["evaluation"]["val_accuracy_before"] < majority + 3 * error
    model = AutoModelForSequenceClassification.from_pretrained(made["cycle-2"]).eval()
    with torch.no_grad():  # as any user of it would, one text at a time
        answers = [int(model(input_ids=row[:-1][row[:-1] != PADDING][None]).logits.argmax()) for row in rows]
    assert accuracy_score(rows[:, -1], answers) == pytest.approx(scores["val_accuracy"], abs=1.5 / len(rows))
    if family != "new":
        check_adapter(profile, made, tmp_path / "adapter", rows)


def check_adapter(profile: Profile, made: dict[str, Path], directory: Path, rows: torch.Tensor) -> None:
    """The adapter on its base, by peft, gives the checkpoint's logits."""
    from peft import PeftModel

    directory.mkdir()
    write_adapter(made["cycle-2"], made["cycle-1"], directory, base_name=str(made["cycle-1"]), checkpoint_name="it")
    load = AutoModelForSequenceClassification.from_pretrained
    adapted = PeftModel.from_pretrained(load(made["cycle-1"]), str(directory)).eval()
    assert json.loads((directory / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    expected = load(made["cycle-2"]).eval()
    ids = rows[:1, :-1][rows[:1, :-1] != PADDING][None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def run_stage_of(profile: Profile, stage: str, dataset: Path, out: Path, parent: Path | None = None) -> None:
    run_stage(stage_request(profile, stage, dataset, out, parent), ignore)


def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(
    corpus: Path, dataset: Path, pretrained: dict[str, Path], tmp_path: Path
):
    profile = profile_of(
        corpus,
        model={"pretrained": str(pretrained["bert"])},
        relora={"dropout": 0.2},
        schedule={**SCHEDULE, "warm_start_steps": 0},
    )
    run_stage_of(profile, "cycle-1", dataset, tmp_path / "whole")
    run_with_stops(stage_request(profile, "cycle-1", dataset, tmp_path / "stopped"), [3, 6], tmp_path / "snapshots")
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


def test_micro_batches_and_two_ranks_train_as_the_one_big_batch(corpus: Path, dataset: Path, tmp_path: Path):
    def losses(name: str) -> list[float]:
        return [record["loss"] for record in metrics_of(tmp_path / name / "out")]

    run_stage_of(profile_of(corpus, schedule=SCHEDULE), "warm-start", dataset, tmp_path / "one" / "out")
    micro = profile_of(corpus, schedule=SCHEDULE, batch={**SHORT, "micro_sequences": 2})
    run_stage_of(micro, "warm-start", dataset, tmp_path / "micro" / "out")
    (tmp_path / "ranks").mkdir()
    shared = profile_of(corpus, schedule=SCHEDULE, launch={"nproc_per_node": 2, "threads": 1})
    by_two_ranks(stage_request(shared, "warm-start", dataset, tmp_path / "ranks" / "out"))
    assert losses("micro") == pytest.approx(losses("one"), rel=1e-6)
    assert losses("ranks") == pytest.approx(losses("one"), rel=1e-6)
    evaluations = [metrics_of(tmp_path / name / "out", "evaluation")[-1] for name in ("one", "ranks")]
    assert evaluations[0]["val_examples"] == evaluations[1]["val_examples"] == 16
