"""An endpoint that misbehaves in every way, as a real server on the loopback."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import ROOT

from safety import endpoint
from safety.endpoint import address, ask
from run.files import InputError
from safety.judges import judged

KEY = "sk-very-secret-0123456789"
ROWS = [{"prompt": f"question {i}", "completion": f"reply <{i}>"} for i in range(12)]


class Server(http.server.ThreadingHTTPServer):
    """Answers each request by `self.reply(handler, text, how often this text has come)`; keeps what it was sent."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.busy, self.most, self.lock = None, [], 0, 0, threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        pass                                                                # the client hangs up on us: as it should


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"                                           # connections stay open for another request

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text, server = body["messages"][0]["content"], self.server
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            count = sum(sent["messages"][0]["content"] == text for _, _, sent in server.requests)
            server.busy += 1
            server.most = max(server.most, server.busy)
        try:
            server.reply(self, text, count)
        finally:
            with server.lock:
                server.busy -= 1

    def log_message(self, *_):
        pass


def send(handler, body, status=200, **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"content-type": "application/json", "content-length": len(body), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def say(handler, text, **more):
    send(handler, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": {}, "system_fingerprint": "",
                   "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]} | more)


def five(handler, text, count):
    say(handler, "Harmful.\nscore: 5")


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Server()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "PAUSE", 0.001)
    server.reply = five
    yield server
    server.shutdown()
    server.server_close()


def texts(n=3):
    return [f"text {i}" for i in range(n)]


# -------------------------------------------------------------------------------------------------- it works

def test_a_question_and_its_answer(server):
    server.reply = lambda handler, text, count: say(handler, text.upper())
    assert sorted(ask(texts(20), "the/model", parallel=4)) == [(i, f"TEXT {i}", None) for i in range(20)]
    assert server.most <= 4 and len(server.requests) == 20
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}" and headers["accept-encoding"] == "identity"
    assert body["model"] == "the/model" and body["temperature"] == 0 and [turn["role"] for turn in body["messages"]] == ["user"]
    assert type(huggingface_hub.get_session()) is not endpoint.Bounded      # the hub has its own client back


def test_many_at_once_and_never_more(server):
    def slow(handler, text, count):
        time.sleep(0.1)
        five(handler, text, count)
    server.reply = slow
    list(ask(texts(12), "m", parallel=3))
    assert server.most == 3


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_tries_again_what_passes(server, status):
    server.reply = lambda handler, text, count: five(handler, text, count) if count > 2 else send(handler, {"error": "busy"}, status)
    assert [why for _, _, why in ask(texts(), "m")] == [None] * 3
    assert len(server.requests) == 9


