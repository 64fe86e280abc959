import json
import shutil

import pytest


webdriver = pytest.importorskip("selenium.webdriver")
pytest.importorskip("fastapi")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


pytest_plugins = ["served"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:lance is not fork-safe"),
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs Chromium and its driver"
    ),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WATCH = """
window.seen = [];
const answer = document.getElementById("answer");
new MutationObserver(() => seen.push(answer.textContent)).observe(answer, { childList: true });
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium, server):
    chromium.get(server)
    wait(chromium, lambda: "tiny" in text(chromium, "about"))
    yield chromium
    complaints = [one["message"] for one in chromium.get_log("browser") if one["level"] == "SEVERE"]
    assert not [one for one in complaints if "Content Security Policy" in one or "Uncaught" in one]


def wait(page, condition):
    WebDriverWait(page, 60, poll_frequency=0.05).until(lambda _: condition())


def text(page, name):
    return page.find_element(By.ID, name).text


def shown(page, name):
    return page.find_element(By.ID, name).is_displayed()


def ask(page, question):
    box = page.find_element(By.ID, "question")
    box.clear()
    box.send_keys(question, Keys.ENTER)
    wait(page, lambda: shown(page, "thumbs"))


def test_a_question_is_answered_in_pieces_with_its_documents_scores_and_query_words(page, server, http):
    page.execute_script(WATCH)
    ask(page, "Who keeps bees in Velholm?")
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Who keeps bees in Velholm?"}],
        "query_words": 8,
    }
    made = http.post("/v1/chat/completions", json=body).json()
    answer = made["choices"][0]["message"]["content"]
    assert page.execute_script("return state.answer") == answer
    seen = page.execute_script("return seen")
    assert len(set(seen)) > 5 and all(answer.startswith(one) for one in seen)
    cards = page.find_elements(By.CSS_SELECTOR, "#sources li")
    assert len(cards) == len(made["clara"]["documents"])
    for card, document in zip(cards, made["clara"]["documents"], strict=True):
        assert document["filename"] in card.text and f"{document['score']:.3f}" in card.text
        assert document["text"] in card.text
    marked = {one.text for one in page.find_elements(By.TAG_NAME, "mark")}
    assert "Velholm" in marked and "in" not in marked
    words = [one.text for one in page.find_elements(By.CSS_SELECTOR, "#words li")]
    assert words == made["clara"]["query_words"]


def test_thumbs_write_rows_for_training(page, store_path):
    ask(page, "Who sells lanterns?")
    page.find_element(By.ID, "down").click()
    page.find_element(By.ID, "right").send_keys("Halvex Works", Keys.ENTER)
    wait(page, lambda: "training" in text(page, "thanks"))
    row = json.loads((store_path.parent / "feedback.jsonl").read_text().splitlines()[-1])
    assert (row["question"], row["answers"]) == ("Who sells lanterns?", ["Halvex Works"]) and len(row["docs"]) == 4


def test_files_and_texts_are_added_and_removed_and_what_cannot_be_read_is_told(page, tmp_path):
    (tmp_path / "otto.html").write_text("<title>Otto</title><p>Otto mends clocks.</p>")
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.7 nothing")
    page.find_element(By.ID, "pick").send_keys(f"{tmp_path / 'otto.html'}\n{tmp_path / 'bad.pdf'}")
    page.find_element(By.CSS_SELECTOR, "#add button").click()
    wait(page, lambda: "bad.pdf" in text(page, "added"))
    assert "broken PDF" in text(page, "added")
    wait(page, lambda: "otto.html" in text(page, "files"))
    page.find_element(By.CSS_SELECTOR, "[aria-label='Remove otto.html']").click()
    page.switch_to.alert.accept()
    wait(page, lambda: "otto.html" not in text(page, "files"))


def test_what_a_document_or_name_holds_is_never_run(page, http):
    nasty = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    http.post("/v1/vector_stores/documents/files", json={"text": nasty, "filename": nasty, "file_id": "nasty"})
    page.refresh()
    wait(page, lambda: nasty in text(page, "files"))
    ask(page, nasty)
    assert page.find_elements(By.CSS_SELECTOR, "img, #sources script") == []
    http.delete("/v1/vector_stores/documents/files/nasty")


def test_the_page_is_used_by_keyboard_and_fits_a_phone(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        ask(page, "When is the market held?")
        page.find_element(By.TAG_NAME, "body").click()
        page.switch_to.active_element.send_keys(Keys.TAB)
        page.execute_script("document.activeElement.blur()")
        page.find_element(By.TAG_NAME, "body").send_keys("/")
        assert page.switch_to.active_element.get_attribute("id") == "question"
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        small = page.execute_script(
            "return [...document.querySelectorAll('button')].filter(one => one.offsetParent && one.offsetHeight < 36)"
        )
        assert small == []
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_service_with_keys_asks_for_one_on_its_page(chromium, serve, served_model, store_path, tmp_path):
    (tmp_path / "keys").write_text("a-key-of-twenty-letters\n")
    with serve(served_model, store_path, ui=True, read_only=True, api_key_file=str(tmp_path / "keys")) as url:
        chromium.get(url)
        wait(chromium, lambda: shown(chromium, "unlock"))
        chromium.find_element(By.ID, "key").send_keys("a-key-of-twenty-letters", Keys.ENTER)
        wait(chromium, lambda: "tiny" in text(chromium, "about"))
        wait(chromium, lambda: not shown(chromium, "unlock"))
        ask(chromium, "Who?")
        chromium.execute_script("sessionStorage.clear()")
