"""The page that explores the answer: held to Python in a real browser, used by keyboard and on a phone's width."""

import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.runtime.test_cli import run
from ufom_runtime.command.explorer import explorer_page
from ufom_theory import CostModel, Moments, Sweep, Truncated, UfomError, optimal_q
from ufom_theory.laws import Progress, fixed_step_q, parse_outer
from ufom_theory.scores import fom_progress, ufom_progress

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="NO BROWSER, the page's answers are not checked: install chromium and chromedriver",
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
REPORT = {
    "d2": 0.05, "d2_sem": 0.004, "v2": 0.8, "v2_sem": 0.03, "cov_d2_v2": 4e-5, "r": 40, "m": 1.0, "device": "cpu",
    "c1": 0.002, "c1_sem": 1e-4, "c2": 0.005, "c2_sem": 3e-4, "tasks": 64, "thetas": 1, "finite_tasks": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "q.html"
    path.write_text(explorer_page("<mine>", REPORT), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, page):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    return browser


def points(n):
    """Over all that the sliders reach and beyond; ends, ρ ≥ 1 and exact inputs included."""
    rng = np.random.default_rng(7)
    for i in range(n):
        r = int(np.rint(np.exp(rng.uniform(0, np.log(3000)))))
        yield {
            "rho": float(10 ** rng.uniform(-6, 1.2)) if i % 50 else float(rng.choice([0.0, 1.0, 2.0])),
            "r": r,
            "ratio": float(10 ** rng.uniform(-1, 2)),
            "m": float(rng.choice([0.5, 1.0, 2.0, rng.uniform(0.2, 4)])),
            "law": "own",
            "batch": int(rng.choice([1, 1, 4, 30])),
            "share": float(10 ** rng.uniform(-3, 0)),
            "proxy": int(rng.choice([0, 0, 1, 3])) if r > 3 else 0,
            "cosine": 0.9,
            "length": 1.0,
            "noise": 1.0,
            "step": 0.1,
            "sweep": str(rng.choice(["stored", "recomputed", "checkpointed"])),
            "slots": int(rng.choice([0, 1, 2, 3, 10, 50])),
            "rhoError": float(rng.choice([0.0, rng.uniform(0, 60)])),
            "ratioError": float(rng.choice([0.0, rng.uniform(0, 60)])),
        }


TIMES_AT = (0.01, 0.3, 1.0)


def in_python(asked):
    """What the library says of points that share their sweep and K, an array for each quantity."""
    rho, r, ratio, m, rho_error, ratio_error, batch, share = (
        np.array([p[key] for p in asked])
        for key in ("rho", "r", "ratio", "m", "rhoError", "ratioError", "batch", "share")
    )
    v2 = 1 + (batch - 1) * share  # B times the second moment of the mean of B gradients
    moments = Moments(rho, v2, np.stack([(rho * rho_error / 100) ** 2, *[0 * rho] * 3], axis=1).reshape(-1, 2, 2))

    def model(sweep, proxy=0):
        sem = ratio * ratio_error / 100
        return CostModel(r=r, c1=1.0, c2=ratio, sweep=sweep, proxy=Truncated(proxy), c2_sem=sem)

    cost = model(sweep_of(asked[0]), asked[0]["proxy"])
    found, exact = optimal_q(moments, cost, m), cost.time(1.0, moments, m)
    return {
        "q": found.q,
        "low": found.interval[0],
        "high": found.interval[1],
        "det": cost.c_det,
        "rnd": cost.c_rnd,
        "speedup": found.speedup_over_exact,
        "cost": found.cost_over_fom,
        "exactOne": model(Sweep.checkpointed(1)).time(1.0, moments, m) / exact,
        "exactAll": model(Sweep.stored()).time(1.0, moments, m) / exact,
        "floor": (r + 1) / (cost.c_det + cost.c_rnd),
        "margin": 1 + found.condition_margin / cost.c_rnd / v2,  # counted from 1: near 0 its own digits are lost
        "pays": found.pays,
        **{f"time {i}": cost.time(q, moments, m) / exact for i, q in enumerate(TIMES_AT)},
    }


def sweep_of(p):
    return Sweep(p["sweep"], p["slots"] if p["sweep"] == "checkpointed" else 0)


@needs_browser
def test_a_thousand_points_agree_with_python(opened):
    def kind(p):
        return str(sweep_of(p)), p["proxy"]

    asked = sorted(points(1000), key=kind)
    script = """const [asked, at] = arguments;
        return asked.map(p => { const a = answer(p), other = {margin: 1 + a.margin / a.rnd};
          at.forEach((q, i) => other[`time ${i}`] = 1 / gain(p, q, p.rho, a.kappa));
          return {...p, ...a, ...other}; })"""
    verdicts = set()
    for sweep, group in itertools.groupby(opened.execute_script(script, asked, TIMES_AT), kind):
        got = list(group)
        for name, expected in in_python(got).items():
            of_page = [answer[name] for answer in got]
            if name == "pays":
                assert of_page == list(expected)
            else:
                np.testing.assert_allclose(of_page, expected, rtol=1e-9, atol=0, err_msg=f"{name}, {sweep}")
        verdicts |= {(answer["pays"], answer["sweep"], answer["m"] < 1) for answer in got}
    assert len(verdicts) == 18  # every verdict, with every sweep, on both sides of m = 1


@needs_browser
@pytest.mark.parametrize("law", ["tuned", "adam", "sgd"])
def test_what_one_step_gains_agrees_with_python(opened, law):
    """q, its gain over exact and FOM's time, by the law of the outer steps with one curvature."""
    rng, asked = np.random.default_rng(2), []
    for p in points(150):
        drawn = {"cosine": rng.uniform(-0.2, 1), "length": rng.uniform(0, 2), "noise": rng.uniform(0, 2)}
        asked.append({**p, **drawn, "law": law, "proxy": 0, "step": float(10 ** rng.uniform(-3, 0.5))})
    said = set()
    for p, found in zip(asked, opened.execute_script("return arguments[0].map(answer)", asked), strict=True):
        share, outer = p["share"], parse_outer(law if law == "tuned" else f"{law}:{p['step']:.17g}")
        progress = Progress(
            share, 1 - share, p["rho"], share * p["cosine"] * p["length"], share * p["length"] ** 2,
            p["noise"] * (1 - share), *[1.0] * 5,
        )  # fmt: skip
        cost = CostModel(r=p["r"], c2=p["ratio"], sweep=sweep_of(p))
        total, exact = cost.c_det + cost.c_rnd, ufom_progress(progress, 1.0, outer, p["batch"])
        if law == "sgd":
            q = fixed_step_q(progress, cost, p["step"], p["batch"])
        else:
            moments = Moments(p["rho"], 1 + (p["batch"] - 1) * share)
            q = optimal_q(moments, cost, outer.exponent).q
        assert (found["q"] is None) == bool(np.isnan(q))
        if found["q"] is None:
            said.add("no progress")
            continue
        assert found["q"] == pytest.approx(q, rel=1e-9, abs=1e-12)
        if q:
            gain = ufom_progress(progress, q, outer, p["batch"]) / (cost.c_det + cost.c_rnd * q) / (exact / total)
            assert found["speedup"] == pytest.approx(gain, rel=1e-7)
        fom = fom_progress(progress, outer, p["batch"])
        assert (found["fom"] is None) == bool(fom <= 0)
        if fom > 0:
            assert found["fom"] == pytest.approx(exact / total / (fom / cost.c_det), rel=1e-9)
            said.add("FOM" if found["fom"] < 1 / found["speedup"] else "UFOM")
    assert said == {"FOM", "UFOM", *["no progress"] * (law == "sgd")}


@needs_browser
def test_the_decision_of_compare_is_shown_above(browser, tmp_path):
    rows = [
        {"method": "FOM", "q": 0.0, "proxy": "", "coin": "", "sweep": "", "ms": 1.0, "clock": "timed", "bytes": 1000,
         "steps_over_exact": 2.0, "time_over_plain": 0.5, "low": 0.4, "high": 0.6},
        {"method": "UFOM", "q": 0.1, "proxy": "0.6·FOM", "coin": "task", "sweep": "stored", "ms": 1.2,
         "clock": "predicted", "bytes": 3000, "steps_over_exact": 1.1, "time_over_plain": 0.7, "low": 0.6, "high": 0.8},
        {"method": "script", "q": float("nan"), "proxy": "", "coin": "", "sweep": "", "ms": 2.0, "clock": "timed",
         "bytes": 5000, "steps_over_exact": 1.0, "time_over_plain": 1.0, "low": 1.0, "high": 1.0},
    ]  # fmt: skip
    path = tmp_path / "decision.html"
    more = {"outer": "tuned", "batch": 4, "state_bytes": 8000, "mean_gradient_sq": 0.2, "mean_cross": 0.18,
            "mean_proxy_sq": 0.2, "proxy_sq": 0.9}  # fmt: skip
    path.write_text(explorer_page("mine", {**REPORT, **more}, {"why": "run FOM: 2× sooner", "rows": rows}))
    browser.get(path.as_uri())
    assert browser.find_element("id", "decision-why").text == "run FOM: 2× sooner"
    bars = browser.find_element("id", "decision-bars")
    browser.execute_async_script(
        "requestAnimationFrame(() => setTimeout(arguments[0], 50))"
    )  # it is drawn to its width
    assert len(bars.find_elements("css selector", "circle.timed")) == 2
    assert "UFOM, 0.1, 0.6·FOM, stored: 0.7" in bars.find_element("tag name", "desc").get_attribute("textContent")
    assert len(browser.find_elements("css selector", "#decision-table tr")) == 4
    state = browser.execute_script("return state")
    assert (state["law"], state["batch"], state["share"]) == ("tuned", 4, pytest.approx(0.25))
    assert state["cosine"] == pytest.approx(0.9)
    assert "Run FOM for now" in browser.find_element("id", "headline").text
    assert "(8 kB)" in browser.find_element("id", "rival").text
    assert not any(word in browser.page_source.split("<script>")[0] for word in ("NaN", "undefined"))
    assert browser.get_log("browser") == []


@needs_browser
def test_every_state_that_is_drawn_is_sound(opened):
    """The drawings hold no NaN and the words no undefined, also at the ends of every control."""
    script = """const bad = [];
        const laws = Object.keys(LAWS);
        for (const [i, p] of arguments[0].entries()) { Object.assign(state, p, {law: laws[i % laws.length]}); update();
          if (/NaN|undefined|Infinity/.test(document.querySelector("main").innerHTML)) bad.push(p); }
        return bad"""
    assert opened.execute_script(script, list(points(60))) == []


@needs_browser
def test_it_opens_at_the_measured_point(opened, tmp_path):
    assert "<mine>" in opened.find_element("id", "measured-text").text
    moments = Moments(0.05, 0.8, np.array([[0.004**2, 4e-5], [4e-5, 0.03**2]]))
    cost = CostModel(r=40, c1=0.002, c2=0.005, c1_sem=1e-4, c2_sem=3e-4)
    expected = optimal_q(moments, cost, 1.0)
    got = opened.execute_script("return answer(state)")
    np.testing.assert_allclose([got["q"], got["low"], got["high"]], [expected.q, *expected.interval], rtol=1e-9)
    assert f"q = {expected.q:.3g}" in opened.find_element("id", "headline").text


@needs_browser
def test_the_keyboard_alone_reaches_and_moves_every_control(opened):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        ActionChains(opened).send_keys(*keys).perform()

    def focused():
        return opened.switch_to.active_element

    press(Keys.TAB)
    assert focused().get_attribute("id") == "back"
    for key in ("rho", "r", "ratio", "law", "m"):
        press(Keys.TAB)
        if key == "law":
            assert focused().get_attribute("id") == "law"
            continue
        slider, answered = focused(), opened.find_element("id", "answer").text
        before = float(opened.find_element("id", key).get_attribute("value"))
        press(Keys.ARROW_RIGHT)
        assert slider.get_attribute("id") == f"{key}-slider"
        assert float(opened.find_element("id", key).get_attribute("value")) > before
        assert opened.find_element("id", "answer").text != answered
        press(Keys.TAB)
        assert focused().get_attribute("id") == key
    for _ in range(3):  # past the batch, its slider and its field
        press(Keys.TAB)
    focused().send_keys("c")  # checkpointed: the slots appear, and are next
    press(Keys.TAB)
    assert focused().get_attribute("id") == "slots-slider"
    press(Keys.ARROW_RIGHT)
    assert opened.execute_script("return [state.sweep, state.slots]") == ["checkpointed", 4]
    opened.find_element("id", "back").send_keys(Keys.ENTER)
    assert opened.execute_script("return state.sweep") == "recomputed"


@needs_browser
def test_a_typed_value_is_taken_or_refused_in_words(opened):
    field = opened.find_element("id", "r")
    field.clear()
    field.send_keys("123")
    assert opened.execute_script("return state.r") == 123
    field.send_keys(".5")
    assert "must be a whole number" in opened.find_element("id", "r-error").text
    assert "Inner steps r = 123.5 must be a whole number" in opened.find_element("id", "invalid").text
    assert field.get_attribute("aria-invalid") == "true"
    assert opened.execute_script("return state.r") == 123
    contradiction = """Object.assign(state, {law: "tuned", rho: 0.01, share: 0.5, cosine: 0, length: 1}); update();
        return document.getElementById("invalid").textContent"""
    assert "a squared bias of 1·V², above D² = 0.01·V², which is impossible" in opened.execute_script(contradiction)


@needs_browser
def test_every_control_and_picture_is_named_for_a_screen_reader(opened):
    opened.execute_cdp_cmd("Accessibility.enable", {})
    nodes = opened.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""), node.get("description", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node.get("role", {}).get("value") in ("slider", "spinbutton", "combobox", "image")
    ]
    assert [role for role, _, _ in named].count("image") == 2
    # sliders with their fields: three of the problem, m, the batch, K and two errors; two lists, two pictures
    assert len(named) == 2 * 8 + 2 + 2
    assert all(name and description for _, name, description in named), named
    assert opened.find_element("id", "answer").get_attribute("role") == "status"


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_paints_soon_and_asks_the_network_for_nothing(opened, page, width):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    opened.get(page.as_uri())
    painted = opened.execute_async_script(
        """const done = arguments[0], first = list => done(list.getEntries()[0].startTime);
        new PerformanceObserver(first).observe({type: "paint", buffered: true})"""
    )
    assert painted < 1000
    widths = opened.execute_script(
        "return [...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect()).map(b => b.right)"
    )
    assert max(widths) <= width
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in asked
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert opened.get_log("browser") == []


