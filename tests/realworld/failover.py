#!/usr/bin/env python3
"""Real engines die under real clients: what a client of the real OpenAI SDK sees through the proxy.

Two llama.cpp servers behind one proxy; workers ask without pause, streaming and not, at temperature 0, without retries of
their own, while one engine after the other is killed by SIGKILL and started again. Every answer is compared with what an
engine says when asked directly (see greedy_path). Nothing may fail before its first token, nothing may be wrong or silently short, and
afterwards both engines serve again.

  run.sh [--proxy evergate|haproxy|direct] [--kills 6] [--gap 4] [--require-resume]

env: EVERGATE_BIN (default target/release/evergate), REALWORLD (see setup.sh). `haproxy` and `direct` (one engine that nobody
kills) prove this script, not a product. Ends with `N passed, N failed`; exit code 1 when one failed.
"""
import argparse, collections, json, os, pathlib, random, re, shutil, signal, socket, subprocess, sys, tempfile, threading, time, urllib.request

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REALWORLD = pathlib.Path(os.environ.get("REALWORLD") or ROOT / ".realworld").resolve()
PYTHON = REALWORLD / "venv/bin/python"
if pathlib.Path(sys.prefix).resolve() != (REALWORLD / "venv").resolve():
    if not PYTHON.exists(): sys.exit(f"{PYTHON} is missing: run setup.sh")
    os.execv(PYTHON, [str(PYTHON), *sys.argv])
import openai

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--proxy", choices=["evergate", "haproxy", "direct"], default="evergate")
arguments.add_argument("--kills", type=int, default=6)
arguments.add_argument("--gap", type=float, default=4, help="seconds both engines run between two kills")
arguments.add_argument("--tokens", type=int, default=160)
arguments.add_argument("--streams", type=int, default=4, help="streaming clients")
arguments.add_argument("--plain", type=int, default=2, help="clients that do not stream")
arguments.add_argument("--require-resume", action="store_true", help="a broken stream fails the run even if its error was visible")
args = arguments.parse_args()

PROMPTS = ["bada koge", "tell me", "one two three", "zaba nida foro", "why", "kilo mega giga", "red green blue", "list four"]
BINARY = os.environ.get("EVERGATE_BIN") or str(pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target") / "release/evergate")
WORK = pathlib.Path(tempfile.mkdtemp(prefix="evergate-realworld-"))
children, checks = [], []


def check(name, good, detail=""):
    checks.append(bool(good))
    print(f"{'ok  ' if good else 'FAIL'} {name}{': ' + str(detail) if detail != '' else ''}", flush=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def spawn(name, argv, env=None):
    log = open(WORK / f"{name}.log", "ab")
    child = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})})
    children.append(child)
    return child


def get(url, timeout=2):
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return answer.read().decode()


def eventually(what, condition, limit=60):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            if condition(): return True
        except OSError: pass
        time.sleep(.1)
    print(f"     never seen within {limit} s: {what}", flush=True)
    return False


class Engine:
    def __init__(self, name):
        self.name, self.port, self.child = name, free_port(), None
        self.url = f"http://127.0.0.1:{self.port}"
    def start(self):
        self.child = spawn(self.name, [PYTHON, str(HERE / "engine.py"), "--port", str(self.port), "--model", str(REALWORLD / "mid.gguf"), "--slots", "8", "--ctx", "8192"])
        if not eventually(f"{self.name} healthy", lambda: get(self.url + "/health")): raise SystemExit(f"{self.name} did not start: {WORK}/{self.name}.log")
    def kill(self):
        self.child.kill(); self.child.wait(); children.remove(self.child)
    def tokens(self):
        return float(re.search(r"^llamacpp:tokens_predicted_total (\S+)", get(self.url + "/metrics"), re.M).group(1))


def start_proxy(engines, port):
    if args.proxy == "haproxy":
        servers = "\n".join(f"    server {e.name} 127.0.0.1:{e.port}" for e in engines)
        (WORK / "haproxy.cfg").write_text(f"""defaults
    mode http
    timeout connect 1s
    timeout client 60s
    timeout server 60s
    retries 3
    option redispatch 1
    retry-on all-retryable-errors
frontend fe
    bind 127.0.0.1:{port}
    default_backend be
backend be
    balance roundrobin
    option http-buffer-request
    option httpchk GET /health
    default-server check inter 500ms fall 1 rise 2 on-marked-down shutdown-sessions
{servers}
""")
        return spawn("proxy", ["haproxy", "-db", "-f", str(WORK / "haproxy.cfg")])
    argv = [BINARY, "run", "--listen", f"127.0.0.1:{port}", "--admin", f"127.0.0.1:{free_port()}", "--access-log", str(WORK / "access.log")]
    for e in engines: argv += ["--backend", e.url]
    return spawn("proxy", argv)


