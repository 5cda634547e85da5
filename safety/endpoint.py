"""Questions to a chat model behind an OpenAI-compatible endpoint, each bounded in bytes, seconds and tries.

    for number, reply, why in ask(texts, "moonshotai/Kimi-K2-Instruct"):      # in the order in which they come

Address and key come from the environment alone, and go nowhere but into the request: no file, line or error has them.

    OPENAI_BASE_URL   any server that has /chat/completions below it, such as http://localhost:8000/v1
    OPENAI_API_KEY    its key, if it wants one; without an address it is for https://api.openai.com/v1
    neither           Hugging Face's router, with HF_TOKEN or the token of `hf auth login`. It is never sent elsewhere

The server isn't trusted: it may be slow, wrong or hostile. What fails for a while (429, 5xx, no answer, no JSON) is tried
again after a pause that doubles; what can't be mended by trying (a bad key, a redirect) ends the command in one line.
"""

import logging
import os
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime

import httpx2  # what huggingface_hub makes its requests with
from huggingface_hub import InferenceClient, get_token, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from run.files import InputError

SECONDS = 120           # from the first byte sent to the last one read, of one try
MOST_BYTES = 1 << 20    # of a reply's body
MOST_TOKENS = 2048      # that the model may write: models that think aloud need them
TRIES, PAUSE, LONGEST = 6, 1.0, 60.0    # of one question; seconds after the first failure, and the most between two
GIVE_UP = 8             # questions that fail in a row before we say that the endpoint is down
NO_KEY = "none"         # sent where there is no key: InferenceClient would send the user's Hugging Face token instead
jitter = random.Random()                # of its own: the run's seeds are not for this


class Failed(Exception):
    """Why a question has no answer; whether to try `again`, and after how many seconds if the server said so."""

    def __init__(self, why, again=True, wait=0.0):
        super().__init__(why)
        self.again, self.wait = again, wait


