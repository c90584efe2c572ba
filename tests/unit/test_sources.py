"""Sources: what folders, globs, lists, manifests and buckets stand for, and what is refused."""

import http.server
import os
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.curation.plan import PlanError
from pipelines.curation.sources import read_sources

SHA = "ab" * 32


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the commands run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names: str, content: str = "x") -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def uris(*patterns: str, limit: int | None = None) -> list[str]:
    return read_sources(patterns, limit=limit)["uri"].to_pylist()


def rows(*patterns: str) -> list[dict[str, str]]:
    """The rows, without what is not known."""
    found = read_sources(patterns).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in found]


def test_folders_files_globs_and_lists_name_the_same_sources(here):
    write("v/a.mp4", "v/b.mp4", "v/sub/UPPER.MOV", "v/notes.md")
    (here / "list.txt").write_text(f"# mine\n\n{here}/v\n")
    expected = ["v/a.mp4", "v/b.mp4", "v/sub/UPPER.MOV"]
    assert uris("v") == uris("./v/") == uris("v*") == sorted(expected)
    assert uris(".") == sorted(expected)
    assert uris("list.txt") == sorted(f"{here}/{name}" for name in expected)
    assert uris("v/*.mp4", "v/a.mp4") == ["v/a.mp4", "v/b.mp4"]
    assert uris("v/notes.md") == ["v/notes.md"]


def test_hidden_files_pipes_and_circles_of_links_are_left_out(here):
    write("v/a.mp4", "v/._a.mp4", "v/.work/b.mp4")
    os.mkfifo("v/pipe.mp4")
    (here / "v" / "circle").symlink_to(here / "v")
    (here / "v" / "link.mp4").symlink_to(here / "v" / "a.mp4")
    (here / "v" / "dangling.mp4").symlink_to(here / "gone.mp4")
    assert uris("v") == ["v/a.mp4", "v/link.mp4"]


def test_names_that_look_like_addresses_or_globs_stay_files(here):
    write("a:b.mp4", "v/take [1].mp4")
    assert uris(".") == ["./a:b.mp4", "v/take [1].mp4"]
    assert uris("a:b.mp4") == uris("a*.mp4") == ["./a:b.mp4"]
    (here / "list.txt").write_text("./a:b.mp4\nv/take [1].mp4\n")
    assert uris("list.txt") == ["./a:b.mp4", "v/take [1].mp4"]


@pytest.mark.parametrize("pattern", ["nowhere", "*.mp4", "."])
def test_a_pattern_without_videos_is_an_error(here, pattern):
    with pytest.raises(PlanError, match="holds no videos"):
        uris(pattern)


def test_names_that_no_record_could_hold_are_an_error(here):
    write("v/a\nb.mp4")
    with pytest.raises(PlanError, match=r"control characters: 'v/a\\nb\.mp4'"):
        uris("v")
    (here / "w").mkdir()
    Path(os.fsdecode(b"w/\xff.mp4")).write_text("x")
    with pytest.raises(PlanError, match="1 names that are not UTF-8"):
        uris("w")


def test_the_limit_counts_after_sorting(here):
    write("b.mp4", "a.mp4", "c.mp4")
    assert uris("c.mp4", "b.mp4", "a.mp4", limit=2) == ["a.mp4", "b.mp4"]
    with pytest.raises(PlanError, match="limit of 0"):
        uris("a.mp4", limit=0)


def test_tables_of_every_kind_give_the_same_sources(here):
    write("m/v/a.mp4")
    (here / "m/m.csv").write_text(
        '﻿URL,License,Title,other,sha256\nv/a.mp4,CC0,"two\nlines",1,\n'
        f"https://h.org/x?a=b,,,2,{SHA.upper()}\n"
    )
    (here / "m/m.tsv").write_text(
        f"file\tlicence\ttitle\tsha256\nv/a.mp4\tCC0\ttwo lines\t\nhttps://h.org/x?a=b\t\t\t{SHA}\n"
    )
    (here / "m/m.jsonl").write_text(
        '{"path": "v/a.mp4", "licence": "CC0", "title": "two\\u0000 lines", "more": {"x": [1]}}\n'
        f'{{"path": "https://h.org/x?a=b", "sha256": "{SHA}"}}\n'
    )
    table = {
        "video": pa.array(["v/a.mp4", "https://h.org/x?a=b"]).dictionary_encode(),
        "licence": ["CC0", None],
        "title": ["two lines", ""],
        "sha256": [None, SHA],
        "size": [1, 2],
    }
    pq.write_table(pa.table(table), here / "m/m.parquet")
    expected = [
        {"uri": "https://h.org/x?a=b", "sha256": SHA},
        {"uri": "m/v/a.mp4", "licence": "CC0", "title": "two lines"},
    ]
    for name in ("m.csv", "m.tsv", "m.jsonl", "m.parquet"):
        assert rows(f"m/{name}") == expected, name


