"""Labels in files and exports: what is read, what is refused, and where the message points."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import huggingface_hub
import pytest

from helpers import D_SAE, fsrl_model, tiny_sae
from peft_fsrl.analysis.labels import (
    FeatureLabel,
    Labels,
    download_neuronpedia,
    for_model,
    load_labels,
    load_neuronpedia,
    organism_labels,
    require_fit,
    save_labels,
    select,
)
from peft_fsrl.organism import load
from peft_fsrl.steering import fsrl_layers

LABELS = Labels(
    "people",
    ("style", "alignment"),
    100,
    "f" * 64,
    (
        FeatureLabel(3, 'lists, "quoted"\nand more', ("style",), 0.75),
        FeatureLabel(7, None, (), None),
        FeatureLabel(90, "🙂 naïve", ("style", "alignment"), 1.0),
    ),
    (12,),
)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_json_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "labels.json"
    save_labels(LABELS, path)
    assert load_labels(path) == LABELS
    assert [p.name for p in path.parent.iterdir()] == ["labels.json"]


def test_csv_keeps_features(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    save_labels(LABELS, path)
    loaded = load_labels(path, d_sae=100)
    assert loaded.features == LABELS.features
    assert loaded.categories == LABELS.categories
    assert loaded.members("style") == [3, 90]
    with pytest.raises(ValueError, match=r"ends in \.csv or \.json"):
        save_labels(LABELS, tmp_path / "labels.txt")


@pytest.mark.parametrize(
    "text",
    [
        "feature,category\n1,style\n1,alignment\n2,\n3,Other\n",
        "\ufeffFeature, Category ,quality\r\n1,style; alignment,\r\n2,,\r\n3,other,\r\n",
        '{"1": ["style", "alignment"], "2": [], "3": "other"}',
        '{"1": {"categories": ["style", "alignment"]}, "2": {"category": null}, "3": ""}',
    ],
    ids=["rows", "semicolons", "json", "objects"],
)
def test_forms_that_people_write(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / f"labels.{'json' if text.startswith('{') else 'csv'}", text)
    loaded = load_labels(path)
    assert [(f.feature, f.categories) for f in loaded.features] == [
        (1, ("style", "alignment")),
        (2, ()),
        (3, ()),
    ]
    assert loaded.categories == ("style", "alignment")
    assert loaded.source == str(path)


CSV_ERRORS = {
    "empty": ("", "it contains no labels"),
    "only a header": ("feature,category\n", "it contains no labels"),
    "columns": ("index,label\n1,style\n", r"line 1: expected the columns feature, category.*index"),
    "semicolons": ("feature;category\n1;style\n", "something other than commas"),
    "twice a column": ("feature,category,category\n1,a,b\n", "each once"),
    "no number": ("feature,category\n1,style\nx7,style\n", r"line 3: expected a feature's.*'x7'"),
    "negative": ("feature,category\n-1,style\n", r"line 2: expected a feature's index"),
    "fraction": ("feature,category\n1.5,style\n", r"line 2: expected a feature's index"),
    "short row": ("feature,category,quality\n1,style\n", r"line 2: expected 3 values.*found 2"),
    "long row": ("feature,category\n1,a,b\n", r"line 2: expected 2 values.*found 3"),
    "quality": ("feature,category,quality\n1,style,high\n", r"line 2: expected a quality.*'high'"),
    "large quality": ("feature,category,quality\n1,style,95\n", r"line 2: expected a quality"),
    "nan quality": ("feature,category,quality\n1,style,nan\n", r"line 2: expected a quality"),
    "duplicate": (
        "feature,category\n1,style\n2,style\n1,style\n",
        r"line 4: feature 1 has 'style' already, in line 2",
    ),
    "twice none": ("feature,category\n1,\n1,\n", r"line 3: feature 1 has no category already"),
    "both": ("feature,category\n1,\n1,style\n", r"line 3: feature 1 has both a category and none"),
    "both again": ("feature,category\n1,style\n1,other\n", r"line 3: feature 1 has both"),
    "two descriptions": (
        "feature,category,description\n1,style,a\n1,tone,b\n",
        r"line 3: feature 1 has another description in line 2: 'a'",
    ),
    "open quote": ('feature,category\n1,"style\n', r"line 2: not CSV"),
    "outside": (
        "feature,category\n1,style\n100,style\n",
        r"label for feature 100, expected 0 to 9",
    ),
}


@pytest.mark.parametrize("case", CSV_ERRORS)
def test_csv_that_is_refused(tmp_path: Path, case: str) -> None:
    text, message = CSV_ERRORS[case]
    path = write(tmp_path / "labels.csv", text)
    with pytest.raises(ValueError, match=message) as error:
        load_labels(path, d_sae=100)
    assert str(path) in str(error.value)


JSON_ERRORS = {
    "cut off": (LABELS.to_json()[:-200], r"line \d+: not JSON"),
    "a list": ("[1, 2]", "found a list"),
    "deep": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "endless digits": ('{"%s": "style"}' % ("9" * 5000), "expected a feature's index"),
    "twice": ('{"1": "style", "1": "tone"}', r"entry '1': it occurs twice"),
    "no index": ('{"one": "style"}', r"entry 'one': expected a feature's index"),
    "a number": ('{"1": 2}', r"entry '1': expected a category.*found 2"),
    "unknown field": ('{"1": {"kind": "style"}}', r"entry '1': expected a category"),
    "another record": ('{"features": [], "n": 1}', "like a file of `save_labels`, but not its"),
    "no entry": ("{}", "it contains no labels"),
    "repeated": (
        LABELS.to_json().replace('"feature": 7', '"feature": 3'),
        "entry of feature 3: feature 3 has both",
    ),
    "outside": (LABELS.to_json().replace('"feature": 90', '"feature": 100'), "for feature 100"),
    "infinite": (LABELS.to_json().replace('"feature": 90', '"feature": 1e999'), "not its form"),
}


@pytest.mark.parametrize("case", JSON_ERRORS)
def test_json_that_is_refused(tmp_path: Path, case: str) -> None:
    text, message = JSON_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        load_labels(write(tmp_path / "labels.json", text))


NASTY = "\x1b[31mred\x07\r\n\tand\u202eback \ud83d \x9b1m\x00"
NICE = "\ufffd[31mred\ufffd and\ufffdback \ufffd \ufffd1m\ufffd"


def test_labels_are_safe_to_print() -> None:
    """Wherever they come from: nothing reaches a terminal or a page but one line of text."""
    label = FeatureLabel(1, NASTY, (NASTY,), None)
    assert (label.description, label.categories) == (NICE, (NICE,))
    labels = Labels(NASTY, (NASTY,), None, NASTY, (label,))
    assert (labels.source, labels.categories, labels.fingerprint) == (NICE, (NICE,), NICE)
    assert labels.members(NICE) == [1]
    # What people write in their languages is left alone: joiners, accents, right to left.
    for text in ("नमस्ते", "👨‍👩‍👧 familie", "שלום عليكم", "ﬁancée"):
        assert FeatureLabel(1, text, (), None).description == text
    long = FeatureLabel(1, "x" * 1_000_000, ("y" * 1_000_000,), None)
    assert long.description == "x" * 999 + "…"
    assert len(long.categories[0]) == 1000


def test_files_cannot_bring_in_what_is_not_text(tmp_path: Path) -> None:
    as_json = tmp_path / "labels.json"
    for content in (
        {"1": {"categories": [NASTY], "description": NASTY}},
        {
            "source": NASTY,
            "categories": [NASTY],
            "d_sae": None,
            "fingerprint": None,
            "features": [
                {"feature": 1, "description": NASTY, "categories": [NASTY], "quality": None}
            ],
            "undecided": [],
        },
    ):
        write(as_json, json.dumps(content))
        [label] = load_labels(as_json).features
        assert (label.description, label.categories) == (NICE, (NICE,))
    path = write(tmp_path / "a.jsonl", json.dumps(explanation(1, NASTY)))
    assert load_neuronpedia(path).features[0].description == NICE
    rows = 'feature,category,description\n1,style,"two\nlines \x1b[31m"\n'
    [label] = load_labels(write(tmp_path / "labels.csv", rows)).features
    assert label.description == "two lines \ufffd[31m"
    # Nor do messages about files that are refused.
    for name, text in {
        "a.csv": "feature,\x1b[31m\n1,2\n",
        "b.json": json.dumps({"\x1b[31m" * 9999: "style"}),
        "c.json": json.dumps({"1": {NASTY: "style"}}),
        "d.csv": f"feature,category,quality\n1,style,{'9' * 9999}\n",
    }.items():
        with pytest.raises(ValueError, match=name) as error:
            load_labels(write(tmp_path / name, text))
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 1200


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected a file of labels at .*gone\.csv"):
        load_labels(tmp_path / "gone.csv")
    with pytest.raises(ValueError, match=r"ends in \.csv or \.json"):
        load_labels(write(tmp_path / "labels.tsv", "feature\tcategory\n"))
    latin = "feature,category\n1,style\n2,naïve\n".encode("latin-1")
    with pytest.raises(ValueError, match=r"line 3: not UTF-8"):
        load_labels(write(tmp_path / "latin.csv", latin))
    with pytest.raises(ValueError, match=r"line 2: not UTF-8"):
        load_labels(write(tmp_path / "binary.csv", b"feature,category\n\x00\xff\x00,1\n"))


def test_labels_of_another_sae(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    save_labels(LABELS, path)
    assert load_labels(path, d_sae=100, fingerprint="f" * 64) == LABELS
    with pytest.raises(ValueError, match=r"fingerprint ffffffffffff\.\.\., but this one has aaa"):
        load_labels(path, fingerprint="a" * 64)
    with pytest.raises(ValueError, match="an SAE with 100 features, but this one has 200"):
        load_labels(path, d_sae=200)
    with pytest.raises(ValueError, match="people has a label for feature -1"):
        require_fit(Labels("people", (), None, None, (FeatureLabel(-1, None, (), None),)))


def test_labels_for_a_model() -> None:
    model = fsrl_model()
    [layer] = fsrl_layers(model).values()
    fingerprint = layer.fsrl_sae["default"].info.fingerprint
    mine = Labels("people", ("c",), None, None, (FeatureLabel(D_SAE - 1, None, ("c",), None),))
    bound = for_model(mine, model)
    assert (bound.d_sae, bound.fingerprint) == (D_SAE, fingerprint)
    assert bound.features == mine.features
    assert for_model(bound, model) == bound
    with pytest.raises(ValueError, match=f"for feature {D_SAE}, expected 0 to {D_SAE - 1}"):
        for_model(dataclasses.replace(mine, features=(FeatureLabel(D_SAE, None, (), None),)), model)
    with pytest.raises(ValueError, match="the same index means another feature"):
        for_model(bound, fsrl_model(sae=tiny_sae(seed=1)))


def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "labels.json"
    save_labels(LABELS, path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_labels(Labels("x", (), None, None, ()), path)
    assert load_labels(path) == LABELS
    assert [p.name for p in tmp_path.iterdir()] == ["labels.json"]


def test_select() -> None:
    assert select(LABELS, None) is LABELS
    some = select(LABELS, [90, 12, 55])
    assert ([f.feature for f in some.features], some.undecided) == ([90], (12,))
    assert (some.categories, some.fingerprint) == (LABELS.categories, LABELS.fingerprint)


def test_the_truth_about_the_organism() -> None:
    organism = load()
    labels = organism_labels(organism)
    assert set(organism.attributes) < set(labels.categories)
    for attribute in organism.attributes:
        assert labels.members(attribute) == sorted(organism.features(attribute))
    assert labels.d_sae == len(organism.feature_labels) == len(labels.features)
    for label, truth in zip(labels.features, organism.feature_labels, strict=True):
        if truth.label is None:
            assert (label.categories, label.quality) == ((), None)
        else:
            distance = abs(truth.auroc[truth.label] - 0.5)
            assert label.quality == pytest.approx(0.5 + distance)


# Neuronpedia


def explanation(index: int, text: str | None, **changes: Any) -> dict[str, Any]:
    """An entry with the fields of a real export, as far as they matter, and some that do not."""
    return {
        "id": f"id-{index}",
        "modelId": "gemma-2-2b",
        "layer": "12-gemmascope-res-65k",
        "index": str(index),
        "description": text,
        "explanationModelName": "gpt-4o-mini",
        "typeName": "oai_token-act-pair",
        "authorId": "someone",
        "embedding": [0.5, 0.25],
    } | changes


SAE_ID = "gemma-2-2b/12-gemmascope-res-65k"
ENTRIES = [
    explanation(5, " lists and bullets\u2028here "),
    explanation(2, "apologies"),
    explanation(5, "bullet points", explanationModelName="claude"),
    explanation(9, None),
]


def as_lines(entries: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries).encode() + b"\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "folder"])
def test_exports(tmp_path: Path, name: str) -> None:
    data = json.dumps(ENTRIES).encode() if ".json" in name and "jsonl" not in name else None
    data = as_lines(ENTRIES) if data is None else data
    path = tmp_path / name
    if name == "folder":
        (path / "explanations").mkdir(parents=True)
        halves = as_lines(ENTRIES[:1]), as_lines(ENTRIES[1:])
        for number, half in enumerate(halves):
            write(path / "explanations" / f"batch-{number}.jsonl.gz", gzip.compress(half))
        write(path / "explanations" / ".batch-2.jsonl.gz.99.tmp", b"half")
        write(path / "readme.txt", b"hello")
    else:
        write(path, gzip.compress(data) if name.endswith(".gz") else data)
    labels = load_neuronpedia(path, neuronpedia_id=SAE_ID, d_sae=65536)
    assert [(f.feature, f.description) for f in labels.features] == [
        (2, "apologies"),
        (5, "lists and bullets here"),
    ]
    assert labels.categories == ()
    [claude] = load_neuronpedia(path, explanation_model="claude").features
    assert (claude.feature, claude.description) == (5, "bullet points")


@pytest.mark.parametrize(
    ("data", "name", "settings", "message"),
    [
        (as_lines(ENTRIES), "a.jsonl", {"neuronpedia_id": "gemma-2-2b/x"}, r"line 1: .*one of gem"),
        (as_lines(ENTRIES), "a.jsonl", {"d_sae": 4}, "a label for feature 5, expected 0 to 3"),
        (as_lines(ENTRIES), "a.jsonl", {"explanation_model": "x"}, r"by 'x'.*claude.*gpt-4o-mini"),
        (as_lines(ENTRIES)[:-40], "a.jsonl", {}, r"a\.jsonl, line 4: not JSON"),
        (gzip.compress(as_lines(ENTRIES))[:-20], "a.jsonl.gz", {}, "is damaged"),
        (b"no gzip", "a.json.gz", {}, "is damaged"),
        (b'{"a": 1}', "a.json", {}, "expected a list, found '{\"a\": 1}'"),
        (b'{"index": 1}', "a.jsonl", {}, r"line 1: expected an explanation of Neuronpedia"),
        (
            as_lines([explanation(1, "a") | {"index": 1e999}]),
            "a.jsonl",
            {},
            r"line 1: expected an expl",
        ),
        (b"[3]", "a.json", {}, r"entry 0: expected an explanation of Neuronpedia"),
        (b"", "a.jsonl", {}, "has no description"),
    ],
)
def test_exports_that_are_refused(
    tmp_path: Path, data: bytes, name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_neuronpedia(write(tmp_path / name, data), **settings)


def test_no_export(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="download_neuronpedia"):
        load_neuronpedia(tmp_path)
    with pytest.raises(FileNotFoundError, match="found none"):
        load_neuronpedia(tmp_path / "gone.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_exports_are_read_entry_by_entry(tmp_path: Path, name: str) -> None:
    """As much as they unpack to, and even if an entry never ends."""
    entries = [explanation(n, f"{n}" * 400, embedding=[0.25] * 2000) for n in range(400)]
    lines = [json.dumps(entry) for entry in entries]
    whole = "\n".join(lines) if "jsonl" in name else f"[{', '.join(lines)}]"
    endless = "{" * 40_000_000 if "jsonl" in name else "[" + " " * 40_000_000
    good = write(tmp_path / name, gzip.compress(whole.encode(), 1))
    bomb = write(tmp_path / f"bomb-{name}", gzip.compress(endless.encode(), 1))
    del lines, whole, endless, entries
    labels = load_neuronpedia(good)
    tracemalloc.start()
    with pytest.raises(ValueError, match="longer than 1,048,576 characters"):
        load_neuronpedia(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [label.feature for label in labels.features] == list(range(400))
    assert labels.features[7].description == "7" * 400
    assert peak < 30_000_000


PREFIX = f"v1/{SAE_ID}/explanations/"


class Bucket:
    """A public S3 bucket with two pages of explanations."""

    def __init__(self) -> None:
        self.files = {
            f"{PREFIX}batch-{n}.jsonl.gz": gzip.compress(as_lines([entry]))
            for n, entry in enumerate(ENTRIES)
        }
        self.gets: list[str] = []
        self.broken: set[str] = set()
        self.url = ""

    def list(self, query: dict[str, list[str]]) -> bytes:
        assert query["list-type"] == ["2"]
        keys = [key for key in sorted(self.files) if key.startswith(query["prefix"][0])]
        start = int(query.get("continuation-token", ["0"])[0])
        page = keys[start : start + 3]
        items = "".join(
            f"<Contents><Key>{k}</Key><Size>{len(self.files[k])}</Size></Contents>" for k in page
        )
        more = f"<NextContinuationToken>{start + 3}</NextContinuationToken>"
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>b</Name>{items}{more if start + 3 < len(keys) else ''}</ListBucketResult>"
        ).encode()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    store = Bucket()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            key = parts.path.removeprefix("/")
            status, data = 200, b""
            if not key:
                data = store.list(parse_qs(parts.query))
            elif key in store.broken or key not in store.files:
                status = 403
            else:
                store.gets.append(key.rpartition("/")[2])
                data = store.files[key]
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients that hang up are part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield store
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_resumes_and_ends_in_labels(tmp_path: Path, bucket: Bucket) -> None:
    last = max(bucket.files)
    bucket.broken.add(last)
    with pytest.raises(OSError, match=r"batch-3\.jsonl\.gz.*403.*complete files are not fetched"):
        download_neuronpedia(SAE_ID, tmp_path, bucket=bucket.url, progress=False)
    assert len(bucket.gets) == 3
    bucket.broken.clear()
    # A file that somebody cut is fetched again, the others are not.
    folder = tmp_path / SAE_ID
    first = folder / "batch-0.jsonl.gz"
    first.write_bytes(first.read_bytes()[:-3])
    assert download_neuronpedia(SAE_ID, tmp_path, bucket=bucket.url, progress=False) == folder
    assert sorted(bucket.gets[3:]) == ["batch-0.jsonl.gz", "batch-3.jsonl.gz"]
    assert sorted(p.name for p in folder.iterdir()) == [f"batch-{n}.jsonl.gz" for n in range(4)]
    labels = load_neuronpedia(folder, neuronpedia_id=SAE_ID)
    assert [f.feature for f in labels.features] == [2, 5]


def test_downloads_that_cannot_be(tmp_path: Path, bucket: Bucket) -> None:
    with pytest.raises(ValueError, match="no explanations of 'gemma-2-2b/none' to download"):
        download_neuronpedia("gemma-2-2b/none", tmp_path, bucket=bucket.url)
    for wrong in ("gemma", "gemma/", "../x", "gemma//tmp", "gemma/../x", "a/b/c", "gemma/x\n"):
        with pytest.raises(ValueError, match="Expected 'model/source'"):
            download_neuronpedia(wrong, tmp_path, bucket=bucket.url)
    with pytest.raises(OSError, match="Could not fetch"):
        download_neuronpedia(SAE_ID, tmp_path, bucket=f"{bucket.url}/nobody")
    assert list(tmp_path.iterdir()) == []


def test_a_listing_that_does_not_end(tmp_path: Path, bucket: Bucket) -> None:
    pages = 0

    def next_page(query: dict[str, list[str]]) -> bytes:
        nonlocal pages
        pages += 1
        item = f"<Contents><Key>{PREFIX}batch-{pages}.jsonl</Key><Size>1</Size></Contents>"
        more = f"<NextContinuationToken>{pages}</NextContinuationToken>"
        return f"<ListBucketResult>{item}{more}</ListBucketResult>".encode()

    bucket.list = next_page
    with pytest.raises(OSError, match="lists more than"):
        download_neuronpedia(SAE_ID, tmp_path, bucket=bucket.url, progress=False)
    assert pages == 100


def test_names_in_a_listing_stay_in_the_folder(tmp_path: Path, bucket: Bucket) -> None:
    good, *_ = bucket.files.values()
    names = ("../up.jsonl", "/etc/x.jsonl", "sub/x.jsonl", "\x85x.jsonl", ".hidden.jsonl")
    bucket.files = {f"{PREFIX}{name}": good for name in ("a.jsonl.gz", *names)}
    bucket.files["v1/other/b.jsonl"] = good
    folder = download_neuronpedia(SAE_ID, tmp_path, bucket=bucket.url, progress=False)
    assert [p.name for p in folder.iterdir()] == ["a.jsonl.gz"]
    assert [p.name for p in tmp_path.rglob("*.jsonl*")] == ["a.jsonl.gz"]


def test_a_file_that_is_larger_than_announced(tmp_path: Path, bucket: Bucket) -> None:
    name = f"{PREFIX}a.jsonl"
    bucket.files = {name: b"x" * 10_000_000}
    real, bucket.list = bucket.list, lambda query: real(query).replace(b"10000000", b"99")
    with pytest.raises(OSError, match=r"a\.jsonl should have 99 bytes, got"):
        download_neuronpedia(SAE_ID, tmp_path, bucket=bucket.url, progress=False)
    assert not list(tmp_path.rglob("*.jsonl*"))
