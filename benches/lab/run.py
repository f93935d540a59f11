#!/usr/bin/env python3
"""Interleaved proxy benchmark: CPU per unit of work, added latency and memory, as ratios to a base system.
See README.md. Example: ./run.py --systems l4,haproxy,nginx --workloads W1,W2 --rounds 5 --base haproxy
"""
import argparse, json, os, resource, shutil, signal, socket, statistics as S, subprocess, sys, tempfile, time, urllib.request
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.normpath(os.path.join(HERE, "..", ".."))
BIN = os.environ.get("LAB_BIN") or os.path.join(os.environ.get("CARGO_TARGET_DIR") or os.path.join(ROOT, "target", "lab"), "release")
TLS = os.environ.setdefault("LAB_TLS", os.path.join(tempfile.gettempdir(), f"evergate-lab-tls-{os.getuid()}"))
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

def systems():
    """name -> (argv, extra env): the scripts of systems/ and the lab's own forwarders."""
    s = {}
    sh = os.path.join(HERE, "systems")
    for n in sorted(os.listdir(sh)):
        s[n.removesuffix(".sh")] = ([os.path.join(sh, n)], {})
    b = lambda *a: ([os.path.join(BIN, a[0]), *a[1:]], {})
    s["l4"] = b("l4"); s["l4-splice"] = b("l4", "--splice"); s["minimal-hyper"] = b("minimal_hyper")
    # any variant: name=ENV=1,argv...   (see --define)
    return s

def tree(pid):
    out, todo = [], [pid]
    while todo:
        p = todo.pop(); out.append(p)
        try:
            for t in os.listdir(f"/proc/{p}/task"):
                todo += [int(x) for x in open(f"/proc/{p}/task/{t}/children").read().split()]
        except OSError: pass
    return out
def mem(pids):
    r = {"rss": 0, "pss": 0}
    for p in pids:
        try:
            for l in open(f"/proc/{p}/smaps_rollup"):
                if l.startswith("Rss:"): r["rss"] += int(l.split()[1])
                if l.startswith("Pss:"): r["pss"] += int(l.split()[1])
        except OSError: pass
    return r
def cpu_of(pids):
    t = 0
    for p in pids:
        try: f = open(f"/proc/{p}/stat").read().rsplit(") ", 1)[1].split(); t += int(f[11]) + int(f[12])
        except OSError: pass
    return t / 100

class Sys:
    def __init__(self, name, spec, port, backends, one_core, tls=False):
        self.name, self.port = name, port
        with socket.socket() as t:  # a leftover of another run would share the port by SO_REUSEPORT and falsify everything
            if name != "direct" and t.connect_ex(("127.0.0.1", port)) == 0: raise SystemExit(f"port {port} is taken: stop what listens there")
        if name == "direct":
            self.port = backends[0]; self.p = None; return
        env = dict(os.environ, LISTEN_PORT=str(port), BACKENDS=",".join(f"127.0.0.1:{b}" for b in backends), **spec[1])
        if one_core:
            for k in ("THREADS", "WORKERS", "TOKIO_WORKER_THREADS", "GOMAXPROCS"): env[k] = "1"
        self.dir = tempfile.mkdtemp(prefix="perf-")
        env["RUNDIR"] = self.dir
        if tls: env["TLS"] = "1"
        argv = (["taskset", "-c", "0"] if one_core else []) + spec[0]
        self.log = open(os.path.join(self.dir, "log"), "w")
        self.p = subprocess.Popen(argv, env=env, stdout=self.log, stderr=self.log, start_new_session=True)
    def ready(self, limit=90, tls=False):
        if self.p is None: return True
        t = time.time()
        while time.time() - t < limit:
            if self.p.poll() is not None: return False
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as c:
                    if tls: time.sleep(.3); return True
                    c.settimeout(3); c.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    if b" 200" in c.recv(4096)[:20]: time.sleep(.3); return True
            except OSError: pass
            time.sleep(.2)
        return False
    def pids(self): return tree(self.p.pid) if self.p else []
    def stop(self):
        if self.p is None: return
        if self.p.poll() is not None: shutil.rmtree(self.dir, ignore_errors=True); return
        for p in reversed(self.pids()):
            try: os.kill(p, signal.SIGTERM)
            except OSError: pass
        try: self.p.wait(3)
        except subprocess.TimeoutExpired:
            for p in self.pids():
                try: os.kill(p, signal.SIGKILL)
                except OSError: pass
            self.p.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

class Backend:
    def __init__(self, ports, cpu, *extra):
        self.p = subprocess.Popen([f"{BIN}/backend", "--ports", ",".join(map(str, ports)), "--cpu", str(cpu), *map(str, extra)], stderr=subprocess.DEVNULL)
        time.sleep(.3)
    def stop(self): self.p.terminate(); self.p.wait()

def load(sysm, cpu, *args):
    pids = sysm.pids()
    r = subprocess.run([f"{BIN}/load", "--port", str(sysm.port), "--cpu", str(cpu), "--pids", ",".join(map(str, pids)), *map(str, args)], capture_output=True, text=True)
    try: d = json.loads(r.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError): print("load failed:", r.stdout[-300:], r.stderr[-300:], file=sys.stderr); return None
    d["stderr"] = r.stderr[-300:]
    return d

