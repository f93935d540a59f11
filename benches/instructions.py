#!/usr/bin/env python3
"""The gate of instructions: counts them in user space by callgrind, which does the same on every machine and at
every load, and fails where one of the numbers kept in instructions.toml has grown by more than 3 %.

    benches/instructions.py             compare
    benches/instructions.py --write     renew the numbers, in the commit whose change they are

Counted are a request, and an event of a stream armed for resume, through the release build with every default on
(EVERGATE_BIN, the lab in LAB_BIN), and the decisions of decisions.rs. Needs valgrind. The whole proxy's numbers scatter
by a part in a hundred, because wake-ups fall together or not; so they are asked up to three times and the least answer
counts. Events come one by one (`lab/lockstep.py`): under load they scatter by more than the gate allows.
"""
import json, os, re, subprocess, sys

HERE = os.path.dirname(os.path.abspath(__file__))
KEPT = os.path.join(HERE, "instructions.toml")
TOLERANCE = 0.03
PROXY_TRIES = 3
PROXY = {"request": "req", "event": "lockstep"}
DECISIONS = ["pick", "classify", "route", "request", "answer", "decode", "journal"]
TIMES = (1000, 5000)  # of a decision; whole streams of the case `journal`


def kept():
    """name -> number; the names of a table carry its name."""
    numbers, table = {}, ""
    for line in open(KEPT):
        if heading := re.match(r"\[(\w+)\]", line): table = heading[1] + "."
        elif pair := re.match(r"(\w+) *= *(\d+)", line): numbers[table + pair[1]] = int(pair[2])
    return numbers


def proxy(mode):
    r = subprocess.run([sys.executable, os.path.join(HERE, "lab", "icount.py"), "--systems", "evergate", "--mode", mode], stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    found = re.search(r"(\d+) instructions/\w+ +\(errors 0\)", r.stdout)
    if not found: raise SystemExit(f"the lab says: {r.stdout}")
    return int(found[1])


def bench():
    """The binary of decisions.rs, built."""
    r = subprocess.run(["cargo", "build", "--profile", "optimized", "--locked", "--bench", "decisions", "--message-format=json-render-diagnostics"],
                       cwd=os.path.dirname(HERE), stdout=subprocess.PIPE, text=True, check=True)
    built = [json.loads(line) for line in r.stdout.splitlines()]
    return next(m["executable"] for m in built if m.get("target", {}).get("name") == "decisions" and m.get("executable"))


def decision(binary, case):
    def run(times):
        r = subprocess.run(["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", binary, case, str(times)], stderr=subprocess.PIPE, text=True)
        if r.returncode: raise SystemExit(r.stderr)
        return int(re.search(r"Collected : (\d+)", r.stderr)[1])
    return round((run(TIMES[1]) - run(TIMES[0])) / (TIMES[1] - TIMES[0]))


def write(numbers):
    head = "".join(line for line in open(KEPT) if line.startswith("#"))
    with open(KEPT, "w") as f:
        f.write(head)
        for table in ("proxy", "decisions"):
            f.write(f"\n[{table}]\n")
            for name, number in numbers.items():
                if name.startswith(table): f.write(f"{name.split('.')[1]} = {number}\n")


def main():
    writing, before, now, grown = "--write" in sys.argv, kept(), {}, []
    def judge(name, measure, tries):
        limit, least = before.get(name, 0) * (1 + TOLERANCE), None
        for _ in range(tries):
            number = measure()
            least = min(number, least or number)
            if not writing and least <= limit: break
        now[name] = least
        change = (least / before[name] - 1) * 100 if before.get(name) else 0
        print(f"{name:20} {before.get(name, 0):9} -> {least:9}  {change:+6.1f} %", flush=True)
        if least > limit: grown.append(name)
    for name, mode in PROXY.items(): judge(f"proxy.{name}", lambda: proxy(mode), PROXY_TRIES)
    binary = bench()
    for case in DECISIONS: judge(f"decisions.{case}", lambda: decision(binary, case), 1)
    if writing: return write(now)
    if grown: raise SystemExit(f"more than {TOLERANCE:.0%} above benches/instructions.toml: {', '.join(grown)}\nif that is what the change is worth: benches/instructions.py --write")


if __name__ == "__main__": main()