def test_a_source_that_is_named_twice_is_one_and_keeps_what_is_known(here):
    write("v/a.mp4", "v/b.mp4")
    Path("m.csv").write_text("uri,licence,title\nv/a.mp4,,first\nv/a.mp4,CC0,second\n")
    assert rows("v", "m.csv") == [
        {"uri": "v/a.mp4", "licence": "CC0", "title": "first"},
        {"uri": "v/b.mp4"},
    ]


def test_a_table_without_a_column_of_sources_is_refused_with_its_columns(here):
    Path("m.csv").write_text("name,size\na.mp4,3\n")
    with pytest.raises(
        PlanError, match=r"has the columns 'name', 'size'; expected one of uri, url"
    ):
        uris("m.csv")
    pq.write_table(pa.table({"url": [1]}), "m.parquet")
    with pytest.raises(PlanError, match="int64 in its column 'url'"):
        uris("m.parquet")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("file:///etc/passwd", "kind that is not fetched"),
        ("ftp://h.org/a.mp4", "kind that is not fetched"),
        ("data:video/mp4;base64", "kind that is not fetched"),
        ("javascript:alert(1)", "kind that is not fetched"),
        ("concat:a.mp4|b.mp4", "kind that is not fetched"),
        ("https://", "kind that is not fetched"),
        ("https://u:p@h.org/a.mp4", "user or password"),
        ("s3://bucket/a::file:///etc/passwd", "'::'"),
        ("a\x07b.mp4", "control characters"),
        ("https://h.org/" + "x" * 5000, "longer than 4096"),
        ('""', "is empty"),
    ],
)
def test_a_row_that_is_no_source_is_refused_with_its_number(here, row, complaint):
    Path("m.csv").write_text(f"uri,title\nhttps://h.org/1,a\n{row},b\n")
    with pytest.raises(PlanError, match=rf"m\.csv names 1 source .*\n  row 2 .*{complaint}"):
        uris("m.csv")


def test_of_many_bad_rows_the_first_few_are_named(here):
    lines = [f"https://h.org/{i}" for i in range(3000)]
    lines[10::100] = ["ftp://h.org"] * len(lines[10::100])
    Path("list.txt").write_text("# a remark\n" + "\n".join(lines))
    with pytest.raises(PlanError, match="names 30 sources") as caught:
        uris("list.txt")
    text = str(caught.value)
    assert [f"row {number} " in text for number in (12, 112, 412, 512)] == [True, True, True, False]
    assert "and 25 more" in text


def test_a_wrong_hash_is_refused(here):
    Path("m.csv").write_text("uri,sha256\nhttps://h.org/1,abc\n")
    with pytest.raises(PlanError, match="row 1 has a sha256 that is not 64 hex digits"):
        uris("m.csv")


def test_a_list_may_not_name_lists(here):
    Path("list.txt").write_text("other.txt\n")
    Path("other.txt").write_text("list.txt\n")
    with pytest.raises(PlanError, match="row 1 is a list itself"):
        uris("list.txt")


@pytest.mark.parametrize("name", ["m.csv", "list.txt"])
def test_a_list_of_files_that_are_not_there_is_refused(here, name):
    Path(name).write_text("uri\na.mp4\nb.mp4\n".removeprefix("" if name == "m.csv" else "uri\n"))
    with pytest.raises(PlanError, match=r"lists files that do not exist, such as 'a\.mp4'"):
        uris(name)
    write("b.mp4")
    assert uris(name) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", b""),
        ("m.csv", b"uri\n"),
        ("m.csv", b"uri\nhttps://h/\xff\n"),
        ("m.csv", b"uri,b\nhttps://h/1,2,3\n"),
        ("m.csv", b'uri\n"' + b"x" * (20 << 20)),
        ("m.csv", b"uri,uri\na,b\n"),
        ("m.jsonl", b'{"uri": "https://h/1"}\n{"uri": 2}\n'),
        ("m.jsonl", b'{"uri": "https://h/1"}\n[1]\n'),
        ("m.jsonl", b'{"uri": "\\ud800"}\n'),
        ("m.jsonl", b"[" * 100_000),
        ("m.parquet", b"PAR1" + b"\xff" * 50 + b"PAR1"),
        ("list.txt", b"\xff\xfe"),
        ("list.txt", b"x" * (20 << 20)),
        ("list.txt", b"\n# nothing\n"),
    ],
)
def test_damaged_manifests_are_an_error_that_names_them(here, name, content):
    Path(name).write_bytes(content)
    with pytest.raises(PlanError, match=name):
        uris(name)


