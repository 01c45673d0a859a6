"""The page's data, and the page in a real browser where there is one."""

import base64
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from deformable_detr.explain import Recording, Sampling, Truth, explain, write_page
from deformable_detr.explain.page import page_data

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")


def unpack(part, data):
    """Pixels (..., 2) and weights (...) as the page reads them."""
    numbers = np.frombuffer(base64.b64decode(part["samples"]), "<u2").reshape(part["shape"]) / 65535
    low, high = data["range"]
    return (low + numbers[..., :2] * (high - low)) * (data["width"], data["height"]), numbers[..., 2]


def read_page(path):
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def test_the_page_holds_the_recorded_samples(explanation, tmp_path):
    data = read_page(write_page(explanation, tmp_path / "x.html"))
    locations, weights = unpack(data["decoder"], data)
    assert locations.shape[:3] == (len(explanation.detections), 1, 2)
    for number, entry in enumerate(data["detections"]):
        for layer, sampling in enumerate(explanation.recording.decoder):
            size = np.array([data["width"], data["height"]])
            expected = sampling.locations[entry["query"]].numpy().clip(-size, 2 * size)
            np.testing.assert_allclose(locations[number, 0, layer], expected, atol=0.01)
            np.testing.assert_allclose(weights[number, 0, layer], sampling.weights[entry["query"]], atol=1e-5)


def test_the_page_holds_the_encoder_cells_under_its_pixels(explanation):
    recording = explanation.recording
    data = page_data(replace(explanation, pixel=(3.0, 70.0)))
    assert data["encoder"]["pixels"][0] == [3.0, 70.0]
    _, weights = unpack(data["encoder"], data)
    for index in (0, 5, -1):
        cells = recording.cells_at(*data["encoder"]["pixels"][index])
        np.testing.assert_allclose(weights[index, :, 0], recording.encoder[0].weights[cells], atol=1e-5)


def test_a_page_says_why_it_lists_more_than_was_asked_for(explanation, tmp_path):
    def why(**changes):
        text = write_page(replace(explanation, **changes), tmp_path / "x.html").read_text()
        return [html.unescape(words) for words in re.findall(r'<p id="why".*?>(.*?)</p>', text)]

    best = explanation.detections[:5]
    more = "3 asked for (bold), 2 more, as they have a score of at least 0"
    assert why(detections=best) == [f"{more}."]
    missed = best[-1]._replace(query=explanation.detections[-1].query, score=-1.0)
    assert why(detections=[*best, missed]) == [f"{more}, 1 below that, as true objects are matched with them."]
    assert why(detections=best[:3]) == []


def test_the_object_of_a_query_belongs_to_all_of_its_detections(explanation):
    best = explanation.detections[0]
    detections = [best, best._replace(label=best.label + 1, score=best.score / 2)]
    truths = [Truth(0, (10.0, 10.0, 50.0, 50.0), query=best.query, iou=0.5)]
    data = page_data(replace(explanation, detections=detections, chosen=[0], truths=truths))
    assert [entry["query"] for entry in data["detections"]] == [best.query] * 2
    assert [truth["query"] for truth in data["truths"]] == [best.query]


def test_names_cannot_break_out_of_the_data(explanation, tmp_path):
    names = ["</script><b>&"] * len(explanation.class_names)
    path = write_page(replace(explanation, class_names=names, name="<!--<script>"), tmp_path / "x.html")
    data = read_page(path)
    assert data["detections"][0]["label"] == names[0] and data["name"] == "<!--<script>"
    assert path.read_text().count("</script>") == 2


def test_the_page_loads_nothing(explanation, tmp_path):
    page = write_page(explanation, tmp_path / "x.html").read_text()
    addresses = set(re.findall(r"""["'(](?:https?:)?//[^"')]*""", page))
    assert addresses == {'"http://www.w3.org/2000/svg'}  # a name of XML, never fetched


def test_a_page_of_a_full_model_and_a_photo_of_noise_stays_below_3_mb(explanation, tmp_path):
    """Six layers, eight heads, four levels and 100 queries at 800x1333."""
    shapes = [(100, 167), (50, 84), (25, 42), (13, 21)]
    cells = sum(h * w for h, w in shapes)

    def sampling(queries, reference):
        locations = torch.rand(1, 8, 4, 4, 2).expand(queries, -1, -1, -1, -1)
        return Sampling(locations, torch.rand(1, 8, 4, 4).expand(queries, -1, -1, -1), torch.rand(queries, reference))

    recording = Recording(
        height=2400,
        width=4000,
        encoder=[sampling(cells, 2)] * 6,
        decoder=[sampling(300, 4)] * 6,
        valid_sizes=torch.tensor([(w, h) for h, w in shapes]).float(),
        spatial_shapes=shapes,
        pred_logits=torch.rand(6, 300, 80),
        pred_boxes=torch.rand(6, 300, 4),
    )
    detections = [explanation.detections[0]._replace(query=query) for query in range(300)]
    noise = np.random.default_rng(0).integers(0, 256, (2400, 4000, 3), dtype=np.uint8)
    full = replace(explanation, recording=recording, detections=detections, image=noise, chosen=[299])
    path = write_page(full, tmp_path / "x.html")
    assert 1_500_000 < path.stat().st_size < 3_000_000
    data = read_page(path)
    assert data["left_out"] == 300 - len(data["detections"]) > 0
    assert data["detections"][data["chosen"][0]]["query"] == 299
    assert len(data["encoder"]["pixels"]) >= 30


