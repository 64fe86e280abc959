import base64
import json
import subprocess
import threading

import numpy as np
import pytest
import torch


openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from clara_hf.data.schema import load_examples
from clara_hf.evaluation.analysis.latents import Lens
from clara_hf.memory_store import MemoryStore
from clara_hf.serving.decoding import TextStream


pytest_plugins = ["served"]
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")
QUESTION = "Who keeps bees on the roof?"
QUESTIONS = [
    QUESTION,
    "What does Halvex sell?",
    "When is the market held?",
    "Who wrote The Long Winter?",
    "Why?",
    "Où?",
]


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def expected(other_model, store_path):
    """What `model.generate` answers from the stored memories, without the service."""
    store = MemoryStore.open(store_path)
    memories = store.get(list(store)).to(other_model.dtype)

    def answer(question, **options):
        return other_model.generate([question], memories=memories, **options)

    return answer


def test_chat_answers_what_generate_answers_and_cites_what_it_retrieved(client, expected, other_model):
    for question in QUESTIONS:
        made = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": question}])
        wanted = expected(question)
        choice = made.choices[0]
        assert choice.message.content == wanted.texts[0]
        documents = made.clara["documents"]
        assert [one["score"] for one in documents] == pytest.approx(wanted.scores[0].tolist(), abs=1e-6)
        assert [one.filename for one in choice.message.annotations] == [one["filename"] for one in documents]
        assert {one.type for one in choice.message.annotations} == {"file_citation"}
        prompt = other_model.processor.encode_prompts([question], [len(documents)])
        assert made.usage.prompt_tokens == prompt["input_ids"].shape[1]
        ends = [made.usage.completion_tokens, choice.finish_reason]
        assert ends in ([64, "length"], [wanted.sequences.shape[1] - 1, "stop"])
        assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens


def test_a_stream_gives_the_same_answer_in_pieces_with_its_documents_first(client, expected):
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len(chunks) > 5
    assert chunks[0].clara["documents"][0]["text"] and chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected(QUESTION).texts[0]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0


def test_system_messages_and_earlier_turns_change_nothing_and_are_told(client, expected):
    first = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Why?"}])
    assert not hasattr(first, "note") and "note" not in first.clara
    messages = [
        {"role": "system", "content": "Answer in French."},
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Why?"},
        first.choices[0].message,  # as a client keeps a conversation
        {"role": "user", "content": QUESTION},
    ]
    made = client.chat.completions.create(model="tiny", messages=messages)
    alone = client.chat.completions.create(model="tiny", messages=messages[-1:])
    assert made.choices[0].message.content == alone.choices[0].message.content == expected(QUESTION).texts[0]
    assert made.usage == alone.usage
    note = made.clara["note"]
    assert all(fact in note for fact in ("not read", "2 system", "1 user", "1 assistant"))
    chunk = next(iter(client.chat.completions.create(model="tiny", messages=messages, stream=True)))
    assert chunk.clara["note"] == note