def test_lines_across_blocks_are_whole(here, monkeypatch):
    monkeypatch.setattr("pipelines.curation.manifests._BLOCK_BYTES", 64)
    lines = [f"https://h.org/{number:03d}.mp4" for number in range(50)]
    Path("list.txt").write_text("\r\n".join(lines))
    assert uris("list.txt") == lines
    Path("list.txt").write_text("\n".join([*lines, "ftp://x"]))
    with pytest.raises(PlanError, match="row 51 "):
        uris("list.txt")


def test_addresses_are_taken_as_they_are_but_lists_must_be_downloaded(here):
    assert uris("https://h.org/watch?v=1", "http://[::1]:80/x") == [
        "http://[::1]:80/x",
        "https://h.org/watch?v=1",
    ]
    with pytest.raises(PlanError, match="download it"):
        uris("https://h.org/list.csv")
    with pytest.raises(PlanError, match="kind that is not fetched"):
        uris("file:///etc/passwd")


class _Bucket(http.server.BaseHTTPRequestHandler):
    """As much of S3 as listing and small reads need; `objects` are of the bucket `b`."""

    objects: dict[str, bytes]
    asked: list[str]

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        self.asked.append(f"{self.command} {self.path}")
        key = url.path.removeprefix("/b").lstrip("/")
        if not key:
            self._answer(200, self._listing(query), "application/xml")
        elif key in self.objects:
            self._answer(200, self.objects[key], "binary/octet-stream")
        else:
            self._answer(404, b"", "application/xml")

    do_HEAD = do_GET  # noqa: N815

    def _listing(self, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        keys, folders = [], set()
        for key in sorted(key for key in self.objects if key.startswith(prefix)):
            rest = key.removeprefix(prefix)
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                keys.append(key)
        contents = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.objects[key])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
            for key in keys
        )
        common = "".join(
            f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>" for folder in folders
        )
        return (
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>'
            f"<KeyCount>{len(keys) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
            f"{contents}{common}</ListBucketResult>"
        ).encode()

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Bucket]]:
    """s3://b, through the real client of S3, on this machine."""
    pytest.importorskip("s3fs")
    import fsspec.config

    handler = type("Handler", (_Bucket,), {"objects": {}, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    options = {
        "anon": True,
        "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{server.server_port}"},
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    yield handler
    server.shutdown()
    server.server_close()


def test_buckets_give_folders_globs_and_objects_without_reading_a_video(here, bucket):
    names = ("v/a.mp4", "v/sub/b.MOV", "v/notes.md", "v/.work/c.mp4", "other/d.mp4", "e")
    bucket.objects = dict.fromkeys(names, b"x")
    assert uris("s3://b/v") == uris("s3://b/v/") == ["s3://b/v/a.mp4", "s3://b/v/sub/b.MOV"]
    assert uris("s3://b/*/*.mp4") == ["s3://b/other/d.mp4", "s3://b/v/a.mp4"]
    assert uris("s3://b/e") == ["s3://b/e"]
    Path("list.txt").write_text("s3://b/v\nhttps://h.org/1\n")
    assert uris("list.txt") == ["https://h.org/1", "s3://b/v/a.mp4", "s3://b/v/sub/b.MOV"]
    assert not [line for line in bucket.asked if line.startswith("GET /b/v/")]
    bucket.asked.clear()
    assert uris("s3://b/v/a.mp4") == ["s3://b/v/a.mp4"]
    assert bucket.asked == []
    with pytest.raises(PlanError, match="holds no videos"):
        uris("s3://b/nothing")


def test_a_manifest_in_a_bucket_may_not_name_files_of_this_machine(here, bucket):
    write("a.mp4")
    bucket.objects = {
        "good.csv": b"uri,licence\ns3://b/v/a.mp4,CC0\nhttps://h.org/1,\n",
        "bad.csv": b"uri\nhttps://h.org/1\n/etc/passwd\na.mp4\n",
        "bad.txt": b"https://h.org/1\na.mp4\n",
    }
    assert rows("s3://b/good.csv") == [
        {"uri": "https://h.org/1"},
        {"uri": "s3://b/v/a.mp4", "licence": "CC0"},
    ]
    with pytest.raises(PlanError, match=r"names 2 sources(.|\n)*row 2 is a path of this machine"):
        uris("s3://b/bad.csv")
    with pytest.raises(PlanError, match="row 2 is a path of this machine"):
        uris("s3://b/bad.txt")


def test_a_bucket_that_cannot_be_listed_is_an_error_that_says_how_to_mend_it(here, monkeypatch):
    fsspec_config = pytest.importorskip("fsspec.config")
    pytest.importorskip("s3fs")
    options = {
        "anon": True,
        "client_kwargs": {"endpoint_url": "http://127.0.0.1:1"},
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    monkeypatch.setitem(fsspec_config.conf, "s3", options)
    with pytest.raises(PlanError, match=r"s3://gone/v cannot be listed: .*FSSPEC_S3_ANON=true"):
        uris("s3://gone/v")