@pytest.fixture
def browse(tmp_path):
    """A function (page, address, script) -> the document after the page and then the script have run."""

    def run(page, address="", script=""):
        path = tmp_path / "browsed.html"
        path.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--disable-component-update", "--disable-sync", profile, "--dump-dom", f"{path.as_uri()}#{address}"]
        result = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, check=True, timeout=60)
        return re.sub(r'<script id="data".*?</script>', "", result.stdout, flags=re.DOTALL)

    return run


def state(document):
    return html.unescape(re.search(r'<p id="state"[^>]*>(.*?)</p>', document)[1])


def drawn(document):
    return re.findall(r'<circle [^>]*data-head="(\d+)" data-level="(\d+)"', document)


def inside(locations, explanation):
    size = np.array([explanation.recording.width, explanation.recording.height])
    return int(((locations >= 0) & (locations <= size)).all(-1).sum())


@needs_browser
def test_the_address_says_what_is_shown(explanation, tmp_path, browse):
    page = write_page(explanation, tmp_path / "x.html")
    document = browse(page, "detection=3&layer=1&head=0,2&level=all")
    chosen = explanation.detections[2]
    assert f"query {chosen.query}: decoder layer 1" in state(document)
    assert {head for head, _ in drawn(document)} <= {"0", "2"}
    locations = explanation.recording.decoder[0].locations[chosen.query][[0, 2]].numpy()
    assert len(drawn(document)) == pytest.approx(inside(locations, explanation), abs=1)
    assert len(re.findall('aria-current="true"', document)) == 1
    assert all(document.count(f'class="{name}"') == 1 for name in ("current", "reference"))


@needs_browser
def test_the_encoder_is_shown_at_a_pixel_and_can_be_walked_with_keys(load_tiny, image_file, tmp_path, browse):
    explanation = explain(load_tiny(), image_file, score=0.0, point=(50, 40))
    page = write_page(explanation, tmp_path / "x.html")
    script = """
      document.body.dataset.before = location.hash;
      byId("picture").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
      document.body.dataset.after = location.hash;
    """
    document = browse(page, "view=encoder&pixel=50,40&source=0&level=1", script)
    assert "encoder layer 1, 1 cell (crosses)" in state(document)
    assert {level for _, level in drawn(document)} <= {"1"}
    before, after = (html.unescape(re.search(rf'data-{when}="([^"]*)"', document)[1]) for when in ("before", "after"))
    assert "pixel=50,40" in before
    x, y = map(int, re.search(r"pixel=(\d+),(\d+)", after).groups())
    assert x > 50 and abs(y - 40) <= 10


@needs_browser
def test_hovering_keys_slider_toggles_and_clicks_change_what_is_shown(explanation, tmp_path, browse):
    truths = [Truth(0, (10.0, 10.0, 50.0, 50.0), query=explanation.detections[1].query, iou=0.5)]
    page = write_page(replace(explanation, truths=truths), tmp_path / "x.html")
    script = """
      const seen = [], note = () => seen.push(location.hash.slice(1) + " | " + byId("points").childElementCount);
      const key = name => document.body.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
      note();
      byId("detections").querySelectorAll("button")[2].dispatchEvent(new PointerEvent("pointerenter")); note();
      key("ArrowUp"); note();
      key("ArrowLeft"); note();
      byId("layer").value = 2; byId("layer").dispatchEvent(new Event("input")); note();
      byId("heads").querySelectorAll("button")[1].click(); note();
      byId("heads").querySelector("input").click(); note();
      byId("picture").dispatchEvent(new MouseEvent("click", {clientX: 60, clientY: 120})); note();
      byId("view-decoder").click(); note();
      location.hash = "detection=1";
      document.body.dataset.seen = JSON.stringify(seen);
    """
    document = browse(page, "", script)
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', document)[1]))
    shown, counts = zip(*(line.split(" | ") for line in seen), strict=True)
    assert shown[:7] == (
        "detection=1&layer=2&head=all&level=all",
        "detection=3&layer=2&head=all&level=all",
        "detection=2&layer=2&head=all&level=all",
        "detection=2&layer=1&head=all&level=all",
        "detection=2&layer=2&head=all&level=all",
        "detection=2&layer=2&head=&level=all",
        "detection=2&layer=2&head=0&level=all",
    )
    assert shown[7].startswith("view=encoder&pixel=") and shown[8] == shown[6]
    assert counts[5] == "0" and 0 < int(counts[6]) <= 16
    assert "1 of 1 true objects" in document


@needs_browser
def test_a_wrong_address_shows_the_start(explanation, tmp_path, browse):
    document = browse(write_page(explanation, tmp_path / "x.html"), "detection=x&layer=99&head=77&pixel=a,b&view=none")
    assert "decoder layer 2, 0 sampling points" in state(document)