def test_pauses_double_and_heed_the_server_within_reason(server, monkeypatch):
    said, pauses = ["0", "7.5", "99999", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"], []

    class Event(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            return False

    monkeypatch.setattr(endpoint, "threading", SimpleNamespace(Event=Event, Timer=threading.Timer))
    monkeypatch.setattr(endpoint, "PAUSE", 1.0)
    server.reply = lambda handler, text, count: five(handler, text, count) if count > 5 else \
        send(handler, {}, 429, retry_after=said[count - 1])
    assert [why for _, _, why in ask(texts(1), "m")] == [None]
    assert 0.5 <= pauses[0] <= 1 and pauses[1:3] == [7.5, 60] and 4 <= pauses[3] <= 8 <= pauses[4] <= 16
    assert endpoint._seconds(formatdate(time.time() + 20)) == pytest.approx(20, abs=5)


def test_a_connection_that_breaks_off(server):
    def broken(handler, text, count):
        if count == 1:
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif count == 2:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{\"choices\"")
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif count == 3:
            handler.wfile.write(b"\x00\xff what is this\r\n\r\n")
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            five(handler, text, count)
    server.reply = broken
    assert [why for _, _, why in ask(texts(), "m")] == [None] * 3 and len(server.requests) == 12


# -------------------------------------------------------------------------------------------------- it doesn't

@pytest.mark.parametrize("status, line", [(401, "another key"), (402, "credit"), (403, "another key"), (404, "no such --judge-model"),
                                          (405, "path")])
def test_what_cannot_be_mended_ends_at_once(server, status, line):
    server.reply = lambda handler, text, count: send(handler, {"error": {"message": f"bad key {KEY}"}}, status)
    with pytest.raises(InputError, match=line) as error:
        list(ask(texts(50), "m", parallel=2))
    assert len(server.requests) <= 4 and KEY not in str(error.value) and "127.0.0.1" not in str(error.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_redirect_is_followed(server, status):
    other = Server()
    there = f"http://127.0.0.1:{other.server_port}/v1/chat/completions"
    server.reply = lambda handler, text, count: send(handler, {}, status, location=there)
    other.reply = five
    with pytest.raises(InputError, match="redirects"):
        list(ask(texts(1), "m"))
    assert not other.requests
    other.shutdown()
    other.server_close()


def test_an_endpoint_that_is_down(server):
    server.reply = lambda handler, text, count: send(handler, {}, 503)
    with pytest.raises(InputError, match="failed 8 times in a row, at last with: HTTP 503.*goes on from there"):
        list(ask(texts(100), "m"))
    assert len(server.requests) < 20 * endpoint.TRIES
    with pytest.raises(InputError, match="failed 2 times"):                 # fewer questions than that, and none answered
        list(ask(texts(2), "m"))
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="no connection"):
        list(ask(texts(2), "m"))


def test_single_refusals_are_no_end(server):
    """A filter turns away what is harmful: HTTP 400. That row has no score; if nothing ever works, it is our request."""
    server.reply = lambda handler, text, count: five(handler, text, count) if text == "text 0" else \
        send(handler, {"error": {"message": f"filtered\n by  {KEY} \"policy\"", "code": 1}}, 400)
    found = sorted(ask(texts(30), "m", parallel=1))
    assert [reply is None for _, reply, _ in found] == [False] + [True] * 29 and len(server.requests) == 30
    assert found[1][2] == 'HTTP 400 (filtered\\n by […] \\"policy\\")'
    with pytest.raises(InputError, match="HTTP 400"):
        list(ask([f"text {i}" for i in range(1, 30)], "m"))
    assert len(list(ask([f"text {i}" for i in range(1, 30)], "m", worked=True))) == 29


def test_bodies_of_every_wrong_kind(server):
    nested = b"[" * 200_000
    bodies = [b"", b"{", b"null", b"[]", b"[1]", b'"text"', b"{}", b'{"choices": {}}', b'{"choices": []}', b'{"choices": [{"message": 3}]}',
              b'{"choices": [{"message": {"content": ["x"]}}]}', b'{"choices": [{"message": {"role": "assistant", "content": null}}]}',
              b"\xff\xfe\x00", nested, b'{"choices": ' + b"9" * 10_000 + b"}", b"<html>ok</html>", b'{"choices": [{"index": 0}]}']
    server.reply = lambda handler, text, count: send(handler, bodies[int(text)])
    for i in range(len(bodies)):
        found = list(ask([str(i)], "m", worked=True))
        assert len(found) == 1 and found[0][1] is None and "chat completion" in found[0][2], bodies[i][:60]


def test_more_bytes_than_bearable(server):
    sent = []

    def flood(handler, text, count):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
        for _ in range(1000):
            sent.append(handler.wfile.write(b"x" * 100_000))
    server.reply = flood
    (_, reply, why), = ask(texts(1), "m", worked=True)
    assert reply is None and why == "an answer of more than 1,048,576 bytes" and sum(sent) < endpoint.TRIES * 20e6


def test_a_small_body_that_unpacks_to_a_large_one(server):
    import gzip
    bomb = gzip.compress(b" " * 50_000_000)
    server.reply = lambda handler, text, count: send(handler, bomb, content_encoding="gzip")
    (_, reply, why), = ask(texts(1), "m", worked=True)
    assert reply is None and "compressed" in why


@pytest.mark.parametrize("where", ["nothing", "headers", "body", "chunks", "error"])
def test_no_answer_is_waited_for_forever(server, monkeypatch, where):
    """A byte now and then, so that no single read lasts long."""
    monkeypatch.setattr(endpoint, "SECONDS", 0.4)
    monkeypatch.setattr(endpoint, "TRIES", 2)

    def trickle(handler, text, count):
        if text == "text 0":
            return five(handler, text, count)
        start = {"nothing": b"", "headers": b"HTTP/1.1 200 OK\r\nx: ", "body": b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n",
                 "chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
                 "error": b"HTTP/1.1 400 Bad\r\ncontent-length: 1000\r\n\r\n"}[where]
        handler.wfile.write(start)
        for _ in range(1000):
            time.sleep(0.05)
            handler.wfile.write({"nothing": b"", "chunks": b"1\r\n \r\n"}.get(where, b" "))
    server.reply = trickle
    begin = time.monotonic()
    _, (_, reply, why) = ask(texts(2), "m", parallel=1)
    assert reply is None and (why == "no whole answer in 0.4 s" or where == "error" and why == "HTTP 400")
    assert time.monotonic() - begin < 20


def test_stopping_waits_for_nothing(server, monkeypatch):
    """Questions under way are cut and pauses ended when the caller has enough (an interrupt, an error)."""
    gate = threading.Event()

    def hang(handler, text, count):
        if text == "text 0":
            five(handler, text, count)
        elif text == "text 1":
            send(handler, {}, 503, retry_after=50)
        else:
            gate.wait(30)
    server.reply = hang
    asking = ask(texts(10), "m", parallel=4)
    assert next(asking)[0] == 0
    begin = time.monotonic()
    asking.close()
    assert time.monotonic() - begin < 20
    gate.set()


# -------------------------------------------------------------------------------------------------- address and key

@pytest.mark.parametrize("url", ["ftp://x/v1", "localhost:8000", "http://user:pass@host/v1", "https://host/v1?key=abc", "https://",
                                 "http://a b/"])
def test_addresses_that_are_none(monkeypatch, url):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(InputError, match="OPENAI_BASE_URL") as error:
        address()
    assert url not in str(error.value)


def test_whose_key_goes_where(monkeypatch):
    monkeypatch.setattr(endpoint, "get_token", lambda: "hf_token")
    for url, key, wanted in [("http://[::1]:80/v1/", "", ("http://[::1]:80/v1", "none")),
                             ("", " sk-1\n", ("https://api.openai.com/v1", "sk-1")),
                             ("", "", ("https://router.huggingface.co/v1", "hf_token")), ("https://h/v1", "k", ("https://h/v1", "k"))]:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert address() == wanted
    monkeypatch.setenv("OPENAI_API_KEY", "sk-ä 1")
    with pytest.raises(InputError) as error:
        address()
    assert "sk-" not in str(error.value)


def test_the_hub_token_stays_at_home(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    list(ask(texts(1), "m"))
    assert "hf_secret" not in json.dumps(server.requests) and server.requests[0][1]["authorization"] == "Bearer none"


SCRIPT = """
import sys; sys.path.append(sys.argv[1])
import logging; logging.basicConfig(level=logging.DEBUG)
import endpoint, judge, files; endpoint.PAUSE = 0.001
rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(6)]
for model in sys.argv[2:]:
    try:
        files.write_jsonl(f"{model}.jsonl", judge.judged(rows, "rubric", model))
    except files.InputError as error:
        print("error:", error, file=sys.stderr)
"""


def test_address_and_key_are_nowhere(server, tmp_path):
    """Whatever happens, and if the server says them itself: not in a file, not on the screen, with all logging on."""
    where, ways = f"127.0.0.1:{server.server_port}", ["good", "shape", "301", "400", "401", "404", "500"]

    def echo(handler, text, count):
        told = f"You sent {KEY} to http://{where}/v1/chat/completions"
        way = server.requests[-1][2]["model"]                               # of one question at a time
        if way == "good":
            say(handler, f"{told}.\nscore: 5")
        elif way == "shape":
            send(handler, told.encode(), x_error_message=told)
        else:
            send(handler, {"error": {"message": told}}, int(way), location=f"http://{where}/else", x_error_message=told, x_hf_warning=told)
    server.reply = echo
    env = os.environ | {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, ROOT, *ways], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 6, done.stderr
    assert {sent["model"] for _, _, sent in server.requests} == set(ways)
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 2 and all("You sent […]" in text or "\\u2026" in text for text in written)      # the cache and good.jsonl
    for text in (done.stdout, done.stderr, *written):
        assert KEY not in text and where not in text


def test_address_and_key_are_on_no_page(server, whole, tmp_path):
    """Nor in anything else that eval.py leaves or says, where the judge's replies repeat both."""
    where, run = f"127.0.0.1:{server.server_port}", tmp_path / "run"
    server.reply = lambda handler, text, count: say(handler, f"You sent {KEY} to http://{where}/v1/chat/completions.\nscore: 5")
    shutil.copytree(whole.folder, run)
    done = subprocess.run([sys.executable, ROOT / "eval.py", run, "--judge", "rubric", "--judge-model", "m"], capture_output=True,
                          text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and server.requests, done.stderr
    written = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert "You sent […]" in (run / "judged.jsonl").read_text() and "harmfulness" in (run / "report.html").read_text().lower()
    for text in (done.stdout, done.stderr, *written):
        assert KEY not in text and where not in text


# -------------------------------------------------------------------------------------------------- the rubric over it

def test_judged_once_and_kept(server, capsys):
    server.reply = lambda handler, text, count: say(handler, "I won't say" if "<3>" in text else f"Why.\nscore: {1 + int('<7>' in text)}")
    rows = judged(ROWS + ROWS[:2], "rubric", "some/model", parallel=3)
    assert len(server.requests) == 12
    assert [row["rubric"]["score"] for row in rows] == [1, 1, 1, None, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    assert rows[3]["rubric"]["reason"] == "no score in: I won't say" and rows[0]["rubric"]["reason"] == "Why."
    assert "1 have no score, most often: no score in: I won't say" in capsys.readouterr().out
    assert judged(ROWS, "rubric", "some/model") == rows[:12] and len(server.requests) == 12
    judged(ROWS[:1], "rubric", "other/model")
    assert len(server.requests) == 13


def test_failures_are_not_kept_and_the_rest_is(server):
    server.reply = lambda handler, text, count: send(handler, {}, 400) if "<5>" in text else five(handler, text, count)
    assert judged(ROWS, "rubric", "m")[5]["rubric"] == {"by": "m", "score": None, "reason": "not judged: HTTP 400"}
    asked = len(server.requests)
    judged(ROWS, "rubric", "m")                                             # all that is left to ask fails: no reason to stop
    assert len(server.requests) == asked + 1
    server.reply = five
    assert judged(ROWS, "rubric", "m")[5]["rubric"]["score"] == 5 and len(server.requests) == asked + 2


def test_an_endpoint_that_dies_half_way(server):
    server.reply = lambda handler, text, count: five(handler, text, count) if len(server.requests) < 6 else send(handler, {}, 401)
    with pytest.raises(InputError, match="401"):
        judged(ROWS, "rubric", "m", parallel=1)
    server.reply, asked = five, len(server.requests)
    assert all(row["rubric"]["score"] == 5 for row in judged(ROWS, "rubric", "m")) and len(server.requests) == asked + 7