def address():
    """(base address, key) of the endpoint, from the environment. Raises InputError, which names neither."""
    url, key = (os.environ.get(name, "").strip() for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"))
    if not url and not key:
        url, key = "https://router.huggingface.co/v1", get_token() or ""
        if not key:
            raise InputError("no endpoint to ask: set OPENAI_BASE_URL (and OPENAI_API_KEY if it wants a key), or HF_TOKEN "
                             "for Hugging Face's, or give a folder with a Gemma-2 chat checkpoint as --judge-model")
    url = (url or "https://api.openai.com/v1").rstrip("/")
    if not re.fullmatch(r"https?://[\w.-]+(:\d{1,5})?(/[\w.~%/-]*)?|https?://\[[0-9a-fA-F:]+\](:\d{1,5})?(/[\w.~%/-]*)?", url, re.A):
        raise InputError("OPENAI_BASE_URL is no plain address: give http(s)://HOST[:PORT]/PATH, without user, password or query")
    if not re.fullmatch(r"[!-~]*", key):
        raise InputError("the endpoint's key (OPENAI_API_KEY or HF_TOKEN) holds a space or a letter that no key has")
    return url, key or NO_KEY


class Bounded(httpx2.Client):
    """An HTTP client whose requests all end: at a deadline, at a number of bytes, and at the first address."""

    def __init__(self):
        # A connection serves one request, so that cutting it at the deadline cuts nobody else's
        super().__init__(headers={"accept-encoding": "identity"}, limits=httpx2.Limits(max_keepalive_connections=0))
        self.cuts, self.over = set(), False

    def send(self, request, **_):
        held, late = [], threading.Event()

        def trace(event, info):
            if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
                held.append(info["return_value"].get_extra_info("socket"))
                if late.is_set():
                    cut()

        def cut():
            late.set()
            for sock in held:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

        # httpx's own time limits are for one read each: a byte now and then, in the headers too, would never end
        timeout = httpx2.Timeout(SECONDS, connect=min(10, SECONDS)).as_dict()
        request.extensions = request.extensions | {"trace": trace, "timeout": timeout}
        timer = threading.Timer(SECONDS, cut)
        timer.daemon = True
        self.cuts.add(cut)
        if self.over:
            cut()
        timer.start()
        try:
            response = super().send(request, stream=True, follow_redirects=False)
            try:
                return httpx2.Response(200, content=self.body(response), request=request)
            finally:
                response.close()
        except (httpx2.HTTPError, OSError) as error:
            slow = late.is_set() or isinstance(error, httpx2.TimeoutException)
            raise Failed(f"no whole answer in {SECONDS:g} s" if slow else f"no connection ({type(error).__name__})") from None
        finally:
            timer.cancel()
            self.cuts.discard(cut)

    def body(self, response):
        """The bytes of a good response. Raises Failed or InputError for any other."""
        status = response.status_code
        if status in (401, 402, 403):
            raise InputError(f"the judge's endpoint answers HTTP {status}: it wants another key, or more credit "
                             "(OPENAI_API_KEY, or HF_TOKEN)")
        if status in (404, 405):
            raise InputError(f"the judge's endpoint answers HTTP {status}: it has no such --judge-model, or OPENAI_BASE_URL "
                             "lacks its path (most end in /v1)")
        if status // 100 == 3:
            raise InputError(f"the judge's endpoint redirects (HTTP {status}), which isn't followed, since the key would go along: "
                             "set OPENAI_BASE_URL to where it really is")
        if status != 200:
            again = status in (408, 409, 425, 429) or status >= 500
            raise Failed(f"HTTP {status}{_message(response)}", again, _seconds(response.headers.get("retry-after", "")))
        if response.headers.get("content-encoding", "identity") != "identity":
            raise Failed("a compressed answer, which wasn't asked for")      # a few KB can unpack to many GB
        body = bytearray()
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > MOST_BYTES:
                raise Failed(f"an answer of more than {MOST_BYTES:,} bytes")
        return bytes(body)

    def abort(self):
        """End all requests under way, and those that still come."""
        self.over = True
        for cut in list(self.cuts):
            cut()


def _message(response):
    """What an error's body says, in short: most say it in JSON, as "message"."""
    start = next(response.iter_raw(), b"")[:4096].decode(errors="replace")
    found = re.search(r'"message"\s*:\s*"((?:[^"\\]|\\.)*)', start)
    return f" ({' '.join(found[1].split())[:200]})" if found else ""


def _seconds(text):
    """Seconds to wait, of a Retry-After header: a number or a date."""
    with suppress(ValueError, OverflowError):
        return float(text) if re.fullmatch(r"\d{1,9}(\.\d+)?", text) else parsedate_to_datetime(text).timestamp() - time.time()
    return 0.0


def ask(texts, model, parallel=8, worked=False):
    """Yield (number, reply, why) for each of `texts`, a question of one turn: reply is the model's text, or None with the reason.

    `parallel` questions are under way at once. Raises InputError where trying again can't help (key, address, redirect), and
    when the endpoint looks down: GIVE_UP questions in a row, or all, fail after all their tries. One that has `worked`
    before may turn single questions away (HTTP 400: filters do) for as long as it likes.
    """
    url, key = address()
    secrets = [secret for secret in (key, url, url.split("/")[2]) if secret != NO_KEY]

    def secretive(text):                                                    # some servers repeat what they were sent
        for secret in secrets:
            text = text.replace(secret, "[…]")
        return text

    session, stop = Bounded(), threading.Event()
    client = InferenceClient(base_url=f"{url}/chat/completions", api_key=key)
    pool = ThreadPoolExecutor(parallel)
    with _quiet(), _requests_through(session):
        try:
            futures = {pool.submit(_patient, client, model, text, stop): number for number, text in enumerate(texts)}
            row = 0                                                         # failures in a row
            for done, future in enumerate(as_completed(futures), 1):
                try:
                    if (reply := future.result()) is None:                  # stopped: another future knows why
                        continue
                    reply, why, row, worked = secretive(reply), None, 0, True
                except Failed as failed:
                    reply, why = None, secretive(str(failed))
                    row += failed.again or not worked
                yield futures[future], reply, why
                if row >= GIVE_UP or done == len(futures) and not worked:
                    raise InputError(f"the judge's endpoint failed {row} times in a row, at last with: {why}. What it judged is kept: "
                                     "the same command goes on from there")
        finally:
            stop.set()
            session.abort()
            pool.shutdown(cancel_futures=True)


def _patient(client, model, text, stop):
    """One question's reply, after as many tries as it takes; None once all have stopped. Raises Failed and InputError."""
    for attempt in range(TRIES):
        if stop.is_set():
            return None
        try:
            return _reply(client, model, text)
        except InputError:
            stop.set()
            raise
        except Failed as failed:
            pause = min(LONGEST, max(failed.wait, PAUSE * 2 ** attempt * jitter.uniform(0.5, 1)))
            if not failed.again or attempt == TRIES - 1 or stop.wait(pause):
                raise


def _reply(client, model, text):
    try:
        out = client.chat_completion([{"role": "user", "content": text}], model=model, temperature=0, max_tokens=MOST_TOKENS)
        reply = out.choices[0].message.content
    except (Failed, InputError):
        raise
    except Exception as error:                                              # whatever a body of the wrong shape leads to
        raise Failed(f"an answer that is no chat completion ({type(error).__name__})") from None
    if not isinstance(reply, str):
        raise Failed("a chat completion without text", again=False)         # filtered, or all thought and no answer
    return reply


@contextmanager
def _requests_through(session):
    """huggingface_hub has one HTTP client for everything it does: ours, for as long as we ask."""
    set_client_factory(lambda: session)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)
        session.close()


@contextmanager
def _quiet():
    """These packages log addresses and headers."""
    loggers = [logging.getLogger(name) for name in ("httpx2", "httpcore2", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