def certificate():
    """One self-signed certificate for all systems, made anew when older than a day."""
    f = os.path.join(TLS, "both.pem")
    if os.path.exists(f) and time.time() - os.stat(f).st_mtime < 86400: return
    os.makedirs(TLS, mode=0o700, exist_ok=True)
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{TLS}/key.pem", "-out", f"{TLS}/cert.pem",
                    "-days", "30", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    with open(f, "w") as o: o.write(open(f"{TLS}/cert.pem").read() + open(f"{TLS}/key.pem").read())

# workload: (one_core, load args, metric, unit, extra columns)
def wl(secs):
    s = ["--secs", secs]
    return {
        "W1":  (True,  ["--conns", 64, "--warm", 1, *s], "cpu_us_per_req", "µs CPU/request, 1 KiB in and out, keep-alive, 64 connections"),
        "WL":  (True,  ["--conns", 64, "--warm", 1, *s, "--rate", 2000], "cpu_us_per_req", "latency at 2,000 requests/s, open loop"),
        "W2":  (False, ["--conns", 500, "--stream", "--warm", 2.5, "--ramp-ms", 1300, *s], "cpu_us_per_chunk", "µs CPU/chunk, 500 SSE streams of 64 chunks every 20 ms"),
        "W2s": (False, ["--conns", 100, "--stream", "--warm", 2, "--ramp-ms", 1300, *s], "cpu_us_per_chunk", "µs CPU/chunk, 100 SSE streams of 64 chunks every 20 ms (machine not full)"),
        "W2p": (True,  ["--conns", 400, "--stream", "--warm", 2, "--ramp-ms", 1300, *s], "cpu_us_per_chunk", "µs CPU/chunk, 400 SSE streams of 64 chunks every 20 ms, proxy on one core, load and backend on the other"),
        "W2v": (True,  ["--conns", 400, "--stream", "--warm", 2, "--ramp-ms", 1300, *s], "cpu_us_per_chunk", "W2p with backends that are vLLM and give token ids to who asks"),
        "W4":  (True,  ["--conns", 8, "--req-bytes", 1 << 20, "--warm", 1, *s], "cpu_us_per_req", "µs CPU/MiB, 1 MiB request bodies, 8 connections"),
        "W5":  (True,  ["--conns", 16, "--no-keepalive", "--warm", 1, *s], "cpu_us_per_req", "µs CPU/request, a new client connection each"),
        "W6":  (True,  ["--conns", 64, "--tls", "--warm", 1.5, *s], "cpu_us_per_req", "W1 with TLS at the client side"),
    }

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--systems", default="direct,l4,haproxy,nginx,evergate")
    ap.add_argument("--workloads", default="W1,WL,W2,W4,W5,W3")
    ap.add_argument("--rounds", type=int, default=5); ap.add_argument("--secs", type=float, default=3)
    ap.add_argument("--base", default="haproxy"); ap.add_argument("--base2", default="l4")
    ap.add_argument("--out"); ap.add_argument("--port", type=int, default=18100); ap.add_argument("--backend-port", type=int, default=19911)
    ap.add_argument("--mem", default="2000,5000"); ap.add_argument("--define", action="append", default=[], help="name=command line (ENV=x allowed in front)")
    ap.add_argument("--extra", default="", help="more arguments for load, e.g. '--path /v1/chat/completions --plain-json'")
    a = ap.parse_args()
    sy = systems()
    for d in a.define:
        n, c = d.split("=", 1); w = c.split(); env = {}
        while w and "=" in w[0] and not w[0].startswith(("/", "-", ".")): k, v = w.pop(0).split("=", 1); env[k] = v
        if not w[0].startswith(("/", ".")) and os.path.exists(os.path.join(BIN, w[0])): w[0] = os.path.join(BIN, w[0])
        sy[n] = (w, env)
    names = [n for n in a.systems.split(",") if n in sy or n == "direct" or print("unknown system", n, file=sys.stderr)]
    if not os.path.exists(f"{BIN}/load"): raise SystemExit(f"{BIN}/load is missing: cargo build --release in {HERE}, or set LAB_BIN")
    if "W6" in a.workloads: certificate()
    ports = [a.backend_port + i for i in range(3)]
    res = {"when": time.strftime("%F %T"), "rounds": a.rounds, "secs": a.secs, "workloads": {}}
    W = wl(a.secs)
    for w in a.workloads.split(","):
        if w == "W3": res["workloads"][w] = w3(a, sy, names, ports); save(a, res); continue
        one, args, metric, title = W[w]
        args = args + a.extra.split()
        be = Backend(ports, 1 if one else -1, *(["--skin", "vllm"] if w == "W2v" else []))
        live, rows = [], {n: [] for n in names}
        try:
            for i, n in enumerate(names):
                if n == "direct" and w == "W6": continue
                x = Sys(n, sy.get(n), a.port + i, ports, one, w == "W6")
                live.append(x)
            ok = []
            for x in live:
                if x.ready(tls=w == "W6"): ok.append(x)
                else: print(f"{x.name}: not ready: {open(x.dir + '/log').read()[-400:]}", file=sys.stderr)
            for r in range(a.rounds):
                for x in ok:
                    b0 = cpu_of([be.p.pid])
                    d = load(x, 1 if one else -1, *args)
                    if d: rows[x.name].append(d)
        finally:
            for x in live: x.stop()
            be.stop()
        res["workloads"][w] = {"title": title, "metric": metric, "rows": rows}
        table(w, title, metric, rows, a); save(a, res)

