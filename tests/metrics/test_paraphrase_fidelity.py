"""ROUGE and BERTScore of paraphrases."""

import doctest
from pathlib import Path

import evaluate
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import clara_hf.metrics.paraphrase_fidelity.paraphrase_fidelity as paraphrase_fidelity
from clara_hf.metrics.paraphrase_fidelity.paraphrase_fidelity import bert_scores, score_paraphrase
from tests.conftest import build_tokenizer


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge1", "rouge2", "longest"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1, 1, 1),
        ("the cat lay on the mat", "the cat sat on the mat", 5 / 6, 3 / 5, 5 / 6),
        ("mat the on sat cat the", "the cat sat on the mat", 1, 0, 1 / 2),
        ("cats", "cat", 1, 0, 1),
        ("dog", "cat", 0, 0, 0),
        ("", "cat", 0, 0, 0),
        ("東京", "東京", 0, 0, 0),
    ],
)
def test_rouge_equals_what_is_counted_by_hand(prediction, reference, rouge1, rouge2, longest):
    expected = {"rouge1": rouge1, "rouge2": rouge2, "rougeL": longest}
    assert score_paraphrase(prediction, [reference]) == pytest.approx(expected)
    assert score_paraphrase(prediction, ["zzz", reference]) == pytest.approx(expected)


def test_a_text_without_references_is_an_error():
    with pytest.raises(ValueError, match="without references"):
        score_paraphrase("x", [])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("encoder"))
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    tokenizer.model_max_length = 128
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(**shape, vocab_size=len(tokenizer), initializer_range=0.5)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_bertscore_of_two_texts_equals_its_formula(encoder):
    pytest.importorskip("bert_score")
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)

    def states(text):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            found = model(inputs.input_ids, attention_mask=inputs.attention_mask, output_hidden_states=True)
        return torch.nn.functional.normalize(found.hidden_states[1][0], dim=-1)

    prediction, reference = "Mara keeps an owl.", "An owl lives with Mara in Velholm."
    similarity = states(prediction) @ states(reference).T
    precision, recall = similarity.max(1).values.mean(), similarity.max(0).values.mean()
    expected = (2 * precision * recall / (precision + recall)).item()
    assert bert_scores([prediction], [[reference]], encoder, 1) == pytest.approx([expected], abs=1e-5)


def test_the_module_loads_by_path_and_scores_by_a_local_model_only(encoder):
    metric = evaluate.load(str(ROOT / "eval/metrics/paraphrase_fidelity"))
    given = {"predictions": ["the cat", "a dog"], "references": [["dogs", "the cat"], ["the cat ran"]]}
    values = metric.compute(**given, per_example=True)
    assert values["rouge1"] == [1.0, 0.0] and metric.compute(**given) == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}
    with pytest.raises(ValueError, match="bertscore_model must be a local folder, but is 'roberta-large'"):
        metric.compute(**given, bertscore_model="roberta-large")
    pytest.importorskip("bert_score")
    scores = metric.compute(**given, bertscore_model=encoder, per_example=True)["bertscore"]
    assert scores[0] == pytest.approx(1, abs=1e-5) and scores[1] < 0.999
    assert metric.description and metric.citation and "references" in metric.inputs_description


def test_the_examples_in_its_description_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    outcome = doctest.testmod(paraphrase_fidelity, extraglobs={"evaluate": evaluate})
    assert outcome.attempted >= 3 and outcome.failed == 0