def client(url):
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60)


def ask(c, prompt, stream):
    """Yields the pieces of the answer; the last is the finish reason."""
    request = dict(model="tiny", messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=args.tokens, stream=stream)
    if not stream:
        choice = c.chat.completions.create(**request).choices[0]
        yield choice.message.content
        yield choice.finish_reason
        return
    reason = None
    for event in c.chat.completions.create(**request):
        for choice in event.choices:
            reason = choice.finish_reason or reason
            if choice.delta.content: yield choice.delta.content
    yield reason


NEAR_TIE = .3  # in natural logarithms of probability; wrong words are whole units away


def greedy_path(engine, prompt, text, expected):
    """None if `text` is an answer an engine gives at temperature 0, else why not.

    Another batch or a prefix read at once instead of word by word changes the last bits of floating point, and with them
    now and then the choice between two words of nearly equal probability; all that follows then differs. So where
    `text` leaves the expected answer, the engine is asked how near the two words are, and continues from there.
    """
    words, expected = text.split(), expected.split()
    if text.strip() != " ".join(words): return "torn words"
    for _ in range(40):
        k = len(os.path.commonprefix([words, expected]))
        if k == len(words): return None
        if k == len(expected): return f"{len(words)} words instead of {len(expected)}"
        head = {"role": "assistant", "content": "".join(" " + w for w in words[:k])}
        def go_on(tail, n):
            messages = [{"role": "user", "content": prompt}] + ([{**head, "content": head["content"] + tail}] if head["content"] + tail else [])
            return client(engine.url).chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=n, logprobs=n == 1, top_logprobs=20 if n == 1 else None)
        likely = {t.token.strip(): t.logprob for t in go_on("", 1).choices[0].logprobs.content[0].top_logprobs}
        apart = max(likely.values()) - likely.get(words[k], -99)
        if apart > NEAR_TIE: return f"word {k} is {words[k]!r}, {apart:.1f} less likely than the engine's {expected[k]!r}"
        expected = words[:k + 1]
        if k + 1 < args.tokens:
            more = go_on(" " + words[k], args.tokens - k - 1).choices[0].message.content.split()
            expected = more if more[:k + 1] == expected else expected + more
    return "left the expected answer 40 times"


class Tally:
    def __init__(self):
        self.lock, self.count, self.examples, self.spans, self.different = threading.Lock(), collections.Counter(), {}, [], collections.Counter()
    def add(self, kind, example=None):
        with self.lock:
            self.count[kind] += 1
            if example: self.examples.setdefault(kind, example)


def worker(url, stream, seed, reference, stop, tally):
    rng, c, label = random.Random(seed), client(url), "stream" if stream else "plain"
    while not stop.is_set():
        prompt = rng.choice(PROMPTS)
        pieces, error, began = [], None, time.monotonic()
        try:
            for piece in ask(c, prompt, stream): pieces.append(piece)
        except Exception as e:  # whatever a program that uses the SDK would see
            error = f"{type(e).__name__}: {str(e)[:200]}"
        text, ended = "".join(p for p in (pieces if error else pieces[:-1]) if p), time.monotonic()
        whole = error is None and [text, pieces[-1]] == reference[prompt]  # near ties are counted later
        with tally.lock: tally.spans.append((began, ended, stream, whole))
        if whole: tally.add(f"{label} whole")
        elif error and not pieces: tally.add(f"{label} failed", f"{error} after {ended - began:.2f} s")
        elif error is None and (len(text.split()) != args.tokens or pieces[-1] != "length"):
            tally.add(f"{label} wrong", f"{prompt!r}: {len(text.split())} of {args.tokens} words, finish {pieces[-1]!r}: …{text[-60:]!r}")
        else:
            if error: tally.add("stream broken", error)
            if not reference[prompt][0].startswith(text):
                with tally.lock: tally.different[label, prompt, text, error is None] += 1
        if error: time.sleep(.05)