def test_completions_answer_several_prompts_each_its_own(client, expected):
    made = client.completions.create(model="tiny", prompt=QUESTIONS, max_tokens=7)
    assert [one.index for one in made.choices] == list(range(len(QUESTIONS)))
    assert [one.text for one in made.choices] == [expected(q, max_new_tokens=7).texts[0] for q in QUESTIONS]
    pieces = client.completions.create(model="tiny", prompt=QUESTION, max_tokens=7, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == made.choices[0].text


def test_requests_that_come_together_get_their_own_answers_whatever_their_lengths(client, expected):
    found = {}

    def ask(question, limit):
        made = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": question}], max_tokens=limit
        )
        found[question, limit] = made.choices[0].message.content

    pairs = [(question, limit) for question in QUESTIONS for limit in (3, 20)]
    threads = [threading.Thread(target=ask, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(q, limit): expected(q, max_new_tokens=limit).texts[0] for q, limit in pairs}


def test_documents_in_the_request_take_the_place_of_the_collection(http, other_model):
    documents = ["Selma paints doors.", {"title": "Otto", "text": "Otto mends clocks."}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Who mends clocks?"}], "documents": documents}
    made = http.post("/v1/chat/completions", json={**body, "n_docs": 1}).json()
    wanted = other_model.generate(
        ["Who mends clocks?"], [["Selma paints doors.", "Otto\nOtto mends clocks."]], n_docs=1
    )
    assert made["choices"][0]["message"]["content"] == wanted.texts[0]
    assert [one["number"] for one in made["clara"]["documents"]] == wanted.indices[0].tolist()


def test_copies_among_the_documents_of_a_request_are_one_candidate(http):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Who mends clocks?"}], "n_docs": 2}
    found, wanted = (
        http.post("/v1/chat/completions", json={**body, "documents": documents}).json()
        for documents in (["Otto mends clocks."] * 3 + ["Selma paints."], ["Otto mends clocks.", "Selma paints."])
    )
    assert found["choices"][0]["message"]["content"] == wanted["choices"][0]["message"]["content"]
    numbers = [[one["number"] for one in made["clara"]["documents"]] for made in (found, wanted)]
    assert numbers[0] == [{0: 0, 1: 3}[number] for number in numbers[1]]


def test_of_several_stop_texts_the_first_to_come_ends_the_answer():
    stream = TextStream("".join, stop=("c", "b"))
    assert stream.piece(list("abcd")) == "a" and stream.stopped


def test_an_answer_ends_before_a_stop_text_also_in_a_stream(client, expected):
    whole = expected(QUESTION).texts[0]
    stop = whole[len(whole) // 2 :][:3]
    wanted = whole[: whole.index(stop)].rstrip()
    options = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "stop": [stop, "\ue000"]}
    made = client.chat.completions.create(**options)
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == (wanted, "stop")
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(pieces) == wanted


def test_a_seed_repeats_sampled_answers_and_n_gives_different_ones(client):
    def sample(**options):
        made = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": QUESTION}], temperature=1.3, n=3, **options
        )
        return [choice.message.content for choice in made.choices], made.usage

    first, usage = sample(seed=5, top_p=0.95)
    assert sample(seed=5, top_p=0.95)[0] == first != sample(seed=6, top_p=0.95)[0]
    assert len(set(first)) == 3
    single = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": QUESTION}])
    assert usage.prompt_tokens == single.usage.prompt_tokens  # of all choices, once


def test_embeddings_are_flattened_memories_of_unit_length_by_the_adapter_asked_for(client, other_model):
    texts = ["Mara keeps bees.", "Oren writes."]
    for kind, memories in (("document", other_model.compress), ("query", other_model.encode_questions)):
        wanted = torch.nn.functional.normalize(memories(texts).flatten(1).float(), dim=1).numpy()
        found = client.embeddings.create(model="tiny", input=texts, extra_body={"input_type": kind})
        assert np.allclose([one.embedding for one in found.data], wanted, atol=1e-6)
        plain = client.embeddings.create(
            model="tiny", input=texts[0], encoding_format="float", extra_body={"input_type": kind}
        )
        assert np.allclose(plain.data[0].embedding, wanted[0], atol=1e-6)
    tokenizer = other_model.processor.tokenizer
    assert found.usage.total_tokens == sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))


def test_embeddings_of_a_fitted_collection_are_its_sketches_too(serve, served_model, other_model, http, tmp_path):
    body = {"model": "tiny", "input": ["Note 7.", "Why?"], "vector": "sketch"}
    made = http.post("/v1/embeddings", json=body)
    assert made.status_code == 400 and "fit" in made.json()["error"]["message"]
    store = MemoryStore.open(tmp_path / "fitted", other_model)
    store.add([f"Note {number}." for number in range(1000)], show_progress=False)
    store.fit(show_progress=False)
    with serve(served_model, tmp_path / "fitted") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        for kind, wanted in (
            ("document", store.sketch_memories(other_model.compress(body["input"]))),
            ("query", store.sketch_questions(body["input"])),
        ):
            options = {"vector": "sketch", "input_type": kind}
            found = client.embeddings.create(
                model="tiny", input=body["input"], dimensions=store.sketch_dims, extra_body=options
            )
            # Float16 in the store.
            assert np.allclose([one.embedding for one in found.data], wanted, atol=2e-3)
        with pytest.raises(openai.BadRequestError, match="dimensions is 3"):
            client.embeddings.create(model="tiny", input="a", dimensions=3, extra_body={"vector": "sketch"})


def test_rerank_orders_documents_as_retrieve_does(http, other_model):
    texts = ["Selma paints doors.", "Otto mends clocks.", "Velholm is a town."]
    body = {"model": "tiny", "query": "Who mends clocks?", "documents": texts, "top_n": 2, "return_documents": True}
    results = http.post("/v1/rerank", json=body).json()["results"]
    wanted = other_model.retrieve(["Who mends clocks?"], other_model.compress(texts), n_docs=2)
    assert [one["index"] for one in results] == wanted.indices[0].tolist()
    assert [one["relevance_score"] for one in results] == pytest.approx(wanted.scores[0].tolist(), abs=1e-6)
    assert [one["document"]["text"] for one in results] == [texts[one["index"]] for one in results]