def med(v): return S.median(v) if v else float("nan")
def table(w, title, metric, rows, a):
    m = {n: med([d[metric] for d in r]) for n, r in rows.items() if r}
    base, base2 = m.get(a.base), m.get(a.base2)
    # paired: ratio per round, then the median
    def ratio(n, b):
        if b not in m: return float("nan")
        return med([x[metric] / y[metric] for x, y in zip(rows[n], rows[b]) if y[metric]])
    dirl = rows.get("direct") or []
    print(f"\n== {w}: {title}  ({time.strftime('%T')}, load average {os.getloadavg()[0]:.1f})")
    stream = "chunk" in metric
    dl = "one-way delay of a chunk" if stream else "latency"
    print(f"{'system':16} {metric:>16} {'/'+a.base:>9} {'/'+a.base2:>9} {'user%':>6} {'min..max':>15} {'rate/s':>9} {'busy':>5} {'p50 µs':>8} {'p99 µs':>8} {'p999':>8}  errors   ({dl})")
    for n, r in rows.items():
        if not r: continue
        lat = "oneway" if stream else "lat"
        u, s = sum(d["cpu_user"] for d in r), sum(d["cpu_sys"] for d in r)
        err = {}
        for d in r:
            for k, v in d["error_kinds"].items(): err[k] = err.get(k, 0) + v
        print(f"{n:16} {m[n]:16.2f} {ratio(n, a.base):9.2f} {ratio(n, a.base2):9.2f} {100*u/(u+s) if u+s else 0:6.0f} {min(d[metric] for d in r):7.1f}..{max(d[metric] for d in r):<6.1f} {med([d['cps' if stream else 'rps'] for d in r]):9.0f} {med([d.get('cpu_run', 0)/d['secs'] for d in r]):5.2f} "
              f"{med([d[lat]['p50'] for d in r]):8.0f} {med([d[lat]['p99'] for d in r]):8.0f} {med([d[lat]['p999'] for d in r]):8.0f}  {err or 0}")
    sys.stdout.flush()

def w3(a, sy, names, ports):
    out = {}
    print(f"\n== W3: memory of open slow streams (1 chunk/s)  ({time.strftime('%T')})")
    print(f"{'system':16} {'streams':>7} {'idle RSS MiB':>12} {'open RSS MiB':>12} {'RSS KiB/stream':>14} {'PSS KiB/stream':>14} {'after MiB':>9}  open/errors")
    for N in map(int, a.mem.split(",")):
        for i, n in enumerate(names):
            if n == "direct": continue
            be = Backend(ports, -1, "--interval-ms", 1000); x = Sys(n, sy[n], a.port + i, ports, False)
            try:
                if not x.ready(): print(n, "not ready", file=sys.stderr); continue
                load(x, -1, "--conns", 16, "--secs", 1, "--warm", 0)
                time.sleep(.3); m0 = mem(x.pids())
                p = subprocess.Popen([f"{BIN}/load", "--port", str(x.port), "--conns", str(N), "--stream", "--hold", "--interval-ms", "1000", "--ramp-ms", "3000", "--warm", "4", "--secs", "5", "--pids", ",".join(map(str, x.pids()))], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                m1 = None; t = time.time()
                l = p.stdout.readline()
                if l.startswith("ALLOPEN"): time.sleep(2.5); m1 = mem(x.pids())
                rest = p.stdout.read(); p.wait()
                d = json.loads((l + rest).strip().splitlines()[-1])
                time.sleep(1); m2 = mem(x.pids())
                if m1 is None: m1 = {"rss": float("nan"), "pss": float("nan")}
                k = {q: (m1[q] - m0[q]) / N for q in m0}
                out.setdefault(n, {})[N] = {"idle": m0, "open": m1, "after": m2, "per_stream_kib": k, "errors": d["error_kinds"], "cpu_us_per_chunk": d["cpu_us_per_chunk"]}
                print(f"{n:16} {N:7} {m0['rss']/1024:12.1f} {m1['rss']/1024:12.1f} {k['rss']:14.1f} {k['pss']:14.1f} {m2['rss']/1024:9.1f}  {d['open']} {d['error_kinds'] or 0}")
                sys.stdout.flush()
            finally: x.stop(); be.stop()
    return out
def save(a, res):
    if a.out: json.dump(res, open(a.out, "w"), indent=1)
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the systems are stopped under timeout(1) too
    main()