def main():
    if args.proxy == "evergate" and not os.access(BINARY, os.X_OK): sys.exit(f"{BINARY} is missing: cargo build --release, or set EVERGATE_BIN")
    engines = [Engine("one")] if args.proxy == "direct" else [Engine("one"), Engine("two")]
    for e in engines: e.start()
    reference = {p: None for p in PROMPTS}
    same = True
    for p in PROMPTS:
        answers = [list(ask(client(e.url), p, False)) for e in engines]
        reference[p] = answers[0]
        same &= all(a == answers[0] and a[1] == "length" for a in answers)
    check("the engines asked directly agree on every answer", same)
    words = reference[PROMPTS[0]][0].split()
    lost, twice = words[:50] + words[51:] + words[:1], words[:50] + words[49:-1]
    check("a lost or doubled word would be seen", all(greedy_path(engines[0], PROMPTS[0], "".join(" " + w for w in t), " ".join(words)) for t in (lost, twice)))
    proxy, url = None, engines[0].url
    if args.proxy != "direct":
        port = free_port(); url = f"http://127.0.0.1:{port}"
        proxy = start_proxy(engines, port)
        if not eventually("the proxy serves", lambda: proxy.poll() is not None or get(url + "/v1/models"), 20) or proxy.poll() is not None:
            raise SystemExit(f"the proxy did not start:\n{(WORK / 'proxy.log').read_text()[-2000:]}")
        time.sleep(2)  # both engines probed
    tally, stop, kills = Tally(), threading.Event(), []
    threads = [threading.Thread(target=worker, args=(url, i < args.streams, i, reference, stop, tally), daemon=True) for i in range(args.streams + args.plain)]
    for t in threads: t.start()
    time.sleep(args.gap)
    for i in range(args.kills if proxy else 0):
        e = engines[i % 2]
        kills.append(time.monotonic()); e.kill()
        time.sleep(1.5)
        e.start()
        time.sleep(args.gap)
        print(f"     kill {i + 1} of {args.kills} ({e.name}): {dict(tally.count)}", flush=True)
    stop.set()
    for t in threads: t.join(90)
    n, near_ties = tally.count, 0
    for (label, prompt, text, ended), times in tally.different.items():
        reason = greedy_path(engines[0], prompt, text, reference[prompt][0])
        if reason: n[f"{label} wrong"] += times; tally.examples.setdefault(f"{label} wrong", f"{prompt!r}: {reason}")
        else: n[f"{label} whole"] += times * ended; near_ties += times
    print(f"     {near_ties} answers took another of two nearly equal words, as engines do", flush=True)
    caught = sum(1 for b, e, _, _ in tally.spans if any(b < k < e for k in kills))
    through = sum(1 for b, e, s, whole in tally.spans if s and whole and any(b < k < e for k in kills))
    why = lambda kind: f"{n[kind]}" + (f", the first: {tally.examples[kind]}" if n[kind] else "")
    check("no worker hangs", not any(t.is_alive() for t in threads))
    check("requests that do not stream: none failed", n["plain failed"] == 0 and n["plain whole"] > 10, f"{n['plain whole']} whole, failed {why('plain failed')}")
    check("requests that do not stream: none wrong", n["plain wrong"] == 0, why("plain wrong"))
    check("streams: none failed before its first token", n["stream failed"] == 0 and n["stream whole"] > 10, f"{n['stream whole']} whole, failed {why('stream failed')}")
    check("streams: none wrong or silently short", n["stream wrong"] == 0, why("stream wrong"))
    if kills:
        check("the kills met work in progress", caught >= len(kills), f"{caught} requests were open at a kill, {through} of them streams that ended whole")
        print(f"     streams broken visibly after their first token: {why('stream broken')}")
        if args.require_resume: check("streams: none broken", n["stream broken"] == 0, why("stream broken"))
        before = [e.tokens() for e in engines]
        def both_work():
            list(ask(client(url), random.choice(PROMPTS), False))
            return all(e.tokens() > b for e, b in zip(engines, before))
        check("both engines serve again", eventually("tokens from both engines", both_work, 90))
        smoke = subprocess.run([PYTHON, str(HERE / "clients_smoke.py"), url], capture_output=True, text=True, timeout=120)
        check("other SDKs stream through it", smoke.returncode == 0, (smoke.stdout.strip().splitlines() or ["nothing said"])[-1])
        if smoke.returncode: print(smoke.stdout + smoke.stderr[-2000:])
        check("the proxy never died", proxy.poll() is None)
        if args.proxy == "evergate":
            proxy.terminate()
            try: code = proxy.wait(45)
            except subprocess.TimeoutExpired: code = "still running after 45 s"
            check("the proxy ends by SIGTERM with 0", code == 0, code)


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