def test_files_are_added_found_and_removed(client):
    stores = client.vector_stores
    text = "Tilda Strom forges bells in Quernhold."
    added = stores.files.create("documents", file_id="bells", extra_body={"text": text, "filename": "bells.md"})
    assert (added.id, added.status) == ("bells", "completed")
    with pytest.raises(openai.ConflictError, match="bells"):
        stores.files.create("documents", file_id="bells", extra_body={"text": "another"})
    found = stores.search("documents", query=text, max_num_results=3)
    assert len(found.data) == 3
    assert [one.score for one in found.data] == sorted((one.score for one in found.data), reverse=True)
    everything = stores.search("documents", query=text, max_num_results=50)
    hit = next(one for one in everything.data if one.file_id == "bells")
    assert (hit.filename, hit.content[0].text) == ("bells.md", text)
    assert "bells" in {one.id for one in stores.files.list("documents")}
    assert stores.files.delete("bells", vector_store_id="documents").deleted
    assert "bells" not in {one.file_id for one in stores.search("documents", query=text, max_num_results=50)}
    with pytest.raises(openai.NotFoundError, match="bells"):
        stores.files.retrieve("bells", vector_store_id="documents")


def test_a_text_of_two_files_stays_while_one_of_them_is_there(client):
    stores = client.vector_stores
    for name in ("one", "two"):
        stores.files.create("documents", file_id=name, extra_body={"text": "Twins share this."})
    stores.files.delete("one", vector_store_id="documents")
    found = stores.search("documents", query="Twins share this.", max_num_results=50)
    assert [one.file_id for one in found if "Twins" in one.content[0].text] == ["two"]
    stores.files.delete("two", vector_store_id="documents")


def test_html_in_base64_is_read_as_html(http):
    page = "<html><head><title>Bells</title><script>x()</script></head><body><p>Tilda forges.</p></body></html>"
    body = {"data": base64.b64encode(page.encode()).decode(), "filename": "b.html", "file_id": "html"}
    assert http.post("/v1/vector_stores/documents/files", json=body).status_code == 200
    hits = http.post("/v1/vector_stores/documents/search", json={"query": "Tilda", "max_num_results": 50}).json()
    assert [one["content"][0]["text"] for one in hits["data"] if one["file_id"] == "html"] == ["Bells\nTilda forges."]
    http.delete("/v1/vector_stores/documents/files/html")


def test_query_words_are_the_logit_lens_of_the_question(http, other_model):
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "query_words": 6}
    words = http.post("/v1/chat/completions", json=body).json()["clara"]["query_words"]
    assert words == Lens(other_model).words(other_model.encode_questions([QUESTION]), 6)[0]


def test_a_langchain_chat_model_invokes_and_streams(server, expected):
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(model="tiny", base_url=f"{server}/v1", api_key="unused", temperature=0)
    assert chat.invoke(QUESTION).content == expected(QUESTION).texts[0]
    assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == expected(QUESTION).texts[0]


def test_curl_gets_an_answer(server, expected):
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": QUESTION}]})
    command = ["curl", "-sS", f"{server}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    made = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert made["choices"][0]["message"]["content"] == expected(QUESTION).texts[0]


def test_feedback_becomes_rows_for_joint_training_and_wrong_answers_stay_out(http, store_path):
    for body in (
        {"question": "Who keeps bees?", "answer": "Mara", "rating": "up"},
        {"question": "Who writes?", "answer": "Mara", "rating": "down", "correction": "Oren Tasil"},
        {"question": "Who sells?", "answer": "Oren", "rating": "down"},
    ):
        assert http.post("/v1/feedback", json=body).status_code == 200
    rows = load_examples(store_path.parent / "feedback.jsonl")
    assert [(row.question, row.answers) for row in rows] == [
        ("Who keeps bees?", ["Mara"]),
        ("Who writes?", ["Oren Tasil"]),
    ]
    assert all(len(row.docs) >= 4 for row in rows)
    (rejected,) = (store_path.parent / "feedback.rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["rejected"] == "Oren"


def test_metrics_count_requests_tokens_stages_and_remembered_documents(http):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "documents": ["A unique text."]}
    before = _metrics(http)
    for _ in range(2):
        usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    after = _metrics(http)

    def grown(name):
        return after.get(name, 0) - before.get(name, 0)

    assert grown('clara_requests_total{route="/v1/chat/completions",status="200"}') == 2
    assert grown('clara_document_cache_total{result="miss"}') == grown('clara_document_cache_total{result="hit"}') == 1
    assert grown('clara_tokens_total{kind="prompt"}') == 2 * usage["prompt_tokens"]
    assert grown('clara_tokens_total{kind="completion"}') == 2 * usage["completion_tokens"]
    assert grown('clara_stage_seconds_count{stage="compress"}') == 1
    assert grown('clara_stage_seconds_count{stage="decode"}') == 2
    assert after["clara_queue"] == 0


def _metrics(http) -> dict[str, float]:
    http.get("/v1/vector_stores/documents/files")  # the worker's turn: the batch before it is over
    lines = (line for line in http.get("/metrics").text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_models_and_health_are_there(client, http):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"ready": True}
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "Who?"}])
