#!/usr/bin/env python3
"""A stream that cannot be resumed, in the hands of real SDKs: they raise an error, and never take a cut for a whole answer.

Two scripted engines behind evergate: one dies in the middle of each stream, the other gives another answer. For each feature
of a request, with resuming on, off, and with a journal too small, the OpenAI and Anthropic SDKs of Python and of JavaScript
read the stream. Each must have a strict prefix of the uncut answer, and then an error.

  refusals.py

env: EVERGATE_BIN (default target/release/evergate), REALWORLD (see setup.sh; the JavaScript half is skipped, and says so,
where `setup.sh node` was not run or there is no node). Ends with `N passed, N failed`; exit code 1 when one failed.
"""
import http.server, json, os, pathlib, shutil, signal, socket, struct, subprocess, sys, tempfile, threading, time, urllib.request

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REALWORLD = pathlib.Path(os.environ.get("REALWORLD") or ROOT / ".realworld").resolve()
PYTHON = REALWORLD / "venv/bin/python"
if pathlib.Path(sys.prefix).resolve() != (REALWORLD / "venv").resolve():
    if not PYTHON.exists(): sys.exit(f"{PYTHON} is missing: run setup.sh")
    os.execv(PYTHON, [str(PYTHON), *sys.argv])
import anthropic, openai

