"""The page of the service in a real browser: what is seen, with keys and without, wide and narrow."""

import json
import shutil

import pytest

from kallos.data.store import write_bars
from kallos.data.tables import connect
from kallos.inference.api_keys import new_key
from kallos.inference.bundle import load_bundle
from kallos.inference.bundle_files import seal
from tests.bundles import bundle_contents, small_bars, small_bundle
from tests.service import MODEL, serving, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.browser]

EVIL = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
TABLE = f"| a | b |\n|---|---|\n| {EVIL} | 2 |"
CARD = f"# A card\n\n{EVIL}\n\n**Bold** and `code`.\n\n{TABLE}\n\n- [link](javascript:hacked=1)\n"


@pytest.fixture(scope="module")
def chromium():
    """A browser."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sound models, one with a card of an ill-wisher, and a broken bundle; bars; a drift report."""
    folder = tmp_path_factory.mktemp("page")
    path = small_bundle(folder / "bundles")
    manifest, files = bundle_contents(seed=1, name="evil")
    manifest["evaluation"]["sentence"] = f"Skill! {EVIL}"
    (folder / "bundles" / "evil").mkdir()
    for name, content in seal(manifest, files | {"card.md": CARD.encode()}).items():
        (folder / "bundles" / "evil" / name).write_bytes(content)
    (folder / "bundles" / f"{EVIL.split()[0][1:]}_bundle").mkdir()
    report = {"fired": True, "at": "2024-03-02T00:00:00+00:00", "bundle": load_bundle(path).digest, "features": {}}
    report["features"] = {f"rsi{EVIL}": {"psi": 0.4, "ks": 0.2, "threshold": 0.1, "fired": True}}
    (folder / "bundles" / "drift").mkdir()
    (folder / "bundles" / "drift" / f"{MODEL}.json").write_text(json.dumps(report))
    write_bars(connect(f"sqlite:///{folder / 'kallos.db'}"), small_bars(), asset_id="BTC", timeframe="1d")
    return folder


class Tab:
    """A page that is open, and what went wrong in it."""

    def __init__(self, browser, url, **how):
        self.context = browser.new_context(**how)
        self.page, self.problems, self.asked = self.context.new_page(), [], []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def text(self, where="main"):
        """What is read there."""
        return self.page.inner_text(where)

    def wait(self, what):
        """Until that is so."""
        wait_for(lambda: self.page.evaluate(f"Boolean({what})"))  # a function of playwright's own needs eval

    def check(self, url):
        """Nothing went wrong, nobody else was asked, nothing is wider than the window, nothing foreign ran."""
        assert not self.problems, self.problems
        assert all(asked.startswith((url, "data:")) for asked in self.asked)
        assert self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert not self.page.evaluate("window.hacked")
        assert not self.page.query_selector_all("main img, main script, main a")
        self.context.close()


def test_the_page_shows_models_verdict_forecast_and_drift(chromium, folder):
    with serving(folder / "bundles", "--db-url", f"sqlite:///{folder / 'kallos.db'}") as service:
        tab = Tab(chromium, service.url, viewport={"width": 1200, "height": 900})
        tab.page.click(f"[data-model={MODEL}]")
        tab.wait("document.querySelector('#chart svg .said') && document.querySelector('#forecast li')")
        expected = load_bundle(folder / "bundles" / MODEL).predict(small_bars()).iloc[0]
        assert f"{expected['y_pred']:.6g}" in tab.text("#forecast") and "stale" in tab.text("#forecast")
        assert (
            "Forecast for 2024-01-0" in tab.text()
            and "closes of the newest 60" in tab.page.inner_html("#chart").lower()
        )
        assert tab.text().index("No skill: made of random weights.") < tab.text().index("Forecast for")
        assert "Drift was found" in tab.text("#drift") and "<img src=x" in tab.text("#drift")
        assert "Bundles that are not used" in tab.text("#refused") and "2 models are loaded" in tab.text(
            "#state, header"
        )
        tab.page.click("[data-model=evil]")
        tab.wait("document.getElementById('card').innerText.includes('Bold')")
        assert EVIL in tab.text("#card") and EVIL in tab.text("#verdict")
        assert tab.page.query_selector("#card table td b, #card p b") and "Not measured" in tab.text("#drift")
        tab.check(service.url)


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1200, "light")])
def test_bars_that_are_pasted_or_chosen_get_a_forecast(width, scheme, chromium, folder, tmp_path):
    bars = small_bars().tail(330)
    bars[["ts", "open", "high", "low", "close", "volume"]].to_csv(tmp_path / "bars.csv", index=False)
    with serving(folder / "bundles") as service:
        tab = Tab(chromium, service.url, viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab.page.click(f"[data-model={MODEL}]")
        tab.wait(f"document.getElementById('verdict').innerText.includes('{MODEL}')")
        tab.page.set_input_files("#file", tmp_path / "bars.csv")
        tab.wait("document.querySelector('#forecast li')")
        expected = load_bundle(folder / "bundles" / MODEL).predict(bars).iloc[0]
        assert f"{expected['y_pred']:.6g}" in tab.text("#forecast")
        assert tab.page.query_selector("#chart svg .band")
        ticks = [float(label.text_content().replace(",", "")) for label in tab.page.query_selector_all("#chart g text")]
        closes = bars["close"].tail(60)
        assert ticks[0] == pytest.approx(closes.min(), rel=0.05) and ticks[2] == pytest.approx(closes.max(), rel=0.05)
        rows = json.loads(bars.assign(ts=bars["ts"].dt.strftime("%Y-%m-%dT%H:%M:%SZ")).to_json(orient="records"))
        tab.page.fill("#bars", json.dumps(rows[-10:]))
        tab.page.click("#ask")
        tab.wait("document.getElementById('forecast').innerText.includes('are needed')")
        tab.page.fill("#bars", "{")
        tab.page.click("#ask")
        tab.wait("document.getElementById('forecast').innerText.includes('cannot be read')")
        tab.page.fill("#bars", json.dumps(rows))
        tab.page.click("#ask")
        tab.wait("document.querySelector('#forecast li')")
        tab.page.screenshot(path=tmp_path / "page.png", full_page=True)
        tab.problems = [said for said in tab.problems if "422" not in said]  # the ten bars
        tab.check(service.url)


def test_a_key_is_asked_for_and_kept_in_the_tab(chromium, folder, tmp_path):
    key = new_key(tmp_path / "keys.json", "reader")
    with serving(folder / "bundles", "--keys", tmp_path / "keys.json") as service:
        tab = Tab(chromium, service.url, viewport={"width": 390, "height": 800})
        tab.page.wait_for_selector("#key", state="visible")
        assert not tab.page.is_visible("#models")
        for typed in ("wrong", key):
            tab.page.fill("#key", typed)
            tab.page.keyboard.press("Enter")
            tab.page.wait_for_timeout(300)
        tab.page.wait_for_selector(f"[data-model={MODEL}]")
        assert not tab.page.is_visible("#key") and "Version" in tab.text().title()
        tab.page.reload()
        tab.page.wait_for_selector(f"[data-model={MODEL}]")
        stored = tab.page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]")
        assert stored == [0, "", 1]
        tab.problems = [said for said in tab.problems if "401" not in said]  # before the key was known
        tab.check(service.url)
