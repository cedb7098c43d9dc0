"""The page at `/`: one file that fetches nothing from elsewhere, and, in a browser, chats with two adapters."""

import re
import shutil

import pytest

from tests.serving.tiny_model import make_tokenizer


def test_the_page_is_one_file(client):
    reply = client.get("/")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|@import|url\(", reply.text)


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and ChromeDriver (Debian's chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'browser'}",
        "--window-size=1280,800",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        yield browser


@pytest.mark.nightly
def test_two_adapters_answer_side_by_side(url, browser, greedy, tokenizer):
    """What streams say is tested without a browser by test_chat.py and test_clients.py."""
    from selenium.webdriver.support.ui import Select, WebDriverWait

    wait = WebDriverWait(browser, 60)
    browser.get(url.removesuffix("/v1") + "/")
    wait.until(lambda b: "6 adapters" in b.find_element("id", "status").text)
    assert [li.text.split()[0] for li in browser.find_elements("css selector", "#adapters li")][:2] == ["lora", "dora"]
    for i, name in enumerate(("lora", "dora")):
        Select(browser.find_element("id", f"model-{i}")).select_by_value(name)
    browser.find_element("id", "most").clear()
    browser.find_element("id", "most").send_keys("5")
    browser.find_element("id", "text").send_keys("Who?\n")
    wait.until(lambda b: len(b.find_elements("css selector", ".said small")) == 2)
    prompt = make_tokenizer()("user:Who?|")["input_ids"]
    for i, name in enumerate(("lora", "dora")):
        (said,) = browser.find_elements("css selector", f"#said-{i} .assistant")
        assert said.get_attribute("textContent") == make_tokenizer().decode(greedy(name, prompt, 5))
    wait.until(lambda b: "tokens generated\n10" in b.find_element("id", "now").text)
    for width in (1280, 400):  # nothing is wider than the window
        browser.set_window_size(width, 800)
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