BINARY = os.environ.get("EVERGATE_BIN") or str(pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target") / "release/evergate")
WORK = pathlib.Path(tempfile.mkdtemp(prefix="evergate-refusals-"))
WORDS = [f"lighthouse-keepers-and-their-lamps-{n} " for n in range(40)]
TOLD = 32  # events before the death
children, checks = [], []


def check(name, good, detail=""):
    checks.append(bool(good))
    if not good or detail != "": print(f"{'ok  ' if good else 'FAIL'} {name}{': ' + str(detail) if detail != '' else ''}", flush=True)


def events(path, body, words):
    """The wire of a whole answer, event by event; the first stands before any word."""
    data = lambda event: f"data: {json.dumps(event)}\n\n"
    if path == "/v1/messages":
        named = lambda event: f"event: {event['type']}\n" + data(event)
        yield named({"type": "message_start", "message": {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 0}}}) + named({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
        for w in words: yield named({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": w}})
        yield named({"type": "content_block_stop", "index": 0}) + named({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 9}}) + named({"type": "message_stop"})
        return
    chat = path == "/v1/chat/completions"
    def chunk(delta, finish=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish} if chat else {"index": 0, "text": delta.get("content", ""), "logprobs": None, "finish_reason": finish}
        if body.get("logprobs") and chat and delta.get("content"): choice["logprobs"] = {"content": [{"token": delta["content"], "logprob": -.1, "bytes": None, "top_logprobs": []}]}
        return data({"id": "c", "object": "chat.completion.chunk" if chat else "text_completion", "created": 1, "model": "m", "choices": [choice]})
    yield chunk({"role": "assistant", "content": ""})
    for n, w in enumerate(words):
        if body.get("tools"):
            call = {"index": 0, "function": {"arguments": w}}
            if n == 0: call |= {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": w}}
            yield chunk({"tool_calls": [call]})
        elif body.get("user") == "thinks": yield chunk({"reasoning_content": w})
        else: yield chunk({"content": w})
    yield chunk({}, "tool_calls" if body.get("tools") else "stop") + "data: [DONE]\n\n"


class Engine(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    dies = True
    def log_message(self, *_): pass
    def do_GET(self):
        body = b"{}"
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        words = WORDS if self.dies else WORDS[:7] + ["a light goes out "] + WORDS[8:]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream"); self.send_header("transfer-encoding", "chunked"); self.end_headers()
        for n, event in enumerate(events(self.path, body, words)):
            if self.dies and n == TOLD:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(f"{len(event.encode()):x}\r\n{event}\r\n".encode()); self.wfile.flush()
            time.sleep(.001)
        self.wfile.write(b"0\r\n\r\n")


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, *_): pass  # a connection that the engine itself closed


def engine(dies):
    server = Server(("127.0.0.1", 0), type("Engine", (Engine,), {"dies": dies}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_proxy(name, dying, other, resume):
    port = free_port()
    (WORK / f"{name}.toml").write_text(f"""
[[listener]]
address = "127.0.0.1:{port}"
[admin]
address = "127.0.0.1:{free_port()}"
[[pool]]
backends = [{{ url = "{dying}" }}, {{ url = "{other}", tier = 1 }}]
probe = {{ kind = "off" }}
health = {{ eject_consecutive = 1000, success_rate_min = 0.0 }}
retry = {{ wait_max = "100ms", budget_floor = 1000.0 }}
resume = {{ {resume} }}
""")
    log = open(WORK / f"{name}.log", "ab")
    children.append(subprocess.Popen([BINARY, "run", "--config", str(WORK / f"{name}.toml")], stdout=log, stderr=log, stdin=subprocess.DEVNULL))
    end = time.monotonic() + 20
    while True:
        try: socket.create_connection(("127.0.0.1", port), 1).close(); return f"http://127.0.0.1:{port}"
        except OSError:
            if time.monotonic() > end or children[-1].poll() is not None: raise SystemExit(f"evergate did not start:\n{(WORK / f'{name}.log').read_text()[-2000:]}")
            time.sleep(.05)


MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CASES = {  # feature: SDK, endpoint and what is asked
    "chat": ("openai", "chat", {}), "two choices": ("openai", "chat", {"n": 2}),
    "JSON mode": ("openai", "chat", {"response_format": {"type": "json_object"}}),
    "tools begun": ("openai", "chat", {"tools": [TOOL]}), "thinking": ("openai", "chat", {"user": "thinks"}),
    "log probabilities": ("openai", "chat", {"logprobs": True}), "a limit": ("openai", "chat", {"max_tokens": 500}),
    "completion": ("openai", "completion", {"max_tokens": 500}), "completion, two choices": ("openai", "completion", {"max_tokens": 500, "n": 2}),
    "Anthropic messages": ("anthropic", "messages", {"max_tokens": 500}),
}


def read(url, sdk, endpoint, more):
    """What the SDK of Python gives: the text, and the error or None."""
    text = ""
    try:
        if sdk == "anthropic":
            for e in anthropic.Anthropic(base_url=url, api_key="none", max_retries=0).messages.create(model="m", messages=MESSAGES, stream=True, **more):
                if e.type == "content_block_delta": text += e.delta.text
            return text, None
        c = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=30)
        if endpoint == "completion":
            for e in c.completions.create(model="m", prompt="Hi", stream=True, **more): text += e.choices[0].text
            return text, None
        for e in c.chat.completions.create(model="m", messages=MESSAGES, stream=True, **more):
            delta = e.choices[0].delta
            text += delta.content or getattr(delta, "reasoning_content", None) or "".join(t.function.arguments for t in delta.tool_calls or [])
        return text, None
    except (openai.APIError, anthropic.APIError) as e: return text, f"{type(e).__name__}: {e}"


def judge(name, text, error):
    uncut = "".join(WORDS)
    prefix = uncut.startswith(text) and 0 < len(text) < len(uncut)
    check(name, prefix and error, "" if prefix and error else f"error {error!r} after {len(text)} of {len(uncut)} characters, …{text[-50:]!r}")


def main():
    if not os.access(BINARY, os.X_OK): sys.exit(f"{BINARY} is missing: cargo build --release, or set EVERGATE_BIN")
    dying, other = engine(True), engine(False)
    whole = [read(other, *case) for case in CASES.values()]
    check("the SDKs read whole answers without an error", all(error is None and len(text) > 1000 for text, error in whole), f"{len(whole)} features")
    proxies = {name: start_proxy(name, dying, other, resume) for name, resume in
               {"diverging": 'mode = "best"', "off": 'mode = "off"', "over cap": 'journal_bytes_max = "1KiB"'}.items()}
    for why, url in proxies.items():
        for feature, case in CASES.items():
            text, error = read(url, *case)
            judge(f"Python, {feature}, {why}", text, error)
    print(f"     Python: {len(CASES) * len(proxies)} streams; the last said {error}", flush=True)
    npm = REALWORLD / "npm"
    if not shutil.which("node") or not (npm / "node_modules/openai").is_dir() or not (npm / "node_modules/@anthropic-ai/sdk").is_dir():
        print("SKIPPED: the SDKs of JavaScript are not installed (setup.sh node)", flush=True)
        if "CI_SKIPPED" in os.environ: open(os.environ["CI_SKIPPED"], "a").write("refusals: the SDKs of JavaScript are not installed\n")
        return
    asked = [[why, url, feature, *case] for why, url in proxies.items() for feature, case in CASES.items()]
    node = subprocess.run(["node", str(HERE / "refusals.mjs"), json.dumps(asked)], env={**os.environ, "CLIENTS_DIR": str(npm)}, capture_output=True, text=True, timeout=120)
    lines = [json.loads(line) for line in node.stdout.splitlines()]
    check("the JavaScript half came to its end", node.returncode == 0 and len(lines) == len(asked), node.stderr[-500:] if node.returncode else f"{len(lines)} streams; the last said {lines[-1]['error']}")
    for line in lines: judge(f"JavaScript, {line['feature']}, {line['why']}", line["text"], line["error"])


signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
try:
    main()
except BaseException as e:  # also an interrupt or a missing binary is a run that failed, and says so in its last line
    check("the run came to its end", False, f"{type(e).__name__}: {e}")
    if isinstance(e, Exception): raise
finally:
    for child in children:
        if child.poll() is None: child.kill(); child.wait()
    failed = checks.count(False)
    if failed or not checks: print(f"logs: {WORK}")
    else: shutil.rmtree(WORK, ignore_errors=True)
    print(f"{checks.count(True)} passed, {failed} failed", flush=True)
sys.exit(bool(failed))
