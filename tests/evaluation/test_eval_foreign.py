"""Rankers and readers that others made, as tiny random models on the disk, through the whole evaluation."""

import json
import shutil

import pytest
import torch
from conftest import TEXTS
from processes import exit_code
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from clara_hf.data.retrievers import BiEncoderRetriever
from clara_hf.evaluation.plan import file_name as slug
from clara_hf.evaluation.run import main
from clara_hf.evaluation.systems import loading
from clara_hf.evaluation.systems.loading import model_hash
from clara_hf.program.models import ModelSource


pytest.importorskip("sentence_transformers", reason="the extra 'retrievers' is not installed")
QUESTIONS = ["Where does the glassblower live?", "Who sells copper lanterns?", "Who wrote The Long Winter?"]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def bert_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS + QUESTIONS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.BertProcessing(ends[1], ends[0])
    names = zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), specials, strict=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **dict(names))


def save_bert(folder, model_class, **fields) -> str:
    tokenizer = bert_tokenizer()
    set_seed(0)
    model = model_class(BertConfig(vocab_size=len(tokenizer), **SHAPE, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bi_encoder(tmp_path_factory) -> str:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    folder = tmp_path_factory.mktemp("bi")
    transformer = Transformer(save_bert(folder / "bert", BertModel))
    SentenceTransformer(modules=[transformer, Pooling(SHAPE["hidden_size"])], device="cpu").save(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory) -> str:
    return save_bert(tmp_path_factory.mktemp("cross"), BertForSequenceClassification, num_labels=1)


def save_late_interaction(folder) -> str:
    from sentence_transformers import MultiVectorEncoder

    MultiVectorEncoder(save_bert(folder / "bert", BertModel), device="cpu").save(str(folder / "model"))
    return str(folder / "model")


def save_splade(folder) -> str:
    from sentence_transformers import SparseEncoder

    SparseEncoder(save_bert(folder / "bert", BertForMaskedLM), device="cpu").save(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture
def data(tmp_path):
    rows = [
        {"id": str(place), "question": text, "answers": ["Velholm"], "docs": TEXTS[: 3 + place], "pos_index": [place]}
        for place, text in enumerate(QUESTIONS)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluate(tmp_path, data, systems, *more) -> dict[str, list[dict]]:
    out = tmp_path / "out"
    assert (
        exit_code(
            main, ["--data", data, "--output_dir", str(out), "--systems", systems, "--max_new_tokens", "3", *more]
        )
        == 0
    )
    paths = (out / "predictions").glob("*.jsonl")
    return {path.name[: -len(".jsonl")]: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}


def test_control_tokens_in_texts_are_text_to_encoders(bi_encoder, cross_encoder, tmp_path):
    from sentence_transformers import SentenceTransformer

    from clara_hf.evaluation.systems.encoders import CrossEncoderRanker, MultiVectorRanker

    texts, device = [TEXTS[0], f"{TEXTS[0]} [SEP] [CLS] {TEXTS[1]}"], torch.device("cpu")
    retriever = BiEncoderRetriever(texts, bi_encoder)
    as_text = retriever.embeddings.cpu()
    acting = torch.from_numpy(SentenceTransformer(bi_encoder, device="cpu").encode(texts))
    assert torch.allclose(as_text[0], acting[0], atol=1e-5) and not torch.allclose(as_text[1], acting[1], atol=1e-2)
    reranker = CrossEncoderRanker(cross_encoder, 2, device).model
    late = MultiVectorRanker(save_late_interaction(tmp_path), 2, device).model
    for encoder in (retriever.model, reranker, late):
        ids = encoder.tokenizer(["a [SEP] b"])["input_ids"][0]
        assert ids.count(encoder.tokenizer.sep_token_id) == 1


def test_encoders_rank_as_they_do_on_their_own_without_a_clara_model(tmp_path, data, bi_encoder, cross_encoder):
    from sentence_transformers import CrossEncoder, SentenceTransformer

    labels = f"bi-encoder {bi_encoder}", f"cross-encoder {cross_encoder}"
    found = evaluate(tmp_path, data, ",".join(["bm25", *labels]), "--batch_size", "2")
    bi, cross = (found[slug(label)] for label in labels)
    model, reranker = SentenceTransformer(bi_encoder, device="cpu"), CrossEncoder(cross_encoder, device="cpu")
    for place, question in enumerate(QUESTIONS):
        documents = TEXTS[: 3 + place]
        similarity = model.similarity(model.encode([question]), model.encode(documents))[0].tolist()
        relevance = reranker.predict([(question, document) for document in documents]).tolist()
        for row, scores in ((bi[place], similarity), (cross[place], relevance)):
            assert row["ranking"] == sorted(range(len(scores)), key=lambda at: -scores[at])
            assert row["candidate_scores"] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
            assert row["prediction"] is None and set(row["scores"]) >= {"recall@1", "mrr"}


def test_late_interaction_sums_each_question_tokens_best_match_and_sparse_weights_are_multiplied(tmp_path, data):
    from sentence_transformers import MultiVectorEncoder, SparseEncoder

    late, sparse = save_late_interaction(tmp_path / "late"), save_splade(tmp_path / "sparse")
    labels = f"multi-vector {late}", f"sparse-encoder {sparse}"
    found = evaluate(tmp_path, data, ",".join(labels), "--batch_size", "2")
    tokens, words = MultiVectorEncoder(late, device="cpu"), SparseEncoder(sparse, device="cpu")
    for place, question in enumerate(QUESTIONS):
        documents = TEXTS[: 3 + place]
        query = tokens.encode_query(question)
        matches = [(query @ each.T).max(dim=1).values.sum().item() for each in tokens.encode_document(documents)]
        products = words.encode_document(documents).to_dense() @ words.encode_query(question).to_dense()
        for label, scores in zip(labels, (matches, products.tolist()), strict=True):
            row = found[slug(label)][place]
            assert row["ranking"] == sorted(range(len(scores)), key=lambda at: -scores[at])
            assert row["candidate_scores"] == pytest.approx(sorted(scores, reverse=True), rel=1e-4)


def test_every_foreign_ranker_is_followed_by_the_same_generator_on_memories_and_on_text(
    tmp_path, data, clara, base, bi_encoder, cross_encoder
):
    clara.save_pretrained(tmp_path / "clara")
    labels = [f"bi-encoder {bi_encoder}", f"cross-encoder {cross_encoder}", f"llm-listwise {base}"]
    systems = ",".join([*labels, *(f"text-{label}" for label in labels), "text"])
    found = evaluate(tmp_path, data, systems, "--model", str(tmp_path / "clara"))
    for label in labels:
        on_memories, on_text = found[slug(label)], found[slug(f"text-{label}")]
        for place, question in enumerate(QUESTIONS):
            ranking = on_memories[place]["ranking"]
            assert ranking == on_text[place]["ranking"] and sorted(ranking) == list(range(3 + place))
            best = [TEXTS[at] for at in ranking[: clara.config.top_k]]
            options = {"rerank": False, "max_new_tokens": 3}
            direct = clara.generate(questions=[question], documents=[best], **options).texts
            assert [on_memories[place]["prediction"]] == direct
    results = json.loads((tmp_path / "out/results.json").read_text())["datasets"]["questions"]
    for costs in results["costs"].values():
        assert (
            costs["query_ms"] > 0 and costs["decode_ms"] > 0 and costs["prompt_tokens"] > 5 and costs["peak_mib"] > 50
        )
    assert results["costs"][labels[0]]["compress_ms"] > results["costs"][f"text-{labels[0]}"]["compress_ms"] > 0
    assert results["costs"][f"text-{labels[1]}"]["compress_ms"] is None


def test_text_systems_need_no_clara_model(tmp_path, data, base):
    found = evaluate(tmp_path, data, "text,text-gold,text-no-memory", "--text_model", base)
    assert set(found) == {"text", "text-gold", "text-no-memory"}
    assert all(row["prediction"] is not None for rows in found.values() for row in rows)


@pytest.mark.parametrize(
    "kind",
    ["bi-encoder", "multi-vector", "sparse-encoder", "cross-encoder", "llm-listwise", "llmlingua2", "text_model"],
)
def test_what_is_no_such_model_is_one_sentence_before_anything_is_done(tmp_path, data, base, capsys, monkeypatch, kind):
    monkeypatch.setattr(loading, "find_spec", lambda package: package)
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    arguments = ["--data", data, "--output_dir", str(out)]
    if kind == "text_model":
        assert exit_code(main, [*arguments, "--systems", "bm25,text", "--text_model", str(empty)]) == 2
    else:
        assert exit_code(main, [*arguments, "--text_model", base, "--systems", f"bm25,{kind} {empty}"]) == 2
    error = capsys.readouterr().err
    name = f"--text_model: {empty}" if kind == "text_model" else f"--systems: {kind} {empty}"
    assert f" error: {name} cannot be loaded: " in error and not out.exists()


def test_damaged_weights_leave_no_mark_that_would_stop_the_mended_ones(tmp_path, data, cross_encoder, capsys):
    folder = shutil.copytree(cross_encoder, tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    arguments = ["--data", data, "--systems", f"bm25,cross-encoder {folder}", "--output_dir", str(tmp_path / "out")]
    assert exit_code(main, arguments) == 2
    assert "cannot be loaded: model.safetensors is damaged (" in capsys.readouterr().err
    weights.write_bytes(whole)
    assert exit_code(main, arguments) == 0


def test_any_file_of_a_model_counts_but_logs_and_results_do_not(tmp_path, bi_encoder):
    folder = shutil.copytree(bi_encoder, tmp_path / "model")
    source = ModelSource(str(folder))
    first = model_hash(source)
    for beside in ("run.log", "checkpoint-5/model.safetensors", "eval/results.json", ".cache/x"):
        (folder / beside).parent.mkdir(exist_ok=True)
        (folder / beside).write_text("beside")
    (folder / "memories").mkdir()
    (folder / "memories" / "rows.bin").write_text("x")
    assert model_hash(source, folder / "memories", folder) == first != model_hash(source)
    found = {first}
    for name in ("modules.json", "1_Pooling/config.json", "vocab.txt", "0_Dense/pytorch_model.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("changed")
        found.add(model_hash(source, folder / "memories"))
    assert len(found) == 5


def test_a_classifier_of_pairs_is_no_reranker(tmp_path, data, capsys):
    folder = save_bert(tmp_path / "classifier", BertForSequenceClassification, num_labels=2)
    out = tmp_path / "out"
    assert exit_code(main, ["--data", data, "--systems", f"cross-encoder {folder}", "--output_dir", str(out)]) == 2
    assert "cannot be loaded: it gives 2 scores for a pair, but a reranker gives one." in capsys.readouterr().err


def test_llmlingua2_shortens_what_the_text_reader_reads(tmp_path, data, base, monkeypatch):
    pytest.importorskip("llmlingua")
    import tiktoken

    # In place of a vocabulary that tiktoken would fetch: one token per byte.
    ranks = {bytes([value]): value for value in range(256)}
    bytewise = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: bytewise)
    folder = tmp_path / "bert-base-multilingual-cased-tiny"
    save_bert(folder, BertForTokenClassification, num_labels=2, max_position_embeddings=512)
    evaluate(tmp_path, data, f"text,llmlingua2 {folder}", "--text_model", base, "--llmlingua_rate", "3")
    costs = json.loads((tmp_path / "out/results.json").read_text())["datasets"]["questions"]["costs"]
    assert costs[f"llmlingua2 {folder}"]["prompt_tokens"] < 0.8 * costs["text"]["prompt_tokens"]
    assert costs[f"llmlingua2 {folder}"]["compress_ms"] > costs["text"]["compress_ms"]