def test_the_page_is_one_small_file(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) < 400_000
    assert "/*FORMULAS*/" not in text
    assert "</mine>" not in text.replace("\\u003c", "<").replace("<mine>", "")
    assert "http:" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in text


def test_the_command_writes_it_and_measure_opens_it_at_the_point(capsys, monkeypatch, tmp_path):
    code, out, _ = run(capsys, monkeypatch, "explore", "-o", str(tmp_path / "q.html"))
    assert (code, out) == (0, f"open {tmp_path / 'q.html'} in a browser\n")
    assert "const measured = null;" in (tmp_path / "q.html").read_text(encoding="utf-8")
    arguments = ["measure", "quadratic", "--m", "2", "--tasks", "8", "--json", "--html", str(tmp_path / "m.html")]
    found = json.loads(run(capsys, monkeypatch, *arguments)[1])
    text = (tmp_path / "m.html").read_text(encoding="utf-8")
    measured = json.loads(text.split("const measured = ")[1].split(";\n")[0])
    assert measured["point"]["rho"] == found["d2"] / found["v2"]
    assert measured["point"]["ratio"] == found["c2"] / found["c1"]
    assert (measured["point"]["law"], measured["stateBytes"]) == ("own", 5 * 8)  # φ has 5 numbers
    one, batch = (
        json.loads(run(capsys, monkeypatch, *f"measure quadratic --outer tuned --tasks 8 {x} --json".split())[1])
        for x in ("", "--batch 8")
    )
    assert one["by_sweep"][0]["rho"] > batch["by_sweep"][0]["rho"]
    assert batch["by_sweep"][0]["rho"] == pytest.approx(one["d2"] / (one["v2"] + 7 * max(one["mean_gradient_sq"], 0)))


@pytest.mark.parametrize("arguments", ["explore --output", "measure quadratic --outer tuned --tasks 2 --html"])
def test_a_place_that_cannot_be_written_is_named(capsys, monkeypatch, arguments):
    code, _, err = run(capsys, monkeypatch, *arguments.split(), "/proc/nothing.html")
    assert code == 2
    assert err.startswith("ufom: /proc/nothing.html cannot be written")


def test_a_vanishing_second_moment_is_refused():
    with pytest.raises(UfomError, match=r"V² = 0.*measure at another θ"):
        explorer_page("p", {**REPORT, "v2": 0.0, "d2": 1.0})


def test_sympy_is_loaded_for_the_page_alone():
    code = "import sys, ufom_runtime.command.explorer; print(sorted({'torch', 'sympy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
